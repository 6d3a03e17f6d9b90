"""Rényi accounting, error floors, and how differently the same epsilon protects."""

import math

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import ndtr

from invjax.defenses import privacy_spent
from invjax.theory import accounting
from invjax.theory.accounting import (
    ORDERS,
    mean_square_floor,
    noise_for_epsilon,
    renyi_divergences,
    renyi_epsilon,
    renyi_two_replacement,
    same_epsilon,
)
from invjax.theory.blowup import blowup
from invjax.theory.rero import gamma_dp, gamma_rdp, gamma_zcdp

TABLE = {
    75: 0.5120636747,
    40: 1.0125506278,
    27: 1.5567628737,
    21: 2.0517974849,
    9.5: 5.0159473,
    5: 10.7255097,
}


@pytest.mark.parametrize("noise", TABLE)
def test_epsilon_of_a_hundred_full_batches(noise):
    """Twice: dp-accounting's, and the Gaussian's divergences by hand."""
    found = renyi_epsilon(noise, 1.0, 100, 1e-5)
    assert found == pytest.approx(TABLE[noise], abs=1e-6)
    orders = np.array(ORDERS)
    divergences = 100 * orders / (2 * noise**2)
    np.testing.assert_allclose(renyi_divergences(noise, 1.0, 100), divergences, rtol=1e-12)
    each = divergences + np.log1p(-1 / orders) - np.log(1e-5 * orders) / (orders - 1)
    assert found == pytest.approx(each.min(), abs=1e-10)
    assert privacy_spent(noise, 10, 10, 100, 1e-5) < found


def test_subsampled_order_two():
    rate, noise = 0.03, 1.1
    exact = 7 * math.log1p(rate**2 * math.expm1(1 / noise**2))
    assert renyi_divergences(noise, rate, 7, [2])[0] == pytest.approx(exact, rel=1e-9)


# Epsilon by Renyi divergences at delta 1e-5: gamma at kappa 0.1 and 0.001, zCDP's, kappa e^eps + delta.
PROTECTION = [
    (1, 0.150, 0.0022, 0.165, 0.272),
    (2, 0.207, 0.0043, 0.244, 0.739),
    (4, 0.338, 0.013, 0.440, 1),
    (8, 0.613, 0.064, 0.846, 1),
    (16, 0.930, 0.370, 1, 1),
]


@pytest.mark.parametrize(("epsilon", "gamma", "rare", "zcdp", "naive"), PROTECTION)
def test_success_at_an_epsilon(epsilon, gamma, rare, zcdp, naive):
    noise = brentq(lambda noise: renyi_epsilon(noise, 1.0, 100, 1e-5) - epsilon, 2, 60, rtol=1e-9)
    assert blowup(0.1, noise, 1.0, 100) == pytest.approx(gamma, abs=6e-4)
    digits = 10 ** math.floor(math.log10(rare)) * (0.006 if rare > 0.1 else 0.06)
    assert blowup(1e-3, noise, 1.0, 100) == pytest.approx(rare, abs=digits)
    assert gamma_zcdp(0.1, 50 / noise**2) == pytest.approx(zcdp, abs=6e-4)
    assert gamma_dp(0.1, epsilon, 1e-5) == pytest.approx(naive, abs=6e-4)


def test_renyi_bound_of_subsampled_steps_is_looser_than_the_blowup():
    orders = list(range(2, 65))
    kappa = np.array([1e-3, 0.1, 0.5])
    loose = gamma_rdp(kappa, renyi_divergences(1.0, 0.02, 300, orders), orders)
    exact = blowup(kappa, 1.0, 0.02, 300)
    assert (exact < loose).all() and (loose < gamma_zcdp(kappa, 150)).all()


@pytest.mark.parametrize("rate", [0.01, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("noise", [0.5, 1.0, 4.0])
def test_replacement_of_order_two(rate, noise):
    """Against the integral, for opposite gradients, which are worst, and some others."""
    points = np.linspace(-14 * noise - 6, 14 * noise + 6, 40_001)

    def density(center):
        return np.exp(-(((points - center) / noise) ** 2) / 2) / (noise * math.sqrt(2 * math.pi))

    def divergence(first, second):
        over, under = (
            (1 - rate) * density(0.0) + rate * density(center) for center in (first, second)
        )
        return math.log(np.sum(over**2 / under) * (points[1] - points[0]))

    hidden = renyi_two_replacement(noise, rate, 1)
    worst = divergence(-1.0, 1.0)
    assert hidden >= worst - 1e-9
    assert worst >= max(divergence(0.5, -0.7), divergence(0.0, 1.0), divergence(1.0, 0.0))
    revealed = renyi_two_replacement(noise, rate, 1, "revealed")
    assert revealed == pytest.approx(math.log1p(rate * math.expm1(4 / noise**2)), rel=1e-12)
    assert hidden <= revealed
    if rate == 1:
        assert hidden == pytest.approx(4 / noise**2) == pytest.approx(worst, rel=1e-6)
    assert renyi_two_replacement(noise, rate, 9) == pytest.approx(9 * hidden)
    assert np.isfinite(renyi_two_replacement(0.01, rate, 9))


def test_floor_of_the_mean_square_error():
    assert mean_square_floor(0.0) == 0.25  # a constant guess
    assert mean_square_floor(1e4) == 0
    assert mean_square_floor(2.0, 3.0) == pytest.approx(9 * mean_square_floor(2.0))
    # The best reconstruction of a bit in Gaussian noise, half a chance each: the mean given the outcome.
    for noise in (0.3, 1.0, 3.0, 30.0):
        points = np.linspace(-12 * noise, 12 * noise, 20_001)
        weights = np.exp(-((points / noise) ** 2) / 2)
        guess = 1 / (1 + np.exp((0.5 - points) / noise**2))
        reached = np.sum(weights * guess**2) / weights.sum()
        assert mean_square_floor(1 / noise**2) <= reached
    assert mean_square_floor(1 / 900) == pytest.approx(reached, rel=0.05)


def test_noise_for_epsilon():
    """Without sampling, by the Gaussian mechanism's own delta (Balle and Wang 2018)."""
    noise = noise_for_epsilon(2.0, 1e-5, 10, 10, 100)
    mu = 10 / noise
    delta = ndtr(mu / 2 - 2 / mu) - math.exp(2) * ndtr(-mu / 2 - 2 / mu)
    assert delta == pytest.approx(1e-5, rel=1e-4)


@pytest.mark.filterwarnings("error")
def test_noise_for_a_large_epsilon():
    """Beyond what an exponential holds; there is one full batch at most a deviation from half of mu^2."""
    noise = noise_for_epsilon(1e6, 1e-5, 10, 10, 1)
    assert 1 / (2 * noise**2) == pytest.approx(1e6, rel=0.01)
    assert noise_for_epsilon(1.0, 1e-300, 10, 10, 1) > noise_for_epsilon(1.0, 1e-100, 10, 10, 1)
    assert 0 < noise_for_epsilon(1.0, 0.5, 10, 10, 1) < 1


def test_noise_for_epsilon_spends_it():
    """At a delta below the fast accounting's round-off, where its guess is far off."""
    noise = noise_for_epsilon(2.0, 1e-11, 100, 10, 5)
    assert privacy_spent(noise, 100, 10, 5, 1e-11) == pytest.approx(2.0, rel=1e-3)


def test_noise_for_epsilon_says_where_it_fails(monkeypatch):
    with pytest.raises(ValueError, match=r"delta must lie below 0.01, got 0.1: .* without noise"):
        noise_for_epsilon(1.0, 0.1, 1000, 10, 1)
    with pytest.raises(ValueError, match="delta must lie below"):
        same_epsilon(1.0, 0.1, 0.1, 1000, [(10, 1)])
    for spent in (0.0, 1.5, math.inf):
        monkeypatch.setattr(accounting, "privacy_spent", lambda *args, spent=spent: spent)
        with pytest.raises(ValueError, match=f"it finds {spent:g}, after 30 corrections"):
            noise_for_epsilon(1.0, 1e-3, 100, 10, 2)


@pytest.mark.filterwarnings("error")
def test_order_two_of_extreme_noise():
    assert renyi_two_replacement(1e200, 0.1, 5) == 0
    assert renyi_two_replacement(1e-160, 0.1, 5) == math.inf
    assert renyi_two_replacement(np.int64(2), 0.1, 5) == renyi_two_replacement(2.0, 0.1, 5)


@pytest.mark.slow
def test_the_same_epsilon_protects_differently():
    """Hayes et al. 2023: fewer expected participations at less noise leak fewer records."""
    kappa = np.array([0.1, 0.01])
    full, rare = same_epsilon(4.0, 1e-5, kappa, 1000, [(1000, 100), (10, 100)])
    assert (full.batch_size, full.steps, rare.batch_size) == (1000, 100, 10)
    np.testing.assert_array_equal(full.hidden, full.revealed)
    np.testing.assert_allclose(full.hidden, [0.3607, 0.0805], atol=5e-4)
    np.testing.assert_allclose(rare.hidden, [0.1868, 0.0353], atol=5e-4)
    assert rare.noise_multiplier == pytest.approx(0.5905, abs=1e-3)
    assert (rare.hidden < rare.revealed).all()
    assert rare.revealed[0] == pytest.approx(0.534, abs=2e-3)


@pytest.mark.slow
def test_sweep_at_one_epsilon():
    schedules = [(1000, 100), (100, 100), (100, 1000), (10, 1000), (10, 100)]
    rows = same_epsilon(4.0, 1e-5, 0.1, 1000, schedules)
    hidden = [float(row.hidden) for row in rows]
    np.testing.assert_allclose(hidden, [0.3607, 0.3190, 0.3555, 0.2857, 0.1868], atol=5e-4)
    for row in rows:
        spent = privacy_spent(row.noise_multiplier, 1000, row.batch_size, row.steps, 1e-5)
        assert spent == pytest.approx(4.0, rel=1e-3)
        # Epsilon's own bound is 1 for all of them.
        assert gamma_dp(0.1, spent, 1e-5) == 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: renyi_divergences(0.0, 0.1, 1), "noise_multiplier must lie in"),
        (lambda: renyi_divergences(1.0, 0.1, 1, [1.0]), "orders must lie above 1"),
        (lambda: renyi_divergences(1.0, 0.1, 1, []), "orders must lie above 1"),
        (lambda: same_epsilon(1.0, 1e-5, 1.5, 10, []), "kappa must lie in"),
        (lambda: renyi_epsilon(1.0, 0.1, 1, 0.0), "delta must lie in"),
        (lambda: renyi_two_replacement(1.0, 0.0, 1), "sampling_rate must lie in"),
        (lambda: renyi_two_replacement(1.0, 0.1, 1, "seen"), "inclusion must be one of"),
        (lambda: renyi_two_replacement(1.0, 0.1, 1.5), "steps must be a whole number"),
        (lambda: noise_for_epsilon(1.0, 1e-5, 10, 1, 1.5), "steps must be a whole number"),
        (lambda: mean_square_floor(-1.0), "renyi_two must be at least 0, got -1.0"),
        (lambda: mean_square_floor(1.0, 0.0), "diameter must lie in"),
        (lambda: noise_for_epsilon(0.0, 1e-5, 10, 10, 1), "epsilon must lie in"),
        (lambda: noise_for_epsilon(1.0, 1e-5, 10, 11, 1), "batch_size must lie in"),
        (lambda: noise_for_epsilon(1.0, 1e-5, 10, 1, 0), "steps must lie in"),
    ],
)
def test_arguments_are_validated(call, words):
    with pytest.raises(ValueError, match=words):
        call()
