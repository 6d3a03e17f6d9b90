"""Structure and initialisation of the zoo, as published; what it refuses."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from invjax import conv, models
from invjax.models.chain import Spec, chain_model
from invjax.models.layers import apply_layers


def count(model, shape) -> int:
    shapes = jax.eval_shape(lambda key: model.init(key, shape), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        (models.lenet(), (28, 28, 1), 13_426),
        (models.lenet(), (8, 8, 1), 8_026),
        (models.convnet_small(width=64), (32, 32, 3), 963_466),
        (models.mlp((100,), 10), (28, 28, 1), 785 * 100 + 101 * 10),
        (models.mlp((100,), 10, bias=False), (28, 28, 1), 784 * 100 + 100 * 10),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_parameter_counts(model, shape, expected):
    assert count(model, shape) == expected


@pytest.mark.parametrize("width", [8, 64])
def test_convnet_has_eight_convolutions_and_a_dense_layer_of_36_widths(width):
    channels = [3, width, 2 * width, 2 * width] + [4 * width] * 5
    convs = sum(9 * i * o + o for i, o in itertools.pairwise(channels))
    dense = 36 * width * 10 + 10
    assert count(models.convnet(width=width, norm="none"), (32, 32, 3)) == convs + dense
    norms = 2 * sum(channels[1:])
    for norm in ("batch", "group"):
        assert count(models.convnet(width=width, norm=norm), (32, 32, 3)) == convs + dense + norms


@pytest.mark.parametrize(("make", "second"), [(models.cnn6, 36), (models.cnn6_d, 20)])
def test_cnn6_is_the_published_network(make, second):
    model = make()
    params = jax.eval_shape(lambda key: model.init(key, (32, 32, 3)), jax.random.key(0))
    layers = model.layers(params)
    convs = [layer for layer in layers if layer.kind == "conv"]
    assert [layer.weight.shape[-1] for layer in convs] == [12, second, 36, 36, 64, 128]
    side, sides = 32, [32]
    for layer in convs:
        (low, high), _ = layer.padding
        side = (side + low + high - layer.weight.shape[0]) // layer.strides[0] + 1
        sides.append(side)
    assert sides == [32, 17, 9, 9, 9, 5, 5]
    assert layers[-1].weight.shape == (3200, 1)
    assert all(layer.bias is None for layer in layers)
    assert {layer.activation for layer in convs} == {"leaky_relu_0.2"}
    assert float(models.activations["leaky_relu_0.2"](jnp.array(-1.0))) == pytest.approx(-0.2)


def test_cnn6_of_ten_classes_has_a_biased_head():
    params = jax.eval_shape(lambda key: models.cnn6(10).init(key, (32, 32, 3)), jax.random.key(0))
    head = models.cnn6(10).layers(params)[-1]
    assert head.weight.shape == (3200, 10)
    assert head.bias.shape == (10,)


def test_torch_initialisation_has_the_bound_of_the_fan_in(key):
    for layer in models.cnn6().layers(models.cnn6().init(key, (16, 16, 3))):
        if layer.weight is not None:
            bound = float(np.prod(layer.weight.shape[:-1])) ** -0.5
            assert 0.95 * bound < float(jnp.abs(layer.weight).max()) <= bound
    dense = models.mlp((50,), 10).init(key, (4, 4, 1))["layer01"]
    assert 0.2 < float(jnp.abs(dense["bias"]).max()) <= 0.25


@pytest.mark.parametrize(("init", "variance"), [("he", 2 / 100), ("lecun", 1 / 100)])
def test_normal_initialisation_with_zero_biases(init, variance, key):
    dense = models.mlp((400,), 10, init=init).init(key, (10, 10, 1))["layer01"]
    assert float(dense["kernel"].var()) == pytest.approx(variance, rel=0.05)
    assert not dense["bias"].any()


def test_parameters_depend_on_the_key_and_on_nothing_else(key):
    model, shape = models.lenet(width=2), (8, 8, 1)
    first, again = model.init(key, shape), model.init(key, list(shape))
    chex.assert_trees_all_equal(first, again)
    swapped = model.with_convolution(conv.im2col_conv).init(key, shape)
    chex.assert_trees_all_equal(first, swapped)
    other = model.init(jax.random.key(5), shape)
    leaves = zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True)
    assert all((a != b).any() for a, b in leaves)
    values = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(first)])
    assert len(np.unique(values)) == len(values)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: models.mlp((4,), activation="rellu"), "activation must be one of .*'rellu'"),
        (
            lambda: models.lenet(init="default"),
            "init must be one of 'torch', 'he', 'lecun', 'wide'",
        ),
        (lambda: models.convnet(norm="layer"), "norm must be one of 'none', 'batch', 'group'"),
        (lambda: models.resnet18(norm="none"), "norm must be one of 'group', 'batch'"),
        (lambda: models.resnet18(activation="no"), "activation must be one of .*no"),
        (lambda: models.resnet18(hidden=-1), "hidden must be at least 0, got -1"),
        (lambda: models.resnet18(width=0), "width must be at least 1, got 0"),
        (lambda: models.mlp((4, 0)), r"features of layer 2 \(dense\) must be at least 1, got 0"),
        (lambda: models.lenet(0), r"features of layer 4 \(dense\) must be at least 1, got 0"),
        (lambda: chain_model([Spec("maxpool")], 2, "x"), "kind must be one of 'conv', .*'maxpool'"),
        (
            lambda: chain_model([Spec("max_pool", window=0)], 2, "x"),
            r"window of layer 0 \(max_pool\) must be at least 1",
        ),
        (
            lambda: chain_model([Spec("dense", 2, norm="batch")], 2, "x"),
            r"norm must be 'none' for layer 0 \(dense\), got 'batch'",
        ),
    ],
)
def test_unknown_choices_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("model", [models.lenet(), models.resnet18(width=4)])
@pytest.mark.parametrize("shape", [(64,), (8, 8), (1, 8, 8, 3)])
def test_images_must_have_three_axes(model, shape, key):
    with pytest.raises(ValueError, match=r"input_shape must be \(height, width, channels\)"):
        model.init(key, shape)


def test_inputs_that_are_too_small_are_refused(key):
    with pytest.raises(ValueError, match=r"too small: layer 9 .max_pool. leaves nothing"):
        models.convnet(width=2).init(key, (8, 8, 3))
    specs = [Spec("conv", 2, window=5)]
    with pytest.raises(ValueError, match=r"layer 0 .conv. leaves nothing of \(4, 4, 1\)"):
        chain_model(specs, 2, "tiny").init(key, (4, 4, 1))


@pytest.mark.parametrize(
    ("model", "shape", "widths"),
    [
        (models.lenet(num_classes=4), (28, 28, 1), (588, 4)),
        (models.mlp((6, 5), num_classes=4), (3, 3, 1), (9, 6, 5, 4)),
        (models.convnet(num_classes=4, width=1, norm="group"), (32, 32, 3), (36, 4)),
        (models.resnet18(4, width=2, hidden=7, activation="tanh"), (8, 8, 3), (16, 7, 4)),
        (models.resnet18(4, width=2), (8, 8, 3), (16, 4)),
        (models.normalized(models.mlp((6,), num_classes=4), 0.5, 0.2), (3, 3, 1), (9, 6, 4)),
    ],
)
def test_the_head_of_the_features_is_the_model(model, shape, widths, key):
    params = model.init(key, shape)
    inputs = jax.random.uniform(key, (2, *shape))
    features, head = model.head.features(params, inputs), model.head.layers(params)
    assert (*[layer.weight.shape[0] for layer in head], head[-1].weight.shape[1]) == widths
    logits = apply_layers(head, features.reshape(2, -1))
    np.testing.assert_allclose(logits, model.apply(params, inputs), atol=1e-5)
    assert not any(layer.activation == "identity" for layer in head[:-1])
