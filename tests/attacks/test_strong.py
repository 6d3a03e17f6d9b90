"""The strong attack: features from the head's gradient, a span, a gate, and a generator."""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import invjax
from invjax import datasets, defenses, metrics
from invjax.attacks import by_name
from invjax.attacks.analytic.tensor.head import HeadFeatures, head_features
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
def compiled(guide: str, **settings):
    return jax.jit(strong(MODEL, guide=guide, **{"num_steps": 60, "generator": SMALL, **settings}))


@functools.cache
def attacked(guide: str, noise: float = 0.0, **settings):
    return compiled(guide, **settings)(jax.random.key(1), problem(noise)[1])


def pruned(fraction: float, seen):
    """Of all layers together, so that little or nothing is left of one."""
    flat, unravel = ravel_pytree(seen.gradient)
    kept = jnp.abs(flat) >= jnp.sort(jnp.abs(flat))[int(fraction * flat.size)]
    return seen._replace(gradient=unravel(jnp.where(kept, flat, 0.0)))


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


@pytest.mark.slow
@pytest.mark.parametrize("fraction", [0.8, 0.97, 0.999])
def test_features_that_are_not_told_are_not_trusted(fraction):
    """The fit of what is left is good wherever it leads, once little is left."""
    params, seen = problem()
    found = compiled("features", num_steps=3, generator=None)(KEY, pruned(fraction, seen))
    assert jnp.isfinite(found.objective) and jnp.isfinite(found.inputs).all()
    features, truth = found.diagnostics["features"], true_features(params)
    norms = jnp.linalg.norm(features, axis=1)[:, None] * jnp.linalg.norm(truth, axis=1)[None]
    cosines = (features @ truth.T) / jnp.maximum(norms, 1e-30)
    for index in np.flatnonzero(found.diagnostics["reliability"]):
        assert cosines[index].max() > 0.998
        assert BATCH.labels[cosines[index].argmax()] == found.labels[index]
    if fraction > 0.9:
        assert not found.diagnostics["reliability"].any()


def test_an_empty_hidden_gradient_has_no_span():
    """With the labels granted the span is all that the default guide asks for."""
    _, seen = problem()
    run = compiled("subspace", num_steps=3, generator=None)
    whole = run(KEY, seen._replace(labels=BATCH.labels))
    assert whole.diagnostics["gate"] > 0.99 and not whole.diagnostics["features"].any()
    empty = seen._replace(
        gradient=seen.gradient
        | {"layer03": jax.tree.map(jnp.zeros_like, seen.gradient["layer03"])},
        labels=BATCH.labels,
    )
    found = run(KEY, empty)
    assert found.diagnostics["gate"] == 0
    assert jnp.isfinite(found.objective) and jnp.isfinite(found.inputs).all()


def test_labels_survive_where_features_do_not():
    """The last layer tells the labels under noise that spoils the decomposition."""
    _, seen = problem()
    keys = iter(jax.random.split(jax.random.key(5), 100))
    noisy = seen._replace(
        gradient=jax.tree.map(
            lambda leaf: leaf + 3e-3 * jax.random.normal(next(keys), leaf.shape), seen.gradient
        )
    )
    found = compiled("features", num_steps=3, generator=None)(KEY, noisy)
    assert not found.diagnostics["reliability"].any()
    assert sorted(found.labels.tolist()) == sorted(BATCH.labels.tolist())


def test_the_label_setting_leaves_features_with_their_samples(monkeypatch):
    """Also where other labels are granted."""
    params, seen = problem()
    order = jnp.array([1, 0, 2])
    found = HeadFeatures(
        features=true_features(params)[order],
        labels=BATCH.labels[order],
        residual=jnp.zeros(3),
        subspace=jnp.eye(3, 24),
        signals=jnp.zeros((3, 10)),
        objective=jnp.zeros(()),
        gap=jnp.zeros(()),
    )
    monkeypatch.setattr(sys.modules[strong.__module__], "head_features", lambda *_, **__: found)
    settings = {"num_steps": 3, "generator": None, "labels": "recovered"}
    attack = by_name("strong(guide='features')", MODEL, invjax.chain(), **settings)
    state = jax.jit(attack.init)(KEY, seen._replace(labels=jnp.array([1, 1, 1])))
    np.testing.assert_array_equal(jnp.sort(state.labels), jnp.sort(BATCH.labels))
    at = [BATCH.labels.tolist().index(label) for label in state.labels.tolist()]
    known = state.best["known"].features[0]
    np.testing.assert_allclose(known, true_features(params)[jnp.array(at)], atol=1e-6)


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
    Found.residual, Found.gap = jnp.array([0.0, 0.025, jnp.nan, 0.0]), jnp.array(jnp.nan)
    Found.features = Found.features.at[3].set(jnp.nan)
    known = guidance(Found, jnp.array([2, 5, 2, 7]), 0.05)
    assert known.gate == 0 and sorted(known.reliability.tolist()) == [0, 0, 0.5, 1]
    assert jnp.isfinite(known.features).all()


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
        ({"learning_rate": 0.0}, "learning_rate must lie in"),
        ({"restarts": 0}, "restarts must be a whole number"),
        ({"labels": "joint"}, "labels must be one of 'known', 'recovered', got 'joint'"),
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
    with pytest.raises(ValueError, match="grants none"):
        strong(MODEL, labels="known")(KEY, hidden)
    with pytest.raises(ValueError, match="grants 2 labels for 3 samples"):
        strong(MODEL, guide="features")(KEY, hidden._replace(labels=jnp.array([1, 2])))
    many = dataclasses.replace(hidden.facts, batch_size=13)
    with pytest.raises(ValueError, match="560 coefficients"):
        strong(MODEL)(KEY, hidden._replace(facts=many))
