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
from invjax.checks import check_choice
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


_SIZES = {
    "conv": ("features", "window", "stride"),
    "dense": ("features",),
    "max_pool": ("window",),
    "average_pool": ("window",),
    "global_average_pool": (),
    "flatten": (),
}
"""Kinds of layers, and the sizes that each must have."""


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


class Chain(nnx.Module):
    """The flax module of a chain; parameters are named `layer00`, `layer01`, ..."""

    def __init__(self, specs, input_shape, rngs, conv, init: Init):
        self.specs = tuple(specs)
        shape = tuple(input_shape)
        if any(spec.kind == "conv" for spec in specs):
            check_image_shape(shape)
        for index, spec in enumerate(specs):
            after = _shape_after(spec, shape)
            if min(after) < 1:
                raise ValueError(
                    f"Inputs of shape {tuple(input_shape)} are too small: layer {index} "
                    f"({spec.kind}) leaves nothing of {shape}."
                )
            if spec.kind == "conv":
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
            elif spec.kind == "dense":
                starts = initializers(init, shape[-1])
                layer = nnx.Linear(
                    shape[-1], spec.features, use_bias=spec.bias, rngs=rngs, **starts
                )
                setattr(self, _layer(index), layer)
            shape = after

    def __call__(self, x, features: bool = False):
        """Logits of a batch, or what goes into the dense layers at the end."""
        for index, spec in enumerate(self.specs[: head_start(self.specs) if features else None]):
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


def _shape_after(spec: Spec, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of one output of a layer, of the shape of one input."""
    if spec.kind == "conv":
        sides = [(side + 2 * spec.padding - spec.window) // spec.stride + 1 for side in shape[:2]]
        return (*sides, spec.features)
    if spec.kind == "dense":
        return (*shape[:-1], spec.features)
    probe = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    return jax.eval_shape(lambda x: reshape_or_pool(spec, x), probe).shape[1:]


def head_start(layers: Sequence[Spec] | Sequence[Layer]) -> int:
    """Index of the first of the dense layers at the end; the number of layers where there is none."""
    start = len(layers)
    while start and layers[start - 1].kind == "dense":
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
      ValueError: an unknown choice, a size below one, a norm after another layer than a convolution;
        and, of its `init`, inputs of another number of axes or too small.
    """
    check_choice("init", init, get_args(Init))
    for index, spec in enumerate(specs):
        _check_spec(index, spec)
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
        head=(lambda tree: layers(tree)[head_start(specs) :])
        if specs[-1].kind == "dense"
        else None,
        batch_norm="batch" in norms,
    )


def _check_spec(index: int, spec: Spec) -> None:
    check_choice("kind", spec.kind, tuple(_SIZES))
    check_choice("activation", spec.activation, tuple(activations))
    check_choice("norm", spec.norm, ("none", "batch", "group"))
    if spec.norm != "none" and spec.kind != "conv":
        raise ValueError(f"norm must be 'none' for layer {index} ({spec.kind}), got {spec.norm!r}.")
    for name in _SIZES[spec.kind]:
        if getattr(spec, name) < 1:
            raise ValueError(
                f"{name} of layer {index} ({spec.kind}) must be at least 1, got {getattr(spec, name)}."
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
