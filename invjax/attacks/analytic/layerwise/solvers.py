"""One convolution's linear system: host code in numpy, float64, called back from compiled code."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.sparse
import scipy.sparse.linalg
import threadpoolctl

from invjax.base import Array
from invjax.linalg import Geometry, Matrix, conv_matrix, gradient_block, pool_matrix, pooled

Solver = Literal["nullspace", "joint", "gradient_only", "weight_only"]


# Two threads of BLAS beside XLA's on two busy cores took ten times the time of one.
one_thread = threadpoolctl.threadpool_limits.wrap(limits=1, user_api="blas")


class Report(NamedTuple):
    """How a layer's system was solved.

    Attributes:
      unknowns: numbers in the layer's input.
      rank: of the rows that were used.
      smallest: smallest singular value kept over the largest, the lesser of the gradient block's
        and the remaining system's. Where an unpivoted QR factor has shown the system to be of full
        rank, its singular values are estimated by power iteration: an upper bound of the share.
      residual: of all rows that are known, used or not, relative to their right sides.
    """

    unknowns: Array
    rank: Array
    smallest: Array
    residual: Array


class Solved(NamedTuple):
    """A least-squares solution: `values [N, D]`, the rank, and the share of `Report.smallest`."""

    values: np.ndarray
    rank: int
    smallest: float


def solve(
    weight: Array,
    gradient: Array,
    before: Array,
    known: Array,
    signal: Array,
    *,
    shape: Geometry,
    pool: int = 1,
    method: Solver = "nullspace",
    rtol: float = 1e-11,
) -> tuple[Array, Report]:
    """The input of a convolution from its output, its gradient and the derivative by its output.

    Traceable; the linear algebra itself runs on the host in float64, one victim after another.

    Args:
      weight: `[height, width, in, out]`.
      gradient: its gradient.
      before: `[U, V, out]`, what the layer computes, less its bias, behind the pool if there is one.
      known: `[U, V, out]`, which of those are.
      signal: `[Q, out]`, the derivative of the loss by the convolution's output, before the pool.
      shape: the convolution's geometry.
      pool: window of an average pool between the convolution and `before`.
      method: `nullspace`: gradient rows first, weight rows on their null space, which is by far the
        cheapest; `joint`: both at once, as least squares wants it under noise; `gradient_only`,
        `weight_only`.
      rtol: singular values below this share of the largest are zero.

    Returns:
      `[height, width, channels]`, of least norm where the system does not determine it; its report.
    """
    dtype = before.dtype
    size = (shape.height, shape.width, shape.channels)

    def call(known, *words):
        weight, gradient, before, signal = (from_words(array, dtype) for array in words)
        inputs, rank, smallest, residual = solve_on_host(
            weight,
            gradient,
            before,
            known,
            signal,
            shape=shape,
            pool=pool,
            method=method,
            rtol=rtol,
        )
        numbers = (to_words(number, dtype) for number in (smallest, residual))
        return to_words(inputs, dtype), np.int32(rank), *numbers

    def words(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*shape, dtype.itemsize // 4), jnp.uint32)

    result = (words(size), jax.ShapeDtypeStruct((), jnp.int32), words(()), words(()))
    # As words of 32 bits: double precision enabled in a context is not so in the thread of a
    # callback, which would round silently.
    arrays = [
        jax.lax.bitcast_convert_type(array.astype(dtype), jnp.uint32).reshape(*array.shape, -1)
        for array in (weight, gradient, before, signal)
    ]
    inputs, rank, *numbers = jax.pure_callback(
        call, result, known, *arrays, vmap_method="sequential"
    )
    inputs, smallest, residual = (
        jax.lax.bitcast_convert_type(part, dtype).reshape(part.shape[:-1])
        for part in (inputs, *numbers)
    )
    return inputs, Report(jnp.asarray(shape.unknowns, jnp.int32), rank, smallest, residual)


def to_words(values: np.ndarray | float, dtype: np.dtype) -> np.ndarray:
    """Numbers as words of 32 bits, along a new last axis."""
    values = np.ascontiguousarray(np.asarray(values, dtype)[..., None])
    return values.view(np.uint32)


def from_words(words: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Undo `to_words`."""
    return np.ascontiguousarray(words).view(dtype)[..., 0]


@one_thread
def solve_on_host(
    weight: np.ndarray,
    gradient: np.ndarray,
    before: np.ndarray,
    known: np.ndarray,
    signal: np.ndarray,
    *,
    shape: Geometry,
    pool: int = 1,
    method: Solver = "nullspace",
    rtol: float = 1e-11,
) -> tuple[np.ndarray, int, float, float]:
    """`solve` on NumPy arrays, of the same arguments.

    Returns:
      The input `[height, width, channels]`, and the rank, the share of the smallest singular value
      and the residual of `Report`. NaN with rank 0 where anything given is not finite.
    """
    size = (shape.height, shape.width, shape.channels)
    given = [np.asarray(part, np.float64) for part in (weight, gradient, before, signal)]
    usable = np.asarray(known).ravel()
    given[2] = np.where(usable, given[2].ravel(), 0.0)
    if not all(np.isfinite(part).all() for part in given):
        return np.full(size, np.nan), 0, 0.0, np.nan
    weight, gradient, before, signal = given
    rows = pooled(conv_matrix(weight, shape), pool_matrix(shape.output, (pool, pool)))[usable]
    right = before[usable]
    block = gradient_block(signal, shape)
    sides = gradient.reshape(-1, shape.channels, shape.filters).swapaxes(1, 2)
    sides = sides.reshape(-1, shape.channels)
    scale = scipy.sparse.linalg.norm(rows) / max(np.linalg.norm(block), 1e-300)
    scale /= shape.channels**0.5
    if method == "gradient_only":
        found, _ = block_solution(block, sides, rtol)
        solved = found._replace(rank=found.rank * shape.channels)
    elif method == "weight_only":
        solved = least_squares(rows.toarray(), right, rtol)
    elif method == "joint":
        solved = joint(rows, right, scale * block, scale * sides, rtol)
    else:
        solved = nullspace(rows, right, block, sides, rtol)
    inputs = solved.values.reshape(-1, shape.channels)
    wrong = np.hypot(
        np.linalg.norm(rows @ inputs.ravel() - right),
        scale * np.linalg.norm(block @ inputs - sides),
    )
    total = np.hypot(np.linalg.norm(right), scale * np.linalg.norm(sides))
    return inputs.reshape(size), solved.rank, solved.smallest, wrong / max(total, 1e-300)


def nullspace(
    rows: Matrix, right: np.ndarray, block: np.ndarray, sides: np.ndarray, rtol: float
) -> Solved:
    """Gradient rows determine a part of every channel alike; weight rows are left with the rest.

    One singular value decomposition of the block serves all channels. Gradient rows come first: with
    noise this is not the least-squares solution of both together.

    Args:
      rows: `[R, P * C]`, sparse, the weight rows.
      right: `[R]`.
      block: `[T, P]`, the gradient rows of one channel.
      sides: `[T, C]`.
      rtol: as for `solve`.

    Returns:
      The solution, `[P, C]`.
    """
    found, null = block_solution(block, sides, rtol)
    channels = sides.shape[1]
    if not null.shape[1]:
        return found._replace(rank=found.rank * channels)
    columns = rows.tocsc()
    left = np.empty((rows.shape[0], null.shape[1], channels))
    for channel in range(channels):
        left[..., channel] = columns[:, channel::channels] @ null
    # Where weight rows add nothing only rounding is left, whose rank would be full by itself.
    floor = scipy.sparse.linalg.norm(rows, axis=1).max(initial=0.0)
    remainder = right - rows @ found.values.ravel()
    rest = least_squares(left.reshape(rows.shape[0], -1), remainder, rtol, floor)
    values = found.values + null @ rest.values.reshape(-1, channels)
    smallest = min((part.smallest for part in (found, rest) if part.rank), default=0.0)
    return Solved(values, found.rank * channels + rest.rank, smallest)


def joint(
    rows: Matrix, right: np.ndarray, block: np.ndarray, sides: np.ndarray, rtol: float
) -> Solved:
    """All rows at once, the gradient block compressed to a triangle first.

    Args:
      rows: `[R, P * C]`, sparse, the weight rows.
      right: `[R]`.
      block: `[T, P]`, the gradient rows of one channel, scaled.
      sides: `[T, C]`.
      rtol: as for `solve`.

    Returns:
      The solution, `[P * C]`.
    """
    channels = sides.shape[1]
    basis, triangle = scipy.linalg.qr(block, mode="economic", check_finite=False)
    many = np.einsum("tp,cd->tcpd", triangle, np.eye(channels))
    stacked = np.concatenate([rows.toarray(), many.reshape(-1, rows.shape[1])])
    return least_squares(stacked, np.concatenate([right, (basis.T @ sides).ravel()]), rtol)


def block_solution(
    block: np.ndarray, sides: np.ndarray, rtol: float, floor: float = 0.0
) -> tuple[Solved, np.ndarray]:
    """Least squares with a block that all channels share.

    Args:
      block: `[T, P]`.
      sides: `[T, C]`.
      rtol: as for `solve`.
      floor: what the largest singular value is at least taken to be.

    Returns:
      The solution `[P, C]` of least norm, its rank that of the block; `[P, Z]`, an orthonormal basis
      of what the block does not see.
    """
    wide = block.shape[0] < block.shape[1]
    left, values, right = np.linalg.svd(block, full_matrices=wide)
    largest = values.max(initial=floor)
    rank = int((values > rtol * largest).sum())
    solution = right[:rank].T @ ((left[:, :rank].T @ sides) / values[:rank, None])
    smallest = values[rank - 1] / largest if rank else 0.0
    return Solved(solution, rank, smallest), right[rank:].T


def least_squares(matrix: np.ndarray, right: np.ndarray, rtol: float, floor: float = 0.0) -> Solved:
    """Least squares by QR; by a singular value decomposition of the factor where it is deficient.

    Args:
      matrix: `[M, N]`.
      right: `[M]`.
      rtol: as for `solve`.
      floor: what the largest singular value is at least taken to be.

    Returns:
      The solution `[N]`, of least norm.
    """
    rows, columns = matrix.shape
    if rows < columns:
        basis, triangle = scipy.linalg.qr(matrix.T, mode="economic", check_finite=False)
        solved = by_singular_values(triangle.T, right, rtol, floor)
        return solved._replace(values=basis @ solved.values)
    # The right side as a last column, so that the orthogonal factor is never formed.
    both = np.column_stack([matrix, right])
    (triangle,) = scipy.linalg.qr(both, mode="r", overwrite_a=True, check_finite=False)
    triangle, right = triangle[:columns, :columns], triangle[:columns, columns]
    (estimate,) = scipy.linalg.get_lapack_funcs(("trcon",), (triangle,))
    inverse_condition, _ = estimate(triangle, norm="1", uplo="U", diag="N")
    share = min(1.0, np.abs(triangle).sum(axis=0).max() / max(floor, 1e-300))
    if not inverse_condition * share > rtol:
        return by_singular_values(triangle, right, rtol, floor)
    values = scipy.linalg.solve_triangular(triangle, right, check_finite=False)
    return Solved(values, columns, extreme_share(triangle, floor))


def by_singular_values(matrix: np.ndarray, right: np.ndarray, rtol: float, floor: float) -> Solved:
    """Least squares by singular values, of least norm; `right` is `[M]`."""
    found, _ = block_solution(matrix, right[:, None], rtol, floor)
    return found._replace(values=found.values[:, 0])


def extreme_share(triangle: np.ndarray, floor: float, rounds: int = 12) -> float:
    """Smallest over largest singular value of a triangular factor, by power iteration: not below it."""
    start = np.random.default_rng(0).normal(size=triangle.shape[1])

    def norm(apply) -> float:
        vector, size = start / np.linalg.norm(start), 0.0
        for _ in range(rounds):
            vector = apply(vector)
            size = np.linalg.norm(vector)
            vector = vector / size
        return float(size) ** 0.5

    def both_ways(vector: np.ndarray) -> np.ndarray:
        vector = scipy.linalg.solve_triangular(triangle, vector, trans="T", check_finite=False)
        return scipy.linalg.solve_triangular(triangle, vector, check_finite=False)

    largest = max(floor, norm(lambda vector: triangle.T @ (triangle @ vector)))
    return 1.0 / (norm(both_ways) * largest)
