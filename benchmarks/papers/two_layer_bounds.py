"""Attacks on a two-layer network between its lower and its upper bound (Wang et al. 2023, Liu et al. 2024).

    python benchmarks/papers/two_layer_bounds.py --json bounds.json --figure bounds.png
    python benchmarks/papers/two_layer_bounds.py --attacks likelihood --trials 100 --batches 10

One of dimension, width, batch size and noise varies at a time. The network is `tanh` at the server's query
point with an output bias of 3, samples are random unit vectors, labels 1 and -1 by turns, and Gaussian noise
of one deviation is added to all derivatives of the sum of `(f - y)^2 / 2`: those in `a` alone are not
buried, and the bound and the fit from the truth take only them. Errors are the root of the mean squared
distance of a sample. `bound` is the Cramér-Rao bound with known labels, `likelihood` a Gauss-Newton fit
from the truth, `moments` the tensor attack as published on the output layer's gradient, and `fitted` the
same with a final fit of both layers by maximum likelihood (slow, so only on request), which know neither
labels nor truth. `upper` is `C (B + s) sqrt(d / m)` with the largest constant that `moments` needs. The
slopes are of least squares in the logarithms; the table of bounds has 1/2, -1/2, 0 and 1 (`bound`) for
dimension, width, batch size and noise. Last, what share of the information pruning takes.
"""

import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

sys.path.append(str(pathlib.Path(__file__).parents[1]))
import timing

import invjax
from invjax import defenses
from invjax.attacks.analytic import tensor
from invjax.base import Batch, Model
from invjax.report.figures import png
from invjax.theory import two_layer
from invjax.theory.cramer_rao import cramer_rao

BASE = {"dimension": 16, "width": 32768, "batch_size": 2, "noise": 1.0}
SWEEPS = {
    "dimension": (8, 16, 32),
    "width": (8192, 32768, 131072),
    "batch_size": (1, 2, 4),
    "noise": (0.25, 1.0, 4.0),
}
BIAS = 3.0
ATTACKS = ("likelihood", "moments", "fitted")


def network(weights) -> Model:
    """`f(x) = sum_j a_j tanh(w_j x) + 3` with `a` as its parameters."""

    def apply(params, inputs):
        return jnp.tanh(inputs @ weights.T) @ params[:, None] + BIAS

    def loss(params, batch):
        return 0.5 * jnp.sum(jnp.square(apply(params, batch.inputs)[:, 0] - batch.labels))

    return Model(lambda key, shape: jnp.ones(len(weights)) / len(weights), apply, loss, 1)


def problem(key, dimension: int, width: int, batch_size: int):
    """Weights, the query point, and a batch."""
    keys = jax.random.split(key)
    inputs = jax.random.normal(keys[0], (batch_size, dimension))
    inputs /= jnp.linalg.norm(inputs, axis=1, keepdims=True)
    labels = jnp.where(jnp.arange(batch_size) % 2, -1.0, 1.0)
    weights = jax.random.normal(keys[1], (width, dimension))
    return weights, jnp.full(width, 1 / width), Batch(inputs, labels)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def bound(key, dimension, width, batch_size, noise):
    """The Cramér-Rao bound on the error, squared."""
    weights, params, batch = problem(key, dimension, width, batch_size)
    found = cramer_rao(network(weights), params, batch, defenses.gaussian_noise(noise))
    return found.distance**2


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 5))
def likelihood(key, dimension, width, batch_size, noise, trials):
    """Squared errors of the maximum of the likelihood next to the truth."""
    weights, params, batch = problem(key, dimension, width, batch_size)
    model, truth = network(weights), batch.inputs.ravel()

    def gradient(flat):
        inputs = flat.reshape(batch.inputs.shape)
        return jax.grad(model.loss)(params, batch._replace(inputs=inputs))

    clean = gradient(truth)

    def attack(key):
        seen = clean + noise * jax.random.normal(key, clean.shape)

        def step(_, flat):
            jacobian = jax.jacfwd(gradient)(flat)
            gram = jacobian.T @ jacobian
            gram = gram + 1e-6 * jnp.trace(gram) * jnp.eye(flat.size)
            return flat + jnp.linalg.solve(gram, jacobian.T @ (seen - gradient(flat)))

        found = jax.lax.fori_loop(0, 12, step, truth)
        return jnp.sum(jnp.square(found - truth)) / batch_size

    return jax.lax.map(attack, jax.random.split(jax.random.fold_in(key, 7), trials))


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 5, 6))
def tensor_attack(key, dimension, width, batch_size, noise, trials, name):
    """Squared errors of the tensor attack, which starts from nothing but the gradient."""
    weights, a, batch = problem(key, dimension, width, batch_size)
    model = tensor.two_layer(width, "tanh")
    output = {"kernel": a[:, None], "bias": jnp.full(1, BIAS)}
    params = {"hidden": {"kernel": weights.T}, "output": output}
    # Its loss is the mean over the samples.
    defense = defenses.gaussian_noise(noise / batch_size)
    gradient = jax.grad(model.loss)(params, batch)
    facts = invjax.Facts(input_shape=(dimension,), num_classes=1, batch_size=batch_size)
    options = {} if name == "moments" else {"polish": True, "noise_std": noise / batch_size}
    attack = tensor.tensor(model, method="paper", estimator="outer", norm=1.0, **options)

    def one(key):
        noise_key, key = jax.random.split(key)
        state = defense.init_with_key(noise_key, params)
        seen = invjax.Observation(params, defense.update(gradient, state)[0], facts)
        return tensor.rmse(attack(key, seen).inputs, batch.inputs) ** 2

    return jax.lax.map(one, jax.random.split(jax.random.fold_in(key, 8), trials))


def measure(setting: dict, options) -> dict:
    """All errors at one setting, over batches and noise."""
    shape = tuple(setting[name] for name in ("dimension", "width", "batch_size"))
    keys = jax.random.split(jax.random.key(0), options.batches)
    sizes = two_layer.Setting(setting["batch_size"], setting["dimension"], setting["width"])
    rates = two_layer.gaussian_noise(sizes, setting["noise"])
    squares = {"bound": [bound(key, *shape, setting["noise"]) for key in keys]}
    for name in options.attacks:
        run = likelihood if name == "likelihood" else functools.partial(tensor_attack, name=name)
        # A mean over few trials would now and then lie below the bound.
        trials = options.trials * (5 if name == "likelihood" else 1)
        squares[name] = [run(key, *shape, setting["noise"], trials) for key in keys]
    # The median over trials: a failed decomposition is an error of order one.
    errors = {
        name: float(np.sqrt(np.mean([np.median(part) for part in parts])))
        if name in ("moments", "fitted")
        else float(np.sqrt(np.mean(parts)))
        for name, parts in squares.items()
    }
    row = {**setting, **errors, "upper rate": float(rates.upper)}
    row |= {"lower constant": errors["bound"] / float(rates.lower)}
    if "moments" in errors:
        row["upper constant"] = errors["moments"] / float(rates.upper)
    return row


def pruned_rows() -> list[dict]:
    """What share of the information on the inputs goes with the smallest derivatives in `a`."""
    weights, a, batch = problem(jax.random.key(0), *(BASE[name] for name in list(BASE)[:3]))
    model = network(weights)
    size = jnp.abs(jax.grad(model.loss)(a, batch))
    rows = []
    for share in (0.5, 0.7, 0.9):
        kept = size > jnp.quantile(size, share)
        left = two_layer.kept_information(model, a, batch, kept)
        rows.append({"pruned": share, "information lost": round(1 - float(left), 3)})
    return rows


def slopes(rows, name: str, columns) -> dict:
    """Exponents of every column along one sweep."""
    points = np.log([row[name] for row in rows])
    return {
        column: float(np.polyfit(points, np.log([row[column] for row in rows]), 1)[0])
        for column in columns
    }


def figure(sweeps: dict, columns, constant: float | None, path: str) -> None:
    """A panel a sweep: errors between the bounds, in logarithms."""
    drawing = Figure(figsize=(4 * len(sweeps), 3.8), dpi=130, layout="constrained")
    axes = drawing.subplots(1, len(sweeps), sharey=True, squeeze=False)[0]
    for axis, (name, rows) in zip(axes, sweeps.items(), strict=True):
        points = [row[name] for row in rows]
        low = [row["bound"] for row in rows]
        axis.plot(points, low, "k--", label="Cramér-Rao bound")
        if constant is not None:
            high = [constant * row["upper rate"] for row in rows]
            axis.plot(points, high, "k-", label=f"{constant:.2g} (B + s) sqrt(d / m)")
            axis.fill_between(points, low, high, color="0.93")
        for column in columns:
            axis.plot(points, [row[column] for row in rows], "o-", markersize=4, label=column)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel({"batch_size": "batch size"}.get(name, name))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("error of a sample")
    axes[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    pathlib.Path(path).write_bytes(png(drawing))


def main() -> None:
    """Measure, print, draw."""
    parser = timing.parser(__doc__)
    parser.add_argument("--attacks", nargs="*", choices=ATTACKS, default=["likelihood", "moments"])
    parser.add_argument("--trials", type=int, default=8, help="draws of the noise a batch")
    parser.add_argument("--batches", type=int, default=2, help="at every setting")
    parser.add_argument("--figure", help="file for the figure, a PNG")
    options = parser.parse_args()
    known: dict = {}
    sweeps = {}
    for name, values in SWEEPS.items():
        sweeps[name] = []
        for value in values:
            setting = BASE | {name: value}
            found = tuple(setting.values())
            if found not in known:
                known[found] = measure(setting, options)
                print(known[found], flush=True)
            sweeps[name].append(known[found])
    rows = list(known.values())
    print("\n" + timing.table(rows) + "\n")
    columns = ["bound", *options.attacks]
    exponents = [{"sweep": name, **slopes(part, name, columns)} for name, part in sweeps.items()]
    print(timing.table(exponents))
    pruned = pruned_rows()
    print("\n" + timing.table(pruned))
    constant = max(row["upper constant"] for row in rows) if "moments" in options.attacks else None
    timing.write(
        options.json,
        rows,
        slopes=exponents,
        pruned=pruned,
        benchmark="papers/two_layer_bounds",
    )
    if options.figure:
        figure(sweeps, options.attacks, constant, options.figure)


if __name__ == "__main__":
    main()
