"""Few bits a coordinate: signs and quantisation."""

from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax.scipy.special import log_ndtr

from invjax.base import Array, Defense
from invjax.defenses.base import Elementary, from_stages, stateless
from invjax.defenses.checks import check
from invjax.defenses.law import Law, Rounding, deviation
from invjax.defenses.noise import next_keys, seeded


def _straight_through(value: Array, location: Array) -> Array:
    """`value` with the derivative of `location`."""
    return location + jax.lax.stop_gradient(value - location)


def sign_compress(scale: Literal["none", "mean"] = "none") -> Defense:
    """Send signs only (Bernstein et al. 2018, signSGD).

    What an adversary reads: of every coordinate, its sign; the likelihood of a sign is the normal
    distribution function of the signed gradient over the noise. The scale of a tensor, where it is
    sent, is replayed but not scored.

    Args:
      scale: `none` sends -1, 0 and 1; `mean` multiplies them by the tensor's mean magnitude.

    Returns:
      The defence.

    Raises:
      ValueError: an unknown scale.
    """
    if scale not in ("none", "mean"):
        raise ValueError(f"scale must be 'none' or 'mean', got {scale!r}.")

    def compress(leaf):
        factor = jnp.abs(leaf).mean() if scale == "mean" else jnp.ones((), leaf.dtype)
        return jnp.sign(leaf) * factor

    def propagate(law: Law, observed, public) -> Law:
        del public
        if observed is None:
            replayed = jax.tree.map(lambda x: _straight_through(compress(x), x), law.location)
            return law._replace(location=replayed)

        def leaf(observed, location, deviation):
            return jnp.where(
                observed == 0, 0.0, log_ndtr(jnp.sign(observed) * location / deviation)
            ).sum()

        terms = jax.tree.map(leaf, observed, law.location, deviation(law))
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, bool), observed)
        return law._replace(informative=nothing, log_weight=law.log_weight + optax.tree.sum(terms))

    return from_stages(
        Elementary(
            f"sign_compress({scale!r})",
            "aggregate",
            stateless,
            lambda gradient, state, count: (jax.tree.map(compress, gradient), state),
            propagate,
            keeps_zeros=True,
        )
    )


def quantize(bits: int, stochastic: bool = False) -> Defense:
    """Round every tensor to a symmetric grid up to its largest magnitude.

    The grid has `2^(bits-1) - 1` steps on either side of zero, so its largest magnitude is sent
    exactly and tells the grid. Stochastic rounding is unbiased (Alistarh et al. 2017, QSGD, with the
    largest magnitude in place of the norm).

    Args:
      bits: bits a coordinate, at least 2.
      stochastic: whether to round up with the probability of the fraction.

    Returns:
      The defence.

    Raises:
      ValueError: fewer than 2 bits, or not a whole number.
    """
    check("bits", bits, 2, 32)
    if int(bits) != bits:
        raise ValueError(f"bits must be a whole number, got {bits}.")
    levels = 2 ** (int(bits) - 1) - 1

    def step_of(leaf):
        return jnp.maximum(jnp.abs(leaf).max() / levels, jnp.finfo(leaf.dtype).tiny)

    def nearest(leaf):
        step = step_of(leaf)
        return jnp.round(leaf / step) * step

    def update(gradient, state, count):
        del count
        if not stochastic:
            return jax.tree.map(nearest, gradient), state
        keys, state = next_keys(state, gradient)

        def leaf(leaf, key):
            step = step_of(leaf)
            return jnp.floor(leaf / step + jax.random.uniform(key, leaf.shape, leaf.dtype)) * step

        return jax.tree.map(leaf, gradient, keys), state

    def propagate(law: Law, observed, public) -> Law:
        del public
        if observed is not None:
            kind = "stochastic" if stochastic else "nearest"
            return law._replace(rounding=Rounding(kind, jax.tree.map(step_of, observed)))
        if not stochastic:
            replayed = jax.tree.map(lambda x: _straight_through(nearest(x), x), law.location)
            return law._replace(location=replayed)

        # Later noise hides the grid: the rounding error enters by its variance.
        def variance(location, before):
            step = step_of(location)
            fraction = location / step - jnp.floor(location / step)
            return before + jax.lax.stop_gradient(fraction * (1 - fraction) * step**2)

        before = law.variance
        if before is None:
            before = jax.tree.map(jnp.zeros_like, law.location)
        return law._replace(variance=jax.tree.map(variance, law.location, before))

    name = f"quantize({int(bits)}, stochastic={stochastic})"
    return from_stages(
        Elementary(name, "aggregate", seeded if stochastic else stateless, update, propagate)
    )
