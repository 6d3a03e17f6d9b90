"""Priors of gradient matching: negative log-densities of the private inputs, up to constants."""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from invjax.attacks.matching.vectors import flattened
from invjax.base import Array, Model, Observation
from invjax.checks import check_choice, check_count, check_number
from invjax.gradients import absolute


class Context(NamedTuple):
    """What a prior may look at besides the candidate.

    Attributes:
      observation: what the adversary was granted.
      group: `[B, ...]` mean of all restarts' candidates.
      labels: `[B]` classes, or `[B, C]` probabilities where they are optimised.
    """

    observation: Observation
    group: Array
    labels: Array | None = None


Prior = Callable[[Array, Context], Array]
"""`prior(inputs [B, ...], context) -> scalar`, lower is likelier."""

Variation = Literal["anisotropic", "isotropic", "squared"]


def uniform() -> Prior:
    """No preference (an improper uniform density).

    Returns:
      The prior.
    """
    return lambda inputs, context: jnp.zeros((), inputs.dtype)


def combine(*priors: Prior) -> Prior:
    """Product of densities: the sum of the terms.

    Args:
      *priors: any priors.

    Returns:
      The prior.
    """
    return lambda inputs, context: sum(
        (prior(inputs, context) for prior in priors), start=jnp.zeros((), inputs.dtype)
    )


def total_variation(
    weight: float,
    kind: Variation = "anisotropic",
    periodic: bool = False,
) -> Prior:
    """Total variation of images `[B, H, W, C]`, any number of channels.

    Args:
      weight: factor of the term.
      kind: `anisotropic` is the mean absolute vertical plus the mean absolute horizontal difference
        (Geiping et al. 2020); `isotropic` the mean Euclidean length of the difference vectors;
        `squared` the sum of squared differences a sample, averaged over samples
        (Balunovic et al. 2022, a Gaussian Markov random field).
      periodic: whether the image wraps around at its border.

    Returns:
      The prior; it raises a `ValueError` on inputs that are not images of 2 x 2 pixels or more.

    Raises:
      ValueError: an unknown kind, a negative weight.
    """
    check_number("weight", weight, 0.0)
    check_choice("kind", kind, get_args(Variation))

    def differences(inputs):
        # As products: the derivatives of slices are chains of branches that XLA computes eight
        # times an element on CPU, a third of a step of a small network.
        _, height, width, _ = inputs.shape
        exact = jax.lax.Precision.HIGHEST
        down = jnp.einsum("ij,bjwc->biwc", _differences(height, periodic), inputs, precision=exact)
        right = jnp.einsum("ij,bhjc->bhic", _differences(width, periodic), inputs, precision=exact)
        return down, right

    def value(inputs, context):
        del context
        if inputs.ndim != 4 or min(inputs.shape[1:3]) < 2:
            raise ValueError(
                "total_variation needs images [B, H, W, C] of 2 x 2 pixels or more, got inputs of "
                f"shape {inputs.shape}."
            )
        down, right = differences(inputs)
        if kind == "anisotropic":
            return weight * (absolute(down).mean() + absolute(right).mean())
        if kind == "squared":
            total = jnp.square(down).sum() + jnp.square(right).sum()
            return weight * total / inputs.shape[0]
        height, width = inputs.shape[1] - (not periodic), inputs.shape[2] - (not periodic)
        squares = jnp.square(down[:, :height, :width]) + jnp.square(right[:, :height, :width])
        return weight * jnp.sqrt(squares + 1e-8).mean()

    return value


def _differences(size: int, periodic: bool) -> np.ndarray:
    """The matrix that subtracts from every pixel of a line the one before it."""
    matrix = np.eye(size, dtype=np.float32)
    matrix -= np.roll(matrix, -1, axis=1)
    return matrix if periodic else matrix[1:]


def l2(weight: float) -> Prior:
    """Mean squared value: a Gaussian of independent coordinates around zero.

    Args:
      weight: factor of the term.

    Returns:
      The prior.

    Raises:
      ValueError: a negative weight.
    """
    check_number("weight", weight, 0.0)
    return lambda inputs, context: weight * jnp.mean(jnp.square(inputs))


def box(weight: float) -> Prior:
    """Squared distance to the public input range, summed over coordinates, averaged over samples.

    A soft form of the constraint `project_to_box` (the clip prior of Balunovic et al. 2022).

    Args:
      weight: factor of the term.

    Returns:
      The prior.

    Raises:
      ValueError: a negative weight.
    """
    check_number("weight", weight, 0.0)

    def value(inputs, context):
        low, high = input_bounds(context.observation, inputs.dtype, inputs.ndim)
        outside = inputs - jnp.clip(inputs, low, high)
        return weight * jnp.sum(jnp.square(outside)) / inputs.shape[0]

    return value


def gaussian(mean: Array, precision: Array, weight: float = 1.0) -> Prior:
    """Gaussian with a full precision matrix over the flattened input.

    Args:
      mean: `[d]` mean, in input units.
      precision: `[d, d]` inverse covariance.
      weight: factor of the term.

    Returns:
      The prior: `weight / 2 (x - mean)^T precision (x - mean)`, summed over samples. It raises a
      `ValueError` on inputs of another size.

    Raises:
      ValueError: shapes that do not go together, a negative weight.
    """
    check_number("weight", weight, 0.0)
    if jnp.ndim(mean) != 1 or jnp.shape(precision) != (mean.shape[0],) * 2:
        raise ValueError(
            f"mean must be [d] and precision [d, d], got {jnp.shape(mean)} "
            f"and {jnp.shape(precision)}."
        )

    def value(inputs, context):
        del context
        centered = flattened(inputs, mean.shape[0]) - mean[None, :]
        return 0.5 * weight * jnp.sum((centered @ precision) * centered)

    return value


def batch_norm_statistics(model: Model, weight: float, first_weight: float = 1.0) -> Prior:
    """Distance of the candidate's batch-norm statistics to the known ones (Yin et al. 2020, 2021).

    The known statistics are those that the observation grants, else the model's running ones.

    Args:
      model: a model with `statistics`.
      weight: factor of the term.
      first_weight: extra factor of the first layer.

    Returns:
      The prior: the sum over layers of the L2 distances of means and of variances.

    Raises:
      ValueError: the model has no batch norm, a negative weight; at its use, statistics that neither
        the observation nor the model knows.
    """
    check_number("weight", weight, 0.0)
    if model.statistics is None:
        raise ValueError(f"batch_norm_statistics: the model {model.name} has no batch norm.")

    measure = model.statistics

    def value(inputs, context):
        granted = context.observation.statistics
        targets = model.running_statistics if granted is None else granted
        if targets is None:
            raise ValueError(
                "batch_norm_statistics: neither the observation nor the model knows the statistics: "
                "observe(..., grant_statistics=True), or a model from a trained module."
            )
        found = measure(context.observation.params, inputs)
        total = jnp.zeros((), inputs.dtype)
        for index, ((mean, variance), (target_mean, target_variance)) in enumerate(
            zip(found, targets, strict=True)
        ):
            layer = _norm(mean - target_mean) + _norm(variance - target_variance)
            total += (first_weight if index == 0 else 1.0) * layer
        return weight * total

    return value


def group_consistency(weight: float) -> Prior:
    """Distance to the mean of all restarts (Yin et al. 2021, equation 11, without registration).

    Every restart is drawn to the group's mean candidate. The published method registers the
    candidates on the mean by optical flow first; that step is left out.

    Args:
      weight: factor of the term.

    Returns:
      The prior: `weight` times the mean squared distance.

    Raises:
      ValueError: a negative weight.
    """
    check_number("weight", weight, 0.0)
    return lambda inputs, context: weight * jnp.mean(jnp.square(inputs - context.group))


def patch_border(weight: float, patch: int) -> Prior:
    """Jumps across the borders of patches (Hatamizadeh et al. 2022, GradViT).

    Args:
      weight: factor of the term.
      patch: side of a patch, pixels.

    Returns:
      The prior, of images `[B, H, W, C]`: `weight` times the root mean squared jump between pixels on
      either side of a border, vertical plus horizontal.

    Raises:
      ValueError: a patch smaller than one pixel, a negative weight.
    """
    check_number("weight", weight, 0.0)
    check_count("patch", patch, 1)

    def value(inputs, context):
        del context
        down = inputs[:, patch::patch] - inputs[:, patch - 1 : -1 : patch]
        right = inputs[:, :, patch::patch] - inputs[:, :, patch - 1 : -1 : patch]
        rms = [_norm(jump) / max(jump.size, 1) ** 0.5 for jump in (down, right)]
        return weight * (rms[0] + rms[1])

    return value


def input_bounds(observation: Observation, dtype, ndim: int) -> tuple[Array, Array]:
    """The public input range as arrays that broadcast against inputs of rank `ndim`.

    Args:
      observation: whose `facts.input_range` is taken.
      dtype: of the arrays.
      ndim: rank of the inputs, batch axis included.

    Returns:
      Lowest and highest value; scalars, or `[1, ..., 1, C]` where the range is one per channel.
    """

    def bound(value):
        value = jnp.asarray(value, dtype)
        return value.reshape((1,) * (ndim - 1) + value.shape) if value.ndim else value

    low, high = observation.facts.input_range
    return bound(low), bound(high)


def _norm(x: Array) -> Array:
    """Euclidean norm whose derivative at zero is finite."""
    return jnp.sqrt(jnp.sum(jnp.square(x)) + 1e-12)


def project_to_box(inputs: Array, observation: Observation) -> Array:
    """The constraint that inputs lie in their public range.

    Args:
      inputs: `[B, ...]`.
      observation: says the range.

    Returns:
      The nearest inputs inside.
    """
    low, high = input_bounds(observation, inputs.dtype, inputs.ndim)
    return jnp.clip(inputs, low, high)
