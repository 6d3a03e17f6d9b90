"""How close a reconstruction is to the truth: pure functions of batches, jit- and vmap-able.

A batch has no order: `match` and `matched` pair samples by the assignment of least cost, and the
other metrics compare sample by sample. A sample that is not finite spoils its own metrics and no
other's.
"""

import functools
from collections.abc import Callable
from typing import Literal, TypeVar

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np
import optax

from invjax.base import Array, Batch, Reconstruction

Cost = Literal["mse", "mae"] | Callable[[Array, Array], Array]
Samples = TypeVar("Samples", Batch, Reconstruction)

_COSTS = {
    "mse": lambda a, b: jnp.mean(jnp.square(a - b)),
    "mae": lambda a, b: jnp.mean(jnp.abs(a - b)),
}


def assignment(cost: Array) -> Array:
    """The permutation of least total cost, by the Hungarian algorithm.

    Args:
      cost: `[B, B]`, `cost[i, j]` of giving truth `i` the reconstruction `j`. What is not finite
        costs more than all finite costs together.

    Returns:
      `[B]` indices: the reconstruction of every truth.

    Raises:
      ValueError: a cost that is not square, or empty.
    """
    shape = jnp.shape(cost)
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise ValueError(f"cost must be [B, B] with B >= 1, got shape {shape}.")
    return _assign(jnp.asarray(cost, jnp.promote_types(jnp.result_type(cost), jnp.float32)))


@jax.jit
def _assign(cost: Array) -> Array:
    size = cost.shape[0]
    finite = jnp.isfinite(cost)
    low = jnp.min(cost, where=finite, initial=jnp.inf)
    spread = jnp.max(cost, where=finite, initial=-jnp.inf) - low
    # In [0, 1], so that one forbidden pair, at B + 1, outweighs B admissible ones in any units.
    scaled = (cost - low) / jnp.where(spread > 0, spread, 1.0)
    rows, columns = optax.assignment.hungarian_algorithm(jnp.where(finite, scaled, size + 1.0))
    return jnp.zeros(size, jnp.int32).at[rows].set(columns.astype(jnp.int32))


def match(reconstruction: Array, truth: Array, cost: Cost = "mse") -> Array:
    """Which reconstruction belongs to which truth, in one batch; of many batches, `jax.vmap(match)`.

    Args:
      reconstruction: `[B, ...]`.
      truth: `[B, ...]`.
      cost: `mse`, `mae`, or `cost(reconstruction [...], truth [...]) -> scalar`, lower is closer.

    Returns:
      `[B]` indices: `reconstruction[match(reconstruction, truth)]` is in the truth's order.

    Raises:
      ValueError: different shapes, or an unknown cost.
      TypeError: inputs that are not floats.
    """
    reconstruction, truth = _pair(reconstruction, truth)
    if not callable(cost) and cost not in _COSTS:
        raise ValueError(f"cost must be one of {sorted(_COSTS)} or a function, got {cost!r}.")
    return _assign(_pairwise(cost if callable(cost) else _COSTS[cost], reconstruction, truth))


# Compiled, so that calls outside a jit do not build the loop anew each time.
@functools.partial(jax.jit, static_argnums=0)
def _pairwise(cost: Callable[[Array, Array], Array], reconstruction: Array, truth: Array) -> Array:
    to_all = jax.vmap(cost, in_axes=(0, None))
    # Row by row: all pairs at once would hold B^2 samples.
    return jax.lax.map(lambda sample: to_all(reconstruction, sample), truth)


def matched(reconstruction: Samples, truth: Batch, cost: Cost = "mse") -> Samples:
    """A reconstruction in the order of the truth.

    Args:
      reconstruction: an attack's result, or a batch: inputs `[B, ...]`.
      truth: the private batch; only its inputs decide.
      cost: as in `match`.

    Returns:
      The same, with inputs, labels and `found` reordered alike. (Diagnostics stay as they are.)

    Raises:
      ValueError: different shapes, or an unknown cost.
      TypeError: inputs that are not floats.
    """
    order = match(reconstruction.inputs, truth.inputs, cost)
    inputs, labels = (
        jnp.asarray(field)[order] for field in (reconstruction.inputs, reconstruction.labels)
    )
    if isinstance(reconstruction, Batch):
        return reconstruction._replace(inputs=inputs, labels=labels)
    found = jnp.asarray(reconstruction.found)[order]
    return reconstruction._replace(inputs=inputs, labels=labels, found=found)


def mse(reconstruction: Array, truth: Array) -> Array:
    """Mean squared error of every sample.

    Args:
      reconstruction: `[B, ...]`.
      truth: `[B, ...]`.

    Returns:
      `[B]`, in squared input units.

    Raises:
      ValueError: different shapes.
      TypeError: inputs that are not floats.
    """
    reconstruction, truth = _pair(reconstruction, truth)
    return jnp.asarray(dm_pix.mse(_as_images(reconstruction), _as_images(truth)))


def psnr(reconstruction: Array, truth: Array, *, data_range: float) -> Array:
    """Peak signal-to-noise ratio of every sample: `10 log10(data_range^2 / mse)`.

    Args:
      reconstruction: `[B, ...]`, images or vectors.
      truth: `[B, ...]`.
      data_range: highest minus lowest possible value, positive; 1 for raw images. Of normalised
        data take `datasets.denormalize` first: channels of different scale have no one range.

    Returns:
      `[B]` decibels; infinite where the reconstruction is exact.

    Raises:
      ValueError: different shapes, or a range that is not a positive number.
      TypeError: inputs that are not floats.

    Example:
      >>> import jax.numpy as jnp, invjax
      >>> truth = jnp.zeros((1, 8, 8, 1))
      >>> invjax.metrics.psnr(truth + 0.1, truth, data_range=1.0).round(1).tolist()
      [20.0]
    """
    reconstruction, truth = _pair(reconstruction, truth)
    _check_width("data_range", data_range)
    scaled = (_as_images(side) / data_range for side in (reconstruction, truth))
    return jnp.asarray(dm_pix.psnr(*scaled))


def ssim(reconstruction: Array, truth: Array, *, data_range: float) -> Array:
    """Structural similarity of every image (Wang et al. 2004), the mean over channels and windows.

    The window is a Gaussian of standard deviation 1.5 over 11 pixels, as published. Images smaller
    than that get the largest odd window that fits (7 for 8x8 digits): compare images of one size.

    Args:
      reconstruction: `[B, H, W, C]`, values in [0, data_range].
      truth: `[B, H, W, C]`, values in [0, data_range].
      data_range: highest possible value, the lowest being 0; positive.

    Returns:
      `[B]` in [-1, 1]; 1 for equal images.

    Raises:
      ValueError: inputs that are not images of at least 3x3, different shapes, or a range that is
        not a positive number.
      TypeError: inputs that are not floats.
    """
    reconstruction, truth = _pair(reconstruction, truth)
    _check_width("data_range", data_range)
    if truth.ndim != 4 or min(truth.shape[1:3]) < 3:
        raise ValueError(
            f"ssim needs images [B, H, W, C] of at least 3x3 pixels, got shape {truth.shape}."
        )
    side = min(truth.shape[1:3])
    window = min(11, side - 1 + side % 2)
    return _ssim(reconstruction, truth, max_val=data_range, filter_size=window)


# Compiled like the loops above: outside a jit its many small operations are slow.
_ssim = jax.jit(dm_pix.ssim, static_argnames="filter_size")


def label_accuracy(labels: Array, truth: Array) -> Array:
    """Share of labels that are right, sample by sample: match first.

    Args:
      labels: `[B]` integers.
      truth: `[B]` integers.

    Returns:
      A scalar in [0, 1].

    Raises:
      ValueError: shapes other than one `[B]`.
    """
    labels, truth = _label_pair(labels, truth)
    return jnp.mean(labels == truth)


def label_set_accuracy(labels: Array, truth: Array) -> Array:
    """Share of labels that are right as a multiset, whatever their order.

    Args:
      labels: `[B]` integers.
      truth: `[B]` integers.

    Returns:
      A scalar in [0, 1]: the size of the multisets' intersection over `B`.

    Raises:
      ValueError: shapes other than one `[B]`.
    """
    labels, truth = _label_pair(labels, truth)
    # The k-th copy of a label is right where the truth has k copies.
    copy = jnp.sum(jnp.tril(labels[:, None] == labels[None, :]), axis=1)
    available = jnp.sum(labels[:, None] == truth[None, :], axis=1)
    return jnp.mean(copy <= available)


def exact_match_rate(reconstruction: Array, truth: Array, tolerance: float) -> Array:
    """Share of samples with every coordinate within a tolerance: match first.

    Args:
      reconstruction: `[B, ...]`.
      truth: `[B, ...]`.
      tolerance: largest admissible absolute error, input units.

    Returns:
      A scalar in [0, 1]; samples that are not finite count as missed.

    Raises:
      ValueError: different shapes.
      TypeError: inputs that are not floats.
    """
    reconstruction, truth = _pair(reconstruction, truth)
    errors = jnp.abs(reconstruction - truth)
    return jnp.mean(jnp.max(errors, axis=tuple(range(1, errors.ndim))) <= tolerance)


def nearest_neighbor(reconstruction: Array, pool: Array) -> tuple[Array, Array]:
    """The nearest members of a pool, the oracle over auxiliary data.

    Called with the truth in place of the reconstruction it says what an attack must beat to have
    used the gradient; called with a reconstruction, which known sample that has fallen onto.

    Args:
      reconstruction: `[B, ...]`.
      pool: `[N, ...]`.

    Returns:
      `[B]` indices into the pool, and `[B]` mean squared distances in squared input units; index 0
      and infinity for a sample that is not finite.

    Raises:
      ValueError: samples of different shapes, or nothing in the pool.
      TypeError: inputs that are not floats.
    """
    reconstruction, pool = _floats(reconstruction=reconstruction, pool=pool)
    if reconstruction.shape[1:] != pool.shape[1:] or 0 in (reconstruction.size, pool.size):
        raise ValueError(
            "reconstruction [B, ...] and pool [N, ...] must hold samples of one shape, got "
            f"{reconstruction.shape} and {pool.shape}."
        )
    return _nearest(reconstruction, pool)


@jax.jit
def _nearest(reconstruction: Array, pool: Array) -> tuple[Array, Array]:
    axes = tuple(range(1, pool.ndim))

    def nearest(sample):
        distances = jnp.mean(jnp.square(pool - sample[None]), axis=axes)
        distances = jnp.where(jnp.isnan(distances), jnp.inf, distances)
        index = jnp.argmin(distances)
        return index, distances[index]

    # One by one: all pairs at once would hold B times the pool.
    return jax.lax.map(nearest, reconstruction)


def feature_distance(
    features_fn: Callable[[Array], Array], reconstruction: Array, truth: Array
) -> Array:
    """Mean squared distance of features: a perceptual distance with the features of your choice.

    Args:
      features_fn: `[B, ...] -> [B, ...]`, sample by sample; a network's penultimate layer, say.
      reconstruction: `[B, ...]`.
      truth: `[B, ...]`.

    Returns:
      `[B]`, in squared units of the features.

    Raises:
      ValueError: different shapes.
      TypeError: inputs that are not floats.
    """
    reconstruction, truth = _pair(reconstruction, truth)
    return mse(features_fn(reconstruction), features_fn(truth))


def baselines(
    truth: Array,
    mean_image: Array,
    *,
    input_range: tuple[float, float],
    metric: Literal["psnr", "mse"] = "psnr",
) -> dict[str, Array]:
    """What guesses that saw no gradient achieve: mid-grey, and the mean image of the data set.

    Args:
      truth: `[B, ...]`.
      mean_image: `[...]`, of data that are not the truth.
      input_range: lowest and highest possible value, each one number. Of data with a range a channel
        take `datasets.denormalize` first.
      metric: `psnr` or `mse`.

    Returns:
      `grey` and `mean`, each `[B]`: decibels, or squared input units.

    Raises:
      ValueError: a mean image of another shape, a range that is none, or an unknown metric.
      TypeError: inputs that are not floats.
    """
    truth, mean_image = _floats(truth=truth, mean_image=mean_image)
    if truth.shape[1:] != mean_image.shape:
        raise ValueError(
            f"mean_image must have the shape {truth.shape[1:]} of a sample, got {mean_image.shape}."
        )
    if metric not in ("psnr", "mse"):
        raise ValueError(f"metric must be 'psnr' or 'mse', got {metric!r}.")
    low, high = input_range
    if np.ndim(low) or np.ndim(high):
        raise ValueError(f"input_range must be two numbers, got {input_range}.")
    _check_width("the width of input_range", high - low)
    guesses = {
        "grey": jnp.full_like(truth, (low + high) / 2),
        "mean": jnp.broadcast_to(mean_image[None], truth.shape),
    }
    if metric == "mse":
        return {name: mse(guess, truth) for name, guess in guesses.items()}
    return {name: psnr(guess, truth, data_range=high - low) for name, guess in guesses.items()}


def _floats(**arrays: Array) -> list[Array]:
    for name, array in arrays.items():
        if not jnp.issubdtype(jnp.result_type(array), jnp.floating):
            raise TypeError(f"{name} must be floats, got {jnp.result_type(array)}.")
    return [jnp.asarray(array) for array in arrays.values()]


def _pair(reconstruction: Array, truth: Array) -> list[Array]:
    """Both as arrays of one shape `[B, ...]`; validated before anything is compiled."""
    shapes = jnp.shape(reconstruction), jnp.shape(truth)
    if shapes[0] != shapes[1] or len(shapes[1]) < 2 or 0 in shapes[1]:
        raise ValueError(
            "reconstruction and truth must have one shape [B, ...] and not be empty, got "
            f"{shapes[0]} and {shapes[1]}."
        )
    return _floats(reconstruction=reconstruction, truth=truth)


def _label_pair(labels: Array, truth: Array) -> tuple[Array, Array]:
    shapes = jnp.shape(labels), jnp.shape(truth)
    if shapes[0] != shapes[1] or len(shapes[1]) != 1 or 0 in shapes[1]:
        raise ValueError(
            f"labels and truth must have one shape [B], B >= 1, got {shapes[0]} and {shapes[1]}."
        )
    return jnp.asarray(labels), jnp.asarray(truth)


def _check_width(name: str, width: float) -> None:
    if isinstance(width, jax.core.Tracer):
        return
    if np.ndim(width) or not 0 < float(width) < np.inf:
        raise ValueError(f"{name} must be one positive number, got {width}.")


def _as_images(x: Array) -> Array:
    """`[B, 1, 1, D]`: dm-pix takes images only, and these metrics do not look at the shape."""
    return x.reshape(x.shape[0], 1, 1, -1)
