"""Random masks: fixed ones, known to the adversary or not, and a fresh one every step."""

import jax
import jax.numpy as jnp
import optax

from invjax.base import Array, Defense, PyTree
from invjax.defenses.base import Elementary, from_stages
from invjax.defenses.checks import check
from invjax.defenses.law import Law, inform
from invjax.defenses.noise import next_keys, seeded


def _draw(keys: PyTree, like: PyTree, keep) -> PyTree:
    return jax.tree.map(
        lambda leaf, key: jax.random.bernoulli(key, keep, jnp.shape(leaf)), like, keys
    )


def _apply(mask: PyTree, gradient: PyTree, scale: Array | float = 1.0) -> PyTree:
    return jax.tree.map(lambda leaf, kept: jnp.where(kept, leaf * scale, 0.0), gradient, mask)


def _unknown_mask(law: Law, observed, fraction) -> Law:
    """The law behind a mask that nobody published: read off the zeros, or spike and slab."""
    if observed is not None:
        return law._replace(informative=inform(law, jax.tree.map(lambda leaf: leaf != 0, observed)))
    if law.variance is not None or law.laplace is not None:
        raise ValueError(
            "Noise before and after an unknown mask has no closed-form likelihood here: put the "
            "mask first, or publish it (known=True)."
        )
    if law.dropped is not None:
        fraction = 1 - (1 - fraction) * (1 - law.dropped)
    return law._replace(dropped=fraction)


def random_mask(fraction: float, known: bool = True) -> Defense:
    """Zero a random share of the coordinates, the same ones at every step; no rescaling.

    The `soft pruning` of Balunovic et al. 2022. A known mask is published with the observation; of an
    unknown one the adversary knows the share, and reads the mask off the zeros unless later noise
    hides them: then the likelihood is spike and slab.

    Args:
      fraction: probability that a coordinate is zeroed, in [0, 1).
      known: whether the adversary is told the mask.

    Returns:
      The defence.

    Raises:
      ValueError: a fraction out of range.
    """
    check("fraction", fraction, 0.0, 1.0, open_high=True)

    def init(key, params):
        return _draw(optax.tree.split_key_like(key, params), params, 1 - fraction)

    def update(gradient, state, count):
        del count
        return _apply(state, gradient), state

    def propagate(law: Law, observed, public) -> Law:
        if not known:
            return _unknown_mask(law, observed, fraction)
        if public is None:
            raise ValueError("random_mask(known=True): the observation does not hold the mask.")
        return law._replace(location=_apply(public, law.location), informative=inform(law, public))

    name = f"random_mask({fraction}, known={known})"
    return from_stages(
        Elementary(
            name,
            "aggregate",
            init,
            update,
            propagate,
            public=lambda state: state if known else None,
            keeps_zeros=True,
        )
    )


def gradient_dropout(rate: float) -> Defense:
    """Zero a random share of the coordinates, anew at every step, and rescale the others.

    Args:
      rate: probability that a coordinate is zeroed, in [0, 1); survivors are divided by `1 - rate`.

    Returns:
      The defence.

    Raises:
      ValueError: a rate out of range.
    """
    check("rate", rate, 0.0, 1.0, open_high=True)
    scale = 1 / (1 - rate)

    def update(gradient, state, count):
        del count
        keys, state = next_keys(state, gradient)
        return _apply(_draw(keys, gradient, 1 - rate), gradient, scale), state

    def propagate(law: Law, observed, public) -> Law:
        del public
        law = law._replace(
            location=jax.tree.map(lambda leaf: leaf * scale, law.location),
            variance=jax.tree.map(lambda leaf: leaf * scale**2, law.variance),
            laplace=None if law.laplace is None else law.laplace * scale,
        )
        return _unknown_mask(law, observed, rate)

    return from_stages(
        Elementary(
            f"gradient_dropout({rate})", "aggregate", seeded, update, propagate, keeps_zeros=True
        )
    )
