"""Few bits a coordinate: signs and quantisation."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from invjax.base import Array, Defense, PyTree
from invjax.checks import check_choice, check_number, describe, on_host
from invjax.defenses.base import Elementary, from_stages, stateless
from invjax.defenses.densities import Noise, log_cdf
from invjax.defenses.law import Law, Rounding, add_variance, deviation, mix, noise
from invjax.defenses.noise import next_keys, seeded


def _straight_through(function, tree: PyTree) -> PyTree:
    """A function of every leaf, with the derivative of the identity."""
    return jax.tree.map(lambda leaf: leaf + jax.lax.stop_gradient(function(leaf) - leaf), tree)


def _sign_log_likelihood(law: Law, observed: PyTree) -> Array:
    """Sum over the signs of `log P(sign)`; zeros, which a mask or a dead unit left, say nothing."""

    def root_mean_square(leaf):
        return jnp.sqrt(jnp.mean(jnp.square(leaf)) + 1e-30)

    def leaf(observed, location, part, informative):
        if not law.noisy:
            # The slack is in units of the observation; a sign's unit is its tensor's size.
            unit = root_mean_square(location) / root_mean_square(observed)
            part = Noise(part.gaussian * unit)
        slab = log_cdf(part, jnp.sign(observed) * location)
        value = mix(law, slab, jnp.full_like(slab, -math.log(2) if law.noisy else -jnp.inf))
        return jnp.where((observed != 0) & informative, value, 0.0).sum()

    informative = law.informative
    if informative is None:
        informative = jax.tree.map(lambda _: True, observed)
    terms = jax.tree.map(leaf, observed, law.location, noise(law), informative)
    return jnp.asarray(optax.tree.sum(terms))


def _expected_signs(law: Law, send_scale: bool) -> Law:
    """Mean and variance of noisy signs, whose place in the law they take."""

    def factor(location, deviation):
        # The mean magnitude behind the noise: exact for none and for much.
        folded = jnp.sqrt(jnp.square(location) + 2 / math.pi * jnp.square(deviation))
        return folded.mean() if send_scale else jnp.ones((), location.dtype)

    def mean(location, part):
        kept = 1.0 if law.dropped is None else 1 - law.dropped
        return kept * (1 - 2 * jnp.exp(log_cdf(part, -location)))

    factors = jax.tree.map(factor, law.location, deviation(law))
    means = jax.tree.map(mean, law.location, noise(law))
    return law._replace(
        location=jax.tree.map(jnp.multiply, means, factors),
        variance=jax.tree.map(lambda m, f: (1 - jnp.square(m)) * jnp.square(f), means, factors),
        laplace=None,
        dropped=None,
    )


def sign_compress(scale: Literal["none", "mean"] = "none") -> Defense:
    """Send signs only (signSGD; Bernstein et al. 2018).

    What an adversary reads: of every coordinate, its sign; the likelihood of a sign is the noise's
    distribution function at the signed gradient. The scale of a tensor, where it is sent, is not
    scored. Where later noise hides the signs, their mean and variance given the earlier noise are
    replayed or, without any, the signs themselves, with the derivative of the identity.

    Args:
      scale: `none` sends -1, 0 and 1; `mean` multiplies them by the tensor's mean magnitude.

    Returns:
      The defence.

    Raises:
      ValueError: an unknown scale.
    """
    check_choice("scale", scale, ("none", "mean"))

    def compress(leaf):
        factor = jnp.abs(leaf).mean() if scale == "mean" else jnp.ones((), leaf.dtype)
        return jnp.sign(leaf) * factor

    def update(gradient, state, count):
        del count
        return jax.tree.map(compress, gradient), state

    def propagate(law: Law, observed, public) -> Law:
        del public
        if observed is not None:
            return law._replace(
                log_weight=law.log_weight + _sign_log_likelihood(law, observed),
                informative=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, bool), observed),
                pruned=None,
                rounding=None,
            )
        if law.noisy:
            return _expected_signs(law, scale == "mean")
        return law._replace(location=_straight_through(compress, law.location))

    name = describe("sign_compress", scale)
    return from_stages(
        Elementary(name, "aggregate", stateless, update, propagate, keeps_zeros=True)
    )


def quantize(bits: int, stochastic: bool = False) -> Defense:
    """Round every tensor to a symmetric grid up to its largest magnitude.

    The grid has `2^(bits-1) - 1` steps on either side of zero, so the largest magnitude is sent
    exactly and tells the grid. Stochastic rounding is unbiased (QSGD; Alistarh et al. 2017, with
    the largest magnitude in place of the norm).

    What an adversary reads: the cell of every coordinate. Where a later stage hides the grid (noise,
    a mask, a factor), the rounding error enters as Gaussian noise of its variance: `step^2 / 6` for
    stochastic rounding, `step^2 / 12` for rounding to the nearest behind noise. Without noise before
    it, rounding to the nearest is replayed, with the derivative of the identity.

    Args:
      bits: bits a coordinate, at least 2 (one bit is `sign_compress(scale="mean")`).
      stochastic: whether to round up with the probability of the remainder.

    Returns:
      The defence.

    Raises:
      ValueError: fewer than 2 bits or more than 32, or not a whole number.
    """
    check_number("bits", bits, 2, 32)
    if on_host(bits) and bits % 1:
        raise ValueError(f"bits must be a whole number, got {bits}.")
    levels = 2.0 ** (bits - 1) - 1

    def step_of(leaf):
        return jnp.maximum(jnp.abs(leaf).max() / jnp.asarray(levels, leaf.dtype), 1e-30)

    def nearest(leaf):
        step = step_of(leaf)
        return jnp.round(leaf / step) * step

    def randomly(leaf, key):
        step = step_of(leaf)
        return jnp.floor(leaf / step + jax.random.uniform(key, leaf.shape, leaf.dtype)) * step

    def update(gradient, state, count):
        del count
        if not stochastic:
            return jax.tree.map(nearest, gradient), state
        keys, state = next_keys(state, gradient)
        return jax.tree.map(randomly, gradient, keys), state

    def propagate(law: Law, observed, public) -> Law:
        del public
        if observed is not None:
            kind = "stochastic" if stochastic else "nearest"
            return law._replace(rounding=Rounding(kind, jax.tree.map(step_of, observed)))
        if not stochastic and not law.noisy:
            return law._replace(location=_straight_through(nearest, law.location))
        share = 6 if stochastic else 12
        return add_variance(
            law, jax.tree.map(lambda leaf: jnp.square(step_of(leaf)) / share, law.location)
        )

    name = describe("quantize", bits, **({"stochastic": True} if stochastic else {}))
    init = seeded if stochastic else stateless
    return from_stages(Elementary(name, "aggregate", init, update, propagate, reads_values=True))
