"""Figures of a comparison at equal utility, as PNG bytes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from invjax.report import figures
from invjax.report.sweep_figures import BASELINE, COLOURS, MARKERS, shorten

FLOOR = 1e-5
"""Share of the squared range below which errors are drawn as this: the eye sees no difference."""

SHOWN = 8
"""Samples of a row of reconstructions."""

FAINT = "#cfcfcf"


def pareto(
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    undefended: Mapping[str, Any],
    guess: float,
    levels: Sequence[float],
    axis_name: str,
    percent: bool,
    data_range: float = 1.0,
    error_name: str = "mean squared error",
) -> bytes:
    """Reconstruction error against lost utility, a panel a family, the other families faint behind it.

    Args:
      curves: points by family, from weak to strong: `utility_loss`, `mse` and their `_error`, as
        `evaluation.tradeoff.Result` has them; points without one of the first two are left out.
      undefended: the point of no defence.
      guess: mean squared error of the mean image, drawn as a dashed line.
      levels: of utility that was lost, one at least, positive; drawn as vertical lines.
      axis_name: what was lost.
      percent: whether it is a share, to be written in percent.
      data_range: highest less lowest value of the data, whose square is the unit of `FLOOR`.
      error_name: whose error it is.

    Returns:
      A PNG file.
    """
    names = list(curves)
    columns = min(len(names), 3)
    rows = -(-len(names) // columns)
    size = (3.0 * columns + 0.6, 2.35 * rows + 0.8)
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    floor = FLOOR * data_range**2
    lines = {name: _line(points, floor) for name, points in curves.items()}
    star = _line([{**undefended, "utility_loss": 0.0}], floor)
    for index, axis in enumerate(axes.flat):
        if index >= len(names):
            axis.set_axis_off()
            continue
        for line in lines.values():
            axis.plot(line[0], line[1], color=FAINT, linewidth=0.8, zorder=1)
        for level in levels:
            axis.axvline(level, color=BASELINE, linewidth=0.6, linestyle=":", zorder=0)
        axis.axhline(guess, color=BASELINE, linewidth=1, linestyle="--", zorder=0)
        axis.plot(star[0], star[1], "*", color="black", markersize=9, clip_on=False, zorder=3)
        x, y, x_error, y_error = lines[names[index]]
        # An error bar down to nothing would leave a logarithmic axis.
        down = np.minimum(y_error, y - np.minimum(y, floor))
        axis.errorbar(
            x,
            y,
            xerr=x_error,
            yerr=[down, y_error],
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=4,
            linewidth=1.4,
            elinewidth=0.8,
            capsize=2,
            zorder=2,
        )
        axis.set_title(" " + shorten(names[index], 34).replace("$", r"\$"), fontsize=9)
        axis.grid(alpha=0.2)
        axis.tick_params(labelsize=8)
    _scales(axes[0, 0], lines, levels, floor, guess, percent)
    # The columns whose last panel is empty have their labels on the panel above.
    for column in range(columns):
        last = max(row for row in range(rows) if row * columns + column < len(names))
        axes[last, column].tick_params(labelbottom=True)
    figure.supxlabel(axis_name, fontsize=10)
    figure.supylabel(error_name, fontsize=10)
    return figures.png(figure)


def _line(points: Sequence[Mapping[str, Any]], floor: float) -> np.ndarray:
    """`[4, P]`: lost utility, error, and the error bars of both, 0 where unknown."""
    values = [
        (
            point["utility_loss"],
            max(point["mse"], floor),
            point.get("utility_loss_error") or 0.0,
            point.get("mse_error") or 0.0,
        )
        for point in points
        if _known(point.get("utility_loss")) and _known(point.get("mse"))
    ]
    return np.array(values, float).reshape(-1, 4).T


def _known(value: float | None) -> bool:
    return value is not None and bool(np.isfinite(value))


def _scales(axis, lines, levels, floor, guess, percent) -> None:
    lost = np.concatenate([line[0] for line in lines.values()] + [np.array([0.0])])
    finest = min(levels)
    axis.set_xscale("symlog", linthresh=finest, linscale=0.6)
    axis.set_xlim(min(lost.min(), 0) - 0.35 * finest, max(lost.max(), max(levels)) * 1.3)
    ticks = [0.0, *levels]
    # Whole decades above the levels, as far as the curves go.
    ticks += [10.0**power for power in range(-4, 4) if 2 * max(levels) < 10.0**power < lost.max()]
    if lost.max() > 3 * ticks[-1]:
        ticks.append(float(f"{lost.max():.1g}"))
    axis.set_xticks(ticks)
    text = (lambda value, _: f"{100 * value:g}%") if percent else (lambda value, _: f"{value:g}")
    axis.xaxis.set_major_formatter(FuncFormatter(text))
    axis.xaxis.set_minor_locator(NullLocator())
    highest = max([guess, *(line[1].max() for line in lines.values() if line.size)])
    axis.set_yscale("log")
    axis.set_ylim(floor * 0.6, highest * 3)


def reconstructions(
    truth: np.ndarray,
    rows: Mapping[str, np.ndarray],
    input_range: tuple[float, float],
) -> bytes:
    """The same private samples behind every defence, as the strongest attack gives them back.

    Args:
      truth: `[N, H, W, C]` or `[N, d]`; the first `SHOWN` are drawn.
      rows: reconstructions of the same shape, by caption.
      input_range: what is drawn black and white.

    Returns:
      A PNG file.
    """
    number = min(len(truth), SHOWN)
    every = {"truth": truth, **rows}
    figure = Figure(figsize=(0.72 * number + 3.2, 0.74 * len(every)), dpi=130, layout="constrained")
    axes = figure.subplots(len(every), number, squeeze=False)
    for line, (caption, samples) in zip(axes, every.items(), strict=True):
        for axis, sample in zip(line, samples, strict=False):
            axis.set_xticks([])
            axis.set_yticks([])
            figures._draw(axis, sample, input_range)
        plain = " " + caption.replace("$", r"\$")
        line[0].set_ylabel(plain, fontsize=8, rotation=0, ha="right", va="center")
    return figures.png(figure)
