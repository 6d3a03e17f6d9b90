"""Exact attacks against batch size and width, beside optimisation (Pan et al. 2022 and relatives).

    python benchmarks/papers/exclusivity.py --json exclusivity.json --figure boundary.png
    python benchmarks/papers/exclusivity.py --dataset mnist --data-dir DATA --train-steps 0 300
    python benchmarks/papers/exclusivity.py --dataset cifar10 --data-dir DATA --widths 1000

For every width, state of training and batch size the same random batches are attacked by each: neuron
exclusivity, certified row scan, SPEAR (up to `--spear-limit` samples), the imprints of a malicious server,
LOKI on the mean of two clients who hold half a batch each, and up to `--matching-limit` samples DLG and
Inverting Gradients with known labels. Exact attacks run in float64. `recovered` is the share of samples with
a mean squared error under 1e-4, `false` those said to be found that are not; `seconds` are per batch without
compilation, in the median and the `longest`. `sufficient` is the share of random batches that meet the
paper's condition.
"""

import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.figure import Figure

sys.path.append(str(pathlib.Path(__file__).parents[1]))
import timing

import invjax
from invjax import attacks, datasets, metrics, models
from invjax.attacks import imprints
from invjax.evaluation import utility
from invjax.report.figures import png

CLOSE = 1e-4
CLIENTS = 2
"""Of LOKI's aggregate."""


def draw(data, number: int, size: int, seed: int) -> invjax.Batch:
    """Random batches `[V, B, ...]`."""
    rng = np.random.default_rng([seed, size])
    return datasets.take(data, np.stack([rng.permutation(len(data))[:size] for _ in range(number)]))


def planted(name: str, model, auxiliary, size: int, width: int):
    """The imprint of a name, or `None`; binning has as many bins as the layer has units."""
    shape = auxiliary.inputs.shape[1:]
    moments = {"mean": float(auxiliary.inputs.mean()), "std": float(auxiliary.inputs.std())}
    made = {
        "robbing the fed": lambda: imprints.robbing_the_fed(model, shape, width),
        "trap weights": lambda: imprints.trap_weights(model, shape, cascade=True),
        "qbi": lambda: imprints.qbi(model, shape, max(size, 2), cascade=True, **moments),
        "pairs": lambda: imprints.pairs(model, shape, max(size, 2), cascade=True, **moments),
        "soliton-free": lambda: imprints.soliton_free(model, shape, size, cascade=True),
        "soliton-data": lambda: imprints.soliton_data(model, shape, size, cascade=True),
        "loki": lambda: imprints.loki(model, shape, CLIENTS, width),
    }
    return made[name]() if name in made else None


def passive(name: str, model, spear_steps: int):
    """An attack on the model as it is."""
    return {
        "exclusivity": lambda: attacks.exclusivity(model),
        "row scan": lambda: attacks.row_scan(model),
        "spear": lambda: attacks.spear(model, num_steps=spear_steps),
        "dlg": lambda: attacks.dlg(model, labels="known"),
        "inverting gradients": lambda: attacks.inverting_gradients(model),
    }[name]()


MATCHING = ("dlg", "inverting gradients")
IMPRINTS = (
    "robbing the fed",
    "trap weights",
    "qbi",
    "pairs",
    "soliton-free",
    "soliton-data",
    "loki",
)
ATTACKS = ("exclusivity", "row scan", "spear", *IMPRINTS, *MATCHING)


def measure(name: str, model, params, batches, auxiliary, width: int, spear_steps: int) -> dict:
    """One attack on some batches, one after another."""
    number, size = batches.labels.shape
    with jax.enable_x64(name not in MATCHING):
        dtype = jnp.float32 if name in MATCHING else jnp.float64
        params, batches, auxiliary = jax.tree.map(
            lambda leaf: jnp.asarray(
                leaf, dtype if jnp.issubdtype(leaf.dtype, jnp.floating) else None
            ),
            (params, batches, auxiliary),
        )
        imprint = planted(name, model, auxiliary, size, width)
        if imprint is not None:
            model, attack = imprint.model, imprint.attack
            params = imprint.plant(jax.random.key(0), params, auxiliary)
        else:
            attack = passive(name, model, spear_steps)

        def watch(key, params, batch):
            return invjax.observe(key, model, params, batch, grant_labels=name in MATCHING)

        def watch_clients(key, params, batch):
            halves = jax.tree.map(lambda leaf: leaf.reshape(CLIENTS, -1, *leaf.shape[1:]), batch)
            keys = jax.random.split(key, CLIENTS)
            return imprints.aggregate(jax.vmap(watch)(keys, params, halves))

        observe = jax.jit(watch_clients if name == "loki" else watch)
        # The checks of an observation run where it is concrete: not what is to be timed.
        run = jax.jit(attack)
        errors, false, seconds = [], 0, []
        for index in range(number):
            batch = jax.tree.map(lambda leaf, index=index: leaf[index], batches)
            key = jax.random.fold_in(jax.random.key(1), index)
            seen = observe(key, params, batch)
            if not index:
                jax.block_until_ready(run(key, seen))
            started = time.perf_counter()
            found = jax.block_until_ready(run(key, seen))
            seconds.append(time.perf_counter() - started)
            errors += metrics.nearest_neighbor(batch.inputs, found.inputs)[1].tolist()
            if name not in MATCHING:
                apart = metrics.nearest_neighbor(found.inputs, batch.inputs)[1]
                false += int((apart[found.found] >= CLOSE).sum())
    errors = np.array(errors)
    return {
        "recovered": round(float((errors < CLOSE).mean()), 3),
        "false": false,
        "median PSNR": round(float(np.median(-10 * np.log10(np.maximum(errors, 1e-40)))), 1),
        "seconds": float(f"{np.median(seconds):.2g}"),
        "longest": float(f"{max(seconds):.2g}"),
    }


def against_matching(rows) -> None:
    """Print by how much the exact attacks beat optimisation on the same batches."""
    for row in rows:
        if row["attack"] not in ("exclusivity", "row scan"):
            continue
        for other in rows:
            same = all(row[name] == other[name] for name in ("width", "trained", "batch"))
            if same and other["attack"] in MATCHING:
                print(
                    f"{row['width']} units, {row['trained']} steps, batch {row['batch']}: "
                    f"{row['attack']} over {other['attack']}: "
                    f"{row['median PSNR'] - other['median PSNR']:.0f} dB, "
                    f"{other['seconds'] / row['seconds']:.0f} times as fast"
                )


def figure(rows, path: str) -> None:
    """Recovered share against batch size, a panel a width and state of training."""
    panels = list(dict.fromkeys((row["width"], row["trained"]) for row in rows))
    drawing = Figure(figsize=(4.2 * len(panels), 4.0), dpi=130, layout="constrained")
    axes = drawing.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (width, trained) in zip(axes, panels, strict=True):
        mine = [row for row in rows if (row["width"], row["trained"]) == (width, trained)]
        axis.set_prop_cycle(color=matplotlib.colormaps["tab20"].colors[::2] + ((0, 0, 0),))
        for name in dict.fromkeys(row["attack"] for row in mine):
            points = [(row["batch"], row["recovered"]) for row in mine if row["attack"] == name]
            style = "--" if name in MATCHING else "-"
            axis.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=name)
        sufficient = {row["batch"]: row["sufficient"] for row in mine}
        axis.fill_between(
            list(sufficient), 0, list(sufficient.values()), color="0.85", label="P(sufficient)"
        )
        axis.set_xscale("log", base=2)
        axis.set_title(f"{width} units, {trained} steps of training", fontsize=10)
        axis.set_xlabel("batch size")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("recovered share of samples")
    axes[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    pathlib.Path(path).write_bytes(png(drawing))


def main() -> None:
    """Measure, print, draw."""
    parser = timing.parser(__doc__, data_dir=True)
    parser.add_argument("--dataset", choices=["digits", "mnist", "cifar10"], default="digits")
    parser.add_argument("--widths", type=int, nargs="+", default=[512])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--train-steps", type=int, nargs="+", default=[0])
    parser.add_argument("--batches", type=int, default=5, help="of every size")
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=ATTACKS)
    parser.add_argument("--spear-limit", type=int, default=8, help="largest batch of SPEAR")
    parser.add_argument("--spear-steps", type=int, default=200, help="of SPEAR, at most")
    parser.add_argument(
        "--matching-limit", type=int, default=8, help="largest batch of gradient matching"
    )
    parser.add_argument("--figure", help="file for the figure, a PNG")
    options = parser.parse_args()
    limits = {"spear": options.spear_limit, **dict.fromkeys(MATCHING, options.matching_limit)}
    data = datasets.load(options.dataset, options.data_dir)
    training, held_out = utility.split(data)
    rows = []
    for width in options.widths:
        model = models.mlp((width,), init="he")
        for snapshot in utility.train(model, training, held_out, steps=options.train_steps):
            for size in options.batch_sizes:
                batches = draw(training, options.batches, size, 1)
                auxiliary = datasets.take(held_out, np.arange(min(len(held_out), 4 * size)))
                likely = invjax.theory.exclusivity_probability(
                    jax.random.key(2), model, snapshot.params, training.inputs[:2000], size, 200
                )
                for name in options.attacks:
                    if size > limits.get(name, size):
                        continue
                    row = {"width": width, "trained": snapshot.step, "batch": size, "attack": name}
                    row |= measure(
                        name,
                        model,
                        snapshot.params,
                        batches,
                        auxiliary,
                        width,
                        options.spear_steps,
                    )
                    rows.append({**row, "sufficient": round(float(likely.probability), 3)})
                    print(rows[-1], flush=True)
    print("\n" + timing.table(rows))
    against_matching(rows)
    timing.write(options.json, rows, benchmark="papers/exclusivity")
    if options.figure:
        figure(rows, options.figure)


if __name__ == "__main__":
    main()
