"""Batch-norm statistics: of which inputs, in which order, measured and stored."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax import lax

from invjax import conv, models

SHAPE = (9, 9, 2)
NHWC = ("NHWC", "HWIO", "NHWC")


def images(shape=SHAPE):
    return jax.random.uniform(jax.random.key(1), (3, *shape))


def channel(values):
    return values.reshape(1, 1, 1, -1)


def moments(x):
    axes = tuple(range(x.ndim - 1))
    return x.mean(axis=axes), x.var(axis=axes)


def convolve(x, part):
    out = lax.conv_general_dilated(x, part["kernel"], (1, 1), "SAME", dimension_numbers=NHWC)
    return out + channel(part.get("bias", jnp.zeros(out.shape[-1])))


# --- the zoo -----------------------------------------------------------------------------------


def test_every_statistic_of_a_convnet_is_that_of_its_convolution():
    model = models.convnet(3, 2)
    params = model.init(jax.random.key(0), SHAPE)
    x, expected = images(), []
    for index in (0, 1, 2, 3, 4, 5, 7, 8):
        x = convolve(models.chain.max_pool(x, 3) if index == 7 else x, params[f"layer{index:02d}"])
        expected.append(moments(x))
        norm = params[f"norm{index:02d}"]
        x = x * channel(norm["scale"]) / (1 + 1e-5) ** 0.5 + channel(norm["bias"])
        x = jax.nn.relu(x)
    found = jax.jit(model.statistics)(params, images())
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_equal_shapes(model.running_statistics, expected)
    for mean, variance in model.running_statistics:
        assert not mean.any()
        assert (variance == 1).all()


def test_a_residual_network_starts_with_its_stem():
    model = models.resnet18(3, width=4, norm="batch")
    params = model.init(jax.random.key(0), (8, 8, 1))
    found = jax.eval_shape(model.statistics, params, images((8, 8, 1)))
    assert len(found) == len(model.running_statistics) == 20
    widths = [4] * 5 + [8] * 5 + [16] * 5 + [32] * 5
    assert [mean.shape for mean, _ in found] == [(width,) for width in widths]
    chex.assert_trees_all_equal_shapes(found, model.running_statistics)
    first = jax.jit(lambda p, x: model.statistics(p, x)[0])(params, images((8, 8, 1)))
    chex.assert_trees_all_close(
        first, moments(convolve(images((8, 8, 1)), params["stem"])), rtol=1e-4, atol=1e-6
    )


def test_they_are_differentiable_and_kept_by_a_swap():
    model = models.convnet(3, 2)
    params = model.init(jax.random.key(0), SHAPE)
    fast = model.with_convolution(conv.im2col_conv)

    def total(inputs, model):
        return sum(
            mean.sum() + variance.sum() for mean, variance in model.statistics(params, inputs)
        )

    expected = jax.jit(jax.grad(lambda x: total(x, model)))(images())
    found = jax.jit(jax.grad(lambda x: total(x, fast)))(images())
    assert optax.tree.norm(found - expected) < 1e-4 * optax.tree.norm(expected)
    assert optax.tree.norm(expected) > 0
    chex.assert_trees_all_equal(fast.running_statistics, model.running_statistics)


@pytest.mark.parametrize("model", [models.convnet(norm="group"), models.resnet18(), models.mlp()])
def test_models_without_batch_norm_have_none(model):
    assert model.statistics is None
    assert model.running_statistics is None


# --- users' modules: layers whose names sort against the order in which they run -----------------


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.z_first = nnx.BatchNorm(2, rngs=rngs)
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.a_shared = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = self.a_shared(self.conv(self.z_first(x)))
        return self.head(self.a_shared(2 * x + 1).mean(axis=(1, 2)))


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x, train: bool):
        shared = linen.BatchNorm(use_running_average=not train, name="a_shared")
        x = linen.BatchNorm(use_running_average=not train, name="z_first")(x)
        x = shared(linen.Conv(4, (3, 3), name="conv")(x))
        return linen.Dense(3, name="head")(shared(2 * x + 1).mean(axis=(1, 2)))


FIRST = {"mean": jnp.array([0.1, 0.2]), "var": jnp.array([1.1, 1.2])}
SHARED = {"mean": jnp.arange(4.0), "var": 1 + jnp.arange(4.0)}


def adapt_nnx():
    module = NnxNet(nnx.Rngs(0))
    for norm, stored in ((module.z_first, FIRST), (module.a_shared, SHARED)):
        norm.mean[...], norm.var[...] = stored["mean"], stored["var"]
    return models.from_nnx(module, SHAPE)


def adapt_linen():
    variables = LinenNet().init(jax.random.key(0), images(), train=False)
    stored = {"z_first": FIRST, "a_shared": SHARED}
    return models.from_linen(LinenNet(), SHAPE, {**variables, "batch_stats": stored})


@pytest.mark.parametrize("adapt", [adapt_nnx, adapt_linen])
def test_users_layers_come_in_the_order_in_which_they_run(adapt):
    model, params = adapt()

    def normalize(x, stored):
        return (x - channel(stored["mean"])) / jnp.sqrt(channel(stored["var"]) + 1e-5)

    first = images()
    second = convolve(normalize(first, FIRST), params["conv"])
    third = 2 * normalize(second, SHARED) + 1
    expected = [moments(x) for x in (first, second, third)]
    for built in (model, conv.for_matching(model, "cpu")):
        found = built.statistics(params, images())
        chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)
        stored = [(part["mean"], part["var"]) for part in (FIRST, SHARED, SHARED)]
        chex.assert_trees_all_close(built.running_statistics, stored)


def test_the_feature_axis_of_a_norm_is_respected():
    class ChannelsFirst(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(2, axis=1, rngs=rngs)
            self.head = nnx.Linear(2, 3, rngs=rngs)

        def __call__(self, x):
            return self.head(self.norm(x).mean(axis=(2, 3)))

    model, params = models.from_nnx(ChannelsFirst(nnx.Rngs(0)), (2, 5, 4))
    x = images((2, 5, 4))
    ((mean, variance),) = model.statistics(params, x)
    np.testing.assert_allclose(mean, x.mean(axis=(0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(variance, x.var(axis=(0, 2, 3)), rtol=1e-5)


def test_a_normalised_model_measures_what_its_layers_see():
    model, params = adapt_nnx()
    raw = models.normalized(model, [0.5, 0.0], [2.0, 1.0])
    scaled = (images() - jnp.array([0.5, 0.0]).reshape(1, 1, 1, 2)) / jnp.array([2.0, 1.0]).reshape(
        1, 1, 1, 2
    )
    found = raw.statistics(params, images())
    chex.assert_trees_all_close(found, model.statistics(params, scaled), rtol=1e-6)
    assert raw.running_statistics is model.running_statistics
