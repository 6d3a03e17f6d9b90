"""The head of a layer-wise attack: margins in closed form, and inputs with or without a bias."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special

from invjax.attacks.analytic.layerwise import bootstrap

LOWEST = -0.27846454276107377


@pytest.mark.parametrize("branch", [0, -1])
def test_lambert_w_is_scipys(branch):
    with jax.enable_x64(True):
        rest = np.geomspace(1e-12, 0.3678, 60)
        values = np.concatenate([-rest, rest * 50]) if branch == 0 else -rest
        found = bootstrap.lambert_w(jnp.asarray(values), branch)
        np.testing.assert_allclose(found, special.lambertw(values, branch).real, rtol=1e-13)
        beyond = bootstrap.lambert_w(jnp.asarray([-0.5]), branch)
        np.testing.assert_allclose(beyond, -1.0, atol=1e-7)
        edge = bootstrap.lambert_w(jnp.asarray([0.0, 5.0]), branch)
        assert np.isfinite(edge).all() and (branch or edge[0] == 0)
    single = bootstrap.lambert_w(jnp.asarray(values, jnp.float32), branch)
    np.testing.assert_allclose(single, special.lambertw(values, branch).real, rtol=3e-4)
    with pytest.raises(ValueError, match="branch must be 0 or -1, got 1"):
        bootstrap.lambert_w(jnp.ones(1), 1)


@pytest.mark.parametrize("margin", [-800.0, -5.0, -1.0, 0.3, 1.0, 2.0, 4.0, 30.0])
def test_margins_come_back_on_their_branch(margin):
    with jax.enable_x64(True):
        product = jnp.asarray(-margin * special.expit(-margin))
        branch = 0 if margin < 1 + special.lambertw(1 / np.e).real else -1
        np.testing.assert_allclose(bootstrap.logistic_margin(product, branch), margin, rtol=1e-12)


def test_published_margins():
    """The pair of -0.26894142, and the least product with its margin."""
    with jax.enable_x64(True):
        product = jnp.asarray(-special.expit(-1.0))
        pair = [bootstrap.logistic_margin(product, branch) for branch in (0, -1)]
        np.testing.assert_allclose(pair, [1.0, 1.5969184], rtol=1e-7)
        for value in (LOWEST, -0.4):  # Less than the least is noise.
            found = [bootstrap.logistic_margin(jnp.asarray(value), branch) for branch in (0, -1)]
            np.testing.assert_allclose(found, 1.2784645428, atol=1e-7)


def gradient_of(loss, weight, inputs):
    logits, pull = jax.vjp(lambda weight: inputs @ weight, weight)
    signal = jax.grad(loss)(logits)
    return pull(signal)[0], signal


@pytest.mark.parametrize(("size", "label"), [(0.3, 1), (0.3, 0), (3.0, 1), (3.0, 0)])
def test_one_logit_without_a_bias(size, label):
    """The true input is among the candidates; the others have the same gradient here."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        weight, inputs = jnp.asarray(rng.normal(size=(20, 1))), jnp.asarray(rng.normal(size=20))
        inputs = inputs * size / jnp.abs(inputs @ weight)

        def loss(weight, inputs, label):
            target = jnp.asarray(label, weight.dtype)
            return optax.sigmoid_binary_cross_entropy((inputs @ weight)[0], target)

        gradient = jax.grad(loss)(weight, inputs, label)
        start = bootstrap.logistic(weight, gradient, jnp.arange(2), (0, -1))
        assert start.labels.tolist() == [0, 1, 0, 1]
        assert start.valid.sum() == (4 if (weight * gradient).sum() < 0 else 2)
        error = jnp.abs(start.inputs - inputs[None]).max(axis=1)
        right = jnp.argmin(error)
        assert error[right] < 1e-12 and start.labels[right] == label and start.valid[right]
        for mine, signal, guess, valid in zip(*start, strict=True):
            if valid:
                again = jax.grad(loss)(weight, mine, guess)
                np.testing.assert_allclose(again, gradient, rtol=0, atol=1e-13)
                np.testing.assert_allclose(
                    mine[:, None] * signal[None], gradient, rtol=0, atol=1e-13
                )


@pytest.mark.parametrize(("classes", "size"), [(2, 1.0), (10, 0.1), (10, 1.0), (10, 6.0)])
@pytest.mark.parametrize("label", [0, 1])
def test_softmax_without_a_bias(classes, size, label):
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        weight = jnp.asarray(rng.normal(size=(30, classes)) / 5)
        inputs = jnp.asarray(size * rng.normal(size=30))

        def loss(logits):
            return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(label))

        gradient, signal = gradient_of(loss, weight, inputs)
        solve = jax.jit(bootstrap.softmax)
        found, derivative = solve(weight, gradient, label)
        # Two logits have twins, as one has: rounding decides which is found.
        if classes > 2:
            np.testing.assert_allclose(found, inputs, rtol=1e-10, atol=1e-12)
            np.testing.assert_allclose(derivative, signal, rtol=0, atol=1e-12)
        again, signal = gradient_of(loss, weight, found)
        np.testing.assert_allclose(again, gradient, rtol=0, atol=1e-12)
        np.testing.assert_allclose(derivative, signal, rtol=0, atol=1e-12)


def test_rank_one_input_averages_noise():
    rng = np.random.default_rng(2)
    signal, inputs = rng.normal(size=50), rng.normal(size=200)
    noisy = np.outer(inputs, signal) + 0.01 * rng.normal(size=(200, 50))
    found = bootstrap.rank_one_input(jnp.asarray(noisy, jnp.float32), jnp.asarray(signal))
    error = np.sqrt(np.mean((found - inputs) ** 2))
    np.testing.assert_allclose(error, 0.01 / np.linalg.norm(signal), rtol=0.2)
    assert not bootstrap.rank_one_input(jnp.ones((3, 2)), jnp.zeros(2)).any()
