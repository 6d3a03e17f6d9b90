"""Cross-entropy in its three forms, and the labels that it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from invjax import models
from invjax.base import Batch


def logits_model(classes):
    return models.from_apply(lambda params, x: x @ params, lambda key, shape: None, classes)


@pytest.fixture
def inputs():
    return jax.random.normal(jax.random.key(0), (4, 3))


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8])
def test_integers_and_their_one_hot_rows_have_the_same_loss_and_gradient(inputs, dtype):
    model, params = logits_model(3), jnp.eye(3)
    labels = jnp.array([0, 2, 1, 1])
    hard = jax.value_and_grad(model.loss)(params, Batch(inputs, labels.astype(dtype)))
    soft = jax.value_and_grad(model.loss)(params, Batch(inputs, jax.nn.one_hot(labels, 3)))
    for found, expected in zip(soft, hard, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
    probabilities = jax.nn.softmax(inputs)
    expected = -np.log(np.asarray(probabilities)[np.arange(4), labels]).mean()
    np.testing.assert_allclose(hard[0], expected, rtol=1e-5)
    # The textbook gradient, p - y over the batch.
    expected = inputs.T @ (probabilities - jax.nn.one_hot(labels, 3)) / 4
    np.testing.assert_allclose(hard[1], expected, rtol=1e-5, atol=1e-6)


def test_soft_labels_are_differentiable(inputs):
    model = logits_model(3)
    slope = jax.grad(lambda labels: model.loss(jnp.eye(3), Batch(inputs, labels)))(
        jnp.full((4, 3), 1 / 3)
    )
    np.testing.assert_allclose(slope, -jax.nn.log_softmax(inputs) / 4, rtol=1e-5)


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float32, jnp.bool])
def test_one_logit_is_logistic_regression(inputs, shape, dtype):
    model, params = logits_model(1), jnp.array([[1.0], [-2.0], [0.5]])
    labels = jnp.array([1, 0, 0, 1])
    sign = np.array([1, -1, -1, 1])
    expected = np.log1p(np.exp(-sign * np.asarray(inputs @ params)[:, 0])).mean()
    found = model.loss(params, Batch(inputs, labels.astype(dtype).reshape(shape)))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("classes", "labels"),
    [
        (3, jnp.zeros(4)),
        (3, jnp.zeros((4, 2))),
        (3, jnp.zeros((3, 3))),
        (3, jnp.zeros((4, 3), jnp.int32)),
        (3, jnp.zeros(3, jnp.int32)),
        (1, jnp.zeros(3)),
        (1, jnp.zeros((4, 2))),
    ],
)
def test_labels_of_another_shape_are_refused(inputs, classes, labels):
    model, params = logits_model(classes), jnp.ones((3, classes))
    with pytest.raises(ValueError, match=r"Batch\.labels of .* type must have shape"):
        model.loss(params, Batch(inputs, labels))


def test_a_square_of_samples_and_classes_is_not_broadcast():
    """Four samples, four classes: `[4]` floats would otherwise be taken for one row."""
    model = logits_model(4)
    with pytest.raises(ValueError, match=r"float type must have shape \(4, 4\)"):
        model.loss(jnp.eye(4), Batch(jnp.ones((4, 4)), jnp.ones(4)))
