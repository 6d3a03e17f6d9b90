"""LOKI: every client's samples keep to columns of their own, so an aggregate does not mix clients."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from invjax.attacks.analytic.imprints.binning import (
    back_layer,
    bin_directions,
    binning_layer,
    block_tail,
    check_law,
    close_below,
    dense,
    fronted,
    measured_law,
    quantile,
)
from invjax.attacks.analytic.imprints.imprint import (
    Imprint,
    Inverted,
    Rows,
    check_settings,
    exact_tolerance,
    implied_bias,
    invert_rows,
    row_attack,
)
from invjax.base import Array, Batch, Model, Observation, Params, Reconstruction
from invjax.checks import check_number
from invjax.observe import per_step_gradient
from invjax.ranges import flat_bounds


class _Layout(NamedTuple):
    """The layers in front of the model: `split` copies an image, `rows` bin its brightness.

    Attributes:
      shape: of an image.
      clients: blocks of channels.
      bins: of every block.
      local_steps: whether units saturate, so that a row is a bin by itself.
      kernel_scale: of `split`; the weights of `rows` are divided by it.
    """

    shape: tuple[int, ...]
    clients: int
    bins: int
    local_steps: bool
    kernel_scale: float


def loki(
    model: Model,
    input_shape: Sequence[int],
    clients: int,
    bins: int,
    *,
    local_steps: bool = False,
    location: float | None = None,
    scale: float | None = None,
    peak: float = 1.0,
    kernel_scale: float = 10.0,
    max_samples: int = 32,
    tolerance: float | None = None,
) -> Imprint:
    """Binning that survives the aggregation over clients (Zhao et al. 2024, LOKI).

    A convolution comes first, whose channels are split among the clients: client `c` is sent kernels
    that copy its image into the channels of block `c` and leave the others at zero. Behind it is a
    layer that bins by mean brightness, as in `robbing_the_fed`. In the sum over clients the rows of its
    weight gradient that belong to block `c` are of client `c` alone. The bias gradient is not, so a
    candidate's scale comes from the largest value of an image, which is taken to be `peak`.

    Departures: the convolution is of one pixel (theirs is larger, with all other taps at zero), and
    single-step gradients carry a certificate besides.

    With `kernel_scale` `s` the kernels are `s` and the binning weights `1/s` times as large, so that
    local training moves the kernels less, relative to what passes through them, but the binning weights
    more. On digits, four steps of SGD at 0.01 keep the recall of one step with 10, and at 0.1 with 100.

    Args:
      model: any model of the images, with softmax logits.
      input_shape: height, width, channels.
      clients: clients in the aggregate.
      bins: bins, shared by all clients; about four times the images of one client.
      local_steps: whether the clients train for several steps (FedAvg): units are hardtanh, whose
        row is a bin by itself. Otherwise ReLU and differences of neighbours.
      location: mean brightness of the data; of the auxiliary data where `None`.
      scale: standard deviation of the brightness; of the auxiliary data where `None`.
      peak: largest value of every image; images run from 0 to 1.
      kernel_scale: of the kernels.
      max_samples: slots of a client, where the batch size is not known.
      tolerance: largest relative deviation of a certificate; by default 1e-6 for gradients of double
        precision and 1e-4 for single.

    Returns:
      The imprint. `plant` returns parameters with a leading axis of clients, each client's own along
      it: `jax.vmap` `observe` over them, and `aggregate` what comes out. Slots are client by client.
      `found` is false for an image that does not reach `peak`. With `local_steps` it says that a
      candidate lies in the range and that its brightness fits its bin: a mixture of two images of a
      client in one bin may pass, and labels are -1. The objective is the mean of the clients';
      `rows` and `certified` are `[clients]`.

    Raises:
      ValueError: a setting out of range, a location without a scale, inputs that are no images; when
        planting, neither these nor two auxiliary samples; at the attack's use, inputs of another
        shape, a batch size that the clients do not divide, or several local steps of a model without
        hardtanh.
      TypeError: when planting, auxiliary inputs that are not floats.
    """
    shape = check_settings(
        model, input_shape, tolerance, clients=clients, bins=bins, max_samples=max_samples
    )
    if len(shape) != 3:
        raise ValueError(f"input_shape must be (height, width, channels), got {shape}.")
    check_law(location, scale)
    check_number("peak", peak, 0.0, open_low=True)
    check_number("kernel_scale", kernel_scale, 0.0, open_low=True)
    layout = _Layout(shape, clients, bins, local_steps, kernel_scale)

    def plant(key: Array, params: Params, auxiliary: Batch | None = None) -> Params:
        dtype = jnp.result_type(*jax.tree.leaves(params))
        size = math.prod(shape)
        direction = jnp.full(size, 1 / size, dtype)
        law = measured_law(location, scale, direction, auxiliary, shape, "loki")
        return _planted(key, layout, params, direction, law)

    def invert(observation: Observation) -> Reconstruction:
        return _invert(model, layout, observation, peak, max_samples, tolerance)

    def check_clients(observation: Observation) -> None:
        total = observation.facts.batch_size
        if total is not None and total % clients:
            raise ValueError(
                f"The observation's batch_size must be a multiple of {clients} clients, got {total}."
            )

    block = _block_model(model, layout)
    attack = row_attack(
        block, invert, shape, "loki", several_steps=local_steps, further=check_clients
    )
    return Imprint(block, plant, attack)


def _planted(
    key: Array,
    layout: _Layout,
    params: Params,
    direction: Array,
    law: tuple[Array | float, Array | float],
) -> Params:
    """Every client's parameters, for a brightness of the mean and standard deviation `law`."""
    shape, clients, bins, local_steps, kernel_scale = layout
    size, channels, dtype = math.prod(shape), shape[2], direction.dtype
    shares = jnp.arange(1, bins, dtype=dtype) / bins
    cuts = close_below(quantile("mean", shares, *law), jnp.zeros((), dtype))
    rows, reach = binning_layer(direction, cuts, jnp.ones((), dtype), local_steps)
    kernel = rows["kernel"].reshape(*shape[:2], 1, channels, bins) / kernel_scale
    kernel = jnp.broadcast_to(kernel, (*shape[:2], clients, channels, bins))
    low, high = jnp.zeros(size, dtype), jnp.ones(size, dtype)
    split = jnp.einsum("cl,ij->cilj", jnp.eye(clients, dtype=dtype), jnp.eye(channels))
    common = {
        "rows": {"kernel": kernel.reshape(-1, bins), "bias": rows["bias"]},
        "back": back_layer(key, bins, low, high, reach),
        "base": params,
    }
    return {
        "split": kernel_scale * split.reshape(clients, channels, -1).astype(dtype),
        **jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (clients, *leaf.shape)), common),
    }


def _block_model(model: Model, layout: _Layout) -> Model:
    """The model behind both layers and the way back to an image; as initialised, ordinary layers."""
    clients, bins = layout.clients, layout.bins
    size, channels = math.prod(layout.shape), layout.shape[2]

    def init(key: Array, input_shape: Sequence[int]) -> Params:
        split_key, rows_key, back_key, base_key = jax.random.split(key, 4)
        return {
            "split": dense(split_key, channels, clients * channels)["kernel"],
            "rows": dense(rows_key, clients * size, bins),
            "back": dense(back_key, bins, size),
            "base": model.init(base_key, input_shape),
        }

    def apply(params: Params, inputs: Array) -> Array:
        blocks = inputs @ params["split"]
        flat = blocks.reshape(inputs.shape[0], -1)
        values = flat @ params["rows"]["kernel"] + params["rows"]["bias"][None]
        return block_tail(model, params, values, layout.shape, layout.local_steps)

    return fronted(model, init, apply, "loki")


def _invert(
    model: Model,
    layout: _Layout,
    observation: Observation,
    peak: float,
    max_samples: int,
    tolerance: float | None,
) -> Reconstruction:
    """Divide every client's rows by what makes their largest value `peak`."""
    shape, clients, bins, local_steps, kernel_scale = layout
    facts = observation.facts
    gradient = observation.gradient if local_steps else per_step_gradient(observation)
    assert gradient is not None
    directions = bin_directions(bins, local_steps, gradient["rows"]["bias"].dtype)
    blocks = _blocked(layout, gradient["rows"]["kernel"]) / kernel_scale @ directions.T
    slots = max_samples if facts.batch_size is None else facts.batch_size // clients
    sizes = (facts.batch_size or 1, clients * slots)
    low, high = flat_bounds(facts.input_range, shape, blocks.dtype)
    implied, inside = _certificates(model, layout, observation.params, directions)
    # Of all clients, so that the rounding of the strongest does not look like another's samples.
    floor = 64 * jnp.finfo(blocks.dtype).eps * jnp.abs(blocks).max()

    def one(weight: Array) -> Inverted:
        strongest = jnp.abs(weight).argmax(axis=0)
        bias = jnp.take_along_axis(weight, strongest[None], axis=0)[0] / peak
        rows = Rows(weight, bias, floor, low, high)
        limit = exact_tolerance(weight.dtype, tolerance)
        return invert_rows(rows, implied, inside, sizes, slots, limit)

    found = jax.vmap(one)(blocks)
    return Reconstruction(
        found.inputs.reshape((clients * slots, *shape)),
        found.labels.reshape(-1),
        found.found.reshape(-1),
        found.objective.mean(),
        {"rows": found.rows, "certified": found.certified},
    )


def _certificates(model: Model, layout: _Layout, params: Params, directions: Array):
    """`implied` and `inside` of `invert_rows`: of one step the former, of several the latter."""
    first = layout.kernel_scale * _blocked(layout, params["rows"]["kernel"])[0]

    def values_of(inputs: Array) -> Array:
        return inputs @ first + params["rows"]["bias"][None]

    def implied(inputs: Array) -> Array:
        return implied_bias(
            lambda values: block_tail(model, params, values, layout.shape, layout.local_steps),
            values_of(inputs),
            directions,
        )

    def inside(inputs: Array) -> Array:
        own = jnp.diagonal(values_of(inputs))
        return (own >= -0.25) & (own <= 1.25)

    return (None, inside) if layout.local_steps else (implied, None)


def _blocked(layout: _Layout, kernel: Array) -> Array:
    """`[clients, d, bins]`, the first layer's weights of every client's block."""
    kernel = kernel.reshape(*layout.shape[:2], layout.clients, layout.shape[2], layout.bins)
    return jnp.moveaxis(kernel, 2, 0).reshape(layout.clients, -1, layout.bins)


def aggregate(observations: Observation) -> Observation:
    """What secure aggregation lets the server see of several clients: their mean.

    Args:
      observations: one observation a client, stacked along a leading axis (as `jax.vmap` of `observe`
        returns them), with a gradient each.

    Returns:
      One observation of all clients' samples together, at the first client's parameters. Labels that
      were granted are joined; nothing else of the clients stays.

    Raises:
      ValueError: no gradient, or leaves without one leading axis of clients.
    """
    sides = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(observations.gradient)}
    if len(sides) != 1 or () in sides:
        raise ValueError(
            "observations must have gradients stacked along a leading axis of clients, got leaves of "
            f"the leading sides {sorted(sides)}."
        )
    ((clients,),) = sides
    facts, labels = observations.facts, observations.labels
    size = None if facts.batch_size is None else clients * facts.batch_size
    return Observation(
        params=jax.tree.map(lambda leaf: leaf[0], observations.params),
        gradient=jax.tree.map(lambda leaf: leaf.mean(axis=0), observations.gradient),
        facts=dataclasses.replace(facts, batch_size=size),
        labels=None if labels is None else labels.reshape(-1),
    )
