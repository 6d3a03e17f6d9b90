"""Solitons: rows whose numbers of active samples follow the law that peeling wants."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from invjax.attacks.analytic.imprints.imprint import Imprint, check_settings, flat_range
from invjax.attacks.analytic.imprints.planting import dense_imprint
from invjax.base import Array, Bound, Model
from invjax.defenses.checks import check


def soliton_free(
    model: Model,
    input_shape: Sequence[int],
    batch_size: int,
    *,
    input_range: tuple[Bound, Bound] = (0.0, 1.0),
    sigma: float = 0.5,
    cascade: bool = True,
    max_samples: int = 128,
    tolerance: float | None = None,
) -> Imprint:
    """Biases for a cascade, without data (Shariati and Alambardar Meybodi, Soliton-Free).

    Normal weights; a row's bias is such that it is active on `degree` of the batch's samples on average,
    if inputs are uniform in their range and a row's sum about normal. Degrees follow the robust soliton
    law of LT codes.

    Args:
      model: as for `trap_weights`; fully connected for a cascade.
      input_shape: shape of one input.
      batch_size: the clients', at least 2.
      input_range: lowest and highest value of an input.
      sigma: standard deviation of the weights.
      cascade: whether to peel off what was found, by `row_scan`.
      max_samples: slots, where the batch size is not known.
      tolerance: as for `trap_weights`.

    Returns:
      The imprint, as of `trap_weights`.

    Raises:
      ValueError: a setting out of range; when planting, another kind of model.
    """
    shape = check_settings(model, input_shape, max_samples=max_samples)
    check("batch_size", batch_size, 2)
    check("sigma", sigma, 0.0, open_low=True)

    def draw(key: Array, size: int, units: int, auxiliary: Array | None) -> tuple[Array, Array]:
        del auxiliary
        weight_key, degree_key = jax.random.split(key)
        weight = sigma * jax.random.normal(weight_key, (size, units))
        low, high = flat_range(input_range, shape, weight.dtype)
        mean = ((low + high) / 2) @ weight
        std = jnp.sqrt(((high - low) ** 2 / 12) @ weight**2)
        share = draw_degrees(degree_key, units, batch_size) / batch_size
        # A row that all samples shall activate is one that half a sample is missing from.
        share = jnp.minimum(share, 1 - 0.5 / batch_size)
        return weight, -mean - std * jax.scipy.special.ndtri(1 - share)

    return dense_imprint(
        model,
        shape,
        draw,
        "soliton_free",
        informed=False,
        cascade=cascade,
        max_samples=max_samples,
        tolerance=tolerance,
    )


def soliton_data(
    model: Model,
    input_shape: Sequence[int],
    batch_size: int,
    *,
    sigma: float = 0.5,
    cascade: bool = True,
    max_samples: int = 128,
    tolerance: float | None = None,
) -> Imprint:
    """Biases for a cascade, from the server's own data (Shariati and Alambardar Meybodi, Soliton-Data).

    A row's bias lies midway between what its `degree` most active auxiliary samples, and the next,
    compute. With more or fewer auxiliary samples than `batch_size` degrees are scaled.

    Args:
      model: as for `trap_weights`; fully connected for a cascade.
      input_shape: shape of one input.
      batch_size: the clients', at least 2.
      sigma: standard deviation of the weights.
      cascade: whether to peel off what was found, by `row_scan`.
      max_samples: slots, where the batch size is not known.
      tolerance: as for `trap_weights`.

    Returns:
      The imprint, as of `trap_weights`. `plant` needs auxiliary data.

    Raises:
      ValueError: a setting out of range; when planting, another kind of model, or no data.
    """
    shape = check_settings(model, input_shape, max_samples=max_samples)
    check("batch_size", batch_size, 2)
    check("sigma", sigma, 0.0, open_low=True)

    def draw(key: Array, size: int, units: int, auxiliary: Array | None) -> tuple[Array, Array]:
        assert auxiliary is not None
        weight_key, degree_key = jax.random.split(key)
        weight = (sigma * jax.random.normal(weight_key, (size, units))).astype(auxiliary.dtype)
        values = -jnp.sort(-(auxiliary @ weight), axis=0)
        count = values.shape[0]
        rank = jnp.round(draw_degrees(degree_key, units, batch_size) * count / batch_size)
        rank = jnp.clip(rank.astype(int), 1, count)
        # Below the least value, a row that all samples activate.
        values = jnp.concatenate([values, values[-1:] - values.std(axis=0)[None]])
        above, below = (
            jnp.take_along_axis(values, index[None], axis=0)[0] for index in (rank - 1, rank)
        )
        return weight, -(above + below) / 2

    return dense_imprint(
        model,
        shape,
        draw,
        "soliton_data",
        informed=True,
        cascade=cascade,
        max_samples=max_samples,
        tolerance=tolerance,
    )


def robust_soliton(batch_size: int, spike: float = 0.05, failure: float = 0.4) -> np.ndarray:
    """The robust soliton law of degrees (Luby 2002, LT codes). Host code.

    Args:
      batch_size: largest degree `B`.
      spike: Luby's constant `c`.
      failure: Luby's `delta`, the probability of failure that is aimed at.

    Returns:
      `[B]` probabilities of the degrees 1 to B. Where `B / S` exceeds `B` the spike is at `B`, and an
      addition that would be negative (small batches) is left out.

    Raises:
      ValueError: a setting out of range.
    """
    check("batch_size", batch_size, 1)
    check("spike", spike, 0.0, open_low=True)
    check("failure", failure, 0.0, 1.0, open_low=True, open_high=True)
    degree = np.arange(1, batch_size + 1)
    ideal = np.concatenate([[1 / batch_size], 1 / (degree[1:] * (degree[1:] - 1.0))])
    ripple = spike * math.log(batch_size / failure) * math.sqrt(batch_size)
    at = min(max(round(batch_size / ripple), 1), batch_size)
    extra = np.where(degree < at, ripple / (degree * batch_size), 0.0)
    extra[at - 1] = max(ripple * math.log(ripple / failure) / batch_size, 0.0)
    law = ideal + extra
    return law / law.sum()


def draw_degrees(key: Array, units: int, batch_size: int) -> Array:
    """`[units]` degrees, floats."""
    law = jnp.asarray(robust_soliton(batch_size))
    return 1.0 + jax.random.choice(key, batch_size, (units,), p=law)
