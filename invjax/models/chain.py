"""Models that are a chain of layers: one description gives the flax module and the layer view."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from invjax.base import Array, Layer, Model, PyTree
from invjax.models.modules import check_image_shape, zoo_model

Init = Literal["torch", "he", "lecun", "wide"]

activations: dict[str, Callable[[Array], Array]] = {
    "identity": lambda x: x,
    "relu": nnx.relu,
    "sigmoid": nnx.sigmoid,
    "tanh": nnx.tanh,
    "softplus": nnx.softplus,
    "elu": nnx.elu,
    "gelu": nnx.gelu,
    "silu": nnx.silu,
    "leaky_relu": nnx.leaky_relu,
    "leaky_relu_0.2": lambda x: nnx.leaky_relu(x, 0.2),
}
"""Activations by the names that the layer view uses."""


class Spec(NamedTuple):
    """One layer of a chain.

    Attributes:
      kind: `conv`, `dense`, `max_pool`, `average_pool`, `global_average_pool` or `flatten`.
      features: output channels (conv, dense).
      window: side of the kernel or the pooling window, pixels.
      stride: of a convolution; a pool's is its window.
      padding: of a convolution, pixels on every side.
      activation: after the layer (and its norm).
      bias: whether the layer has one.
      norm: `batch`, `group` or `none`, after a convolution.
    """

    kind: str
    features: int = 0
    window: int = 1
    stride: int = 1
    padding: int = 0
    activation: str = "identity"
    bias: bool = True
    norm: str = "none"


def initializers(init: Init, fan_in: int) -> dict[str, Any]:
    """Kernel and bias initializers of a layer.

    Args:
      init: `torch` (uniform, one over the root of the fan-in), `he` or `lecun` (normal, variance two
        or one over the fan-in, zero bias; the latter is flax's own), or `wide` (uniform between -0.5
        and 0.5, weights and biases: the DLG work's).
      fan_in: inputs of one unit.

    Returns:
      Keywords of a flax layer.
    """

    def uniform(bound: float):
        def initialize(key, shape, dtype=jnp.float32, *args, **kwargs):
            # The same numbers as drawn in shape, but XLA compiles the flat draw ten times faster.
            draws = jax.random.uniform(key, (math.prod(shape),), dtype, -bound, bound)
            return draws.reshape(shape)

        return {"kernel_init": initialize, "bias_init": initialize}

    if init == "he":
        return {"kernel_init": nnx.initializers.he_normal()}
    if init == "lecun":
        return {"kernel_init": nnx.initializers.lecun_normal()}
    return uniform(0.5 if init == "wide" else fan_in**-0.5)


def max_pool(x: Array, window: int) -> Array:
    """Max pool without overlap by crop, reshape and pairwise selects; the first of equals wins.

    The derivative of `jnp.max` finds the maximum again by equality. XLA may compute the operand
    twice with different rounding, and then the gradient of a window is silently lost (seen on CPU
    behind a group norm, jaxlib 0.10). A select carries its gradient whatever the rounding.
    """
    x = _blocks(x, window)
    for axis in (4, 2):
        parts = [lax.index_in_dim(x, index, axis, keepdims=False) for index in range(window)]
        x = functools.reduce(lambda a, b: jnp.where(a >= b, a, b), parts)
    return x


def average_pool(x: Array, window: int) -> Array:
    """Average pool without overlap."""
    return _blocks(x, window).mean(axis=(2, 4))


def _blocks(x: Array, window: int) -> Array:
    height, width = x.shape[1] // window, x.shape[2] // window
    x = x[:, : height * window, : width * window]
    return x.reshape(x.shape[0], height, window, width, window, x.shape[3])


def make_norm(kind: str, features: int, rngs: nnx.Rngs) -> Any:
    """A normalisation layer by name, or `None`."""
    if kind == "batch":
        return nnx.BatchNorm(features, rngs=rngs)
    if kind == "group":
        return nnx.GroupNorm(features, num_groups=math.gcd(8, features), rngs=rngs)
    return None


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Refuse a value that is not among those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")


class Chain(nnx.Module):
    """The flax module of a chain; parameters are named `layer00`, `layer01`, ..."""

    def __init__(self, specs, input_shape, rngs, conv, init: Init):
        self.specs = tuple(specs)
        shape = tuple(input_shape)
        if any(spec.kind == "conv" for spec in specs):
            check_image_shape(shape)
        for index, spec in enumerate(specs):
            if spec.kind == "conv":
                side = [
                    (size + 2 * spec.padding - spec.window) // spec.stride + 1 for size in shape[:2]
                ]
                if min(side) < 1:
                    raise ValueError(
                        f"Inputs of shape {tuple(input_shape)} are too small: layer {index} "
                        f"is left with {shape[:2]} pixels."
                    )
                layer = nnx.Conv(
                    shape[2],
                    spec.features,
                    (spec.window, spec.window),
                    (spec.stride, spec.stride),
                    padding=((spec.padding, spec.padding),) * 2,
                    use_bias=spec.bias,
                    conv_general_dilated=conv,
                    rngs=rngs,
                    **initializers(init, spec.window**2 * shape[2]),
                )
                setattr(self, _layer(index), layer)
                norm = make_norm(spec.norm, spec.features, rngs)
                if norm is not None:
                    setattr(self, _norm(index), norm)
                shape = (*side, spec.features)
            elif spec.kind == "dense":
                layer = nnx.Linear(
                    shape[-1],
                    spec.features,
                    use_bias=spec.bias,
                    rngs=rngs,
                    **initializers(init, shape[-1]),
                )
                setattr(self, _layer(index), layer)
                shape = (*shape[:-1], spec.features)
            else:
                probe = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
                shape = jax.eval_shape(lambda x, spec=spec: reshape_or_pool(spec, x), probe).shape[
                    1:
                ]
                if 0 in shape:
                    raise ValueError(
                        f"Inputs of shape {tuple(input_shape)} are too small: layer {index} "
                        f"({spec.kind}) leaves nothing."
                    )

    def __call__(self, x, features: bool = False):
        """Logits of a batch, or what goes into the dense layers at the end."""
        for index, spec in enumerate(self.specs[: _head_start(self.specs) if features else None]):
            if spec.kind in ("conv", "dense"):
                x = getattr(self, _layer(index))(x)
                if spec.norm != "none":
                    x = getattr(self, _norm(index))(x)
            else:
                x = reshape_or_pool(spec, x)
            x = activations[spec.activation](x)
        return x


def reshape_or_pool(spec: Spec, x: Array) -> Array:
    """Apply a layer that has no parameters."""
    if spec.kind == "flatten":
        return x.reshape(x.shape[0], -1)
    if spec.kind == "global_average_pool":
        return x.mean(axis=(1, 2))
    pool = max_pool if spec.kind == "max_pool" else average_pool
    return pool(x, spec.window)


def _head_start(specs: Sequence[Spec]) -> int:
    """Index of the first of the dense layers at the end."""
    start = len(specs)
    while start and specs[start - 1].kind == "dense":
        start -= 1
    return start


def _layer(index: int) -> str:
    return f"layer{index:02d}"


def _norm(index: int) -> str:
    return f"norm{index:02d}"


def chain_model(specs: Sequence[Spec], num_classes: int, name: str, init: Init = "torch") -> Model:
    """A model from a list of layers.

    Args:
      specs: the layers, from the input to the logits.
      num_classes: number of classes.
      name: for tables.
      init: how weights start.

    Returns:
      The model; with a layer view unless it has norm layers.

    Raises:
      ValueError: an unknown choice.
    """
    check_choice("init", init, get_args(Init))
    for spec in specs:
        check_choice("activation", spec.activation, tuple(activations))
        check_choice("norm", spec.norm, ("none", "batch", "group"))
    norms = {spec.norm for spec in specs}

    def build(input_shape, rngs, conv):
        return Chain(specs, input_shape, rngs, conv, init)

    def layers(tree: PyTree) -> tuple[Layer, ...]:
        return tuple(_layer_view(index, spec, tree) for index, spec in enumerate(specs))

    return zoo_model(
        build,
        num_classes,
        name,
        layers=layers if norms == {"none"} else None,
        head=(lambda tree: layers(tree)[_head_start(specs) :])
        if specs[-1].kind == "dense"
        else None,
        batch_norm="batch" in norms,
    )


def _layer_view(index: int, spec: Spec, tree: PyTree) -> Layer:
    part = tree.get(_layer(index), {})
    pool = spec.kind in ("max_pool", "average_pool")
    stride = spec.window if pool else spec.stride
    return Layer(
        kind=spec.kind,
        weight=part.get("kernel"),
        bias=part.get("bias"),
        activation=spec.activation,
        strides=(stride, stride),
        padding=((spec.padding, spec.padding),) * 2,
        window=(spec.window, spec.window) if pool else None,
    )
