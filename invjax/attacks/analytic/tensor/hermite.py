"""Hermite polynomials of Gaussian weights: coefficients of an activation, features, tensors."""

import functools
import itertools
import math
from collections.abc import Callable
from concurrent import futures
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from invjax.base import Array
from invjax.models.chain import activations

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    **activations,
    "square": lambda x: x**2,
    "square_cube": lambda x: x**2 + x**3,
}
"""Activations by name: those of chain models, and the polynomials of Wang et al. 2023."""


class Basis(NamedTuple):
    """Products of normalised Hermite polynomials, all up to a total degree.

    Attributes:
      coordinates: `[F, D]`, the coordinates that a product reads.
      degrees: `[F, D]`, the degree of each; 0 in unused places.
    """

    coordinates: np.ndarray
    degrees: np.ndarray


def hermite_coefficients(activation: str, scale=1.0) -> np.ndarray:
    """`E[f(s Z) He_p(Z)]` for a standard normal `Z`, orders 0 to 4; at `s = 1` it is `E[f^(p)(Z)]`.

    By the trapezoidal rule, which converges exponentially for a smooth activation, with a node at the
    kink of the others. (Wang, Lee and Lei 2023 write `E[f^(p)(sZ)]`; divide by `s^p`.)

    Args:
      activation: a name of `ACTIVATIONS`.
      scale: `s`, a number or `[S]`.

    Returns:
      `[..., 5]`, float64.

    Raises:
      ValueError: an unknown activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}.")
    nodes = np.linspace(-12.0, 12.0, 6001)
    weights = np.exp(-(nodes**2) / 2) * (nodes[1] - nodes[0]) / math.sqrt(2 * math.pi)
    table = np.stack([np.polynomial.hermite_e.hermeval(nodes, row) for row in np.eye(5)], axis=1)
    arguments = np.asarray(scale, np.float64)[..., None] * nodes

    def evaluate() -> np.ndarray:
        with jax.enable_x64(True):
            return np.asarray(ACTIVATIONS[activation](jnp.asarray(arguments)))

    # A thread of its own, because inside a caller's jit or vmap these would be traced.
    with futures.ThreadPoolExecutor(1) as other:
        values = other.submit(evaluate).result()
    return (values * weights) @ table


def is_homogeneous(activation: str) -> bool:
    """Whether `f(c x) = c f(x)` for `c > 0`, as for ReLU: the gradient then hides an input's norm."""
    one, two = hermite_coefficients(activation, [1.0, 2.0])
    return bool(np.allclose(2 * one, two, atol=1e-5))


def is_odd(activation: str) -> bool:
    """Whether `f(-x) = -f(x)`: the gradient is then the same at `-x` with negated derivatives."""
    return not np.any(np.abs(hermite_coefficients(activation)[::2]) > 1e-6)


def leading_order(activation: str) -> int:
    """The order of the tensor that tells the samples apart: 3, or 4 where the third vanishes.

    Args:
      activation: a name of `ACTIVATIONS`.

    Returns:
      3 or 4.

    Raises:
      ValueError: orders 3 and 4 vanish (linear, quadratic): a gradient then reveals no more than sums.
    """
    for order in (3, 4):
        if abs(hermite_coefficients(activation)[order]) > 1e-4:
            return order
    raise ValueError(
        f"The activation {activation!r} has no Hermite coefficient of order 3 or 4: a gradient reveals "
        "only sums over the samples (Wang et al. 2023)."
    )


@functools.cache
def basis(size: int, degree: int) -> Basis:
    """The products of a total degree of at most `degree`, in graded order.

    Args:
      size: number of coordinates.
      degree: largest total degree.

    Returns:
      The basis; `F = binom(size + degree, degree)`.
    """
    rows = []
    for total in range(degree + 1):
        for chosen in itertools.combinations_with_replacement(range(size), total):
            pairs = [(axis, chosen.count(axis)) for axis in sorted(set(chosen))]
            rows.append(pairs + [(0, 0)] * (degree - len(pairs)))
    table = np.array(rows, np.int32).reshape(len(rows), degree, 2)
    return Basis(table[..., 0], table[..., 1])


def features(points: Array, degree: int) -> Array:
    """Normalised multivariate Hermite polynomials, orthonormal under a standard normal law.

    Args:
      points: `[m, k]`.
      degree: largest total degree.

    Returns:
      `[m, F]`, in the order of `basis`.
    """
    table = [jnp.ones_like(points), points]
    for order in range(1, degree):
        table.append(points * table[order] - order * table[order - 1])
    normal = jnp.stack([v / math.sqrt(math.factorial(n)) for n, v in enumerate(table)], axis=1)
    products = basis(points.shape[1], degree)
    found = jnp.ones((points.shape[0], len(products.degrees)), points.dtype)
    for place in range(degree):
        found *= normal[:, products.degrees[:, place], products.coordinates[:, place]]
    return found


@functools.cache
def _tensor_index(size: int, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Where in the basis an entry of a symmetric tensor stands, and its factor."""
    before = math.comb(size + order - 1, order - 1) if order else 0
    chosen = itertools.combinations_with_replacement(range(size), order)
    position = {entry: before + index for index, entry in enumerate(chosen)}
    entries = [tuple(sorted(entry)) for entry in itertools.product(range(size), repeat=order)]
    factors = [
        math.sqrt(math.prod(math.factorial(entry.count(axis)) for axis in set(entry)))
        for entry in entries
    ]
    return np.array([position[entry] for entry in entries], np.int32), np.array(factors)


def tensor_of(coefficients: Array, size: int, order: int) -> Array:
    """The tensor `E[g H_p]` from the coefficients of `g` on the normalised products.

    Args:
      coefficients: `[F, ...]`, in the order of `basis`.
      size: number of coordinates `k`.
      order: `p`.

    Returns:
      `[k, ..., k, ...]` with `p` axes of length `k` in front.
    """
    index, factor = _tensor_index(size, order)
    rest = coefficients.shape[1:]
    scaled = coefficients[index] * factor.astype(coefficients.dtype).reshape(
        (-1,) + (1,) * len(rest)
    )
    return scaled.reshape((size,) * order + rest)
