"""Families of defences: a defence as text, with its strength left blank, and how far that goes."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from invjax import calls

BLANK = "*"
DIGITS = 4
"""Significant digits of a strength, so that its text is exactly the number that was measured."""

Scale = Literal["linear", "log", "rest"]
Strength = float | int | None


@dataclasses.dataclass(frozen=True)
class Family:
    """A defence whose strength varies.

    Attributes:
      defense: its text with `*` for the strength, `gaussian_noise(*)`; without one it is a single point.
      weak: the strength that costs least. Whole numbers at both ends make whole strengths, each of which
        is compiled on its own; floats share one compilation.
      strong: the strength that costs most; it may be the smaller number (bits, a clipping norm).
      scale: how strengths are spaced: evenly (`linear`), by their logarithm (`log`), or by that of what
        is left of 1 (`rest`: shares that are pruned or dropped).

    Raises:
      ValueError: a text that cannot be read, ends that do not suit the scale.
    """

    defense: str
    weak: Strength = None
    strong: Strength = None
    scale: Scale = "log"

    def __post_init__(self):
        """Check what can be checked without a model."""
        blanks = self.defense.count(BLANK)
        ends = (self.weak, self.strong)
        if blanks != (0 if ends == (None, None) else 1):
            raise ValueError(
                f"The defense {self.defense!r} needs one {BLANK!r} for its strength, with weak and "
                f"strong, or none of the three; got weak={self.weak!r}, strong={self.strong!r}."
            )
        calls.parse(self.defense.replace(BLANK, "0.5"), "defense")
        if not blanks:
            return
        if self.scale not in ("linear", "log", "rest"):
            raise ValueError(
                f"{self.defense}: scale must be 'linear', 'log' or 'rest', got {self.scale!r}."
            )
        kinds = {type(end) for end in ends}
        weak, strong = self.weak, self.strong
        numbers = weak is not None and strong is not None and kinds <= {int, float}
        if not numbers or weak == strong or not math.isfinite(weak - strong):
            raise ValueError(
                f"{self.defense}: weak and strong must be two finite numbers, got {weak!r} and "
                f"{strong!r}."
            )
        if len(kinds) == 2:
            object.__setattr__(self, "weak", float(weak))
            object.__setattr__(self, "strong", float(strong))
        low, high = sorted((float(weak), float(strong)))
        whole = kinds == {int}
        if low <= 0 and (self.scale == "log" or not whole):
            raise ValueError(f"{self.defense}: strengths must be positive, got {low:g}.")
        if self.scale == "rest" and (whole or high >= 1):
            raise ValueError(
                f"{self.defense}: scale 'rest' needs strengths in (0, 1), got {high:g}."
            )


FAMILIES = {
    family.defense.split("(")[0]: family
    for family in (
        Family("activation_count_pruning(drop=*)", 0.01, 0.999, "rest"),
        Family("ats('3-1-7+43-18-18')"),
        Family("clip_per_sample(*)", 100.0, 1e-3),
        Family("dp_sgd(1.0, *)", 0.01, 30.0),
        Family("gaussian_noise(*)", 1e-4, 10.0),
        Family("global_clip(*)", 100.0, 1e-3),
        Family("gradient_dropout(*)", 0.1, 0.9995, "rest"),
        Family("instahide(*)", 2, 6, "linear"),
        Family("laplace_noise(*)", 1e-4, 10.0),
        Family("magnitude_prune(*)", 0.1, 0.9995, "rest"),
        Family("mask_exclusive_rows(*)", 1.0, 0.05, "linear"),
        Family("mixup(*)", 0.02, 20.0),
        Family("optimal_clipped_noise(1.0, *)", 1e-4, 10.0),
        Family("optimal_noise(*)", 1e-4, 10.0),
        Family("optimal_pruning(*)", 0.1, 0.9995, "rest"),
        Family("optimal_rounding(*)", 1e-4, 10.0),
        Family("quantize(*)", 8, 2, "linear"),
        Family("random_mask(*)", 0.1, 0.9995, "rest"),
        Family("reduce_exclusivity(max_steps=100)"),
        Family("sign_compress"),
        Family("soteria(*)", 0.1, 1.0, "linear"),
    )
}
"""What a defence's bare name stands for."""


def read(entry: Any) -> Family:
    """A family from a settings file.

    Args:
      entry: the bare name of a known defence; a text without a blank, which is a single point; or a
        mapping with the names of `Family`.

    Returns:
      The family.

    Raises:
      ValueError: something else, an unknown name (with the nearest known one) or setting.
    """
    if isinstance(entry, Family):
        return entry
    if isinstance(entry, str):
        if entry in FAMILIES:
            return FAMILIES[entry]
        if entry.isidentifier() and entry != "none":
            hint = calls.nearest(entry, FAMILIES)
            raise ValueError(
                f"Unknown defense {entry!r}: known by name are {', '.join(sorted(FAMILIES))}.{hint}"
            )
        return Family(entry)
    if isinstance(entry, Mapping):
        known = {field.name for field in dataclasses.fields(Family)}
        if unknown := set(entry) - known:
            raise ValueError(
                f"Unknown setting {min(unknown)!r} of a defense: known are {', '.join(sorted(known))}."
            )
        if "defense" in entry:
            return Family(**entry)
    raise ValueError(
        f"A defense must be a name, a text, or a table with defense, weak and strong, got {entry!r}."
    )


def is_whole(family: Family) -> bool:
    """Whether its strengths are whole numbers, of which each is compiled on its own."""
    return type(family.weak) is int


def at(family: Family, strength: Strength) -> str:
    """The text of the defence at a strength; `None` of a single point."""
    return family.defense if strength is None else family.defense.replace(BLANK, repr(strength))


def numbers(family: Family, strengths: Sequence[Strength]) -> np.ndarray:
    """What varies without another compilation, `[K, n]`: every float of the text, no whole number."""
    rows = [calls.numbers(calls.parse(at(family, one), "defense")) for one in strengths]
    return np.asarray(rows, np.float32)


def position(family: Family, strength: Strength) -> float:
    """Where a strength stands between weak, 0, and strong, 1, on the family's scale."""
    if strength is None or family.weak is None or family.strong is None:
        return 0.0
    first, last, here = (
        _unrolled(family, float(one)) for one in (family.weak, family.strong, strength)
    )
    return (here - first) / (last - first)


def strength(family: Family, position: float) -> Strength:
    """The strength at a position, rounded to a few digits; the inverse of `position` but for that."""
    if family.weak is None or family.strong is None:
        return None
    if position in (0, 1):
        return family.strong if position else family.weak
    first, last = (_unrolled(family, float(one)) for one in (family.weak, family.strong))
    value = first + (last - first) * position
    if family.scale == "rest":
        # What is left has the digits: 0.99912 is not 0.9991.
        return round(1 - float(f"{math.exp(-value):.{DIGITS}g}"), 12)
    value = math.exp(value) if family.scale == "log" else value
    return round(value) if is_whole(family) else float(f"{value:.{DIGITS}g}")


def _unrolled(family: Family, strength: float) -> float:
    """A strength on the scale on which they are spaced evenly."""
    if family.scale == "linear":
        return strength
    return math.log(strength) if family.scale == "log" else -math.log1p(-strength)


def spaced(family: Family, count: int) -> list[Strength]:
    """Evenly spaced strengths on the family's scale, from weak to strong.

    Args:
      family: of the defence.
      count: how many, at least 2.

    Returns:
      Them; fewer where there are not as many.
    """
    found = [strength(family, place) for place in np.linspace(0, 1, count).tolist()]
    return list(dict.fromkeys(found))
