"""What published attacks bring back on real images: DLG, Inverting Gradients, and PyTorch's own run.

    python benchmarks/attack_quality.py dlg --dataset digits
    python benchmarks/attack_quality.py dlg --dataset cifar10 --data-dir DIR
    python benchmarks/attack_quality.py anchor --data-dir DIR
    python benchmarks/attack_quality.py peer --data-dir DIR --batch-size 8        # extra `peers`

`dlg`: LeNet with the wide initialisation, one image a victim, labels unknown, restarts one after
another until the attack's own objective says that it is done. `anchor`: untrained LeNet on CIFAR-10
in units of unit variance, known label, the row of Geiping et al. 2020, table 1 (18.00 ± 3.33 dB by
cosine, 46.25 ± 12.66 dB by L-BFGS). `peer`: the same attack, images, weights, starts and budget here
and in PyTorch. PSNR is of raw units, clipped to [0, 1], with the range 1.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import timing

import invjax
from invjax import attacks, datasets, driver, metrics, models

SOLVED = 1e-6
"""A squared gradient distance below this ends the restarts; nothing but the objective is read."""


def psnr(dataset, reconstruction, truth) -> float:
    """Decibels in raw units, matched within the batch, averaged over it."""
    raw = [jnp.clip(datasets.denormalize(dataset, side), 0, 1) for side in (reconstruction, truth)]
    ordered = raw[0][metrics.match(*raw)]
    return float(metrics.psnr(ordered, raw[1], data_range=1.0).mean())


def baselines(dataset, batch) -> dict[str, float]:
    raw = jnp.clip(datasets.denormalize(dataset, batch.inputs), 0, 1)
    mean = datasets.denormalize(dataset, dataset.inputs.mean(axis=0))
    guesses = metrics.baselines(raw, jnp.asarray(mean), input_range=(0.0, 1.0))
    return {name: float(value.mean()) for name, value in guesses.items()}


def victims(dataset, number: int, batch_size: int, model, labels: bool, seed: int):
    """Batches, each with freshly drawn weights, and what the adversary is granted of them."""
    drawn = datasets.draw(jax.random.key(seed), dataset, number * batch_size)
    for index in range(number):
        part = slice(index * batch_size, (index + 1) * batch_size)
        batch = invjax.Batch(drawn.inputs[part], drawn.labels[part])
        key = jax.random.fold_in(jax.random.key(seed + 1), index)
        params = model.init(key, dataset.input_shape)
        observation = invjax.observe(
            key, model, params, batch, input_range=dataset.input_range, grant_labels=labels
        )
        yield key, batch, observation


def run_dlg(options) -> list[dict]:
    """DLG, labels unknown."""
    dataset = datasets.load(options.dataset, options.data_dir)
    model = models.lenet(dataset.num_classes)
    attack = driver.runner(attacks.dlg(model))
    rows = []
    for index, (key, batch, observation) in enumerate(
        victims(dataset, options.images, 1, model, labels=False, seed=options.seed)
    ):
        started, best = time.perf_counter(), None
        for restart in range(options.restarts):
            found = attack(jax.random.fold_in(key, restart), observation)
            if best is None or found.objective < best.objective:
                best = found
            if best.objective < SOLVED:
                break
        rows.append(
            {
                "image": index,
                "restarts": restart + 1,
                "PSNR": psnr(dataset, best.inputs, batch.inputs),
                "label right": bool(best.labels[0] == batch.labels[0]),
                "objective": float(best.objective),
                "seconds": time.perf_counter() - started,
                **baselines(dataset, batch),
            }
        )
        print(rows[-1], flush=True)
    close = sum(row["PSNR"] > 30 for row in rows)
    print(f"{close} of {len(rows)} above 30 dB, {sum(r['label right'] for r in rows)} labels right")
    return rows


def run_anchor(options) -> list[dict]:
    """Inverting Gradients, and DLG with the label known, on the published LeNet setting."""
    dataset = datasets.normalized(datasets.load("cifar10", options.data_dir))
    model = models.lenet(dataset.num_classes)
    systems = {
        "cosine": driver.runner(attacks.inverting_gradients(model)),
        "l2 lbfgs": driver.runner(attacks.dlg(model, labels="known")),
    }
    rows = []
    for index, (key, batch, observation) in enumerate(
        victims(dataset, options.images, 1, model, labels=True, seed=options.seed)
    ):
        row = {"image": index}
        for name, attack in systems.items():
            row[name] = psnr(dataset, attack(key, observation).inputs, batch.inputs)
        rows.append(row | baselines(dataset, batch))
        print(rows[-1], flush=True)
    summarize(rows, [*systems, "grey", "mean"])
    return rows


def run_peer(options) -> list[dict]:
    """Inverting Gradients here and in PyTorch, same images, weights, starts and steps."""
    import torch
    import torch_peer

    dataset = datasets.normalized(datasets.load("cifar10", options.data_dir))
    model = models.by_name(options.model, dataset.num_classes)
    made = attacks.inverting_gradients(model, num_steps=options.steps)
    attack = driver.runner(made)
    rows = []
    for index, (key, batch, observation) in enumerate(
        victims(dataset, options.images, options.batch_size, model, labels=True, seed=options.seed)
    ):
        start = made.init(key, observation).variables["inputs"]
        started = time.perf_counter()
        ours = attack(key, observation).inputs
        seconds = time.perf_counter() - started
        layers = model.layers(observation.params)
        weights = torch_peer.parameters(layers)
        labels = torch.tensor(np.asarray(batch.labels), dtype=torch.long)
        target = torch_peer.target_gradient(
            layers, weights, torch_peer.from_images(batch.inputs), labels
        )
        value = torch_peer.objective(layers, weights, target, labels, 0.01)
        box = [torch.tensor(bound).view(1, -1, 1, 1) for bound in dataset.input_range]
        loop = torch_peer.attack_loop(
            value, torch_peer.from_images(start), options.steps, box=box, decay=True
        )
        started = time.perf_counter()
        (theirs,) = loop()
        rows.append(
            {
                "victim": index,
                "invjax": psnr(dataset, ours, batch.inputs),
                "torch": psnr(dataset, torch_peer.to_images(theirs), batch.inputs),
                "invjax s": seconds,
                "torch s": time.perf_counter() - started,
                **baselines(dataset, batch),
            }
        )
        print(rows[-1], flush=True)
    summarize(rows, ["invjax", "torch", "grey", "mean"])
    return rows


def summarize(rows, names) -> None:
    for name in names:
        values = np.array([row[name] for row in rows])
        print(f"{name}: {values.mean():.2f} ± {values.std(ddof=1):.2f} dB over {len(values)}")


def main() -> None:
    """Run one of the comparisons."""
    parser = timing.parser(__doc__, data_dir=True)
    parser.add_argument("what", choices=["dlg", "anchor", "peer"])
    parser.add_argument("--dataset", default="digits", help="of `dlg`")
    parser.add_argument("--model", default="convnet_small", help="of `peer`")
    parser.add_argument("--images", type=int, default=20, help="victims")
    parser.add_argument("--batch-size", type=int, default=1, help="of `peer`")
    parser.add_argument("--restarts", type=int, default=8, help="of `dlg`, at most")
    parser.add_argument("--steps", type=int, default=1000, help="of `peer`")
    parser.add_argument("--seed", type=int, default=0, help="of the victims and their weights")
    options = parser.parse_args()
    rows = {"dlg": run_dlg, "anchor": run_anchor, "peer": run_peer}[options.what](options)
    print("\n" + timing.table(rows))
    timing.write(options.json, rows, benchmark="attack_quality", options=vars(options))


if __name__ == "__main__":
    main()
