"""A comparison of defences at equal utility, as data."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import optax

from invjax import calls
from invjax.attacks import needs_labels
from invjax.evaluation import families
from invjax.evaluation.families import FAMILIES, Family
from invjax.evaluation.grid import Sweep, read_toml, with_tuples

OPTIMIZERS = {"adam": optax.adam, "sgd": optax.sgd}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tradeoff:
    """Which defences to compare, at which losses of utility, against which attacks.

    Attributes:
      dataset: a name or path, as `datasets.load` takes it.
      model: a name, perhaps with settings.
      defenses: families of defences; `families.read` says how they are written.
      attacks: names, perhaps with settings; those that apply to a defence are all used.
      seeds: of the weights, the batches, the defences, the victims and the attacks.
      utility: what is lost: `accuracy`, the undefended model's test accuracy minus the defended one's
        (as shares), or `loss`, the training loss at the end minus the undefended one's.
      levels: how much of it to lose: every defence is calibrated to each.
      tolerance: how far from a level still counts as it, as a share of the level.
      grid: strengths of every family that are measured and attacked besides.
      rounds: of refinement after these, at most.
      steps: of training.
      clients: gradients that are averaged in a step of training, each defended on its own.
      batch_size: samples of a client's gradient, in training and under attack.
      optimizer: of the training: `adam(RATE)` or `sgd(RATE)`.
      evaluated: held-out samples, and training samples, that a trained model is judged by, at most.
      num_victims: gradients that are attacked for every strength, attack and seed.
      attack_step: undefended steps behind the weights at which gradients are attacked, as the
        `train_steps` of a sweep; 0 attacks fresh weights, the worst case for the client.
      labels: what the adversary knows of them; the attack's own choice where `None`.
      reduce: the strength of a defence is the error of the attack that errs least (`min`), or, as the
        definition of Liu et al. 2024 is printed, of the one that errs most (`max`).
      data_dir: folder of data sets on disk.

    Raises:
      ValueError: an empty or repeating list, a number out of range, text that cannot be read.
    """

    dataset: str = "digits"
    model: str = "mlp(32)"
    defenses: tuple[Family, ...] = (FAMILIES["gaussian_noise"], FAMILIES["magnitude_prune"])
    attacks: tuple[str, ...] = ("bayes", "inverting_gradients", "bias_trick")
    seeds: tuple[int, ...] = (0, 1, 2)
    utility: Literal["accuracy", "loss"] = "accuracy"
    levels: tuple[float, ...] = (0.02, 0.05, 0.1)
    tolerance: float = 0.2
    grid: int = 8
    rounds: int = 3
    steps: int = 300
    clients: int = 8
    batch_size: int = 4
    optimizer: str = "adam(0.003)"
    evaluated: int = 2000
    num_victims: int = 8
    attack_step: int = 0
    labels: Literal["known", "recovered", "joint"] | None = None
    reduce: Literal["min", "max"] = "min"
    data_dir: str | None = None

    def __post_init__(self):
        """Check what can be checked without loading anything."""
        kinds = {"defenses": Family, "attacks": str, "seeds": int, "levels": float}
        for name, kind in kinds.items():
            values = getattr(self, name)
            if not isinstance(values, tuple) or not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must be different values, one at least, got {values!r}.")
            if not all(type(value) is kind for value in values):
                raise ValueError(f"{name} must hold {kind.__name__}s, got {values!r}.")
        texts = [family.defense for family in self.defenses]
        if "none" in texts or len(set(texts)) < len(texts):
            raise ValueError(
                f"defenses must differ, without 'none', which is measured anyway; got {texts}."
            )
        least = {"grid": 2, "rounds": 0, "steps": 1, "clients": 1, "batch_size": 1, "evaluated": 1}
        for name, low in (least | {"num_victims": 1, "attack_step": 0}).items():
            if type(getattr(self, name)) is not int or getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)!r}.")
        positive = all(0 < level < math.inf for level in self.levels)
        if min(self.seeds) < 0 or not positive or not 0 < self.tolerance < 1:
            raise ValueError(
                "seeds must not be negative, levels must be positive and tolerance in (0, 1), got "
                f"{self.seeds}, {self.levels} and {self.tolerance}."
            )
        if self.utility == "accuracy" and max(self.levels) >= 1:
            raise ValueError(f"levels of accuracy are shares below 1, got {self.levels}.")
        choices = {"utility": ("accuracy", "loss"), "reduce": ("min", "max")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}.")
        for text in self.attacks:
            needs_labels(text, self.labels)
        make_optimizer(self.optimizer)
        attack_sweep(self, ["none"], self.attacks)


def make_optimizer(text: str) -> optax.GradientTransformation:
    """The optimizer of a text: `adam(0.003)`, `sgd(0.1, momentum=0.9)`."""
    made = calls.build(text, OPTIMIZERS, "optimizer")
    if len(made) != 1:
        raise ValueError(f"Name one optimizer, got {len(made)} in {text!r}.")
    return made[0]


def attack_sweep(settings: Tradeoff, defenses: Sequence[str], attacks: Sequence[str]) -> Sweep:
    """The sweep that attacks some defences.

    Args:
      settings: of the comparison.
      defenses: texts, strengths filled in.
      attacks: texts.

    Returns:
      The sweep's settings.
    """
    return Sweep(
        datasets=(settings.dataset,),
        models=(settings.model,),
        train_steps=(settings.attack_step,),
        defenses=tuple(defenses),
        attacks=tuple(attacks),
        batch_sizes=(settings.batch_size,),
        seeds=settings.seeds,
        num_victims=settings.num_victims,
        labels=settings.labels,
        data_dir=settings.data_dir,
    )


def from_mapping(settings: Mapping[str, Any]) -> Tradeoff:
    """A comparison from a mapping, as TOML and JSON give it.

    Args:
      settings: by the names of `Tradeoff`; a list may be one value.

    Returns:
      The settings.

    Raises:
      ValueError: an unknown name, with the nearest known one; or what `Tradeoff` refuses.
    """
    values = with_tuples(settings, Tradeoff, ("defenses", "attacks", "seeds", "levels"))
    if "defenses" in values:
        values["defenses"] = tuple(families.read(entry) for entry in values["defenses"])
    return Tradeoff(**values)


def from_toml(path: pathlib.Path | str) -> Tradeoff:
    """A comparison from a TOML file.

    Args:
      path: the file.

    Returns:
      The settings.

    Raises:
      ValueError: no such file, no TOML, or what `from_mapping` refuses; it names the file.
    """
    return read_toml(path, from_mapping)


def as_mapping(settings: Tradeoff) -> dict[str, Any]:
    """The settings as JSON holds them, names in order; `from_mapping` reads them back."""
    return json.loads(json.dumps(dataclasses.asdict(settings), sort_keys=True))


PRESETS = {
    "digits": Tradeoff(
        defenses=tuple(
            FAMILIES[name]
            for name in (
                "gaussian_noise",
                "dp_sgd",
                "clip_per_sample",
                "magnitude_prune",
                "gradient_dropout",
                "soteria",
                "sign_compress",
            )
        ),
        attacks=("bayes(num_steps=300)", "inverting_gradients(num_steps=300)", "bias_trick"),
        clients=16,
        batch_size=1,
        steps=200,
        optimizer="adam(0.01)",
    ),
}
"""Comparisons that come with the package, by name."""
