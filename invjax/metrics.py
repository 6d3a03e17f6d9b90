"""How close a reconstruction is to the truth: batched, jit- and vmap-able.

A batch has no order, so samples are matched by the Hungarian assignment first.
"""

from collections.abc import Callable

import chex
import jax.numpy as jnp
import optax
from dm_pix import ssim as _pix_ssim

from invjax.base import Array


def _check(reconstruction: Array, truth: Array) -> None:
    if jnp.shape(reconstruction) != jnp.shape(truth) or jnp.ndim(truth) < 2:
        raise ValueError(
            f"reconstruction and truth must have one shape [B, ...], got "
            f"{jnp.shape(reconstruction)} and {jnp.shape(truth)}."
        )


def _check_range(data_range: float) -> None:
    if isinstance(data_range, int | float) and not data_range > 0:
        raise ValueError(f"data_range must be positive, got {data_range}.")


def _flat(x: Array) -> Array:
    return jnp.reshape(x, (x.shape[0], -1))


def assignment(cost: Array) -> Array:
    """The permutation of least total cost, by the Hungarian algorithm.

    Args:
      cost: `[B, B]`, `cost[i, j]` of giving truth `i` the reconstruction `j`. What is not finite
        counts as very costly.

    Returns:
      `[B]`: the reconstruction of every truth.

    Raises:
      ValueError: a cost that is not square.
    """
    if jnp.ndim(cost) != 2 or cost.shape[0] != cost.shape[1]:
        raise ValueError(f"cost must be [B, B], got {jnp.shape(cost)}.")
    finite = jnp.isfinite(cost)
    largest = jnp.max(jnp.where(finite, jnp.abs(cost), 0.0))
    rows, columns = optax.assignment.hungarian_algorithm(jnp.where(finite, cost, 10 * largest + 1))
    return jnp.zeros(cost.shape[0], jnp.int32).at[rows].set(columns.astype(jnp.int32))


def match(reconstruction: Array, truth: Array) -> Array:
    """Which reconstruction belongs to which truth, by mean squared error.

    Args:
      reconstruction: `[B, ...]`.
      truth: `[B, ...]`.

    Returns:
      `[B]` indices: `reconstruction[match(reconstruction, truth)]` is in the truth's order.

    Raises:
      ValueError: different shapes.
    """
    _check(reconstruction, truth)
    differences = _flat(truth)[:, None, :] - _flat(reconstruction)[None, :, :]
    return assignment(jnp.mean(jnp.square(differences), axis=-1))


def mse(reconstruction: Array, truth: Array) -> Array:
    """Mean squared error of every sample.

    Args:
      reconstruction: `[B, ...]`.
      truth: `[B, ...]`.

    Returns:
      `[B]`, in squared input units.

    Raises:
      ValueError: different shapes.
    """
    _check(reconstruction, truth)
    return jnp.mean(jnp.square(_flat(reconstruction) - _flat(truth)), axis=-1)


def psnr(reconstruction: Array, truth: Array, *, data_range: float) -> Array:
    """Peak signal-to-noise ratio of every sample, in decibels; infinite where exact.

    Args:
      reconstruction: `[B, ...]`.
      truth: `[B, ...]`.
      data_range: highest minus lowest possible value.

    Returns:
      `[B]` decibels.

    Raises:
      ValueError: different shapes, or a range that is not positive.
    """
    _check_range(data_range)
    return 20 * jnp.log10(data_range) - 10 * jnp.log10(mse(reconstruction, truth))


def ssim(reconstruction: Array, truth: Array, *, data_range: float) -> Array:
    """Structural similarity of every image (Wang et al. 2004), by dm-pix.

    The usual window is 11 pixels of a Gaussian of 1.5; images smaller than that get the largest odd
    window that fits, so compare only among images of one size.

    Args:
      reconstruction: `[B, H, W, C]`.
      truth: `[B, H, W, C]`.
      data_range: highest minus lowest possible value.

    Returns:
      `[B]`, 1 for equal images.

    Raises:
      ValueError: inputs that are not images, different shapes, a range that is not positive.
    """
    _check(reconstruction, truth)
    _check_range(data_range)
    if truth.ndim != 4:
        raise ValueError(f"ssim needs images [B, H, W, C], got shape {truth.shape}.")
    side = min(truth.shape[1:3])
    window = min(11, side if side % 2 else side - 1)
    return _pix_ssim(reconstruction, truth, max_val=data_range, filter_size=window)


def label_accuracy(labels: Array, truth: Array) -> Array:
    """Share of labels that are right, sample by sample (match first).

    Args:
      labels: `[B]`.
      truth: `[B]`.

    Returns:
      A scalar in [0, 1].
    """
    chex.assert_equal_shape([labels, truth])
    return jnp.mean(labels == truth)


def label_overlap(labels: Array, truth: Array, num_classes: int) -> Array:
    """Share of labels that are right as a multiset, whatever their order.

    Args:
      labels: `[B]`.
      truth: `[B]`.
      num_classes: number of classes.

    Returns:
      A scalar in [0, 1].
    """
    chex.assert_equal_shape([labels, truth])
    counts = (jnp.bincount(side, length=num_classes) for side in (labels, truth))
    return jnp.minimum(*counts).sum() / truth.shape[0]


def exact_match_rate(reconstruction: Array, truth: Array, tolerance: float) -> Array:
    """Share of samples with every coordinate within a tolerance.

    Args:
      reconstruction: `[B, ...]`.
      truth: `[B, ...]`.
      tolerance: largest admissible absolute error, input units.

    Returns:
      A scalar in [0, 1].

    Raises:
      ValueError: different shapes.
    """
    _check(reconstruction, truth)
    errors = jnp.max(jnp.abs(_flat(reconstruction) - _flat(truth)), axis=-1)
    return jnp.mean(errors <= tolerance)


def nearest_neighbor(reconstruction: Array, pool: Array) -> tuple[Array, Array]:
    """The nearest member of a pool: what an attack must beat to have used the gradient.

    Args:
      reconstruction: `[B, ...]`.
      pool: `[N, ...]`.

    Returns:
      `[B]` indices into the pool, and `[B]` mean squared distances.

    Raises:
      ValueError: samples of different shapes.
    """
    if reconstruction.shape[1:] != pool.shape[1:]:
        raise ValueError(
            f"Samples must have one shape, got {reconstruction.shape[1:]} and {pool.shape[1:]}."
        )
    a, b = _flat(reconstruction), _flat(pool)
    squared = jnp.mean(jnp.square(a[:, None, :] - b[None, :, :]), axis=-1)
    return jnp.argmin(squared, axis=1), jnp.min(squared, axis=1)


def feature_distance(
    features: Callable[[Array], Array], reconstruction: Array, truth: Array
) -> Array:
    """Mean squared distance of features: a perceptual distance with the features of your choice.

    Args:
      features: `[B, ...] -> [B, ...]`.
      reconstruction: `[B, ...]`.
      truth: `[B, ...]`.

    Returns:
      `[B]`.

    Raises:
      ValueError: different shapes.
    """
    _check(reconstruction, truth)
    return mse(features(reconstruction), features(truth))


def baselines(
    truth: Array, mean_image: Array, *, value_range: tuple[float, float]
) -> dict[str, Array]:
    """PSNR of guesses that saw no gradient: mid-grey, and the mean image of the data set.

    Args:
      truth: `[B, ...]`.
      mean_image: `[...]`, of data that are not the truth.
      value_range: lowest and highest value.

    Returns:
      `grey` and `mean`, each `[B]` decibels.
    """
    low, high = value_range
    grey = jnp.full_like(truth, (low + high) / 2)
    mean = jnp.broadcast_to(mean_image[None], truth.shape)
    return {
        "grey": psnr(grey, truth, data_range=high - low),
        "mean": psnr(mean, truth, data_range=high - low),
    }
