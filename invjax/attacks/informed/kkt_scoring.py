"""How many training images a set of candidates holds, beside what chance gives (Haim et al. 2022)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from invjax import metrics
from invjax.base import Array
from invjax.checks import check_number

NEAR = 1.1
"""Candidates within this factor of the least distance are averaged, as published."""


class Match(NamedTuple):
    """What the candidates hold of `n` images.

    Attributes:
      images: `[n, H, W, C]` the average of each one's nearest candidates, scaled to [0, 1]; zeros where
        no candidate counts.
      votes: `[n]` how many were averaged.
      ncc: `[n]` the largest normalised cross-correlation with any candidate, at full resolution; -1
        where none counts.
      ssim: `[n]` of `images`; above 0.4 an image is customarily called well reconstructed.
      best_dssim: the mean of `(1 - ssim) / 2` over the ten best, the published figure of merit.
    """

    images: Array
    votes: Array
    ncc: Array
    ssim: Array
    best_dssim: Array


class Report(NamedTuple):
    """The training images, and the control: as many images that the network has not seen.

    Attributes:
      training: what was found of the training set.
      unseen: what the same candidates hold of other images; what counts is the difference.
    """

    training: Match
    unseen: Match


def score(candidates: Array, training: Array, unseen: Array, mean: Array | float = 0.0) -> Report:
    """Compare candidates with training images and with unseen ones.

    For every image: its nearest candidates by normalised cross-correlation at half resolution, the
    average of those within 1.1 times the least distance, plus the mean, scaled to [0, 1], and its
    SSIM (Haim et al. 2022). Departure: `training` is always reported beside `unseen`, because the
    attack's loss has minima at wrong images and the best of many candidates resembles anything a bit.
    Candidates that are not finite do not count.

    Args:
      candidates: `[m, H, W, C]`, as the network takes them.
      training: `[n, H, W, C]`, as the network takes them; plus `mean` they lie in [0, 1].
      unseen: `[u, H, W, C]` of the same kind that the network was not trained on.
      mean: `[H, W, C]`, or a number, that was subtracted from the network's inputs.

    Returns:
      Both.

    Raises:
      ValueError: images of different shapes, or smaller than 4x4.
    """
    shapes = [jnp.shape(images) for images in (candidates, training, unseen)]
    if any(len(shape) != 4 for shape in shapes) or len({shape[1:] for shape in shapes}) != 1:
        raise ValueError(
            "candidates, training and unseen must be images [., H, W, C] of one shape, got "
            f"{shapes[0]}, {shapes[1]} and {shapes[2]}."
        )
    for size in shapes[0][1:3]:
        check_number("the images' side", size, 4)
    mean = jnp.broadcast_to(jnp.asarray(mean, candidates.dtype), shapes[0][1:])
    return Report(_match(candidates, training, mean), _match(candidates, unseen, mean))


def correlation(first: Array, second: Array) -> Array:
    """Normalised cross-correlation of all pairs, the mean over channels.

    Args:
      first: `[n, H, W, C]`.
      second: `[m, H, W, C]`.

    Returns:
      `[n, m]` in [-1, 1]; 0 with an image that is constant.
    """
    a, b = (_standardized(images) for images in (first, second))
    found = jnp.einsum("npc,mpc->nm", a, b, precision="highest") / first.shape[-1]
    # Rounding goes beyond.
    return jnp.clip(found, -1, 1)


def _standardized(images: Array) -> Array:
    """`[n, pixels, C]`, every channel of norm 1 and mean 0; zeros where it is constant."""
    flat = images.reshape(images.shape[0], -1, images.shape[-1])
    # What is left of a constant is rounding, of the mean and of an interpolation.
    rounding = 10 * jnp.finfo(flat.dtype).eps * jnp.linalg.norm(flat, axis=1, keepdims=True)
    flat = flat - flat[:, :1]
    flat = flat - flat.mean(axis=1, keepdims=True)
    norm = jnp.linalg.norm(flat, axis=1, keepdims=True)
    constant = norm <= rounding
    return jnp.where(constant, 0.0, flat / jnp.where(constant, 1.0, norm))


def _half(images: Array) -> Array:
    count, height, width, channels = images.shape
    shape = (count, height // 2, width // 2, channels)
    return jax.image.resize(images, shape, "cubic", antialias=False)


@jax.jit
def _match(candidates: Array, images: Array, mean: Array) -> Match:
    finite = jnp.isfinite(candidates).all(axis=(1, 2, 3))
    candidates = jnp.where(finite[:, None, None, None], candidates, 0.0)

    def of_finite(found):
        # So large a candidate that its norm overflows has none either.
        return jnp.where(finite[None] & ~jnp.isnan(found), found, -jnp.inf)

    distance = 1 - of_finite(correlation(_half(images), _half(candidates)))
    near = (distance <= NEAR * distance.min(axis=1, keepdims=True)) & jnp.isfinite(distance)
    votes = near.sum(axis=1, keepdims=True)
    share = near / jnp.maximum(votes, 1)
    voted = jnp.einsum("nm,mhwc->nhwc", share, candidates, precision="highest") + mean[None]
    low = voted.min(axis=(1, 2, 3), keepdims=True)
    spread = voted.max(axis=(1, 2, 3), keepdims=True) - low
    voted = (voted - low) / jnp.where(spread > 0, spread, 1.0)
    voted = jnp.where(votes[:, :, None, None] > 0, voted, 0.0)
    similar = metrics.ssim(voted, images + mean[None], data_range=1.0)
    return Match(
        images=voted,
        votes=votes[:, 0],
        ncc=jnp.maximum(of_finite(correlation(images, candidates)).max(axis=1), -1),
        ssim=similar,
        best_dssim=jnp.sort((1 - similar) / 2)[:10].mean(),
    )
