"""Pruning of gradient rows by how many samples their neuron is active on (AGGP)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from invjax.base import Array, Batch, Defense, Model, Params, PyTree
from invjax.checks import check_count, check_number, describe
from invjax.defenses.base import Elementary, from_stages
from invjax.defenses.exclusivity import hidden_values
from invjax.defenses.law import Law, inform
from invjax.defenses.masking import apply_mask, view_mask
from invjax.models.layers import check_layer_view, split_at_head


class _State(NamedTuple):
    key: Array
    counts: Array


def activation_count_pruning(
    model: Model,
    *,
    max_count: int = 10,
    cutoff: int = 16,
    keep: tuple[float, float] = (0.01, 0.95),
    drop: float = 0.75,
) -> Defense:
    """Prune the gradient rows of neurons that few samples activate (AGGP; Nowak et al. 2024).

    Activation-based greedy gradient pruning, as the authors' released demonstration has it. Of a
    neuron of the first dense layer that `a` samples of the batch activate, `0 < a <= max_count`, the
    weight gradient keeps the largest `p = (a - 1)^2 (p_u - p_l) / (cutoff - 2)^2 + p_l` of its
    entries (their equation 14), and a random `drop` of these is zeroed besides. Biases, other
    neurons and other layers are sent as they are. Counts are taken by `prepare`, which every
    update needs.

    In batches of `max_count` samples and fewer every row is pruned. On digits this slowed the
    training of 64 hidden units, and not that of 512.

    What it does not stop: entries that are kept are exact. Of an exclusive neuron of a 3072-pixel
    layer eight entries stay, and each of them over the bias gradient is a pixel; a neuron with more
    samples keeps more. Entries of several neurons of one sample add up to an image. Attacks that
    read the next layers' gradients, and gradient matching on what is kept, are not addressed.

    The law reads the mask off the zeros, which leaves zeroed entries of that weight out; where later
    stages hide them it leaves that weight out. That a pruned entry was small is in no likelihood.

    Args:
      model: the client's model, which ends in dense ReLU layers with at least one hidden.
      max_count: the largest count that is pruned, at least 1.
      cutoff: `c`, above `max_count`, the count with `p = p_u` plus one; at least 3.
      keep: `(p_l, p_u)`, shares that are kept, in [0, 1], the first not above the second.
      drop: share of the kept that is zeroed at random, in [0, 1]; rounded down to whole entries.

    Returns:
      The defence; random entries are drawn anew at every step.

    Raises:
      ValueError: a setting out of range, a model without such a head.
    """
    low, high = keep
    check_count("max_count", max_count, 1)
    check_number("cutoff", cutoff, max(3, max_count + 1))
    check_number("keep[0]", low, 0.0, 1.0)
    check_number("keep[1]", high, low, 1.0)
    check_number("drop", drop, 0.0, 1.0)
    check_layer_view(model)
    name = describe(
        "activation_count_pruning", max_count=max_count, cutoff=cutoff, keep=keep, drop=drop
    )

    def init(key, params):
        width = _weight(model, params).shape[1]
        # Folding in copies a key that may be donated.
        return _State(jax.random.fold_in(key, 0), jnp.zeros(width, jnp.int32))

    def prepare(batch: Batch, state: _State, params: Params):
        active = hidden_values(model, params, batch.inputs)[0] > 0
        return batch, state._replace(counts=active.sum(axis=0, dtype=jnp.int32))

    def update(gradient, state: _State, count):
        del count
        now, later = jax.random.split(state.key)
        weight = _weight(model, gradient)
        few = (state.counts > 0) & (state.counts <= max_count)
        share = jnp.square(state.counts - 1.0) * (high - low) / (cutoff - 2) ** 2 + low
        pruned = jnp.floor(weight.shape[0] * (1 - share)) * few
        kept = _rank(jnp.abs(weight)) >= pruned[None]
        dropped = jnp.floor(kept.sum(axis=0) * drop) * few
        draws = jnp.where(kept, jax.random.uniform(now, weight.shape), 2.0)
        kept &= _rank(draws) >= dropped[None]
        mask = view_mask(lambda tree: _weight(model, tree), gradient, kept)
        return apply_mask(mask, gradient), state._replace(key=later)

    def propagate(law: Law, observed, public) -> Law:
        del public
        if observed is None:
            kept = jnp.zeros(_weight(model, law.location).shape, bool)
        else:
            kept = _weight(model, observed) != 0
        return inform(law, view_mask(lambda tree: _weight(model, tree), law.location, kept))

    # No `keeps_zeros`: which coordinates it zeroes depends on their values.
    return from_stages(Elementary(name, "aggregate", init, update, propagate, prepare=prepare))


def _rank(values: Array) -> Array:
    """Position of every entry in its column, from the smallest on."""
    return jnp.argsort(jnp.argsort(values, axis=0), axis=0)


def _weight(model: Model, tree: PyTree) -> Array:
    weight = split_at_head(model, tree)[1][0].weight
    assert weight is not None
    return weight
