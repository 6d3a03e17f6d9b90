"""The error that the bounds are about."""

import jax
import jax.numpy as jnp
import optax

from invjax.base import Array


@jax.jit(static_argnames="sign_invariant")
def rmse(reconstruction: Array, truth: Array, *, sign_invariant: bool = False) -> Array:
    """`min over permutations of sqrt(mean_i |x_i - y_pi(i)|^2)`, norms over all entries of a sample.

    The error of theorem 5.1 of Wang, Lee and Lei 2023.

    Args:
      reconstruction: `[B, ...]`.
      truth: `[B, ...]`.
      sign_invariant: whether a sample may come back as its negative, as from an odd activation.

    Returns:
      A scalar, input units.

    Raises:
      ValueError: different shapes.
    """
    if jnp.shape(reconstruction) != jnp.shape(truth) or jnp.ndim(truth) < 2:
        raise ValueError(
            "reconstruction and truth must have one shape [B, ...], got "
            f"{jnp.shape(reconstruction)} and {jnp.shape(truth)}."
        )
    found = jnp.asarray(reconstruction).reshape(reconstruction.shape[0], -1)
    wanted = jnp.asarray(truth).reshape(truth.shape[0], -1)

    def squares(sign: float) -> Array:
        # Differences, not products: those cannot tell errors below the square root of a rounding.
        return jax.lax.map(lambda one: jnp.sum((sign * found - one[None]) ** 2, axis=1), wanted)

    cost = jnp.minimum(squares(1.0), squares(-1.0)) if sign_invariant else squares(1.0)
    rows, columns = optax.assignment.hungarian_algorithm(cost)
    return jnp.sqrt(cost[rows, columns].mean())
