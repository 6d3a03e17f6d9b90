"""Convolutions as linear systems, and ranks: host code in float64, where a rank has a meaning.

What a convolution `z = W * x` says of its input `x`, flattened to pixels by channels:

* **weight rows**, `z = W x`, one for every output pixel and filter;
* **gradient rows**, `dL/dW = K x` with `k = dL/dz`: the same block `B` for every input channel, one row
  for every filter and tap.

Chen and Campbell 2022; Zhu and Blaschko 2021 (R-GAP). In float32 ranks are wrong: 309 for 300 was seen.
"""

import itertools
from typing import NamedTuple

import numpy as np
import scipy.sparse

from invjax.base import Layer

Matrix = scipy.sparse.csr_array


class Geometry(NamedTuple):
    """Shapes of a convolution.

    Attributes:
      height: of the input, pixels.
      width: of the input, pixels.
      channels: of the input.
      filters: output channels.
      window: height and width of the kernel.
      strides: vertical, horizontal.
      padding: `((top, bottom), (left, right))`.
    """

    height: int
    width: int
    channels: int
    filters: int
    window: tuple[int, int]
    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]

    @property
    def pixels(self) -> int:
        """Pixels of the input."""
        return self.height * self.width

    @property
    def unknowns(self) -> int:
        """Numbers in the input."""
        return self.pixels * self.channels

    @property
    def output(self) -> tuple[int, int]:
        """Height and width of the output."""
        rows, columns = (
            (size + sum(pad) - window) // stride + 1
            for size, pad, window, stride in zip(
                (self.height, self.width), self.padding, self.window, self.strides, strict=True
            )
        )
        return rows, columns

    @property
    def outputs(self) -> int:
        """Numbers in the output."""
        return self.output[0] * self.output[1] * self.filters


def geometry(layer: Layer, input_shape: tuple[int, int, int]) -> Geometry:
    """The shapes of a convolutional layer.

    Args:
      layer: of kind `conv`.
      input_shape: `(height, width, channels)` of its input.

    Returns:
      The geometry.

    Raises:
      ValueError: another kind of layer, or channels that do not fit its weight.
    """
    if layer.kind != "conv" or layer.weight is None:
        raise ValueError(f"geometry is that of a convolution, got a layer {layer.kind}.")
    tall, wide, channels, filters = layer.weight.shape
    if channels != input_shape[2]:
        raise ValueError(
            f"The layer's weight wants {channels} channels, input_shape has {input_shape[2]}."
        )
    return Geometry(*input_shape, filters, (tall, wide), layer.strides, layer.padding)


def taps(shape: Geometry) -> np.ndarray:
    """Which input pixel every output pixel reads through every tap of the kernel.

    Args:
      shape: of the convolution.

    Returns:
      `[Q, T]` indices of input pixels; -1 where the tap lies in the padding.
    """

    def along(axis: int) -> np.ndarray:
        starts = np.arange(shape.output[axis]) * shape.strides[axis] - shape.padding[axis][0]
        places = starts[:, None] + np.arange(shape.window[axis])[None]
        size = (shape.height, shape.width)[axis]
        return np.where((places >= 0) & (places < size), places, -1)

    rows, columns = along(0)[:, None, :, None], along(1)[None, :, None, :]
    pixels = np.where((rows < 0) | (columns < 0), -1, rows * shape.width + columns)
    return pixels.reshape(shape.output[0] * shape.output[1], -1)


def conv_matrix(weight: np.ndarray, shape: Geometry) -> Matrix:
    """The weight rows: the matrix of a convolution.

    Args:
      weight: `[height, width, in, out]`.
      shape: its geometry.

    Returns:
      Sparse `[Q * filters, pixels * channels]`; an output is flattened as `[Q, filters]`, an input
      as `[pixels, channels]`.
    """
    read = taps(shape)
    kernel = np.asarray(weight, np.float64).reshape(-1, shape.channels, shape.filters)
    where, tap = np.nonzero(read >= 0)
    rows = where[:, None, None] * shape.filters + np.arange(shape.filters)[None, None]
    columns = read[where, tap][:, None, None] * shape.channels + np.arange(shape.channels)[:, None]
    values = kernel[tap]
    rows, columns = np.broadcast_to(rows, values.shape), np.broadcast_to(columns, values.shape)
    size = (shape.outputs, shape.unknowns)
    entries = (values.ravel(), (rows.ravel(), columns.ravel()))
    return scipy.sparse.coo_array(entries, shape=size).tocsr()


def pool_matrix(output: tuple[int, int], window: tuple[int, int]) -> Matrix:
    """The matrix of an average pool without overlap, which crops what does not fill a window.

    Args:
      output: height and width of the map that is pooled.
      window: height and width of the pool; pools in a row are one of the product of their windows.

    Returns:
      Sparse `[P, Q]`, from the map's pixels to those behind the pool.
    """

    def mean(size: int, side: int) -> scipy.sparse.coo_array:
        kept = np.arange(size // side * side)
        places = (np.full(kept.size, 1 / side), (kept // side, kept))
        return scipy.sparse.coo_array(places, shape=(size // side, size))

    return scipy.sparse.csr_array(scipy.sparse.kron(*map(mean, output, window)))


def pooled(rows: Matrix, pool: Matrix) -> Matrix:
    """Weight rows behind an average pool.

    Args:
      rows: `[Q * filters, N]`, of the convolution.
      pool: `[P, Q]`.

    Returns:
      `[P * filters, N]`.
    """
    filters = scipy.sparse.eye_array(rows.shape[0] // pool.shape[1])
    return scipy.sparse.csr_array(scipy.sparse.kron(pool, filters, "csr") @ rows)


def gradient_block(signal: np.ndarray, shape: Geometry) -> np.ndarray:
    """The gradient rows of one input channel: `dL/dW[:, c] = B x[:, c]` for every channel `c`.

    Args:
      signal: `[Q, filters]`, the derivative of the loss by the convolution's output.
      shape: its geometry.

    Returns:
      `[T * filters, pixels]`; rows in the order of `weight[:, :, c, :]`.
    """
    read, filters = taps(shape), shape.filters
    block = np.zeros((read.shape[1], filters, shape.pixels + 1))
    for tap in range(read.shape[1]):
        # An output pixel reads each pixel once, so a tap's places differ but for the padding's.
        block[tap][:, read[:, tap]] = np.asarray(signal, np.float64).T
    return block[..., :-1].reshape(-1, shape.pixels)


def gradient_matrix(signal: np.ndarray, shape: Geometry) -> np.ndarray:
    """The gradient rows of all channels.

    Args:
      signal: `[Q, filters]`.
      shape: the convolution's geometry.

    Returns:
      `[T * channels * filters, pixels * channels]`, rows in the order of the weight.
    """
    block = gradient_block(signal, shape).reshape(-1, shape.filters, shape.pixels)
    whole = np.einsum("tfp,cd->tcfpd", block, np.eye(shape.channels))
    return whole.reshape(-1, shape.unknowns)


def numerical_rank(matrix: np.ndarray, tolerance: float = 1e-9) -> int:
    """How many singular values exceed a share of the largest.

    Args:
      matrix: `[M, N]`.
      tolerance: that share. Gaps in these systems reach from 1e-3 to 1e-15.

    Returns:
      The rank; 0 for a matrix of zeros.
    """
    values = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
    return int((values > tolerance * values.max(initial=0.0)).sum())


def phases(shape: Geometry) -> list[tuple[int, int]]:
    """Classes of pixels that the same taps read, which a stride keeps apart.

    Args:
      shape: of the convolution.

    Returns:
      For every class its number of taps and of pixels that are read.
    """
    read = taps(shape)
    down, across = shape.strides
    rows, columns = np.divmod(np.arange(read.shape[1]), shape.window[1])
    found = []
    for row, column in itertools.product(range(down), range(across)):
        mine = (rows % down == row) & (columns % across == column)
        touched = np.unique(read[:, mine])
        found.append((int(mine.sum()), int((touched >= 0).sum())))
    return found


def closed_form_rank(shape: Geometry) -> int:
    """The generic rank of weight and gradient rows together.

    In a phase with as many gradient rows as pixels the gradient decides alone; elsewhere weight rows
    help, of which the square of the number of filters repeats what gradient rows say. Exact for 97 of
    100 random small convolutions; those missed have windows nearly as large as the map.

    Args:
      shape: of the convolution.

    Returns:
      The rank; the input's size where the system determines it.
    """
    filters, found = shape.filters, phases(shape)
    full = [(t, n) for t, n in found if filters * t >= n]
    rest = [(t, n) for t, n in found if filters * t < n]
    rank = shape.channels * sum(n for _, n in full)
    if rest:
        rows = shape.outputs + shape.channels * filters * sum(t for t, _ in rest) - filters**2
        rank += min(shape.channels * sum(n for _, n in rest), rows)
    return rank
