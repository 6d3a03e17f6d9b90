"""Find the strength of a defence that costs a given utility, from few noisy measurements."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy import optimize

from invjax.evaluation import families
from invjax.evaluation.families import Family, Strength

Status = Literal["matched", "nearest", "not reached", "already above"]


class Match(NamedTuple):
    """The strength that stands for a family at a level.

    Attributes:
      strength: a measured one.
      status: `matched` within the tolerance; `nearest`, where no measured strength is as near (whole
        strengths, utility that jumps); `not reached`, the strongest, which costs less than the level;
        `already above`, the weakest, which costs more.
    """

    strength: Strength
    status: Status


def match(
    family: Family, measured: Mapping[Strength, float], level: float, tolerance: float
) -> Match:
    """Choose among the measured strengths.

    A strength counts as near to a level if what it was measured to cost and what the monotone fit to
    all measurements says are both near: a lucky measurement far from the crossing is not taken. Of
    several the nearest is chosen, so that its measured cost is a little nearer to the level than a fresh
    measurement would be.

    Args:
      family: of the defence.
      measured: utility lost by strength; what is not finite counts as very much.
      level: of utility to lose.
      tolerance: how near is near enough, in the unit of the level.

    Returns:
      The match.
    """
    strengths, lost, fit = _fitted(family, measured, level)
    gap = np.maximum(np.abs(fit - level), np.abs(lost - level))
    best = int(np.argmin(gap))
    if gap[best] <= tolerance:
        return Match(strengths[best], "matched")
    if fit[-1] < level:
        return Match(strengths[-1], "not reached")
    if fit[0] > level:
        return Match(strengths[0], "already above")
    return Match(strengths[best], "nearest")


def refine(
    family: Family,
    measured: Mapping[Strength, float],
    levels: Sequence[float],
    tolerance: Callable[[float], float],
    count: int,
) -> list[Strength]:
    """Strengths to measure next: inside the brackets of the levels that are not matched yet.

    Args:
      family: of the defence.
      measured: utility lost by strength.
      levels: of utility to lose.
      tolerance: of a level.
      count: how many at most.

    Returns:
      New strengths, from weak to strong; none where all is matched or nothing lies between.
    """
    pending = [
        level
        for level in levels
        if match(family, measured, level, tolerance(level)).status == "nearest"
    ]
    found = []
    for level in pending:
        strengths, _, fit = _fitted(family, measured, level)
        after = int(np.clip(np.searchsorted(fit, level), 1, len(fit) - 1))
        low, high = (families.position(family, one) for one in strengths[after - 1 : after + 1])
        inner = np.linspace(low, high, 2 + max(1, count // len(pending)))[1:-1]
        found += [families.strength(family, place) for place in inner.tolist()]
    new = [one for one in dict.fromkeys(found) if one not in measured][:count]
    return sorted(new, key=lambda one: families.position(family, one))


def calibrate(
    measure: Callable[[list[Strength]], Mapping[Strength, float]],
    family: Family,
    levels: Sequence[float],
    tolerance: Callable[[float], float],
    *,
    count: int,
    rounds: int,
) -> dict[Strength, float]:
    """Measure an even grid of strengths, then ever closer to where each level is crossed.

    Args:
      measure: utility lost by strength, of `count` strengths or fewer.
      family: of the defence.
      levels: of utility to lose.
      tolerance: of a level.
      count: strengths of a round.
      rounds: after the grid, at most.

    Returns:
      Utility lost by every measured strength; `match` reads the levels off it.
    """
    measured = dict(measure(families.spaced(family, count)))
    for _ in range(rounds):
        new = refine(family, measured, levels, tolerance, count)
        if not new:
            break
        measured |= measure(new)
    return measured


def _fitted(family, measured, level):
    """Strengths from weak to strong, what they cost, and the nearest costs that never fall."""
    strengths = sorted(measured, key=lambda one: families.position(family, one))
    lost = np.array([measured[one] for one in strengths], float)
    # A training that diverged must not drag its neighbours along.
    lost = np.clip(np.nan_to_num(lost, nan=np.inf), None, 2 * abs(level) + 1)
    return strengths, lost, optimize.isotonic_regression(lost).x
