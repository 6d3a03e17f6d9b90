"""The table of bounds: every row's formula, its limits, and the constant's closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from invjax.theory import two_layer
from invjax.theory.two_layer import Constants, Setting, lower_constant

SETTING = Setting(batch_size=4, dimension=32, width=2000)
RATE = np.sqrt(32 / 2000)
STD = 0.3
TWICE = Constants(upper=2.0, lower=0.5)

# Every row with the published formulas of both sides; the deviation is 0.3.
ROWS = {
    "undefended": (lambda c: two_layer.undefended(SETTING, STD, c), 4, STD),
    "local steps": (lambda c: two_layer.local_steps(SETTING, STD, 5, c), 20, STD),
    "noise": (lambda c: two_layer.gaussian_noise(SETTING, STD, c), 4.3, STD),
    "dp-sgd": (lambda c: two_layer.dp_sgd(SETTING, STD, 2.0, 7.0, c), 4 + 1.05, 1.05),
    "dp-sgd, nothing clipped": (lambda c: two_layer.dp_sgd(SETTING, STD, 9.0, 7.0, c), 4.3, STD),
    "dp-sgd, in units of the radius": (
        lambda c: two_layer.dp_sgd(SETTING, STD, 2.0, 7.0, c, noise_scale_by_clip=True),
        4 + 2.1,
        2.1,
    ),
    "dropout": (lambda c: two_layer.dropout(SETTING, STD, 0.75, c), 8, 2 * STD),
    "pruning": (lambda c: two_layer.pruning(SETTING, STD, 0.25, c), None, 2 * STD),
    "secure aggregation": (lambda c: two_layer.secure_aggregation(SETTING, 9, c), 9, None),
}


@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_the_published_one(name):
    make, upper, lower = ROWS[name]
    for constants in (two_layer.UNIT, TWICE):
        found = make(constants)
        for value, expected, constant in zip(found, (upper, lower), constants, strict=True):
            if expected is None:
                assert value is None
            else:
                np.testing.assert_allclose(value, constant * expected * RATE, rtol=1e-5)


def test_sizes_enter_by_their_powers():
    def both(**change):
        return np.array(two_layer.gaussian_noise(SETTING._replace(**change), STD))

    base = both()
    np.testing.assert_allclose(both(width=8000), base / 2, rtol=1e-5)
    np.testing.assert_allclose(both(dimension=128), base * 2, rtol=1e-5)
    np.testing.assert_allclose(both(batch_size=8) / base, [8.3 / 4.3, 1], rtol=1e-5)


def test_sizes_may_be_traced():
    def run(width, std, norm):
        return two_layer.dp_sgd(SETTING._replace(width=width), std, 2.0, norm)

    found = jax.jit(jax.vmap(run))(jnp.array([2000.0, 8000.0]), jnp.full(2, STD), jnp.full(2, 7.0))
    np.testing.assert_allclose(found.lower, [1.05 * RATE, 1.05 * RATE / 2], rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: two_layer.undefended(SETTING._replace(width=0), STD), "width must lie in"),
        (lambda: two_layer.undefended(SETTING, -1.0), "std must lie in"),
        (lambda: two_layer.local_steps(SETTING, STD, 0), "num_steps must lie in"),
        (lambda: two_layer.dp_sgd(SETTING, STD, 0.0, 1.0), "clip_norm must lie in"),
        (lambda: two_layer.dp_sgd(SETTING, STD, 1.0, -1.0), "gradient_norm must lie in"),
        (lambda: two_layer.dropout(SETTING, STD, 1.0), "rate must lie in"),
        (lambda: two_layer.pruning(SETTING, STD, 0.0), "kept must lie in"),
        (lambda: two_layer.secure_aggregation(SETTING, 0), "num_clients must lie in"),
        (lambda: lower_constant("step", jnp.ones(2)), "activation"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("residuals", [[2.0], [2.0, 4.0], [1.0, -3.0, 2.0, 0.5]])
def test_the_limit_of_the_constant_is_the_trace_of_an_inverse(residuals):
    def mean(power):
        def integrand(z):
            return (1 - np.tanh(z) ** 2) ** power * stats.norm.pdf(z)

        return integrate.quad(integrand, -10, 10)[0]

    residuals = np.array(residuals)
    size = len(residuals)
    gram = (mean(2) - mean(1) ** 2) * np.eye(size) + mean(1) ** 2
    gram = gram * np.outer(residuals, residuals)
    found = jax.jit(lower_constant, static_argnums=0)("tanh", jnp.asarray(residuals))
    np.testing.assert_allclose(found, np.sqrt(np.trace(np.linalg.inv(gram)) / size), rtol=1e-4)
    assert found > np.sqrt(np.mean(residuals**-2.0) / mean(2)) * (1 - 1e-6)


def test_a_linear_network_determines_one_combination_only():
    for size in range(2, 9):
        assert lower_constant("identity", jnp.linspace(2.0, 4.0, size)) > 1e2
    # One sample alone is that combination; whole numbers are residuals, too.
    np.testing.assert_allclose(lower_constant("identity", jnp.array([-2])), 0.5, rtol=1e-5)
