"""Ranges of inputs: a lowest and a highest value, each one number or one per channel."""

import jax.numpy as jnp
import numpy as np

from invjax.base import Array, Bound


def check_range(input_range: tuple[Bound, Bound]) -> None:
    """Refuse what is no range of inputs.

    Args:
      input_range: lowest and highest value, each one number or one per channel.

    Raises:
      ValueError: not two bounds, or a low one that is not below its high one.
    """
    try:
        low, high = (np.asarray(bound, float) for bound in input_range)
        valid = np.broadcast(low, high).ndim <= 1 and bool((low < high).all())
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise ValueError(
            "input_range must be (low, high) with low < high, each one number or one per channel, "
            f"got {input_range!r}."
        )


def bounds(input_range: tuple[Bound, Bound], shape: tuple[int, ...], dtype) -> tuple[Array, Array]:
    """Lowest and highest value of every entry.

    Args:
      input_range: lowest and highest value, each one number or one per channel (the last axis).
      shape: of the inputs, with or without a batch axis.
      dtype: of the inputs.

    Returns:
      Two arrays of that shape and type.
    """
    low, high = (jnp.broadcast_to(jnp.asarray(bound, dtype), shape) for bound in input_range)
    return low, high


def flat_bounds(
    input_range: tuple[Bound, Bound], input_shape: tuple[int, ...], dtype
) -> tuple[Array, Array]:
    """Lowest and highest value of every entry of a flattened input.

    Args:
      input_range: lowest and highest value, each one number or one per channel (the last axis).
      input_shape: of one input, of `d` entries.
      dtype: of the inputs.

    Returns:
      Two arrays `[d]`.
    """
    low, high = bounds(input_range, input_shape, dtype)
    return low.reshape(-1), high.reshape(-1)
