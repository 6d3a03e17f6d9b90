"""The reference architectures of layer-wise reconstruction, against their published definitions."""

import jax
import jax.numpy as jnp
import pytest

from invjax import models
from invjax.models import by_name
from invjax.models.reference import NAMES, reference

# Numbers behind the convolutions on 32x32x3, which the dense layer must read.
FEATURES = {
    "cnn2_c1": 5400,
    "cnn2_c2": 1350,
    "cnn2_c4": 900,
    "cnn2_c5": 3072,
    "cnn2_c6": 2352,
    "cnn3_c1": 588,
    "cnn3_c2": 147,
    "cnn3_c3": 7056,
    "cnn3_c4": 4704,
    "cnn4_c1": 363,
    "cnn4_c2": 4608,
    "cnn4_c3": 2304,
    "lenet2": 768,
    "lenet_leaky": 768,
    "cnn6": 3200,
    "cnn6_d": 3200,
}


def view(model, side=32):
    shape = (side, side, 3)
    return model.layers(jax.eval_shape(lambda: model.init(jax.random.key(0), shape)))


def test_all_sixteen():
    assert len(set(NAMES)) == 16 and set(NAMES) == set(FEATURES)


@pytest.mark.parametrize("name", NAMES)
def test_structure(name):
    model = reference(name)
    *convs, flatten, head = view(model)
    assert model.name == name
    assert {layer.kind for layer in convs} == {"conv"} and flatten.kind == "flatten"
    assert head.weight.shape == (FEATURES[name], 10) and head.bias.shape == (10,)
    depth = {"cnn2": 1, "cnn3": 2, "cnn4": 3, "lene": 3, "cnn6": 6}[name[:4]]
    assert len(convs) == depth
    # Only the LeNet's convolutions have biases.
    assert {layer.bias is not None for layer in convs} == {name == "lenet_leaky"}
    expected = {"lenet_leaky": "leaky_relu", "cnn6": "leaky_relu_0.2", "cnn6_d": "leaky_relu_0.2"}
    assert {layer.activation for layer in convs} == {expected.get(name, "tanh")}
    assert head.activation == ("tanh" if name in ("cnn2_c4", "cnn2_c5") else "identity")


def test_convolutions_of_one_network_as_printed():
    found = [
        (layer.weight.shape[-1], layer.weight.shape[0], layer.strides[0], layer.padding[0][0])
        for layer in view(reference("cnn4_c3"))[:3]
    ]
    assert found == [(6, 5, 1, 0), (16, 5, 2, 0), (16, 5, 1, 2)]


def test_variants_of_the_activations():
    model = reference("cnn3_c1", 7, activation="softplus", last_activation="sigmoid")
    *convs, _, head = view(model)
    assert [layer.activation for layer in convs] == ["softplus", "softplus"]
    assert head.activation == "sigmoid" and head.weight.shape[1] == 7
    params = model.init(jax.random.key(0), (32, 32, 3))
    outputs = model.apply(params, jnp.ones((2, 32, 32, 3)))
    assert outputs.shape == (2, 7) and float(outputs.min()) > 0


def test_cnn6_is_the_zoos():
    for name, make in (("cnn6", models.cnn6), ("cnn6_d", models.cnn6_d)):
        assert view(reference(name, 1)) == view(make(1))
    assert view(reference("cnn6", 1)) != view(reference("cnn6_d", 1))


def test_by_name_knows_both_lists():
    assert by_name("cnn3_c3(activation='elu')", 4).num_classes == 4
    assert view(by_name("cnn3_c3(activation='elu')", 4))[0].activation == "elu"
    assert (
        by_name("lenet", 10).name == "lenet" and view(by_name("lenet", 10))[0].activation != "tanh"
    )
    assert view(by_name("mlp(64, 32)", 10))[1].weight.shape == (3072, 64)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: reference("cnn2_c3"), "Did you mean 'cnn._c.'"),
        (lambda: reference("cnn2_c1", activation="tan"), "activation must be one of"),
        (lambda: reference("cnn2_c1", init="zero"), "init must be one of"),
        (lambda: reference("cnn6", activation="relu"), "cnn6 takes no activation"),
        (lambda: by_name("lenet22", 10), "Did you mean 'lenet2'"),
        (lambda: by_name("lenet2,cnn6", 10), "got 2"),
        (lambda: by_name("cnn2_c1(depth=2)", 10), "depth"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
