"""Robbing the Fed: a layer in front of the model that sorts samples into bins of one measurement."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from invjax.attacks.analytic.imprints.imprint import (
    Imprint,
    Rows,
    auxiliary_inputs,
    check_settings,
    implied_bias,
    read_rows,
    row_attack,
)
from invjax.base import Array, Batch, Bound, Model, Observation, Params, Reconstruction
from invjax.checks import check_choice, check_number
from invjax.models.losses import cross_entropy
from invjax.observe import per_step_gradient
from invjax.ranges import check_range, flat_bounds

Variant = Literal["plain", "sparse", "one_shot"]
Measurement = Literal["mean", "dct", "random"]


def robbing_the_fed(
    model: Model,
    input_shape: Sequence[int],
    bins: int,
    variant: Variant = "plain",
    measurement: Measurement = "mean",
    *,
    input_range: tuple[Bound, Bound] = (0.0, 1.0),
    location: float | None = None,
    scale: float | None = None,
    mode: int = 32,
    target: float = 0.5,
    max_samples: int = 128,
    tolerance: float | None = None,
) -> Imprint:
    """A block in front of any model that leaks every sample which is alone in its bin (Fowl et al. 2022).

    All units of the block's first layer compute the same measurement of the input, less a cut each;
    its second layer treats all units alike. So a unit's gradient sums, over the samples above its cut,
    the same derivative of each, and the difference of two neighbours is that of the samples in
    between. One sample there is read exactly, by the bias trick.

    The cuts are quantiles of the measurement's law: Laplace for `dct`, normal otherwise, of the given
    location and scale, or of those of the auxiliary data. Departures from the authors' code: the top
    bin is read (it is the last unit alone), and no row below the first cut is returned as an input.
    The first cut lies just below what the input range admits, rather than far below, and what
    the block hands on is scaled into the input range: large values would saturate the softmax, whose
    gradient then vanishes and with it samples.

    A cascade cannot help: a sample sits in one bin only.

    Args:
      model: any model of the inputs, with softmax logits.
      input_shape: shape of one input.
      bins: bins, units of the block. For `one_shot`, the bin holds one `bins`-th of the law.
      variant: `plain`; `sparse`: units that saturate at the next cut (a hardtanh), so that each row is
        a bin by itself, to which noise is added once and not twice; or `one_shot`: two units around
        one bin, for one sample out of a large batch.
      measurement: `mean` of the input, `dct`, one of its cosine coefficients, or `random`, a normal
        projection.
      input_range: lowest and highest value of an input, each one number or one per channel.
      location: mean of the measurement over the data; of the auxiliary data where `None`.
      scale: its standard deviation; of the auxiliary data where `None`.
      mode: which coefficient of the flattened input `dct` takes, from 1.
      target: the quantile that `one_shot` aims at.
      max_samples: slots, where the batch size is not known.
      tolerance: largest relative deviation of a certificate; by default 1e-6 for gradients of double
        precision and 1e-4 for single.

    Returns:
      The imprint. Parameters are a dict of `rows`, `back` and `base`. A sample alone in its bin is
      found.

    Raises:
      ValueError: a setting out of range, an unknown variant or measurement, a location without a scale;
        when planting, neither these nor two auxiliary samples; at the attack's use, inputs of another
        shape, or several local steps.
      TypeError: when planting, auxiliary inputs that are not floats.
    """
    shape = check_settings(model, input_shape, tolerance, bins=bins, max_samples=max_samples)
    check_choice("variant", variant, get_args(Variant))
    check_choice("measurement", measurement, get_args(Measurement))
    check_number("target", target, 0.0, 1.0, open_low=True, open_high=True)
    check_range(input_range)
    check_law(location, scale)
    size = math.prod(shape)
    if measurement == "dct" and not 1 <= mode < size:
        raise ValueError(f"mode must lie in [1, {size - 1}], got {mode}.")
    sparse = variant == "sparse"
    units = 2 if variant == "one_shot" else bins

    def plant(key: Array, params: Params, auxiliary: Batch | None = None) -> Params:
        measure_key, back_key = jax.random.split(key)
        dtype = jnp.result_type(*jax.tree.leaves(params))
        direction = measuring(measure_key, measurement, size, mode).astype(dtype)
        law = measured_law(location, scale, direction, auxiliary, shape, "robbing_the_fed")
        shares = jnp.arange(1, bins, dtype=dtype) / bins
        if variant == "one_shot":
            shares = jnp.clip(target + jnp.asarray([-0.5, 0.5], dtype) / bins, 1e-6, 1 - 1e-6)
        cuts = quantile(measurement, shares, *law)
        low, high = flat_bounds(input_range, shape, dtype)
        least = jnp.minimum(direction * low, direction * high).sum()
        most = jnp.maximum(direction * low, direction * high).sum()
        if variant != "one_shot":
            cuts = close_below(cuts, least)
        rows, reach = binning_layer(direction, cuts, most, sparse)
        return {
            "rows": rows,
            "back": back_layer(back_key, units, low, high, reach),
            "base": params,
        }

    block = block_model(model, shape, units, sparse)

    def invert(observation: Observation) -> Reconstruction:
        params, facts = observation.params, observation.facts
        gradient = per_step_gradient(observation)["rows"]
        weight, bias = gradient["kernel"], gradient["bias"]
        number = 1 if variant == "one_shot" else units
        directions = bin_directions(units, sparse, bias.dtype)[:number]

        def implied(inputs: Array) -> Array:
            return implied_bias(
                lambda values: block_tail(model, params, values, shape, sparse),
                inputs @ params["rows"]["kernel"] + params["rows"]["bias"][None],
                directions,
            )

        rows = Rows(
            weight @ directions.T,
            directions @ bias,
            # Of all units, because differences round as their terms do.
            8 * jnp.finfo(bias.dtype).eps * jnp.abs(bias).max(),
            *flat_bounds(facts.input_range, shape, bias.dtype),
        )
        return read_rows(rows, implied, facts, max_samples, tolerance)

    return Imprint(block, plant, row_attack(block, invert, shape, "robbing_the_fed"))


def check_law(location: float | None, scale: float | None) -> None:
    """Refuse half a law of a measurement, or a spread that is none."""
    if (location is None) != (scale is None):
        raise ValueError(f"Give both or none of location and scale, got {location} and {scale}.")
    if location is not None:
        check_number("location", location, -math.inf)
    if scale is not None:
        check_number("scale", scale, 0.0, open_low=True)


def measured_law(
    location: float | None,
    scale: float | None,
    direction: Array,
    auxiliary: Batch | None,
    shape: tuple[int, ...],
    name: str,
) -> tuple[Array | float, Array | float]:
    """Mean and standard deviation of a measurement: those given, or else those of auxiliary data."""
    if location is not None and scale is not None:
        return location, scale
    values = auxiliary_inputs(auxiliary, shape, name).astype(direction.dtype) @ direction
    return values.mean(), values.std()


def measuring(key: Array, measurement: str, size: int, mode: int) -> Array:
    """`[d]`, the weights of a measurement."""
    if measurement == "mean":
        return jnp.full(size, 1 / size)
    if measurement == "dct":
        return math.sqrt(2 / size) * jnp.cos(math.pi / size * mode * (jnp.arange(size) + 0.5))
    return jax.random.normal(key, (size,)) / math.sqrt(size)


def quantile(measurement: str, shares: Array, mean: Array | float, std: Array | float) -> Array:
    """Quantiles of the law of a measurement."""
    if measurement != "dct":
        return mean + std * jax.scipy.special.ndtri(shares)
    centred = shares - 0.5
    laplace = -jnp.sign(centred) * jnp.log1p(-2 * jnp.abs(centred))
    return mean + std / math.sqrt(2) * laplace


def close_below(cuts: Array, least: Array) -> Array:
    """A first cut just below all others and what the measurement can be: no sample is under it."""
    first = jnp.minimum(least, cuts.min(initial=jnp.inf))
    return jnp.concatenate([(first - 1e-3 * (1 + jnp.abs(first)))[None], cuts])


def binning_layer(
    direction: Array, cuts: Array, most: Array, sparse: bool
) -> tuple[dict[str, Array], Array]:
    """The first layer, and the largest sum that its units can reach."""
    if not sparse:
        reach = jnp.maximum(most - cuts, 0).sum()
        kernel = jnp.broadcast_to(direction[:, None], (direction.size, cuts.size))
        return {"kernel": kernel, "bias": -cuts}, jnp.where(reach > 0, reach, 1.0)
    top = jnp.maximum(most, cuts[-1])
    width = jnp.diff(cuts, append=(top + 1e-3 * (1 + jnp.abs(top)))[None])
    kernel = direction[:, None] / width[None]
    return {"kernel": kernel, "bias": -cuts / width}, jnp.asarray(cuts.size, cuts.dtype)


def back_layer(key: Array, units: int, low: Array, high: Array, reach: Array) -> dict[str, Array]:
    """The second layer: the same row for all units, into the input range."""
    row = (high - low) * jax.random.uniform(key, low.shape, low.dtype) / reach
    return {"kernel": jnp.broadcast_to(row[None], (units, row.size)), "bias": low}


def bin_directions(units: int, sparse: bool, dtype) -> Array:
    """`[bins, units]`: a bin is its unit less the next one, or its unit where they saturate."""
    eye = jnp.eye(units, dtype=dtype)
    return eye if sparse else eye - jnp.eye(units, k=1, dtype=dtype)


def block_tail(
    model: Model, params: Params, values: Array, shape: tuple[int, ...], sparse: bool
) -> Array:
    """Logits, from what the first layer of the block computes."""
    values = jnp.clip(values, 0, 1) if sparse else jax.nn.relu(values)
    back = values @ params["back"]["kernel"] + params["back"]["bias"][None]
    return model.apply(params["base"], back.reshape((-1, *shape)))


def block_model(model: Model, shape: tuple[int, ...], units: int, sparse: bool) -> Model:
    """The model behind the block; as initialised, the block is two ordinary dense layers."""
    size = math.prod(shape)

    def init(key: Array, input_shape: Sequence[int]) -> Params:
        rows_key, back_key, base_key = jax.random.split(key, 3)
        return {
            "rows": dense(rows_key, size, units),
            "back": dense(back_key, units, size),
            "base": model.init(base_key, input_shape),
        }

    def apply(params: Params, inputs: Array) -> Array:
        flat = inputs.reshape(inputs.shape[0], -1)
        values = flat @ params["rows"]["kernel"] + params["rows"]["bias"][None]
        return block_tail(model, params, values, shape, sparse)

    return fronted(model, init, apply, "imprint")


def fronted(model: Model, init: Callable, apply: Callable, name: str) -> Model:
    """A model with something in front of it: no layer view, no statistics."""
    return Model(
        init=init,
        apply=apply,
        loss=cross_entropy(apply),
        num_classes=model.num_classes,
        name=f"{name}({model.name})",
    )


def dense(key: Array, fan_in: int, units: int) -> dict[str, Array]:
    """An ordinary dense layer."""
    draw = jax.nn.initializers.lecun_normal()
    return {"kernel": draw(key, (fan_in, units)), "bias": jnp.zeros(units)}
