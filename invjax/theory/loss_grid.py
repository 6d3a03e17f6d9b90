"""The privacy loss of a step of DP-SGD on a grid, its sum over steps, and what both may be off by.

What `privacy_loss` is built on. A step's outcome is normal noise, shifted by 1 where the record is
taken; its loss is the log of the ratio of its laws with and without the record.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy.special import logsumexp, ndtr

EPS = float(np.finfo(float).eps)
CDF_ERROR = 2e-13
"""Relative error allowed for a tail of the normal distribution, several times that of SciPy."""
TAIL = 1e-13
"""Mass of the summed loss that may lie on either side of the window."""
REACH = 9.5
"""Deviations of the noise beyond which a step's loss counts as infinite; a mass of 1e-21."""
LOST = 1e-9
"""Mass above the window that makes it wider."""
MAX_BINS = 2**20
"""Most points of a grid whose number is not asked for."""
MAX_WIDENINGS = 12
"""How often bins may become twice as wide."""


class Law(NamedTuple):
    """One step: the noise multiplier, and the rate at which it takes the record."""

    noise: float
    rate: float


class Window(NamedTuple):
    """Where the summed loss lies but for `TAIL` on either side, its deviation, the upper side's tilt.

    And the extent of a step's loss. Where all of that is 0, the record is taken too rarely for float64.
    """

    low: float
    high: float
    deviation: float
    tilt: float
    extent: float


class Grid(NamedTuple):
    """Where the summed loss lives: `size` points from `start * width` on, for so many steps."""

    width: float
    start: int
    size: int
    steps: int


class Step(NamedTuple):
    """A step's loss on the grid: masses from the point `first` on.

    Attributes:
      first: number of the first point.
      masses: with the record.
      error: that the masses may be off by, in all.
      misplaced: how far a point may be off.
    """

    first: int
    masses: np.ndarray
    error: float
    misplaced: float


def step_loss(points: np.ndarray, law: Law) -> np.ndarray:
    """Log of the ratio of the laws of one step, with and without the record, at its outcomes."""
    with np.errstate(divide="ignore"):
        absent = np.log1p(-law.rate)
    return np.logaddexp(absent, math.log(law.rate) + (points - 0.5) / law.noise**2)


def outcomes(losses: np.ndarray, law: Law) -> np.ndarray:
    """The inverse of `step_loss`; minus infinity below its range."""
    with np.errstate(divide="ignore", over="ignore"):
        absent = np.log1p(-law.rate)
        share = np.maximum(-np.expm1(absent - losses), 0.0)
        return law.noise**2 * (losses - math.log(law.rate) + np.log(share)) + 0.5


def make_window(law: Law, steps: int) -> Window:
    """Where the sum of so many steps lies, by Chernoff's bounds."""
    around = np.linspace(-REACH, REACH, 2001) * law.noise
    points = np.unique(np.concatenate((around, 1 + around)))
    losses = step_loss(points, law)
    weights = np.log(np.gradient(points)) - ((points / law.noise) ** 2) / 2
    weights -= logsumexp(weights)
    center = np.exp(weights) @ losses
    deviation = math.sqrt(np.exp(weights) @ (losses - center) ** 2)
    extent = losses[-1] - losses[0]
    if not deviation > 0:
        return Window(0.0, 0.0, 0.0, 0.0, 0.0)
    # From what a single large loss calls for, of a record that is hardly ever taken, to a normal sum.
    tilts = np.geomspace(min(1e-4 / deviation, 0.1 / extent), 1e3 / deviation, 151)

    def edges(log_weights: np.ndarray, sign: int) -> np.ndarray:
        """Chernoff's bounds, one a tilt."""
        tilted = log_weights + sign * tilts[:, None] * losses
        return sign * (steps * logsumexp(tilted, axis=1) - math.log(TAIL)) / tilts

    upper = edges(weights + losses - logsumexp(weights + losses), 1)
    best = upper.argmin()
    low = max(edges(weights, -1).max(), steps * losses[0])
    high = min(upper[best], steps * losses[-1])
    return Window(low, high, math.sqrt(steps) * deviation, tilts[best], extent)


def make_grid(window: Window, steps: int, num_bins: int | None) -> Grid:
    """So many points over a window, by default as many as its width asks for."""
    size = 1.04 * (window.high - window.low)
    if num_bins is None:
        # Bins spread the sum by T h^2 / 6, which matters against its own variance; atoms by h^2 / 8.
        fine = min(3e-3, math.sqrt(3e-5 * max(window.deviation, 1e-3) / steps))
        fine = max(fine, window.extent / MAX_BINS)
        num_bins = 2 ** math.ceil(np.clip(math.log2(size / fine), 12, math.log2(MAX_BINS)))
    start = math.floor(window.low * num_bins / size - 0.01 * num_bins)
    return Grid(size / num_bins, start, num_bins, steps)


def wide_grid(
    law: Law, steps: int, num_bins: int | None, window: Window
) -> tuple[Grid, Step, float]:
    """A grid that loses little, one step on it, and what it loses.

    Splits spread the sum, where a step's loss is small beside a bin most of all, and err upward: by
    more, the narrower a bin. Both may push it out of the window: then bins of twice the width.
    """

    def placed(grid: Grid) -> tuple[Step, float]:
        step = split_step(law, grid)
        return step, mass_lost(step, grid, window.tilt)

    grid = make_grid(window, steps, num_bins)
    step, lost = placed(grid)
    for _ in range(MAX_WIDENINGS):
        if lost <= LOST:
            break
        middle = (grid.start + grid.size / 2) / 2
        grid = grid._replace(width=2 * grid.width, start=math.floor(middle - grid.size / 2))
        step, lost = placed(grid)
    return grid, step, lost


def first_and_last(law: Law, grid: Grid) -> tuple[int, int, bool]:
    """Grid points around the losses of a step, and whether none is below the first."""
    low, high = step_loss(np.array([-REACH * law.noise, 1 + REACH * law.noise]), law)
    infimum = math.log1p(-law.rate) if law.rate < 1 else -math.inf
    bounded = infimum > low - grid.width
    first = math.floor((infimum if bounded else low) / grid.width)
    return first, math.ceil(high / grid.width), bounded


def bin_masses(points: np.ndarray, law: Law) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the bins between points, without and with the record; and the tails they are cut from."""

    def bins(shift: float) -> tuple[np.ndarray, np.ndarray]:
        scaled = (points - shift) / law.noise
        below, above = ndtr(scaled), ndtr(-scaled)
        right = scaled[:-1] > 0
        mass = np.where(right, above[:-1] - above[1:], below[1:] - below[:-1])
        return np.maximum(mass, 0.0), np.where(right, above[:-1], below[1:])

    (absent, tail), (present, shifted) = bins(0.0), bins(1.0)
    tails = (1 - law.rate) * tail + law.rate * shifted
    return absent, (1 - law.rate) * absent + law.rate * present, np.stack((tail, tails))


def split_step(law: Law, grid: Grid) -> Step:
    """A step's loss, the mass of every bin split between its ends such that both laws keep theirs."""
    first, last, bounded = first_and_last(law, grid)
    losses = np.arange(first, last + 1) * grid.width
    points = outcomes(losses, law)
    points[0] = -np.inf
    absent, present, tails = bin_masses(points, law)
    with np.errstate(divide="ignore"):
        scaled, tail = np.exp(losses[:-1] + np.log(np.stack((absent, tails[0]))))
    # Splits err upward, by all that the masses may be wrong: this moves the loss, and loses no mass.
    error = CDF_ERROR * (tails[1] + tail)
    split = (present - scaled + error) / -np.expm1(-grid.width)
    split = np.minimum(np.maximum(split, 0.0), present)
    if not bounded:
        split[0] = present[0]  # as the bin has no lower end
    masses = np.pad(present - split, (0, 1)) + np.pad(split, (1, 0))
    return Step(first, masses, error.sum(), misplaced(points, losses, law))


def compose(masses: np.ndarray, first: int, grid: Grid) -> np.ndarray:
    """Law of the sum of independent steps on the window; what lies outside wraps around."""
    padded = np.pad(masses, (0, -len(masses) % grid.size))
    spectrum = np.fft.rfft(padded.reshape(-1, grid.size).sum(0))
    summed = np.fft.irfft(spectrum**grid.steps, grid.size)
    return np.maximum(np.roll(summed, grid.steps * first - grid.start), 0.0)


def roundoff(masses: np.ndarray, error: float, grid: Grid) -> float:
    """By how much a sum over the composed masses may be off, those of a step being off by `error`."""
    # In the spectrum's 2-norm, an FFT errs by at most a few epsilon a stage (Higham 2002, theorem 24.2).
    stages = 16 * EPS * (math.log2(grid.size) + 2)
    spectrum = stages * math.sqrt(grid.size) * math.sqrt(np.sum(masses**2))
    return 1.01 * grid.steps * (2 * error + spectrum) + 4 * grid.size * EPS


def misplaced(points: np.ndarray, losses: np.ndarray, law: Law) -> float:
    """How far a point may be, in one step's loss, from where the grid has it: rounding of `outcomes`."""
    largest = (abs(points[np.isfinite(points)]).max() + 1) / law.noise**2 + abs(losses).max()
    return 8 * EPS * (largest - math.log(law.rate) + 1)


def mass_lost(step: Step, grid: Grid, tilt: float) -> float:
    """Mass above the window, where it wraps around: by Chernoff's bound, at this tilt or smaller ones."""
    top = grid.start + grid.size
    if grid.steps * (step.first + len(step.masses) - 1) < top:
        return 0.0
    logs = np.log(step.masses.clip(1e-300))
    losses = (step.first + np.arange(len(step.masses))) * grid.width
    exponent = 0.0
    for smaller in range(8):
        used = tilt / 2**smaller
        tilted = grid.steps * logsumexp(logs + used * losses) - used * top * grid.width
        exponent = min(exponent, float(tilted))
        if exponent < math.log(TAIL):
            break
    return math.exp(exponent)
