"""Densities, probabilities and their derivatives against scipy, quadrature and each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats

from invjax.defenses import densities
from invjax.defenses.densities import Noise, deviation

log_cdf = jax.jit(densities.log_cdf)
log_density = jax.jit(densities.log_density)
log_interval = jax.jit(densities.log_interval)
log_ndtr = jax.jit(densities.log_ndtr)
log_stochastic_rounding = jax.jit(densities.log_stochastic_rounding)

NOISES = {
    "gaussian": Noise(0.7),
    "laplace": Noise(None, 0.4),
    "both": Noise(0.7, 0.4),
    "mostly gaussian": Noise(2.0, 0.1),
    "mostly laplace": Noise(0.01, 1.0),
}


@pytest.fixture(params=NOISES, ids=str)
def noise(request):
    return NOISES[request.param]


def far(noise):
    return 40 * float(deviation(noise))


def test_densities_integrate_to_one(noise):
    with jax.enable_x64(True):
        x = np.linspace(-far(noise), far(noise), 400_001)
        mass = integrate.trapezoid(np.exp(np.asarray(log_density(noise, jnp.asarray(x)))), x)
    assert mass == pytest.approx(1.0, abs=1e-5)


def test_second_moment_is_the_deviation(noise):
    with jax.enable_x64(True):
        x = np.linspace(-far(noise), far(noise), 400_001)
        density = np.exp(np.asarray(log_density(noise, jnp.asarray(x))))
    variance = integrate.trapezoid(x**2 * density, x)
    assert np.sqrt(variance) == pytest.approx(float(deviation(noise)), rel=1e-4)


def test_density_is_the_derivative_of_the_distribution_function(noise):
    with jax.enable_x64(True):
        # An even number: at zero the Laplace density has a kink, where a derivative is a convention.
        x = jnp.linspace(-6.0, 6.0, 100) * deviation(noise)
        slope = jax.jit(jax.vmap(jax.grad(lambda x: jnp.exp(log_cdf(noise, x)))))(x)
        density = jnp.exp(log_density(noise, x))
    np.testing.assert_allclose(slope, density, rtol=1e-5, atol=1e-9)


def test_both_noises_are_the_convolution(key):
    scale, laplace = 0.7, 0.4
    with jax.enable_x64(True):
        grid = np.linspace(-30, 30, 600_001)
        for x in (-3.0, -0.5, 0.0, 1.2, 4.0):
            exact = integrate.trapezoid(
                stats.norm.pdf(x - grid, scale=scale) * stats.laplace.pdf(grid, scale=laplace), grid
            )
            value = log_density(Noise(scale, laplace), jnp.asarray(x))
            assert float(value) == pytest.approx(np.log(exact), abs=1e-6)


@pytest.mark.parametrize("laplace", [0.0, 0.02, 0.07])
def test_narrow_laplace_parts_are_gaussian(laplace):
    x = jnp.linspace(-4.0, 4.0, 41)
    noise = Noise(jnp.asarray(2.0), jnp.asarray(laplace))
    total = np.sqrt(4 + 2 * laplace**2)
    np.testing.assert_allclose(log_density(noise, x), stats.norm.logpdf(x, scale=total), atol=2e-4)
    np.testing.assert_allclose(log_cdf(noise, x), stats.norm.logcdf(x, scale=total), atol=2e-4)


def test_log_ndtr_and_its_derivative_in_float32():
    x = np.concatenate([-np.logspace(-3, 15, 200), np.linspace(-6, 6, 100)]).astype(np.float32)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(log_ndtr(x), special.log_ndtr(exact), rtol=2e-6, atol=1e-7)
    slope = np.sqrt(2 / np.pi) / special.erfcx(-exact / np.sqrt(2))
    np.testing.assert_allclose(jax.vmap(jax.grad(log_ndtr))(x), slope, rtol=1e-5)


def test_cdf_tails_are_finite_and_increasing(noise):
    x = jnp.linspace(-1e5, 1e5, 2001)
    value = np.asarray(log_cdf(noise, x))
    assert np.isfinite(value).all()
    assert (np.diff(value) >= 0).all()
    assert value[-1] == 0
    slope = jax.jit(jax.vmap(jax.grad(lambda x: log_cdf(noise, x))))(x)
    assert np.isfinite(np.asarray(slope)).all()


def test_normal_interval_against_scipy():
    location = np.linspace(-6.0, 6.0, 61)
    exact = stats.norm.cdf((1.8 - location) / 0.7) - stats.norm.cdf((-0.8 - location) / 0.7)
    with jax.enable_x64(True):
        value = log_interval(jnp.asarray(location), 0.5, 1.3, Noise(0.7))
    np.testing.assert_allclose(jnp.exp(value), exact, rtol=1e-5, atol=1e-14)


@pytest.mark.parametrize("width", [1e-4, 0.01, 0.03, 0.04, 0.3, 3.0])
def test_intervals_tile_the_line(noise, width):
    half = width * float(deviation(noise)) / 2
    with jax.enable_x64(True):
        centers = jnp.arange(-half * 1000, half * 1000, 2 * half)
        mass = jnp.exp(log_interval(0.3 * half, centers, half, noise)).sum()
        edge = centers[0] - half, centers[-1] + half
        inside = jnp.exp(log_cdf(noise, edge[1] - 0.3 * half)) - jnp.exp(
            log_cdf(noise, edge[0] - 0.3 * half)
        )
    assert float(mass) == pytest.approx(float(inside), rel=2e-3)


def test_interval_gradient_pulls_from_afar(noise):
    gradient = jax.jit(jax.grad(lambda x: log_interval(x, 0.0, 0.5, noise)))
    for distance in (3.0, 1e2, 1e4):
        assert -gradient(distance) > 0.05
        assert float(gradient(-distance)) == pytest.approx(-float(gradient(distance)))
    assert abs(gradient(0.0)) < 1e-6


def test_stochastic_rounding_is_normalised_and_walled():
    step, noise = jnp.asarray(0.5), Noise(jnp.asarray(1e-3))
    grid = jnp.arange(-5, 6) * step
    for location in (0.1, 0.25, -0.7):
        mass = jnp.exp(log_stochastic_rounding(grid - location, step, noise)).sum()
        assert float(mass) == pytest.approx(1.0, abs=1e-5)
    slope = jax.grad(lambda h: log_stochastic_rounding(-h, step, noise))
    assert slope(3.0) < -1e3
