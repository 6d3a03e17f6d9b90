"""Norm clipping, of every sample's gradient or of their aggregate."""

import math

import jax
import jax.numpy as jnp

from invjax.base import Array, Defense, PyTree
from invjax.checks import check_number, describe, equals
from invjax.defenses.base import Elementary, from_stages, nothing, stateless
from invjax.defenses.law import Law, rescale
from invjax.gradients import clip_scale, scale_samples


def clip_per_sample_stage(clip_norm: Array | float) -> Elementary:
    """The stage of per-sample clipping.

    Args:
      clip_norm: L2 radius.

    Returns:
      The stage.
    """
    name = describe("clip_per_sample", clip_norm)
    if equals(clip_norm, math.inf):
        return nothing(name, "per_sample")

    def update(gradients, state, count):
        del count
        return scale_samples(gradients, clip_scale(gradients, clip_norm)), state

    def propagate(law: Law, observed, public) -> Law:
        del observed, public
        factors = clip_scale(law.location, clip_norm)
        variance = law.variance
        if variance is not None:
            variance = scale_samples(variance, factors**2)
        return law._replace(location=scale_samples(law.location, factors), variance=variance)

    return Elementary(name, "per_sample", stateless, update, propagate, keeps_zeros=True)


def clip_per_sample(clip_norm: float) -> Defense:
    """Clip every sample's gradient to an L2 ball, then average (Abadi et al. 2016).

    Where noise comes before it in a chain, its law scales the noise by the factor of the replayed
    gradient instead of the noisy one's: an approximation.

    Args:
      clip_norm: radius over all parameters together; infinity does nothing.

    Returns:
      The defence.

    Raises:
      ValueError: a radius that is not positive.

    Example:
      >>> import jax, invjax
      >>> defense = invjax.defenses.clip_per_sample(1.0)
      >>> samples = {"w": jax.numpy.array([[3.0, 4.0], [0.0, 0.5]])}  # two samples, norms 5 and 0.5
      >>> clipped, _ = defense.update(samples, defense.init({"w": jax.numpy.zeros(2)}))
      >>> [round(value, 2) for value in clipped["w"].tolist()]
      [0.3, 0.65]
    """
    check_number("clip_norm", clip_norm, 0.0, open_low=True)
    return from_stages(clip_per_sample_stage(clip_norm))


def _factor(gradient: PyTree, clip_norm: Array | float) -> Array:
    return clip_scale(jax.tree.map(lambda leaf: leaf[None], gradient), clip_norm)[0]


def global_clip(clip_norm: float) -> Defense:
    """Clip the aggregated gradient to an L2 ball (Pascanu et al. 2013).

    Where noise comes before it in a chain, its law scales the noise by the factor of the replayed
    gradient instead of the noisy one's: an approximation. So is the factor behind a mask that nobody
    can tell: that of the norm which the mask leaves on average. `optax.clip_by_global_norm` is the
    same map without a law.

    Args:
      clip_norm: radius over all parameters together; infinity does nothing.

    Returns:
      The defence.

    Raises:
      ValueError: a radius that is not positive.
    """
    check_number("clip_norm", clip_norm, 0.0, open_low=True)
    name = describe("global_clip", clip_norm)
    if equals(clip_norm, math.inf):
        return from_stages(nothing(name, "aggregate"))

    def update(gradient, state, count):
        del count
        scale = _factor(gradient, clip_norm)
        return jax.tree.map(lambda leaf: leaf * scale, gradient), state

    def propagate(law: Law, observed, public) -> Law:
        del public
        seen = law.location
        if law.pruned is not None and observed is not None:
            # The law of a pruned gradient keeps what was pruned; its norm does not.
            seen = jax.tree.map(lambda leaf, y: jnp.where(y == 0, 0.0, leaf), seen, observed)
        if law.dropped is not None:
            share = jnp.sqrt(1 - jnp.asarray(law.dropped))
            seen = jax.tree.map(lambda leaf: leaf * share.astype(leaf.dtype), seen)
        return rescale(law, _factor(seen, clip_norm))

    stage = Elementary(name, "aggregate", stateless, update, propagate, keeps_zeros=True)
    return from_stages(stage)
