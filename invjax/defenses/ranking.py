"""Ranks among the values of a gradient, without sorting it.

Floats that are not negative are in the order of their bits, so a rank is found bit by bit, in a pass over the
values for each. That is exact, and on a CPU a tenth of the time of XLA's sort (`top_k` needs a static rank).
"""

import jax
import jax.numpy as jnp

from invjax.base import Array


def at_rank(values: Array, rank: Array | int) -> Array:
    """`sort(values)[rank]`.

    Args:
      values: `[n]` floats, none of them negative or NaN; infinity is allowed.
      rank: from 0; the last where it is too large.

    Returns:
      One of the values.
    """
    width = jnp.finfo(values.dtype).bits
    whole = jnp.dtype(f"int{width}")
    bits = jax.lax.bitcast_convert_type(values, whole)
    rank = jnp.minimum(rank, values.size - 1)

    def step(index, low):
        higher = low | jnp.left_shift(jnp.ones((), whole), (width - 2 - index).astype(whole))
        return jnp.where(jnp.sum(bits < higher) <= rank, higher, low)

    found = jax.lax.fori_loop(0, width - 1, step, jnp.zeros((), whole))
    return jax.lax.bitcast_convert_type(found, values.dtype)


def smallest(values: Array, count: Array | int) -> Array:
    """Which values are the `count` smallest; of equals the first.

    Args:
      values: as for `at_rank`.
      count: how many, from 0 to all.

    Returns:
      `[n]` booleans, `count` of them true.
    """
    last = at_rank(values, jnp.maximum(count, 1) - 1)
    below, equal = values < last, values == last
    left = count - jnp.sum(below)
    return below | (equal & (jnp.cumsum(equal) <= left))
