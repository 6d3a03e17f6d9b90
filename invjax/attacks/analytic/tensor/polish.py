"""Levenberg-Marquardt over the inputs and the loss's derivatives, on what was transmitted."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from invjax.attacks.analytic.tensor.moments import Problem
from invjax.base import Array


class Candidate(NamedTuple):
    """Samples that may explain a gradient.

    Attributes:
      inputs: `[B, n]`.
      signals: `[B, C]`, derivatives of every sample's part of the loss by its outputs.
    """

    inputs: Array
    signals: Array


class Scales(NamedTuple):
    """What deviations are measured in; a scalar for each block.

    Attributes:
      weight: of the hidden gradient.
      outer: of the outer gradient.
    """

    weight: Array
    outer: Array


def balanced(problem: Problem) -> Scales:
    """Scales at which both blocks weigh the same.

    Args:
      problem: the gradient.

    Returns:
      The norm of each block's transmitted entries, times the root of two; 1 where it is zero.
    """

    def norm(values: Array, seen: Array) -> Array:
        total = jnp.sqrt(2 * jnp.sum((values * seen) ** 2))
        return jnp.where(total > 0, total, 1.0)

    return Scales(
        norm(problem.weight_gradient, problem.weight_seen),
        norm(problem.outer_gradient, problem.outer_seen),
    )


def implied(
    problem: Problem, activation: Callable[[Array], Array], candidate: Candidate
) -> tuple[Array, Array]:
    """The gradient that a candidate implies.

    Args:
      problem: the weights.
      activation: the hidden layer's.
      candidate: the samples.

    Returns:
      The hidden gradient `[m, n]` and the outer one `[m, C]`.
    """
    before = problem.weight @ candidate.inputs.T
    values, slopes = jax.jvp(activation, (before,), (jnp.ones_like(before),))
    back = problem.outer @ candidate.signals.T
    return (back * slopes) @ candidate.inputs, values @ candidate.signals


def deviations(
    problem: Problem,
    activation: Callable[[Array], Array],
    scales: Scales,
    candidate: Candidate,
) -> tuple[Array, Array]:
    """What a candidate leaves unexplained of the transmitted entries, in units of the scales.

    Args:
      problem: the gradient.
      activation: the hidden layer's.
      scales: units of both blocks.
      candidate: the samples.

    Returns:
      Of the hidden gradient `[m, n]` and of the outer one `[m, C]`.
    """
    weight, outer = implied(problem, activation, candidate)
    return (
        (weight - problem.weight_gradient) * problem.weight_seen / scales.weight,
        (outer - problem.outer_gradient) * problem.outer_seen / scales.outer,
    )


def _normal_equations(residual, point: Array):
    """Gradient and Gauss-Newton matrix of half a squared norm, without the Jacobian in memory."""
    left, back = jax.vjp(residual, point)
    _, forward = jax.linearize(residual, point)
    # So many columns at a time as keep a few million numbers in memory.
    batch = max(1, 4_000_000 // sum(leaf.size for leaf in left))

    def row(direction: Array) -> Array:
        return back(forward(direction))[0]

    eye = jnp.eye(point.size, dtype=point.dtype)
    all_at_once = batch >= point.size
    matrix = jax.vmap(row)(eye) if all_at_once else jax.lax.map(row, eye, batch_size=batch)
    return back(left)[0], matrix


def polish(
    problem: Problem,
    activation: Callable[[Array], Array],
    scales: Scales,
    start: Candidate,
    *,
    max_steps: int | Array = 100,
    tolerance: float = 0.0,
) -> tuple[Candidate, Array]:
    """Fit the transmitted entries by least squares (Levenberg 1944; Marquardt 1963).

    Args:
      problem: the gradient.
      activation: the hidden layer's.
      scales: units of both blocks.
      start: where to begin; its signals are first fitted to its inputs.
      max_steps: largest number of steps; traced numbers will do.
      tolerance: of half the sum of the squared deviations, at which to stop.

    Returns:
      The candidate, and half the sum of its squared deviations.
    """
    size, count = start.inputs.shape[0], start.inputs.size
    classes = start.signals.shape[1]

    def unpack(point: Array) -> Candidate:
        return Candidate(point[:count].reshape(size, -1), point[count:].reshape(size, classes))

    def residual(point: Array) -> tuple[Array, Array]:
        return deviations(problem, activation, scales, unpack(point))

    def cost(point: Array) -> Array:
        value = sum(jnp.sum(part**2) for part in residual(point)) / 2
        return jnp.where(jnp.isfinite(value), value, jnp.inf)

    inputs = start.inputs.reshape(-1)

    def fixed(signals: Array) -> tuple[Array, Array]:
        return residual(jnp.concatenate([inputs, signals]))

    pull, matrix = _normal_equations(fixed, jnp.zeros(size * classes, inputs.dtype))
    signals = -_solve(matrix, pull, jnp.asarray(1e-12, inputs.dtype))
    fitted = jnp.concatenate([inputs, signals])
    given = jnp.concatenate([inputs, start.signals.reshape(-1)])
    point = jnp.where(cost(fitted) < cost(given), fitted, given)

    def unfinished(carry) -> Array:
        step, _, value, _, stale = carry
        return (step < max_steps) & (value > tolerance) & (stale < 8)

    def advance(carry):
        step, point, value, damping, stale = carry
        pull, matrix = _normal_equations(residual, point)

        def attempt(factor):
            moved = point - _solve(matrix, pull, damping * factor)
            moved = jnp.where(jnp.isfinite(moved), moved, point)
            return moved, cost(moved)

        # All dampings at once: the matrix costs more than they do.
        factors = jnp.asarray([0.1, 1.0, 10.0, 1000.0], point.dtype)
        moved, values = jax.lax.map(attempt, factors)
        best = jnp.argmin(values)
        better = values[best] < value
        progress = values[best] < value * (1 - 1e-3)
        return (
            step + 1,
            jnp.where(better, moved[best], point),
            jnp.where(better, values[best], value),
            jnp.clip(damping * jnp.where(better, factors[best], 1e3), 1e-15, 1e12),
            jnp.where(progress, 0, stale + 1),
        )

    start_at = (0, point, cost(point), jnp.asarray(1e-3, point.dtype), 0)
    _, point, value, _, _ = jax.lax.while_loop(unfinished, advance, start_at)
    return unpack(point), value


def standard_errors(
    problem: Problem,
    activation: Callable[[Array], Array],
    scales: Scales,
    candidate: Candidate,
    *,
    homogeneous: bool = False,
) -> Array:
    """Standard errors of fitted inputs, to first order, for deviations of unit variance.

    Args:
      problem: the gradient.
      activation: the hidden layer's.
      scales: units of both blocks.
      candidate: the samples.
      homogeneous: whether the gradient hides the inputs' norms, which then count as known.

    Returns:
      `[B]`, root of the trace of every input's part of the inverse Gauss-Newton matrix, over the
      input's norm.
    """
    size, count = candidate.inputs.shape[0], candidate.inputs.size

    def residual(point: Array) -> tuple[Array, Array]:
        inputs, signals = point[:count].reshape(size, -1), point[count:].reshape(size, -1)
        return deviations(problem, activation, scales, Candidate(inputs, signals))

    point = jnp.concatenate([candidate.inputs.ravel(), candidate.signals.ravel()])
    matrix = _normal_equations(residual, point)[1]
    norms = jnp.linalg.norm(candidate.inputs, axis=1)
    if homogeneous:
        outward = candidate.inputs / norms[:, None]
        rows = jax.scipy.linalg.block_diag(*outward[:, None])
        matrix = matrix.at[:count, :count].add(100 * jnp.diag(matrix).max() * rows.T @ rows)
    # What rounding hides of a direction is no information.
    eps = 10 * jnp.finfo(matrix.dtype).eps
    diagonal = jnp.sqrt(jnp.diag(matrix) + eps * jnp.diag(matrix).max())
    scaled = matrix / diagonal[:, None] / diagonal[None] + eps * jnp.eye(point.size)
    variances = jnp.diag(jnp.linalg.inv(scaled)) / diagonal**2
    errors = jnp.sqrt(variances[:count].reshape(size, -1).sum(axis=1)) / norms
    return jnp.where(jnp.isfinite(errors), errors, jnp.inf)


def _solve(matrix: Array, pull: Array, damping: Array) -> Array:
    diagonal = jnp.diag(matrix)
    floor = jnp.finfo(matrix.dtype).eps * diagonal.max()
    return jax.scipy.linalg.solve(
        matrix + jnp.diag(damping * diagonal + floor * jnp.minimum(damping, 1.0) + 1e-30),
        pull,
        assume_a="pos",
    )
