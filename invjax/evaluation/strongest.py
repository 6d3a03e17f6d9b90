"""From the rows of a sweep to the strongest attack on a defence, with error bars over seeds."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

MAX_PSNR = 100.0
"""Decibels that an exact reconstruction counts as in a mean."""


class Errors(NamedTuple):
    """Errors of every attack on every defence.

    Attributes:
      by_defense: defence, then attack, to `mse` (squared raw units) and `psnr` (decibels), `[S]` each:
        means over the samples of a seed.
      guess: `mse` and `psnr` of the data set's mean image, which saw no gradient; empty without rows.
      failed: `defense`, `attack` and `reason` of those that raised for some victims.
      failed_jobs: how many victims.
    """

    by_defense: dict[str, dict[str, dict[str, np.ndarray]]]
    guess: dict[str, float]
    failed: list[dict[str, str]]
    failed_jobs: int


def errors(rows: Iterable[Mapping[str, Any]], data_range: float) -> Errors:
    """Errors of every attack on every defence of a sweep.

    A sample that an attack itself knows it has not found, or that did not stay finite, counts as the mean
    image, which anybody can guess; an attack is not praised for what it left out. An attack that
    raised for any victim has no error at all.

    Args:
      rows: of the sweep: `defense`, `attack`, `seed`, `status`, `mse`, `psnr`, `baseline_mean_psnr`.
      data_range: of the data set, in its unit, that the decibels refer to.

    Returns:
      The errors.
    """
    groups: dict[tuple[str, str, int], list[tuple[float, float]]] = {}
    reasons: dict[tuple[str, str], str] = {}
    guesses: list[tuple[float, float]] = []
    victims = set()
    for row in rows:
        pair = row["defense"], row["attack"]
        if row["status"] == "failed":
            reasons[pair] = row["reason"]
            victims.add((*pair, row["seed"], row["victim"]))
            continue
        guess = row["baseline_mean_psnr"]
        guesses.append((data_range**2 * 10 ** (-guess / 10), guess))
        came_back = row["status"] == "ok"
        error = (row["mse"], min(row["psnr"], MAX_PSNR)) if came_back else guesses[-1]
        groups.setdefault((*pair, row["seed"]), []).append(error)
    seeds: dict[tuple[str, str], list[np.ndarray]] = {}
    for (defense, attack, _), samples in sorted(groups.items()):
        if (defense, attack) not in reasons:
            seeds.setdefault((defense, attack), []).append(np.mean(samples, axis=0))
    arrays: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for (defense, attack), means in seeds.items():
        mse, psnr = np.transpose(means)
        arrays.setdefault(defense, {})[attack] = {"mse": mse, "psnr": psnr}
    mean = np.mean(guesses, axis=0).tolist() if guesses else ()
    guess = dict(zip(("mse", "psnr"), mean, strict=False))
    failed = [{"defense": d, "attack": a, "reason": why} for (d, a), why in reasons.items()]
    return Errors(arrays, guess, failed, len(victims))


def mean_error(values: Sequence[float] | np.ndarray) -> tuple[float, float | None]:
    """Mean over seeds and its standard error, which one seed does not tell."""
    values = np.asarray(values, float)
    if values.size < 2 or not np.isfinite(values).all():
        return float(values.mean()), None
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(values.size))


def strongest(
    by_attack: Mapping[str, np.ndarray], reduce: Literal["min", "max"] = "min"
) -> tuple[str, float, float | None]:
    """The attack that errs least over all seeds together, or most.

    The least of several noisy means lies below the least of the true ones: the more attacks are nearly as
    good, the more. The error bar is the jackknife's over seeds, in which another attack may win without
    one of the seeds, so that it holds the noise of the choice.

    Args:
      by_attack: `[S]` errors a seed, by attack; at least one.
      reduce: `min` or `max`.

    Returns:
      The attack, its mean error, and the standard error; `None` for one seed.
    """
    names = list(by_attack)
    values = np.array([by_attack[name] for name in names], float)
    pick, index = (np.min, np.argmin) if reduce == "min" else (np.max, np.argmax)
    means = values.mean(axis=1)
    best = int(index(means))
    count = values.shape[1]
    if count < 2:
        return names[best], float(means[best]), None
    without = pick((values.sum(axis=1, keepdims=True) - values) / (count - 1), axis=0)
    error = np.sqrt((count - 1) / count * np.square(without - without.mean()).sum())
    return names[best], float(means[best]), float(error)


def summary(
    found: Mapping[str, Mapping[str, np.ndarray]],
    attacks: Sequence[str],
    reduce: Literal["min", "max"],
) -> dict[str, Any]:
    """The part of a table's row that tells of attacks.

    Args:
      found: `mse` and `psnr`, `[S]` each, by attack.
      attacks: of the whole comparison, a column each.
      reduce: which attack stands for all.

    Returns:
      `attack`, `mse`, `mse_error`, `psnr`, `psnr_error` of the strongest, and `mse of ATTACK` of each;
      `None` where there is none.
    """
    names = ("attack", "mse", "mse_error", "psnr", "psnr_error")
    row: dict[str, Any] = dict.fromkeys(names) | {"reduce": reduce}
    if found:
        name, mse, error = strongest({a: one["mse"] for a, one in found.items()}, reduce)
        row |= {"attack": name, "mse": mse, "mse_error": error}
        row["psnr"], row["psnr_error"] = mean_error(found[name]["psnr"])
    for attack in attacks:
        row[f"mse of {attack}"] = float(found[attack]["mse"].mean()) if attack in found else None
    return row
