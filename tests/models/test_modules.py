"""What users' modules may do, and what the adapters refuse."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from flax.core import freeze
from flax.errors import FlaxError

from invjax import conv, models
from invjax.base import Batch

SHAPE = (6, 6, 2)
LABELS = jnp.array([0, 1, 2])


def images(shape=SHAPE):
    return jax.random.normal(jax.random.key(1), (3, *shape))


class NnxNet(nnx.Module):
    """Convolution, dropout and a dense layer, behind a hook of the caller's choice."""

    def __init__(self, middle=lambda x: x):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(1))
        self.head = nnx.Linear(4, 3, rngs=rngs)
        self.middle = middle

    def __call__(self, x):
        return self.head(self.dropout(self.middle(nnx.tanh(self.conv(x)))).mean(axis=(1, 2)))


class LinenNet(linen.Module):
    """The same; `trunk` is the user's own instance."""

    trunk: linen.Module
    middle: object = staticmethod(lambda x: x)

    @linen.compact
    def __call__(self, x, deterministic: bool):
        x = self.middle(linen.tanh(self.trunk(x)))
        x = linen.Dropout(0.5)(x, deterministic=deterministic)
        return linen.Dense(3)(x.mean(axis=(1, 2)))


def linen_net(**settings):
    return LinenNet(linen.Conv(4, (3, 3)), **settings)


# --- modes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("train", False),
        ("training", False),
        ("is_training", False),
        ("deterministic", True),
        ("use_running_average", True),
    ],
)
def test_mode_arguments_are_set_for_evaluation(flag, value):
    scope: dict = {"nnx": nnx, "linen": linen, "jnp": jnp}
    body = f"return self.dense(x) if {flag} is {value} else x.sum(axis=0)"
    exec(
        f"""
class Nnx(nnx.Module):
    def __init__(self):
        self.dense = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    def __call__(self, x, {flag}):
        {body}

class Linen(linen.Module):
    def setup(self):
        self.dense = linen.Dense(3)
    def __call__(self, x, {flag}):
        {body}
""",
        scope,
    )
    for model, params in (
        models.from_nnx(scope["Nnx"](), (4,)),
        models.from_linen(scope["Linen"](), (4,)),
    ):
        assert model.apply(params, jnp.ones((2, 4))).shape == (2, 3)


def test_dropout_is_off_and_its_keys_ride_along():
    module = NnxNet()
    model, params = models.from_nnx(module, SHAPE)
    assert sorted(params) == ["conv", "head"]
    expected = module.head(nnx.tanh(module.conv(images())).mean(axis=(1, 2)))
    for _ in range(2):
        np.testing.assert_allclose(model.apply(params, images()), expected, rtol=1e-5, atol=1e-6)


# --- users' objects stay as they are -----------------------------------------------------------


def test_an_nnx_module_keeps_its_mode_convolution_and_state():
    module = NnxNet()
    module.train()
    before = jax.tree.map(jnp.copy, nnx.state(module, nnx.Param))
    graph = nnx.graphdef(module)
    model, params = models.from_nnx(module, SHAPE)
    fast = conv.for_matching(model, "cpu")
    jax.jit(jax.grad(fast.loss))(params, Batch(images(), LABELS))
    assert nnx.graphdef(module) == graph
    chex.assert_trees_all_equal(nnx.state(module, nnx.Param), before)


def test_a_linen_module_keeps_its_convolution():
    module = linen_net()
    model, params = models.from_linen(module, SHAPE)
    fast = conv.for_matching(model, "cpu")
    np.testing.assert_allclose(
        fast.apply(params, images()), model.apply(params, images()), rtol=1e-4, atol=1e-5
    )
    assert module == linen_net()
    assert module.trunk.conv_general_dilated is None
    assert conv.keeps_lax_conv(
        lambda x: module.apply({"params": params}, x, deterministic=True), images()
    )


def test_the_convolution_is_put_back_even_where_it_raises():
    def broken(*args, **kwargs):
        raise RuntimeError("broken")

    module = linen_net()
    model, _ = models.from_linen(module, SHAPE)
    with pytest.raises(RuntimeError, match="broken"):
        model.with_convolution(broken)
    assert module.trunk.conv_general_dilated is None


def test_a_swap_can_be_swapped_back():
    for model, params in (models.from_nnx(NnxNet(), SHAPE), models.from_linen(linen_net(), SHAPE)):
        fast = model.with_convolution(conv.im2col_conv)
        back = fast.with_convolution(jax.lax.conv_general_dilated)
        assert not conv.keeps_lax_conv(fast.apply, params, images())
        assert conv.keeps_lax_conv(back.apply, params, images())
        np.testing.assert_array_equal(back.apply(params, images()), model.apply(params, images()))


def test_state_that_a_layer_writes_does_not_leak_into_the_next_call():
    class Counter(nnx.Module):
        def __init__(self):
            self.dense = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
            self.calls = nnx.BatchStat(jnp.zeros(()))

        def __call__(self, x):
            self.calls[...] = self.calls[...] + 1
            return self.dense(x) * self.calls[...]

    model, params = models.from_nnx(Counter(), (4,))
    once, again = (model.apply(params, jnp.ones((1, 4))) for _ in range(2))
    np.testing.assert_array_equal(once, again)
    np.testing.assert_allclose(jax.jit(model.apply)(params, jnp.ones((1, 4))), once, rtol=1e-6)


# --- initialisation ----------------------------------------------------------------------------


def test_linen_draws_new_parameters_by_key():
    model, params = models.from_linen(linen_net(), SHAPE, key=jax.random.key(3))
    chex.assert_trees_all_equal(model.init(jax.random.key(3), SHAPE), params)
    other = model.init(jax.random.key(4), SHAPE)
    assert not np.array_equal(other["Dense_0"]["kernel"], params["Dense_0"]["kernel"])
    assert type(params) is dict


def test_nnx_returns_the_parameters_that_it_has():
    model, params = models.from_nnx(NnxNet(), SHAPE)
    chex.assert_trees_all_equal(model.init(jax.random.key(9), SHAPE), params)


def test_frozen_variables_become_plain_dicts():
    variables = freeze(linen_net().init(jax.random.key(0), images(), deterministic=True))
    _, params = models.from_linen(linen_net(), SHAPE, variables)
    assert type(params) is dict
    assert type(params["Dense_0"]) is dict


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "adapt",
    [
        lambda: models.from_nnx(NnxNet(lambda x: x - x.mean(axis=0, keepdims=True)), SHAPE),
        lambda: models.from_linen(
            linen_net(middle=lambda x: x - x.mean(axis=0, keepdims=True)), SHAPE
        ),
        lambda: models.from_linen(linen_net(middle=lambda x: x[::-1]), SHAPE),
    ],
    ids=["nnx", "linen", "order"],
)
def test_any_dependence_between_samples_is_refused(adapt):
    with pytest.raises(ValueError, match="normalises by the statistics of the batch"):
        adapt()


@pytest.mark.parametrize("positional", [True, False])
def test_train_mode_is_seen_however_it_is_asked_for(positional):
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            norm = linen.BatchNorm()
            x = norm(x, False) if positional else norm(x, use_running_average=False)
            return linen.Dense(3)(x)

    variables = {
        "params": {
            "BatchNorm_0": {"scale": jnp.ones(4), "bias": jnp.zeros(4)},
            "Dense_0": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)},
        },
        "batch_stats": {"BatchNorm_0": {"mean": jnp.zeros(4), "var": jnp.ones(4)}},
    }
    with pytest.raises(ValueError, match="use_running_average=True"):
        models.from_linen(Net(), (4,), variables)


def test_other_faults_of_a_module_are_not_called_batch_norm():
    variables = linen_net().init(jax.random.key(0), images(), deterministic=True)
    with pytest.raises(FlaxError, match="shape"):
        models.from_linen(linen_net(), (6, 6, 5), variables)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: NnxNet(lambda x: x[:, None]), r"shape \(2, 6, 4, 3\)|shape \(2"),
        (lambda: TwoOutputs(), "a tree"),
    ],
)
def test_a_module_must_return_logits(make, found):
    with pytest.raises(ValueError, match=r"must return logits \[B, C\].*" + found):
        models.from_nnx(make(), SHAPE)


class TwoOutputs(NnxNet):
    def __call__(self, x):
        logits = super().__call__(x)
        return logits, logits


# --- normalisation -----------------------------------------------------------------------------


def test_a_normalised_model_keeps_loss_convolution_and_parameters():
    base = models.lenet(3, width=2)
    doubled = base._replace(loss=lambda params, batch: 2 * base.loss(params, batch))
    params = base.init(jax.random.key(0), (8, 8, 2))
    mean, std = jnp.array([0.5, 0.1]), jnp.array([0.2, 2.0])
    raw = models.normalized(doubled, mean, std)
    x = images((8, 8, 2))
    scaled = (x - mean.reshape(1, 1, 1, 2)) / std.reshape(1, 1, 1, 2)
    np.testing.assert_allclose(raw.apply(params, x), base.apply(params, scaled), rtol=1e-6)
    expected = 2 * base.loss(params, Batch(scaled, LABELS))
    np.testing.assert_allclose(raw.loss(params, Batch(x, LABELS)), expected, rtol=1e-6)
    fast = conv.for_matching(raw, "cpu")
    assert not conv.keeps_lax_conv(fast.apply, params, x)
    np.testing.assert_allclose(fast.apply(params, x), raw.apply(params, x), rtol=1e-4, atol=1e-5)
    assert raw.layers is None
    assert (raw.num_classes, raw.name) == (3, "lenet")


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (0.0, 0.0, "std must be positive"),
        (0.0, [1.0, -1.0], "std must be positive"),
        (0.0, float("nan"), "std must be positive"),
        (0.0, float("inf"), "std must be positive"),
        (0.0, [[1.0]], "std must be positive, a number or one a channel"),
        (float("inf"), 1.0, "mean must be finite"),
        ([[0.0]], 1.0, "mean must be finite, a number or one a channel"),
    ],
)
def test_normalisation_refuses(mean, std, message):
    with pytest.raises(ValueError, match=message):
        models.normalized(models.lenet(), mean, std)


def test_grey_images_are_not_normalised_into_colours():
    raw = models.normalized(models.mlp((4,)), [0.5, 0.4, 0.3], 1.0)
    params = raw.init(jax.random.key(0), (6, 6, 3))
    with pytest.raises(ValueError, match=r"mean has 3 channels, but inputs of .* have 1"):
        raw.apply(params, images((6, 6, 1)))
