"""The blow-up function by FFT: values, both sides of the truth, and dp-accounting's."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtr, ndtri

from invjax.theory import loss_grid, privacy_loss
from invjax.theory.privacy_loss import ceiling, fft_blowup, fft_delta
from invjax.theory.rero import gamma_gaussian

# kappa, sampling rate, noise multiplier, steps, gamma
VALUES = [
    (0.1, 1, 1, 1, 0.389144),
    (0.1, 1, 0.5, 1, 0.763760),
    (0.01, 1, 1, 1, 0.092362),
    (0.1, 0.1, 1, 1, 0.128914),
    (0.1, 0.5, 1, 1, 0.244572),
    (0.125, 1, 27, 100, 0.217702),
    (0.125, 1, 9.5, 100, 0.461078),
    (0.125, 1, 5, 100, 0.802240),
    (0.1, 0.1, 1, 100, 0.46919),
    (0.1, 0.02, 0.6, 1000, 0.73501),
    (0.1, 0.01, 1, 2000, 0.24359),
    (0.01, 0.1, 1, 100, 0.14605),
    (0.01, 1, 40, 100, 0.01893),
]


def both(kappa, rate, noise, steps, **options):
    return [
        fft_blowup(kappa, noise, rate, steps, certified=certified, **options)
        for certified in (False, True)
    ]


def closed_form(kappa, rate, noise, steps):
    """Where there is one: full batches, or one step."""
    assert rate == 1 or steps == 1
    return (1 - rate) * kappa + rate * ndtr(ndtri(kappa) + math.sqrt(steps) / noise)


@pytest.mark.parametrize(("kappa", "rate", "noise", "steps", "gamma"), VALUES)
def test_reference_values(kappa, rate, noise, steps, gamma):
    lower, upper = both(kappa, rate, noise, steps)
    assert lower == pytest.approx(gamma, abs=1e-5)
    assert lower <= upper <= lower + 2e-6
    if rate == 1 or steps == 1:
        exact = closed_form(kappa, rate, noise, steps)
        assert lower <= exact <= upper
        assert upper - exact < 1e-6 and exact - lower < 1e-6


@pytest.mark.parametrize(
    ("rate", "noise", "steps"),
    [(0.3, 0.7, 1), (1, 2, 4), (0.9999, 1.5, 1), (1e-4, 1, 1), (0.1, 0.1, 1), (1, 300, 10**5)],
)
def test_certificate_holds_against_closed_forms(rate, noise, steps):
    """On both sides of the truth at every kappa, on coarse grids as well."""
    kappa = np.concatenate((np.logspace(-9, -1, 30), np.linspace(0.1, 1, 60)))
    exact = closed_form(kappa, rate, noise, steps)
    for num_bins in (64, 1024, None):
        lower, upper = both(kappa, rate, noise, steps, num_bins=num_bins)
        assert (lower <= exact + 1e-15).all() and (exact <= upper).all()
        assert (upper >= kappa).all() and (upper <= 1).all() and (lower >= kappa).all()
    # Rounding is allowed for in the sizes of tests too, which costs where gamma is steep.
    assert (upper - exact).max() < 5e-5 and (exact - lower)[kappa > 0.01].max() < 5e-5


@pytest.mark.parametrize(
    ("rate", "noise", "steps", "gap"),
    [
        (0.01, 1, 2000, 5e-6),
        (0.5, 30, 2000, 5e-6),
        (0.01, 0.3, 2000, 5e-6),
        (0.9999, 50, 2000, 5e-6),
        (0.2, 0.05, 3, 1e-4),
        (1e-4, 0.5, 1000, 5e-6),
        (1e-6, 1, 10_000, 5e-6),
        (0.001, 0.7, 100_000, 1e-4),
    ],
)
def test_both_sides_are_close(rate, noise, steps, gap):
    kappa = np.array([1e-4, 0.01, 0.1, 0.5, 0.9])
    lower, upper = both(kappa, rate, noise, steps)
    assert (lower <= upper).all() and (upper - lower < gap).all()


@pytest.mark.parametrize(
    ("noise", "low", "high", "delta"),
    [(0.5, 0.10119, 0.10146, 6.9e-5), (100, 0.1, 0.10003, 5e-6), (1e4, 0.1, 0.10001, 5e-6)],
)
def test_a_record_that_is_hardly_ever_taken(noise, low, high, delta):
    """A single large loss decides, or bins are wide beside a step's loss."""
    lower, upper = both(0.1, 1e-6, noise, 10**6)
    assert low <= lower + 1e-9 and lower <= upper <= high
    assert fft_delta(0.04, noise, 1e-6, 10**6) <= delta


@pytest.mark.parametrize("rate", [1e-300, 1e-16, 0.1, 1.0])
@pytest.mark.parametrize("noise", [1e-200, 1e-10, 1e-4, 0.02, 1e15, 1e200, np.int64(2)])
@pytest.mark.filterwarnings("error")
def test_extreme_settings(rate, noise):
    kappa = np.array([0.0, 1e-3, 0.1, 0.9, 1.0])
    lower, upper = both(kappa, rate, noise, 4)
    assert (kappa <= lower).all() and (lower <= upper).all() and (upper <= 1).all()
    assert 0 <= fft_delta(0.1, noise, rate, 4) <= 1
    if noise < 0.1:
        exact = (1 - (1 - rate) ** 4 * (1 - kappa))[1:]
        np.testing.assert_allclose([lower[1:], upper[1:]], [exact, exact], rtol=1e-12)
    if noise > 1e10:
        np.testing.assert_allclose([lower, upper], [kappa, kappa], atol=1e-14)


def test_the_ceiling_holds():
    kappa = np.linspace(0, 1, 21)
    for rate, noise, steps in ((0.3, 0.7, 1), (0.9, 20, 1), (1, 30, 4), (1, 0.1, 2), (0.01, 3, 1)):
        assert (ceiling(kappa, noise, rate, steps) >= closed_form(kappa, rate, noise, steps)).all()
    assert ceiling(0.1, 1e-9, 0.2, 3) == pytest.approx(1 - 0.8**3 * 0.9)
    assert ceiling(0.1, 30.0, 1e-3, 3) == pytest.approx(0.1 + 3e-3 * (2 * ndtr(1 / 60) - 1))
    assert ceiling(0.1, 30.0, 1.0, 4) == pytest.approx(0.1 + 2 * ndtr(1 / 30) - 1)


@pytest.mark.parametrize("noise", [0.3, 1.0, 3.0])
def test_certificate_holds_at_a_tiny_kappa(noise):
    kappa = np.logspace(-15, -10, 11)
    assert (fft_blowup(kappa, noise, 0.3, 1) >= closed_form(kappa, 0.3, noise, 1)).all()


def test_what_may_be_off_is_added_to_delta(monkeypatch):
    epsilon = np.array([0.1, 0.5])
    delta = [fft_delta(shifted, 1.0, 0.3, 2) for shifted in (epsilon, epsilon - 0.05)]
    sticks = privacy_loss._hockey_sticks

    def changed(**changes):
        monkeypatch.setattr(
            privacy_loss, "_hockey_sticks", lambda *args: sticks(*args)._replace(**changes)
        )
        return fft_delta(epsilon, 1.0, 0.3, 2)

    np.testing.assert_allclose(changed(slack=0.01) - delta[0], 0.01, atol=1e-9)
    np.testing.assert_allclose(changed(shift=0.05), delta[1], atol=1e-9)


def test_what_may_be_off_is_added():
    """Of a loss that is misplaced, and of mass that is lost."""
    law = loss_grid.Law(1.0, 0.3)
    grid = loss_grid.make_grid(loss_grid.make_window(law, 2), 2, None)
    step = loss_grid.split_step(law, grid)
    sticks = privacy_loss._hockey_sticks(grid, step, 0.125)
    assert 0 < step.misplaced < 1e-12 and 0 < step.error < 1e-8
    assert sticks.shift == 2 * step.misplaced
    assert sticks.slack - 0.125 >= loss_grid.roundoff(step.masses, step.error, grid) > 0
    kappa = np.array([1e-3, 0.1])
    certified = privacy_loss._upper(kappa, sticks)
    none = privacy_loss._upper(kappa, privacy_loss._hockey_sticks(grid, step, 0.0))
    np.testing.assert_allclose(certified - none, 0.125, rtol=1e-12)
    moved = privacy_loss._upper(kappa, sticks._replace(shift=0.01))
    np.testing.assert_allclose(moved, privacy_loss._upper(kappa * np.exp(0.01), sticks), atol=1e-6)
    assert (moved > certified).all()
    # Every bin's error is at least that of the tails it is cut from.
    points = np.linspace(-2.0, 3.0, 11)
    tails = loss_grid.bin_masses(points, law)[2]
    assert (tails[1] >= 0.3 * tails[0]).all() and (tails > 0).all()


@pytest.mark.parametrize(("rate", "noise"), [(0.3, 1.0), (1e-6, 1.0), (0.5, 1e4), (1.0, 300.0)])
def test_points_are_misplaced_by_no_more_than_said(rate, noise):
    """The loss at the outcomes that stand for the grid's points, in wider floats."""
    law = loss_grid.Law(noise, rate)
    grid = loss_grid.make_grid(loss_grid.make_window(law, 100), 100, 2**12)
    first, last, _ = loss_grid.first_and_last(law, grid)
    losses = np.arange(first, last + 1) * grid.width
    points = loss_grid.outcomes(losses, law)
    seen = np.isfinite(points)
    wide = points[seen].astype(np.longdouble)
    taken = np.log(np.longdouble(rate)) + (wide - 0.5) / np.longdouble(noise) ** 2
    with np.errstate(divide="ignore"):
        exact = np.logaddexp(np.log1p(-np.longdouble(rate)), taken)
    misplaced = np.abs(exact - losses[seen]).max()
    said = loss_grid.misplaced(points, losses, law)
    assert 0 < misplaced <= said < 1e4 * misplaced


def test_coarse_certificates_stay_above_fine_ones():
    kappa = np.linspace(0.01, 0.9, 20)
    truth = both(kappa, 0.1, 1, 50)
    for num_bins in (64, 256, 1000, 4096):
        lower, upper = both(kappa, 0.1, 1, 50, num_bins=num_bins)
        assert (lower <= truth[1]).all() and (upper >= truth[0]).all()
    assert (both(kappa, 0.1, 1, 50, num_bins=256)[1] - truth[1] > 1e-6).any()


def test_error_is_quadratic_in_the_bins():
    """What splitting to both ends brings over rounding up."""
    truth = fft_blowup(0.1, 1.0, 0.1, 100, certified=False)
    coarse, fine = (
        fft_blowup(0.1, 1.0, 0.1, 100, num_bins=bins) - truth for bins in (2**10, 2**12)
    )
    assert coarse / fine == pytest.approx(16, rel=0.3)


def test_it_is_concave_and_monotone():
    kappa = np.linspace(0, 1, 201)
    for certified in (False, True):
        found = fft_blowup(kappa, 0.8, 0.05, 200, certified=certified)
        assert (np.diff(found) >= 0).all() and (np.diff(found, 2) <= 1e-6).all()
    assert fft_blowup(kappa.reshape(3, 67), 0.8, 0.05, 200).shape == (3, 67)
    assert np.shape(fft_blowup(0.1, 0.8, 0.05, 200)) == ()


def test_delta_agrees_with_dp_accounting():
    from dp_accounting.pld import privacy_loss_distribution as pld

    rate, noise, steps = 0.1, 1.5, 30
    one = pld.from_gaussian_mechanism(noise, sampling_prob=rate, value_discretization_interval=5e-4)
    theirs = one.self_compose(steps)
    epsilon = np.linspace(0, 3, 61)
    delta = theirs.get_delta_for_epsilon(epsilon)
    np.testing.assert_allclose(fft_delta(epsilon, noise, rate, steps), delta, rtol=1e-3, atol=1e-6)
    # The same blow-up function, as the lower envelope of lines.
    kappa = np.array([0.001, 0.01, 0.1])
    lines = np.exp(epsilon)[:, None] * kappa + np.array(delta)[:, None]
    found = fft_blowup(kappa, noise, rate, steps)
    assert (lines.min(0) >= found - 1e-6).all()
    np.testing.assert_allclose(lines.min(0), found, rtol=2e-3)


def test_delta_of_full_batches():
    """Balle and Wang 2018, theorem 8."""
    mu, epsilon = math.sqrt(20) / 8, np.array([0.0, 0.5, 1.0, 2.0])
    exact = ndtr(mu / 2 - epsilon / mu) - np.exp(epsilon) * ndtr(-mu / 2 - epsilon / mu)
    found = fft_delta(epsilon, 8, 1, 20)
    assert (found >= exact).all() and (found - exact < 2e-6).all()
    assert gamma_gaussian(0.1, mu) <= (np.exp(epsilon) * 0.1 + found).min()
    mu = math.sqrt(1e5) / 300
    exact = ndtr(mu / 2 - epsilon / mu) - np.exp(epsilon) * ndtr(-mu / 2 - epsilon / mu)
    found = fft_delta(epsilon, 300, 1, 10**5)
    assert (found >= exact).all() and (found - exact < 1e-4).all()
    assert fft_delta(1e6, 300, 1, 10**5) < 1e-4
    assert fft_delta(1e4, 1e-3, 0.1, 10**4) == pytest.approx(1)  # in bins wider than 700


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fft_blowup(1.5, 1, 0.1, 1), r"kappa must lie in \[0, 1\], got 1.5"),
        (lambda: fft_blowup(0.1, 0, 0.1, 1), "noise_multiplier must lie in"),
        (lambda: fft_blowup(0.1, math.inf, 0.1, 1), "noise_multiplier must lie in"),
        (lambda: fft_blowup(0.1, 1, 0.0, 1), "sampling_rate must lie in"),
        (lambda: fft_blowup(0.1, 1, jnp.asarray(1.5), 1), "sampling_rate must lie in"),
        (lambda: fft_blowup(0.1, jnp.asarray(-1.0), 0.1, 1), "noise_multiplier must lie in"),
        (lambda: fft_blowup(0.1, 1, 1.1, 1), "sampling_rate must lie in"),
        (lambda: fft_blowup(0.1, 1, 0.1, 0), "steps must lie in"),
        (lambda: fft_blowup(0.1, 1, 0.1, 1.5), "steps must be a whole number, got 1.5"),
        (lambda: fft_blowup(0.1, 1, 0.1, math.inf), "steps must lie in"),
        (lambda: fft_blowup(0.1, 1, 0.1, 1, num_bins=2), "num_bins must be a whole number"),
        (lambda: fft_blowup(0.1, 1e-9, 0.1, 1, num_bins=2), "num_bins must be a whole number"),
        (lambda: fft_delta(-1.0, 1, 0.1, 1), "epsilon must be at least 0"),
    ],
)
def test_arguments_are_validated(call, words):
    with pytest.raises(ValueError, match=words):
        call()
