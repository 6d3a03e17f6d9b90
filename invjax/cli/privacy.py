"""`invjax privacy`: what the parameters of DP-SGD mean for the reconstruction of a record."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from invjax import datasets, models
from invjax.base import Batch, Model, Params
from invjax.cli import shared
from invjax.defenses import privacy_spent
from invjax.theory import accounting, baselines, fisher, rero
from invjax.theory.blowup import blowup

ORDERS = tuple(range(2, 257))
"""Integers: accounting is slow for fractional orders, and gives up on some."""

LEAST_NOISE = 0.25
"""Below it the privacy loss spreads so far that accounting by its distribution takes minutes."""

NOISE = 1e-4, 1e8
"""Range of noise multipliers that accounting is fit for."""
RECORDS = 10
"""Of the uniform prior, if not given."""


@dataclasses.dataclass(frozen=True)
class PrivacyConfig:
    """Tell how often, and how well, records can be reconstructed from DP-SGD with these parameters.

    For instance, with a uniform prior on ten records:

    invjax privacy --num-samples 60000 --batch-size 600 --steps 2000 --noise-multiplier 1.0

    For one on images of norm 1, add: --prior sphere --dimension 784 --eta 0.5
    """

    num_samples: int
    """Size of the training set."""
    batch_size: int
    """Expected size of a batch: every step takes every sample independently of the others."""
    steps: int
    """Steps of training."""
    noise_multiplier: float
    """Deviation of the noise on the sum of clipped gradients, in units of the clipping norm."""
    clip_norm: float = 1.0
    """Clipping norm; dFIL alone depends on it."""
    delta: float = 1e-5
    """Of (epsilon, delta)-differential privacy."""
    prior: Literal["uniform", "sphere", "ball"] | None = None
    """What the adversary holds for possible; uniform on some records if not given."""
    records: int | None = None
    """Number of records of the uniform prior (10 if not given)."""
    dimension: int | None = None
    """Values of a record, for sphere and ball; those of the data set if not given."""
    eta: float | None = None
    """L2 error that counts as success, for sphere and ball."""
    radius: float | None = None
    """Of sphere and ball (1 if not given)."""
    kappa: float | None = None
    """In place of a prior: probability that the best blind guess succeeds."""
    dataset: str | None = None
    """With --model, Fisher information about some of its samples: digits, mnist, cifar10, ..."""
    data_dir: pathlib.Path | None = None
    """Folder with the files of mnist, fashion_mnist or cifar10."""
    model: str | None = None
    """A model as `invjax attack --model` takes it: lenet, 'mlp((64,), activation="tanh")', ..."""
    num_victims: int = 8
    """Samples whose Fisher information is computed."""
    seed: int = 0
    """Of those samples and the model's weights."""


class Row(NamedTuple):
    """A line of the table; an empty cell where there is no such number."""

    quantity: str
    hidden: str
    revealed: str = "-"


class Information(NamedTuple):
    """What Fisher information needs: a model at initialisation, and samples."""

    model: Model
    params: Params
    batch: Batch


def privacy(argv: Sequence[str]) -> int:
    """Run `invjax privacy`.

    Args:
      argv: its arguments.

    Returns:
      The exit code: 0, 2 for bad input, 130 if interrupted.
    """
    config = tyro.cli(PrivacyConfig, args=argv, prog="invjax privacy")
    return shared.guarded("privacy", lambda: _run(config))


def _run(config: PrivacyConfig) -> int:
    kappa, information = prepare(config)
    rows = bounds(config, kappa)
    if information is not None:
        rows += information_rows(config, information)
    console = Console()
    console.print(
        f"[bold]DP-SGD[/bold], {config.steps} steps of {config.batch_size} of {config.num_samples} "
        f"samples, noise multiplier {config.noise_multiplier:g}"
    )
    console.print(bounds_table(rows))
    for line in meaning(config, kappa, information is not None):
        console.print(line, highlight=False)
    return 0


def prepare(config: PrivacyConfig) -> tuple[float, Information | None]:
    """Check the options, and load what they name.

    Args:
      config: the options.

    Returns:
      Kappa, and what Fisher information needs where it is asked for.

    Raises:
      ValueError: anything amiss, by the option's name.
    """
    for name in ("num_samples", "batch_size", "steps", "records", "num_victims"):
        if getattr(config, name) is not None:
            _at_least(name, getattr(config, name), 1)
    if config.batch_size > config.num_samples:
        raise ValueError(
            f"--batch-size must be at most --num-samples, got {config.batch_size} and "
            f"{config.num_samples}."
        )
    for name in ("noise_multiplier", "clip_norm", "radius"):
        value = getattr(config, name)
        if value is not None and not 0 < value < np.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {value}.")
    if not NOISE[0] <= config.noise_multiplier <= NOISE[1]:
        raise ValueError(
            f"--noise-multiplier must lie between {NOISE[0]:g} and {NOISE[1]:g}, beyond which "
            f"accounting fails, got {config.noise_multiplier}."
        )
    for name in ("delta", "kappa"):
        value = getattr(config, name)
        if value is not None and not 0 < value < 1:
            raise ValueError(f"--{name} must lie between 0 and 1, got {value}.")
    _at_least("seed", config.seed, 0)
    information = _information(config)
    size = None if information is None else information.batch.inputs[0].size
    return _kappa(config, size), information


def bounds(config: PrivacyConfig, kappa: float) -> list[Row]:
    """What the parameters alone say.

    Args:
      config: the options.
      kappa: probability of the best blind guess.

    Returns:
      The rows.
    """
    rate = config.batch_size / config.num_samples
    setting = config.noise_multiplier, rate, config.steps
    name, epsilon = _epsilon(config)
    concentrated = rero.gamma_zcdp(kappa, config.steps / (2 * config.noise_multiplier**2))
    renyi = rero.gamma_rdp(kappa, accounting.renyi_divergences(*setting, ORDERS), ORDERS)
    naive = rero.gamma_dp(kappa, epsilon, config.delta)
    # The certificate carries a round-off of about 1e-7, below which the formulas are better.
    success = np.minimum(np.minimum(blowup(kappa, *setting), renyi), naive)
    revealed = blowup(kappa, *setting, inclusion="revealed")
    divergence = accounting.renyi_two_replacement(*setting)
    exposed = accounting.renyi_two_replacement(*setting, "revealed")
    floors = [accounting.mean_square_floor(value) for value in (divergence, exposed)]
    unbiased = [fisher.rdp_mse(value, jnp.ones(1)) for value in (divergence, exposed)]
    return [
        Row(name, _text(epsilon)),
        Row("success of a blind guess (kappa)", _text(kappa), _text(kappa)),
        Row("success of any reconstruction, at most", _text(success), _text(revealed)),
        Row("  looser, by Renyi divergences", _text(renyi)),
        Row("  looser, by zCDP", _text(concentrated), _text(concentrated)),
        Row("  looser, kappa e^epsilon + delta", _text(naive)),
        Row("mean square error, at least (worst record)", *map(_text, floors)),
        Row("  of unbiased attacks, at least (any record)", *map(_text, unbiased)),
    ]


def information_rows(config: PrivacyConfig, information: Information) -> list[Row]:
    """Diagonal Fisher information loss, were all steps as at initialisation.

    Args:
      config: the options.
      information: model and samples.

    Returns:
      The rows.
    """
    rate = config.batch_size / config.num_samples
    found = fisher.dp_sgd_step(
        *information, clip_norm=config.clip_norm, noise_multiplier=config.noise_multiplier
    )
    taken = config.steps * rate * np.asarray(found.dfil, float)
    credit = float(fisher.subsampling_credit(rate, config.noise_multiplier, config.delta))
    losses = [credit * taken, taken]
    with np.errstate(divide="ignore"):
        errors = [1 / loss.max() for loss in losses]
    return [
        Row("dFIL at initialisation, median", *(_text(np.median(loss)) for loss in losses)),
        Row("  largest", *(_text(loss.max()) for loss in losses)),
        Row("  mean square error of unbiased attacks on it, at least", *map(_text, errors)),
    ]


def bounds_table(rows: Sequence[Row]) -> Table:
    """The table.

    Args:
      rows: its lines.

    Returns:
      The table.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("")
    for name in ("inclusion hidden", "revealed"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def meaning(config: PrivacyConfig, kappa: float, informed: bool) -> list[str]:
    """What the numbers mean, and what they do not.

    Args:
      config: the options.
      kappa: probability of the best blind guess.
      informed: whether Fisher information is among them.

    Returns:
      A line a statement.
    """
    if config.kappa is not None:
        success = "the event whose blind probability was given"
    elif config.prior in (None, "uniform"):
        success = (
            f"to name the right one of {config.records or RECORDS} records that are equally likely"
        )
    else:
        success = f"an L2 error of at most {config.eta:g}, from a uniform prior on a {config.prior}"
    lines = [
        f"Success is {success}. The adversary knows every other record, and all iterates; without "
        f"them it succeeds with probability {_text(kappa)}, which is the baseline to compare with.",
        "The prior is the population's: who knows more about the target starts higher (--kappa).",
        "Hidden: nobody learns which steps took the record. Revealed: the adversary does. Both are "
        "for independent (Poisson) sampling; shuffled or fixed batches are not covered.",
        "Epsilon and success compare training with the record to training without it (add or "
        "remove). The errors, of values in [0, 1], compare it to another record in its place "
        "(replace), which doubles the sensitivity; the worst record is one of two corners.",
    ]
    if informed:
        lines.append(
            "dFIL is of a smooth clipping, adds up over the steps expected to take the record, each "
            "as at initialisation, and bounds unbiased attacks alone."
        )
    return lines


def _epsilon(config: PrivacyConfig) -> tuple[str, float]:
    name = f"epsilon at delta = {config.delta:g}"
    sizes = config.num_samples, config.batch_size, config.steps
    if config.noise_multiplier >= LEAST_NOISE:
        return name, privacy_spent(config.noise_multiplier, *sizes, config.delta)
    rate = config.batch_size / config.num_samples
    setting = config.noise_multiplier, rate, config.steps
    return (
        f"{name}, by Renyi divergences",
        accounting.renyi_epsilon(*setting, config.delta, ORDERS),
    )


def _kappa(config: PrivacyConfig, size: int | None) -> float:
    if config.kappa is not None:
        for name in ("prior", "records", "dimension", "eta", "radius"):
            if getattr(config, name) is not None:
                raise ValueError(f"--kappa stands in place of --prior, got --{name} too.")
        return config.kappa
    if config.prior in (None, "uniform"):
        for name in ("dimension", "eta", "radius"):
            if getattr(config, name) is not None:
                raise ValueError(
                    f"--{name} needs --prior sphere or ball; the uniform prior has none."
                )
        return baselines.kappa_uniform(config.records or RECORDS)
    if config.records is not None:
        raise ValueError(f"--records is of the uniform prior, got --prior {config.prior}.")
    dimension = size if config.dimension is None else config.dimension
    if dimension is None or config.eta is None:
        raise ValueError(f"--prior {config.prior} needs --dimension and --eta.")
    _at_least("dimension", dimension, 1)
    if not config.eta > 0:
        raise ValueError(f"--eta must be positive, got {config.eta}.")
    prior = baselines.kappa_sphere if config.prior == "sphere" else baselines.kappa_ball
    return float(prior(config.eta, dimension, 1.0 if config.radius is None else config.radius))


def _information(config: PrivacyConfig) -> Information | None:
    if (config.dataset is None) != (config.model is None):
        raise ValueError("--dataset and --model go together: give both, or neither.")
    if config.dataset is None or config.model is None:
        return None
    dataset = datasets.load(config.dataset, config.data_dir)
    if config.num_victims > len(dataset):
        raise ValueError(
            f"--num-victims must be at most {len(dataset)}, the size of {dataset.name}, got "
            f"{config.num_victims}."
        )
    model = models.by_name(config.model, dataset.num_classes)
    key, order = jax.random.split(jax.random.key(config.seed))
    chosen = np.asarray(jax.random.permutation(order, len(dataset)))[: config.num_victims]
    batch = Batch(jnp.asarray(dataset.inputs[chosen]), jnp.asarray(dataset.labels[chosen]))
    return Information(model, model.init(key, dataset.input_shape), batch)


def _at_least(name: str, value: int, low: int) -> None:
    if value < low:
        raise ValueError(f"--{name.replace('_', '-')} must be at least {low}, got {value}.")


def _text(value: Any) -> str:
    return f"{float(value):.4g}"
