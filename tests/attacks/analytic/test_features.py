"""From features at the dense head to pixels: exact for one convolution, certified beyond."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from conftest import nearest

import invjax
from invjax import models
from invjax.attacks.analytic import row_scan
from invjax.attacks.analytic.exclusivity import exclusivity
from invjax.attacks.analytic.feature_inversion import (
    invert_features,
    minimize,
)
from invjax.attacks.analytic.features import head_model, head_observation, through_features
from invjax.base import Facts, Observation
from invjax.models.chain import Spec, chain_model
from invjax.models.layers import Layer, apply_layers, split_at_head

SHAPE = (8, 8, 1)


def conv(channels, padding=1, stride=1):
    return Spec("conv", channels, 3, stride, padding, "relu")


def network(*front, width=512):
    head = [Spec("flatten"), Spec("dense", width, activation="relu"), Spec("dense", 10)]
    return chain_model([*front, *head], 10, "net", "he")


@functools.cache
def observed(front, rows, dtype="float64"):
    """A model, batches of digits (one a row of indices) and what a server sees of each."""
    model = network(*front)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), model.init(jax.random.key(0), SHAPE))
    inputs, labels = invjax.datasets.take(invjax.datasets.digits(), np.array(rows))
    batches = invjax.Batch(jnp.asarray(inputs, dtype), jnp.asarray(labels))
    keys = jax.random.split(jax.random.key(1), len(rows))
    seen = jax.jit(jax.vmap(lambda key, batch: invjax.observe(key, model, params, batch)))
    return model, params, batches, seen(keys, batches), keys


def errors(batches, result):
    """`[V, S]`: mean squared error of every slot to the nearest sample, and which that is."""
    truth = np.asarray(batches.inputs).reshape(*batches.labels.shape, -1)
    mine = np.asarray(result.inputs).reshape(*result.found.shape, -1)
    return nearest(mine, truth)


def make_exclusivity(head):
    return exclusivity(head)


def make_row_scan(head):
    return row_scan(head)


@pytest.mark.parametrize("make", [make_exclusivity, make_row_scan])
def test_one_convolution_is_exact(make):
    """Specified: 8 channels of 3x3 and a hidden layer of 512, pixels below 1e-20."""
    with jax.enable_x64(True):
        model, _, batches, seen, keys = observed((conv(8),), ((3, 5, 9), (0, 1, 2)))
        result = jax.jit(jax.vmap(through_features(model, make)))(keys, seen)
        error, who = errors(batches, result)
        assert result.found.all() and error.max() < 1e-20 and result.objective.max() < 1e-10
        assert result.inputs.shape == (2, 3, *SHAPE)
        assert (np.sort(who, axis=1) == [0, 1, 2]).all()
        labels = np.take_along_axis(np.asarray(batches.labels), who, axis=1)
        np.testing.assert_array_equal(labels, result.labels)
        assert result.diagnostics["features"].shape == (2, 3, 512)


def test_exclusivity_alone_gives_the_features():
    with jax.enable_x64(True):
        model, params, batches, seen, keys = observed((conv(8),), ((3, 5, 9), (0, 1, 2)))
        result = jax.jit(jax.vmap(exclusivity(model)))(keys, seen)
        front, _ = split_at_head(model, params)
        features = apply_layers(front, batches.inputs.reshape(6, *SHAPE)).reshape(2, 3, 512)
        error, _ = errors(invjax.Batch(features, batches.labels), result)
        assert result.found.all() and error.max() < 1e-20


@pytest.mark.parametrize(
    ("front", "settings"),
    [
        ((conv(16), Spec("average_pool", window=2)), {}),
        pytest.param((conv(8), conv(16)), {"total_variation": 1e-3}, marks=pytest.mark.slow),
        pytest.param((conv(8), conv(32, stride=2)), {}, marks=pytest.mark.slow),
        pytest.param((conv(16), Spec("max_pool", window=2), conv(32)), {}, marks=pytest.mark.slow),
    ],
)
def test_deeper_fronts_by_search(front, settings):
    """Specified: exact for one image of three with two convolutions; a box does better."""
    with jax.enable_x64(True):
        model, _, batches, seen, keys = observed(front, ((3, 5, 9),))
        attack = through_features(model, make_exclusivity, restarts=6, **settings)
        result = jax.jit(jax.vmap(attack))(keys, seen)
        error, _ = errors(batches, result)
        found = np.asarray(result.found)
        assert found.all() and error[found].max() < 1e-20


def test_pixels_that_features_do_not_determine_are_not_found():
    """Without padding and with a stride the last column is in no window."""
    with jax.enable_x64(True):
        model, _, batches, seen, keys = observed((conv(16, 0, 2),), ((3, 5),))
        result = jax.jit(jax.vmap(through_features(model, make_row_scan)))(keys, seen)
        assert result.diagnostics["residual"].max() < 1e-10
        assert not result.diagnostics["determined"].any() and not result.found.any()
        error, _ = errors(batches, result)
        assert error.max() > 1e-4


def test_a_search_that_fails_is_not_found():
    with jax.enable_x64(True):
        front = (conv(16), Spec("average_pool", window=2))
        model, _, batches, seen, keys = observed(front, ((3, 5, 9),))
        attack = through_features(model, make_exclusivity, restarts=1, num_steps=2)
        result = jax.jit(jax.vmap(attack))(keys, seen)
        error, _ = errors(batches, result)
        assert not result.found.any() and error.min() > 1e-6
        assert result.diagnostics["residual"].min() > 1e-3


def test_the_head_is_a_model_of_its_features():
    with jax.enable_x64(True):
        model, params, batches, seen, _ = observed((conv(8),), ((3, 5, 9), (0, 1, 2)))
        one = jax.tree.map(lambda leaf: leaf[0], seen._replace(params=None))
        auxiliary = jax.tree.map(lambda leaf: leaf[1], batches)
        one = one._replace(params=params, auxiliary=auxiliary)
        batch = jax.tree.map(lambda leaf: leaf[0], batches)
        head, mine = head_model(model), head_observation(model, one)
        front, _ = split_at_head(model, params)
        features = apply_layers(front, batch.inputs)
        np.testing.assert_allclose(
            head.apply(mine.params, features), model.apply(params, batch.inputs), atol=1e-12
        )
        gradient = jax.grad(head.loss)(mine.params, invjax.Batch(features, batch.labels))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), gradient, mine.gradient
        )
        assert mine.facts.input_shape == (512,) and mine.facts.input_range == (0.0, np.inf)
        assert [layer.activation for layer in head.layers(mine.params)] == ["relu", "identity"]
        np.testing.assert_allclose(mine.auxiliary.inputs, apply_layers(front, auxiliary.inputs))
        with pytest.raises(ValueError, match="The head of net has no init"):
            head.init(jax.random.key(0), (512,))
        assert head_observation(model, one._replace(gradient=None)).gradient is None


def test_a_fully_connected_model_passes_through():
    with jax.enable_x64(True):
        model, _, batches, seen, keys = observed((), ((3, 5, 9),))
        result = jax.jit(jax.vmap(through_features(model, make_exclusivity)))(keys, seen)
        error, _ = errors(batches, result)
        assert result.found.all() and error.max() < 1e-20 and result.inputs.shape[2:] == SHAPE


def test_a_flattening_with_an_activation_is_a_front():
    """Its outputs are features, and no inputs: they are searched for."""
    with jax.enable_x64(True):
        head = [Spec("dense", 256, activation="relu"), Spec("dense", 10)]
        model = chain_model([Spec("flatten", activation="sigmoid"), *head], 10, "net", "he")
        params = jax.tree.map(
            lambda leaf: leaf.astype(float), model.init(jax.random.key(0), (2, 2, 1))
        )
        truth = jnp.asarray(np.random.default_rng(0).random((2, 2, 2, 1)))
        seen = invjax.observe(jax.random.key(1), model, params, invjax.Batch(truth, jnp.arange(2)))
        features = exclusivity(model)(jax.random.key(2), seen).inputs
        assert features.shape == (2, 4)
        found = invert_features(
            jax.random.key(0), model.layers(params)[:1], features, (2, 2, 1), (0.0, 1.0), restarts=1
        )
        error, _ = errors(
            invjax.Batch(truth[None], jnp.arange(2)[None]),
            invjax.Reconstruction(found.inputs[None], None, np.ones((1, 2)), None, {}),
        )
        assert found.determined.all() and error.max() < 1e-20


def test_minimum_in_a_box_is_that_of_scipy():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        matrix, target = rng.normal(size=(12, 7)), rng.normal(size=12)
        expected = scipy.optimize.lsq_linear(matrix, target, (-0.1, 0.1), tol=1e-14)
        low, high = jnp.full(7, -0.1), jnp.full(7, 0.1)
        find = jax.jit(
            lambda start: minimize(
                lambda x, _: matrix @ x - target, start, low, high, jnp.zeros(40)
            )
        )
        point, value = find(jnp.zeros(7))
        held = np.abs(expected.x) > 0.1 - 1e-8
        assert 0 < held.sum() < 7
        np.testing.assert_allclose(point, expected.x, atol=1e-8)
        np.testing.assert_allclose(value, 2 * expected.cost, rtol=1e-10)


def test_what_features_leave_open_is_not_called_determined():
    """Behind an average pool there are fewer features than pixels: 12 of 16."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        shape, weight = (4, 4, 1), jnp.asarray(rng.normal(size=(3, 3, 1, 3)))
        layer = Layer("conv", weight, jnp.full(3, 20.0), "relu", padding=((1, 1), (1, 1)))
        front = (layer, Layer("average_pool", strides=(2, 2), window=(2, 2)), Layer("flatten"))
        truth = jnp.asarray(rng.random((1, *shape)))
        found = invert_features(
            jax.random.key(0), front, apply_layers(front, truth), shape, (0.0, 1.0), restarts=2
        )
        assert found.residual[0] < 1e-8 and jnp.abs(found.inputs - truth).max() > 1e-2
        assert not found.determined.any()


def blank(model, shape, **facts):
    """An observation of the right shapes."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), shape))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    return Observation(
        params, params, Facts(input_shape=shape, num_classes=10, batch_size=2, **facts)
    )


def test_what_it_refuses():
    model = network(conv(4), conv(4), width=8)
    for settings, message in (
        ({"restarts": 0}, "restarts must be a whole number of at least 1"),
        ({"num_steps": 0}, "num_steps must be a whole number of at least 1"),
        ({"total_variation": -1.0}, "total_variation must lie in"),
        ({"tolerance": 2.0}, "tolerance must lie in"),
    ):
        with pytest.raises(ValueError, match=message):
            through_features(model, make_exclusivity, **settings)
    for other, seen, message in (
        (model, blank(model, SHAPE, input_range=(0.0, np.inf)), "must be finite"),
        (model, blank(model, SHAPE)._replace(gradient=None), "needs a gradient"),
        (models.convnet(), blank(model, SHAPE), "params do not fit"),
    ):
        with pytest.raises(ValueError, match=message):
            through_features(other, make_exclusivity)(jax.random.key(0), seen)
    front = (Layer("flatten"),)
    with pytest.raises(ValueError, match=r"features must be \[S, 64\].* got shape \(2, 32\)"):
        invert_features(jax.random.key(0), front, jnp.zeros((2, 32)), SHAPE, (0.0, 1.0))
    # What the head's attack refuses, it refuses.
    bare = models.lenet()
    with pytest.raises(ValueError, match="needs a hidden dense layer"):
        through_features(bare, make_exclusivity)(jax.random.key(0), blank(bare, SHAPE))
