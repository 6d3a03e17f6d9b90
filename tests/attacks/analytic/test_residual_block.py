"""A residual block undone: jointly where its second convolution is large, by signs where it is small."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from invjax.attacks.analytic.layerwise import residual
from invjax.linalg import Geometry


def geometry(window, channels=3, filters=None, stride=1):
    pad = window // 2
    return Geometry(
        8, 8, channels, filters or channels, (window, window), (stride, stride), ((pad, pad),) * 2
    )


def block(shape, seed):
    """A LeakyReLU block, what is known of it behind the activation, and the truth, in float64."""
    rng = np.random.default_rng(seed)
    bound = (shape.window[0] ** 2 * shape.channels) ** -0.5
    size = (*shape.window, shape.channels, shape.filters)
    weights = tuple(jnp.asarray(rng.uniform(-bound, bound, size)) for _ in range(2))
    inputs = jnp.asarray(rng.normal(size=(8, 8, shape.channels)))
    read = jnp.asarray(rng.normal(size=inputs.shape))

    def convolve(values, weight):
        return lax.conv_general_dilated(
            values[None],
            weight,
            shape.strides,
            shape.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )[0]

    def loss(weights, inputs, inner, outer):
        first = convolve(inputs, weights[0]) + inner
        hidden = jax.nn.leaky_relu(first, 0.2)
        before = convolve(hidden, weights[1]) + inputs + outer
        return jnp.sum(jnp.tanh(read * jax.nn.leaky_relu(before, 0.2))), (hidden, before)

    zero = jnp.zeros_like(inputs)
    derivatives, (hidden, before) = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(
        weights, inputs, zero, zero
    )
    return weights, inputs, hidden, before, derivatives


@pytest.mark.parametrize("window", [5, 7])
def test_a_large_second_convolution_leaves_nothing_open(window):
    with jax.enable_x64(True):
        shape = geometry(window)
        weights, inputs, hidden, before, (gradients, _, _, signal) = block(shape, 0)
        found = residual.undo_jointly(weights[1], gradients[1], before, signal, shape)
        assert found.rank == found.unknowns == 2 * 192 and found.residual < 1e-13
        assert np.mean((found.inputs - inputs) ** 2) < 1e-24
        assert np.mean((found.hidden - hidden) ** 2) < 1e-24


@pytest.mark.parametrize("seed", range(6))
def test_a_small_one_needs_the_hidden_signs(seed):
    with jax.enable_x64(True):
        shape = geometry(3)
        weights, inputs, hidden, before, (gradients, _, _, signal) = block(shape, seed)
        open_ = residual.undo_jointly(weights[1], gradients[1], before, signal, shape)
        assert open_.rank == 273 and open_.unknowns == 384
        assert np.mean((open_.inputs - inputs) ** 2) > 1e-3
        found = residual.undo_by_signs(weights, gradients, before, signal, open_.inputs, shape)
        assert found.rank == found.unknowns == 192 and found.stable and found.residual < 1e-13
        assert np.mean((found.inputs - inputs) ** 2) < 1e-24
        assert np.mean((found.hidden - hidden) ** 2) < 1e-24
        once = residual.undo_by_signs(
            weights, gradients, before, signal, -open_.inputs, shape, max_rounds=1
        )
        assert not once.stable and once.residual > 1e-6


def test_the_derivative_by_the_input_goes_both_ways():
    with jax.enable_x64(True):
        shape = geometry(3)
        weights, _, _, _, (_, derivative, inner, signal) = block(shape, 0)
        found = residual.pull_back_block(weights[0], inner, signal, shape)
        np.testing.assert_allclose(found, derivative, rtol=0, atol=1e-13)


def test_errors_name_the_argument():
    shape = geometry(3)
    zero, weight = np.zeros((8, 8, 3)), np.zeros((3, 3, 3, 3))
    pair = (weight, weight)
    with pytest.raises(ValueError, match=r"got \(8, 8, 3\) to \(4, 4, 3\)"):
        residual.undo_jointly(weight, weight, zero, zero, geometry(3, stride=2))
    with pytest.raises(ValueError, match=r"slope must lie in \(0.0, inf\), got 0"):
        residual.undo_by_signs(pair, pair, zero, zero, zero, shape, slope=0)
    with pytest.raises(ValueError, match="max_rounds must be a whole number of at least 1, got 0"):
        residual.undo_by_signs(pair, pair, zero, zero, zero, shape, max_rounds=0)
