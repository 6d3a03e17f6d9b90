"""Magnitude pruning (gradient compression)."""

from typing import Literal

import jax
import jax.numpy as jnp

from invjax.base import Array, Defense, PyTree
from invjax.checks import check_choice, check_number, describe, equals
from invjax.defenses import ranking
from invjax.defenses.base import Elementary, from_stages, nothing, stateless
from invjax.defenses.law import Law

Scope = Literal["tensor", "global"]


def _pool(tree: PyTree, scope: Scope, statistic) -> PyTree:
    """A statistic of every tensor, or of all coordinates, as a tree of scalars."""
    if scope == "tensor":
        return jax.tree.map(lambda leaf: statistic(leaf.reshape(-1)), tree)
    value = statistic(jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(tree)]))
    return jax.tree.map(lambda leaf: value.astype(leaf.dtype), tree)


def prune(gradient: PyTree, fraction: Array | float, scope: Scope) -> PyTree:
    """Zero the smallest coordinates: `floor(fraction * size)` of them, where there are no ties."""

    def cut(values):
        position = jnp.floor(fraction * values.size).astype(int)
        return ranking.at_rank(jnp.abs(jax.lax.stop_gradient(values)), position)

    return jax.tree.map(
        lambda leaf, cut: jnp.where(jnp.abs(leaf) >= cut, leaf, 0.0),
        gradient,
        _pool(gradient, scope, cut),
    )


def _smallest_kept(values: Array) -> Array:
    """The smallest magnitude that is not zero; infinity where all are zero."""
    return jnp.min(jnp.where(values == 0, jnp.inf, jnp.abs(values)))


def magnitude_prune(fraction: float, scope: Scope = "tensor") -> Defense:
    """Zero the smallest coordinates (gradient compression; Lin et al. 2018, Zhu et al. 2019).

    What an adversary reads: the kept coordinates, and of every pruned one that it lay below the
    smallest kept magnitude. Where later stages hide the zeros, pruning is replayed on the candidate
    (on its noise-free part, where noise came before too: an approximation).

    Args:
      fraction: share of coordinates to zero, in [0, 1).
      scope: `tensor` ranks within every tensor, `global` over all parameters.

    Returns:
      The defence.

    Raises:
      ValueError: a fraction out of range or an unknown scope.
    """
    check_number("fraction", fraction, 0.0, 1.0, open_high=True)
    check_choice("scope", scope, ("tensor", "global"))
    name = describe("magnitude_prune", fraction, scope)
    if equals(fraction, 0):
        return from_stages(nothing(name, "aggregate"))

    def update(gradient, state, count):
        del count
        return prune(gradient, fraction, scope), state

    def propagate(law: Law, observed, public) -> Law:
        del public
        if observed is None:
            return law._replace(location=prune(law.location, fraction, scope))
        return law._replace(pruned=_pool(observed, scope, _smallest_kept))

    # No `keeps_zeros`: which coordinates it zeroes depends on their values.
    return from_stages(Elementary(name, "aggregate", stateless, update, propagate))
