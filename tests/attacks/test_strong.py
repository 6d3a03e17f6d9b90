"""The strong attack: features from the head's gradient, a span, a gate, and a generator."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import invjax
from invjax import datasets, defenses, metrics
from invjax.attacks.analytic.tensor.head import head_features
from invjax.attacks.matching.generator import unet
from invjax.attacks.strong import disagreement, guidance, strong
from invjax.models.chain import Spec, chain_model

MODEL = chain_model(
    [
        Spec("conv", 8, 3, 2, 1, "tanh"),
        Spec("flatten"),
        Spec("dense", 24, activation="tanh"),
        Spec("dense", 512, activation="tanh"),
        Spec("dense", 10),
    ],
    10,
    "small",
)
BATCH = datasets.take(datasets.digits(), np.array([3, 7, 12]))
KEY = jax.random.key(0)
SMALL = functools.partial(unet, width=8, channels=4)


@functools.cache
def problem(noise: float = 0.0):
    params = jax.jit(lambda key: MODEL.init(key, (8, 8, 1)))(KEY)
    defense = defenses.gaussian_noise(noise) if noise else None
    observe = jax.jit(lambda: invjax.observe(KEY, MODEL, params, BATCH, defense))
    return params, observe()


@functools.cache
def attacked(guide: str, noise: float = 0.0, **settings):
    attack = strong(MODEL, guide=guide, **{"num_steps": 60, "generator": SMALL, **settings})
    return jax.jit(attack)(jax.random.key(1), problem(noise)[1])


def true_features(params):
    between = MODEL.head.layers(params)[0]
    below = MODEL.head.features(params, BATCH.inputs).reshape(3, -1)
    return jnp.tanh(below @ between.weight + between.bias[None])


def test_features_and_labels_come_from_the_gradient():
    params, _ = problem()
    found = attacked("features", num_steps=3, generator=None)
    assert found.inputs.shape == (3, 8, 8, 1)
    assert found.inputs.min() >= 0 and found.inputs.max() <= 1
    order = [found.labels.tolist().index(label) for label in BATCH.labels.tolist()]
    features = found.diagnostics["features"][jnp.array(order)]
    np.testing.assert_allclose(features, true_features(params), atol=2e-3)
    assert found.diagnostics["reliability"].min() > 0.9 and found.diagnostics["gate"] > 0.9
    spanned = true_features(params) @ found.diagnostics["subspace"].T
    np.testing.assert_allclose(
        jnp.linalg.norm(spanned, axis=1), jnp.linalg.norm(true_features(params), axis=1), rtol=1e-4
    )


@pytest.mark.parametrize("guide", ["subspace", "features"])
def test_the_truth_agrees_and_others_do_not(guide):
    params, seen = problem()
    found = jax.jit(lambda key: head_features(MODEL, params, seen.gradient, 3, key=key))(KEY)
    known = guidance(found, BATCH.labels, 0.05)
    agree = functools.partial(disagreement, guide, known=known)
    assert agree(true_features(params)) < 1e-4
    other = jax.random.normal(KEY, known.features.shape)
    assert 0.3 < agree(other) <= 2
    if guide == "subspace":
        mixed = jax.random.normal(KEY, (3, 3)) @ true_features(params)
        assert agree(mixed) < 1e-4
    else:
        mirrored = 2 * known.features.mean(axis=0, keepdims=True) - known.features
        np.testing.assert_allclose(agree(mirrored), 2 * known.reliability.mean(), rtol=1e-4)


def test_features_are_paired_by_label_and_trusted_as_far_as_they_fit():
    class Found:
        features = jnp.arange(4.0)[:, None] * jnp.ones((1, 5))
        labels = jnp.array([2, 5, 2, 7])
        residual = jnp.array([0.0, 0.025, 0.2, jnp.inf])
        subspace = jnp.eye(5)[:4]
        gap = jnp.array(0.01)

    known = guidance(Found, jnp.array([7, 2, 4, 2]), 0.05)
    assert known.features[0, 0] == 3 and {*known.features[jnp.array([1, 3]), 0].tolist()} == {0, 2}
    assert (
        known.reliability[0] == 0 and known.reliability[2] == 0
    )  # Not finite; the label is not there.
    assert sorted(known.reliability[jnp.array([1, 3])].tolist()) == [0, 1]
    np.testing.assert_allclose(known.gate, 0.8, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("guide", ["subspace", "features"])
def test_what_noise_has_spoilt_counts_nothing(guide):
    """Then the attack is the generator's alone."""
    spoilt, alone = attacked(guide, 0.3), attacked("none", 0.3)
    assert not spoilt.diagnostics["reliability"].any()
    assert spoilt.diagnostics["gate"] == 0
    np.testing.assert_allclose(spoilt.inputs, alone.inputs, atol=1e-3)


@pytest.mark.slow
def test_images_come_back_by_any_guide():
    grey = metrics.mse(0 * BATCH.inputs + 0.5, BATCH.inputs).mean()
    for guide in ("none", "subspace", "features"):
        found = attacked(guide)
        order = metrics.match(found.inputs, BATCH.inputs)
        assert metrics.mse(found.inputs[order], BATCH.inputs).mean() < 0.6 * grey
        assert sorted(found.labels.tolist()) == sorted(BATCH.labels.tolist())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guide": "truth"}, "guide must be one of 'subspace', 'features', 'none', got 'truth'"),
        ({"weight": -1.0}, "weight"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"model": MODEL._replace(head=None)}, "small does not tell its dense head"),
    ],
)
def test_errors_name_what_is_wrong(settings, message):
    with pytest.raises(ValueError, match=message):
        strong(**{"model": MODEL, **settings})


def test_a_head_of_one_layer_is_refused():
    model = invjax.models.mlp((), num_classes=10)
    params = model.init(KEY, (8, 8, 1))
    seen = invjax.observe(KEY, model, params, BATCH)
    with pytest.raises(ValueError, match="two dense layers"):
        strong(model)(KEY, seen)
    hidden = problem()[1]
    blind = hidden._replace(facts=hidden.facts.__class__(input_shape=(8, 8, 1), num_classes=10))
    with pytest.raises(ValueError, match="tells its batch_size"):
        strong(MODEL)(KEY, blind)
