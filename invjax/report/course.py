"""A figure of attacks over the course of training."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from invjax.report.figures import png
from invjax.report.sweep_figures import column, mean_error

MOST = 150.0
"""Decibels shown at most: a closed form may be exact, which is infinitely many."""


def course_figure(rows: Sequence[dict[str, Any]], value: str = "psnr") -> bytes:
    """PSNR against the training step, a curve an attack, with the model's accuracy below.

    Args:
      rows: of `evaluation.course.attack_over_training`.
      value: the column on the axis: `psnr` is against the private samples, `prepared_psnr` against
        what a defence on inputs made of them.

    Returns:
      A PNG file. Bars are standard errors of the mean over samples; one sample has none. Samples whose
      PSNR is no number are left out.
    """
    figure = Figure(figsize=(6.4, 4.4), dpi=130, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    for attack in dict.fromkeys(row["attack"] for row in rows):
        mine = [row for row in rows if row["attack"] == attack]
        steps = sorted({row["step"] for row in mine})
        groups = (column((row for row in mine if row["step"] == step), value) for step in steps)
        # Where not even that is finite, nothing is drawn.
        found = np.array([mean_error(np.minimum(group, MOST)) for group in groups])
        means, errors = np.where(np.isfinite(found), found, np.nan).T
        above.errorbar(steps, means, errors, marker="o", markersize=3, capsize=2, label=attack)
    accuracy = {row["step"]: row["accuracy"] for row in rows}
    below.plot(list(accuracy), list(accuracy.values()), color="0.4")
    above.set_ylabel("PSNR, dB")
    above.legend(frameon=False, fontsize=9)
    below.set_ylabel("accuracy")
    below.set_ylim(0, 1)
    below.set_xlabel("training step")
    below.set_xscale("symlog", linthresh=1)
    below.set_xlim(left=0)
    for axis in (above, below):
        axis.grid(alpha=0.3)
    return png(figure)
