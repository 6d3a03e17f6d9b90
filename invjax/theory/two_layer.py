"""How well a two-layer network's gradient can be inverted, in width, dimension, batch and defence.

The network is `f(x) = sum_j a_j s(w_j . x) + b` with `m` units, `a_j = 1 / m` and `w_j` standard normal,
queried on `B` samples of unit norm in `d` dimensions with a squared loss. Errors are
`sqrt(sum_i |x_i - x'_i|^2 / B)` over the best pairing (Wang, Lee and Lei 2023; Liu et al. 2024, from whose
published slides the rates are). Every function returns both sides of one row of their table:

* `upper`: what the tensor attack reaches, up to a constant and logarithms, for batches up to about
  `d^(1/4)`;
* `lower`: what no attack beats, up to a constant, where Gaussian noise of deviation `std` is added to every
  coordinate behind the defence (without any noise there is no such bound).

Constants are arguments (`Constants`), 1 by default. Measured, with the sum of `(f - y)^2 / 2` as loss,
`tanh`, `b = 3`, labels of -1 and 1, and the derivatives in `a` alone, which are what noise of equal deviation
leaves: `lower` 0.63 to 1.41 for `B = 2` and 0.75 to 1.55 for `B = 4`, `d` of 16 to 64 and `m = 2000`, by the
labels (they decide the residuals, of which 2 tells less than 4); `lower_constant` is its limit for large
`d`. `upper` 1.7 to 3.5 for moments of the derivatives in `a`, widths from 8,192 to 131,072, the largest where
the error nears 1 (`benchmarks/papers/two_layer_bounds.py`). For the bound at one batch of any model see
`cramer_rao`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from invjax.base import Array, Batch, Model, Params, PyTree
from invjax.checks import check_choice, check_number
from invjax.defenses.sensitivity import gradient_sensitivity
from invjax.models.chain import activations

Number = Any


class Setting(NamedTuple):
    """A query of a two-layer network.

    Attributes:
      batch_size: samples `B`.
      dimension: input values `d`.
      width: units `m`.
    """

    batch_size: Number
    dimension: Number
    width: Number


class Constants(NamedTuple):
    """What the rates are multiplied by.

    Attributes:
      upper: of the upper bounds.
      lower: of the lower bounds.
    """

    upper: Number = 1.0
    lower: Number = 1.0


UNIT = Constants()


class Bounds(NamedTuple):
    """Both sides of a row of the table, in input units; `None` where nothing is proven.

    Attributes:
      upper: error that the tensor attack reaches.
      lower: error that no attack beats.
    """

    upper: Number | None
    lower: Number | None


def undefended(setting: Setting, std: Number, constants: Constants = UNIT) -> Bounds:
    """No defence: `B sqrt(d / m)` and `std sqrt(d / m)`.

    Args:
      setting: the query.
      std: deviation of the noise that the lower bound assumes, in gradient units.
      constants: of the rates.

    Returns:
      Both bounds, in input units.

    Raises:
      ValueError: a size that is not positive, a negative deviation.
    """
    rate = _rate(setting, std)
    return Bounds(constants.upper * setting.batch_size * rate, constants.lower * std * rate)


def local_steps(
    setting: Setting, std: Number, num_steps: Number, constants: Constants = UNIT
) -> Bounds:
    """`K` local steps, whose sum is sent: `K B sqrt(d / m)` and `std sqrt(d / m)`.

    Args:
      setting: the query.
      std: as in `undefended`.
      num_steps: `K`.
      constants: of the rates.

    Returns:
      Both bounds.

    Raises:
      ValueError: as `undefended`, or fewer than one step.
    """
    check_number("num_steps", num_steps, 1)
    upper, lower = undefended(setting, std, constants)
    return Bounds(num_steps * upper, lower)


def gaussian_noise(setting: Setting, std: Number, constants: Constants = UNIT) -> Bounds:
    """Gaussian noise on the gradient: `(B + std) sqrt(d / m)` and `std sqrt(d / m)`.

    Args:
      setting: the query.
      std: deviation of the noise, in gradient units.
      constants: of the rates.

    Returns:
      Both bounds.

    Raises:
      ValueError: as `undefended`.
    """
    return dp_sgd(setting, std, 1.0, 0.0, constants)


def dp_sgd(
    setting: Setting,
    std: Number,
    clip_norm: Number,
    gradient_norm: Number,
    constants: Constants = UNIT,
    *,
    noise_scale_by_clip: bool = False,
) -> Bounds:
    """Clipping, then noise: as `gaussian_noise` of `std max(1, |G| / C)`.

    The gradient is divided by `max(1, |G| / C)`, so clipping alone is a change of scale and the noise
    counts for so much more.

    Args:
      setting: the query.
      std: deviation of the noise.
      clip_norm: `C`.
      gradient_norm: `|G|`, before clipping.
      constants: of the rates.
      noise_scale_by_clip: whether `std` is in units of `C`, as privacy accounting has it; the table's
        is not.

    Returns:
      Both bounds.

    Raises:
      ValueError: as `undefended`, a radius that is not positive, a negative norm.
    """
    check_number("clip_norm", clip_norm, 0.0, open_low=True)
    check_number("gradient_norm", gradient_norm, 0.0)
    rate = _rate(setting, std)
    added = std * clip_norm if noise_scale_by_clip else std
    effective = added * jnp.maximum(gradient_norm / clip_norm, 1.0)
    upper = constants.upper * (setting.batch_size + effective) * rate
    return Bounds(upper, constants.lower * effective * rate)


def dropout(setting: Setting, std: Number, rate: Number, constants: Constants = UNIT) -> Bounds:
    """Units dropped with probability `p`: `B sqrt(d / ((1 - p) m))` and `std` in place of `B`.

    Args:
      setting: the query.
      std: as in `undefended`.
      rate: `p`, in [0, 1). (Early versions of the table have the probability to keep.)
      constants: of the rates.

    Returns:
      Both bounds.

    Raises:
      ValueError: as `undefended`, or a rate out of range.
    """
    check_number("rate", rate, 0.0, 1.0, open_high=True)
    return undefended(setting._replace(width=(1 - rate) * setting.width), std, constants)


def pruning(setting: Setting, std: Number, kept: Number, constants: Constants = UNIT) -> Bounds:
    """Magnitude pruning: no upper bound is known, `std sqrt(d / ((1 - p^) m))` below.

    `1 - p^` is read as the share of the squared Jacobian that is kept (`kept_information`): the
    table leaves it to "the Jacobian". So read, it scales the inequality of the means,
    `R^2 >= std^2 B d^2 / |J kept|^2`, which holds at every batch (method `trace` of `cramer_rao`); the
    Cramér-Rao bound itself may grow by less (at half of the coordinates 1.27 times for `tanh` where
    this says 1.57).

    Args:
      setting: the query.
      std: as in `undefended`.
      kept: `1 - p^`, in (0, 1].
      constants: of the rates.

    Returns:
      `None`, and the lower bound. The tensor attack on a pruned gradient keeps an error that does not
      vanish with the width.

    Raises:
      ValueError: as `undefended`, or a share out of range.
    """
    check_number("kept", kept, 0.0, 1.0, open_low=True)
    lower = undefended(setting._replace(width=kept * setting.width), std, constants).lower
    return Bounds(None, lower)


def secure_aggregation(
    setting: Setting, num_clients: Number, constants: Constants = UNIT
) -> Bounds:
    """The sum over `K` clients alone is seen: `K sqrt(d / m)`, and no lower bound is published.

    Args:
      setting: the query; its batch size does not enter.
      num_clients: `K`.
      constants: of the rates.

    Returns:
      The upper bound, and `None`.

    Raises:
      ValueError: a size that is not positive, or fewer than one client.
    """
    check_number("num_clients", num_clients, 1)
    return Bounds(constants.upper * num_clients * _rate(setting), None)


def kept_information(
    model: Model,
    params: Params,
    batch: Batch,
    kept: PyTree,
    *,
    num_probes: int | None = None,
    key: Array | None = None,
) -> Array:
    """`|J_kept|_F^2 / |J|_F^2`: the `1 - p^` of pruning.

    Args:
      model: the model.
      params: its parameters.
      batch: inputs `[B, ...]`, labels.
      kept: tree of booleans like the parameters, false where the gradient was zeroed.
      num_probes: as in `defenses.sensitivity.gradient_sensitivity`.
      key: as there.

    Returns:
      A scalar in [0, 1]. `p^`, its difference from 1, may be far above the pruned share, as
      magnitude pruning keeps the large coordinates of saturated units, which hardly move with the
      inputs.

    Raises:
      ValueError: a mask unlike the parameters, fewer than one probe.
    """
    if jax.tree.map(jnp.shape, kept) != jax.tree.map(jnp.shape, params):
        raise ValueError("kept must be a tree of booleans with the shapes of params.")
    found = gradient_sensitivity(model, params, batch, num_probes=num_probes, key=key)
    left = jax.tree.map(lambda leaf, mask: jnp.sum(jnp.where(mask, leaf, 0.0)), found.leakage, kept)
    total = jax.tree.map(jnp.sum, found.leakage)
    return jnp.asarray(optax.tree.sum(left)) / jnp.asarray(optax.tree.sum(total))


def lower_constant(activation: str, residuals: Array, num_nodes: int = 200) -> Array:
    """Limit of the Cramér-Rao constant `R_L / (std sqrt(d / m))` for many dimensions.

    For samples of unit norm at right angles and the derivatives in `a`, `J^T J` tends to
    `m diag(r) ((e - c^2) I + c^2 1 1^T) diag(r)` on each of the `d` dimensions, with `e = E s'(Z)^2`,
    `c = E s'(Z)`, so that the constant squared is
    `mean(1 / r_i^2) (1 / (e - c^2)) (1 - c^2 / (e - c^2 + B c^2))`. Without the terms between samples it
    would be `1 / (r sqrt(e))`, too small by half for `tanh`.

    Args:
      activation: `s`, by name.
      residuals: `[B]`, `r_i = f(x_i) - y_i`; where one is zero the gradient is silent on its sample.
      num_nodes: of the Gauss-Hermite quadrature.

    Returns:
      A scalar, in input units over gradient units; infinite for a residual of zero, and (up to
      rounding, very large) for a linear activation and two samples or more.

    Raises:
      ValueError: an unknown activation.
    """
    check_choice("activation", activation, tuple(activations))
    nodes, weights = np.polynomial.hermite_e.hermegauss(num_nodes)
    residuals = jnp.asarray(residuals)
    residuals = residuals.astype(jnp.promote_types(residuals.dtype, jnp.float32))
    slope = jax.vmap(jax.grad(activations[activation]))(jnp.asarray(nodes, residuals.dtype))
    weights = jnp.asarray(weights / weights.sum(), residuals.dtype)
    mean = weights @ slope
    # As a variance, since a difference of two moments may round to below zero.
    own = weights @ jnp.square(slope - mean)
    common = jnp.square(mean)
    # One sample shares nothing: a linear activation's 0 / 0 must not enter.
    shared = 0.0 if residuals.size == 1 else (residuals.size - 1) * common / own
    return jnp.sqrt(jnp.mean(residuals**-2) * (1 + shared) / (own + residuals.size * common))


def _rate(setting: Setting, std: Number = 0.0) -> Number:
    for name, value in setting._asdict().items():
        check_number(name, value, 0.0, open_low=True)
    check_number("std", std, 0.0)
    return (setting.dimension / setting.width) ** 0.5
