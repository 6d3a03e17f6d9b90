"""What the server sees, and what is refused before anything is computed."""

import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import invjax
from invjax import Batch, gradients
from invjax.observe import per_step_gradient

MODEL = invjax.models.mlp((8,), num_classes=3)
SHAPE = (4, 4, 1)


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0), SHAPE)


@pytest.fixture
def batch():
    return Batch(jax.random.uniform(jax.random.key(1), (5, *SHAPE)), jnp.array([0, 1, 2, 1, 1]))


def test_plain_observation(params, batch):
    observation = invjax.observe(jax.random.key(0), MODEL, params, batch)
    expected = jax.grad(MODEL.loss)(params, batch)
    chex.assert_trees_all_close(observation.gradient, expected, rtol=1e-5)
    assert observation.labels is None and observation.statistics is None
    assert observation.facts.batch_size == 5 and observation.facts.input_shape == SHAPE


def test_per_sample_defense_is_given_per_sample_gradients(params, batch):
    defense = invjax.defenses.clip_per_sample(0.1)
    observation = invjax.observe(jax.random.key(0), MODEL, params, batch, defense)
    total = gradients.clipped_sum(MODEL, params, batch, 0.1)
    expected = jax.tree.map(lambda leaf: leaf / 5, total)
    chex.assert_trees_all_close(observation.gradient, expected, atol=1e-6)


def test_grants(params, batch):
    observation = invjax.observe(
        jax.random.key(0), MODEL, params, batch, grant_labels=True, grant_batch_size=False
    )
    np.testing.assert_array_equal(observation.labels, batch.labels)
    assert observation.facts.batch_size is None
    with pytest.raises(ValueError, match="no batch norm"):
        invjax.observe(jax.random.key(0), MODEL, params, batch, grant_statistics=True)
    norms = invjax.models.resnet18(num_classes=3, width=1, norm="batch")
    weights = jax.jit(lambda key: norms.init(key, (8, 8, 1)))(jax.random.key(0))
    images = Batch(jax.random.uniform(jax.random.key(1), (2, 8, 8, 1)), jnp.array([0, 1]))
    seen = invjax.observe(jax.random.key(0), norms, weights, images, grant_statistics=True)
    assert len(seen.statistics) == 20


def test_public_randomness_is_published(params, batch):
    defense = invjax.defenses.random_mask(0.5)
    observation = invjax.observe(jax.random.key(0), MODEL, params, batch, defense)
    (mask,) = observation.public
    expected = jax.tree.map(
        jnp.where, mask, observation.gradient, jax.tree.map(jnp.zeros_like, params)
    )
    chex.assert_trees_all_equal(observation.gradient, expected)


def test_federated_update(params, batch):
    local = invjax.LocalTraining(epochs=2, batch_size=2, learning_rate=0.1, num_samples=5)
    observation = invjax.observe(jax.random.key(0), MODEL, params, batch, local=local)
    assert observation.facts.local.num_steps == 6
    chex.assert_trees_all_close(
        per_step_gradient(observation),
        jax.tree.map(lambda leaf: leaf / 0.6, observation.gradient),
        rtol=1e-5,
    )
    with pytest.raises(ValueError, match="federated update has none"):
        invjax.observe(
            jax.random.key(0),
            MODEL,
            params,
            batch,
            invjax.defenses.clip_per_sample(1.0),
            local=local,
        )


def test_vmaps_over_victims(params, batch):
    batches = jax.tree.map(lambda leaf: leaf[:, None], batch)
    keys = jax.random.split(jax.random.key(0), 5)
    defense = invjax.defenses.gaussian_noise(0.1)
    many = jax.jit(jax.vmap(lambda k, b: invjax.observe(k, MODEL, params, b, defense)))(
        keys, batches
    )
    one = invjax.observe(
        keys[2], MODEL, params, jax.tree.map(lambda leaf: leaf[2], batches), defense
    )
    chex.assert_trees_all_close(
        jax.tree.map(lambda leaf: leaf[2], many.gradient), one.gradient, atol=1e-6
    )


def test_bad_batches(params, batch):
    inputs, labels = batch
    cases = {
        r"\[0, 2\]": Batch(inputs, labels + 1),
        "finite": Batch(inputs.at[0].set(jnp.nan), labels),
        r"shape \(5,\)": Batch(inputs, labels[:3]),
        "B >= 1": Batch(inputs[:0], labels[:0]),
        "do not fit": Batch(jnp.ones((5, 6, 6, 1)), labels),
    }
    for words, case in cases.items():
        with pytest.raises(ValueError, match=words):
            invjax.observe(jax.random.key(0), MODEL, params, case)
    for case in (Batch(inputs, labels + 0.5), Batch(inputs.astype(int), labels)):
        with pytest.raises(TypeError, match="batch"):
            invjax.observe(jax.random.key(0), MODEL, params, case)


def test_bad_params_and_defenses(params, batch):
    with pytest.raises(ValueError, match="do not fit"):
        invjax.observe(jax.random.key(0), MODEL, {"w": jnp.ones(3)}, batch)
    wide = MODEL._replace(num_classes=7)
    with pytest.raises(ValueError, match="logits"):
        invjax.observe(jax.random.key(0), wide, params, batch)
    with pytest.raises(TypeError, match="defense"):
        invjax.observe(jax.random.key(0), MODEL, params, batch, "gaussian")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input_range": (1.0, 0.0)}, r"input_range must be \(low, high\) with low < high"),
        ({"input_range": (0.0, (1.0, 1.0, 1.0))}, r"one number or 1, .* of \[1, 3\]"),
        ({"optimizer": optax.adam(0.1)}, "give local with it"),
    ],
)
def test_settings_that_would_mislead_the_adversary_are_refused(params, batch, settings, message):
    with pytest.raises(ValueError, match=message):
        invjax.observe(jax.random.key(0), MODEL, params, batch, **settings)


def test_a_range_that_does_not_hold_is_told(params, batch):
    wide = batch._replace(inputs=3 * batch.inputs - 1)
    with pytest.warns(UserWarning, match=r"batch.inputs lie in \[-.*outside input_range \(0.0, 1"):
        invjax.observe(jax.random.key(0), MODEL, params, wide)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for inputs, input_range in (
            (wide.inputs, (-1.0, 2.0)),
            (batch.inputs, (0.0, 1.0)),
            ((batch.inputs > 0.5) * 1.000001, (0.0, (1.0,))),  # Up to rounding.
        ):
            shown = batch._replace(inputs=inputs)
            invjax.observe(jax.random.key(0), MODEL, params, shown, input_range=input_range)
        for wrong in ((0.0, 0.5), (0.5, 1.0), (0.0, 0.9), (0.1, 1.0)):
            with pytest.raises(UserWarning, match="outside"):
                invjax.observe(jax.random.key(0), MODEL, params, batch, input_range=wrong)
        # Of two channels the second one leaves its own range alone.
        model = invjax.models.mlp((8,), num_classes=3)
        pair = Batch(jnp.concatenate([batch.inputs, 3 * batch.inputs], axis=-1), batch.labels)
        weights = model.init(jax.random.key(0), (4, 4, 2))
        ranges = (0.0, (1.0, 3.0))
        invjax.observe(jax.random.key(0), model, weights, pair, input_range=ranges)
        with pytest.raises(UserWarning, match="outside"):
            swapped = (0.0, (3.0, 1.0))
            invjax.observe(jax.random.key(0), model, weights, pair, input_range=swapped)


def test_what_is_no_key_model_or_batch_is_named(params, batch):
    key = jax.random.key(0)
    attack = invjax.attacks.dlg(MODEL)
    seen = invjax.observe(key, MODEL, params, batch)
    for wrong in (0, jax.random.PRNGKey(0), jax.random.split(key)):
        for call in (
            lambda key: invjax.observe(key, MODEL, params, batch),
            lambda key: attack(key, seen),
        ):
            with pytest.raises(TypeError, match="key must be one typed PRNG key"):
                call(wrong)
    for wrong in (params, (MODEL, params)):
        for call in (
            lambda model: invjax.observe(key, model, params, batch),
            invjax.attacks.inverting_gradients,
            invjax.attacks.bias_trick,
        ):
            with pytest.raises(TypeError, match=r"model must be an invjax.Model, got (dict|tuple)"):
                call(wrong)
    for wrong, message in (
        (tuple(batch), r"batch must be an invjax.Batch\(inputs, labels\), got tuple"),
        (None, "got NoneType"),
        (Batch([1.0], [2]), "batch.inputs must be an array, got list"),
    ):
        with pytest.raises(TypeError, match=message):
            invjax.observe(key, MODEL, params, wrong)


def test_a_range_of_arrays_is_static_all_the_same(params, batch):
    bounds = (np.zeros(1, np.float32), np.ones(1))
    seen = invjax.observe(jax.random.key(0), MODEL, params, batch, input_range=bounds)
    assert hash(seen.facts) is not None and seen.facts.input_range == ((0.0,), (1.0,))
