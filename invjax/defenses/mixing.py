"""Mixing images and their labels: MixUp and InstaHide."""

import jax
import jax.numpy as jnp
import numpy as np

from invjax.base import Array, Batch, Bound, Defense
from invjax.checks import check_count, check_number, describe, equals
from invjax.defenses.base import from_stages, nothing, on_inputs
from invjax.ranges import bounds, check_range

_DRAWS = 64
"""Draws of coefficients to choose from; of 4 below 0.65, nine in ten will do."""


def mixup(alpha: float = 1.0, *, num_classes: int) -> Defense:
    """Replace a batch by convex combinations of pairs (MixUp; Zhang et al. 2018, equation 1).

    `w x_i + (1 - w) x_j` and the same of the labels, `j` being a random permutation of the batch and
    `w ~ Beta(alpha, alpha)` one number for the batch, as in the released code. A permutation may
    leave a sample in its place; a batch of one is not mixed at all.

    What it does not stop: the gradient is that of the mixed batch, and gradient inversion recovers
    the mixtures. Each of them shows both images; a batch of them, with `w` and the pairs guessed, is
    a linear system in the images.

    Args:
      alpha: of the Beta distribution; 0 does nothing.
      num_classes: number of classes, at least 2.

    Returns:
      The defence. Labels become `[B, C]` probabilities.

    Raises:
      ValueError: a negative alpha, or fewer than two classes.
    """
    check_number("alpha", alpha, 0.0)
    check_count("num_classes", num_classes, 2)
    name = describe("mixup", alpha, num_classes=num_classes)
    if equals(alpha, 0):
        return from_stages(nothing(name, "inputs"))

    def transform(key, batch):
        weight_key, order_key = jax.random.split(key)
        weight = jax.random.beta(weight_key, alpha, alpha)
        order = jax.random.permutation(order_key, batch.inputs.shape[0])
        batch = batch._replace(labels=_probabilities(batch.labels, num_classes))

        def mix(leaf):
            return (weight * leaf + (1 - weight) * leaf[order]).astype(leaf.dtype)

        return jax.tree.map(mix, batch)

    return from_stages(on_inputs(name, jax.jit(transform)))


def instahide(
    num_mixed: int = 4,
    *,
    num_classes: int,
    max_weight: float = 0.65,
    public: Array | None = None,
    num_private: int | None = None,
    min_private: float = 0.3,
    input_range: tuple[Bound, Bound] = (0.0, 1.0),
) -> Defense:
    """Mix every image with others and flip the signs of random pixels (InstaHide; Huang et al. 2020).

    Every image is the first of `num_mixed`; the others are random permutations of the batch (which
    may leave an image in its place), or public images drawn at random. Coefficients are normalised
    absolute Gaussians, drawn again until none exceeds `max_weight` (of 64 draws the first that will
    do; equal ones if none does, which for the published settings never happens). Every pixel of every
    channel then gets a random sign, about the middle of the input range.

    What it does not stop: gradient inversion recovers the encoded images, and the encoding can be
    undone: the distances from the middle are free of the signs, and from 50 encodings of every image
    Carlini et al. 2021 recover recognisable versions of the images of the authors' own challenge.

    Args:
      num_mixed: images in a mixture, at least 2; 4 and 6 are published.
      num_classes: number of classes, at least 2.
      max_weight: largest coefficient, in (1 / num_mixed, 1].
      public: `[N, ...]` images without labels, in the same range; the batch alone where `None`.
      num_private: images of a mixture that are of the batch; all of them without public images, else
        half of them, rounded up (2 is published for 6).
      min_private: least sum of their coefficients where there are public images.
      input_range: lowest and highest value of an input, each one number or one per channel.

    Returns:
      The defence. Labels become `[B, C]`, the sum of the private images' labels times their
      coefficients, as published: probabilities without public images, and less than that with them.

    Raises:
      ValueError: a number out of range; and, when it meets them, public images of another shape.
    """
    check_count("num_mixed", num_mixed, 2)
    check_count("num_classes", num_classes, 2)
    check_number("max_weight", max_weight, 1 / num_mixed, 1.0, open_low=True)
    check_range(input_range)
    if public is None:
        if num_private not in (None, num_mixed):
            raise ValueError(
                f"num_private={num_private} leaves a rest for public images: give some."
            )
        num_private = num_mixed
    elif num_private is None:
        num_private = -(-num_mixed // 2)
    elif num_private not in range(1, num_mixed + 1):
        raise ValueError(f"num_private must be one of 1 to {num_mixed}, got {num_private!r}.")
    check_number("min_private", min_private, 0.0, num_private / num_mixed)
    if public is not None and np.shape(public)[0] == 0:
        raise ValueError("public holds no images.")

    def transform(key, batch):
        keys = jax.random.split(key, 4)
        size = batch.inputs.shape[0]
        weights = coefficients(keys[0], size, num_mixed, max_weight, num_private, min_private)
        orders = jnp.argsort(jax.random.uniform(keys[1], (num_private - 1, size)), axis=1)
        orders = jnp.concatenate([jnp.arange(size)[None], orders])
        sources = batch.inputs[orders]
        if public is not None:
            drawn = _draw_public(keys[2], public, (num_mixed - num_private, size), batch.inputs)
            sources = jnp.concatenate([sources, drawn])
        mixed = _weighted_sum(weights, sources)
        low, high = bounds(input_range, mixed.shape, mixed.dtype)
        middle = (low + high) / 2
        sign = jax.random.rademacher(keys[3], mixed.shape, mixed.dtype)
        labels = _probabilities(batch.labels, num_classes)[orders]
        return Batch(
            middle + sign * (mixed - middle), _weighted_sum(weights[:, :num_private], labels)
        )

    settings = {"num_classes": num_classes, "max_weight": max_weight}
    if public is not None:
        settings |= {"public": np.shape(public)[0], "num_private": num_private}
        settings |= {"min_private": min_private}
    return from_stages(on_inputs(describe("instahide", num_mixed, **settings), jax.jit(transform)))


def coefficients(
    key: Array,
    size: int,
    num_mixed: int,
    max_weight: Array | float,
    num_private: int,
    min_private: Array | float,
) -> Array:
    """InstaHide's coefficients: normalised absolute Gaussians, given that they keep two bounds.

    Args:
      key: PRNG key.
      size: mixtures.
      num_mixed: images in each.
      max_weight: largest coefficient.
      num_private: how many come first of the batch itself.
      min_private: least sum of theirs.

    Returns:
      `[size, num_mixed]`, each row a convex combination.
    """
    draws = jnp.abs(jax.random.normal(key, (size, _DRAWS, num_mixed)))
    draws = draws / jnp.sum(draws, axis=-1, keepdims=True)
    private = jnp.sum(draws[..., :num_private], axis=-1)
    # Those of the batch alone sum to one, but for rounding.
    valid = (jnp.max(draws, axis=-1) <= max_weight) & (private >= min_private - 1e-6)
    first = jnp.take_along_axis(draws, jnp.argmax(valid, axis=1)[:, None, None], axis=1)[:, 0]
    return jnp.where(jnp.any(valid, axis=1, keepdims=True), first, 1 / num_mixed)


def _weighted_sum(weights: Array, sources: Array) -> Array:
    """Over the mixed: `[B, K]` and `[K, B, ...]` to `[B, ...]`."""
    # A matrix product, because on CPU XLA would fuse all random draws into a sum, and crash of its size.
    return jnp.einsum("bk,kb...->b...", weights.astype(sources.dtype), sources, precision="highest")


def _draw_public(key: Array, public: Array, shape: tuple[int, int], inputs: Array) -> Array:
    if np.shape(public)[1:] != inputs.shape[1:]:
        raise ValueError(
            f"public must hold images of the batch's shape {inputs.shape[1:]}, got "
            f"{np.shape(public)[1:]}."
        )
    chosen = jax.random.randint(key, shape, 0, np.shape(public)[0])
    return jnp.asarray(public, inputs.dtype)[chosen]


def _probabilities(labels: Array, num_classes: int) -> Array:
    """`[B, C]`, of integers or of what another stage has mixed already."""
    if jnp.ndim(labels) == 2:
        return labels
    return jax.nn.one_hot(labels, num_classes)
