"""Magnitude pruning (gradient compression)."""

from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from invjax.base import Array, Defense, PyTree
from invjax.defenses.base import Elementary, from_stages, stateless
from invjax.defenses.checks import check
from invjax.defenses.law import Law, deviation, inform, log_interval


def _largest(values: Array, fraction) -> Array:
    """Mask of the entries above the `fraction` quantile by rank; ties go by position."""
    flat = jnp.abs(values).reshape(-1)
    rank = jnp.argsort(jnp.argsort(flat))
    return (rank >= jnp.floor(fraction * flat.size)).reshape(values.shape)


def _kept(gradient: PyTree, fraction, scope: str) -> PyTree:
    if scope == "tensor":
        return jax.tree.map(lambda leaf: _largest(leaf, fraction), gradient)
    flat, unravel = ravel_pytree(gradient)
    kept = unravel(_largest(flat, fraction).astype(flat.dtype))
    return jax.tree.map(lambda leaf: leaf > 0.5, kept)


def _thresholds(observed: PyTree, scope: str) -> PyTree:
    """The smallest kept magnitude, per tensor or over all, read off the observation's support."""

    def smallest(leaf):
        return jnp.min(jnp.where(leaf == 0, jnp.inf, jnp.abs(leaf)))

    each = jax.tree.map(smallest, observed)
    if scope == "global":
        overall = jnp.min(jnp.stack(jax.tree.leaves(each)))
        each = jax.tree.map(lambda _: overall, each)
    # An empty support says nothing of the threshold.
    return jax.tree.map(lambda value: jnp.where(jnp.isfinite(value), value, 1e30), each)


def magnitude_prune(fraction: float, scope: Literal["tensor", "global"] = "tensor") -> Defense:
    """Zero the smallest coordinates (gradient compression; Lin et al. 2018, Zhu et al. 2019).

    What an adversary reads: the kept coordinates, and of every pruned one that it lay below the
    smallest kept magnitude. Where later noise hides the zeros, pruning is replayed on the candidate.

    Args:
      fraction: share of coordinates to zero, in [0, 1).
      scope: `tensor` ranks within every tensor, `global` over all parameters.

    Returns:
      The defence.

    Raises:
      ValueError: a fraction out of range or an unknown scope.
    """
    check("fraction", fraction, 0.0, 1.0, open_high=True)
    if scope not in ("tensor", "global"):
        raise ValueError(f"scope must be 'tensor' or 'global', got {scope!r}.")

    def prune(gradient, by):
        return jax.tree.map(
            lambda leaf, kept: jnp.where(kept, leaf, 0.0), gradient, _kept(by, fraction, scope)
        )

    def update(gradient, state, count):
        del count
        return prune(gradient, gradient), state

    def propagate(law: Law, observed, public) -> Law:
        del public
        if observed is None:
            return law._replace(location=prune(law.location, law.location))
        support = jax.tree.map(lambda leaf: leaf != 0, observed)

        def pruned(location, scale, threshold, kept):
            below = log_interval(location, 0.0, threshold, scale)
            return jnp.where(kept, 0.0, below).sum()

        terms = jax.tree.map(
            pruned, law.location, deviation(law), _thresholds(observed, scope), support
        )
        return law._replace(
            informative=inform(law, support), log_weight=law.log_weight + optax.tree.sum(terms)
        )

    name = f"magnitude_prune({fraction}, {scope!r})"
    return from_stages(
        Elementary(name, "aggregate", stateless, update, propagate, keeps_zeros=True)
    )
