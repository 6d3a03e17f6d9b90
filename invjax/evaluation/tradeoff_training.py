"""Training under families of defences: what every strength costs, and which cost the same."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from invjax import calls, datasets, defenses
from invjax.evaluation import calibrate, families, jobs, utility
from invjax.evaluation.families import Family, Strength
from invjax.evaluation.tradeoff_settings import Tradeoff, make_optimizer

UNDEFENDED = Family("none")


def samples(settings: Tradeoff) -> utility.Samples:
    """Training and held-out samples: the data set's own parts, or a fifth held out where it has none."""
    training, held_out = (
        datasets.load(settings.dataset, settings.data_dir, part) for part in ("train", "test")
    )
    same = training.inputs.shape == held_out.inputs.shape and np.array_equal(
        training.inputs, held_out.inputs
    )
    return utility.samples(training, None if same else held_out, settings.seeds)


def train_family(
    settings: Tradeoff,
    family: Family,
    undefended: Sequence[Mapping[str, Any]] = (),
) -> list[dict[str, Any]]:
    """Train under a family's strengths: an even grid of them, and where the levels are crossed.

    Args:
      settings: of the comparison.
      family: of defences.
      undefended: the rows of the twin that every loss of utility is measured against; of the twin
        itself, none.

    Returns:
      A dict a strength and seed: `strength`, `seed`, `accuracy`, `loss`, and the `utility_loss`.
    """
    data = samples(settings)
    dataset = jobs.load(settings.dataset, settings.data_dir)
    model = jobs.build(settings.model, dataset.num_classes)
    twins: dict[int, Mapping[str, Any]] = {row["seed"]: row for row in undefended}
    rows: list[dict[str, Any]] = []

    def trainer(strength: Strength):
        parsed = calls.parse(families.at(family, strength), "defense")
        count = len(calls.numbers(parsed))
        return utility.trainer(
            model,
            data,
            lambda numbers: defenses.parse(
                calls.with_numbers(parsed, [numbers[i] for i in range(count)]), model
            ),
            seeds=settings.seeds,
            steps=settings.steps,
            clients=settings.clients,
            batch_size=settings.batch_size,
            optimizer=make_optimizer(settings.optimizer),
            evaluated=settings.evaluated,
        )

    compiled = None if family.weak is None or families.is_whole(family) else trainer(family.weak)

    def measure(strengths: list[Strength]) -> dict[Strength, float]:
        numbers = families.numbers(family, strengths)
        if compiled is not None:
            # Always as many at once, which share one compilation.
            padded = np.concatenate([numbers, numbers[:1].repeat(settings.grid - len(numbers), 0)])
            found = compiled(padded)
        else:
            parts = [trainer(one)(row[None]) for one, row in zip(strengths, numbers, strict=True)]
            found = utility.Trained(
                *(np.concatenate(column) for column in zip(*parts, strict=True))
            )
        new = []
        for place, strength in enumerate(strengths):
            for lane, seed in enumerate(settings.seeds):
                row: dict[str, Any] = {"strength": strength, "seed": seed}
                row["accuracy"] = float(found.accuracy[place, lane])
                row["loss"] = float(found.loss[place, lane])
                new.append(row | {"utility_loss": _lost(settings, row, twins.get(seed, row))})
        rows.extend(new)
        return mean_lost(new)

    calibrate.calibrate(
        measure,
        family,
        settings.levels if undefended else (),
        lambda level: settings.tolerance * level,
        count=settings.grid,
        rounds=settings.rounds,
    )
    return rows


def _lost(settings: Tradeoff, row: Mapping[str, float], twin: Mapping[str, float]) -> float:
    if settings.utility == "accuracy":
        return twin["accuracy"] - row["accuracy"]
    return row["loss"] - twin["loss"]


def mean_lost(rows: Sequence[Mapping[str, Any]]) -> dict[Strength, float]:
    """Utility lost by strength, the mean over seeds."""
    lost: dict[Strength, list[float]] = {}
    for row in rows:
        lost.setdefault(row["strength"], []).append(row["utility_loss"])
    return {strength: float(np.mean(values)) for strength, values in lost.items()}


def matches(
    settings: Tradeoff, family: Family, rows: Sequence[Mapping[str, Any]]
) -> dict[float, calibrate.Match]:
    """The strength that stands for a family at every level."""
    measured = mean_lost(rows)
    return {
        level: calibrate.match(family, measured, level, settings.tolerance * level)
        for level in settings.levels
    }


def attacked_strengths(
    settings: Tradeoff, family: Family, rows: Sequence[Mapping[str, Any]]
) -> list[Strength]:
    """The grid's strengths and those that stand for the levels, from weak to strong."""
    chosen = families.spaced(family, settings.grid)
    chosen += [match.strength for match in matches(settings, family, rows).values()]
    return sorted(dict.fromkeys(chosen), key=lambda one: families.position(family, one))
