"""Inputs of any shape as vectors, for densities over these."""

from invjax.base import Array


def flattened(inputs: Array, size: int) -> Array:
    """Inputs `[B, ...]` as `[B, size]`.

    Args:
      inputs: `[B, ...]`.
      size: values of one input.

    Returns:
      `[B, size]`.

    Raises:
      ValueError: inputs of another size.
    """
    flat = inputs.reshape(inputs.shape[0], -1)
    if flat.shape[1] != size:
        raise ValueError(f"The prior is over {size} values an input, got inputs {inputs.shape}.")
    return flat
