"""Models by name, and weights in files: what the command line may write, and what it may read."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from invjax import models


def shapes(model, shape):
    return jax.eval_shape(lambda key: model.init(key, shape), jax.random.key(0))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mlp", lambda: models.mlp(num_classes=5)),
        ("mlp(64, 32)", lambda: models.mlp((64, 32), 5)),
        ("mlp(7)", lambda: models.mlp((7,), 5)),
        ("mlp((6, 4), bias=False)", lambda: models.mlp((6, 4), 5, bias=False)),
        ("mlp(widths=[3])", lambda: models.mlp((3,), 5)),
        ("lenet(width=3, activation='relu')", lambda: models.lenet(5, width=3)),
        ("cnn6_d", lambda: models.cnn6_d(5)),
        ("resnet18(width=4, norm='batch')", lambda: models.resnet18(5, width=4, norm="batch")),
    ],
)
def test_a_name_with_settings_is_the_call(text, expected):
    model, other = models.by_name(text, 5), expected()
    chex.assert_trees_all_equal_shapes(shapes(model, (32, 32, 3)), shapes(other, (32, 32, 3)))
    assert (model.num_classes, model.name) == (5, other.name)


def test_an_activation_by_name_is_used(key):
    model = models.by_name("lenet(width=2, activation='relu')", 3)
    layers = model.layers(model.init(key, (8, 8, 1)))
    assert [layer.activation for layer in layers] == ["relu"] * 3 + ["identity"] * 2


@pytest.mark.parametrize("name", ["convnet", "convnet_small", "cnn6", "cnn", "resnet18"])
def test_all_of_the_zoo_has_a_name(name):
    assert models.by_name(name, 7).num_classes == 7


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(
        ValueError, match=r"cnn, .*cnn6, cnn6_d, convnet, .*Did you mean 'resnet18'"
    ):
        models.by_name("resnet50", 10)


@pytest.mark.parametrize("text", ["mlp(64, widths=3)", "mlp(64, depth=2)", "lenet(10)"])
def test_settings_that_a_model_does_not_have_are_refused(text):
    with pytest.raises(ValueError, match="The model"):
        models.by_name(text, 10)


def test_a_list_of_layers_survives_a_file(tmp_path):
    class Net(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(11)])

        def __call__(self, x):
            for layer in self.layers:
                x = nnx.tanh(layer(x))
            return x

    model, params = models.from_nnx(Net(), (4,))
    path = tmp_path / "made" / "weights.npz"
    models.save_params(path, params)
    like = jax.eval_shape(lambda: params)
    loaded = models.load_params(str(path), like)
    chex.assert_trees_all_equal(loaded, params)
    x = jnp.ones((2, 4))
    np.testing.assert_array_equal(model.apply(loaded, x), model.apply(params, x))


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "weights.npz"
    models.save_params(path, {"a": jnp.ones(2)})

    def interrupted(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", interrupted)
    with pytest.raises(KeyboardInterrupt):
        models.save_params(path, {"a": jnp.zeros(2)})
    np.testing.assert_array_equal(models.load_params(path, {"a": jnp.zeros(2)})["a"], np.ones(2))
    assert [file.name for file in tmp_path.iterdir()] == ["weights.npz"]


@pytest.mark.parametrize(
    "leaf", [jnp.ones(2, jnp.bfloat16), np.array([object()]), jax.random.key(0)]
)
def test_what_npz_cannot_hold_is_refused(tmp_path, leaf):
    with pytest.raises(ValueError, match=r"params\['a'\]\['b'\] has dtype .* npz cannot hold"):
        models.save_params(tmp_path / "weights.npz", {"a": {"b": leaf}})
    assert not list(tmp_path.iterdir())


def test_pickled_objects_are_never_read(tmp_path):
    path = tmp_path / "weights.npz"
    np.savez(path, **{"['a']": np.array([{"run": "me"}], dtype=object)})
    with pytest.raises(ValueError, match="cannot be read as weights"):
        models.load_params(path, {"a": jnp.zeros(1)})


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04"])
def test_files_of_another_kind_are_refused(tmp_path, content):
    path = tmp_path / "weights.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as weights"):
        models.load_params(path, {"a": jnp.zeros(1)})
    with pytest.raises(ValueError, match="cannot be read as weights"):
        models.load_params(tmp_path / "missing.npz", {"a": jnp.zeros(1)})
