"""The blow-up function of DP-SGD from the distribution of its privacy loss: what `blowup` is built on.

The log of the ratio of the two laws of `blowup` is a sum of independent terms, one a step. Its distribution
is a power of one step's, on a grid, by FFT.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.signal import lfilter
from scipy.special import logsumexp, ndtr

from invjax.defenses.checks import check

EPS = float(np.finfo(float).eps)
CDF_ERROR = 2e-13
"""Relative error allowed for a tail of the normal distribution, several times that of SciPy."""
TAIL = 1e-13
"""Mass of the summed loss that may lie on either side of the window."""
REACH = 9.5
"""Deviations of the noise beyond which a step's loss counts as infinite; a mass of 1e-21."""

MAX_BINS = 2**20


class _Law(NamedTuple):
    """One step: the noise multiplier, and the rate at which it takes the record."""

    noise: float
    rate: float


class _Window(NamedTuple):
    """Where the summed loss lies but for `TAIL` on either side, its deviation, the upper side's tilt.

    And the extent of a step's loss.
    """

    low: float
    high: float
    deviation: float
    tilt: float
    extent: float


class _Grid(NamedTuple):
    """Where the summed loss lives: `size` points from `start * width` on, for so many steps."""

    width: float
    start: int
    size: int
    steps: int


def fft_blowup(
    kappa: ArrayLike,
    noise_multiplier: float,
    sampling_rate: float,
    steps: int,
    *,
    certified: bool = True,
    num_bins: int | None = None,
) -> np.ndarray:
    """Hidden inclusion: the blow-up function from the distribution of the summed privacy loss, by FFT.

    Not certified, a step's loss is rounded to the nearest point of a grid: the sum is a statistic
    like any other, its threshold tests are valid, and their power never exceeds the truth: the result
    is a bound from below, round-off allowed for.

    Certified, every bin's mass is split between its two ends such that its probabilities under both
    laws are kept, which only adds information (Doroshenko et al. 2022); ends, rather than the upper
    end alone, make the error quadratic in the width of a bin. With `H(t)` the hockey-stick divergence
    of the sum, `t kappa + H(t)` is a bound for every `t`. What is cut off, wraps around or is rounded
    is bounded in turn and added, so that the result is never below the truth.

    Args:
      kappa: as in `blowup.blowup`.
      noise_multiplier: as in `blowup.blowup`.
      sampling_rate: as in `blowup.blowup`.
      steps: as in `blowup.blowup`.
      certified: whether the result bounds the truth from above, or from below.
      num_bins: of the summed loss, in a window that holds all but 1e-13 of it; by default a power of two
        such that their width costs about 1e-6, at most 2^20.

    Returns:
      The blow-up function, of `kappa`'s shape.

    Raises:
      ValueError: an argument out of range.
    """
    kappa = checked(kappa, noise_multiplier, sampling_rate, steps)
    law = _Law(noise_multiplier, sampling_rate)
    grid, tilt = _grid(law, steps, num_bins)
    if certified:
        gamma = _upper(kappa, _hockey_sticks(law, grid, tilt))
    else:
        gamma = _lower(kappa, law, grid)
    return np.clip(gamma, kappa, 1.0)[()]


def fft_delta(
    epsilon: ArrayLike,
    noise_multiplier: float,
    sampling_rate: float,
    steps: int,
    num_bins: int | None = None,
) -> np.ndarray:
    """Delta of DP-SGD at epsilon, where a record is removed: the hockey-stick divergence of the same laws.

    Adding a record is the other direction, and rarely the worse one: `defenses.privacy_spent` has both.

    Args:
      epsilon: at least 0, of any shape.
      noise_multiplier: as in `blowup.blowup`.
      sampling_rate: as in `blowup.blowup`.
      steps: as in `blowup.blowup`.
      num_bins: as in `fft_blowup`.

    Returns:
      Delta, certified: never below the truth.

    Raises:
      ValueError: an argument out of range.
    """
    checked(0.5, noise_multiplier, sampling_rate, steps)
    epsilon = np.asarray(epsilon, float)
    if not (epsilon >= 0).all():
        raise ValueError(f"epsilon must be at least 0, got {epsilon}.")
    law = _Law(noise_multiplier, sampling_rate)
    grid, tilt = _grid(law, steps, num_bins)
    sticks = _hockey_sticks(law, grid, tilt)
    # Between its points H is linear in t = e^epsilon; below them it is 1 at most, above them decreasing.
    offset = (epsilon - sticks.shift - sticks.thresholds[0]) / grid.width
    index = np.floor(offset).clip(0, grid.size - 2).astype(int)
    share = np.expm1((offset - index).clip(0, 1) * grid.width) / math.expm1(grid.width)
    value = (1 - share) * sticks.values[index] + share * sticks.values[index + 1]
    value = np.where(offset < 0, 1.0, value)
    return np.clip(value + sticks.slack, 0.0, 1.0)[()]


def checked(
    kappa: ArrayLike, noise_multiplier: float, sampling_rate: float, steps: int
) -> np.ndarray:
    """Refuse numbers out of range.

    Args:
      kappa: probabilities.
      noise_multiplier: positive.
      sampling_rate: above 0, at most 1.
      steps: at least 1.

    Returns:
      `kappa` as an array.

    Raises:
      ValueError: a number out of range.
    """
    check("noise_multiplier", noise_multiplier, 0.0, open_low=True, open_high=True)
    check("sampling_rate", sampling_rate, 0.0, 1.0, open_low=True)
    check("steps", steps, 1)
    array = np.asarray(kappa, float)
    if not ((array >= 0) & (array <= 1)).all():
        raise ValueError(f"kappa must lie in [0, 1], got {kappa}.")
    return array


def _loss(points: np.ndarray, law: _Law) -> np.ndarray:
    """Log of the ratio of the laws of one step, with and without the record, at its outcomes."""
    with np.errstate(divide="ignore"):
        absent = np.log1p(-law.rate)
    return np.logaddexp(absent, math.log(law.rate) + (points - 0.5) / law.noise**2)


def _outcomes(losses: np.ndarray, law: _Law) -> np.ndarray:
    """The inverse of `_loss`; minus infinity below its range."""
    with np.errstate(divide="ignore", over="ignore"):
        absent = np.log1p(-law.rate)
        share = np.maximum(-np.expm1(absent - losses), 0.0)
        return law.noise**2 * (losses - math.log(law.rate) + np.log(share)) + 0.5


def _grid(law: _Law, steps: int, num_bins: int | None) -> tuple[_Grid, float]:
    """Where to compute, and the tilt at which the mass above is bounded."""
    window = _window(law, steps)
    size = 1.04 * (window.high - window.low)
    if num_bins is None:
        # Bins spread the sum by T h^2 / 6, which matters against its own variance; atoms by h^2 / 8.
        fine = min(3e-3, math.sqrt(3e-5 * max(window.deviation, 1e-3) / steps))
        fine = max(fine, window.extent / MAX_BINS)
        num_bins = 2 ** math.ceil(np.clip(math.log2(size / fine), 12, math.log2(MAX_BINS)))
    check("num_bins", num_bins, 16)
    start = math.floor(window.low * num_bins / size - 0.01 * num_bins)
    return _Grid(size / num_bins, start, num_bins, steps), window.tilt


def _window(law: _Law, steps: int) -> _Window:
    points = np.linspace(-REACH * law.noise, 1 + REACH * law.noise, 2001)
    losses = _loss(points, law)
    weights = -((points / law.noise) ** 2) / 2
    weights -= logsumexp(weights)
    center = np.exp(weights) @ losses
    deviation = math.sqrt(np.exp(weights) @ (losses - center) ** 2)
    tilts = np.logspace(-4, 3, 106) / deviation

    def edges(log_weights: np.ndarray, sign: int) -> np.ndarray:
        """Chernoff's bounds, one a tilt."""
        tilted = log_weights + sign * tilts[:, None] * losses
        return sign * (steps * logsumexp(tilted, axis=1) - math.log(TAIL)) / tilts

    upper = edges(weights + losses - logsumexp(weights + losses), 1)
    best = upper.argmin()
    low = max(edges(weights, -1).max(), steps * losses[0])
    high = min(upper[best], steps * losses[-1])
    return _Window(low, high, math.sqrt(steps) * deviation, tilts[best], losses[-1] - losses[0])


def _masses(points: np.ndarray, law: _Law) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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


def _compose(masses: np.ndarray, first: int, grid: _Grid) -> np.ndarray:
    """Law of the sum of independent steps on the window; what lies outside wraps around."""
    padded = np.pad(masses, (0, -len(masses) % grid.size))
    spectrum = np.fft.rfft(padded.reshape(-1, grid.size).sum(0))
    summed = np.fft.irfft(spectrum**grid.steps, grid.size)
    return np.maximum(np.roll(summed, grid.steps * first - grid.start), 0.0)


def _first_and_last(law: _Law, grid: _Grid) -> tuple[int, int, bool]:
    """Grid points around the losses of a step, and whether none is below the first."""
    low, high = _loss(np.array([-REACH * law.noise, 1 + REACH * law.noise]), law)
    infimum = math.log1p(-law.rate) if law.rate < 1 else -math.inf
    bounded = infimum > low - grid.width
    first = math.floor((infimum if bounded else low) / grid.width)
    return first, math.ceil(high / grid.width), bounded


def _lower(kappa: np.ndarray, law: _Law, grid: _Grid) -> np.ndarray:
    first, last, _ = _first_and_last(law, grid)
    points = _outcomes((np.arange(first, last + 2) - 0.5) * grid.width, law)
    points[0], points[-1] = -np.inf, np.inf
    absent, present, tails = _masses(points, law)

    def sums(masses: np.ndarray, tail: np.ndarray, sign: int) -> np.ndarray:
        """Of the tests from the strictest on, too large or too small by all that rounding can do."""
        above = np.cumsum(_compose(masses, first, grid)[::-1])
        above += sign * _roundoff(masses, CDF_ERROR * tail.sum(), grid)
        return np.concatenate(([0.0], above.clip(0, 1), [1.0]))

    return np.interp(kappa, sums(absent, tails[0], 1), sums(present, tails[1], -1))


class _HockeySticks(NamedTuple):
    """Of the summed loss, at every point of the grid.

    Attributes:
      thresholds: logarithms of `t`.
      values: `H(t)`, too small by `slack` at most.
      sizes: log of the mass above without the record, `-H'(t)`.
      slack: what cutting, wrapping and rounding can have hidden.
      shift: how far the loss itself may be off.
    """

    thresholds: np.ndarray
    values: np.ndarray
    sizes: np.ndarray
    slack: float
    shift: float


def _hockey_sticks(law: _Law, grid: _Grid, tilt: float) -> _HockeySticks:
    first, last, bounded = _first_and_last(law, grid)
    losses = np.arange(first, last + 1) * grid.width
    points = _outcomes(losses, law)
    points[0] = -np.inf
    absent, present, tails = _masses(points, law)
    with np.errstate(divide="ignore"):
        scaled, tail = np.exp(losses[:-1] + np.log(np.stack((absent, tails[0]))))
    # Splits err upward, by all that the masses may be wrong: this moves the loss, and loses no mass.
    error = CDF_ERROR * (tails[1] + tail)
    split = (present - scaled + error) / -np.expm1(-grid.width)
    split = np.minimum(np.maximum(split, 0.0), present)
    if not bounded:
        split[0] = present[0]  # as the bin has no lower end
    masses = np.pad(present - split, (0, 1)) + np.pad(split, (1, 0))
    summed = _compose(masses, first, grid)

    # The mass above every point, less the same discounted by the distance.
    decay = math.exp(-grid.width)
    above = np.append(np.cumsum(summed[:0:-1])[::-1], 0.0)
    discounted = lfilter([0.0, decay], [1.0, -decay], summed[::-1])[::-1]
    thresholds = (grid.start + np.arange(grid.size)) * grid.width
    with np.errstate(divide="ignore"):
        sizes = np.log(np.maximum(discounted, 0.0)) - thresholds
    slack = _roundoff(masses, error.sum(), grid) + _lost(masses, first, grid, tilt)
    shift = grid.steps * _misplaced(points, losses, law)
    return _HockeySticks(thresholds, above - discounted, sizes, slack, shift)


def _upper(kappa: np.ndarray, sticks: _HockeySticks) -> np.ndarray:
    with np.errstate(divide="ignore"):
        log_kappa = np.log(kappa) + sticks.shift
    chosen = np.searchsorted(-sticks.sizes, -log_kappa).clip(0, len(sticks.sizes) - 1)
    with np.errstate(over="ignore"):
        bound = np.exp(sticks.thresholds[chosen] + log_kappa) + sticks.values[chosen]
    return bound + sticks.slack


def _misplaced(points: np.ndarray, losses: np.ndarray, law: _Law) -> float:
    """How far a point may be, in one step's loss, from where the grid has it: rounding of `_outcomes`."""
    largest = (abs(points[np.isfinite(points)]).max() + 1) / law.noise**2 + abs(losses).max()
    return 8 * EPS * (largest - math.log(law.rate) + 1)


def _roundoff(masses: np.ndarray, error: float, grid: _Grid) -> float:
    """By how much a sum over the composed masses may be off, those of a step being off by `error`."""
    # In the spectrum's 2-norm, an FFT errs by at most a few epsilon a stage (Higham 2002, theorem 24.2).
    stages = 16 * EPS * (math.log2(grid.size) + 2)
    spectrum = stages * math.sqrt(grid.size) * math.sqrt(np.sum(masses**2))
    return 1.01 * grid.steps * (2 * error + spectrum) + 4 * grid.size * EPS


def _lost(masses: np.ndarray, first: int, grid: _Grid, tilt: float) -> float:
    """Mass that was cut from a step's upper tail, or is above the window, where it wraps around."""
    cut = 1.01 * grid.steps * ndtr(-REACH)
    top = grid.start + grid.size
    if grid.steps * (first + len(masses) - 1) < top:
        return cut
    tilted = np.log(masses.clip(1e-300)) + tilt * (first + np.arange(len(masses))) * grid.width
    return cut + math.exp(min(grid.steps * logsumexp(tilted) - tilt * top * grid.width, 0.0))
