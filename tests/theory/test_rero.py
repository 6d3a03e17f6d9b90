"""Reconstruction robustness: every bound, its calibration, and what attains it."""

import math

import numpy as np
import pytest
from scipy.special import ndtr, ndtri

from invjax.theory import rero
from invjax.theory.rero import (
    attained_by_antipodal,
    attained_by_orthogonal,
    attained_by_randomized_response,
    attained_by_simplex,
    calibrate_epsilon,
    calibrate_mu,
    calibrate_rho,
    gamma_approximate_dp,
    gamma_dp,
    gamma_fdp,
    gamma_gaussian,
    gamma_laplace,
    gamma_rdp,
    gamma_zcdp,
)

KAPPA = np.concatenate(([0.0, 1e-12, 1e-6], np.linspace(0.001, 0.999, 57), [1.0]))

# Every bound as a function of kappa and one level of privacy, the larger the less.
BOUNDS = {
    "dp": gamma_dp,
    "dp, delta": lambda kappa, level: gamma_dp(kappa, level, 1e-3),
    "approximate dp": lambda kappa, level: gamma_approximate_dp(kappa, level, 1e-3),
    "rdp, orders": lambda kappa, level: gamma_rdp(kappa, level * np.arange(2, 9), np.arange(2, 9)),
    "rdp": lambda kappa, level: gamma_rdp(kappa, lambda alpha: level * alpha),
    "zcdp": gamma_zcdp,
    "gaussian": gamma_gaussian,
    "laplace": gamma_laplace,
    "fdp": lambda kappa, level: gamma_fdp(kappa, lambda x: np.exp(-level) * (1 - x)),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_bounds_are_probabilities_monotone_and_above_the_guess(name):
    bound = BOUNDS[name]
    table = np.array([bound(KAPPA, level) for level in (0.0, 0.3, 1.0, 4.0, 900.0)])
    assert table.shape == (5, len(KAPPA))
    assert (table >= KAPPA).all() and (table <= 1).all()
    assert (np.diff(table, axis=0) >= -1e-9).all()
    assert (np.diff(table, axis=1) >= -1e-9).all()
    assert bound(0.2, 1.0) == pytest.approx(float(bound(np.array([0.2]), 1.0)[0]), abs=1e-12)
    if name not in ("rdp, orders", "dp, delta", "approximate dp", "fdp"):
        np.testing.assert_allclose(table[0], KAPPA, atol=1e-9)


def test_formulas():
    assert gamma_dp(0.1, 1.0) == pytest.approx(0.1 * math.e)
    assert gamma_dp(0.1, 1.0, 0.01) == pytest.approx(0.1 * math.e + 0.01)
    assert gamma_rdp(0.1, [1.0, 0.5], [2.0, 3.0]) == pytest.approx(
        min((0.1 * math.e) ** 0.5, (0.1 * math.e**0.5) ** (2 / 3))
    )
    assert gamma_gaussian(0.1, 0.7) == pytest.approx(ndtr(ndtri(0.1) + 0.7))
    assert gamma_fdp(0.1, lambda x: ndtr(-ndtri(x) - 0.7)) == pytest.approx(
        gamma_gaussian(0.1, 0.7)
    )


@pytest.mark.parametrize(
    ("kappa", "rho", "expected"),
    [(0.1, 0.5, 0.5186017317), (0.01, 1.0, 0.2689477561), (1e-6, 3.0, 0.0194537699)],
)
def test_zcdp_is_renyi_at_its_best_order(kappa, rho, expected):
    closed = gamma_zcdp(kappa, rho)
    assert closed == pytest.approx(expected, abs=1e-10)
    assert gamma_rdp(kappa, lambda alpha: rho * alpha) == pytest.approx(closed, abs=1e-8)
    best = math.sqrt(-math.log(kappa) / rho)
    assert gamma_rdp(kappa, [rho * best], [best]) == pytest.approx(closed, abs=1e-12)
    orders = np.linspace(1.05, 20, 300)
    on_grid = gamma_rdp(kappa, lambda alpha: rho * alpha, orders)
    assert closed <= on_grid <= closed + 1e-3


def test_renyi_is_vectorised_and_skips_what_is_infinite():
    kappa = np.array([[0.1, 0.01, 0.0], [1e-6, 1.0, 0.5]])
    orders, values = np.array([1.5, 2, 8]), np.array([0.3, np.inf, np.nan])
    found = gamma_rdp(kappa, values, orders)
    np.testing.assert_allclose(found, gamma_rdp(kappa, values[:1], orders[:1]))
    assert gamma_rdp(0.1, [np.inf], [2.0]) == 1
    found = gamma_rdp(kappa, lambda alpha: 0.5 * alpha)
    np.testing.assert_allclose(found, gamma_zcdp(kappa, 0.5), atol=1e-8)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["dp", "approximate dp", "zcdp", "gaussian", "laplace"])
def test_no_privacy_at_all(name):
    """What cannot happen cannot grow, but by delta; all else can, to 1."""
    found = BOUNDS[name](np.array([0.0, 1e-300, 0.1, 1.0]), math.inf)
    none = 1e-3 if name == "approximate dp" else 0.0
    np.testing.assert_array_equal(found, [none, 1, 1, 1])
    assert BOUNDS[name](0.0, math.inf) == none


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_renyi_by_a_function_that_is_not_finite_everywhere(value):
    """The best order is found where it is; here that is the largest one."""
    for last in (1.05, 2.0):
        found = gamma_rdp(0.1, lambda alpha, last=last: 0.1 * alpha if alpha <= last else value)
        assert found == pytest.approx((0.1 * math.exp(0.1 * last)) ** (1 - 1 / last), rel=1e-6)
    assert gamma_rdp(0.1, lambda alpha: value) == 1


def test_order_of_the_bounds():
    """Exact for Gaussian noise, then zCDP, then 1; and exact for randomised response."""
    kappa = KAPPA[1:-1]
    for mu in (0.05, 0.5, 1.5, 4.0):
        exact, loose = gamma_gaussian(kappa, mu), gamma_zcdp(kappa, mu**2 / 2)
        assert (exact <= loose).all() and (loose <= 1).all()
        assert (exact < loose)[kappa < 0.9 * math.exp(-(mu**2) / 2)].all()
    for epsilon in (0.1, 1.0, 5.0):
        for delta in (0.0, 1e-3, 0.2):
            tight = gamma_approximate_dp(kappa, epsilon, delta)
            assert (tight <= gamma_dp(kappa, epsilon, delta) + 1e-15).all()
        assert (gamma_laplace(kappa, epsilon) <= gamma_approximate_dp(kappa, epsilon, 0.0)).all()


def test_approximate_dp_is_its_tradeoff_function():
    """The envelope of both lines: each of the two pure mechanisms reaches it somewhere."""
    epsilon, delta = 1.0, 0.05
    kappa = np.linspace(0, 1, 101)
    both = np.maximum(
        1 - delta - math.exp(epsilon) * kappa, math.exp(-epsilon) * (1 - delta - kappa)
    )
    found = gamma_approximate_dp(kappa, epsilon, delta)
    np.testing.assert_allclose(found, np.maximum(1 - np.maximum(both, 0), kappa), atol=1e-14)


@pytest.mark.parametrize(("epsilon", "expected"), [(1.0, 0.2718), (3.0, 0.8755)])
def test_laplace(epsilon, expected):
    assert gamma_laplace(0.1, epsilon) == pytest.approx(expected, abs=1e-4)
    rng = np.random.default_rng(0)
    noise = rng.laplace(size=400_000)
    # The likelihood ratio is monotone: the best event of probability kappa is a tail.
    for kappa in (0.02, 0.1, 0.4, 0.8):
        threshold = -math.log(2 * kappa) if kappa < 0.5 else math.log(2 * (1 - kappa))
        simulated = np.mean(noise + epsilon > threshold)
        assert gamma_laplace(kappa, epsilon) == pytest.approx(simulated, abs=4e-3)


def test_calibrations_of_the_example():
    assert calibrate_epsilon(0.2, 0.1) == pytest.approx(0.693, abs=5e-4)
    assert calibrate_rho(0.2, 0.1) == pytest.approx(0.0619, abs=5e-5)
    assert 10 / calibrate_mu(0.2, 0.1) == pytest.approx(22.731, abs=5e-4)


@pytest.mark.parametrize("kappa", [1e-8, 0.1, 0.7])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_calibrations_invert_their_bounds(kappa, share):
    gamma = kappa + share * (1 - kappa)
    assert gamma_dp(kappa, calibrate_epsilon(gamma, kappa)) == pytest.approx(gamma, rel=1e-9)
    delta = 0.3 * (gamma - kappa)
    epsilon = calibrate_epsilon(gamma, kappa, delta)
    assert gamma_dp(kappa, epsilon, delta) == pytest.approx(gamma, rel=1e-9)
    assert gamma_zcdp(kappa, calibrate_rho(gamma, kappa)) == pytest.approx(gamma, rel=1e-9)
    assert gamma_gaussian(kappa, calibrate_mu(gamma, kappa)) == pytest.approx(gamma, rel=1e-9)


def test_calibration_at_its_end():
    """A delta that leaves no epsilon, but for rounding."""
    assert calibrate_epsilon(0.3, 0.1, 0.2) == 0 == calibrate_epsilon(0.1, 0.1)
    for gamma, kappa, delta in ((0.29999, 0.1, 0.2), (0.95, 0.9, 0.2)):
        words = f"gamma must be at least kappa [+] delta, {kappa + delta:g}, got {gamma}"
        with pytest.raises(ValueError, match=words):
            calibrate_epsilon(gamma, kappa, delta)


def test_randomized_response():
    assert attained_by_randomized_response(10, 1.0) == pytest.approx(0.23197, abs=5e-6)
    assert gamma_dp(0.1, 1.0) == pytest.approx(0.27183, abs=5e-6)
    records, epsilon = np.array([2, 10, 1000])[:, None], np.array([0.0, 0.1, 1.0, 5.0, 800.0])
    attained = attained_by_randomized_response(records, epsilon)
    assert attained.shape == (3, 5)
    assert (attained <= gamma_approximate_dp(1 / records, epsilon, 0.0) + 1e-15).all()
    kappa = 1 / records
    np.testing.assert_allclose(
        attained * (1 + kappa * np.expm1(np.minimum(epsilon, 700))),
        kappa * np.exp(np.minimum(epsilon, 700)),
        rtol=1e-12,
    )


def test_gaussian_shifts():
    mu = np.linspace(0, 6, 13)
    # Two opposite shifts attain the bound; a simplex of two records is that.
    np.testing.assert_allclose(attained_by_antipodal(mu), gamma_gaussian(0.5, mu), rtol=1e-12)
    np.testing.assert_allclose(attained_by_simplex(2, mu), ndtr(mu), rtol=1e-9)
    assert attained_by_antipodal(1.0) == pytest.approx(0.841345, abs=5e-7)
    for records in (2, 3, 8, 1000):
        orthogonal = attained_by_orthogonal(records, mu)
        simplex = attained_by_simplex(records, mu)
        bound = gamma_gaussian(1 / records, mu)
        assert (orthogonal <= simplex + 1e-12).all() and (simplex <= bound + 1e-9).all()
        assert orthogonal[0] == pytest.approx(1 / records, rel=1e-9)


def test_orthogonal_shifts_of_the_replica():
    """Eight records, 100 full-batch steps at noise 40, 20, 10 and 5: success, and its bound."""
    mu = 10 / np.array([40, 20, 10, 5])
    np.testing.assert_allclose(
        attained_by_orthogonal(8, mu), [0.175, 0.236, 0.385, 0.711], atol=6e-4
    )
    np.testing.assert_allclose(gamma_gaussian(1 / 8, mu), [0.184, 0.258, 0.440, 0.802], atol=6e-4)
    rng = np.random.default_rng(0)
    seen = rng.normal(size=(200_000, 8))
    seen[:, 0] += mu[2]
    share = np.mean(seen.argmax(1) == 0)
    assert attained_by_orthogonal(8, mu[2]) == pytest.approx(share, abs=4e-3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: gamma_dp(1.1, 1.0), r"kappa must lie in \[0.0, 1.0\], got 1.1"),
        (lambda: gamma_dp(0.1, -1.0), "epsilon must lie in"),
        (lambda: gamma_dp(0.1, 1.0, 2.0), "delta must lie in"),
        (lambda: gamma_zcdp([0.1, np.nan], 1.0), "kappa must lie in"),
        (lambda: gamma_zcdp(0.1, -1.0), "rho must lie in"),
        (lambda: gamma_gaussian(0.1, -1.0), "mu must lie in"),
        (lambda: gamma_laplace(0.1, -1.0), "epsilon must lie in"),
        (lambda: gamma_rdp(0.1, [1.0]), "orders must be given where divergence holds values"),
        (lambda: gamma_rdp(0.1, [1.0], [1.0]), r"orders must lie above 1, got \[1.0\]"),
        (lambda: gamma_rdp(0.1, [], []), r"orders must lie above 1, got \[\]"),
        (lambda: gamma_rdp(0.1, [1.0], [2.0, 3.0]), "a value for every order"),
        (lambda: calibrate_epsilon(0.05, 0.1), "gamma must lie in"),
        (lambda: calibrate_epsilon(0.2, 0.1, 0.15), "gamma must be at least kappa"),
        (lambda: calibrate_rho(1.0, 0.1), "gamma must lie in"),
        (lambda: calibrate_mu(0.5, 0.0), "kappa must lie in"),
        (lambda: attained_by_simplex(1, 1.0), "num_records must lie in"),
        (lambda: rero.attained_by_randomized_response(0, 1.0), "num_records must lie in"),
    ],
)
def test_arguments_are_validated(call, words):
    with pytest.raises(ValueError, match=words):
        call()
