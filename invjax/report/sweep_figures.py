"""Figures of a sweep as PNG bytes, and the numbers in them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from invjax.report import figures

MAX_LINES = 10
"""Lines of a figure at most."""

COLOURS = ("#332288", "#cc6677", "#117733", "#88ccee", "#882255")
COLOURS += ("#ddaa33", "#44aa99", "#aa4499", "#999933", "#000000")
"""Told apart by colour-blind readers (after Paul Tol's muted scheme); no grey among them."""

MARKERS = "osD^vPX<>*"
BASELINE = "#8a8a8a"

_NUMBER = re.compile(r"(?<![\w.])([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)(?![\w.])")
"""A number that stands alone: that of `clip(1e-3)` and `bayes(steps=5)`, not that of `conv2d`."""


def column(rows: Iterable[Mapping[str, Any]], name: str) -> np.ndarray:
    """One key of many rows, without those that lack it.

    Args:
      rows: `R` dicts.
      name: the key.

    Returns:
      `[K]` floats, `K <= R`; an exact reconstruction's infinite PSNR stays.
    """
    values = np.asarray([np.nan if (v := row.get(name)) is None else v for row in rows], float)
    return values[~np.isnan(values)]


def mean_error(values: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error.

    Args:
      values: `[K]`.

    Returns:
      Both in the unit of the values; NaN where there are too few, or an infinite one.
    """
    if values.size == 0:
        return np.nan, np.nan
    if values.size == 1 or not np.isfinite(values).all():
        return float(values.mean()), np.nan
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(values.size))


def is_number(value: Any) -> bool:
    """Whether a value is a real number; booleans are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def natural(value: Any) -> tuple[Any, ...]:
    """A key that sorts numbers by size, in texts too: `noise(0.001)`, `noise(0.01)`, `noise(1)`.

    Args:
      value: a number or anything that has a text.

    Returns:
      A key comparable with that of any other value; numbers come first, then `none`.
    """
    if is_number(value):
        return (0, float(value))
    parts = _NUMBER.split(str(value))
    kind = 1 if value == "none" else 2
    return (kind, *(float(part) if index % 2 else part for index, part in enumerate(parts)))


def positions(values: Sequence[Any]) -> np.ndarray | None:
    """Where an axis' values stand, if they are numbers or texts that differ in one number only.

    Args:
      values: at least one, distinct.

    Returns:
      `[V]` numbers, or `None`: the values are categories.
    """
    if all(map(is_number, values)):
        numbers = np.asarray(values, float)
    else:
        if not all(isinstance(value, str) for value in values):
            return None
        parts = [_NUMBER.split(value) for value in values]
        if any(part[::2] != parts[0][::2] for part in parts):
            return None
        found = np.asarray([[float(text) for text in part[1::2]] for part in parts])
        varying = [column for column in found.T if np.ptp(column) > 0]
        if len(varying) != 1:
            return None
        numbers = varying[0]
    # Two texts of one number (0.1 and 0.10) would be drawn over each other.
    distinct = len(np.unique(numbers)) == len(numbers)
    return numbers if distinct and np.isfinite(numbers).all() else None


def scale(numbers: np.ndarray) -> Literal["linear", "log", "symlog"]:
    """How an axis with these numbers is drawn.

    Args:
      numbers: `[V]`, finite.

    Returns:
      `log` where they span a decade or more, `symlog` where one of them is zero besides.
    """
    positive = numbers[numbers > 0]
    if numbers.min() < 0 or positive.size == 0 or positive.max() < 10 * positive.min():
        return "linear"
    return "log" if positive.size == numbers.size else "symlog"


def shorten(value: Any, limit: int = 40) -> str:
    """A value's text with its middle left out where it is long."""
    text, half = str(value), limit // 2 - 1
    return text if len(text) <= limit else f"{text[:half]}…{text[-half:]}"


def _plain(value: Any, limit: int = 40) -> str:
    # A pair of dollars would be read as mathematics, and a leading underscore hides a label.
    return " " + shorten(value, limit).replace("$", r"\$")


def curves(
    axis_name: str,
    values: Sequence[Any],
    lines: Mapping[str, np.ndarray],
    baseline: np.ndarray,
) -> bytes:
    """PSNR against the values of a swept axis.

    Args:
      axis_name: written under the axis.
      values: `[V]`, in the order in which they are drawn where they are categories.
      lines: `[2, V]` by name, `MAX_LINES` at most: mean and standard error of the PSNR in decibels.
        An infinite mean is an arrow at the top; what is else not finite is not drawn.
      baseline: `[V]` decibels, of a guess that saw no gradient; NaN where there is none.

    Returns:
      A PNG file.
    """
    numbers = positions(values)
    where = np.arange(len(values), dtype=float) if numbers is None else numbers
    order = np.argsort(where)
    width = 6.5 if numbers is not None else min(max(6.5, 0.9 * len(values)), 12)
    figure = Figure(figsize=(width, 3.6), dpi=130, layout="constrained")
    axis = figure.subplots()
    handles, labels = [], []
    for index, (name, line) in enumerate(list(lines.items())[:MAX_LINES]):
        mean, error = np.where(np.isfinite(line), line, np.nan)[:, order]
        # Categories have no order: their points stand apart and are not joined.
        aside = 0.06 * (index - (len(lines) - 1) / 2) if numbers is None else 0.0
        handles += [
            axis.errorbar(
                where[order] + aside,
                mean,
                yerr=error,
                color=COLOURS[index],
                marker=MARKERS[index],
                markersize=5,
                linestyle="none" if numbers is None else "-",
                linewidth=1.5,
                capsize=3,
            )
        ]
        exact = (where + aside)[line[0] == np.inf]
        top = np.full(exact.size, 0.97)
        high = axis.get_xaxis_transform()
        axis.plot(exact, top, "^", color=COLOURS[index], markersize=7, transform=high)
        labels += [_plain(name)]
    finite = np.where(np.isfinite(baseline), baseline, np.nan)[order]
    if np.isfinite(finite).any():
        handles += axis.plot(where[order], finite, color=BASELINE, linestyle="--", marker="_")
        labels += ["mean image (no gradient)"]
    _ticks(axis, where, values, numbers)
    ends = "" if numbers is None or is_number(values[0]) else f": {values[0]} to {values[-1]}"
    axis.set_xlabel(_plain(axis_name + ends, 90))
    axis.set_ylabel("PSNR in dB")
    axis.grid(alpha=0.25)
    if handles:
        figure.legend(handles, labels, loc="outside lower center", fontsize=8, ncols=2)
    return figures.png(figure)


def _ticks(axis, where: np.ndarray, values: Sequence[Any], numbers: np.ndarray | None) -> None:
    if numbers is None:
        long = sum(len(shorten(value)) for value in values) > 60
        turned = {"rotation": 25, "ha": "right"} if long else {}
        axis.set_xticks(where, [_plain(value) for value in values], fontsize=8, **turned)
        axis.set_xlim(-0.5, len(values) - 0.5)
        return
    kind = scale(numbers)
    if kind == "log":
        axis.set_xscale("log")
    elif kind == "symlog":
        axis.set_xscale("symlog", linthresh=numbers[numbers > 0].min())
    if len(numbers) <= 8:
        axis.set_xticks(numbers, [f"{number:.6g}" for number in numbers], fontsize=8)
        axis.xaxis.set_minor_locator(NullLocator())


def extremes(psnr: np.ndarray) -> dict[str, int]:
    """Which samples of a cell stand for all of it.

    Args:
      psnr: `[N]` decibels; samples of NaN and minus infinity are left out.

    Returns:
      Indices of the best, the median (the lower one of two) and the worst sample, in that order, as
      far as there are as many; nothing where all are left out.
    """
    psnr = np.asarray(psnr, float).reshape(-1)
    kept = np.flatnonzero(psnr > -np.inf)
    order = kept[np.argsort(psnr[kept], kind="stable")]
    if order.size == 0:
        return {}
    if order.size == 1:
        return {"only": int(order[0])}
    found = {"best": order[-1], "median": order[(order.size - 1) // 2], "worst": order[0]}
    if order.size == 2:
        del found["median"]
    return {name: int(index) for name, index in found.items()}


def extremes_figure(
    arrays: Mapping[str, np.ndarray], input_range: tuple[float, float]
) -> tuple[bytes, str] | None:
    """Best, median and worst reconstruction of a cell, with the truth above.

    Args:
      arrays: `truth` and `reconstruction`, both `[N, H, W, C]` or `[N, d]`, and `psnr`, `[N]` decibels.
      input_range: what is drawn black and white.

    Returns:
      A PNG file and its description; `None` where no sample came back.
    """
    chosen = extremes(arrays["psnr"])
    if not chosen:
        return None
    captions = [f"{name} {arrays['psnr'][index]:.1f} dB" for name, index in chosen.items()]
    # Indexing by a list copies: nothing that the figure keeps, until the garbage is collected, is a
    # view of the whole cell.
    truth, reconstruction = (
        np.asarray(arrays[side])[list(chosen.values())] for side in ("truth", "reconstruction")
    )
    return figures.comparison(truth, reconstruction, captions, input_range), ", ".join(captions)
