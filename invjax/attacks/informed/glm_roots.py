"""A record from its direction: generalised linear models without an intercept.

The missing gradient `B = r x` leaves the length open, which the link closes: `r = h(w . x) - y`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from invjax.attacks.informed.glm_model import Family, Glm, columns, mean
from invjax.base import Array

TURN = 1.2784645427610738
"""Where `t sigmoid(-t)` is largest."""


class Missing(NamedTuple):
    """What is known of the missing record.

    Attributes:
      weight: `[d, K]`, its gradient in the weight, `x r^T`.
      intercept: `[K]`, its gradient in the intercept, `r`.
      label: where granted.
      norm: where granted.
      typical: the norm that candidates are compared with.
    """

    weight: Array
    intercept: Array | None
    label: Array | float | None
    norm: Array | float | None
    typical: Array


class Candidates(NamedTuple):
    """`m` records that may be the missing one.

    Attributes:
      inputs: `[m, d]`.
      labels: `[m]`.
      residual: `[m, K]`.
      error: `[m]`, what they leave of the equation, relative.
      valid: `[m]`, whether there is such a root.
    """

    inputs: Array
    labels: Array
    residual: Array
    error: Array
    valid: Array


def candidates(glm: Glm, missing: Missing) -> Candidates:
    """Every record that explains a gradient, without an intercept.

    Args:
      glm: the model.
      missing: what is known of the record.

    Returns:
      One candidate for softmax, two for a given norm, else two for every possible label.
    """
    if glm.family == "softmax":
        return _ray(columns(glm.weight), missing)
    if missing.norm is not None:
        return _of_norm(glm, missing)
    return _roots(glm, missing)


def _of_norm(glm: Glm, missing: Missing) -> Candidates:
    """The two records of a given norm in the direction of the gradient, and their labels."""
    gradient = missing.weight[:, 0]
    size = jnp.linalg.norm(gradient)
    residual = jnp.array([1.0, -1.0], gradient.dtype) * size / missing.norm
    inputs = gradient[None] / jnp.where(size > 0, residual, 1.0)[:, None]
    values = mean(glm.family, inputs @ jnp.asarray(glm.weight)) - residual
    if glm.family == "logistic":
        labels = (residual < 0).astype(int)
    else:
        labels = values if missing.label is None else jnp.full_like(values, missing.label)
    error = jnp.abs(values - labels)
    # Where the label is known it tells the sign.
    valid = (error <= error.min() + 1e-6) & (size > 0)
    if glm.family == "logistic" and missing.label is not None:
        # Both explain the gradient, each by a label of its own.
        valid &= labels == missing.label
    return Candidates(inputs, labels, residual[:, None], error, valid)


def _roots(glm: Glm, missing: Missing) -> Candidates:
    """All solutions of `t (h(t) - y) = w . B`, for a single output."""
    gradient = missing.weight[:, 0]
    level = gradient @ jnp.asarray(glm.weight)
    both = glm.family == "logistic" and missing.label is None
    given = jnp.asarray([0, 1] if both else [missing.label], gradient.dtype)
    predictor, valid = jax.vmap(lambda y: _predictors(glm.family, y, level))(given)
    predictor, labels = predictor.ravel(), jnp.repeat(given, 2)
    residual = mean(glm.family, predictor) - labels
    error = jnp.abs(predictor * residual - level) / jnp.maximum(jnp.abs(level), 1e-30)
    valid = valid.ravel() & (residual != 0) & jnp.any(gradient != 0)
    inputs = gradient[None] / jnp.where(valid, residual, 1.0)[:, None]
    labels = labels.astype(int) if glm.family == "logistic" else labels
    return Candidates(inputs, labels, residual[:, None], error, valid)


def _predictors(family: Family, label: Array, level: Array) -> tuple[Array, Array]:
    """Both roots of `t (h(t) - y) = level`, which falls to a minimum and rises again, and which exist."""
    zero, room = jnp.zeros_like(level), 8 * jnp.finfo(level.dtype).eps
    if family == "linear":
        # The root of larger size first; the other by their product, which loses no digits.
        inner = label**2 + 4 * level
        far = (label + jnp.where(label < 0, -1.0, 1.0) * jnp.sqrt(jnp.maximum(inner, 0.0))) / 2
        near = -level / jnp.where(far == 0, 1.0, far)
        return jnp.stack([far, near]), jnp.stack(
            [inner >= -room * label**2, (inner > 0) & (far != 0)]
        )
    if family == "logistic":
        # A label of 1 is one of 0 with the predictor turned around.
        turn, far, near = zero - TURN, zero - 800.0, 2 * jnp.maximum(level, 0.0) + 1
        sign, label = jnp.where(label > 0.5, -1.0, 1.0), zero
        height = jax.nn.sigmoid
    else:
        turn = _poisson_turn(label)
        reach = jnp.where(label > 0, 2 * jnp.abs(level) / jnp.where(label > 0, label, 1.0), 800.0)
        bend = jnp.log(jnp.where(label > 0, label, 1.0) / 2)
        far = jnp.minimum(jnp.minimum(bend, -reach), turn) - 1
        near = jnp.maximum(jnp.maximum(jnp.log1p(label), level), 0.0) + 1
        sign, height = jnp.ones_like(level), jnp.exp

    def value(t):
        return t * (height(t) - label)

    right = _bisect(value, turn, near, level)
    left = _bisect(value, turn, far, level)
    # Rounding must not part a level from the minimum that it meets.
    exists = value(turn) <= level + room * jnp.abs(level)
    # Towards the left it may level off at zero instead of rising.
    return sign * jnp.stack([right, left]), jnp.stack([exists, exists & (value(far) >= level)])


def _poisson_turn(label: Array) -> Array:
    """Where `t (exp(t) - y)` is least: `(1 + t) exp(t) = y`."""

    def newton(_, t):
        return t - ((1 + t) * jnp.exp(t) - label) / ((2 + t) * jnp.exp(t))

    # From the right of a convex function's root Newton's method descends to it.
    return jnp.where(label > 0, jax.lax.fori_loop(0, 60, newton, jnp.log1p(label)), -1.0)


def _bisect(value: Callable[[Array], Array], below: Array, above: Array, level: Array) -> Array:
    """Where a monotone function takes a value that it passes between two points."""

    def halve(_, ends):
        below, above = ends
        middle = (below + above) / 2
        high = value(middle) > level
        return jnp.where(high, below, middle), jnp.where(high, middle, above)

    below, above = jax.lax.fori_loop(0, 80, halve, (below, above))
    return (below + above) / 2


def _ray(weight: Array, missing: Missing) -> Candidates:
    """Softmax: `B = x r^T` gives the direction of `x` and of `r`, and `r = softmax(W^T x) - e_y` the length.

    The largest entry of `r` is the label's, and the only negative one. Among the others `log r_k = s a_k +
    const` with `a = W^T u`, a linear regression for the length `s`, which Gauss-Newton steps polish.
    """
    left, sizes, right = jnp.linalg.svd(missing.weight, full_matrices=False)
    label = jnp.argmax(jnp.abs(right[0]))
    sign = -jnp.sign(right[0, label])
    direction, signal = sign * left[:, 0], sign * sizes[0] * right[0]
    slopes = direction @ weight
    target = jax.nn.one_hot(label, len(signal), dtype=signal.dtype)
    # Small entries of `r` carry the error of large ones.
    trust = jnp.where(signal > 0, signal**2, 0.0)
    trust = trust / jnp.maximum(trust.sum(), 1e-300 if signal.dtype == jnp.float64 else 1e-30)
    logs = jnp.log(jnp.where(signal > 0, signal, 1.0))
    centered = slopes - trust @ slopes
    start = (trust * centered) @ logs / ((trust * centered) @ centered)

    def rest(length):
        return length * (jax.nn.softmax(length * slopes) - target) - signal

    def polish(_, length):
        value, slope = jax.jvp(rest, (length,), (jnp.ones_like(length),))
        moved = length - slope @ value / (slope @ slope)
        return jnp.where(jnp.sum(rest(moved) ** 2) < jnp.sum(value**2), moved, length)

    length = jax.lax.fori_loop(0, 20, polish, start) if missing.norm is None else missing.norm
    length = jnp.asarray(length, signal.dtype)
    error = jnp.linalg.norm(rest(length)) / jnp.where(sizes[0] > 0, sizes[0], 1.0)
    return Candidates(
        (length * direction)[None],
        label[None],
        (signal / length)[None],
        error[None],
        (jnp.isfinite(length) & (length > 0) & (sizes[0] > 0))[None],
    )
