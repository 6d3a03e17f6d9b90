"""The blow-up function of DP-SGD from the distribution of its privacy loss: what `blowup` is built on.

The log of the ratio of the two laws of `blowup` is a sum of independent terms, one a step. Its distribution
is a power of one step's, on a grid, by FFT.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.signal import lfilter
from scipy.special import erf, ndtr

from invjax.checks import check_count, check_number
from invjax.theory.loss_grid import (
    CDF_ERROR,
    EPS,
    REACH,
    Grid,
    Law,
    Step,
    bin_masses,
    compose,
    first_and_last,
    make_grid,
    make_window,
    outcomes,
    roundoff,
    wide_grid,
)

LITTLE_NOISE, MUCH_NOISE = 0.01, 1e12
"""Noise beyond which simple bounds do: below, outcomes tell all but for 1e-500."""
LEAST_NOISE = 1e-6
"""Noise below which any finite epsilon counts as spent."""


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

    Round-off is allowed for with some 1e-10 a step, which is a mass of 0.1 for 10^9 steps: of a smaller
    `kappa` the bound from below then says no more than the simple one, and the one from above is off by
    as much.

    Neither is worse than simple bounds that hold with any noise, `ceiling` and the test whether any
    step's outcome lies above 1/2. Below a noise of 0.01, above 1e12, and where the loss has no deviation
    in float64, those two are the result; the one is exact without noise, the other very nearly.

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
    _check_bins(num_bins)
    law = Law(float(noise_multiplier), float(sampling_rate))
    simple = ceiling(kappa, *law, steps) if certified else _one_test(kappa, law, steps)
    window = make_window(law, steps) if LITTLE_NOISE <= law.noise <= MUCH_NOISE else None
    if window is None or not window.deviation > 0:
        gamma = simple
    elif certified:
        sticks = _hockey_sticks(*wide_grid(law, steps, num_bins, window))
        gamma = np.minimum(_upper(kappa, sticks), simple)
    else:
        gamma = np.maximum(_lower(kappa, law, make_grid(window, steps, num_bins)), simple)
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
    _check_bins(num_bins)
    law = Law(float(noise_multiplier), float(sampling_rate))
    most = min(float(ceiling(np.zeros(()), *law, steps)), 1.0)
    window = make_window(law, steps) if LEAST_NOISE <= law.noise <= MUCH_NOISE else None
    if window is None or not window.deviation > 0:
        return np.full(epsilon.shape, most)[()]
    grid, step, lost = wide_grid(law, steps, num_bins, window)
    sticks = _hockey_sticks(grid, step, lost)
    # Between its points H is linear in t = e^epsilon; below them it is 1 at most, above them decreasing.
    offset = (epsilon - sticks.shift - sticks.thresholds[0]) / grid.width
    index = np.floor(offset).clip(0, grid.size - 2).astype(int)
    part, width = (offset - index).clip(0, 1), grid.width
    share = np.exp((part - 1) * width) * np.expm1(-part * width) / math.expm1(-width)
    value = (1 - share) * sticks.values[index] + share * sticks.values[index + 1]
    value = np.where(offset < 0, 1.0, value)
    return np.clip(value + sticks.slack, 0.0, most)[()]


def ceiling(
    kappa: np.ndarray, noise_multiplier: float, sampling_rate: float, steps: int
) -> np.ndarray:
    """A simple bound: the least of `1 - (1 - q)^T (1 - kappa)` and `kappa` plus total variations.

    The first is reached without noise: all is known but where no step takes the record. The others
    are for much noise, `T q (2 Phi(1 / (2 sigma)) - 1)` and `2 Phi(sqrt(T) / (2 sigma)) - 1`.

    Args:
      kappa: as in `blowup.blowup`.
      noise_multiplier: as in `blowup.blowup`.
      sampling_rate: as in `blowup.blowup`.
      steps: as in `blowup.blowup`.

    Returns:
      The bound, of `kappa`'s shape, rounded up.
    """
    with np.errstate(divide="ignore", over="ignore"):
        scaled = 1 / (math.sqrt(8) * np.float64(noise_multiplier))
        known = kappa - np.expm1(steps * np.log1p(-sampling_rate)) * (1 - kappa)
        apart = np.minimum(steps * sampling_rate * erf(scaled), erf(math.sqrt(steps) * scaled))
    return np.minimum(known, kappa + apart) * (1 + 8 * EPS)


def checked(
    kappa: ArrayLike, noise_multiplier: float, sampling_rate: float, steps: int
) -> np.ndarray:
    """Refuse numbers out of range.

    Args:
      kappa: probabilities.
      noise_multiplier: positive.
      sampling_rate: above 0, at most 1.
      steps: a whole number, at least 1.

    Returns:
      `kappa` as an array.

    Raises:
      ValueError: a number out of range.
    """
    # Arrays of a device too, which `check` lets pass.
    noise, rate, count = (
        np.asarray(value) if hasattr(value, "__array__") else value
        for value in (noise_multiplier, sampling_rate, steps)
    )
    check_number("noise_multiplier", noise, 0.0, open_low=True, open_high=True)
    check_number("sampling_rate", rate, 0.0, 1.0, open_low=True)
    check_number("steps", count, 1, open_high=True)
    if count != int(count):
        raise ValueError(f"steps must be a whole number, got {steps}.")
    array = np.asarray(kappa, float)
    if not ((array >= 0) & (array <= 1)).all():
        raise ValueError(f"kappa must lie in [0, 1], got {kappa}.")
    return array


def _check_bins(num_bins: int | None) -> None:
    if num_bins is not None:
        check_count("num_bins", num_bins, 16)


def _lower(kappa: np.ndarray, law: Law, grid: Grid) -> np.ndarray:
    first, last, _ = first_and_last(law, grid)
    points = outcomes((np.arange(first, last + 2) - 0.5) * grid.width, law)
    points[0], points[-1] = -np.inf, np.inf
    absent, present, tails = bin_masses(points, law)

    def sums(masses: np.ndarray, tail: np.ndarray, sign: int) -> np.ndarray:
        """Of the tests from the strictest on, too large or too small by all that rounding can do."""
        above = np.cumsum(compose(masses, first, grid)[::-1])
        above += sign * roundoff(masses, CDF_ERROR * tail.sum(), grid)
        return np.concatenate(([0.0], above.clip(0, 1), [1.0]))

    return np.interp(kappa, sums(absent, tails[0], 1), sums(present, tails[1], -1))


def _one_test(kappa: np.ndarray, law: Law, steps: int) -> np.ndarray:
    """Whether any outcome lies above 1/2, or a coin on either side of that: rounded down."""
    with np.errstate(over="ignore", divide="ignore"):
        wrong = ndtr(-0.5 / np.float64(law.noise))
        size = -np.expm1(steps * np.log1p(-wrong))
        power = -np.expm1(steps * np.log1p(-(law.rate * (1 - wrong) + (1 - law.rate) * wrong)))
    reached = np.interp(kappa, [0.0, size, 1.0], [0.0, power, 1.0]) * (1 - 64 * EPS)
    return np.where(kappa > 0, reached, 0.0)


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


def _hockey_sticks(grid: Grid, step: Step, lost: float) -> _HockeySticks:
    summed = compose(step.masses, step.first, grid)
    # The mass above every point, less the same discounted by the distance.
    decay = math.exp(-grid.width)
    above = np.append(np.cumsum(summed[:0:-1])[::-1], 0.0)
    discounted = lfilter([0.0, decay], [1.0, -decay], summed[::-1])[::-1]
    thresholds = (grid.start + np.arange(grid.size)) * grid.width
    with np.errstate(divide="ignore"):
        sizes = np.log(np.maximum(discounted, 0.0)) - thresholds
    cut = 1.01 * grid.steps * float(ndtr(-REACH))
    slack = roundoff(step.masses, step.error, grid) + lost + cut
    return _HockeySticks(thresholds, above - discounted, sizes, slack, grid.steps * step.misplaced)


def _upper(kappa: np.ndarray, sticks: _HockeySticks) -> np.ndarray:
    with np.errstate(divide="ignore"):
        log_kappa = np.log(kappa) + sticks.shift
    chosen = np.searchsorted(-sticks.sizes, -log_kappa).clip(0, len(sticks.sizes) - 1)
    with np.errstate(over="ignore"):
        bound = np.exp(sticks.thresholds[chosen] + log_kappa) + sticks.values[chosen]
    return bound + sticks.slack
