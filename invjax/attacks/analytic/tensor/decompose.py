"""Symmetric tensor decomposition with several rows of weights: Jennrich, then least squares in turn."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from invjax.base import Array


class Components(NamedTuple):
    """A decomposition `T[a, b, ..., c] = sum_i u_ia u_ib ... q_ic`.

    Attributes:
      directions: `u`, `[k, k]`, unit rows, one a component.
      weights: `q`, `[k, C]`.
      residual: norm of what is left over the norm of the tensor.
    """

    directions: Array
    weights: Array
    residual: Array


def decompose(key: Array, tensor: Array, *, trials: int = 60, iterations: int = 100) -> Components:
    """As many components as the tensor has dimensions, linearly independent.

    Every trial takes the eigenvectors of `T(theta_1) T(theta_2)^-1` for random contractions of all
    axes but two (Harshman 1970; Leurgans et al. 1993); the best of them starts the iterations.

    Args:
      key: PRNG key of the contractions.
      tensor: `[k, ..., k, C]`, symmetric in its first axes, of which there are at least 3.
      trials: pairs of contractions.
      iterations: of alternating least squares.

    Returns:
      The components; signs of an odd order are arbitrary.
    """
    size, order = tensor.shape[0], tensor.ndim - 1
    slices = tensor.reshape(size, size, -1)
    total = jnp.maximum(jnp.linalg.norm(tensor), jnp.finfo(tensor.dtype).tiny)
    contractions = jax.random.normal(key, (trials, 2, slices.shape[2]), tensor.dtype)

    def finish(directions: Array) -> Components:
        weights = component_weights(tensor, directions)
        left = tensor - _expand(directions, weights, order)
        residual = jnp.linalg.norm(left) / total
        return Components(directions, weights, jnp.where(jnp.isfinite(residual), residual, jnp.inf))

    def attempt(contraction: Array) -> Components:
        first, second = jnp.moveaxis(slices @ contraction.T, 2, 0)
        _, vectors = jnp.linalg.eig(first @ jnp.linalg.pinv(second))
        # An eigenvector comes with a phase of its own.
        largest = jnp.take_along_axis(vectors, jnp.abs(vectors).argmax(axis=0)[None], axis=0)
        real = jnp.real(vectors / jnp.where(largest == 0, 1.0, largest)).T.astype(tensor.dtype)
        return finish(_unit(real))

    found = jax.vmap(attempt)(contractions)
    best = jax.tree.map(lambda leaf: leaf[jnp.argmin(found.residual)], found)

    def improve(_, best: Components) -> Components:
        others = _expand_rows(best.directions, best.weights, order)
        gram = (best.directions @ best.directions.T) ** (order - 1)
        gram *= best.weights @ best.weights.T
        ridge = _ridge(tensor.dtype) * jnp.trace(gram) * jnp.eye(size, dtype=tensor.dtype)
        moved = jnp.linalg.solve(gram + ridge, others @ tensor.reshape(size, -1).T)
        # Halfway only: all axes share one factor, so a whole step may overshoot.
        aligned = moved * jnp.sign((moved * best.directions).sum(axis=1, keepdims=True))
        after = finish(_unit(_unit(aligned) + best.directions))
        better = after.residual < best.residual
        return jax.tree.map(lambda new, old: jnp.where(better, new, old), after, best)

    return jax.lax.fori_loop(0, iterations, improve, best)


def component_weights(tensor: Array, directions: Array) -> Array:
    """The least-squares weights of given directions.

    Args:
      tensor: `[k, ..., k, C]`, symmetric in its first axes.
      directions: `[k, k]`, unit rows.

    Returns:
      `[k, C]`.
    """
    order = tensor.ndim - 1
    gram = (directions @ directions.T) ** order
    along = tensor
    for axis in range(order):
        # After the first contraction the component's axis comes first.
        along = (
            jnp.tensordot(directions, along, ((1,), (0,)))
            if axis == 0
            else jnp.einsum("ia,ia...->i...", directions, along)
        )
    ridge = _ridge(tensor.dtype) * jnp.eye(gram.shape[0], dtype=gram.dtype)
    return jnp.linalg.solve(gram + ridge, along)


def _ridge(dtype) -> float:
    """Keeps a solve finite where two directions have become one."""
    return 1e-13 if dtype == jnp.float64 else 1e-6


def _unit(rows: Array) -> Array:
    norm = jnp.linalg.norm(rows, axis=1, keepdims=True)
    return rows / jnp.where(norm == 0, 1.0, norm)


def _expand_rows(directions: Array, weights: Array, order: int) -> Array:
    """What a component contributes but for one axis, `[k, k^(p-1) C]`."""
    found = weights
    for _ in range(order - 1):
        found = directions[:, :, None] * found.reshape(found.shape[0], 1, -1)
    return found.reshape(found.shape[0], -1)


def _expand(directions: Array, weights: Array, order: int) -> Array:
    others = _expand_rows(directions, weights, order)
    size = directions.shape[1]
    return (directions.T @ others).reshape((size,) * order + weights.shape[1:])
