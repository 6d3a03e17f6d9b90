"""Imprints in the first dense layer of a model as it is: planting, and reading its rows."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from invjax.attacks.analytic.imprints.imprint import (
    Imprint,
    Rows,
    auxiliary_inputs,
    exact_tolerance,
    flat_range,
    implied_bias,
    invert_rows,
    row_attack,
)
from invjax.attacks.analytic.row_scan import row_scan
from invjax.base import Array, Batch, Model, Observation, Params, Reconstruction
from invjax.models.layers import Layers, apply_layers, split_at_head
from invjax.observe import per_step_gradient

Draw = Callable[[Array, int, int, Array | None], tuple[Array, Array]]


def dense_imprint(
    model: Model,
    shape: tuple[int, ...],
    draw: Draw,
    name: str,
    *,
    informed: bool,
    cascade: bool,
    max_samples: int,
    tolerance: float | None,
) -> Imprint:
    """An imprint that changes the weights of the first dense layer only.

    A convolutional front is made to pass the input on: its first channels copy it, the others are zero.

    Args:
      model: a model that ends in dense ReLU layers, one hidden at least; before them stand nothing but
        a flattening, or convolutions of stride 1 that keep the size.
      shape: shape of one input.
      draw: `draw(key, d, units, auxiliary [A, d] or None) -> (weight [d, units], bias [units])`.
      name: for messages.
      informed: whether the draw needs auxiliary data.
      cascade: whether the attack is `row_scan` with its cascade.
      max_samples: slots, where the batch size is not known.
      tolerance: of the certificates.

    Returns:
      The imprint.
    """
    size = math.prod(shape)

    def plant(key: Array, params: Params, auxiliary: Batch | None = None) -> Params:
        front, head = split_at_head(model, params)
        old_weight, old_bias = hidden_layer(model, head)
        channels = passed_channels(model, front, shape)
        data = auxiliary_inputs(auxiliary, shape, name) if informed else None
        weight, bias = draw(key, size, old_bias.size, data)
        if channels:
            weight = weight.reshape(*shape, -1)
            weight = jnp.pad(weight, ((0, 0), (0, 0), (0, channels - shape[2]), (0, 0)))
        changes = [(old_weight, weight.reshape(old_weight.shape)), (old_bias, bias)]
        for layer in front:
            if layer.weight is not None:
                changes.append((layer.weight, passing_kernel(layer.weight, shape[2])))
            if layer.bias is not None:
                changes.append((layer.bias, jnp.zeros_like(layer.bias)))
        return replaced(params, changes)

    def invert(observation: Observation) -> Reconstruction:
        front, head = split_at_head(model, observation.params)
        kernel, offset = hidden_layer(model, head)
        gradient = per_step_gradient(observation)
        weight, bias = hidden_layer(model, split_at_head(model, gradient)[1])
        channels = passed_channels(model, front, shape)
        facts, eps = observation.facts, jnp.finfo(bias.dtype).eps
        slots = facts.batch_size or max_samples
        if channels:
            weight, kernel = (
                side.reshape(*shape[:2], channels, -1)[:, :, : shape[2]].reshape(size, -1)
                for side in (weight, kernel)
            )

        def implied(inputs: Array) -> Array:
            return implied_bias(
                lambda values: apply_layers(head[1:], jax.nn.relu(values)),
                inputs @ kernel + offset[None],
                jnp.eye(bias.size, dtype=weight.dtype),
            )

        found = invert_rows(
            Rows(
                weight,
                bias,
                8 * eps * jnp.abs(bias).max(),
                *flat_range(facts.input_range, shape, weight.dtype),
            ),
            implied,
            None,
            facts.batch_size,
            slots,
            exact_tolerance(weight.dtype, tolerance),
        )
        return Reconstruction(
            found.inputs.reshape((slots, *shape)),
            found.labels,
            found.found,
            found.objective,
            {"rows": found.rows, "certified": found.certified},
        )

    if cascade:
        attack = row_scan(model, cascade=True, max_samples=max_samples, tolerance=tolerance)
    else:
        attack = row_attack(model, invert, shape, name)
    return Imprint(model, plant, attack)


def hidden_layer(model: Model, head: Layers) -> tuple[Array, Array]:
    """Weight and bias of the first dense layer, which must be hidden and have one."""
    weight, bias = head[0].weight, head[0].bias
    if len(head) < 2 or weight is None or bias is None:
        raise ValueError(f"The first dense layer of {model.name} must be hidden and have a bias.")
    return weight, bias


def passed_channels(model: Model, front: Layers, shape: tuple[int, ...]) -> int:
    """Channels at the end of a front that can pass its input on; 0 where the front is a flattening."""
    channels = 0
    for layer in front:
        if layer.kind == "flatten" and layer.activation == "identity":
            continue
        weight = layer.weight
        same = layer.kind == "conv" and weight is not None and weight.shape[0] % 2 == 1
        if same:
            pads = tuple(((side - 1) // 2,) * 2 for side in weight.shape[:2])  # pyrefly: ignore
            same = layer.strides == (1, 1) and tuple(map(tuple, layer.padding)) == pads
            same &= layer.activation in ("relu", "identity")
        if not same or weight.shape[3] < shape[-1]:  # pyrefly: ignore
            raise ValueError(
                f"The front of {model.name} cannot pass inputs {shape} on: it must hold only "
                "convolutions of stride 1 that keep the size and have as many channels, with ReLU or "
                f"nothing; got a layer {layer.kind}."
            )
        channels = weight.shape[3]  # pyrefly: ignore
    return channels


def passing_kernel(kernel: Array, channels: int) -> Array:
    """A kernel that copies the first channels and leaves the others at zero."""
    middle = (kernel.shape[0] // 2, kernel.shape[1] // 2)
    copies = jnp.arange(channels)
    return jnp.zeros_like(kernel).at[*middle, copies, copies].set(1)


def replaced(params: Params, changes: list[tuple[Array, Array]]) -> Params:
    """Parameters with some of their leaves changed, in the types they had."""
    new = {id(old): value.astype(old.dtype) for old, value in changes}
    leaves, treedef = jax.tree.flatten(params)
    if {id(leaf) for leaf in leaves} & set(new) != set(new):
        raise ValueError("The layer view must show leaves of params as they are.")
    return jax.tree.unflatten(treedef, [new.get(id(leaf), leaf) for leaf in leaves])
