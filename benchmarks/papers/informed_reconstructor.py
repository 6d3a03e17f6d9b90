"""A record from the weights trained on it, by who holds all the others (Balle, Cherubin and Hayes 2022).

    python benchmarks/papers/informed_reconstructor.py digits --json digits.json
    python benchmarks/papers/informed_reconstructor.py mnist --shadows 10000 --data-dir data --json mnist.json

`digits`: a 64-16-10 network after 100 full-batch steps on 100 known 8x8 digits and one more. 1,300 shadow
models (3,000: of all other records too, and of records shifted by a pixel), 100 targets, reconstructed by
ridge regression and by a network (512-512). `reference` are figures of an independent prototype on other
splits. `success`: the share of targets that come closer than the mean distance of a target to its nearest
neighbour among the records held; `false`: the share of pairs of a reconstruction and a record that was not
trained on that would count as one.

`mnist`: the authors' notebook, with its sizes, optimizers and losses: 784-10-10, ELU, 1,000 known records,
100 steps, RecoNN 1000-1000 for 200 epochs. It ends with a mean absolute plus mean squared error on targets
of about 0.058. Records are shuffled by another generator's order of the same files, and RecoNN's weights
start from a truncated normal of deviation one over the root of the fan-in after truncation, not before.
"""

import dataclasses
import itertools
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.append(str(pathlib.Path(__file__).parents[1]))
import timing

from invjax import datasets, defenses, models
from invjax.attacks.informed import decoders, reconstructor
from invjax.attacks.informed.training import join, training
from invjax.base import Batch
from invjax.evaluation.shadows import shadows

SETTINGS: dict[str, dict] = {
    "default": {"reference": (0.0137, 0.74, 0.0104, 0.86)},
    "3000 shadows": {"extra": 1700, "reference": (0.0108, 0.81, 0.0063, 0.98)},
    "layer 1 weights": {"parts": ("layer01/kernel",), "reference": (0.0148, None, 0.0123, 0.76)},
    "layer 2 weights": {"parts": ("layer02/kernel",), "reference": (0.0269, None, 0.0145, 0.73)},
    "biases": {"parts": ("bias",), "reference": (0.0519, None, 0.0286, 0.26)},
    "relu": {"activation": "relu", "reference": (0.0208, None, 0.0134, 0.82)},
    "tanh": {"activation": "tanh", "reference": (0.0179, None, 0.0110, 0.82)},
    "sigmoid": {"activation": "sigmoid", "reference": (0.0108, None, 0.0079, 0.94)},
    "5 steps": {"steps": 5, "reference": (0.0102, None, 0.0077, 0.92)},
    "1000 steps": {"steps": 1000, "reference": (0.0176, None, 0.0117, 0.82)},
    "unknown start": {"fixed": False, "reference": (0.0742, 0, 0.1154, 0)},
    "unknown order": {"batch_size": 20, "reference": (0.0671, 0, 0.0872, 0)},
    "dp-gd 0.01": {"noise": 0.01, "reference": (0.0176, None, 0.0110, 0.87)},
    "dp-gd 0.1": {"noise": 0.1, "reference": (0.0330, None, 0.0272, 0.18)},
    "dp-gd 0.5": {"noise": 0.5, "count": 700, "reference": (0.0693, None, 0.0848, 0)},
}
VICTIM = optax.sgd(0.1, momentum=0.9)


def shifted(rng, batch: Batch, count: int) -> Batch:
    """Records of a batch, moved by at most a pixel a side."""
    picks = rng.integers(0, len(batch.labels), count)
    inputs, labels = np.asarray(batch.inputs)[picks], np.asarray(batch.labels)[picks]
    padded = np.pad(inputs, ((0, 0), (1, 1), (1, 1), (0, 0)))
    moves = rng.integers(0, 3, (count, 2))
    height, width = inputs.shape[1:3]
    moved = [
        image[down : down + height, right : right + width]
        for image, (down, right) in zip(padded, moves, strict=True)
    ]
    return Batch(jnp.asarray(np.stack(moved)), jnp.asarray(labels))


def digits(options) -> list[dict]:
    """The table of all settings."""
    data = datasets.digits()
    order = np.random.default_rng(options.seed).permutation(len(data))
    known, targets, rest = (
        datasets.take(data, order[part]) for part in (slice(100), slice(100, 200), slice(200, None))
    )
    rows = []
    for name, setting in SETTINGS.items():
        if options.only and name not in options.only:
            continue
        count, extra = setting.get("count", options.shadows or 1300), setting.get("extra", 0)
        held_out = 100 if extra else len(rest.labels) - count
        pool, controls = (
            jax.tree.map(lambda leaf, part=part: leaf[part], rest)
            for part in (slice(-held_out), slice(-held_out, None))
        )
        held = join(known, pool).inputs
        if extra:
            rng = np.random.default_rng(options.seed + 1)
            pool = join(pool, shifted(rng, pool, count + extra - len(pool.labels)))
        model = models.mlp((16,), activation=setting.get("activation", "elu"), init="lecun")
        noise, fixed = setting.get("noise"), setting.get("fixed", True)
        procedure = training(
            model,
            VICTIM,
            setting.get("steps", 100),
            params=model.init(jax.random.key(0), data.input_shape) if fixed else None,
            batch_size=setting.get("batch_size"),
            defense=None if noise is None else defenses.dp_sgd(1.0, noise),
        )
        started = time.perf_counter()
        trained, victims = (
            shadows(jax.random.key(seed), procedure, known, part, cache=options.cache)
            for seed, part in ((1, pool), (2, targets))
        )
        row: dict = {"setting": name, "shadows": len(pool.labels)}
        row["accuracy"] = accuracy(model, victims, controls)
        row["seconds of shadows"] = time.perf_counter() - started
        parts = setting.get("parts")
        decoder = decoders.dense_decoder(data.input_shape, (512, 512))
        attacks = {
            "ridge": lambda trained=trained, pool=pool, parts=parts: reconstructor.ridge(
                trained, pool.inputs, parts=parts
            ),
            "network": lambda trained=trained, pool=pool, parts=parts, decoder=decoder: (
                reconstructor.network(
                    jax.random.key(3),
                    trained,
                    pool.inputs,
                    decoder=decoder,
                    optimizer=optax.adam(1e-3),
                    epochs=options.epochs or 60,
                    parts=parts,
                )
            ),
        }
        for attack, fit in attacks.items():
            started = time.perf_counter()
            row |= judged(attack, fit(), victims, targets, held, controls)
            row[f"seconds of {attack}"] = time.perf_counter() - started
        rows.append({**row, "reference": setting["reference"]})
        print(rows[-1], flush=True)
    return rows


def judged(name: str, reconstruct, victims, targets: Batch, held, controls: Batch) -> dict:
    """A reconstructor's score, as columns."""
    found = jax.vmap(reconstruct)(victims)
    score = reconstructor.score(found, targets.inputs, held, controls.inputs)
    return {
        "oracle": float(score.nearest.mean()),
        "constant": float(score.constant.mean()),
        f"{name} mse": float(score.mse.mean()),
        f"{name} success": float(score.success),
        f"{name} own": float(score.success_own),
        f"{name} false": float(score.false_positives),
    }


def accuracy(model, stacked, held_out: Batch) -> float:
    """Mean accuracy of stacked models."""
    logits = jax.vmap(model.apply, in_axes=(0, None))(stacked, held_out.inputs)
    return float((logits.argmax(-1) == held_out.labels[None]).mean())


def mnist(options) -> list[dict]:
    """The configuration of the authors' notebook."""
    parts = [datasets.load("mnist", options.data_dir, split) for split in ("train", "test")]
    data = dataclasses.replace(
        parts[0],
        inputs=np.concatenate([part.inputs for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
    )
    order = np.random.default_rng(42).permutation(len(data))
    ends = np.cumsum([0, 1000, 1000, 1000, options.shadows or 10_000])
    judges, targets, known, pool = (
        datasets.take(data, order[first:last]) for first, last in itertools.pairwise(ends)
    )
    model = models.mlp((10,), activation="elu")
    procedure = training(model, VICTIM, 100, params=haiku(model, data.input_shape))

    def report(progress):
        if progress.done % 1000 < 200:
            print(f"{time.perf_counter() - started:.0f} s: {progress}", flush=True)

    started = time.perf_counter()
    trained, victims = (
        shadows(
            jax.random.key(seed),
            procedure,
            known,
            part,
            chunk=200,
            cache=options.cache,
            on_chunk=report,
        )
        for seed, part in ((1, pool), (2, targets))
    )
    row: dict = {"shadows": len(pool.labels), "accuracy": accuracy(model, victims, judges)}
    row["seconds of shadows"] = time.perf_counter() - started
    print(row, flush=True)
    held = join(known, pool).inputs

    def loss(reconstruct) -> float:
        found = jax.vmap(reconstruct)(victims)
        return float(reconstructor.absolute_and_squared(found, targets.inputs))

    def on_epoch(epoch, value, reconstruct):
        if epoch % 10 == 9:
            seconds = time.perf_counter() - started
            scores = f"{value:.4f}, {loss(reconstruct):.4f}"
            print(f"{seconds:.0f} s: epoch {epoch + 1}: {scores}", flush=True)

    started = time.perf_counter()
    network = reconstructor.network(
        jax.random.key(3), trained, pool.inputs, epochs=options.epochs or 200, on_epoch=on_epoch
    )
    row["seconds of network"] = time.perf_counter() - started
    row["network mae + mse"] = loss(network)
    row |= judged("network", network, victims, targets, held, judges)
    print(row, flush=True)
    started = time.perf_counter()
    linear = reconstructor.ridge(trained, pool.inputs)
    row["seconds of ridge"] = time.perf_counter() - started
    row["ridge mae + mse"] = loss(linear)
    return [row | judged("ridge", linear, victims, targets, held, judges)]


def haiku(model, input_shape):
    """Weights from a normal of deviation one over the root of the fan-in, cut at two deviations."""
    params = model.init(jax.random.key(42), input_shape)
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(42), len(leaves))
    drawn = [
        jnp.zeros_like(leaf)
        if leaf.ndim == 1
        else jax.random.truncated_normal(key, -2.0, 2.0, leaf.shape) / np.sqrt(len(leaf))
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, drawn)


def main() -> None:
    """Measure and print."""
    parser = timing.parser(__doc__, data_dir=True)
    parser.add_argument("experiment", choices=["digits", "mnist"])
    parser.add_argument("--shadows", type=int, help="how many; as described where left out")
    parser.add_argument("--epochs", type=int, help="of the network; as described where left out")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, help="settings of digits")
    parser.add_argument("--seed", type=int, default=0, help="of the split of digits")
    parser.add_argument("--cache", help="a folder for shadows")
    options = parser.parse_args()
    rows = {"digits": digits, "mnist": mnist}[options.experiment](options)
    print("\n" + timing.table(rows))
    timing.write(
        options.json,
        rows,
        experiment=options.experiment,
        benchmark="papers/informed_reconstructor",
    )


if __name__ == "__main__":
    main()
