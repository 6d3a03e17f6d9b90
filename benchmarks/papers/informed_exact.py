"""What the informed adversary knows for certain: closed forms of released models, and certified bounds.

    python benchmarks/papers/informed_exact.py glm --json glm.json
    python benchmarks/papers/informed_exact.py bounds --json bounds.json

`glm`: every record of digits 3 and 8 (of the first 600 digits for ten classes) in turn is the missing one of
a generalised linear model at its optimum (Balle, Cherubin and Hayes 2022), in float64: the largest and the
median error of a record's worst pixel, and the share that is said to be found. Penalties are of the mean of
the losses. `dFIL`: noise on the weights, the mean squared error over the bound for unbiased attacks.

`bounds`: the blow-up function of DP-SGD (Hayes, Mahloujifar and Balle 2023) from above, as certified, and
from below by valid tests: the gap at reference settings, gaps and violations over random settings; and the
success that one epsilon allows, by batch size and steps.
"""

import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import brentq
from sklearn import linear_model

sys.path.append(str(pathlib.Path(__file__).parents[1]))
import timing

import invjax
from invjax import datasets
from invjax.attacks.informed import glm
from invjax.attacks.informed.glm_model import Glm
from invjax.base import Batch
from invjax.defenses import privacy_spent
from invjax.theory import fisher
from invjax.theory.blowup import blowup
from invjax.theory.privacy_loss import fft_blowup

# kappa, sampling rate, noise multiplier, steps
REFERENCE = (
    (0.1, 1, 1, 1),
    (0.1, 1, 0.5, 1),
    (0.01, 1, 1, 1),
    (0.1, 0.1, 1, 1),
    (0.1, 0.5, 1, 1),
    (0.125, 1, 27, 100),
    (0.125, 1, 9.5, 100),
    (0.125, 1, 5, 100),
    (0.1, 0.1, 1, 100),
    (0.1, 0.02, 0.6, 1000),
    (0.1, 0.01, 1, 2000),
    (0.01, 0.1, 1, 100),
    (0.01, 1, 40, 100),
)
KAPPA = np.array([0.001, 0.01, 0.1, 0.5, 0.9])
EPSILON, DELTA, RECORDS = 4.0, 1e-5, 1000
BATCHES = ((1000, 100), (100, 100), (100, 1000), (10, 1000), (10, 100))


def records() -> tuple[Batch, Batch, Batch]:
    """Digits 3 against 8, the same with counts for labels, and the first 600 of all."""
    data = datasets.digits()
    inputs, labels = np.asarray(data.inputs, float).reshape(-1, 64), np.asarray(data.labels)
    keep = np.isin(labels, (3, 8))
    pair = Batch(inputs[keep], (labels[keep] == 8).astype(int))
    rate = np.exp(pair.inputs @ np.random.default_rng(0).normal(size=64) * 0.3)
    counts = Batch(pair.inputs, np.random.default_rng(1).poisson(rate).astype(float))
    return pair, counts, Batch(inputs[:600], labels[:600])


def released():
    """By name: a model at its optimum and the records that it was trained on."""
    pair, counts, many = records()
    number = len(pair.labels)
    for strength in (0.1, 0.01):
        model = glm.fit(pair, "logistic", penalty=strength * number)
        yield f"logistic, penalty {strength}", model, pair
    for strength in (0.01, 0.001):
        model = glm.fit(many, "softmax", penalty=600 * strength, num_classes=10)
        yield f"softmax, penalty {strength}", model, many
    yield "ridge, penalty 0.01", glm.fit(pair, "linear", penalty=0.01 * number), pair
    yield "Poisson, penalty 3", glm.fit(counts, "poisson", penalty=3.0), counts
    tight = {"solver": "newton-cholesky", "tol": 1e-12, "max_iter": 1000}
    for name, given in (("newton-cholesky", tight), ("default", {})):
        estimator = linear_model.LogisticRegression(**given).fit(*pair)
        yield f"scikit-learn's logistic, {name}", glm.from_sklearn(estimator), pair
    bare = glm.fit(pair, "logistic", penalty=0.01 * number, intercept=False)
    yield "logistic without an intercept", bare, pair


def closed_forms(options) -> list[dict]:
    """Errors of all records."""
    rows = []
    for name, model, data in released():
        found = glm.reconstruct_all(model, data, input_range=(0.0, 1.0))
        errors = np.abs(np.asarray(found.inputs) - data.inputs).max(axis=1)
        row = {
            "model": name,
            "records": len(errors),
            "largest": float(errors.max()),
            "median": float(np.median(errors)),
            "below 1e-4": round(float((errors < 1e-4).mean()), 3),
            "labels right": round(float((np.rint(found.labels) == data.labels).mean()), 3),
            "found": round(float(np.mean(found.found)), 3),
            "among the roots": "",
        }
        if model.intercept is None:
            roots = found.diagnostics["candidates"], found.diagnostics["valid"]
            apart = np.abs(roots[0] - data.inputs[:, None]).max(axis=2)
            row["among the roots"] = float(np.where(roots[1], apart, np.inf).min(axis=1).max())
        rows.append(row)
        print(rows[-1], flush=True)
    least, middle, count = fisher_ratios(records()[0], options.draws)
    print(
        f"dFIL: error times information {least:.1f} at least, {middle:.1f} in the median of {count}"
    )
    return rows


def fisher_ratios(pair: Batch, number: int) -> tuple[float, float, int]:
    """Mean squared error behind noise on the weights, over the bound for unbiased attacks."""
    penalty, std = 0.01 * len(pair.labels), 1e-7
    model = glm.fit(pair, "logistic", penalty=penalty)
    targets = np.arange(0, len(pair.labels), 4)
    theta = np.concatenate([np.asarray(model.intercept)[None], model.weight])
    penalties = np.full(65, penalty)
    penalties[0] = 0
    with jax.enable_x64(True):

        @jax.jit
        def attacked(noise):
            moved = Glm(
                weight=model.weight + noise[1:],
                intercept=model.intercept + noise[0],
                penalty=penalty,
                family="logistic",
            )
            return glm.reconstruct_all(moved, pair).inputs[targets]

        jacobians = jax.jit(jax.vmap(fisher.logistic_jacobian, (None, None, 0, 0, None)))(
            theta, pair.inputs, pair.inputs[targets], pair.labels[targets], penalties
        )
        draws = std * np.random.default_rng(1).normal(size=(number, 65))
        found = np.asarray(jax.lax.map(attacked, jnp.asarray(draws), batch_size=10))
    errors = np.mean((found - pair.inputs[targets]) ** 2, axis=(0, 2))
    information = np.square(np.asarray(jacobians)).sum(axis=(1, 2)) / 64 / std**2
    ratios = errors * information
    return float(ratios.min()), float(np.median(ratios)), len(ratios)


def sides(kappa, rate, noise, steps):
    """The blow-up function from below and from above."""
    return [fft_blowup(kappa, noise, rate, steps, certified=known) for known in (False, True)]


def bounds(options) -> list[dict]:
    """Gaps of the certificate, and the success that one epsilon allows."""
    gaps = []
    for setting in REFERENCE:
        low, high = sides(*setting)
        gaps.append(float(high - low))
        assert gaps[-1] >= 0, setting
    started = time.perf_counter()
    fft_blowup(0.1, 1, 0.01, 2000)
    seconds = time.perf_counter() - started
    print(f"reference settings: gap {max(gaps):.2g} at most; 2,000 steps in {seconds:.2f} s")
    rng, wide, wrong = np.random.default_rng(0), [], 0
    for _ in range(options.settings):
        rate, noise = 10 ** rng.uniform(-4, 0), 10 ** rng.uniform(-0.5, 1.5)
        low, high = sides(KAPPA, rate, noise, round(10 ** rng.uniform(0, 3.5)))
        wrong += int((low > high).any())
        wide.append(float((high - low).max()))
    if wide:
        print(
            f"{len(wide)} random settings: {wrong} violations, "
            f"gap {np.median(wide):.2g} in the median, {max(wide):.2g} at most"
        )
    rows = []
    for size, steps in BATCHES:

        def over(noise, size=size, steps=steps):
            return privacy_spent(noise, RECORDS, size, steps, DELTA) - EPSILON

        noise = brentq(over, 0.4, 100.0, rtol=1e-3)
        row = {"batch": size, "steps": steps, "noise multiplier": float(noise)}
        for inclusion in ("hidden", "revealed"):
            found = blowup(0.1, noise, size / RECORDS, steps, inclusion=inclusion)
            row[inclusion] = round(float(found), 3)
        rows.append(row)
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure and print."""
    parser = timing.parser(__doc__)
    parser.add_argument("part", choices=["glm", "bounds"])
    parser.add_argument("--draws", type=int, default=100, help="of the noise on the weights")
    parser.add_argument("--settings", type=int, default=100, help="random ones of `bounds`")
    options = parser.parse_args()
    rows = {"glm": closed_forms, "bounds": bounds}[options.part](options)
    print("\n" + timing.table(rows))
    timing.write(
        options.json,
        rows,
        invjax=invjax.__version__,
        benchmark=f"papers/informed_exact {options.part}",
    )


if __name__ == "__main__":
    main()
