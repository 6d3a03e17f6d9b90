"""Success of any reconstruction from DP-SGD: the blow-up function of its subsampled Gaussian steps.

`T` steps take the record with probability `q` each (Poisson sampling), clip its gradient to norm `C` and add
noise of deviation `sigma C` to the sum; the adversary holds all other records and sees every iterate. An
event of probability `kappa` under training without the record has at most

    gamma(kappa) = sup { mu(E) : nu(E) <= kappa },  nu = N(0, sigma^2)^T,
                                                    mu = ((1 - q) N(0, sigma^2) + q N(1, sigma^2))^T

under training with it, and no reconstruction succeeds more often (Hayes, Mahloujifar and Balle 2023): this
is *hidden* inclusion. *Revealed* inclusion also tells the adversary which steps took the record, for instance
where batches are fixed or leak, and is much worse. The reference is training without the record, so the
sensitivity is `C`, as where records are added or removed; no bound here doubles it for replacement.

`kappa` is an array of any shape; the other arguments are numbers. Host code in NumPy, in float64.
"""

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr
from scipy.stats import binom

from invjax.base import Array
from invjax.checks import check_choice, check_count, check_number
from invjax.theory.privacy_loss import LEAST_NOISE, checked, fft_blowup
from invjax.theory.rero import calibrate_mu, gamma_gaussian

Inclusion = Literal["hidden", "revealed"]
MANY_TIMES = 1e4
"""Expected participations from which `revealed_blowup` is slow, and no help to `fft_blowup`."""


class Estimate(NamedTuple):
    """A Monte Carlo estimate.

    Attributes:
      value: the estimate, of `kappa`'s shape.
      standard_error: its own.
    """

    value: np.ndarray
    standard_error: np.ndarray


def blowup(
    kappa: ArrayLike,
    noise_multiplier: float,
    sampling_rate: float,
    steps: int,
    *,
    inclusion: Inclusion = "hidden",
    certified: bool = True,
) -> np.ndarray:
    """Bound on the success of any reconstruction from DP-SGD, by the best method there is for it.

    Closed forms where every step takes the record, or there is one step; `revealed_blowup`;
    else `fft_blowup`. Certified, it is at most `revealed_blowup`, which tells more, where the record
    is taken 10^4 times or less in expectation.

    Args:
      kappa: probability of the best blind guess.
      noise_multiplier: `sigma`, in units of the clipping norm, on the sum of gradients.
      sampling_rate: `q`, probability that a step takes the record.
      steps: `T`.
      inclusion: `hidden`, or `revealed` where the adversary knows which steps took the record.
      certified: as in `fft_blowup`; the other methods are exact.

    Returns:
      The bound, of `kappa`'s shape.

    Raises:
      ValueError: an argument out of range.

    Example:
      >>> import invjax
      >>> bound = invjax.theory.blowup(0.1, noise_multiplier=1.0, sampling_rate=0.01, steps=100)
      >>> bool(0.1 < bound < 0.2)
      True
    """
    kappa = checked(kappa, noise_multiplier, sampling_rate, steps)
    check_choice("inclusion", inclusion, ("hidden", "revealed"))
    # Every step with the record: exact at rate 1, else a bound too, good at a tiny kappa.
    noise_multiplier = float(noise_multiplier)
    with np.errstate(over="ignore"):
        full_batch = gamma_gaussian(kappa, np.sqrt(float(steps)) / noise_multiplier)
    if sampling_rate == 1:
        return full_batch
    if inclusion == "revealed":
        sampled = revealed_blowup(kappa, noise_multiplier, sampling_rate, steps)
    elif steps == 1:
        sampled = (1 - sampling_rate) * kappa + sampling_rate * full_batch
    else:
        sampled = fft_blowup(kappa, noise_multiplier, sampling_rate, steps, certified=certified)
        if certified and steps * sampling_rate <= MANY_TIMES:
            revealed = revealed_blowup(kappa, noise_multiplier, sampling_rate, steps)
            sampled = np.minimum(sampled, revealed)
    return np.minimum(full_batch, sampled)


def revealed_blowup(
    kappa: ArrayLike, noise_multiplier: float, sampling_rate: float, steps: int
) -> np.ndarray:
    """Revealed inclusion: the blow-up function where the adversary sees which steps took the record.

    With `K` of them, `K` binomial, the two laws are Gaussians `sqrt(K) / sigma` apart. The least of the
    bounds `t kappa + E H_K(t)`, which are valid for every `t`: exact up to the search for `t`.

    Args:
      kappa: as in `blowup`.
      noise_multiplier: as in `blowup`.
      sampling_rate: as in `blowup`.
      steps: as in `blowup`.

    Returns:
      The blow-up function, of `kappa`'s shape.

    Raises:
      ValueError: an argument out of range.
    """
    kappa = checked(kappa, noise_multiplier, sampling_rate, steps)
    noise_multiplier = float(noise_multiplier)
    if noise_multiplier < LEAST_NOISE:
        # All is known but where no step took the record, up to 1e-300.
        with np.errstate(divide="ignore"):
            taken = -np.expm1(steps * np.log1p(-sampling_rate))
        bound = taken + np.minimum(1 - taken, kappa)
        return np.where(kappa > 0, np.clip(bound, kappa, 1.0), 0.0)[()]
    first, last = binom.ppf((1e-14, 1 - 1e-14), steps, sampling_rate).astype(int)
    counts = np.arange(max(first - 1, 0), last + 1)
    chances = binom.pmf(counts, steps, sampling_rate)
    seen = counts > 0
    # The atom without the record is a Gaussian of no width at 0; a placeholder avoids dividing by it.
    gaps = np.where(seen, np.sqrt(counts) / noise_multiplier, 1.0)
    flat = kappa.reshape(-1, 1)

    def kept(t):
        with np.errstate(over="ignore"):
            return np.where(seen, ndtr(-t / gaps - gaps / 2), t < 0) @ chances

    reach = gaps.max() ** 2 / 2 + 40 * gaps.max() + 1
    low, high = np.full(flat.shape, -reach), np.full(flat.shape, reach)
    for _ in range(80):
        middle = (low + high) / 2
        above = kept(middle)[:, None] > flat
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    with np.errstate(over="ignore", divide="ignore"):
        hockey = ndtr(gaps / 2 - high / gaps) - np.exp(high + log_ndtr(-gaps / 2 - high / gaps))
        hockey = np.where(seen, hockey, np.maximum(-np.expm1(high), 0.0))
        bound = np.exp(high[:, 0] + np.log(flat[:, 0])) + hockey @ chances
    bound += binom.cdf(counts[0] - 1, steps, sampling_rate)
    bound += binom.sf(counts[-1], steps, sampling_rate)
    return np.clip(bound.reshape(kappa.shape), kappa, 1.0)[()]


def monte_carlo_blowup(
    key: Array,
    kappa: ArrayLike,
    noise_multiplier: float,
    sampling_rate: float,
    steps: int,
    num_samples: int = 10_000,
) -> Estimate:
    """Hidden inclusion: the estimator of Hayes, Mahloujifar and Balle (2023), and its standard error.

    It samples the noise alone, and keeps likelihood ratios below their `1 - kappa` quantile, which bounds
    its variance. Consistent, not a bound.

    Args:
      key: a typed key.
      kappa: as in `blowup`.
      noise_multiplier: as in `blowup`.
      sampling_rate: as in `blowup`.
      steps: as in `blowup`.
      num_samples: runs of training; one sample serves every `kappa`.

    Returns:
      The estimate.

    Raises:
      ValueError: an argument out of range.
    """
    kappa = checked(kappa, noise_multiplier, sampling_rate, steps)
    check_count("num_samples", num_samples, 2)
    with jax.enable_x64(True):
        losses = _sampled_losses(key, noise_multiplier, sampling_rate, steps, num_samples)
    ratios = np.exp(np.sort(np.asarray(losses)))
    kept = np.floor(num_samples * (1 - kappa)).astype(int)
    sums = np.concatenate(([0.0], np.cumsum(ratios)))
    value = np.clip(1 - sums[kept] / num_samples, 0.0, 1.0)
    # The quantile is estimated too: to first order the estimate is a mean of (quantile - ratio)+.
    quantiles = ratios[np.minimum(kept, num_samples - 1)]
    errors = [np.maximum(quantile - ratios, 0.0).std() for quantile in quantiles.ravel()]
    return Estimate(value, np.reshape(errors, kappa.shape) / math.sqrt(num_samples))


def calibrate_noise_multiplier(
    gamma: float,
    kappa: float,
    steps: int,
    sampling_rate: float = 1.0,
    inclusion: Inclusion = "hidden",
) -> float:
    """Least noise of DP-SGD that keeps the success of any reconstruction within `gamma`.

    Args:
      gamma: tolerated probability of success.
      kappa: probability of the best blind guess.
      steps: as in `blowup`.
      sampling_rate: as in `blowup`.
      inclusion: as in `blowup`.

    Returns:
      The noise multiplier: `sqrt(T) / (Phi^-1(gamma) - Phi^-1(kappa))` at full batches; else the least
      whose certified `blowup` is within `gamma`, to a relative 1e-6.

    Raises:
      ValueError: an argument out of range, or a `gamma` that holds without noise.
    """
    checked(kappa, 1.0, sampling_rate, steps)
    check_choice("inclusion", inclusion, ("hidden", "revealed"))
    check_number("gamma", gamma, kappa, 1.0, open_low=True, open_high=True)
    full_batch = math.sqrt(steps) / calibrate_mu(gamma, kappa)
    if sampling_rate == 1:
        return full_batch
    # Without noise all is known wherever a step took the record.
    never = (1 - sampling_rate) ** steps
    guessed = never * kappa if inclusion == "hidden" else min(never, kappa)
    if gamma >= 1 - never + guessed:
        raise ValueError(
            f"gamma must lie below {1 - never + guessed:.6g}, got {gamma}: more than that is "
            "not even reached without noise, as the record is taken too rarely."
        )

    def excess(log_noise: float) -> float:
        noise = math.exp(log_noise)
        return float(blowup(kappa, noise, sampling_rate, steps, inclusion=inclusion)) - gamma

    # Full batches are no safer; a little more, for rounding.
    high = math.log(full_batch) + 1e-9
    low = high - 1.0
    while excess(low) <= 0:
        low -= 1.0
    root = brentq(excess, low, high, xtol=3e-7)
    return math.exp(root if excess(root) <= 0 else root + 6e-7)


@functools.partial(jax.jit, static_argnames="num_samples")
def _sampled_losses(key: Array, noise: Array, rate: Array, steps: Array, num_samples: int) -> Array:
    def step(index, total):
        noises = jax.random.normal(jax.random.fold_in(key, index), (num_samples,))
        exponent = noises / noise - 0.5 / noise**2
        return total + jnp.logaddexp(jnp.log1p(-rate), jnp.log(rate) + exponent)

    return jax.lax.fori_loop(0, steps, step, jnp.zeros(num_samples))
