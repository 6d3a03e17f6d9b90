"""From features to inputs: a layer's equations, or Levenberg-Marquardt in a box."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from invjax.base import Array, Bound, Layer
from invjax.checks import check_count, check_number
from invjax.models.layers import Layers, apply_layers
from invjax.ranges import flat_bounds

_LINEAR = ("conv", "average_pool", "global_average_pool", "flatten")


class Inverted(NamedTuple):
    """Inputs of given features.

    Attributes:
      inputs: `[S, *input_shape]`.
      residual: `[S]`, distance of their features from those given, over the norm of those.
      determined: `[S]`, whether no input nearby has the same features.
    """

    inputs: Array
    residual: Array
    determined: Array


def invert_features(
    key: Array,
    front: Layers,
    features: Array,
    input_shape: tuple[int, ...],
    input_range: tuple[Bound, Bound],
    *,
    restarts: int = 8,
    num_steps: int = 60,
    total_variation: float = 0.0,
) -> Inverted:
    """Inputs that have given features.

    If the front is linear up to a last ReLU (one convolution), the features above zero are linear
    equations, solved by least squares: exact, without a search. Any other is inverted by
    Levenberg-Marquardt with a box, from uniform draws, the best of `restarts`: exact where it
    converges, and else a local minimum, which its residual shows. A search holds a Jacobian
    `[features, pixels]` a restart and sample.

    Args:
      key: a typed PRNG key, of the starts.
      front: what comes before the dense head, of parameters (`split_at_head`).
      features: `[S, d_0]`.
      input_shape: shape of one input.
      input_range: lowest and highest value of an input; the box of a search, and not used without.
      restarts: starts of a search.
      num_steps: its steps.
      total_variation: weight of the squared total variation, of images only, in the first half of
        these; later it would bias.

    Returns:
      The inputs, with what is known of them.

    Raises:
      ValueError: a setting out of range, features of another shape than the front computes, or an
        infinite range where a search is needed.
    """
    check_search(restarts, num_steps, total_variation)
    probe = jax.ShapeDtypeStruct((1, *input_shape), features.dtype)
    size = jax.eval_shape(lambda inputs: apply_layers(front, inputs), probe).size
    if features.shape[1:] != (size,):
        raise ValueError(
            f"features must be [S, {size}], which the front makes of inputs of shape {input_shape}, "
            f"got shape {features.shape}."
        )
    with jax.default_matmul_precision("highest"):
        if is_flattening(front):
            inputs = features.reshape(-1, *input_shape)
            return Inverted(
                inputs, jnp.zeros(len(inputs), inputs.dtype), jnp.ones(len(inputs), bool)
            )
        if is_linear(front):
            inputs, determined = _solve(front, features, input_shape)
            return Inverted(inputs, _residual(front, inputs, features), determined)
        check_finite_range(input_range)
        low, high = flat_bounds(input_range, input_shape, features.dtype)
        return _search(
            key,
            front,
            features,
            input_shape,
            low,
            high,
            restarts,
            num_steps,
            total_variation,
        )


def is_flattening(front: Layers) -> bool:
    """Whether a front leaves the numbers of an input as they are, so that features are inputs."""
    return all(layer.kind == "flatten" and layer.activation == "identity" for layer in front)


def is_linear(front: Layers) -> bool:
    """Whether a front is linear up to a last ReLU, so that its features are linear equations."""
    *before, last = [layer for layer in front if not is_flattening((layer,))] or [Layer("flatten")]
    shapes = all(layer.kind in _LINEAR for layer in front)
    plain = all(layer.activation == "identity" for layer in before)
    return shapes and plain and last.activation in ("relu", "identity")


def _solve(front: Layers, features: Array, input_shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Least squares on the features above zero, and whether these determine every pixel."""
    rectified = any(layer.activation == "relu" for layer in front)
    linear = tuple(layer._replace(activation="identity") for layer in front)

    def before(flat):
        return apply_layers(linear, flat.reshape(1, *input_shape))[0]

    origin = jnp.zeros(math.prod(input_shape), features.dtype)
    matrix, offset = jax.jacfwd(before)(origin), before(origin)

    def one(values):
        cut = jnp.finfo(values.dtype).eps ** 0.5 * jnp.abs(values).max()
        used = values > cut if rectified else jnp.ones(values.shape, bool)
        rows = jnp.where(used[:, None], matrix, 0.0)
        solution, _, rank, _ = jnp.linalg.lstsq(rows, jnp.where(used, values - offset, 0.0))
        return solution.reshape(input_shape), rank == origin.size

    return jax.vmap(one)(features)


def _search(
    key: Array,
    front: Layers,
    features: Array,
    input_shape: tuple[int, ...],
    low: Array,
    high: Array,
    restarts: int,
    num_steps: int,
    total_variation: float,
) -> Inverted:
    """Levenberg-Marquardt for every sample and restart."""
    samples, dtype = len(features), features.dtype
    norms = jnp.linalg.norm(features, axis=1)
    norms = jnp.where(norms > 0, norms, 1.0)
    variation = jnp.where(jnp.arange(num_steps) < num_steps // 2, total_variation, 0.0) ** 0.5

    def one(start, target, norm):
        def residuals(flat, weight):
            image = flat.reshape(input_shape)
            mismatch = (apply_layers(front, image[None])[0] - target) / norm
            return jnp.concatenate([mismatch, *(weight * part for part in _differences(image))])

        return minimize(residuals, start, low, high, variation)

    starts = jax.random.uniform(key, (restarts, samples, low.size), dtype, low, high)
    over_samples = jax.vmap(one)
    found, values = jax.vmap(lambda start: over_samples(start, features, norms))(starts)
    best = jnp.argmin(values, axis=0)
    flat = jnp.take_along_axis(found, best[None, :, None], axis=0)[0]

    def determined(sample):
        jacobian = jax.jacfwd(lambda x: apply_layers(front, x.reshape(1, *input_shape))[0])(sample)
        return jnp.linalg.matrix_rank(jacobian) == sample.size

    inputs = flat.reshape(samples, *input_shape)
    return Inverted(inputs, _residual(front, inputs, features), jax.vmap(determined)(flat))


def minimize(
    residuals: Callable[[Array, Array], Array],
    start: Array,
    low: Array,
    high: Array,
    weights: Array,
) -> tuple[Array, Array]:
    """Levenberg-Marquardt in a box: projected steps in the variables that no bound holds.

    Args:
      residuals: `residuals(x [n], weight) -> [m]`.
      start: `[n]`, inside the box.
      low: `[n]`.
      high: `[n]`.
      weights: the second argument of `residuals` at every step.

    Returns:
      The point `[n]`, and its sum of squares at the last weight.
    """

    def step(carry, weight):
        point, damping = carry
        value = residuals(point, weight)
        jacobian = jax.jacfwd(residuals)(point, weight)
        slope = value @ jacobian
        # A variable that the step would push out of the box is no variable (Bertsekas 1982).
        held = ((point <= low) & (slope > 0)) | ((point >= high) & (slope < 0))
        jacobian = jnp.where(held[None], 0.0, jacobian)
        normal = jacobian.T @ jacobian
        diagonal = jnp.diagonal(normal)
        floor = jnp.finfo(point.dtype).eps * diagonal.max()
        ridge = jnp.where(held, 1.0, damping * diagonal + floor + 1e-30)
        move = jax.scipy.linalg.solve(
            normal + jnp.diag(ridge), jnp.where(held, 0.0, slope), assume_a="pos"
        )
        trial = jnp.clip(point - move, low, high)
        better = jnp.square(residuals(trial, weight)).sum() < jnp.square(value).sum()
        damping = jnp.clip(jnp.where(better, damping / 5, damping * 3), 1e-14, 1e8)
        return (jnp.where(better, trial, point), damping), None

    first = jnp.asarray(1e-2, start.dtype)
    (point, _), _ = jax.lax.scan(step, (start, first), weights)
    return point, jnp.square(residuals(point, weights[-1])).sum()


def _differences(image: Array) -> list[Array]:
    if image.ndim != 3:
        return []
    return [jnp.diff(image, axis=axis).ravel() for axis in (0, 1)]


def _residual(front: Layers, inputs: Array, features: Array) -> Array:
    distance = jnp.linalg.norm(apply_layers(front, inputs) - features, axis=1)
    norms = jnp.linalg.norm(features, axis=1)
    return distance / jnp.where(norms > 0, norms, 1.0)


def check_search(restarts: Any, num_steps: Any, total_variation: Any) -> None:
    """Refuse settings of a search that are out of range."""
    check_count("restarts", restarts, 1)
    check_count("num_steps", num_steps, 1)
    check_number("total_variation", total_variation, 0.0)


def check_finite_range(input_range: tuple[Bound, Bound]) -> None:
    """Refuse an infinite input range, in which no start can be drawn."""
    bounds = [*np.ravel(input_range[0]), *np.ravel(input_range[1])]
    if not np.isfinite(bounds).all():
        raise ValueError(
            "A search for pixels starts in the input range, which must be finite, "
            f"got {input_range}."
        )
