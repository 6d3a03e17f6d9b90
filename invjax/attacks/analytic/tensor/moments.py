"""From the gradient of two dense layers to subspaces and Hermite tensors."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from invjax.attacks.analytic.tensor.hermite import features, tensor_of
from invjax.base import Array

Estimator = Literal["weights", "outer"]
"""Which layer's gradient moments are taken from: the hidden one's or the output one's."""


class Problem(NamedTuple):
    """Two dense layers `h = f(W x)`, `o = A^T h`, and the gradient of a loss of `o`, unit by unit.

    With `p_i` the derivative of sample `i`'s part of the loss by its outputs, the outer gradient is
    `sum_i p_ic f(w_j x_i)` and the hidden one `sum_i (a_j p_i) f'(w_j x_i) x_i`.

    Attributes:
      weight: `[m, n]`, rows `w_j`.
      outer: `[m, C]`, rows `a_j`.
      weight_gradient: `[m, n]`.
      outer_gradient: `[m, C]`.
      weight_seen: `[m, n]`, 1 where an entry was transmitted, else 0.
      outer_seen: `[m, C]`, the same.
    """

    weight: Array
    outer: Array
    weight_gradient: Array
    outer_gradient: Array
    weight_seen: Array
    outer_seen: Array


class Subspace(NamedTuple):
    """Coordinates `u = root^T basis^T x` in which the samples are found.

    Attributes:
      basis: `[n, k]`, orthonormal columns.
      root: `[k, k]` lower triangular: `root root^T` is the second moment of `basis^T w_j`.
      points: `[m, k]`, whitened weights `root^-1 basis^T w_j`; `w_j x = points_j u` for `x` in the span.
    """

    basis: Array
    root: Array
    points: Array

    def coordinates(self, inputs: Array) -> Array:
        """Of inputs `[..., n]`, and of sums of such as the rows of the hidden gradient are: `[..., k]`."""
        return inputs @ self.basis @ self.root

    def inputs(self, coordinates: Array) -> Array:
        """The inputs `[B, n]` in the span of coordinates `[B, k]`."""
        back = jax.scipy.linalg.solve_triangular(self.root, coordinates.T, lower=True, trans=1)
        return (self.basis @ back).T


def row_space(weight_gradient: Array, size: int) -> tuple[Array, Array]:
    """The span of the inputs: every row of the first layer's gradient lies in it.

    Args:
      weight_gradient: `[m, n]`, rows by unit.
      size: samples behind it.

    Returns:
      `[n, size]` orthonormal columns, and all singular values, decreasing.
    """
    triangle = jnp.linalg.qr(weight_gradient, mode="r")
    _, values, rows = jnp.linalg.svd(triangle, full_matrices=False)
    return rows[:size].T, values


def gap_after(values: Array, size: int) -> Array:
    """Singular value `size + 1` over `size`: 0 where there is no other, and 1 where there is none at all.

    Args:
      values: decreasing.
      size: samples behind them.

    Returns:
      A scalar in [0, 1].
    """
    last = values[size - 1]
    following = values[size] if size < values.size else jnp.zeros_like(last)
    return jnp.where(last > 0, following / jnp.where(last > 0, last, 1.0), 1.0)


def batch_size_by_gap(weight_gradient: Array, max_samples: int) -> tuple[Array, Array]:
    """How many samples are behind a first layer's gradient: where its singular values fall off.

    Args:
      weight_gradient: `[m, n]` or `[n, m]`.
      max_samples: the largest size considered, less than both sides.

    Returns:
      The size, and the ratio of the next singular value to the last: 1e-6 in single and 1e-15 in
      double precision without a defence; near 1 there is no gap and no estimate.

    Raises:
      ValueError: `max_samples` out of range.
    """
    if not 1 <= max_samples < min(weight_gradient.shape):
        raise ValueError(
            f"max_samples must lie in [1, {min(weight_gradient.shape) - 1}], got {max_samples}."
        )
    values = row_space(weight_gradient, 1)[1]
    floor = jnp.maximum(values[0] * jnp.finfo(values.dtype).eps, jnp.finfo(values.dtype).tiny)
    ratios = jnp.maximum(values[1:], floor) / jnp.maximum(values[:-1], floor)
    size = jnp.argmin(ratios[:max_samples])
    return size + 1, ratios[size]


def moment_space(
    key: Array, problem: Problem, size: int, order: int, estimator: Estimator, contractions: int
) -> Array:
    """The span of the inputs from a Hermite moment (Wang et al. 2023, algorithm 1; section 4.1, appendix B).

    Order 2 is the moment `M_2` itself; order 3 takes `M_3` contracted with random unit vectors, one
    after the other, and sums the squares of these matrices. Departure: the paper takes one vector, which
    is noisier.

    Args:
      key: PRNG key of the vectors.
      problem: the gradient.
      size: samples behind it.
      order: 2 or 3.
      estimator: the gradient that the moment is taken from.
      contractions: how many vectors.

    Returns:
      `[n, size]` orthonormal columns, of the largest eigenvalues in absolute value.
    """
    w, values = problem.weight, problem.outer_gradient[:, 0]
    # The published attack is for one output.
    rows = problem.weight_gradient / problem.outer if estimator == "weights" else None
    units, eye = w.shape[0], jnp.eye(w.shape[1], dtype=w.dtype)

    def second() -> Array:
        if rows is None:
            return (w.T * values[None]) @ w / units - values.mean() * eye
        return rows.T @ w / units

    def third(alpha: Array) -> Array:
        along = w @ alpha
        if rows is None:
            mixed = jnp.outer(values @ w / units, alpha)
            plain = (w.T * (values * along)[None]) @ w / units
            return plain - (values @ along / units) * eye - mixed - mixed.T
        first = rows @ alpha
        one = (w.T * first[None]) @ w / units - first.mean() * eye
        two = rows.T @ (w * along[:, None]) / units - jnp.outer(rows.mean(axis=0), alpha)
        return (one + two + two.T) / 3

    if order == 2:
        moment = second()
        moment = (moment + moment.T) / 2
        moment = moment @ moment
    else:
        vectors = jax.random.normal(key, (contractions, w.shape[1]), w.dtype)
        vectors /= jnp.linalg.norm(vectors, axis=1, keepdims=True)
        contracted = jax.lax.map(third, vectors)
        moment = jnp.einsum("sab,sbc->ac", contracted, contracted)
    return jnp.linalg.eigh(moment)[1][:, -size:]


def whitened(problem: Problem, directions: Array, *, whiten: bool = True) -> Subspace:
    """Coordinates of a subspace, in which the weights have unit variance.

    Args:
      problem: the gradient.
      directions: `[n, k]`, orthonormal columns.
      whiten: by the weights' own second moment; else they are taken as standard normal.

    Returns:
      The subspace.
    """
    points = problem.weight @ directions
    if not whiten:
        return Subspace(directions, jnp.eye(points.shape[1], dtype=points.dtype), points)
    root = jnp.linalg.cholesky(points.T @ points / points.shape[0])
    points = jax.scipy.linalg.solve_triangular(root, points.T, lower=True).T
    return Subspace(directions, root, points)


def hermite_tensors(
    problem: Problem,
    space: Subspace,
    order: int,
    estimator: Estimator,
    *,
    regression: bool = True,
) -> dict[int, Array]:
    """Tensors `sum_i p_ic e_p(s_i) u_i u_i ...` with coordinates `s_i u_i` of `x_i`, `|u_i| = 1`.

    `e_p(s) = E[f(s Z) He_p(Z)]`, of `hermite_coefficients`. (By Stein's lemma, Wang et al. 2023, section
    4.1 and appendix B.)

    Args:
      problem: the gradient.
      space: the coordinates.
      order: the largest order.
      estimator: `outer` fits every row of the outer gradient by Hermite polynomials of the weights,
        `weights` the hidden gradient by `a_jc` times such.
      regression: least squares over the units; else plain moments.

    Returns:
      For every order from 1 (`weights`) or 0 (`outer`) a tensor `[k, ..., k, C]`.
    """
    points, size = space.points, space.points.shape[1]
    seen = problem.weight_seen if estimator == "weights" else problem.outer_seen
    alive = seen.max(axis=1)
    if estimator == "outer":
        degree = max(order, 3)
        found = _fit(features(points, degree), problem.outer_gradient, alive, regression)
        return {p: tensor_of(found, size, p) for p in range(order + 1)}
    rows = space.coordinates(problem.weight_gradient)
    classes = problem.outer.shape[1]
    if not regression:
        # As published: a quotient by the one output's weight.
        rows = rows / problem.outer
        found = _fit(features(points, order - 1), rows, alive, regression)[:, None]
    else:
        products = features(points, 3)
        signals = (problem.outer[:, :, None] * products[:, None]).reshape(points.shape[0], -1)
        found = _fit(signals, rows, alive, regression)
        found = found.reshape(classes, -1, size).swapaxes(0, 1)
    return {p: _symmetric(tensor_of(found, size, p - 1)) for p in range(1, order + 1)}


def _fit(design: Array, target: Array, alive: Array, regression: bool) -> Array:
    """Coefficients of a target on a design over the units that are alive."""
    design, target = design * alive[:, None], target * alive[:, None]
    if not regression:
        return design.T @ target / jnp.maximum(alive.sum(), 1.0)
    gram = design.T @ design
    scale = jnp.trace(gram) / gram.shape[0]
    ridge = (1e-12 if gram.dtype == jnp.float64 else 1e-6) * scale
    factor = jax.scipy.linalg.cho_factor(gram + ridge * jnp.eye(gram.shape[0], dtype=gram.dtype))
    return jax.scipy.linalg.cho_solve(factor, design.T @ target)


def _symmetric(tensor: Array) -> Array:
    """From `[k, ..., k (p-1 of them), C, k]` to the symmetric part, `[k, ..., k (p), C]`."""
    tensor = jnp.moveaxis(tensor, -2, -1)
    order = tensor.ndim - 1
    # Symmetric in all but the last of its axes already.
    turned = [jnp.moveaxis(tensor, order - 1, place) for place in range(order)]
    return sum(turned[1:], turned[0]) / np.asarray(order, tensor.dtype)
