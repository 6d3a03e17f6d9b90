"""The blow-up function of DP-SGD: closed forms, Monte Carlo, both kinds of inclusion, calibration."""

import math

import jax
import numpy as np
import pytest
from scipy.special import comb, ndtr, ndtri

from invjax.theory.blowup import (
    blowup,
    calibrate_noise_multiplier,
    monte_carlo_blowup,
    revealed_blowup,
)
from invjax.theory.privacy_loss import fft_blowup
from invjax.theory.rero import gamma_gaussian, gamma_zcdp

KAPPA = np.array([1e-4, 0.01, 0.1, 0.5, 0.9])


def test_closed_forms_are_taken():
    full = ndtr(ndtri(KAPPA) + math.sqrt(50) / 7)
    for inclusion in ("hidden", "revealed"):
        found = blowup(KAPPA, 7.0, 1.0, 50, inclusion=inclusion)
        np.testing.assert_allclose(found, full, rtol=1e-12)
    one = 0.7 * KAPPA + 0.3 * ndtr(ndtri(KAPPA) + 1 / 0.8)
    np.testing.assert_allclose(blowup(KAPPA, 0.8, 0.3, 1), one, rtol=1e-12)


def test_the_methods_are_dispatched_to():
    setting = KAPPA, 1.0, 0.1, 30
    np.testing.assert_array_equal(blowup(*setting), fft_blowup(*setting))
    np.testing.assert_array_equal(
        blowup(*setting, certified=False), fft_blowup(*setting, certified=False)
    )
    np.testing.assert_array_equal(blowup(*setting, inclusion="revealed"), revealed_blowup(*setting))


@pytest.mark.parametrize(
    ("kappa", "noise"), [(0.1, 1.0), (0.1, 0.5), (0.01, 1.0), (0.1, 2.0), (0.5, 1.0)]
)
@pytest.mark.parametrize("rate", [1.0, 0.2])
def test_monte_carlo_of_one_step(kappa, noise, rate):
    found = monte_carlo_blowup(jax.random.key(3), kappa, noise, rate, 1, 100_000)
    exact = (1 - rate) * kappa + rate * gamma_gaussian(kappa, 1 / noise)
    assert found.value == pytest.approx(exact, abs=5e-3)
    assert abs(found.value - exact) < 4 * found.standard_error
    assert 0 < found.standard_error < 5e-3


@pytest.mark.parametrize(
    ("rate", "noise", "steps"),
    [
        (0.1, 1.0, 100),
        pytest.param(0.02, 0.6, 1000, marks=pytest.mark.slow),
        pytest.param(0.01, 1.0, 2000, marks=pytest.mark.slow),
    ],
)
def test_monte_carlo_agrees_with_the_fft(rate, noise, steps, key):
    kappa = np.array([0.01, 0.1, 0.5])
    found = monte_carlo_blowup(key, kappa, noise, rate, steps)
    exact = fft_blowup(kappa, noise, rate, steps)
    assert (np.abs(found.value - exact) < 3 * found.standard_error).all()
    assert (found.standard_error < 0.02).all()


def test_standard_error_is_the_deviation_over_keys():
    runs = [
        monte_carlo_blowup(key, KAPPA[1:], 1.0, 0.3, 4, 500)
        for key in jax.random.split(jax.random.key(1), 80)
    ]
    spread = np.std([run.value for run in runs], axis=0)
    np.testing.assert_allclose(np.mean([run.standard_error for run in runs], 0), spread, rtol=0.3)


def test_revealed_inclusion_at_its_thresholds():
    """Neyman and Pearson: threshold tests on the likelihood ratio of all that is seen."""
    rate, noise, steps = 0.2, 1.3, 12
    counts = np.arange(steps + 1)
    chances = comb(steps, counts) * rate**counts * (1 - rate) ** (steps - counts)
    gaps = np.sqrt(counts[1:]) / noise
    for threshold in (-2.0, -0.5, -1e-9, 1e-9, 0.3, 1.0, 4.0):
        size = chances[1:] @ ndtr(-threshold / gaps - gaps / 2) + chances[0] * (threshold < 0)
        power = chances[1:] @ ndtr(-threshold / gaps + gaps / 2) + chances[0] * (threshold < 0)
        assert revealed_blowup(size, noise, rate, steps) == pytest.approx(power, abs=1e-10)
    # Between the two around 0, the atom is cut by a coin.
    sizes = [
        chances[1:] @ ndtr(-gaps / 2),
        chances[1:] @ ndtr(-gaps / 2) + chances[0],
    ]
    powers = [value + chances[1:] @ (ndtr(gaps / 2) - ndtr(-gaps / 2)) for value in sizes]
    middle = revealed_blowup(np.mean(sizes), noise, rate, steps)
    assert middle == pytest.approx(np.mean(powers), abs=1e-10)


def test_revealed_reference_values():
    assert revealed_blowup(0.1, 1.0, 0.1, 100) == pytest.approx(0.9605, abs=5e-5)
    assert revealed_blowup(0.125, 1.0, 0.1, 100) == pytest.approx(0.971, abs=5e-4)
    assert blowup(0.125, 1.0, 0.1, 100) == pytest.approx(0.518, abs=5e-4)


@pytest.mark.filterwarnings("error")
def test_revealed_inclusion_keeps_what_the_sum_leaves_out():
    """Counts whose chance is below 1e-14 in all, which is much beside a tiny kappa."""
    for rate in (1e-15, 1e-12):
        power = 3 * rate * ndtr(10.0)  # a step took the record, and its outcome is above 1/2
        assert revealed_blowup(1e-16, 0.05, rate, 3) >= power
        assert revealed_blowup(1e-16, 1e-9, rate, 3) >= power


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("noise", "rate", "steps", "high"),
    [(0.5, 1e-6, 10**6, 0.10146), (100.0, 1e-6, 10**6, 0.10003), (1e6, 0.01, 10**6, 0.10002)],
)
def test_hidden_inclusion_is_no_worse_than_revealed(noise, rate, steps, high):
    bound = blowup(0.1, noise, rate, steps)
    assert 0.1 <= bound <= min(revealed_blowup(0.1, noise, rate, steps), high)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("inclusion", ["hidden", "revealed"])
def test_extreme_noise(inclusion):
    kappa = np.array([0.0, 1e-300, 0.1, 1.0])
    for noise in (1e-300, 1e-9, 1e-5, 1e-3):
        never = 0.9**4
        guessed = never * kappa if inclusion == "hidden" else np.minimum(never, kappa)
        exact = np.where(kappa > 0, 1 - never + guessed, 0.0)
        found = blowup(kappa, noise, 0.1, 4, inclusion=inclusion)
        np.testing.assert_allclose(found, exact, rtol=1e-12)
        assert blowup(0.1, noise, 1.0, 4, inclusion=inclusion) == 1
    for noise in (1e15, 1e200, 1e308):
        for rate in (0.1, 1.0):
            found = blowup(kappa, noise, rate, 4, inclusion=inclusion)
            np.testing.assert_allclose(found, kappa, rtol=1e-12)
    two = [blowup(kappa, noise, 0.1, 4, inclusion=inclusion) for noise in (2.0, np.int64(2))]
    np.testing.assert_array_equal(*two)


SETTINGS = [(0.1, 1.0, 10), (0.01, 0.7, 500), (0.5, 5.0, 100), (0.99, 3.0, 20), (1e-4, 0.5, 3)]


@pytest.mark.parametrize(("rate", "noise", "steps"), SETTINGS)
def test_order_and_monotonicity(rate, noise, steps):
    """Hidden, revealed, every step with the record, zCDP: each tells more, or bounds less tightly."""
    base = blowup(KAPPA, noise, rate, steps)
    revealed = blowup(KAPPA, noise, rate, steps, inclusion="revealed")
    full = gamma_gaussian(KAPPA, math.sqrt(steps) / noise)
    assert (base >= KAPPA).all() and (np.diff(base) >= 0).all()
    assert (base <= revealed + 2e-6).all() and (revealed <= full).all()
    assert (full <= gamma_zcdp(KAPPA, steps / (2 * noise**2))).all()
    more = [
        (noise, min(1.0, 1.2 * rate), steps),
        (noise, rate, 2 * steps),
        (0.8 * noise, rate, steps),
    ]
    for inclusion, least in (("hidden", base), ("revealed", revealed)):
        for setting in more:
            worse = blowup(KAPPA, *setting, inclusion=inclusion)
            assert (worse >= least - 2e-6).all() and worse.sum() > least.sum()


def test_a_tiny_kappa_is_not_drowned_by_the_certificate():
    """Its round-off is about 1e-7; every step with the record is a bound as well."""
    assert blowup(1e-200, 10.0, 0.5, 100) <= gamma_gaussian(1e-200, 1.0)
    assert blowup(0.0, 1.0, 0.5, 10) == 0 and blowup(1.0, 1.0, 0.5, 10) == 1


def test_calibration():
    assert calibrate_noise_multiplier(0.2, 0.1, 100) == pytest.approx(22.731, abs=5e-4)
    for gamma, kappa in ((0.2, 0.1), (0.5, 1e-3), (0.9, 0.3)):
        noise = calibrate_noise_multiplier(gamma, kappa, 100)
        assert blowup(kappa, noise, 1.0, 100) == pytest.approx(gamma, rel=1e-9)


@pytest.mark.parametrize("inclusion", ["hidden", "revealed"])
@pytest.mark.parametrize(("gamma", "rate", "steps"), [(0.3, 0.1, 50), (0.15, 0.3, 1)])
def test_calibration_inverts_the_bound(gamma, rate, steps, inclusion):
    noise = calibrate_noise_multiplier(gamma, 0.1, steps, rate, inclusion)
    reached = blowup(0.1, noise, rate, steps, inclusion=inclusion)
    assert gamma - 1e-5 < reached <= gamma
    assert blowup(0.1, noise * 0.9999, rate, steps, inclusion=inclusion) > gamma


def test_calibration_where_a_record_is_hardly_ever_taken():
    """Expected once, at a noise that every step with it would make useless."""
    noise = calibrate_noise_multiplier(0.1002, 0.1, 10**6, 1e-6)
    assert 1 < noise < 1.2 and blowup(0.1, noise, 1e-6, 10**6) <= 0.1002


def test_calibration_knows_what_revealed_inclusion_reaches():
    """Without noise 0.29 where inclusion is revealed, and 0.271 where it is hidden."""
    noise = calibrate_noise_multiplier(0.28, 0.1, 2, 0.1, "revealed")
    assert 0.28 - 1e-5 < blowup(0.1, noise, 0.1, 2, inclusion="revealed") <= 0.28
    for gamma, inclusion in ((0.28, "hidden"), (0.2901, "revealed")):
        with pytest.raises(ValueError, match="not even reached without noise"):
            calibrate_noise_multiplier(gamma, 0.1, 2, 0.1, inclusion)


def test_calibration_close_to_the_blind_guess():
    """Where the certificate's own error is larger than the margin: full batches decide."""
    noise = calibrate_noise_multiplier(0.1 + 1e-8, 0.1, 9, 0.1)
    assert blowup(0.1, noise, 0.1, 9) <= 0.1 + 1e-8


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda key: blowup([0.1, -1], 1.0, 0.1, 2), r"kappa must lie in \[0, 1\]"),
        (lambda key: blowup(0.1, -1.0, 0.1, 2), "noise_multiplier must lie in"),
        (lambda key: blowup(0.1, 1.0, 0.1, 2, inclusion="seen"), "inclusion must be one of"),
        (lambda key: revealed_blowup(0.1, 1.0, 2.0, 2), "sampling_rate must lie in"),
        (lambda key: blowup(0.1, 1.0, 1.0, 1.5), "steps must be a whole number, got 1.5"),
        (lambda key: revealed_blowup(0.1, 1.0, 0.1, 1.5), "steps must be a whole number"),
        (lambda key: monte_carlo_blowup(key, 0.1, 1.0, 0.1, 0), "steps must lie in"),
        (lambda key: monte_carlo_blowup(key, 0.1, 1.0, 0.1, 2, 1), "num_samples must be a whole"),
        (lambda key: calibrate_noise_multiplier(0.1, 0.1, 2), "gamma must lie in"),
        (lambda key: calibrate_noise_multiplier(0.2, 0.1, 0), "steps must lie in"),
        (lambda key: calibrate_noise_multiplier(0.3, 0.1, 2, 1.5), "sampling_rate must lie in"),
        (
            lambda key: calibrate_noise_multiplier(0.9, 0.1, 2, 0.01),
            "not even reached without noise",
        ),
    ],
)
def test_arguments_are_validated(call, words, key):
    with pytest.raises(ValueError, match=words):
        call(key)
