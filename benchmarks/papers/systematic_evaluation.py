"""Reconstruction as an inverse problem: the provable attack beside its published figures.

    python benchmarks/papers/systematic_evaluation.py tensor --json tensor.json
    python benchmarks/papers/systematic_evaluation.py tensor --quick

`tensor` measures the tensor attack on two-layer networks (Wang, Lee and Lei 2023) in float64, median error
`sqrt(mean_i |x_i - x̂_i|^2)` of inputs of unit norm over seeds:

* `paper`: algorithm 1 as published by input width, beside the published figure (digitised, and multiplied
  by the root of two, for their error is measured otherwise);
* `width`: its error against the number of hidden units, with as many contractions as inputs, and the
  slope on logarithmic axes (theory: -1/2);
* `regression`: the exact span with Hermite regression, before and after the fit of the gradient;
* `defences`: the published attack and the adaptive one under noise, dropout, pruning and local steps;
* `head`: features behind a classifier's last two layers.
"""

import functools
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.append(str(pathlib.Path(__file__).parents[1]))
import timing

import invjax
from invjax import Batch, Facts, LocalTraining, Observation, gradients, models
from invjax.attacks.analytic import tensor as lib
from invjax.defenses.pruning import prune

# Activation, estimator: published error at d = 20, 40, 60, 100, over the root of two.
PUBLISHED = {
    ("square_cube", "outer"): (0.219, 0.320, 0.390, 0.487),
    ("square_cube", "weights"): (0.055, 0.102, 0.101, 0.125),
    ("tanh", "weights"): (0.096, 0.183, 0.283, 0.360),
    ("sigmoid", "weights"): (0.176, 0.265, 0.307, 0.376),
}
WIDTHS = (20, 40, 60, 100)
# Activation, bias, samples, width: error at m = 1k, 4k, 16k, 64k in an independent implementation.
SCALING = {
    ("tanh", 3.0, 4, 32): (0.222, 0.156, 0.068, 0.032),
    ("square_cube", 5.0, 4, 32): (0.239, 0.119, 0.062, 0.029),
    ("relu", 0.0, 4, 32): (0.506, 0.181, 0.107, 0.056),
}
# Activation, bias, samples, width: error at m = 1k, 4k, 16k.
REGRESSION = {
    ("tanh", 3.0, 8, 64): (0.056, 0.023, 0.015),
    ("sigmoid", 3.0, 8, 64): (0.029, 0.014, 0.009),
    ("softplus", 3.0, 8, 64): (0.035, 0.023, 0.013),
    ("gelu", 3.0, 8, 64): (0.069, 0.050, 0.024),
    ("relu", 2.0, 4, 32): (0.049, 0.026, 0.018),
}


def drawn(inputs_key, params_key, model, size: int, width: int, bias: float, basis: bool = False):
    """Unit inputs and labels of -1 and 1 at the server's query point."""
    inputs = jnp.eye(size, width) if basis else jax.random.normal(inputs_key, (size, width))
    inputs /= jnp.linalg.norm(inputs, axis=1, keepdims=True)
    params = model.init(params_key, (width,))
    params = jax.tree.map(lambda leaf: leaf.astype(inputs.dtype), params)
    labels = jnp.where(jnp.arange(size) % 2 == 0, 1.0, -1.0)
    return lib.query(params_key, params, bias=bias), Batch(inputs, labels)


def errors(model, attacks, size, width, bias, seeds, defense=None, local=None, basis=False):
    """`[seeds, attacks]` errors."""

    @jax.jit
    def one(key):
        # Not by `fold_in` beside a split: it gives the very keys of the split again.
        inputs_key, params_key, attack_key, order_key, defense_key = jax.random.split(key, 5)
        params, batch = drawn(inputs_key, params_key, model, size, width, bias, basis)
        if local is None:
            gradient = jax.grad(model.loss)(params, batch)
        else:
            gradient = gradients.federated_update(order_key, model, params, batch, local)
        if defense is not None:
            gradient = defense(defense_key, gradient)
        facts = Facts(input_shape=(width,), num_classes=1, batch_size=size, local=local)
        seen = Observation(params, gradient, facts)
        found = [attack.init(attack_key, seen) for attack in attacks]
        return jnp.stack([lib.rmse(each.inputs, batch.inputs) for each in found])

    return np.array([one(jax.random.key(seed)) for seed in range(seeds)])


def paper_rows(quick: bool) -> list[dict]:
    """Algorithm 1 by input width: m = 5000, two samples, inputs e_1 and e_2, bias 30."""
    rows = []
    for (activation, estimator), published in PUBLISHED.items():
        model = lib.two_layer(5000, activation)
        attack = lib.tensor(model, method="paper", estimator=estimator)
        for width, value in list(zip(WIDTHS, published, strict=True))[: 2 if quick else None]:
            found = errors(model, [attack], 2, width, 30.0, 3 if quick else 10, basis=True)
            rows.append(
                {
                    "table": "paper",
                    "activation": activation,
                    "estimator": estimator,
                    "d": width,
                    "error": float(np.median(found)),
                    "published": round(value * 2**0.5, 3),
                }
            )
            print(rows[-1], flush=True)
    return rows


def width_rows(quick: bool) -> list[dict]:
    """Error against hidden units."""
    rows, units = [], (1000, 4000, 16000, 64000)[: 3 if quick else None]
    for (activation, bias, size, width), values in SCALING.items():
        medians = []
        for number, value in zip(units, values, strict=False):
            model = lib.two_layer(number, activation)
            attack = lib.tensor(model, method="paper", contractions=width)
            found = errors(model, [attack], size, width, bias, 3 if quick else 9)
            medians.append(float(np.median(found)))
            rows.append(
                {
                    "table": "width",
                    "activation": activation,
                    "m": number,
                    "error": medians[-1],
                    "reference": value,
                }
            )
            print(rows[-1], flush=True)
        slope = np.polyfit(np.log(units), np.log(medians), 1)[0]
        print(f"{activation}: slope {slope:.2f}")
        rows[-1]["slope"] = round(float(slope), 3)
    return rows


def regression_rows(quick: bool) -> list[dict]:
    """Exact span and Hermite regression, before and after the fit."""
    rows, units = [], (1000, 4000, 16000)[: 2 if quick else None]
    for (activation, bias, size, width), values in REGRESSION.items():
        for number, value in zip(units, values, strict=False):
            model = lib.two_layer(number, activation)
            attacks = [
                lib.tensor(model, norm=1.0, polish=polish, restarts=0) for polish in (False, True)
            ]
            found = errors(model, attacks, size, width, bias, 2 if quick else 5)
            before, after = np.median(found, axis=0)
            rows.append(
                {
                    "table": "regression",
                    "activation": activation,
                    "B": size,
                    "m": number,
                    "error": float(before),
                    "reference": value,
                    "after the fit": float(after),
                    "exact": f"{int((found[:, 1] < 1e-8).sum())}/{len(found)}",
                }
            )
            print(rows[-1], flush=True)
    return rows


def noise(deviation: float, key, gradient):
    """Noise on the sum over two samples, of which the gradient is the mean."""
    return optax.tree.add_scale(gradient, deviation / 2, optax.tree.random_like(key, gradient))


def unit_dropout(rate: float, key, gradient):
    """Zero whole units."""
    kernel = gradient["hidden"]["kernel"]
    kept = jax.random.bernoulli(key, 1 - rate, (kernel.shape[1],))
    return {
        "hidden": {"kernel": kernel * kept[None]},
        "output": gradient["output"] | {"kernel": gradient["output"]["kernel"] * kept[:, None]},
    }


def defense_rows(quick: bool) -> list[dict]:
    """Two samples of width 16, tanh, bias 3: moments of the outer gradient, and the adaptive attack."""
    share = 4 if quick else 1
    cases = [
        ("noise", strength, number, functools.partial(noise, strength), reference)
        for strength, number, reference in (
            (0.0, 64000, 0.095),
            (2.0, 64000, 0.123),
            (4.0, 64000, 0.195),
            (8.0, 64000, 0.63),
            (4.0, 256000, 0.095),
        )
    ]
    cases += [
        ("dropout", rate, 128000, functools.partial(unit_dropout, rate), reference)
        for rate, reference in ((0.0, 0.073), (0.5, 0.089), (0.75, 0.163), (0.9, 0.244))
    ]
    cases += [
        ("pruning", p, number, lambda key, g, p=p: prune(g, p, "tensor"), reference)
        for p, number, reference in (
            (0.5, 64000, 0.30),
            (0.9, 64000, 1.89),
            (0.5, 256000, 0.26),
            (0.9, 256000, 1.89),
        )
    ]
    rows = []
    for name, strength, number, defense, reference in cases:
        model = lib.two_layer(number // share)
        attack = lib.tensor(model, method="paper", estimator="outer", norm=1.0)
        found = errors(model, [attack], 2, 16, 3.0, 3 if quick else 9, defense)
        rows.append(
            {
                "table": "defences",
                "defence": name,
                "strength": strength,
                "m": number // share,
                "attack": "paper, outer",
                "error": float(np.median(found)),
                "reference": reference if share == 1 else float("nan"),
            }
        )
        print(rows[-1], flush=True)
    for step_size, values in (
        (0.05, (0.040, 0.041, 0.043, 0.046)),
        (0.3, (0.040, 0.047, 0.054, 0.078)),
    ):
        for steps, value in zip((1, 3, 5, 10), values, strict=True):
            local = LocalTraining(
                epochs=steps, batch_size=2, learning_rate=step_size * share / 16000, num_samples=2
            )
            model = lib.two_layer(16000 // share)
            attack = lib.tensor(model, method="paper", norm=1.0)
            found = errors(model, [attack], 2, 16, 3.0, 3 if quick else 9, local=local)
            rows.append(
                {
                    "table": "defences",
                    "defence": f"local steps, rate {step_size}/m",
                    "strength": steps,
                    "m": 16000 // share,
                    "attack": "paper, weights",
                    "error": float(np.median(found)),
                    "reference": value if share == 1 else float("nan"),
                }
            )
            print(rows[-1], flush=True)
    return rows + adaptive_rows(quick)


def adaptive_rows(quick: bool) -> list[dict]:
    """The fit of what was transmitted, at a thousand units."""
    model, rows = lib.two_layer(1000), []
    attack = lib.tensor(model, restarts=8)
    cases = [("pruning", p, lambda key, g, p=p: prune(g, p, "tensor")) for p in (0.5, 0.9, 0.99)]
    cases += [("dropout", 0.75, functools.partial(unit_dropout, 0.75))]
    for name, strength, defense in cases:
        found = errors(model, [attack], 2, 16, 3.0, 2 if quick else 9, defense)
        rows.append(
            {
                "table": "defences",
                "defence": name,
                "strength": strength,
                "m": 1000,
                "attack": "fit of the transmitted",
                "error": float(np.median(found)),
                "reference": 1e-12,
                "exact": f"{int((found < 1e-6).sum())}/{len(found)}",
            }
        )
        print(rows[-1], flush=True)
    return rows


def head_rows(quick: bool) -> list[dict]:
    """Features of eight samples behind a tanh layer and ten classes, of two sorts."""
    rows = []
    for name, units, width, squash, reference in (
        ("half-normal", 1024, 64, jax.nn.relu, ".996"),
        ("half-normal, wide", 4096, 512, jax.nn.relu, ".998"),
        ("collinear", 1024, 64, jnp.abs, ".88-.96"),
    )[: 1 if quick else None]:
        model = models.mlp((units,), activation="tanh", bias=False, init="lecun")

        @jax.jit
        def one(key, model=model, width=width, squash=squash):
            keys = jax.random.split(key, 4)
            values = squash(jax.random.normal(keys[0], (8, width)))
            labels = jax.random.randint(keys[1], (8,), 0, 10)
            params = jax.tree.map(lambda a: a.astype(values.dtype), model.init(keys[2], (width,)))
            gradient = jax.grad(model.loss)(params, Batch(values, labels))
            answers = []
            for polish in (False, True):
                found = lib.head_features(
                    model, params, gradient, 8, key=keys[3], polish=polish, restarts=8 * polish
                )
                norms = jnp.linalg.norm(found.features, axis=1)
                share = (found.features @ values.T / norms[:, None]) ** 2
                share /= (values**2).sum(axis=1)[None]
                right = found.labels[share.argmax(axis=0)] == labels
                answers.append(jnp.stack([share.max(axis=0).mean(), right.mean(), found.objective]))
            return jnp.stack(answers)

        found = np.median([one(jax.random.key(s)) for s in range(2 if quick else 5)], axis=0)
        rows.append(
            {
                "table": "head",
                "features": name,
                "d": width,
                "m": units,
                "cos^2": float(found[0, 0]),
                "reference": reference,
                "labels": float(found[0, 1]),
                "cos^2 after the fit": float(found[1, 0]),
                "relative error of the fit": float(found[1, 2]),
            }
        )
        print(rows[-1], flush=True)
    return rows


TABLES = {
    "paper": paper_rows,
    "width": width_rows,
    "regression": regression_rows,
    "defences": defense_rows,
    "head": head_rows,
}


def tensor_section(options) -> list[dict]:
    """All tables of the tensor attack."""
    rows = []
    with jax.enable_x64(True):
        for name in options.tables:
            started = time.perf_counter()
            mine = TABLES[name](options.quick)
            names = list(dict.fromkeys(key for row in mine for key in row))
            print(f"\n### {name} ({time.perf_counter() - started:.0f} s)\n")
            print(timing.table([{key: row.get(key, "") for key in names} for row in mine]) + "\n")
            rows += mine
    return rows


def main() -> None:
    """Measure and print."""
    parser = timing.parser(__doc__)
    parser.add_argument("section", choices=["tensor"], help="the tensor attack")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--quick", action="store_true", help="fewer seeds and units")
    options = parser.parse_args()
    rows = tensor_section(options)
    timing.write(
        options.json,
        rows,
        invjax=invjax.__version__,
        benchmark=f"papers/systematic_evaluation {options.section}",
    )


if __name__ == "__main__":
    main()
