"""Numbers of `J^T J`, from `J` itself or from products with it: what the bounds of one Jacobian share.

`push` is a product with `J`, from inputs to any tree, and `pull` one with `J^T`.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from invjax import conv
from invjax.base import Array

FAILURE_PROBABILITY = 1e-6
"""That `largest_ritz_value` is further below than `lanczos_gap` says, over the random start."""


def at_full_precision(function: Callable) -> Callable:
    """Matrix products of accelerators are else too coarse for a bound."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return wrapped


def relative_rounding(matrix: Array) -> float:
    """Share of the largest singular value up to which others are rounding."""
    return max(matrix.shape) * float(jnp.finfo(matrix.dtype).eps)


@at_full_precision
def inverse_trace(jacobian: Array, variance: Array | float = 1.0) -> Array:
    """`variance tr (J^T J)^-1`, infinite where `J [p, d]` does not determine its inputs.

    From the singular values of `J`: the eigenvalues of `J^T J` would lose half the digits.
    """
    values = jnp.linalg.svd(jnp.linalg.qr(jacobian, mode="r"), compute_uv=False)
    determined = len(values) == jacobian.shape[1]
    determined &= values[-1] > relative_rounding(jacobian) * values[0]
    total = jnp.sum(jnp.where(determined, values, 1.0) ** -2)
    return jnp.where(determined, variance * total, jnp.inf)


def solve(
    operator: Callable, target: Array, num_steps: int, tolerance: float
) -> tuple[Array, Array]:
    """Conjugate gradients from zero: the solution, and its relative residual, recomputed."""
    solution, _ = jax.scipy.sparse.linalg.cg(operator, target, tol=tolerance, maxiter=num_steps)
    # The iteration's own residual goes on falling after the true one has met rounding.
    residual = jnp.linalg.norm((target - operator(solution)).ravel())
    scale = jnp.linalg.norm(target.ravel())
    return solution, residual / jnp.where(scale > 0, scale, 1.0)


@at_full_precision
def probed_trace(
    push: Callable,
    pull: Callable,
    probes: Array,
    variance: Array,
    root: Array | None,
    num_steps: int,
    tolerance: float,
) -> tuple[Array, Array, Array]:
    """`variance tr (J^T J + variance S^-1)^-1` from random signs (Hutchinson).

    Args:
      push: product with `J`.
      pull: product with `J^T`.
      probes: `[P, B, ...]` signs.
      variance: of the noise.
      root: `L` with `S = L L^T` the covariance of one input; `None` is no prior.
      num_steps: of a solve, at most.
      tolerance: on its relative residual.

    Returns:
      The mean over the probes, its standard error, and the largest residual.
    """

    def colored(inputs, factor):
        return (inputs.reshape(inputs.shape[0], -1) @ factor).reshape(inputs.shape)

    def operator(inputs):
        if root is None:
            return pull(push(inputs))
        return colored(pull(push(colored(inputs, root.T))), root) + variance * inputs

    def sample(probe):
        target = probe if root is None else colored(probe, root)
        solution, residual = solve(operator, target, num_steps, tolerance)
        return variance * jnp.sum(target * solution), residual

    samples, residuals = conv.grouped_vmap(sample)(probes)
    error = jnp.std(samples, ddof=1) / jnp.sqrt(len(samples))
    return jnp.mean(samples), error, jnp.max(residuals)


@at_full_precision
def largest_ritz_value(
    push: Callable, pull: Callable, inputs: Array, num_steps: int, key: Array | None
) -> Array:
    """Largest eigenvalue of `J^T J` in a Krylov space, from below, in so many Lanczos steps.

    With full reorthogonalisation, from a random start in the shape and type of `inputs`.
    """
    size, eps = inputs.size, jnp.finfo(inputs.dtype).eps
    count = min(num_steps, size)
    start = jax.random.normal(jax.random.key(0) if key is None else key, (size,), inputs.dtype)

    def step(index, carry):
        basis, images = carry
        image = pull(push(basis[index].reshape(inputs.shape))).ravel()
        rest = image
        for _ in range(2):  # once leaves rounding, twice is enough
            rest = rest - (basis @ rest) @ basis
        norm = jnp.linalg.norm(rest)
        # An exhausted space is continued by zeros, which add eigenvalues of zero.
        fresh = norm > 10 * eps * jnp.linalg.norm(image)
        following = jnp.where(fresh, rest / jnp.where(fresh, norm, 1.0), 0.0)
        return basis.at[index + 1].set(following), images.at[index].set(image)

    basis = jnp.zeros((count + 1, size), start.dtype).at[0].set(start / jnp.linalg.norm(start))
    images = jnp.zeros((count, size), start.dtype)
    basis, images = jax.lax.fori_loop(0, count, step, (basis, images))
    projected = basis[:count] @ images.T
    # Rounding counts upward.
    return jnp.linalg.eigvalsh((projected + projected.T) / 2)[-1] * (1 + size * eps)


def lanczos_gap(size: int, num_steps: int) -> float:
    """Relative gap below the eigenvalue, exceeded with `FAILURE_PROBABILITY` (see `largest_eigenvalue`).

    Raises:
      ValueError: too few steps to bound anything.
    """
    if num_steps >= size:
        return 0.0
    logarithm = math.log(1.648 * math.sqrt(size) / FAILURE_PROBABILITY)
    if logarithm >= 2 * num_steps - 1:
        least = min(size, math.floor((logarithm + 1) / 2) + 1)
        raise ValueError(
            f"num_steps must be at least {least} to bound an eigenvalue of {size} inputs, "
            f"got {num_steps}."
        )
    return (logarithm / (2 * num_steps - 1)) ** 2
