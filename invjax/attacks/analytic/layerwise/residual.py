"""One residual block, `out = act(W2 h + x)` with `h = act(W1 x)`, as a linear system: host code, float64.

Chain models have no such block, so these are functions of arrays: what the layer-wise recursion would
do at one. Both convolutions keep the shape of their input and have no bias.
"""

from typing import NamedTuple

import numpy as np

from invjax.attacks.analytic.layerwise.solvers import least_squares, one_thread
from invjax.checks import check_count, check_number
from invjax.linalg import Geometry, conv_matrix, gradient_matrix


class Undone(NamedTuple):
    """The inside of a residual block.

    Attributes:
      inputs: `[height, width, channels]`, `x`.
      hidden: the same shape, `h`.
      unknowns: numbers sought.
      rank: of the system.
      residual: relative, of the system.
      rounds: sign patterns tried; 1 for the joint system.
      stable: whether the solution has the sign pattern that it was computed with.
    """

    inputs: np.ndarray
    hidden: np.ndarray
    unknowns: int
    rank: int
    residual: float
    rounds: int = 1
    stable: bool = True


@one_thread
def undo_jointly(
    second: np.ndarray,
    gradient: np.ndarray,
    before: np.ndarray,
    signal: np.ndarray,
    shape: Geometry,
    *,
    rtol: float = 1e-11,
) -> Undone:
    """Solve for `h` and `x` together: `W2 h + x` is known, and so are the gradient rows of `h`.

    Where those determine `h` alone, `x` follows whatever the first convolution is: a skip connection
    leaks more than a plain layer.

    Args:
      second: `[height, width, C, C]`, the second convolution's weight.
      gradient: its gradient.
      before: `[H, W, C]`, `W2 h + x`, the inverse activation of the block's output.
      signal: `[H, W, C]`, the derivative of the loss by that.
      shape: of both convolutions.
      rtol: singular values below this share of the largest are zero.

    Returns:
      The solution, of least norm where the system is deficient; any activation will do.

    Raises:
      ValueError: convolutions that change the shape.
    """
    _check(shape)
    weight_rows = conv_matrix(second, shape).toarray()
    gradient_rows = gradient_matrix(np.reshape(signal, (-1, shape.filters)), shape)
    size = shape.unknowns
    scale = np.linalg.norm(weight_rows) / max(np.linalg.norm(gradient_rows), 1e-300)
    rows = np.block(
        [
            [weight_rows, np.eye(size)],
            [scale * gradient_rows, np.zeros((gradient_rows.shape[0], size))],
        ]
    )
    right = np.concatenate([np.ravel(before), scale * np.ravel(gradient)])
    solved = least_squares(rows, right, rtol)
    hidden, inputs = solved.values.reshape(2, shape.height, shape.width, shape.channels)
    residual = _residual(rows, solved.values, right)
    return Undone(inputs, hidden, 2 * size, solved.rank, residual)


@one_thread
def undo_by_signs(
    weights: tuple[np.ndarray, np.ndarray],
    gradients: tuple[np.ndarray, np.ndarray],
    before: np.ndarray,
    signal: np.ndarray,
    inputs: np.ndarray,
    shape: Geometry,
    *,
    slope: float = 0.2,
    max_rounds: int = 20,
    rtol: float = 1e-11,
) -> Undone:
    """Solve for `x` alone, given which of the hidden units are positive, and try again until that holds.

    With LeakyReLU the block is linear in `x` once its hidden signs are fixed, and so are its gradient
    rows. Those of the first convolution change most with a wrong sign: with them the signs came to
    rest, at the truth, for 7 of 12 blocks of 8x8x3 and kernels of 3x3, without them for all in two
    or three rounds. So they are used where the others leave something open, and to check.

    Args:
      weights: of the two convolutions, `[height, width, C, C]` each.
      gradients: theirs.
      before: as for `undo_jointly`.
      signal: as for `undo_jointly`.
      inputs: `[H, W, C]`, a guess of `x`, where the signs start: that of `undo_jointly`.
      shape: of both convolutions.
      slope: of the LeakyReLU below zero, positive.
      max_rounds: solves at most.
      rtol: as for `undo_jointly`.

    Returns:
      The solution. It is the truth if it is stable, of full rank and of small residual: signs may
      come to rest elsewhere too. The residual is that of all rows.

    Raises:
      ValueError: convolutions that change the shape, a slope that is not positive, no rounds.
    """
    _check(shape)
    check_number("slope", slope, 0.0, open_low=True, open_high=True)
    check_count("max_rounds", max_rounds, 1)
    size, filters = shape.unknowns, shape.filters
    first, second = (conv_matrix(weight, shape).toarray() for weight in weights)
    above = np.asarray(signal, np.float64)
    second_rows = gradient_matrix(above.reshape(-1, filters), shape)
    below = second.T @ above.ravel()
    guess, count = np.ravel(inputs), 0
    while True:
        count += 1
        pattern = np.where(first @ guess < 0, slope, 1.0)
        inside = pattern[:, None] * first
        first_rows = gradient_matrix((pattern * below).reshape(-1, filters), shape)
        parts = [
            _unit(second @ inside + np.eye(size), before),
            _unit(second_rows @ inside, gradients[1]),
            _unit(first_rows, gradients[0]),
        ]
        rows, right = (np.concatenate(part) for part in zip(*parts, strict=True))
        few = rows.shape[0] - first_rows.shape[0]
        solved = least_squares(rows[:few], right[:few], rtol)
        if solved.rank < size:
            solved = least_squares(rows, right, rtol)
        guess = solved.values
        stable = bool((np.where(first @ guess < 0, slope, 1.0) == pattern).all())
        if stable or count == max_rounds:
            break
    whole = (shape.height, shape.width, shape.channels)
    hidden, residual = (inside @ guess).reshape(whole), _residual(rows, guess, right)
    return Undone(guess.reshape(whole), hidden, size, solved.rank, residual, count, stable)


def _unit(rows: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    size = max(np.linalg.norm(rows), 1e-300)
    return rows / size, np.ravel(right) / size


def pull_back_block(
    first: np.ndarray, inner: np.ndarray, signal: np.ndarray, shape: Geometry
) -> np.ndarray:
    """The derivative of the loss by the block's input, which the layer before it needs: `W1^T k1 + k2`.

    Args:
      first: `[height, width, C, C]`, the first convolution's weight.
      inner: `[H, W, C]`, `k1`, the derivative by what the first convolution computes.
      signal: `[H, W, C]`, `k2`, that by `W2 h + x`.
      shape: of the convolutions.

    Returns:
      `[H, W, C]`.
    """
    pulled = conv_matrix(first, shape).T @ np.ravel(inner)
    return pulled.reshape(np.shape(signal)) + np.asarray(signal, np.float64)


def _residual(rows: np.ndarray, values: np.ndarray, right: np.ndarray) -> float:
    return float(np.linalg.norm(rows @ values - right) / max(np.linalg.norm(right), 1e-300))


def _check(shape: Geometry) -> None:
    if (*shape.output, shape.filters) != (shape.height, shape.width, shape.channels):
        raise ValueError(
            "A residual block's convolutions must keep the shape of their input, got "
            f"{(shape.height, shape.width, shape.channels)} to {(*shape.output, shape.filters)}."
        )
