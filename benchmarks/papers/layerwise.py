"""Layer-wise systems: the index against what comes back, R-GAP against the hybrid and the others, noise.

    python benchmarks/papers/layerwise.py index --json index.json --figure index.png
    python benchmarks/papers/layerwise.py compare --data-dir DATA --images 3
    python benchmarks/papers/layerwise.py noise

`index`: the sixteen reference architectures on 16x16 inputs, c(M) beside the squared error of `layerwise`, in
float64, and their rank correlation. `compare`: CIFAR-10 images (or digits in colour without `--data-dir`)
under `layerwise` (R-GAP), `hybrid`, DLG and Inverting Gradients; the errors of all images are printed as they
come, the table has their medians. `noise`: the squared error against Gaussian noise on the gradient, relative
to every tensor's root mean square. Inputs lie in [-0.5, 0.5], as published.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
from matplotlib.figure import Figure

sys.path.append(str(pathlib.Path(__file__).parents[1]))
import timing

import invjax
from invjax import attacks, datasets, theory
from invjax.models.reference import NAMES, reference
from invjax.report.figures import png

RANGE = (-0.5, 0.5)
COMPARED = ("cnn2_c1", "cnn2_c2", "cnn3_c1", "cnn3_c2", "cnn4_c1", "cnn6")
ATTACKS = ("layerwise", "hybrid", "DLG", "cosine + TV")


def make(name: str):
    """A reference architecture as published: CNN6 has one logit and no bias."""
    return reference(name, 1) if name.startswith("cnn6") else reference(name)


def images(options, side: int, number: int) -> np.ndarray:
    """Images `[N, side, side, 3]` in [-0.5, 0.5]."""
    if options.data_dir is None:
        grey = np.asarray(datasets.digits().inputs[: 3 * number, :, :, 0])
        large = grey.reshape(number, 3, 8, 8).repeat(side // 8, axis=2).repeat(side // 8, axis=3)
        return np.moveaxis(large, 1, 3) - 0.5
    data = datasets.load("cifar10", options.data_dir)
    step = 32 // side
    return np.asarray(data.inputs[:number])[:, ::step, ::step] - 0.5


def observed(model, params, image, label: int, defense=None):
    """What the server sees of one image, the label told."""
    batch = invjax.Batch(jnp.asarray(image)[None], jnp.asarray([label]))
    return invjax.observe(
        jax.random.key(1), model, params, batch, defense, input_range=RANGE, grant_labels=True
    )


def initialised(model, shape, seed: int):
    """Parameters in the precision of the moment."""
    params = model.init(jax.random.key(seed), shape)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(float)), params)


def error(found, image) -> float:
    """Mean squared error."""
    return float(((np.asarray(found.inputs[0]) - image) ** 2).mean())


def index(options) -> list[dict]:
    """c(M) against the squared error."""
    rows = []
    for name in NAMES:
        model, shape = make(name), (16, 16, 3)
        with jax.enable_x64(True):
            attack = attacks.layerwise(model)
            errors = []
            for number, image in enumerate(images(options, 16, options.images)):
                params = initialised(model, shape, number)
                label = int(model.apply(params, jnp.asarray(image)[None])[0, 0] < 0)
                found = attack(jax.random.key(0), observed(model, params, image, label))
                errors.append(error(found, image))
        c = theory.security_index(model, shape).index
        rows.append({"network": name, "c(M)": c, "MSE": float(f"{np.median(errors):.2g}")})
        print(rows[-1], flush=True)
    indices, errors = np.array([(r["c(M)"], r["MSE"]) for r in rows]).T
    for title, values in (("", errors), (", exact results as ties", np.maximum(errors, 1e-20))):
        correlation = scipy.stats.spearmanr(indices, values).statistic
        print(f"Spearman correlation of c(M) and MSE{title}: {correlation:.2f}")
    if options.figure:
        drawing = Figure(figsize=(5, 4), dpi=130, layout="constrained")
        axis = drawing.subplots()
        axis.scatter([r["c(M)"] for r in rows], [max(r["MSE"], 1e-34) for r in rows], s=18)
        for row in rows:
            if row["c(M)"]:
                place = (row["c(M)"], max(row["MSE"], 1e-34))
                axis.annotate(
                    row["network"], place, fontsize=6, xytext=(3, 3), textcoords="offset points"
                )
        axis.set_yscale("log")
        axis.set_xlabel("c(M), 16 x 16 inputs")
        axis.set_ylabel("mean squared error")
        axis.grid(alpha=0.3)
        pathlib.Path(options.figure).write_bytes(png(drawing))
    return rows


def compare(options) -> list[dict]:
    """R-GAP, the hybrid, DLG, cosine with total variation."""
    rows, shape = [], (32, 32, 3)
    pictures = images(options, 32, options.images)
    for name in options.networks:
        model = make(name)
        row = {"network": name, "c(M)": theory.security_index(model, shape).index}
        known = {
            "layerwise": attacks.layerwise(model),
            "hybrid": attacks.hybrid(model),
            "DLG": attacks.dlg(model, labels="known"),
            "cosine + TV": attacks.inverting_gradients(model, total_variation=1e-2),
        }
        for title in options.attacks:
            attack = known[title]
            if title == "DLG" and model.num_classes == 1:
                row[title] = "-"
                continue
            with jax.enable_x64(title in ("layerwise", "hybrid")):
                run = jax.jit(attack)
                errors = []
                for number, image in enumerate(pictures.astype(jnp.result_type(float))):
                    params = initialised(model, shape, number)
                    label = int(model.apply(params, jnp.asarray(image)[None])[0, 0] < 0)
                    found = run(jax.random.key(0), observed(model, params, image, label))
                    errors.append(error(found, image))
            row[title] = float(f"{np.median(errors):.2g}")
            print(name, title, ", ".join(f"{value:.2g}" for value in errors), flush=True)
        rows.append(row)
    return rows


def noise(options) -> list[dict]:
    """Squared error against relative noise."""
    rows, shape = [], (16, 16, 3)
    for name in ("cnn2_c1", "lenet2", "cnn6"):
        model, row = make(name), {"network": name}
        with jax.enable_x64(True):
            attack = jax.jit(attacks.layerwise(model))
            image = images(options, 16, 1)[0]
            params = initialised(model, shape, 0)
            label = int(model.apply(params, jnp.asarray(image)[None])[0, 0] < 0)
            seen = observed(model, params, image, label)
            draws = optax.tree.random_like(jax.random.key(2), seen.gradient)
            for level in (1e-8, 1e-6, 1e-4, 1e-3, 1e-2):
                noisy = jax.tree.map(
                    lambda leaf, draw, level=level: (
                        leaf + level * jnp.sqrt(jnp.square(leaf).mean()) * draw
                    ),
                    seen.gradient,
                    draws,
                )
                found = attack(jax.random.key(0), seen._replace(gradient=noisy))
                row[f"{level:g}"] = float(f"{error(found, image):.2g}")
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    """Measure and print."""
    parser = timing.parser(__doc__, data_dir=True)
    parser.add_argument("part", choices=["index", "compare", "noise"])
    parser.add_argument("--images", type=int, default=3, help="of `index` and `compare`")
    parser.add_argument(
        "--networks", nargs="+", choices=NAMES, default=COMPARED, help="of `compare`"
    )
    parser.add_argument(
        "--attacks", nargs="+", choices=ATTACKS, default=ATTACKS, help="of `compare`"
    )
    parser.add_argument("--figure", help="of the index")
    options = parser.parse_args()
    rows = {"index": index, "compare": compare, "noise": noise}[options.part](options)
    print("\n" + timing.table(rows))
    timing.write(options.json, rows, benchmark=f"papers/layerwise {options.part}")


if __name__ == "__main__":
    main()
