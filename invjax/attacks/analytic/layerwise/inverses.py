"""Activations read from their output: the input, where they are invertible, and the derivative."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from invjax.base import Array


class Inverse(NamedTuple):
    """What the output of an activation tells.

    Attributes:
      before: `before(output) -> input`, element by element.
      slope: `slope(output) -> derivative`.
      low: outputs lie above it.
      high: outputs lie below it.
    """

    before: Callable[[Array], Array]
    slope: Callable[[Array], Array]
    low: float = -jnp.inf
    high: float = jnp.inf


def _leaky(factor: float) -> Inverse:
    return Inverse(
        lambda a: jnp.where(a < 0, a / factor, a),
        lambda a: jnp.where(a < 0, factor, 1.0).astype(a.dtype),
    )


inverses: dict[str, Inverse] = {
    "identity": Inverse(lambda a: a, jnp.ones_like),
    "relu": Inverse(lambda a: a, lambda a: positive(a).astype(a.dtype)),
    "leaky_relu": _leaky(0.01),
    "leaky_relu_0.2": _leaky(0.2),
    "tanh": Inverse(jnp.arctanh, lambda a: 1 - a**2, -1.0, 1.0),
    "sigmoid": Inverse(jax.scipy.special.logit, lambda a: a * (1 - a), 0.0, 1.0),
    "softplus": Inverse(lambda a: a + jnp.log(-jnp.expm1(-a)), lambda a: -jnp.expm1(-a), 0.0),
    "elu": Inverse(
        lambda a: jnp.where(a < 0, jnp.log1p(jnp.minimum(a, 0)), a),
        lambda a: jnp.where(a < 0, a + 1, 1.0),
        -1.0,
    ),
}
"""By the names of `invjax.models.chain.activations`; those of a ReLU count where it is positive."""


def positive(outputs: Array) -> Array:
    """Where outputs of a ReLU are positive: above the rounding of a recovered zero."""
    floor = 1e-8 if outputs.dtype == jnp.float64 else 1e-4
    return outputs > floor * jnp.abs(outputs).max()


def invert(name: str, outputs: Array) -> tuple[Array, Array, Array]:
    """What came into an activation, where that is known, and its derivative there.

    An output at or beyond the limits of the activation is moved to 1e-4 inside, as in the code of
    Chen and Campbell 2022. They move all that are nearer than 1e-4, which spoils exact ones.

    Args:
      name: of the activation, a key of `inverses`.
      outputs: `[...]`.

    Returns:
      `[...]` inputs; `[...]` whether each is known; `[...]` derivatives.
    """
    inverse = inverses[name]
    margin = 1e-12 if outputs.dtype == jnp.float64 else 1e-6
    outputs = jnp.where(outputs < inverse.low + margin, inverse.low + 1e-4, outputs)
    outputs = jnp.where(outputs > inverse.high - margin, inverse.high - 1e-4, outputs)
    known = positive(outputs) if name == "relu" else jnp.ones(outputs.shape, bool)
    return inverse.before(outputs), known, inverse.slope(outputs)
