"""What DP-SGD spends, by Rényi divergences, and how differently the same (epsilon, delta) protects.

Epsilon by privacy loss distributions is `defenses.privacy_spent`, which is tighter. Two data sets are
neighbours here where one record was added or removed; `renyi_two_replacement` says it where it differs.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr

from invjax.checks import check_choice, check_number
from invjax.defenses import privacy_spent
from invjax.theory.blowup import Inclusion, blowup
from invjax.theory.privacy_loss import checked, fft_delta

ORDERS = (*np.linspace(1.1, 10.9, 99), *range(11, 64))
"""Orders of Rényi divergences at which epsilon is customarily minimised."""
MAX_CORRECTIONS = 30


class Protection(NamedTuple):
    """What one choice of batch size and steps does at a given epsilon.

    Attributes:
      batch_size: expected size of a batch.
      steps: of training.
      noise_multiplier: that spends the epsilon.
      hidden: bound on the success of any reconstruction, of `kappa`'s shape.
      revealed: the same where the adversary knows which steps took the record.
    """

    batch_size: int
    steps: int
    noise_multiplier: float
    hidden: np.ndarray
    revealed: np.ndarray


def renyi_divergences(
    noise_multiplier: float,
    sampling_rate: float,
    steps: int,
    orders: Sequence[float] = ORDERS,
) -> np.ndarray:
    """Rényi DP of DP-SGD with Poisson sampling, by Google's dp-accounting.

    Args:
      noise_multiplier: in units of the clipping norm, on the sum of gradients.
      sampling_rate: probability that a step takes a record.
      steps: of training.
      orders: `alpha`, each above 1.

    Returns:
      Epsilon of every order, as `rero.gamma_rdp` takes it; infinite where dp-accounting gives up, which
      it does, and logs, for some fractional orders at large rates.

    Raises:
      ValueError: an argument out of range.
    """
    return _renyi(noise_multiplier, sampling_rate, steps, orders).rdp


def renyi_epsilon(
    noise_multiplier: float,
    sampling_rate: float,
    steps: int,
    delta: float,
    orders: Sequence[float] = ORDERS,
) -> float:
    """Epsilon of DP-SGD from its Rényi divergences (Canonne, Kamath and Steinke 2020, proposition 12).

    As dp-accounting has it, which passes over orders up to 1.01, and finds 0 where the total
    variation that the divergence allows is within delta.

    Args:
      noise_multiplier: as in `renyi_divergences`.
      sampling_rate: as in `renyi_divergences`.
      steps: as in `renyi_divergences`.
      delta: the delta of (epsilon, delta)-differential privacy.
      orders: as in `renyi_divergences`.

    Returns:
      The least over the orders of
      `epsilon(alpha) + log((alpha - 1) / alpha) - log(delta alpha) / (alpha - 1)`, and at least 0.

    Raises:
      ValueError: an argument out of range.
    """
    check_number("delta", delta, 0.0, 1.0, open_low=True, open_high=True)
    return float(_renyi(noise_multiplier, sampling_rate, steps, orders).get_epsilon(delta))


def renyi_two_replacement(
    noise_multiplier: float,
    sampling_rate: float,
    steps: int,
    inclusion: Inclusion = "hidden",
) -> float:
    """A bound on DP-SGD's Rényi divergence of order 2 where a record is replaced, not removed.

    The laws of a step are `P = (1 - q) N_0 + q N_a` and `Q = (1 - q) N_0 + q N_b`, and
    `chi^2 = q^2 int (N_a - N_b)^2 / Q`. With `Q >= q N_b` it is at most `q (e^(4 / sigma^2) - 1)`, which is
    exact where inclusion is revealed, and for full batches: four times the divergence of removal. With
    `Q >= (1 - q) N_0` it is at most `4 q^2 / (1 - q) sinh(1 / sigma^2)`.

    Args:
      noise_multiplier: as in `renyi_divergences`.
      sampling_rate: as in `renyi_divergences`.
      steps: as in `renyi_divergences`.
      inclusion: `hidden`, or `revealed` where the adversary knows which steps took the record.

    Returns:
      The sum over the steps of `log(1 + chi^2)`; 0 or infinite where `sigma^2` is beyond float64.

    Raises:
      ValueError: an argument out of range.
    """
    checked(0.5, noise_multiplier, sampling_rate, steps)
    check_choice("inclusion", inclusion, ("hidden", "revealed"))
    rate = float(sampling_rate)
    with np.errstate(over="ignore", under="ignore"):
        inverse = float(np.float64(noise_multiplier) ** -2)
    if inverse in (0.0, math.inf):
        return inverse
    # Logarithms of chi^2, as the exponentials overflow for little noise.
    chi = math.log(rate) + _log_expm1(4 * inverse)
    if rate < 1 and inclusion == "hidden":
        log_sinh = _log_expm1(2 * inverse) - inverse - math.log(2)
        chi = min(chi, math.log(4) + 2 * math.log(rate) - math.log1p(-rate) + log_sinh)
    return float(steps * np.logaddexp(0.0, chi))


def mean_square_floor(renyi_two: ArrayLike, diameter: float = 1.0) -> np.ndarray:
    """Least mean square error of any reconstruction, from the Rényi divergence of order 2.

    `diameter^2 / (2 + sqrt(e^epsilon - 1))^2`, on the worse of two opposite corners of the domain;
    ours. By Chapman and Robbins' inequality the means of a reconstruction at the two differ by
    `sqrt(e^epsilon - 1)` deviations at most, and its biases and its deviation are each at most
    the root of its error. `fisher.rdp_mse` is for unbiased adversaries, who cannot even guess.

    Args:
      renyi_two: epsilon of order 2, of replacing one record by another.
      diameter: extent of the values of a record, 1 for inputs in [0, 1].

    Returns:
      The error's floor, a mean over values, in squared input units.

    Raises:
      ValueError: an argument out of range.
    """
    check_number("diameter", diameter, 0.0, open_low=True)
    epsilon = np.asarray(renyi_two, float)
    if not (epsilon >= 0).all():
        raise ValueError(f"renyi_two must be at least 0, got {renyi_two}.")
    with np.errstate(over="ignore"):
        return diameter**2 / (2 + np.sqrt(np.expm1(epsilon))) ** 2


def noise_for_epsilon(
    epsilon: float, delta: float, num_samples: int, batch_size: int, steps: int
) -> float:
    """Noise multiplier with which DP-SGD spends a given epsilon.

    Full batches by the Gaussian mechanism's delta, which is exact (Balle and Wang 2018); else by
    `defenses.privacy_spent`, a few calls of it, which take long where the noise comes out small.

    Args:
      epsilon: of (epsilon, delta)-differential privacy, positive.
      delta: its delta.
      num_samples: size of the training set.
      batch_size: expected batch size.
      steps: training steps.

    Returns:
      The noise multiplier, to a relative 1e-3 in epsilon.

    Raises:
      ValueError: an argument out of range, a `delta` that holds without noise, or an epsilon that
        `defenses.privacy_spent` does not come to.
    """
    check_number("epsilon", epsilon, 0.0, open_low=True, open_high=True)
    check_number("delta", delta, 0.0, 1.0, open_low=True, open_high=True)
    check_number("num_samples", num_samples, 1)
    check_number("batch_size", batch_size, 1, num_samples)
    rate = batch_size / num_samples
    checked(0.5, 1.0, rate, steps)
    taken = -math.expm1(steps * math.log1p(-rate)) if rate < 1 else 1.0
    if delta >= taken:
        raise ValueError(
            f"delta must lie below {taken:.6g}, got {delta}: more than that is not even reached "
            "without noise, as the record is taken too rarely."
        )

    def excess(log_mu: float) -> float:
        return _gaussian_delta(epsilon, math.exp(log_mu)) - delta

    most = math.log(2 * math.sqrt(epsilon) + 100)
    mu = math.exp(brentq(excess, math.log(min(delta, 1e-6)), most, xtol=1e-12))
    noise = math.sqrt(steps) / mu
    if rate == 1:
        return noise
    # Close at once, by a fast accounting of removals: a slow one, of additions too, has the last word.
    high = math.log(noise)
    if _log_excess(high, epsilon, delta, rate, steps) < 0:
        low = high - 0.5
        while _log_excess(low, epsilon, delta, rate, steps) < 0:
            low, high = low - 0.5, low
        arguments = epsilon, delta, rate, steps
        noise = math.exp(brentq(_log_excess, low, high, args=arguments, xtol=1e-5))
    low, high, spent = 0.0, math.inf, math.nan
    for _ in range(MAX_CORRECTIONS):
        spent = privacy_spent(noise, num_samples, batch_size, steps, delta)
        if abs(spent / epsilon - 1) < 1e-3:
            return noise
        low, high = (noise, high) if spent > epsilon else (low, noise)
        proposed = noise * min(max(math.sqrt(spent / epsilon), 0.5), 2.0)
        noise = proposed if low < proposed < high else (low + high) / 2
    raise ValueError(
        f"epsilon must be one that accounting comes to, got {epsilon}: at a noise multiplier of "
        f"{noise:.6g} it finds {spent:.6g}, after {MAX_CORRECTIONS} corrections."
    )


def same_epsilon(
    epsilon: float,
    delta: float,
    kappa: ArrayLike,
    num_samples: int,
    schedules: Iterable[tuple[int, int]],
) -> list[Protection]:
    """The same (epsilon, delta) by different batches and steps: how well each protects.

    The headline of Hayes, Mahloujifar and Balle (2023): epsilon alone does not tell how often
    records can be reconstructed.

    Args:
      epsilon: of (epsilon, delta)-differential privacy.
      delta: its delta.
      kappa: probability of the best blind guess.
      num_samples: size of the training set.
      schedules: pairs of an expected batch size and a number of steps.

    Returns:
      One row a schedule.

    Raises:
      ValueError: an argument out of range.
    """
    kappa, rows = checked(kappa, 1.0, 1.0, 1), []
    for batch_size, steps in schedules:
        noise = noise_for_epsilon(epsilon, delta, num_samples, batch_size, steps)
        setting = kappa, noise, batch_size / num_samples, steps
        revealed = blowup(*setting, inclusion="revealed")
        rows.append(Protection(batch_size, steps, noise, blowup(*setting), revealed))
    return rows


def _log_excess(log_noise: float, epsilon: float, delta: float, rate: float, steps: int) -> float:
    found = fft_delta(epsilon, math.exp(log_noise), rate, steps)
    return math.log(max(float(found), 1e-300) / delta)


def _gaussian_delta(epsilon: float, mu: float) -> float:
    """Balle and Wang (2018), theorem 8."""
    far = math.exp(epsilon + log_ndtr(-epsilon / mu - mu / 2))
    return float(ndtr(mu / 2 - epsilon / mu)) - far


def _log_expm1(value: float) -> float:
    return value + math.log(-math.expm1(-value))


def _renyi(noise_multiplier: float, sampling_rate: float, steps: int, orders: Sequence[float]):
    checked(0.5, noise_multiplier, sampling_rate, steps)
    if not len(orders) or min(orders) <= 1:
        raise ValueError(f"orders must lie above 1, got {orders}.")
    # A second to import, so only here.
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    step = dp_accounting.PoissonSampledDpEvent(
        sampling_rate, dp_accounting.GaussianDpEvent(noise_multiplier)
    )
    accountant = RdpAccountant(list(orders))
    accountant.compose(step, steps)
    return accountant
