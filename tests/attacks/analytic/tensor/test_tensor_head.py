"""Features and labels behind the last two dense layers of a classifier."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import invjax
from invjax import Batch, models
from invjax.attacks.analytic import tensor as lib
from invjax.models.chain import Spec, chain_model
from invjax.models.layers import apply_layers, layers_of


def features_of(seed, size, width):
    """Half of the entries zero, as behind a ReLU; pairwise cosines of about 0.32."""
    return jax.nn.relu(jax.random.normal(jax.random.key(seed), (size, width)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def solved(model, size, options, params, gradient):
    return [
        lib.head_features(model, params, gradient, size, key=jax.random.key(3), **dict(each))
        for each in options
    ]


def cosines(found, truth):
    squared = (found.features @ truth.T) ** 2
    norms = jnp.linalg.norm(found.features, axis=1)[:, None] * jnp.linalg.norm(truth, axis=1)[None]
    squared = np.asarray(squared / norms**2)
    order = squared.argmax(axis=0)
    assert len(set(order)) == len(order)
    return squared.max(axis=0), order


def run(model, params, values, labels, options):
    dtype = values.dtype
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    gradient = jax.grad(model.loss)(params, Batch(values, labels))
    return solved(model, len(values), options, params, gradient)


ROUGH, FINE = (("polish", False),), (("restarts", 0),)


def test_a_random_head_gives_its_features_away():
    with jax.enable_x64(True):
        model = models.mlp((1024,), activation="tanh", init="lecun", bias=False)
        values = features_of(0, 8, 64)
        labels = jax.random.randint(jax.random.key(1), (8,), 0, 10)
        params = model.init(jax.random.key(2), (64,))
        rough, fine = run(model, params, values, labels, (ROUGH, FINE))
        share, order = cosines(rough, values)
        assert share.mean() > 0.98
        np.testing.assert_array_equal(rough.labels[order], labels)
        assert fine.objective < 1e-8 and (fine.residual < 1e-8).all() and fine.gap < 1e-10
        np.testing.assert_allclose(fine.features[cosines(fine, values)[1]], values, atol=1e-8)
        np.testing.assert_array_equal(fine.labels[cosines(fine, values)[1]], labels)
        np.testing.assert_allclose(fine.signals.sum(axis=1), 0, atol=1e-10)
        span = fine.subspace
        np.testing.assert_allclose(span @ span.T, np.eye(8), atol=1e-10)
        np.testing.assert_allclose(values @ span.T @ span, values, atol=1e-8)


def test_uniform_weights_with_biases_do_as_well():
    with jax.enable_x64(True):
        model = models.mlp((2048,), activation="tanh", init="torch")
        values = features_of(1, 8, 64)
        labels = jax.random.randint(jax.random.key(1), (8,), 0, 10)
        params = model.init(jax.random.key(2), (64,))
        (rough,) = run(model, params, values, labels, (ROUGH,))
        share, order = cosines(rough, values)
        assert share.mean() > 0.99
        np.testing.assert_array_equal(rough.labels[order], labels)


@functools.partial(jax.jit, static_argnums=(0, 1))
def attacked(model, attack, params, inputs, labels):
    gradient = jax.grad(model.loss)(params, Batch(inputs, labels))
    facts = invjax.Facts(
        input_shape=inputs.shape[1:], num_classes=model.num_classes, batch_size=len(inputs)
    )
    return attack.init(jax.random.key(3), invjax.Observation(params, gradient, facts))


def of_few_outputs(outputs, bias, seed, size=3, width=16, units=512):
    """What the attack makes of inputs under a head of one or two outputs, with the truth."""
    model = models.mlp((units,), outputs, activation="tanh", init="lecun", bias=bias)
    loss = "cross_entropy" if outputs == 1 else None
    attack = lib.tensor(model, restarts=0, loss=loss, estimator="outer")
    inputs = features_of(seed, size, width)
    labels = jnp.asarray(np.random.default_rng(seed).integers(0, 2, size))
    params = model.init(jax.random.key(seed), (width,))
    return attacked(model, attack, jax.tree.map(doubled, params), inputs, labels), inputs, labels


def doubled(leaf):
    return leaf.astype(jnp.float64)


def check_few(found, inputs, labels):
    assert found.found.all() and lib.rmse(found.inputs, inputs) < 1e-8
    matched = invjax.metrics.match(found.inputs, inputs)
    np.testing.assert_array_equal(found.labels[matched], labels)


def test_two_classes_are_told_apart_by_the_hidden_bias():
    """The derivatives by two logits are each other's negatives, and tell no sign."""
    with jax.enable_x64(True):
        for seed in (0, 2):
            check_few(*of_few_outputs(2, True, seed))


def test_a_known_norm_is_that_of_the_inputs_without_the_constant_of_a_hidden_bias():
    model = models.mlp((512,), 2, activation="tanh", init="lecun")
    attack = lib.tensor(model, norm=1.0, polish=False)
    inputs = features_of(0, 3, 16)
    inputs /= jnp.linalg.norm(inputs, axis=1, keepdims=True)
    params = model.init(jax.random.key(0), (16,))
    found = attacked(model, attack, params, inputs, jnp.asarray([0, 1, 1]))
    np.testing.assert_allclose(jnp.linalg.norm(found.inputs, axis=1), 1, atol=0.1)


@pytest.mark.slow
def test_one_logit_is_read_with_a_hidden_bias():
    with jax.enable_x64(True):
        for seed in (0, 1):
            check_few(*of_few_outputs(1, True, seed))


@pytest.mark.slow
def test_what_no_bias_tells_is_not_found():
    with jax.enable_x64(True):
        for outputs in (1, 2):
            found, inputs, _ = of_few_outputs(outputs, False, 0)
            assert lib.rmse(found.inputs, inputs, sign_invariant=True) < 1e-8
            assert not found.found.any() and found.objective < 1e-12
            if outputs == 2:
                assert jnp.isinf(found.diagnostics["residual"]).all()


@pytest.mark.slow
def test_two_classes_at_full_size():
    with jax.enable_x64(True):
        model = models.mlp((1024,), 2, activation="tanh", init="torch")
        values = features_of(0, 8, 64)
        labels = jax.random.randint(jax.random.key(1), (8,), 0, 2)
        params = model.init(jax.random.key(2), (64,))
        rough, fine = run(model, params, values, labels, (ROUGH, FINE))
        share, order = cosines(rough, values)
        assert share.mean() > 0.98
        np.testing.assert_array_equal(rough.labels[order], labels)
        np.testing.assert_allclose(fine.features[cosines(fine, values)[1]], values, atol=1e-8)
        np.testing.assert_array_equal(fine.labels[cosines(fine, values)[1]], labels)
        assert (fine.residual < 1e-8).all()


def test_relu_head_behind_a_convolution():
    specs = [
        Spec("conv", 4, 3, 2, 1, "relu"),
        Spec("flatten"),
        Spec("dense", 512, activation="relu"),
        Spec("dense", 10),
    ]
    with jax.enable_x64(True):
        model = chain_model(specs, 10, "small")
        batch = invjax.datasets.take(invjax.datasets.digits(), np.array([3, 40, 77]))
        params = model.init(jax.random.key(0), (8, 8, 1))
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
        inputs = jnp.asarray(batch.inputs, jnp.float64)
        values = apply_layers(layers_of(model, params)[:-2], inputs)
        gradient = jax.grad(model.loss)(params, Batch(inputs, batch.labels))
        (found,) = solved(model, 3, ((("restarts", 2),),), params, gradient)
        order = cosines(found, values)[1]
        np.testing.assert_allclose(found.features[order], values, atol=1e-7)
        np.testing.assert_array_equal(found.labels[order], batch.labels)


def test_single_precision_and_the_attack_on_inputs():
    model = models.mlp((512,), activation="tanh")
    values = features_of(5, 4, 36)
    labels = jnp.asarray([2, 2, 7, 0])
    params = model.init(jax.random.key(2), (6, 6, 1))
    observation = invjax.observe(
        jax.random.key(0), model, params, Batch(values.reshape(4, 6, 6, 1), labels)
    )
    found = lib.tensor(model, restarts=0)(jax.random.key(1), observation)
    assert found.inputs.dtype == jnp.float32 and found.found.all()
    order = invjax.metrics.match(found.inputs.reshape(4, 36), values)
    np.testing.assert_allclose(found.inputs.reshape(4, 36)[order], values, atol=1e-2)
    np.testing.assert_array_equal(found.labels[order], labels)


@pytest.mark.slow
def test_collinear_features_need_restarts():
    with jax.enable_x64(True):
        model = models.mlp((1024,), activation="tanh", bias=False, init="lecun")
        for seed in range(4):
            # Pairwise cosines of about 0.64.
            values = jnp.abs(jax.random.normal(jax.random.key(seed), (8, 64)))
            labels = jax.random.randint(jax.random.key(seed + 10), (8,), 0, 10)
            params = model.init(jax.random.key(seed + 20), (64,))
            (found,) = run(model, params, values, labels, ((("restarts", 8),),))
            order = cosines(found, values)[1]
            np.testing.assert_allclose(found.features[order], values, atol=1e-7)
            np.testing.assert_array_equal(found.labels[order], labels)


def test_errors():
    key = jax.random.key(0)
    model = models.mlp((20,), activation="tanh")
    params = model.init(key, (5,))
    for bad, message in (
        ({"batch_size": 0}, "batch_size must lie in"),
        ({"batch_size": 7}, r"\[1, 6\]"),
        ({"estimator": "both"}, "estimator must be one of"),
        ({"noise_std": 0.0}, "noise_std must lie in"),
        ({"restarts": -1}, "restarts must be a whole number"),
        ({"max_steps": 0}, "max_steps must be a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            lib.head_features(model, params, params, **{"batch_size": 2, "key": key, **bad})
    # Thirty-two samples take a Gram matrix of 58905 rows for ReLU.
    for activation, size, message in (
        ("relu", 32, "58905 coefficients .* degree 4"),
        ("tanh", 32, "6545 coefficients .* degree 3"),
        ("gelu", 16, "4845 coefficients .* more than the 1024 hidden units"),
    ):
        wide = models.mlp((1024,), activation=activation)
        params = jax.eval_shape(lambda wide=wide: wide.init(key, (64,)))
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(
                lambda tree, wide=wide, size=size: lib.head_features(
                    wide, tree, tree, size, key=key
                ),
                params,
            )
    for other, message in (
        (models.mlp(()), "two dense layers"),
        (models.lenet(), "two dense layers"),
        (models.mlp((20,), activation="identity"), "only sums"),
        (lib.two_layer(20), "softmax logits"),
    ):
        params = other.init(key, (8, 8, 1))
        with pytest.raises(ValueError, match=message):
            lib.head_features(other, params, params, 2, key=key)
