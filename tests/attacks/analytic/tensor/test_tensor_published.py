"""Published figures of the tensor attack, and its laws: width, noise, dropout, pruning."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from invjax import Batch, Facts, Observation
from invjax.attacks.analytic import tensor as lib
from invjax.defenses.pruning import prune


def errors(
    activation, units, size, width, bias, estimator, seeds, defense=None, basis=False, **options
):
    """Of algorithm 1, inputs of unit norm; one entry a seed."""
    model = lib.two_layer(units, activation)
    attack = lib.tensor(model, method="paper", estimator=estimator, **options)

    @jax.jit
    def one(key):
        keys = jax.random.split(key, 4)
        inputs = jnp.eye(size, width) if basis else jax.random.normal(keys[0], (size, width))
        inputs /= jnp.linalg.norm(inputs, axis=1, keepdims=True)
        shapes = jax.tree.map(lambda leaf: leaf.astype(inputs.dtype), model.init(keys[1], (width,)))
        params = lib.query(keys[1], shapes, bias=bias)
        labels = jnp.where(jnp.arange(size) % 2 == 0, 1.0, -1.0)
        gradient = jax.grad(model.loss)(params, Batch(inputs, labels))
        if defense is not None:
            gradient = defense(keys[2], gradient)
        facts = Facts(input_shape=(width,), num_classes=1, batch_size=size)
        found = attack.init(keys[3], Observation(params, gradient, facts))
        return lib.rmse(found.inputs, inputs)

    with jax.enable_x64(True):
        return np.array([one(jax.random.key(seed)) for seed in range(seeds)])


@pytest.mark.parametrize(("estimator", "value"), [("weights", 0.058), ("outer", 0.26)])
def test_published_setting(estimator, value):
    found = errors("square_cube", 5000, 2, 10, 30.0, estimator, 10, basis=True).mean()
    assert abs(found / value - 1) < 0.25


@pytest.mark.slow
@pytest.mark.parametrize(
    ("estimator", "width", "value"),
    [("weights", 40, 0.116), ("weights", 100, 0.186), ("outer", 40, 0.48), ("outer", 100, 0.68)],
)
def test_published_setting_at_other_widths(estimator, width, value):
    found = errors("square_cube", 5000, 2, width, 30.0, estimator, 10, basis=True).mean()
    assert abs(found / value - 1) < 0.25


def test_error_falls_with_the_root_of_the_width():
    medians = [np.median(errors("tanh", units, 2, 8, 3.0, "weights", 9)) for units in (1000, 16000)]
    slope = np.log(medians[1] / medians[0]) / np.log(16)
    assert -0.65 < slope < -0.35


@pytest.mark.slow
def test_width_law():
    units = (1000, 4000, 16000, 64000)
    # With 8 contractions a thousand units are too few to be on the law: the slope is -0.66.
    medians = [
        np.median(errors("tanh", m, 4, 32, 3.0, "weights", 9, contractions=32)) for m in units
    ]
    slope = np.polyfit(np.log(units), np.log(medians), 1)[0]
    assert -0.65 < slope < -0.35
    assert medians[-1] < 0.06


def add_noise(deviation, key, gradient):
    """On the sum over two samples, as published; the gradient is their mean."""
    leaves, tree = jax.tree.flatten(gradient)
    keys = jax.random.split(key, len(leaves))
    added = [
        leaf + deviation / 2 * jax.random.normal(k, leaf.shape, leaf.dtype)
        for leaf, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, added)


def drop_units(rate, key, gradient):
    kernel = gradient["output"]["kernel"]
    kept = jax.random.bernoulli(key, 1 - rate, kernel.shape)
    return gradient | {"output": gradient["output"] | {"kernel": kernel * kept}}


def by_moments(units, defense=None, seeds=7):
    return np.median(errors("tanh", units, 2, 16, 3.0, "outer", seeds, defense))


@pytest.mark.slow
def test_noise_law():
    few, many = (by_moments(m, functools.partial(add_noise, 4.0)) for m in (64000, 256000))
    assert abs(few / 0.195 - 1) < 0.4
    assert many < 0.65 * few


@pytest.mark.slow
def test_dropout_costs_the_units_that_it_drops():
    ratio = by_moments(128000, functools.partial(drop_units, 0.75)) / by_moments(128000)
    assert 1.6 < ratio < 2.8


@pytest.mark.slow
def test_pruning_leaves_moments_a_bias():
    def defense(key, gradient):
        return prune(gradient, 0.5, "tensor")

    few, many = (by_moments(m, defense) for m in (64000, 256000))
    assert 0.75 * few < many
    assert many > 3 * by_moments(256000)
