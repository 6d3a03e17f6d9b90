"""The loss of a classifier: cross-entropy, the mean over the samples."""

from collections.abc import Callable

import jax.numpy as jnp
import optax

from invjax.base import Array, Batch, Params


def cross_entropy(apply: Callable[[Params, Array], Array]) -> Callable[[Params, Batch], Array]:
    """Mean cross-entropy of a model's logits.

    Softmax with integer labels `[B]` or probabilities `[B, C]`; sigmoid with labels 0 and 1 where
    there is a single logit.

    Args:
      apply: `apply(params, inputs) -> logits [B, C]`.

    Returns:
      `loss(params, batch) -> scalar`. It raises `ValueError` for labels of any other shape.
    """

    def loss(params: Params, batch: Batch) -> Array:
        logits = apply(params, batch.inputs)
        labels = jnp.asarray(batch.labels)
        size, classes = logits.shape
        integers = jnp.issubdtype(labels.dtype, jnp.integer)
        allowed = [(size,), (size, 1)] if classes == 1 else [(size,) if integers else logits.shape]
        if labels.shape not in allowed:
            kind = "integer" if integers else "float"
            raise ValueError(
                f"Batch.labels of {kind} type must have shape {allowed[0]} for {size} samples and "
                f"{classes} classes, got {labels.shape}."
            )
        if classes == 1:
            targets = labels.reshape(size).astype(logits.dtype)
            return optax.sigmoid_binary_cross_entropy(logits[:, 0], targets).mean()
        if integers:
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return optax.softmax_cross_entropy(logits, labels).mean()

    return loss
