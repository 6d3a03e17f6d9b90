"""The zoo against its published sizes, its layer view, and the properties every model has."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import invjax
from invjax import Batch, conv, gradients, models
from invjax.models.chain import Spec, chain_model

SIZES = {
    "lenet": (models.lenet(), (32, 32, 3), 15_826),
    "convnet": (models.convnet(), (32, 32, 3), 2_904_970),
    "convnet_small": (models.convnet_small(), (32, 32, 3), 242_122),
    "cnn": (models.cnn(), (28, 28, 1), 333_526),
    "cnn6": (models.cnn6(), (32, 32, 3), 125_456),
    "cnn6_softmax": (models.cnn6(10), (32, 32, 3), 154_266),
    "cnn6_d": (models.cnn6_d(), (32, 32, 3), 118_544),
    "resnet18": (models.resnet18(), (32, 32, 3), 11_173_962),
}
SMALL = {
    "mlp": (models.mlp((7, 5), activation="tanh"), (3, 3, 2)),
    "mlp_no_bias": (models.mlp((7,), bias=False, init="he"), (9,)),
    "lenet": (models.lenet(width=3), (8, 8, 1)),
    "convnet": (models.convnet(width=2, norm="none"), (10, 10, 3)),
    "convnet_batch": (models.convnet(width=2), (10, 10, 3)),
    "convnet_small": (models.convnet_small(width=2), (14, 14, 1)),
    "cnn6": (models.cnn6(), (12, 12, 3)),
    "cnn": (models.cnn(), (8, 8, 1)),
    "resnet_group": (models.resnet18(width=8), (8, 8, 1)),
    "resnet_batch": (models.resnet18(width=8, norm="batch"), (8, 8, 1)),
}
NHWC = ("NHWC", "HWIO", "NHWC")
CHAINS = ["mlp", "mlp_no_bias", "lenet", "convnet", "convnet_small", "cnn6", "cnn"]


def start(name):
    model, shape = SMALL[name]
    params = model.init(jax.random.key(0), shape)
    inputs = jax.random.normal(jax.random.key(1), (3, *shape))
    return model, params, inputs


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts(name):
    model, shape, expected = SIZES[name]
    params = jax.eval_shape(lambda key: model.init(key, shape), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected


def test_cnn6_shapes():
    model, shape, _ = SIZES["cnn6"]
    params = model.init(jax.random.key(0), shape)
    layers = model.layers(params)
    x, sides = jnp.zeros((1, *shape)), []
    for layer in layers[:6]:
        x = lax.conv_general_dilated(
            x,
            layer.weight,
            layer.strides,
            layer.padding,
            dimension_numbers=NHWC,
        )
        sides.append(x.shape[1])
    assert sides == [17, 9, 9, 9, 5, 5]
    assert layers[-1].weight.shape == (3200, 1) and layers[-1].bias is None


@pytest.mark.parametrize("name", SMALL)
def test_batches_are_made_of_samples(name):
    model, params, inputs = start(name)
    logits = model.apply(params, inputs)
    assert logits.shape == (3, model.num_classes)
    alone = jax.vmap(lambda x: model.apply(params, x[None])[0])(inputs)
    np.testing.assert_allclose(alone, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_gradients_agree_on_every_convolution(name):
    model, params, inputs = start(name)
    labels = jnp.array([0, 1, 0])
    expected = jax.jit(jax.grad(model.loss))(params, Batch(inputs, labels))
    fast = conv.for_matching(model, "cpu")
    found = jax.jit(lambda p, x: gradients.gradient(fast, p, Batch(x, labels)))(params, inputs)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    chex.assert_trees_all_close(found, expected, rtol=1e-3, atol=2e-5 * scale)
    assert not conv.keeps_lax_conv(fast.apply, params, inputs)


@pytest.mark.parametrize("name", CHAINS)
def test_layer_view_runs_the_model(name):
    model, params, inputs = start(name)
    x = inputs
    for layer in model.layers(params):
        if layer.kind == "conv":
            numbers = ("NHWC", "HWIO", "NHWC")
            x = lax.conv_general_dilated(
                x, layer.weight, layer.strides, layer.padding, dimension_numbers=numbers
            )
        elif layer.kind == "dense":
            x = x @ layer.weight
        elif layer.kind == "flatten":
            x = x.reshape(x.shape[0], -1)
        elif layer.kind == "global_average_pool":
            x = x.mean(axis=(1, 2))
        else:
            reduce, initial = (lax.max, -jnp.inf) if layer.kind == "max_pool" else (lax.add, 0.0)
            window = (1, *layer.window, 1)
            x = lax.reduce_window(x, initial, reduce, window, (1, *layer.strides, 1), "VALID")
            x = x / np.prod(layer.window) if layer.kind == "average_pool" else x
        if layer.bias is not None:
            x = x + layer.bias.reshape((1,) * (x.ndim - 1) + (-1,))
        x = models.activations[layer.activation](x)
    np.testing.assert_allclose(x, model.apply(params, inputs), rtol=1e-4, atol=1e-5)
    gradient = jax.grad(model.loss)(params, Batch(inputs, jnp.zeros(3, jnp.int32)))
    for ours, theirs in zip(model.layers(params), model.layers(gradient), strict=True):
        assert (ours.weight is None) == (theirs.weight is None)
        assert ours.weight is None or ours.weight.shape == theirs.weight.shape


def test_losses():
    model, params, inputs = start("mlp")
    labels = jnp.array([0, 4, 9])
    soft = jax.nn.one_hot(labels, 10)
    logits = np.asarray(model.apply(params, inputs), np.float64)
    expected = -np.mean(
        [row[label] - np.log(np.exp(row).sum()) for row, label in zip(logits, labels, strict=True)]
    )
    np.testing.assert_allclose(model.loss(params, Batch(inputs, labels)), expected, rtol=1e-5)
    np.testing.assert_allclose(model.loss(params, Batch(inputs, soft)), expected, rtol=1e-5)
    binary, weights, images = start("cnn6")
    logit = np.asarray(binary.apply(weights, images), np.float64)[:, 0]
    expected = np.mean(np.log1p(np.exp(-logit * np.array([1, -1, 1]))))
    found = binary.loss(weights, Batch(images, jnp.array([1, 0, 1])))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_batch_norm_statistics():
    model, params, inputs = start("convnet_batch")
    (mean, variance), *others = model.statistics(params, inputs)
    first = lax.conv_general_dilated(
        inputs,
        params["layer00"]["kernel"],
        (1, 1),
        "SAME",
        dimension_numbers=NHWC,
    ) + params["layer00"]["bias"].reshape(1, 1, 1, -1)
    np.testing.assert_allclose(mean, first.mean(axis=(0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(variance, first.var(axis=(0, 1, 2)), rtol=1e-4)
    assert len(others) == 7


def test_wide_initialisation():
    params = models.lenet().init(jax.random.key(0), (32, 32, 3))
    for leaf in jax.tree.leaves(params):
        assert jnp.abs(leaf).max() <= 0.5
    assert 0.28 < float(jnp.std(params["layer04"]["kernel"])) < 0.3


def test_by_name_and_errors():
    assert models.by_name("mlp((6, 4))", 3).num_classes == 3
    assert models.by_name("lenet(width=2)", 10).name == "lenet"
    for text, words in {
        "lenett": "Did you mean 'lenet'",
        "lenet,mlp": "Name one",
        "lenet(depth=3)": "depth",
        "mlp(activation='step')": "activation",
        "lenet(init='zeros')": "init",
        "convnet(norm='layer')": "norm",
        "resnet18(norm='layer')": "norm",
    }.items():
        with pytest.raises(ValueError, match=words):
            models.by_name(text, 10)
    with pytest.raises(ValueError, match="too small"):
        models.convnet().init(jax.random.key(0), (2, 2, 1))
    with pytest.raises(ValueError, match="too small"):
        chain_model([Spec("conv", 2, 5)], 2, "valid").init(jax.random.key(0), (3, 3, 1))


def test_weights_in_files(tmp_path):
    _, params, _ = start("lenet")
    path = tmp_path / "weights.npz"
    models.save_params(path, params)
    chex.assert_trees_all_equal(models.load_params(path, params), params)
    assert [file.name for file in tmp_path.iterdir()] == ["weights.npz"]
    other = models.lenet(width=4).init(jax.random.key(0), (8, 8, 1))
    with pytest.raises(ValueError, match="must have shape"):
        models.load_params(path, other)
    with pytest.raises(ValueError, match="missing"):
        models.load_params(path, start("mlp")[1])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        models.load_params(path, params)
    models.save_params(path, jax.tree.map(lambda leaf: leaf * jnp.nan, params))
    with pytest.raises(ValueError, match="finite"):
        models.load_params(path, params)
    assert invjax.models.lenet is models.lenet
