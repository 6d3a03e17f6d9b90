"""The strong attack's parts, each with and without the other (Liu et al. 2024): generator and features.

    python benchmarks/papers/strong_attack.py --json strong.json --figure strong.png
    python benchmarks/papers/strong_attack.py --dataset cifar10 --data-dir DATA --model resnet18

Every batch is attacked by pixels and by an untrained generator, each with no guide, the span of the
features and the features themselves; labels and features are recovered from the gradient, never told.
`small` is two convolutions and three dense layers; `resnet18` has one dense layer more than usual, `--width`
channels in its first group (64 as published) and is trained for `--train-steps`. PSNR in decibels, mean and
standard error over samples; `reliable` is the mean weight that the features were given.
"""

import pathlib
import sys

import jax
import matplotlib
import numpy as np
from matplotlib.figure import Figure

sys.path.append(str(pathlib.Path(__file__).parents[1]))
import timing

import invjax
from invjax import attacks, datasets, defenses, metrics, models
from invjax.evaluation import utility
from invjax.models.chain import Spec, chain_model
from invjax.report.figures import png

PARTS = {
    f"{what} + {guide}": {"guide": guide, **({} if what == "generator" else {"generator": None})}
    for what in ("pixels", "generator")
    for guide in ("none", "subspace", "features")
}
DEFENSES = ("none", "gaussian_noise(0.001)", "magnitude_prune(0.9)")


def small(num_classes: int, hidden: int):
    """Two convolutions and three dense layers."""
    specs = [
        Spec("conv", 16, 3, 1, 1, "tanh"),
        Spec("average_pool", window=2),
        Spec("conv", 32, 3, 1, 1, "tanh"),
        Spec("flatten"),
        Spec("dense", 64, activation="tanh"),
        Spec("dense", hidden, activation="tanh"),
        Spec("dense", num_classes),
    ]
    return chain_model(specs, num_classes, "small")


def measure(model, params, batch, defense, seed: int, options) -> dict[str, dict]:
    """What every combination makes of one batch."""
    key = jax.random.key(seed)
    seen = jax.jit(lambda key: invjax.observe(key, model, params, batch, defense))(key)
    found = {}
    for name, settings in PARTS.items():
        attack = attacks.strong(model, num_steps=options.steps, weight=options.weight, **settings)
        result = jax.jit(attack)(key, seen)
        order = np.asarray(metrics.match(result.inputs, batch.inputs))
        found[name] = {
            "psnr": np.asarray(
                metrics.psnr(result.inputs[order], batch.inputs, data_range=1.0)
            ).tolist(),
            "labels": float((result.labels[order] == batch.labels).mean()),
            "reliable": float(result.diagnostics["reliability"].mean()),
            "gate": float(result.diagnostics["gate"]),
            "inputs": np.asarray(result.inputs[order]),
        }
    return found


def figure(truth, pictures, path: str) -> None:
    """One batch, and what each combination makes of it."""
    rows = {"truth": truth, **pictures}
    drawing = Figure(figsize=(1.1 * len(truth) + 2, 1.1 * len(rows)), dpi=130, layout="constrained")
    axes = drawing.subplots(len(rows), len(truth), squeeze=False)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(np.squeeze(image), cmap=matplotlib.colormaps["gray"], vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    pathlib.Path(path).write_bytes(png(drawing))


def main() -> None:
    """Measure, print, draw."""
    parser = timing.parser(__doc__, data_dir=True)
    parser.add_argument("--dataset", choices=["digits", "mnist", "cifar10"], default="digits")
    parser.add_argument("--model", choices=["small", "resnet18"], default="small")
    parser.add_argument("--width", type=int, default=16, help="of `resnet18`")
    parser.add_argument("--hidden", type=int, default=1024, help="units of the last hidden layer")
    parser.add_argument("--train-steps", type=int, default=0)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4])
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1000, help="of every attack")
    parser.add_argument("--weight", type=float, default=0.1, help="of the features")
    parser.add_argument("--defenses", nargs="+", default=DEFENSES)
    parser.add_argument("--figure", help="of the first batch without a defence")
    options = parser.parse_args()
    data = datasets.load(options.dataset, options.data_dir)
    training, held_out = utility.split(data)
    if options.model == "small":
        model = small(data.num_classes, options.hidden)
    else:
        model = models.resnet18(
            data.num_classes, options.width, hidden=options.hidden, activation="tanh"
        )
    (snapshot,) = utility.train(model, training, held_out, steps=[options.train_steps])
    rows, drawn = [], False
    for size in options.batch_sizes:
        for text in options.defenses:
            outcomes = []
            for seed in range(options.batches):
                picks = np.random.default_rng([seed, size]).permutation(len(training))[:size]
                batch = datasets.take(training, picks)
                defense = defenses.parse(text, model)
                outcomes.append(measure(model, snapshot.params, batch, defense, seed, options))
                if options.figure and not drawn:
                    pictures = {name: one["inputs"] for name, one in outcomes[0].items()}
                    figure(np.asarray(batch.inputs), pictures, options.figure)
                    drawn = True
            for name in PARTS:
                psnr = np.concatenate([one[name]["psnr"] for one in outcomes])
                mean = {
                    key: round(float(np.mean([one[name][key] for one in outcomes])), 3)
                    for key in ("labels", "reliable", "gate")
                }
                error = psnr.std(ddof=1) / psnr.size**0.5 if psnr.size > 1 else float("nan")
                row = {"batch": size, "defense": text, "attack": name}
                row |= {
                    "PSNR": round(float(psnr.mean()), 2),
                    "error": round(float(error), 2),
                    **mean,
                }
                rows.append(row)
                print(row, flush=True)
    print("\n" + timing.table(rows))
    timing.write(options.json, rows, benchmark="papers/strong_attack")


if __name__ == "__main__":
    main()
