"""Derivatives through every model: the oracle and the fast convolution against plain ones."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from invjax import conv, gradients, models
from invjax.base import Batch

SMALL = {
    "mlp": (lambda: models.mlp((6, 5), 3), (4, 4, 1)),
    "lenet": (lambda: models.lenet(3, width=3), (8, 8, 1)),
    "cnn": (lambda: models.cnn(3), (8, 8, 1)),
    "convnet": (lambda: models.convnet(3, 2, norm="none"), (9, 9, 2)),
    "convnet_batch": (lambda: models.convnet(3, 2), (9, 9, 2)),
    "convnet_group": (lambda: models.convnet(3, 3, norm="group"), (9, 9, 2)),
    "convnet_small": (lambda: models.convnet_small(3, 2), (12, 12, 3)),
    "cnn6": (lambda: models.cnn6(1), (8, 8, 3)),
    "cnn6_d": (lambda: models.cnn6_d(3), (8, 8, 3)),
    "resnet18_batch": (lambda: models.resnet18(3, width=4, norm="batch"), (8, 8, 1)),
}
each = pytest.mark.parametrize("name", SMALL)
# The slowest to compile, and near to another.
SLOW = ("convnet_group",)


@functools.cache
def case(name):
    """A model, its parameters and a batch of three."""
    make, shape = SMALL[name]
    model = make()
    params = model.init(jax.random.key(0), shape)
    inputs = jax.random.uniform(jax.random.key(1), (3, *shape))
    return model, params, Batch(inputs, jnp.array([0, 1, max(model.num_classes - 1, 1)]))


def relative(found, expected) -> float:
    difference = optax.tree.sub(found, expected)
    return float(optax.tree.norm(difference) / (optax.tree.norm(expected) + 1e-30))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in SMALL]
)
def test_oracle_and_im2col_give_the_derivatives_of_the_plain_model(name):
    """Value, gradient and its gradient, against reverse over reverse on `lax`."""
    model, params, batch = case(name)
    fast = conv.for_matching(model, "cpu")
    direction = jax.tree.map(
        lambda leaf: jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), params
    )

    def derivatives(model, gradient):
        def along(inputs):
            return optax.tree.vdot(gradient(params, batch._replace(inputs=inputs)), direction)

        return (
            model.apply(params, batch.inputs),
            gradient(params, batch),
            jax.grad(along)(batch.inputs),
        )

    @jax.jit
    def compute():
        plain = derivatives(model, jax.grad(model.loss))
        oracle = derivatives(model, lambda p, b: gradients.gradient(model, p, b))
        im2col = derivatives(fast, lambda p, b: gradients.gradient(fast, p, b))
        return plain, oracle, im2col

    plain, oracle, im2col = compute()
    # Float32 rounding grows through twenty layers.
    tolerance = 1e-4 if name == "resnet18_batch" else 1e-5
    for expected, *others in zip(plain, oracle, im2col, strict=True):
        assert float(optax.tree.norm(expected)) > 0
        for found in others:
            assert relative(found, expected) < tolerance


@each
def test_samples_do_not_see_each_other(name):
    model, params, batch = case(name)

    @jax.jit
    def both(params, batch):
        together = model.apply(params, batch.inputs)
        alone = jax.vmap(lambda x: model.apply(params, x[None])[0])(batch.inputs)
        mean = jax.grad(model.loss)(params, batch)
        each = gradients.per_sample_gradients(model, params, batch)
        return (together, mean), (alone, jax.tree.map(lambda leaf: leaf.mean(axis=0), each))

    expected, found = both(params, batch)
    assert relative(found[0], expected[0]) < 1e-5
    assert relative(found[1], expected[1]) < 1e-5


@pytest.mark.parametrize("side", [6, 7, 8])
def test_max_pool_is_reduce_window_and_its_gradient_goes_to_the_first_maximum(side):
    x = jax.random.normal(jax.random.key(0), (2, side, side, 3))

    def reference(x):
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 3, 3, 1), "VALID")

    def pooled(x):
        return models.chain.max_pool(x, 3)

    weights = jnp.cos(jnp.arange(24.0)).reshape(2, 2, 2, 3)
    np.testing.assert_array_equal(pooled(x), reference(x))
    found = jax.grad(lambda x: (pooled(x) * weights).sum())(x)
    expected = jax.grad(lambda x: (reference(x) * weights).sum())(x)
    np.testing.assert_array_equal(found, expected)
    ties = jax.grad(lambda x: models.chain.max_pool(x, 3).sum())(jnp.ones((1, 3, 3, 1)))
    assert ties[0, 0, 0, 0] == ties.sum() == 1


def test_compiling_does_not_lose_the_gradient_of_a_max_pool():
    """XLA may compute the pool's input twice with different rounding; see `max_pool`."""
    with jax.enable_x64(True):
        draw = functools.partial(jax.random.normal, dtype=jnp.float64)
        images, weights = draw(jax.random.key(0), (3, 3, 3, 8)), draw(jax.random.key(7), (8,))
        kernel = draw(jax.random.key(1), (3, 3, 8, 8))

        def value(kernel):
            numbers = ("NHWC", "HWIO", "NHWC")
            x = conv.im2col_conv(images, kernel, (1, 1), "SAME", dimension_numbers=numbers)
            x = x.reshape(3, 3, 3, 4, 2)
            x = x - x.mean(axis=(1, 2, 4), keepdims=True)
            x = x * lax.rsqrt((x**2).mean(axis=(1, 2, 4), keepdims=True) + 1e-6)
            pooled = models.chain.max_pool(x.reshape(images.shape), 3)
            return (pooled * weights.reshape(1, 1, 1, -1)).sum()

        compiled, plain = jax.jit(jax.grad(value))(kernel), jax.grad(value)(kernel)
        np.testing.assert_allclose(compiled, plain, atol=1e-9)


@each
def test_a_first_call_may_be_traced(name):
    make, shape = SMALL[name]
    model = make()
    params = jax.eval_shape(lambda key: model.init(key, shape), jax.random.key(0))
    inputs = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    logits = jax.eval_shape(
        jax.vmap(lambda p, x: model.apply(p, x[None])[0], (None, 0)), params, inputs
    )
    assert logits.shape == (2, model.num_classes)
    # And nothing of that trace is left over in a cache.
    assert jax.eval_shape(jax.jit(model.apply), params, inputs).shape == (2, model.num_classes)


@each
def test_every_convolution_is_swapped(name):
    model, params, batch = case(name)
    fast = model.with_convolution(conv.im2col_conv)
    assert not conv.keeps_lax_conv(fast.apply, params, batch.inputs)
    assert conv.keeps_lax_conv(model.apply, params, batch.inputs) == (name != "mlp")
    back = fast.with_convolution(lax.conv_general_dilated)
    assert conv.keeps_lax_conv(back.apply, params, batch.inputs) == (name != "mlp")
    assert (fast.layers, fast.name) == (model.layers, model.name)


def test_a_model_serves_several_input_shapes(key):
    model = models.lenet(width=2)
    for shape in ((8, 8, 1), (12, 9, 3)):
        params = model.init(key, shape)
        assert model.apply(params, jnp.zeros((2, *shape))).shape == (2, 10)


def test_tracing_is_cached(key):
    model = models.lenet(width=2)
    params = model.init(key, (8, 8, 1))
    apply = jax.jit(chex.assert_max_traces(model.apply, n=1))
    for _ in range(3):
        apply(params, jnp.zeros((2, 8, 8, 1)))
