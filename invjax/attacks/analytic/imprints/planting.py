"""Imprints in the first dense layer of a model as it is: planting, and reading its rows."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from invjax.attacks.analytic.imprints.imprint import (
    Imprint,
    Rows,
    check_settings,
    implied_bias,
    read_rows,
    row_attack,
)
from invjax.attacks.analytic.row_scan import row_scan
from invjax.base import Array, Batch, Layer, Model, Observation, Params, Reconstruction
from invjax.models.layers import Layers, apply_layers, split_at_head
from invjax.observe import per_step_gradient
from invjax.ranges import flat_bounds

Draw = Callable[[Array, tuple[int, ...], int, Batch | None], tuple[Array, Array]]


def dense_imprint(
    model: Model,
    input_shape: Sequence[int],
    draw: Draw,
    name: str,
    *,
    cascade: bool,
    max_samples: int,
    tolerance: float | None,
) -> Imprint:
    """An imprint that changes the weights of the first dense layer only.

    A convolutional front is made to pass the input on: its first channels copy it, the others are zero.

    Args:
      model: a model that ends in dense ReLU layers, one hidden at least; before them stand nothing but
        a flattening, or convolutions of stride 1 that keep the size.
      input_shape: shape of one input.
      draw: `draw(key, input_shape, units, auxiliary) -> (weight [d, units], bias [units])`.
      name: for messages.
      cascade: whether the attack is `row_scan` with its cascade.
      max_samples: slots, where the batch size is not known.
      tolerance: of the certificates.

    Returns:
      The imprint.

    Raises:
      ValueError: a single logit, an empty shape, a number out of range.
    """
    shape = check_settings(model, input_shape, tolerance, max_samples=max_samples)
    size = math.prod(shape)

    def plant(key: Array, params: Params, auxiliary: Batch | None = None) -> Params:
        front, head = split_at_head(model, params)
        old_weight, old_bias = hidden_layer(model, head)
        channels = passed_channels(model, front, shape)
        entries = size // shape[-1] * channels if channels else size
        if old_weight.shape[0] != entries:
            raise ValueError(
                f"input_shape {shape} gives the first dense layer of {model.name} {entries} values, "
                f"it takes {old_weight.shape[0]}."
            )
        weight, bias = draw(key, shape, old_bias.size, auxiliary)
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
        weight, bias = hidden_layer(model, split_at_head(model, per_step_gradient(observation))[1])
        channels = passed_channels(model, front, shape)
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

        facts, eps = observation.facts, jnp.finfo(bias.dtype).eps
        floor = 8 * eps * jnp.abs(bias).max()
        rows = Rows(weight, bias, floor, *flat_bounds(facts.input_range, shape, weight.dtype))
        return read_rows(rows, implied, facts, max_samples, tolerance)

    def check_front(observation: Observation) -> None:
        front, _ = split_at_head(model, observation.params)
        low = np.min(observation.facts.input_range[0])
        if low < 0 and any(layer.activation == "relu" for layer in front):
            raise ValueError(
                f"The ReLU in front of {model.name}'s dense layers passes no values below zero on, and "
                f"the observation's input_range is from {low}."
            )

    if cascade:
        attack = row_scan(model, cascade=True, max_samples=max_samples, tolerance=tolerance)
    else:
        attack = row_attack(model, invert, shape, name, further=check_front)
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
        if not _can_pass(layer, shape):
            raise ValueError(
                f"The front of {model.name} cannot pass inputs {shape} on: it must hold only "
                "convolutions of stride 1 that keep the size and have as many channels, with ReLU or "
                f"nothing; got a layer {layer.kind}."
            )
        assert layer.weight is not None
        channels = layer.weight.shape[3]
    return channels


def _can_pass(layer: Layer, shape: tuple[int, ...]) -> bool:
    if layer.kind != "conv" or layer.weight is None or len(shape) != 3:
        return False
    height, width, _, channels = layer.weight.shape
    return (
        height % 2 == width % 2 == 1
        and tuple(layer.strides) == (1, 1)
        and tuple(map(tuple, layer.padding)) == ((height // 2,) * 2, (width // 2,) * 2)
        and layer.activation in ("relu", "identity")
        and channels >= shape[2]
    )


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
