"""Label counts in whole numbers: closed forms, published accuracy, then behaviour and errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import invjax
from invjax import Batch, gradients
from invjax.attacks import label_counts
from invjax.base import Facts, LocalTraining, Observation

SHAPE = (8, 8, 1)


@pytest.fixture(scope="module")
def digits():
    return invjax.datasets.digits()


def observe(model, params, batch, local=None, key=None):
    """What `invjax.observe` gives, under a trace."""
    size = batch.labels.shape[0]
    if local is None:
        gradient = gradients.gradient(model, params, batch)
    else:
        gradient = gradients.federated_update(key, model, params, batch, local)
    facts = Facts(
        input_shape=batch.inputs.shape[1:],
        num_classes=model.num_classes,
        batch_size=size,
        local=local,
    )
    return Observation(params, gradient, facts)


def constant_features(slope=0.0):
    """Two features that are 1 and 2 for any input, and a head with a bias.

    With a slope the first feature grows with its own parameter, which local training moves.
    """

    def apply(params, x):
        features = jnp.tile(jnp.array([[1.0, 2.0]]), (x.shape[0], 1))
        features += slope * params["features"][None]
        return features @ params["head"]["w"] + params["head"]["b"][None]

    base = invjax.models.mlp((2,), num_classes=3)

    def init(key, shape):
        weight, bias = jax.random.normal(key, (2, 3)), jnp.array([0.3, -0.5, 1.0])
        return {"features": jnp.zeros(2), "head": {"w": weight, "b": bias}}

    def loss(params, batch):
        log_p = jax.nn.log_softmax(apply(params, batch.inputs))
        return -jnp.mean(jnp.take_along_axis(log_p, batch.labels[:, None], axis=1))

    return base._replace(init=init, apply=apply, loss=loss, layers=None, with_convolution=None)


@pytest.mark.parametrize("form", ["weight", "bias", "auto"])
def test_exact_where_probabilities_and_features_are_the_same_for_all(form):
    model = constant_features()
    batch = Batch(jnp.ones((7, 4)), jnp.array([0, 0, 2, 1, 0, 2, 0]))
    observation = observe(model, model.init(jax.random.key(0), (4,)), batch)
    found = label_counts.estimate_label_counts(
        jax.random.key(1), model, observation, num_dummies=2, form=form
    )
    np.testing.assert_array_equal(found, [4, 1, 2])
    assert jnp.issubdtype(found.dtype, jnp.integer)


@pytest.mark.parametrize("form", ["weight", "bias"])
def test_the_formula(form):
    """`K p - K W / O` over the steps of a round, with everything on the line taken by hand."""
    model = constant_features(slope=0.3)
    local = LocalTraining(epochs=3, batch_size=4, num_samples=6, learning_rate=0.3)
    batch = Batch(jnp.ones((6, 4)), jnp.array([0, 0, 2, 1, 0, 2]))
    params = model.init(jax.random.key(0), (4,))
    observation = observe(model, params, batch, local, jax.random.key(2))

    def at(params):
        features = np.array([1.0, 2.0]) + 0.3 * np.asarray(params["features"])
        logits = features @ np.asarray(params["head"]["w"]) + np.asarray(params["head"]["b"])
        return np.exp(logits) / np.exp(logits).sum(), features.sum()

    end = jax.tree.map(jnp.subtract, params, observation.gradient)
    (p_start, o_start), (p_end, o_end) = at(params), at(end)
    assert abs(o_end - o_start) > 0.05
    steps = 6
    head = {
        name: np.asarray(leaf) / (steps * 0.3)
        for name, leaf in observation.gradient["head"].items()
    }
    counts = []
    for step in range(steps):
        part = step / steps
        p = (1 - part) * p_start + part * p_end
        o = (1 - part) * o_start + part * o_end
        slope = head["w"].sum(axis=0) / o if form == "weight" else head["b"]
        counts.append(6 * p - 6 * slope)
    estimate = np.mean(counts, axis=0)
    shares = label_counts._shares(model, observation, jnp.ones((2, 4)), form, None)
    np.testing.assert_allclose(6 * shares, estimate, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("estimate", "expected"),
    [
        ([2.0, 0.0, 3.0], [2, 0, 3]),
        ([1.6, 1.6, 1.8], [2, 1, 2]),
        ([0.4, 0.4, 4.2], [1, 0, 4]),
        # A negative count is taken off the others before they are rounded.
        ([3.1, 2.9, -1.0], [3, 2, 0]),
        ([6.0, 0.2, -1.2], [5, 0, 0]),
        # A sum that is off, as without a softmax's noise.
        ([0.0, 0.0, 0.0], [2, 2, 1]),
        ([9.0, 2.0, 0.0], [5, 0, 0]),
    ],
)
def test_rounding(estimate, expected):
    found = label_counts.round_counts(jnp.array(estimate), 5)
    assert found.sum() == 5 and found.dtype == jnp.int32
    np.testing.assert_array_equal(found, expected)


def test_labels_of_counts():
    np.testing.assert_array_equal(
        label_counts.labels_of(jnp.array([2, 0, 3]), 5), jnp.array([0, 0, 2, 2, 2])
    )


def wrong(digits, size, form, local=None, trials=32):
    """Mean share of wrong labels over untrained networks and batches with repeats; one program."""
    model = invjax.models.mlp((128,))

    def one(key, batch):
        init_key, order_key, dummy_key = jax.random.split(key, 3)
        params = model.init(init_key, SHAPE)
        observation = observe(model, params, batch, local, order_key)
        found = label_counts.estimate_label_counts(dummy_key, model, observation, form=form)
        truth = jnp.zeros(10, jnp.int32).at[batch.labels].add(1)
        return jnp.abs(found - truth).sum() / (2 * size)

    keys = jax.random.split(jax.random.key(1), trials)
    draws = [invjax.datasets.draw(key, digits, size) for key in jax.random.split(keys[0], trials)]
    batches = jax.tree.map(lambda *leaves: jnp.stack(leaves), *draws)
    return float(jax.jit(jax.vmap(one))(keys, batches).mean())


@pytest.mark.parametrize(
    ("size", "form", "limit"),
    [(5, "weight", 0.15), (50, "weight", 0.16), (5, "bias", 0.01), (50, "bias", 0.12)],
)
def test_share_of_wrong_labels(digits, size, form, limit):
    assert wrong(digits, size, form) < limit


@pytest.mark.slow
@pytest.mark.parametrize(("form", "limit"), [("weight", 0.2), ("bias", 0.1)])
def test_share_of_wrong_labels_after_local_training(digits, form, limit):
    local = LocalTraining(epochs=2, batch_size=5, num_samples=20, learning_rate=0.1)
    assert wrong(digits, 20, form, local, trials=16) < limit


def test_one_logit(digits):
    model = invjax.models.mlp((16,), num_classes=1)
    assert model.num_classes == 1
    batch = Batch(digits.inputs[:5], jnp.array([1, 0, 1, 1, 1]))
    params = model.init(jax.random.key(0), SHAPE)
    observation = observe(model, params, batch)
    found = label_counts.estimate_label_counts(jax.random.key(1), model, observation)
    np.testing.assert_array_equal(found, [1, 4])
    by_weight = label_counts.estimate_label_counts(
        jax.random.key(1), model, observation, form="weight"
    )
    assert by_weight.shape == (2,) and by_weight.sum() == 5


def test_without_features_the_counts_are_the_probabilities():
    model = invjax.models.mlp((16,), bias=False)
    params = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0), SHAPE))
    observation = observe(model, params, Batch(jnp.ones((10, *SHAPE)), jnp.arange(10) % 3))
    found = label_counts.estimate_label_counts(jax.random.key(1), model, observation, 64)
    np.testing.assert_array_equal(found, np.ones(10))


def test_labels_are_never_read(digits):
    model = invjax.models.mlp((16,))
    batch = invjax.datasets.draw(jax.random.key(0), digits, 5)
    params = model.init(jax.random.key(1), SHAPE)
    observation = observe(model, params, batch)
    granted = observation._replace(labels=jnp.zeros(5, jnp.int32))
    both = [
        label_counts.estimate_label_counts(jax.random.key(2), model, seen, num_dummies=64)
        for seen in (observation, granted)
    ]
    np.testing.assert_array_equal(*both)


def test_errors(digits):
    key = jax.random.key(0)
    model = invjax.models.mlp((8,))
    batch = invjax.datasets.draw(key, digits, 4)
    observation = observe(model, model.init(key, SHAPE), batch)
    local = LocalTraining(
        epochs=1, batch_size=2, num_samples=4, learning_rate=0.1, optimizer="adam"
    )
    bare = invjax.models.mlp((8,), bias=False)

    def facts(**changes):
        return observation._replace(facts=dataclasses.replace(observation.facts, **changes))

    estimate = label_counts.estimate_label_counts
    for arguments, given, message in (
        ((model, observation), {"form": "best"}, "form must be one of"),
        ((model, observation), {"num_dummies": 0}, "num_dummies must be a whole number"),
        ((model, observation), {"batch_size": 0}, "batch_size must be a whole number"),
        ((model, facts(batch_size=None)), {}, "give batch_size"),
        ((model, facts(local=local)), {}, "must be 'sgd', got 'adam'"),
        ((model, observation._replace(gradient=None)), {}, "needs a gradient"),
        ((bare, observe(bare, bare.init(key, SHAPE), batch)), {"form": "bias"}, "has none"),
    ):
        with pytest.raises(ValueError, match=message):
            estimate(key, *arguments, **given)
