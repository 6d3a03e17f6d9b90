"""The bias trick: exact for one sample, whatever comes behind the first layer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import invjax
from invjax import LocalTraining, gradients, models
from invjax.attacks.analytic import bias_trick, first_dense
from invjax.defenses.precode import precode
from invjax.models.chain import Spec, chain_model

SHAPE = (8, 8, 1)


@functools.partial(jax.jit, static_argnums=0)
def observed(model, params, batch):
    return invjax.observe(jax.random.key(1), model, params, batch)


@pytest.fixture(scope="module")
def digits():
    return invjax.datasets.digits()


def victims_of(digits, number):
    """Batches of one image."""
    return invjax.datasets.take(digits, np.arange(number)[:, None])


@pytest.mark.parametrize("grant", [False, True])
def test_one_sample_comes_back_with_its_label(digits, grant):
    model, victims = models.mlp((32,)), victims_of(digits, 6)
    params = model.init(jax.random.key(0), SHAPE)
    keys = jax.random.split(jax.random.key(1), 6)
    seen = jax.vmap(
        lambda key, batch: invjax.observe(key, model, params, batch, grant_labels=grant)
    )(keys, victims)
    attack = bias_trick(model)
    found = jax.jit(jax.vmap(attack))(keys, seen)
    np.testing.assert_allclose(found.inputs, victims.inputs, atol=1e-5)
    np.testing.assert_array_equal(found.labels, victims.labels)
    assert found.found.shape == (6, 1) and found.found.all() and found.objective.max() < 1e-5
    single = attack(keys[0], jax.tree.map(lambda leaf: leaf[0], seen))
    np.testing.assert_allclose(single.inputs, found.inputs[0], atol=1e-6)
    # Labels that were granted are not doubted.
    granted = jax.tree.map(lambda leaf: leaf[0], seen)._replace(labels=jnp.array([7]))
    assert victims.labels[0] != 7 and attack(keys[0], granted).labels.tolist() == [7]
    bias = jax.tree.map(lambda leaf: leaf[0], seen).gradient["layer01"]["bias"]
    assert single.diagnostics["unit"] == np.abs(bias).argmax()


def test_a_variational_bottleneck_behind_the_layer_hides_nothing(digits):
    """Specified: under 1e-5 over 20 digits, PRECODE with a bottleneck of 256."""
    body = models.mlp((500,), num_classes=500)
    protected = precode(body, 10)
    params, victims = protected.init(jax.random.key(0), SHAPE), victims_of(digits, 20)

    def attacked(key, batch):
        # The adversary knows the architecture, and of the noise nothing.
        seen = invjax.observe(key, protected.at(key), params, batch)
        attack = bias_trick(protected.mean(), first=lambda tree: first_dense(body, tree["body"]))
        return attack(jax.random.key(9), seen)

    found = jax.jit(jax.vmap(attacked))(jax.random.split(jax.random.key(1), 20), victims)
    assert np.abs(found.inputs - victims.inputs).max() < 1e-5
    np.testing.assert_array_equal(found.labels, victims.labels)


def test_local_training_on_one_sample_changes_nothing(digits):
    model = models.mlp((16,))
    params = model.init(jax.random.key(0), SHAPE)
    batch = invjax.datasets.take(digits, range(1))
    local = LocalTraining(epochs=4, batch_size=1, learning_rate=0.1, num_samples=1)
    seen = invjax.observe(jax.random.key(1), model, params, batch, local=local)
    found = bias_trick(model)(jax.random.key(2), seen)
    np.testing.assert_allclose(found.inputs, batch.inputs, atol=2e-5)


def test_two_samples_are_a_mixture_and_are_refused(digits):
    model = models.mlp((32,))
    params = model.init(jax.random.key(0), SHAPE)
    batch = invjax.datasets.take(digits, range(2))
    seen = observed(model, params, batch)
    attack = bias_trick(model)
    with pytest.raises(ValueError, match=r"batch_size must be 1, got 2"):
        attack(jax.random.key(0), seen)
    with pytest.raises(ValueError, match=r"batch_size must be 1, got None"):
        hidden = dataclasses.replace(seen.facts, batch_size=None)
        attack(jax.random.key(0), seen._replace(facts=hidden))
    # What it would have said: on the line through both, and its objective tells.
    mixture = attack.init(jax.random.key(0), seen)
    unit = mixture.diagnostics["unit"]
    each = gradients.per_sample_gradients(model, params, batch)["layer01"]["bias"][:, unit]
    share = each / each.sum()
    expected = (share.reshape(2, 1, 1, 1) * batch.inputs).sum(axis=0)
    np.testing.assert_allclose(mixture.inputs[0], expected, atol=1e-4)
    assert mixture.objective > 0.1


def test_it_says_when_there_is_nothing_to_read(digits):
    model = models.mlp((16,))
    params = model.init(jax.random.key(0), SHAPE)
    # Dead units: no bias has a gradient.
    params["layer01"]["bias"] = jnp.full(16, -1e3)
    batch = invjax.datasets.take(digits, range(1))
    seen = observed(model, params, batch)
    first = bias_trick(first=lambda tree: first_dense(model, tree))
    found = first(jax.random.key(0), seen)
    assert not found.found.any() and (found.inputs == 0).all() and found.labels.tolist() == [-1]
    damaged = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.inf), seen.gradient)
    found = first(jax.random.key(0), seen._replace(gradient=damaged))
    assert not found.found.any() and (found.inputs == 0).all()


def test_it_finds_only_a_dense_layer_with_a_bias_at_the_input():
    with pytest.raises(ValueError, match="Give bias_trick a model or first="):
        bias_trick()
    with pytest.raises(ValueError, match=r"convnet64 has no layer view: .*with_layers"):
        bias_trick(models.convnet())
    with pytest.raises(ValueError, match="convnet64 has no layer view"):
        first_dense(models.convnet(), {})
    for model, message in (
        (models.lenet(), "first layer of lenet must be dense with a bias, got conv"),
        (models.mlp(bias=False), "mlp must be dense with a bias, got dense without a bias"),
        (chain_model([Spec("flatten")], 64, "flat"), "flat has no dense layer"),
        (
            chain_model([Spec("flatten", activation="tanh"), Spec("dense", 10)], 10, "squashed"),
            "squashed must be dense with a bias, got flatten",
        ),
    ):
        params = model.init(jax.random.key(0), SHAPE)
        with pytest.raises(ValueError, match=message):
            first_dense(model, params)
    weight, bias = first_dense(models.mlp((7,)), models.mlp((7,)).init(jax.random.key(0), SHAPE))
    assert weight.shape == (64, 7) and bias.shape == (7,)


def test_it_refuses_what_it_cannot_read(digits):
    model = models.mlp((16,))
    params = model.init(jax.random.key(0), SHAPE)
    batch = invjax.datasets.take(digits, range(1))
    seen = observed(model, params, batch)
    local = LocalTraining(
        epochs=1, batch_size=1, learning_rate=0.1, num_samples=1, optimizer="adam"
    )
    stepped = invjax.observe(
        jax.random.key(1), model, params, batch, local=local, optimizer=optax.adam(0.1)
    )
    for attack in (bias_trick(model), bias_trick(first=lambda tree: first_dense(model, tree))):
        with pytest.raises(ValueError, match="released weights"):
            attack(jax.random.key(0), seen._replace(gradient=None))
        # One step of Adam, too, is no gradient: all entries have moved alike.
        with pytest.raises(ValueError, match=r"local\.optimizer must be 'sgd', .* got 'adam'"):
            attack(jax.random.key(0), stepped)

    def second(tree):
        return tree["layer02"]["kernel"], tree["layer02"]["bias"]

    with pytest.raises(ValueError, match=r"inputs \(8, 8, 1\) must have .* got \(16, 10\)"):
        bias_trick(first=second)(jax.random.key(0), seen)
