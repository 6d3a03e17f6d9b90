"""Norm clipping, of every sample's gradient or of their aggregate."""

import jax
import jax.numpy as jnp

from invjax.base import Defense
from invjax.defenses.base import Elementary, from_stages, stateless
from invjax.defenses.checks import check
from invjax.defenses.law import Law
from invjax.gradients import clip_scale, scale_samples


def clip_per_sample_stage(clip_norm) -> Elementary:
    """The per-sample clipping stage."""

    def clip(gradients):
        return scale_samples(gradients, clip_scale(gradients, clip_norm))

    def propagate(law: Law, observed, public) -> Law:
        del observed, public
        factors = clip_scale(law.location, clip_norm)
        variance = law.variance
        if variance is not None:
            variance = scale_samples(variance, factors**2)
        return law._replace(location=scale_samples(law.location, factors), variance=variance)

    return Elementary(
        f"clip_per_sample({clip_norm})",
        "per_sample",
        stateless,
        lambda gradients, state, count: (clip(gradients), state),
        propagate,
        keeps_zeros=True,
    )


def clip_per_sample(clip_norm: float) -> Defense:
    """Clip every sample's gradient to an L2 ball, then average (Abadi et al. 2016).

    Where noise comes before it in a chain, its law scales the noise by the factor of the replayed
    gradient instead of the noisy one's: an approximation.

    Args:
      clip_norm: radius over all parameters together; infinity does nothing.

    Returns:
      The defence.

    Raises:
      ValueError: a negative radius.
    """
    check("clip_norm", clip_norm, 0.0)
    return from_stages(clip_per_sample_stage(clip_norm))


def global_clip(clip_norm: float) -> Defense:
    """Clip the aggregated gradient to an L2 ball.

    Where noise comes before it in a chain, its law scales the noise by the factor of the replayed
    gradient instead of the noisy one's: an approximation.

    Args:
      clip_norm: radius over all parameters together; infinity does nothing.

    Returns:
      The defence.

    Raises:
      ValueError: a negative radius.
    """
    check("clip_norm", clip_norm, 0.0)

    def factor(gradient):
        return clip_scale(jax.tree.map(lambda leaf: leaf[None], gradient), clip_norm)[0]

    def update(gradient, state, count):
        del count
        scale = factor(gradient)
        return jax.tree.map(lambda leaf: leaf * scale.astype(leaf.dtype), gradient), state

    def propagate(law: Law, observed, public) -> Law:
        del observed, public
        scale = factor(law.location)
        return law._replace(
            location=jax.tree.map(lambda leaf: leaf * scale, law.location),
            variance=jax.tree.map(lambda leaf: leaf * scale**2, law.variance),
            laplace=None if law.laplace is None else law.laplace * jnp.asarray(scale),
        )

    stage = Elementary(
        f"global_clip({clip_norm})", "aggregate", stateless, update, propagate, keeps_zeros=True
    )
    return from_stages(stage)
