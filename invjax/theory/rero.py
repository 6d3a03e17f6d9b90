"""Reconstruction robustness: how often an informed adversary can succeed, by the privacy of the training.

The adversary holds every record but one, the release, and a prior of the missing record `Z`. A mechanism is
`(eta, gamma)`-reconstruction robust (ReRo; Balle, Cherubin and Hayes 2022) if no reconstruction has error
at most `eta` with probability above `gamma`. Its bounds need two numbers:

* `kappa`, what the best blind guess reaches: `sup_z Pr[error(Z, z) <= eta]` (by the prior: `baselines`);
* the privacy of the pair "trained with `Z`" and "trained on a reference, for instance without it". Each
  `gamma_*` turns `kappa` into a bound on the probability of success, from `kappa` to 1.

Every bound is the same argument: under the reference, the reconstruction is independent of `Z`, so that it
succeeds with probability `kappa` at most; privacy limits what an event of that probability can grow to.
Records that are replaced, and records that are added or removed, both do: epsilon must be of the pair meant.
The prior is the population's, not the target's: whoever knows more about the target starts at a larger
`kappa`. `blowup` has the exact `gamma` of DP-SGD.

Host code in NumPy, in float64; arguments of any shape, broadcast, unless a docstring says otherwise.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar
from scipy.special import ndtr, ndtri

from invjax.checks import check_number

NOWHERE = 1e300
"""Exponent of an order at which a divergence is not finite."""


def gamma_dp(kappa: ArrayLike, epsilon: ArrayLike, delta: ArrayLike = 0.0) -> np.ndarray:
    """(epsilon, delta)-DP: `kappa e^epsilon + delta` (Balle, Cherubin and Hayes 2022).

    Args:
      kappa: probability of the best blind guess.
      epsilon: of differential privacy.
      delta: of differential privacy.

    Returns:
      The bound on the probability of success.

    Raises:
      ValueError: an argument out of range.
    """
    kappa, epsilon = _kappa(kappa), _within("epsilon", epsilon, 0.0)
    return _clip(_grown(kappa, epsilon) + _within("delta", delta, 0.0, 1.0), kappa)


def gamma_approximate_dp(kappa: ArrayLike, epsilon: ArrayLike, delta: ArrayLike) -> np.ndarray:
    """(epsilon, delta)-DP by its trade-off function, never above `gamma_dp` (Hayes et al. 2023).

    Args:
      kappa: probability of the best blind guess.
      epsilon: of differential privacy.
      delta: of differential privacy.

    Returns:
      The bound on the probability of success.

    Raises:
      ValueError: an argument out of range.
    """
    kappa, epsilon = _kappa(kappa), _within("epsilon", epsilon, 0.0)
    delta = _within("delta", delta, 0.0, 1.0)
    rest = np.maximum(np.exp(-epsilon) * (1 - delta - kappa), 0.0)
    return _clip(np.minimum(_grown(kappa, epsilon) + delta, 1 - rest), kappa)


def gamma_rdp(
    kappa: ArrayLike,
    divergence: Callable[[float], float] | ArrayLike,
    orders: ArrayLike | None = None,
) -> np.ndarray:
    """Rényi DP: `(kappa e^epsilon(alpha))^((alpha - 1) / alpha)` at the best order (Balle et al. 2022).

    Args:
      kappa: probability of the best blind guess.
      divergence: `epsilon(alpha)`: a function, or its values at `orders`; infinite or NaN says nothing
        of that order.
      orders: `alpha`, each above 1; if not given, a function's best order is searched for.

    Returns:
      The bound on the probability of success, of `kappa`'s shape.

    Raises:
      ValueError: no order, or one of 1 or less, values without orders or not as many, `kappa` out of
        range.
    """
    kappa = _kappa(kappa)
    if orders is None:
        if not callable(divergence):
            raise ValueError("orders must be given where divergence holds values.")
        curve = divergence
        return np.vectorize(lambda one: _best_order(one, curve), otypes=[float])(kappa)[()]
    alphas = np.atleast_1d(np.asarray(orders, float))
    if not len(alphas) or not (alphas > 1).all():
        raise ValueError(f"orders must lie above 1, got {orders}.")
    values = (
        np.array([divergence(alpha) for alpha in alphas])
        if callable(divergence)
        else np.atleast_1d(np.asarray(divergence, float))
    )
    if values.shape != alphas.shape:
        raise ValueError(
            f"divergence must have a value for every order, got shapes {values.shape} and "
            f"{alphas.shape}."
        )
    values = np.where(np.isfinite(values), values, np.inf)
    exponents = (1 - 1 / alphas) * (values + np.log(np.maximum(kappa, 1e-300))[..., None])
    return _clip(np.exp(np.minimum(exponents.min(-1), 0.0)), kappa)


def gamma_zcdp(kappa: ArrayLike, rho: ArrayLike) -> np.ndarray:
    """Zero-concentrated DP: `exp(-(sqrt(log 1/kappa) - sqrt(rho))^2)` (Balle et al. 2022).

    `gamma_rdp` of `epsilon(alpha) = rho alpha` at its best order, `sqrt(log(1/kappa) / rho)`.

    Args:
      kappa: probability of the best blind guess.
      rho: of zero-concentrated differential privacy; `T / (2 sigma^2)` for `T` Gaussian steps.

    Returns:
      The bound on the probability of success: 1 from `rho = log(1/kappa)` on.

    Raises:
      ValueError: an argument out of range.
    """
    kappa, rho = _kappa(kappa), _within("rho", rho, 0.0)
    gap = np.maximum(-_sum(-np.sqrt(-_log(kappa)), np.sqrt(rho)), 0.0)
    return _clip(np.exp(-(gap**2)), kappa)


def gamma_fdp(kappa: ArrayLike, tradeoff: Callable[[np.ndarray], ArrayLike]) -> np.ndarray:
    """f-DP: `1 - f(kappa)` (Hayes, Mahloujifar and Balle 2023).

    Args:
      kappa: probability of the best blind guess.
      tradeoff: `f`: least type II error of a test of the reference against training with the
        record, by its type I error; vectorised.

    Returns:
      The bound on the probability of success.

    Raises:
      ValueError: `kappa` out of range.
    """
    kappa = _kappa(kappa)
    return _clip(1 - np.asarray(tradeoff(kappa), float), kappa)


def gamma_gaussian(kappa: ArrayLike, mu: ArrayLike) -> np.ndarray:
    """Gaussian DP: `Phi(Phi^-1(kappa) + mu)`, which is exact for Gaussian noise.

    Args:
      kappa: probability of the best blind guess.
      mu: shift over noise deviation; `sqrt(T) / sigma` for `T` full-batch steps.

    Returns:
      The bound on the probability of success.

    Raises:
      ValueError: an argument out of range.

    Example:
      >>> import invjax
      >>> round(float(invjax.theory.rero.gamma_gaussian(0.1, 1.0)), 3)
      0.389
    """
    kappa = _kappa(kappa)
    return _clip(ndtr(_sum(ndtri(kappa), _within("mu", mu, 0.0))), kappa)


def gamma_laplace(kappa: ArrayLike, epsilon: ArrayLike) -> np.ndarray:
    """Laplace noise of one dimension, exactly, by its trade-off function (Dong, Roth and Su 2022).

    Args:
      kappa: probability of the best blind guess.
      epsilon: sensitivity over the noise's scale.

    Returns:
      The bound on the probability of success.

    Raises:
      ValueError: an argument out of range.
    """
    kappa, epsilon = _kappa(kappa), _within("epsilon", epsilon, 0.0)
    decay = np.exp(-epsilon)
    middle = 1 - decay / (4 * np.maximum(kappa, decay / 2 + 1e-300))
    upper = np.where(kappa <= 0.5, middle, 1 - decay * (1 - kappa))
    return _clip(np.where(kappa <= decay / 2, _grown(kappa, epsilon), upper), kappa)


def calibrate_epsilon(gamma: float, kappa: float, delta: float = 0.0) -> float:
    """Largest epsilon whose `gamma_dp` stays within `gamma`.

    Args:
      gamma: tolerated probability of success.
      kappa: probability of the best blind guess.
      delta: of differential privacy.

    Returns:
      `log((gamma - delta) / kappa)`.

    Raises:
      ValueError: `gamma - delta` below `kappa` by more than rounding, or a number that is no probability.
    """
    check_number("delta", delta, 0.0, 1.0)
    _target(gamma, kappa)
    if gamma < (kappa + delta) * (1 - 1e-15):
        raise ValueError(
            f"gamma must be at least kappa + delta, {kappa + delta:.6g}, got {gamma}: no epsilon is "
            "small enough."
        )
    return math.log(max((gamma - delta) / kappa, 1.0))


def calibrate_rho(gamma: float, kappa: float) -> float:
    """Largest rho whose `gamma_zcdp` stays within `gamma`.

    Args:
      gamma: tolerated probability of success.
      kappa: probability of the best blind guess.

    Returns:
      `(sqrt(log 1/kappa) - sqrt(log 1/gamma))^2`.

    Raises:
      ValueError: `gamma` below `kappa`, or a number that is no probability.
    """
    _target(gamma, kappa)
    return (math.sqrt(-math.log(kappa)) - math.sqrt(-math.log(gamma))) ** 2


def calibrate_mu(gamma: float, kappa: float) -> float:
    """Largest mu whose `gamma_gaussian` stays within `gamma`.

    Args:
      gamma: tolerated probability of success.
      kappa: probability of the best blind guess.

    Returns:
      `Phi^-1(gamma) - Phi^-1(kappa)`.

    Raises:
      ValueError: `gamma` below `kappa`, or a number that is no probability.
    """
    _target(gamma, kappa)
    return float(ndtri(gamma) - ndtri(kappa))


def attained_by_randomized_response(num_records: ArrayLike, epsilon: ArrayLike) -> np.ndarray:
    """What randomised response on `m` records gives away: `e^epsilon / (e^epsilon + m - 1)`.

    Args:
      num_records: `m`.
      epsilon: of differential privacy.

    Returns:
      Probability of success, within `gamma_dp` of `1 / m`.

    Raises:
      ValueError: an argument out of range.
    """
    num_records = _within("num_records", num_records, 1)
    return 1 / (1 + (num_records - 1) * np.exp(-_within("epsilon", epsilon, 0.0)))


def attained_by_orthogonal(num_records: ArrayLike, mu: ArrayLike) -> np.ndarray:
    """Success of the most likely of `m` orthogonal shifts in Gaussian noise: `E Phi(Z + mu)^(m - 1)`.

    Args:
      num_records: `m` equally likely records, whose gradients are orthogonal.
      mu: norm of every shift over the noise's deviation; `sqrt(T) / sigma` for `T` full-batch steps.

    Returns:
      Probability of success, within `gamma_gaussian` of `1 / m`.

    Raises:
      ValueError: an argument out of range.
    """
    others = _within("num_records", num_records, 1) - 1
    # The trapezoidal rule converges exponentially for a smooth integrand that vanishes at both ends.
    points = np.linspace(-12, 12, 4001)
    weights = np.exp(-(points**2) / 2) * (points[1] - points[0]) / math.sqrt(2 * math.pi)
    reached = ndtr(points + _within("mu", mu, 0.0)[..., None]) ** others[..., None]
    return reached @ weights


def attained_by_simplex(num_records: ArrayLike, mu: ArrayLike) -> np.ndarray:
    """Success of the most likely of `m` shifts that form a regular simplex, in Gaussian noise.

    Args:
      num_records: `m` equally likely records, 2 or more.
      mu: as in `attained_by_orthogonal`.

    Returns:
      Probability of success; for 2 records it is `gamma_gaussian` itself.

    Raises:
      ValueError: an argument out of range.
    """
    num_records = _within("num_records", num_records, 2)
    mu = _within("mu", mu, 0.0) * np.sqrt(num_records / (num_records - 1))
    return attained_by_orthogonal(num_records, mu)


def attained_by_antipodal(mu: ArrayLike) -> np.ndarray:
    """Success against two opposite shifts in Gaussian noise: `Phi(mu)`, where the bound is tight.

    Args:
      mu: as in `attained_by_orthogonal`.

    Returns:
      Probability of success.

    Raises:
      ValueError: a negative shift.
    """
    return ndtr(_within("mu", mu, 0.0))


def _best_order(kappa: float, divergence: Callable[[float], float]) -> float:
    if kappa in (0.0, 1.0):
        return kappa
    log_kappa = math.log(kappa)

    # Convex in 1 / alpha, as (alpha - 1) epsilon(alpha) is convex in alpha.
    def exponent(inverse: float) -> float:
        found = (1 - inverse) * (float(divergence(1 / inverse)) + log_kappa)
        return found if math.isfinite(found) else NOWHERE

    # From the least inverse order at which it is finite: the search cannot tell a slope before that.
    low, high = 1e-9, 1.0 - 1e-9
    if exponent(low) == NOWHERE:
        if exponent(high) == NOWHERE:
            return 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if exponent(middle) == NOWHERE else (low, middle)
        low = high
    found = minimize_scalar(exponent, bounds=(low, 1.0), method="bounded", options={"xatol": 1e-9})
    return max(math.exp(min(found.fun, exponent(low), 0.0)), kappa)


def _target(gamma: float, kappa: float) -> None:
    check_number("kappa", kappa, 0.0, 1.0, open_low=True, open_high=True)
    check_number("gamma", gamma, kappa, 1.0, open_high=True)


def _within(name: str, value: ArrayLike, low: float, high: float = math.inf) -> np.ndarray:
    array = np.asarray(value, float)
    if not ((array >= low) & (array <= high)).all():
        raise ValueError(f"{name} must lie in [{low}, {high}], got {value}.")
    return array


def _kappa(kappa: ArrayLike) -> np.ndarray:
    return _within("kappa", kappa, 0.0, 1.0)


def _log(kappa: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(kappa)


def _grown(kappa: np.ndarray, epsilon: np.ndarray) -> np.ndarray:
    """`kappa e^epsilon`, or 1 where it is more: the exponential may overflow."""
    return np.exp(np.minimum(_sum(_log(kappa), epsilon), 0.0))


def _sum(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Minus infinity where one is: what cannot happen cannot grow, as in the limit of finite privacy."""
    return np.where(first == -np.inf, -np.inf, np.where(first == -np.inf, 0.0, first) + second)


def _clip(gamma: np.ndarray, kappa: np.ndarray) -> np.ndarray:
    return np.clip(gamma, kappa, 1.0)[()]
