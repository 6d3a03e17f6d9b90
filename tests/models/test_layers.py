"""A chain model layer by layer: the same values and derivatives as the model itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

import invjax
from invjax import conv, models
from invjax.models import layers
from invjax.models.chain import Spec, chain_model


def test_derivatives_by_hand_are_those_of_the_model():
    with jax.enable_x64(True):
        model = models.mlp((30, 25), 5, init="he")
        params = jax.tree.map(
            lambda leaf: leaf.astype(jnp.float64), model.init(jax.random.key(0), (20,))
        )
        inputs = jax.random.normal(jax.random.key(1), (4, 20), dtype=jnp.float64)
        labels = jnp.array([0, 3, 1, 3])
        gradient = jax.grad(model.loss)(params, invjax.Batch(inputs, labels))
        dense = layers.dense_layers(model, params)
        values = layers.preactivations(dense, inputs)
        np.testing.assert_allclose(values[-1], model.apply(params, inputs), rtol=0, atol=1e-14)
        deltas = layers.backpropagate(dense, values, layers.loss_vectors(values[-1], labels))
        activations = [inputs, *(jnp.maximum(value, 0) for value in values[:-1])]
        theirs = layers.dense_layers(model, gradient)
        for activation, delta, layer in zip(activations, deltas, theirs, strict=True):
            np.testing.assert_allclose(activation.T @ delta / 4, layer.weight, rtol=0, atol=1e-14)
            np.testing.assert_allclose(delta.mean(axis=0), layer.bias, rtol=0, atol=1e-14)


@pytest.mark.parametrize("make", [models.lenet, models.cnn, models.mlp])
def test_layers_compose_to_the_model(make):
    model = make()
    params = model.init(jax.random.key(0), (28, 28, 1))
    inputs = jax.random.uniform(jax.random.key(1), (2, 28, 28, 1))
    composed = layers.apply_layers(layers.layers_of(model, params), inputs)
    np.testing.assert_allclose(composed, model.apply(params, inputs), rtol=0, atol=1e-5)


def test_the_head_of_a_convolutional_network():
    model = models.cnn()
    params = model.init(jax.random.key(0), (28, 28, 1))
    front, head = layers.split_at_head(model, params)
    assert [layer.kind for layer in head] == ["dense", "dense"] and front[-1].kind == "flatten"
    with pytest.raises(ValueError, match="fully connected, got a layer conv"):
        layers.dense_layers(model, params)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (models.mlp((8,), activation="tanh"), r"activations \['relu', 'identity'\], got"),
        (models.mlp((8,), 1), "single logit"),
        (chain_model([Spec("flatten")], 4, "bare"), "does not end in a dense layer"),
        (models.from_apply(lambda params, x: x, lambda key, shape: {}, 4), "no layer view"),
    ],
)
def test_what_is_no_dense_relu_network(model, message):
    params = model.init(jax.random.key(0), (2, 2, 1))
    with pytest.raises(ValueError, match=message):
        layers.dense_layers(model, params)


def test_a_view_of_ones_own_model_is_compared_with_it():
    net = linen.Sequential([linen.Dense(16), linen.relu, linen.Dense(10)])
    model, params = models.from_linen(net, (64,))

    def view(activation):
        def layers(tree):
            first, last = tree["layers_0"], tree["layers_2"]
            return (
                invjax.Layer("dense", first["kernel"], first["bias"], activation),
                invjax.Layer("dense", last["kernel"], last["bias"]),
            )

        return layers

    with pytest.raises(ValueError, match=r"Sequential has no layer view: .*with_layers"):
        invjax.attacks.bias_trick(model)
    with pytest.raises(ValueError, match="layers must compute the logits of Sequential"):
        models.with_layers(model, view("tanh"), params, (64,))
    for wrong in (
        lambda tree: view("relu")(tree)[::-1],
        lambda tree: view("swish")(tree),
        lambda tree: tree["nope"],
    ):
        with pytest.raises(ValueError, match="layers cannot be applied"):
            models.with_layers(model, wrong, params, (64,))

    # Fresh biases are zero, and count all the same.
    def bare(tree):
        return tuple(layer._replace(bias=None) for layer in view("relu")(tree))

    with pytest.raises(ValueError, match="layers must compute the logits of Sequential"):
        models.with_layers(model, bare, params, (64,))
    seeing = models.with_layers(model, view("relu"), params, (64,))
    batch = invjax.Batch(jax.random.uniform(jax.random.key(1), (1, 64)), jnp.array([3]))
    seen = invjax.observe(jax.random.key(2), seeing, params, batch)
    found = invjax.attacks.bias_trick(seeing)(jax.random.key(3), seen)
    np.testing.assert_allclose(found.inputs, batch.inputs, atol=1e-5)
    # Attacks that swap convolutions keep the view.
    assert conv.for_matching(seeing, "cpu").layers is seeing.layers
