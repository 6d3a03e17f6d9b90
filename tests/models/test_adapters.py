"""Users' own modules: cloned, in evaluation mode, on the fast convolution; train mode refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from invjax import Batch, conv, gradients, models

SHAPE = (8, 8, 2)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        convs = [nnx.Conv(channels, 4, (3, 3), rngs=rngs) for channels in (2, 4)]
        self.convs = nnx.List(convs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        for layer in self.convs:
            x = nnx.relu(layer(x))
        return self.head(self.dropout(self.norm(x)).mean(axis=(1, 2)))


class NnxTrainMode(NnxNet):
    def __call__(self, x):
        x = self.norm(self.convs[0](x), use_running_average=False)
        return self.head(x.mean(axis=(1, 2)))


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x, train: bool = True):
        x = linen.relu(linen.Conv(4, (3, 3))(x))
        x = linen.BatchNorm(use_running_average=not train)(x)
        x = linen.Dropout(0.5, deterministic=not train)(x)
        return linen.Dense(3)(x.mean(axis=(1, 2)))


class LinenTrainMode(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.BatchNorm(use_running_average=False)(linen.Conv(4, (3, 3))(x))
        return linen.Dense(3)(x.mean(axis=(1, 2)))


def trained_nnx():
    module = NnxNet(nnx.Rngs(0))
    module.train()
    module(jax.random.normal(jax.random.key(5), (16, *SHAPE)) + 1)
    return module


def trained_linen():
    module = LinenNet()
    x = jax.random.normal(jax.random.key(5), (16, *SHAPE)) + 1
    noise = {"dropout": jax.random.key(1)}
    variables = module.init({"params": jax.random.key(0), **noise}, x)
    _, state = module.apply(variables, x, mutable=["batch_stats"], rngs=noise)
    return module, {**variables, **state}


@pytest.fixture(params=["nnx", "linen"])
def adapted(request):
    if request.param == "nnx":
        module = trained_nnx()
        reference = nnx.clone(module)
        reference.eval()
        return *models.from_nnx(module, SHAPE), reference
    module, variables = trained_linen()
    model, params = models.from_linen(module, SHAPE, variables)
    return model, params, lambda x: module.apply(variables, x, train=False)


def test_same_function_and_same_parameters_on_the_fast_convolution(adapted):
    model, params, reference = adapted
    x = jax.random.normal(jax.random.key(1), (3, *SHAPE))
    assert model.num_classes == 3
    np.testing.assert_allclose(model.apply(params, x), reference(x), rtol=1e-5, atol=1e-6)
    fast = conv.for_matching(model, "cpu")
    np.testing.assert_allclose(fast.apply(params, x), reference(x), rtol=1e-4, atol=1e-5)
    assert conv.keeps_lax_conv(model.apply, params, x)
    assert not conv.keeps_lax_conv(fast.apply, params, x)
    assert fast.num_classes == 3


def test_oracle_and_per_sample_gradients(adapted):
    model, params, _ = adapted
    batch = Batch(jax.random.normal(jax.random.key(1), (3, *SHAPE)), jnp.array([0, 2, 1]))
    each = gradients.per_sample_gradients(model, params, batch)
    mean = gradients.gradient(model, params, batch)
    for a, b in zip(jax.tree.leaves(each), jax.tree.leaves(mean), strict=True):
        np.testing.assert_allclose(a.mean(axis=0), b, rtol=1e-3, atol=1e-5)


def test_batch_norm_statistics_ride_along(adapted):
    model, params, _ = adapted
    ((mean, variance),) = model.running_statistics
    assert mean.shape == (4,) and jnp.abs(mean).max() > 0
    ((found, _),) = model.statistics(params, jnp.ones((2, *SHAPE)))
    assert found.shape == (4,) and variance.shape == (4,)


def test_module_is_never_changed():
    module = trained_nnx()
    before = nnx.to_pure_dict(nnx.state(module))
    model, params = models.from_nnx(module, SHAPE)
    jax.jit(model.apply)(params, jnp.ones((1, *SHAPE)))
    assert not module.dropout.deterministic and not module.norm.use_running_average
    after = nnx.to_pure_dict(nnx.state(module))
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        if jnp.issubdtype(a.dtype, jnp.floating):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "adapt",
    [
        lambda: models.from_nnx(NnxTrainMode(nnx.Rngs(0)), SHAPE),
        lambda: models.from_linen(LinenTrainMode(), SHAPE),
    ],
)
def test_train_mode_batch_norm_is_refused_with_the_reason(adapt):
    with pytest.raises(ValueError, match="per-sample gradients are undefined"):
        adapt()


def test_linen_initialises_itself_and_wants_params():
    model, params = models.from_linen(LinenNet(), SHAPE)
    again = model.init(jax.random.key(0), SHAPE)
    jax.tree.map(np.testing.assert_array_equal, params, again)
    with pytest.raises(ValueError, match="params"):
        models.from_linen(LinenNet(), SHAPE, {"batch_stats": {}})


def test_plain_functions_and_normalisation():
    def init(key, shape):
        return {"w": jax.random.normal(key, (shape[-1], 3))}

    model = models.from_apply(lambda p, x: x @ p["w"], init, 3)
    params = model.init(jax.random.key(0), (5,))
    x = jax.random.normal(jax.random.key(1), (4, 5))
    raw = models.normalized(model, jnp.arange(5.0), jnp.full(5, 2.0))
    expected = model.apply(params, (x - jnp.arange(5.0)[None]) / 2)
    np.testing.assert_allclose(raw.apply(params, x), expected, rtol=1e-6)
    with pytest.raises(ValueError, match="positive"):
        models.normalized(model, 0.0, [0.0])
    net, weights = models.from_nnx(trained_nnx(), SHAPE)
    scaled = models.normalized(net, 0.5, 0.5)
    image = jnp.full((1, *SHAPE), 0.75)
    fast = conv.for_matching(scaled, "cpu")
    expected = net.apply(weights, image - 0.25)
    np.testing.assert_allclose(fast.apply(weights, image), expected, rtol=1e-4)
    assert len(scaled.statistics(weights, image)) == 1
