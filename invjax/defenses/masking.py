"""Random masks: fixed ones, known to the adversary or not, and a fresh one every step."""

import jax
import jax.numpy as jnp
import optax

from invjax.base import Array, Defense, PyTree
from invjax.defenses.base import Elementary, from_stages, nothing
from invjax.defenses.checks import check, describe, equals
from invjax.defenses.law import Law, inform, rescale
from invjax.defenses.noise import next_keys, seeded


def _draw(keys: PyTree, like: PyTree, keep: Array | float) -> PyTree:
    return jax.tree.map(
        lambda leaf, key: jax.random.bernoulli(key, keep, jnp.shape(leaf)), like, keys
    )


def _apply(mask: PyTree, gradient: PyTree) -> PyTree:
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
    check("fraction", fraction, 0.0, 1.0, open_high=True)
    name = describe("random_mask", fraction, known=known)
    if equals(fraction, 0):
        return from_stages(nothing(name, "aggregate"))

    def init(key, params):
        return _draw(optax.tree.split_key_like(key, params), params, 1 - fraction)

    def update(gradient, state, count):
        del count
        return _apply(state, gradient), state

    def propagate(law: Law, observed, public) -> Law:
        if not known:
            return _unknown_mask(law, observed, fraction)
        if public is None:
            raise ValueError(
                f"{name}: the likelihood needs the mask; pass public=defense.public(state), which "
                "invjax.observe puts into observation.public."
            )
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
    check("rate", rate, 0.0, 1.0, open_high=True)
    name = describe("gradient_dropout", rate)
    if equals(rate, 0):
        return from_stages(nothing(name, "aggregate"))

    def update(gradient, state, count):
        del count
        keys, state = next_keys(state, gradient)
        kept = _apply(_draw(keys, gradient, 1 - rate), gradient)
        return jax.tree.map(lambda leaf: leaf / (1 - rate), kept), state

    def propagate(law: Law, observed, public) -> Law:
        del public
        return _unknown_mask(rescale(law, 1 / (1 - rate)), observed, rate)

    return from_stages(Elementary(name, "aggregate", seeded, update, propagate, keeps_zeros=True))
