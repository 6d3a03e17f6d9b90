"""A chain of layers as the layer-wise attacks walk it: weighted layers, with what lies between them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from invjax.attacks.analytic.layerwise.inverses import inverses
from invjax.attacks.analytic.layerwise.solvers import Solver
from invjax.base import Array, Layer, Model
from invjax.conv import im2col_conv
from invjax.linalg import Geometry, geometry
from invjax.models.chain import average_pool
from invjax.models.layers import Layers


class Block(NamedTuple):
    """A weighted layer of a chain, with the average pools that may follow a convolution. Static.

    Attributes:
      index: of the layer in the chain.
      activation: after the layer, or after its pools.
      input_shape: of the layer's input, without a batch axis.
      output_shape: after the pools.
      shape: of a convolution; `None` for a dense layer.
      pool: window of the pools, several as one; 1 without.
      solver: of a convolution.
    """

    index: int
    activation: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    shape: Geometry | None = None
    pool: int = 1
    solver: Solver = "nullspace"


def blocks_of(
    model: Model,
    layers: Layers,
    input_shape: Sequence[int],
    solver: Solver | Sequence[Solver] = "nullspace",
) -> tuple[Block, ...]:
    """Read a chain as blocks, and refuse what cannot be undone layer by layer.

    Args:
      model: for messages.
      layers: of its parameters.
      input_shape: of one input.
      solver: for all convolutions, or one for each, from the input on.

    Returns:
      The blocks, from the input to the logits; the last is the head.

    Raises:
      ValueError: no dense head, an activation whose input its output does not tell, a number of
        solvers other than of convolutions.
      NotImplementedError: a pool that is not linear in a convolution's output, as it throws away
        what the attack would need; a flattening with an activation; a dense layer on a map.
    """
    blocks: list[Block] = []
    shape, index = tuple(input_shape), 0
    while index < len(layers):
        layer = layers[index]
        if layer.kind == "flatten" and layer.activation == "identity":
            shape = (math.prod(shape),)
        elif layer.kind == "dense" and len(shape) == 1 and layer.weight is not None:
            after = (layer.weight.shape[1],)
            blocks.append(Block(index, layer.activation, shape, after))
            shape = after
        elif layer.kind == "conv" and len(shape) == 3:
            block, pools = _convolution(layers, index, shape)
            blocks.append(block)
            shape = block.output_shape
            index += pools
        else:
            raise NotImplementedError(
                f"Layer {index} of {model.name}, {layer.kind} with the activation "
                f"{layer.activation}, cannot be undone: an average pool must follow a convolution "
                "without an activation, and other pools never can."
            )
        index += 1
    if not blocks or blocks[-1].shape is not None:
        raise ValueError(f"The model {model.name} must end in a dense layer.")
    blocks = _with_solvers(model, blocks, solver)
    for block in blocks:
        _check_activation(model, layers[block.index], block, block is blocks[-1])
    return tuple(blocks)


def _convolution(layers: Layers, index: int, shape: tuple[int, ...]) -> tuple[Block, int]:
    """A convolution with the average pools before its activation, and their number."""
    layer = layers[index]
    height, width, channels = shape
    sizes = geometry(layer, (height, width, channels))
    pool, pools, activation = 1, 0, layer.activation
    for after in layers[index + 1 :]:
        if after.kind != "average_pool" or activation != "identity":
            break
        assert after.window is not None
        # Pools without overlap crop the same pixels as one of the product of their windows.
        pool, pools, activation = pool * after.window[0], pools + 1, after.activation
    rows, columns = (size // pool for size in sizes.output)
    block = Block(index, activation, shape, (rows, columns, sizes.filters), sizes, pool)
    return block, pools


def _with_solvers(
    model: Model, blocks: list[Block], solver: Solver | Sequence[Solver]
) -> list[Block]:
    convolutions = [block for block in blocks if block.shape is not None]
    each = [solver] * len(convolutions) if isinstance(solver, str) else list(solver)
    if len(each) != len(convolutions):
        raise ValueError(
            f"solver must name one solver, or one for each of the {len(convolutions)} convolutions "
            f"of {model.name}, got {len(each)}."
        )
    names = iter(each)
    return [
        block if block.shape is None else block._replace(solver=next(names)) for block in blocks
    ]


def _check_activation(model: Model, layer: Layer, block: Block, head: bool) -> None:
    if block.shape is None and layer.bias is not None:
        return  # Its bias's gradient is the derivative before any activation.
    allowed = ("identity",) if head else tuple(inverses)
    if block.activation not in allowed:
        place = "head" if head else f"layer {block.index}"
        raise ValueError(
            f"The activation {block.activation} of the {place} of {model.name} must be one of "
            f"{', '.join(allowed)}: the layer-wise attacks read its derivative off its output."
        )


def conv_signal(block: Block, signal: Array) -> Array:
    """The derivative by a convolution's output, before its pool, from that behind the pool.

    Args:
      block: a convolution.
      signal: the derivative of the loss by what comes out of the pool, of the block's `output_shape`.

    Returns:
      `[rows, columns, filters]` of the convolution's output.
    """
    assert block.shape is not None
    if block.pool == 1:
        return signal
    before = jnp.zeros((1, *block.shape.output, block.shape.filters), signal.dtype)
    _, pull = jax.vjp(lambda values: average_pool(values, block.pool), before)
    return pull(signal[None])[0][0]


def convolve(block: Block, weight: Array, inputs: Array) -> Array:
    """A block's convolution, without its bias and before its pool.

    Args:
      block: a convolution.
      weight: `[height, width, in, out]`.
      inputs: of its `input_shape`.

    Returns:
      `[rows, columns, filters]`.
    """
    assert block.shape is not None
    return im2col_conv(
        inputs[None],
        weight,
        block.shape.strides,
        block.shape.padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )[0]


def pull_back(block: Block, weight: Array, signal: Array) -> Array:
    """The derivative of the loss by a block's input.

    Args:
      block: the block.
      weight: of its layer.
      signal: the derivative by what the layer computes, before its pool.

    Returns:
      Of the block's `input_shape`.
    """
    if block.shape is None:
        return weight @ signal
    zeros = jnp.zeros(block.input_shape, signal.dtype)
    return jax.vjp(lambda inputs: convolve(block, weight, inputs), zeros)[1](signal)[0]
