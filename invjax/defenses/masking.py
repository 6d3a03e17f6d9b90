"""Masks: random ones, fixed or fresh every step, and those that are computed of every batch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from invjax.base import Array, Batch, Defense, Params, PyTree
from invjax.checks import check_number, describe, equals
from invjax.defenses.base import Elementary, from_stages, nothing
from invjax.defenses.law import Law, inform, need_public, rescale
from invjax.defenses.noise import next_keys, seeded


def _draw(keys: PyTree, like: PyTree, keep: Array | float) -> PyTree:
    return jax.tree.map(
        lambda leaf, key: jax.random.bernoulli(key, keep, jnp.shape(leaf)), like, keys
    )


def apply_mask(mask: PyTree, gradient: PyTree) -> PyTree:
    """The gradient with zeros where the mask is false."""
    return jax.tree.map(lambda leaf, kept: jnp.where(kept, leaf, 0.0), gradient, mask)


def _unknown_mask(law: Law, observed: PyTree | None, fraction: Array | float) -> Law:
    """The law behind a mask that nobody published: read off the zeros, or spike and slab."""
    if observed is not None:
        return inform(law, jax.tree.map(lambda leaf: leaf != 0, observed))
    if law.noisy:
        raise ValueError(
            "Noise before and after an unknown mask has no closed-form likelihood here: put the "
            "mask first, or publish it (known=True)."
        )
    before = 0.0 if law.dropped is None else law.dropped
    return law._replace(dropped=1 - (1 - fraction) * (1 - before))


def random_mask(fraction: float, known: bool = True) -> Defense:
    """Zero a random share of the coordinates, the same ones at every step; no rescaling.

    The `soft pruning` of Balunovic et al. 2022. A known mask is published with the observation; of
    an unknown one the adversary knows the share, and reads the mask off the zeros unless later
    stages hide them: then the likelihood is spike and slab.

    Args:
      fraction: probability that a coordinate is zeroed, in [0, 1).
      known: whether the adversary is told the mask.

    Returns:
      The defence.

    Raises:
      ValueError: a fraction out of range; and, when its law is asked for, a known mask that the
        observation does not hold, or noise on both sides of an unknown one.
    """
    check_number("fraction", fraction, 0.0, 1.0, open_high=True)
    name = describe("random_mask", fraction, known=known)
    if equals(fraction, 0):
        return from_stages(nothing(name, "aggregate"))

    def init(key, params):
        return _draw(optax.tree.split_key_like(key, params), params, 1 - fraction)

    def update(gradient, state, count):
        del count
        return apply_mask(state, gradient), state

    def propagate(law: Law, observed, public) -> Law:
        if not known:
            return _unknown_mask(law, observed, fraction)
        need_public(name, "the mask", public)
        return inform(law, public)

    stage = Elementary(name, "aggregate", init, update, propagate, keeps_zeros=True)
    return from_stages(stage._replace(public=lambda state: state) if known else stage)


def gradient_dropout(rate: float) -> Defense:
    """Zero a random share of the coordinates, anew at every step, and rescale the others.

    The rescaling keeps the gradient unbiased (random sparsification; Wangni et al. 2018).

    Args:
      rate: probability that a coordinate is zeroed, in [0, 1); survivors are divided by `1 - rate`.

    Returns:
      The defence.

    Raises:
      ValueError: a rate out of range; and, when its law is asked for, noise on both sides of it.
    """
    check_number("rate", rate, 0.0, 1.0, open_high=True)
    name = describe("gradient_dropout", rate)
    if equals(rate, 0):
        return from_stages(nothing(name, "aggregate"))

    def update(gradient, state, count):
        del count
        keys, state = next_keys(state, gradient)
        kept = apply_mask(_draw(keys, gradient, 1 - rate), gradient)
        return jax.tree.map(lambda leaf: leaf / (1 - rate), kept), state

    def propagate(law: Law, observed, public) -> Law:
        del public
        return _unknown_mask(rescale(law, 1 / (1 - rate)), observed, rate)

    return from_stages(Elementary(name, "aggregate", seeded, update, propagate, keeps_zeros=True))


def view_mask(view: Callable[[PyTree], PyTree], tree: PyTree, kept: PyTree) -> PyTree:
    """Booleans like a tree, false where a view of it shows what is not kept.

    Args:
      view: `view(tree) -> PyTree`, some of the tree's entries, in any layout.
      tree: parameters or a gradient.
      kept: booleans like `view(tree)`.

    Returns:
      A tree of booleans; true at what the view does not show.
    """
    # The transpose of the view puts an entry where it belongs in the tree.
    shown, embed = jax.vjp(view, tree)
    zeroed = jax.tree.map(lambda leaf, kept: (~kept).astype(leaf.dtype), shown, kept)
    return jax.tree.map(lambda leaf: leaf == 0, embed(zeroed)[0])


def computed_mask_stage(
    name: str,
    *,
    whole: Callable[[PyTree], PyTree],
    compute: Callable[[Params, Batch], PyTree],
    read: Callable[[PyTree], PyTree],
    spread: Callable[[PyTree, PyTree], PyTree],
    known: bool,
) -> Elementary:
    """The stage of a mask that `prepare` computes of every batch.

    A mask is in any form, of units for instance, that `spread` turns into one of the coordinates. An
    adversary is told it, or reads it off the zeros; where later stages hide these, its law leaves out
    all that a mask could zero. What the mask itself says of the batch is in no law.

    Args:
      name: of the stage.
      whole: `whole(tree) -> mask`, all true, of parameters or a gradient.
      compute: `compute(params, batch) -> mask`, false where to zero.
      read: `read(gradient) -> mask`, off a gradient whose zeros can be seen.
      spread: `spread(tree, mask)`, booleans like a tree of parameters or of a gradient.
      known: whether the mask is published.

    Returns:
      The stage.
    """

    def init(key, params):
        del key
        return whole(params)

    def prepare(batch: Batch, state, params: Params):
        del state
        return batch, compute(params, batch)

    def update(gradient, state, count):
        del count
        return apply_mask(spread(gradient, state), gradient), state

    def propagate(law: Law, observed, public) -> Law:
        if known:
            need_public(name, "the mask", public)
            kept = public
        elif observed is not None:
            kept = read(observed)
        else:
            kept = jax.tree.map(jnp.logical_not, whole(law.location))
        return inform(law, spread(law.location, kept))

    stage = Elementary(
        name, "aggregate", init, update, propagate, prepare=prepare, keeps_zeros=True
    )
    return stage._replace(public=lambda state: state) if known else stage
