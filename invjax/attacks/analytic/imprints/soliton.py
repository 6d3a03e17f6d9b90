"""Solitons: rows whose numbers of active samples follow the law that peeling wants."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from invjax.attacks.analytic.imprints.imprint import Imprint, auxiliary_inputs
from invjax.attacks.analytic.imprints.planting import dense_imprint
from invjax.base import Array, Batch, Bound, Model
from invjax.checks import check_count, check_number
from invjax.ranges import check_range, flat_bounds


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
    law of LT codes. Departure: a row that all samples shall activate would need an infinite bias; its
    share of active samples is half a sample less.

    Args:
      model: as for `trap_weights`; fully connected for a cascade.
      input_shape: shape of one input.
      batch_size: the clients', at least 2.
      input_range: lowest and highest value of an input, each one number or one per channel.
      sigma: standard deviation of the weights.
      cascade: as for `trap_weights`.
      max_samples: slots, where the batch size is not known.
      tolerance: as for `trap_weights`.

    Returns:
      The imprint, as of `trap_weights`.

    Raises:
      ValueError: as `trap_weights`.
    """
    check_count("batch_size", batch_size, 2)
    check_number("sigma", sigma, 0.0, open_low=True)
    check_range(input_range)

    def draw(
        key: Array, shape: tuple[int, ...], units: int, auxiliary: Batch | None
    ) -> tuple[Array, Array]:
        del auxiliary
        weight_key, degree_key = jax.random.split(key)
        weight = sigma * jax.random.normal(weight_key, (math.prod(shape), units))
        low, high = flat_bounds(input_range, shape, weight.dtype)
        mean = ((low + high) / 2) @ weight
        std = jnp.sqrt(((high - low) ** 2 / 12) @ weight**2)
        share = draw_degrees(degree_key, units, batch_size) / batch_size
        share = jnp.minimum(share, 1 - 0.5 / batch_size)
        return weight, -mean - std * jax.scipy.special.ndtri(1 - share)

    return dense_imprint(
        model,
        input_shape,
        draw,
        "soliton_free",
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

    A row's bias is minus the midpoint between its `degree`-th and its next largest value `w x` over the
    auxiliary samples. With more or fewer of them than `batch_size` degrees are scaled. Departure: where
    all shall activate a row there is no next value, and one standard deviation below the least is taken.

    Args:
      model: as for `trap_weights`; fully connected for a cascade.
      input_shape: shape of one input.
      batch_size: the clients', at least 2.
      sigma: standard deviation of the weights.
      cascade: as for `trap_weights`.
      max_samples: slots, where the batch size is not known.
      tolerance: as for `trap_weights`.

    Returns:
      The imprint, as of `trap_weights`. `plant` needs auxiliary data, two samples or more.

    Raises:
      ValueError: as `trap_weights`; when planting, too few data.
      TypeError: when planting, auxiliary inputs that are not floats.
    """
    check_count("batch_size", batch_size, 2)
    check_number("sigma", sigma, 0.0, open_low=True)

    def draw(
        key: Array, shape: tuple[int, ...], units: int, auxiliary: Batch | None
    ) -> tuple[Array, Array]:
        data = auxiliary_inputs(auxiliary, shape, "soliton_data")
        count, size = data.shape
        weight_key, degree_key = jax.random.split(key)
        weight = (sigma * jax.random.normal(weight_key, (size, units))).astype(data.dtype)
        values = jnp.sort(data @ weight, axis=0, descending=True)
        rank = jnp.round(draw_degrees(degree_key, units, batch_size) * count / batch_size)
        rank = jnp.clip(rank.astype(int), 1, count)
        values = jnp.concatenate([values, values[-1:] - values.std(axis=0)[None]])
        above, below = (
            jnp.take_along_axis(values, index[None], axis=0)[0] for index in (rank - 1, rank)
        )
        return weight, -(above + below) / 2

    return dense_imprint(
        model,
        input_shape,
        draw,
        "soliton_data",
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
    check_count("batch_size", batch_size, 1)
    check_number("spike", spike, 0.0, open_low=True)
    check_number("failure", failure, 0.0, 1.0, open_low=True, open_high=True)
    degree = np.arange(1, batch_size + 1)
    ideal = np.concatenate([[1 / batch_size], 1 / (degree[1:] * (degree[1:] - 1.0))])
    ripple = spike * math.log(batch_size / failure) * math.sqrt(batch_size)
    at = min(max(round(batch_size / ripple), 1), batch_size)
    extra = np.where(degree < at, ripple / (degree * batch_size), 0.0)
    extra[at - 1] = max(ripple * math.log(ripple / failure) / batch_size, 0.0)
    law = ideal + extra
    return law / law.sum()


def draw_degrees(key: Array, units: int, batch_size: int) -> Array:
    """`[units]` degrees of the robust soliton law, whole numbers as floats."""
    law = jnp.asarray(robust_soliton(batch_size))
    return 1.0 + jax.random.choice(key, batch_size, (units,), p=law)
