"""Differential privacy against the informed adversary: success beside the bound on any attack.

    python benchmarks/papers/dp_reconstruction.py --json dp.json --figure dp.png
    python benchmarks/papers/dp_reconstruction.py --dataset mnist --data-dir data --earlier dp.json

Three attacks who know all records but one, each over a range of noise (Hayes et al. 2023; Balle et al. 2022):

* `prior`: which of 8 records was trained on, from every iterate and noisy gradient of DP-SGD with full
  batches (`likelihood_ratio`), in the setting of the authors' notebook: 10 ELU units, inputs from -1 to 1,
  clipping at 0.1, learning rate 9, 100 steps;
* `hidden` and `dot`: the same with batches of a tenth of the records, by the likelihood that sums over
  the target's steps and by the published inner product;
* `weights`: the target's image from the final weights of DP-GD, by ridge regression on shadow models
  (`--network` for the reconstructor network), a success where its squared error is below the mean one of
  the nearest record that the adversary holds;
* `glm`: the target's image from a logistic regression with Gaussian noise on its weights, in closed
  form, with the same measure of success.

`bound` is on the success of any attack on all that DP-SGD releases, `kappa` that of the best blind guess;
for images `kappa` is the largest share of the records near one of them, which is a heuristic. `epsilon` is at
delta = 1e-5. `accuracy` is of the released model on records that were not used. `--earlier` draws other runs
in the same `--figure`.
"""

import functools
import json
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from dp_accounting import get_epsilon_gaussian
from matplotlib.figure import Figure
from scipy.special import ndtr, ndtri

sys.path.append(str(pathlib.Path(__file__).parents[1]))
import timing

from invjax import datasets, defenses, metrics, models
from invjax.attacks.informed import dpsgd, dpsgd_release, glm, glm_model, reconstructor, training
from invjax.base import Batch
from invjax.evaluation.shadows import shadows
from invjax.report.figures import png
from invjax.theory.baselines import kappa_pool_heuristic
from invjax.theory.blowup import blowup

DELTA = 1e-5
STEPS = 100
CANDIDATES = 8
PANELS = {
    "prior": "prior, all iterates",
    "hidden": "prior, batches of a tenth",
    "dot": "prior, batches of a tenth",
    "weights": "shadow models, final weights",
    "glm": "closed form, logistic regression",
}
NOISE = {
    "prior": (40.0, 20.0, 10.0, 5.0, 2.5, 1.0),
    "hidden": (4.0, 2.0, 1.0, 0.7, 0.5),
    "weights": (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01),
    "glm": (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001),
}


def gaussian_epsilon(mu: float) -> float:
    """Epsilon of a Gaussian mechanism whose means are `mu` deviations apart (Balle and Wang 2018)."""
    return get_epsilon_gaussian(1 / mu, DELTA)


def split(dataset, flat: bool, *sizes: int) -> list[Batch]:
    """Disjoint batches of a data set, in a fixed random order; the rest is the last."""
    order = np.random.default_rng(0).permutation(len(dataset))
    parts = np.split(order, np.cumsum(sizes))
    if len(parts[-1]) < 100:
        raise SystemExit(f"{dataset.name} is too small for {sum(sizes)} records and a test set.")
    shape = (-1,) if flat else dataset.input_shape
    return [
        Batch(
            jnp.asarray(dataset.inputs[part].reshape(len(part), *shape)),
            jnp.asarray(dataset.labels[part]),
        )
        for part in parts
    ]


def accuracy(model, params, batch: Batch):
    """Share of right classes."""
    return jnp.mean(model.apply(params, batch.inputs).argmax(1) == batch.labels)


def prior_aware(dataset, options, rate: float, scores) -> list[dict]:
    """The attack over a finite prior; the target, the start and the noise are new in every trial."""
    raw = split(dataset, True, options.known, CANDIDATES)
    known, prior, held_out = (part._replace(inputs=2 * part.inputs - 1) for part in raw)
    held_out = jax.tree.map(lambda leaf: leaf[:500], held_out)
    model = models.mlp((10,), dataset.num_classes, activation="elu", init="lecun")
    base = dpsgd_release.Run(STEPS, 9.0, 0.1, 1.0, rate)

    def trial(key, noise):
        run = base._replace(noise_multiplier=noise)
        keys = jax.random.split(key, 3)
        index = jax.random.randint(keys[0], (), 0, CANDIDATES)
        target = jax.tree.map(lambda leaf: leaf[index][None], prior)
        start = model.init(keys[1], known.inputs.shape[1:])
        seen = dpsgd_release.release(keys[2], model, start, known, target, run)
        found = dpsgd.products(model, seen, known, prior, run)
        hits = [jnp.argmax(dpsgd.scores(found, run, score)) == index for score in scores]
        return jnp.stack(hits), accuracy(model, seen.final, held_out)

    @jax.jit
    def all_trials(noise):
        keys = jax.random.split(jax.random.key(1), options.trials)
        # A few at a time, whose per-sample gradients stay in the processor's cache.
        return jax.lax.map(lambda key: trial(key, noise), keys, batch_size=options.parallel)

    rows = []
    for noise in NOISE["prior" if rate == 1 else "hidden"]:
        hits, right = all_trials(noise)
        count = options.known + 1
        spent = gaussian_epsilon(math.sqrt(STEPS) / noise)
        if rate < 1:
            spent = defenses.privacy_spent(noise, count, round(rate * count), STEPS, DELTA)
        bound = float(blowup(1 / CANDIDATES, noise, rate, STEPS))
        for score, found in zip(scores, np.asarray(hits).T, strict=True):
            name = "prior" if rate == 1 else score
            rows.append(row(name, noise, spent, found, bound, 1 / CANDIDATES, right.mean()))
            print(rows[-1], flush=True)
    return rows


def row(attack, noise, epsilon, hits, bound, kappa, right) -> dict:
    """One line of the table."""
    success = float(np.mean(hits))
    return {
        "attack": attack,
        "noise": noise,
        "epsilon": float(epsilon),
        "success": success,
        "error": math.sqrt(success * (1 - success) / np.size(hits)),
        "bound": float(bound),
        "kappa": float(kappa),
        "accuracy": float(right),
    }


def image_baseline(records, targets) -> tuple[float, float]:
    """The squared error that counts as a success, and the success of the best blind guess."""
    least = float(metrics.nearest_neighbor(targets, records)[1].mean())
    size = math.prod(records.shape[1:])
    return least, kappa_pool_heuristic(np.asarray(records), math.sqrt(size * least))


def from_weights(dataset, options) -> list[dict]:
    """The reconstructor of Balle et al. against DP-GD."""
    sizes = options.weights_known, options.shadows, options.targets
    known, pool, targets, held_out = split(dataset, False, *sizes)
    model = models.mlp((16,), dataset.num_classes, activation="elu", init="lecun")
    start = model.init(jax.random.key(2), dataset.input_shape)
    least, kappa = image_baseline(jnp.concatenate([known.inputs, pool.inputs]), targets.inputs)
    rows = []
    for noise in NOISE["weights"]:
        procedure = training.training(
            model,
            optax.sgd(0.5, momentum=0.9),
            STEPS,
            params=start,
            defense=defenses.dp_sgd(1.0, noise),
        )
        train = functools.partial(shadows, procedure=procedure, known=known, chunk=64)
        trained = train(jax.random.key(3), pool=pool)
        victims = train(jax.random.key(4), pool=targets)
        if options.network:
            decoder = reconstructor.dense_decoder(dataset.input_shape, (512, 512))
            settings = {"decoder": decoder, "epochs": options.network}
            find = reconstructor.network(jax.random.key(5), trained, pool.inputs, **settings)
        else:
            find = reconstructor.ridge(trained, pool.inputs)
        errors = metrics.mse(jax.vmap(find)(victims), targets.inputs)
        mu = math.sqrt(STEPS) / noise
        right = jax.jit(jax.vmap(lambda params: accuracy(model, params, held_out)))(victims)
        bound = blowup(kappa, noise, 1.0, STEPS)
        rows.append(
            row("weights", noise, gaussian_epsilon(mu), errors < least, bound, kappa, right.mean())
        )
        print(rows[-1], flush=True)
    return rows


def from_glm(dataset, options) -> list[dict]:
    """The closed form against noise on the weights of a logistic regression of two digits.

    A record with its 1 for the intercept moves the weights by `|(1, x)| / penalty` at most, since the loss
    has that derivative at most and the objective that curvature; records are scaled to `|x| <= 1`.
    """
    chosen = np.flatnonzero(np.isin(dataset.labels, (3, 8)))
    order = np.random.default_rng(0).permutation(chosen)
    inputs = dataset.inputs.reshape(len(dataset), -1).astype(np.float64)
    # The bound holds for records of norm 1 at most, whatever the data.
    longest = math.sqrt(inputs.shape[1])
    train, held_out = (
        Batch(inputs[part] / longest, (dataset.labels[part] == 8).astype(int))
        for part in np.split(order, [options.glm_records])
    )
    penalty = 0.01 * len(train.labels)
    fitted = glm_model.fit(train, "logistic", penalty=penalty, intercept_penalty=penalty)
    sensitivity = math.sqrt(2) / penalty
    records = jnp.asarray(train.inputs, jnp.float32)
    # The nearest of the others: the first is the record itself.
    distances = np.asarray([np.sort(np.mean((records - one) ** 2, axis=1))[1] for one in records])
    least = float(distances.mean())
    kappa = kappa_pool_heuristic(np.asarray(records), math.sqrt(records.shape[1] * least))
    rng, rows = np.random.default_rng(1), []
    for noise in NOISE["glm"]:
        hits, right = [], []
        for _ in range(options.releases):
            drawn = noise * sensitivity * rng.standard_normal(inputs.shape[1] + 1)
            weight = np.asarray(fitted.weight) + drawn[1:]
            intercept = np.asarray(fitted.intercept) + drawn[0]
            released = glm_model.Glm(
                weight=weight,
                intercept=intercept,
                penalty=penalty,
                intercept_penalty=penalty,
                family="logistic",
            )
            found = glm.reconstruct_all(released, train)
            hits.append(np.mean((np.asarray(found.inputs) - train.inputs) ** 2, axis=1) < least)
            right.append(((held_out.inputs @ weight + intercept > 0) == held_out.labels).mean())
        mu = 1 / noise
        bound = ndtr(mu + ndtri(kappa))
        rows.append(
            row("glm", noise, gaussian_epsilon(mu), np.stack(hits), bound, kappa, np.mean(right))
        )
        print(rows[-1], flush=True)
    return rows


def earlier(paths: list[str]) -> list[dict]:
    """Rows of earlier runs, from their JSON."""
    contents = [json.loads(pathlib.Path(path).read_text()) for path in paths]
    return [
        {**one, "dataset": content["dataset"]} for content in contents for one in content["rows"]
    ]


def figure(rows: list[dict], path: str) -> None:
    """A panel an attack and data set: success and bound over epsilon."""
    panels = list(dict.fromkeys((one["dataset"], PANELS[one["attack"]]) for one in rows))
    across = min(len(panels), 3)
    down = -(-len(panels) // across)
    drawing = Figure(figsize=(3.6 * across, 3.4 * down), dpi=110, layout="constrained")
    axes = drawing.subplots(down, across, sharey=True, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (dataset, panel) in zip(axes.flat, panels, strict=False):
        here = [one for one in rows if one["dataset"] == dataset and PANELS[one["attack"]] == panel]
        for name in dict.fromkeys(one["attack"] for one in here):
            part = [one for one in here if one["attack"] == name]
            epsilon = [one["epsilon"] for one in part]
            found = [one["success"] for one in part]
            axis.errorbar(epsilon, found, [one["error"] for one in part], fmt="o-", label=name)
        axis.plot(epsilon, [one["bound"] for one in part], "k-", label="bound on any attack")
        axis.plot(epsilon, [one["accuracy"] for one in part], "0.6", label="accuracy")
        axis.axhline(part[0]["kappa"], color="k", linestyle=":", label="blind guess")
        axis.set_title(f"{dataset}: {panel}", fontsize=9)
        axis.set_xscale("log")
        axis.set_xlabel("epsilon at delta 1e-5")
        axis.set_ylim(0, 1.02)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=7)
    for axis in axes[:, 0]:
        axis.set_ylabel("success")
    pathlib.Path(path).write_bytes(png(drawing))


def main() -> None:
    """Measure, print, draw."""
    parser = timing.parser(__doc__, data_dir=True)
    attacks = ("prior", "hidden", "weights", "glm")
    parser.add_argument("--attacks", nargs="*", choices=attacks, default=attacks)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--known", type=int, default=99, help="records known beside a prior")
    parser.add_argument("--trials", type=int, default=400, help="targets of the prior's attacks")
    parser.add_argument("--parallel", type=int, default=4, help="trials at once")
    parser.add_argument("--weights-known", type=int, default=100, help="records of `weights`")
    parser.add_argument("--shadows", type=int, default=1000, help="models of `weights`")
    parser.add_argument("--targets", type=int, default=100, help="of `weights`")
    parser.add_argument("--network", type=int, help="epochs of the reconstructor network")
    parser.add_argument("--glm-records", type=int, default=257, help="of the logistic regression")
    parser.add_argument("--releases", type=int, default=5, help="of the logistic regression")
    parser.add_argument("--figure", help="file for the figure, a PNG")
    parser.add_argument("--earlier", nargs="*", default=[], help="JSON of other runs to draw, too")
    options = parser.parse_args()
    dataset = datasets.load(options.dataset, options.data_dir, "train")
    rows = []
    if "prior" in options.attacks:
        rows += prior_aware(dataset, options, 1.0, ("likelihood_ratio",))
    if "hidden" in options.attacks:
        rows += prior_aware(dataset, options, 0.1, ("hidden", "dot"))
    if "weights" in options.attacks:
        rows += from_weights(dataset, options)
    if "glm" in options.attacks:
        rows += from_glm(dataset, options)
    print("\n" + timing.table(rows))
    timing.write(
        options.json,
        rows,
        dataset=options.dataset,
        delta=DELTA,
        benchmark="papers/dp_reconstruction",
    )
    if options.figure:
        mine = [{**one, "dataset": options.dataset} for one in rows]
        figure([*earlier(options.earlier), *mine], options.figure)


if __name__ == "__main__":
    main()
