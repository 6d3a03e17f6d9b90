"""From tensor components to inputs and loss derivatives: signs, norms, labels."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from invjax.attacks.analytic.tensor.decompose import component_weights
from invjax.attacks.analytic.tensor.hermite import hermite_coefficients
from invjax.attacks.analytic.tensor.moments import Subspace
from invjax.attacks.analytic.tensor.polish import Candidate
from invjax.base import Array

_FACTORIALS = np.array([1.0, 1.0, 2.0, 6.0, 24.0])


class Orders(NamedTuple):
    """What an activation says of every order, on a grid of norms.

    Attributes:
      used: orders whose coefficient does not vanish.
      scales: `[S]` norms.
      values: `[S, len(used)]`, `E[f(sZ) He_p(Z)] / sqrt(p!)`.
    """

    used: tuple[int, ...]
    scales: np.ndarray
    values: np.ndarray


def orders_of(activation: str, largest: int) -> Orders:
    """The orders from 1 to `largest` at which an activation shows itself.

    Args:
      activation: a name of `hermite.ACTIVATIONS`.
      largest: the largest order.

    Returns:
      The orders and their coefficients on a grid of norms from 0.05 to 30: what is outside is taken for
      the nearer end.
    """
    scales = np.geomspace(0.05, 30.0, 256)
    table = hermite_coefficients(activation, scales) / np.sqrt(_FACTORIALS)
    used = tuple(p for p in range(1, largest + 1) if np.abs(table[:, p]).max() > 1e-6)
    return Orders(used, scales, table[:, list(used)])


def weights_by_order(tensors: dict[int, Array], directions: Array, used: tuple[int, ...]) -> Array:
    """Every order's weights of given directions, on the scale of normalised polynomials.

    Args:
      tensors: by order, `[k, ..., k, C]`.
      directions: `[k, k]`, unit rows.
      used: the orders.

    Returns:
      `[len(used), k, C]`.
    """
    return jnp.stack(
        [component_weights(tensors[p], directions) / _FACTORIALS[p] ** 0.5 for p in used]
    )


def known_norms(space: Subspace, directions: Array, norm: float) -> Array:
    """Norms of coordinates, `[k]`, along directions `[k, k]` (unit rows), of inputs of one norm."""
    return norm / jnp.linalg.norm(space.inputs(directions), axis=1)


def signals_at(orders: Orders, weights: Array, scales: Array) -> tuple[Array, Array]:
    """The loss derivatives for both signs of every direction, at given norms.

    Args:
      orders: the activation's orders.
      weights: `[P, k, C]`, of `weights_by_order`.
      scales: `[k]` norms.

    Returns:
      Signals `[2, k, C]` of the direction as it is and turned (least squares over the orders), and
      `[2, k]` how much of the weights they leave unexplained, a share of their squares.
    """
    at = jnp.log(scales)
    grid = jnp.log(jnp.asarray(orders.scales, scales.dtype))
    table = jnp.asarray(orders.values, scales.dtype)
    values = jax.vmap(lambda column: jnp.interp(at, grid, column), 1)(table)
    return _fit_signals(values, weights, orders.used)


def _fit_signals(values: Array, weights: Array, used: tuple[int, ...]) -> tuple[Array, Array]:
    signs = jnp.asarray([[1.0, (-1.0) ** p] for p in used], weights.dtype)
    power = jnp.maximum((values**2).sum(axis=0), 1e-30)
    along = jnp.einsum("pe,pk,pkc->ekc", signs, values, weights)
    total = jnp.maximum((weights**2).sum(axis=(0, 2)), 1e-30)
    explained = (along**2).sum(axis=2) / power[None]
    return along / power[None, :, None], 1 - explained / total[None]


def fitted_norms(orders: Orders, weights: Array) -> Array:
    """The norms at which the orders agree best.

    Args:
      orders: the activation's orders, at least two of them in different proportion.
      weights: `[P, k, C]`.

    Returns:
      `[k]`.
    """
    table = jnp.asarray(orders.values, weights.dtype)

    def misfit(values: Array) -> Array:
        spread = jnp.broadcast_to(values[:, None], weights.shape[:2])
        return _fit_signals(spread, weights, orders.used)[1].min(axis=0)

    misfits = jax.vmap(misfit)(table)
    return jnp.asarray(orders.scales, weights.dtype)[jnp.argmin(misfits, axis=0)]


def choose_signs(
    signals: Array, misfits: Array, constant: Array | None, *, odd: bool
) -> tuple[Array, Array]:
    """Which of both signs of a direction is right.

    With more than two outputs the derivative by the logits has one negative entry, and it is the
    largest. With fewer the constant input decides, or the orders of both parities; of an odd activation
    only one parity is seen, and residuals are taken to be positive, as the bias trick makes them.

    Args:
      signals: `[2, k, C]`.
      misfits: `[2, k]`.
      constant: `[k]`, the entry of every direction that a hidden bias makes 1, where there is one.
      odd: whether the activation is odd, but for a constant.

    Returns:
      `[k]` signs and `[k, C]` signals.
    """
    if signals.shape[2] > 2:
        turned = wrong_sign(signals[0])
    elif constant is not None:
        turned = constant < 0
    elif odd:
        turned = wrong_sign(signals[0])
    else:
        turned = misfits[1] < misfits[0]
    picked = jnp.where(turned[:, None], signals[1], signals[0])
    return jnp.where(turned, -1.0, 1.0).astype(signals.dtype), picked


def wrong_sign(signals: Array) -> Array:
    """Whether loss derivatives look negated.

    Args:
      signals: `[k, C]`.

    Returns:
      `[k]`: with one output that it is negative, with several that the largest is positive; of two it
      is rounding that says which is larger.
    """
    lead = signals.max(axis=1) + signals.min(axis=1)
    return lead > 0 if signals.shape[1] > 1 else lead < 0


def tells_sign(signals: Array, share: float) -> Array:
    """Whether loss derivatives by several logits tell their sign.

    Args:
      signals: `[k, C]`.
      share: relative error of the signals.

    Returns:
      `[k]`: that the largest stands out by more than the error. Of two it never does, for they are the
      negatives of each other.
    """
    largest = jnp.abs(signals).max(axis=1)
    lead = jnp.abs(signals.max(axis=1) + signals.min(axis=1))
    return (lead > share * largest) & (signals.shape[1] > 2)


def candidate_of(
    space: Subspace, directions: Array, scales: Array, signs: Array, signals: Array
) -> Candidate:
    """Samples at directions `[k, k]` (unit rows), `[k]` norms and `[k]` signs."""
    return Candidate(space.inputs(directions) * (scales * signs)[:, None], signals)
