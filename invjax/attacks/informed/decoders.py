"""Networks of the reconstructor: from features of released weights to a record."""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from invjax import conv
from invjax.base import Array, Params
from invjax.checks import check_count
from invjax.models import mlp
from invjax.models.chain import make_norm
from invjax.models.modules import check_image_shape, pure_functions


class Decoder(NamedTuple):
    """A network from features to inputs.

    Attributes:
      init: `init(key, count) -> weights`, for so many features.
      apply: `apply(weights, features [B, p]) -> [B, ...]`, in (0, 1).
    """

    init: Callable[[Array, int], Params]
    apply: Callable[[Params, Array], Array]


def dense_decoder(input_shape: Sequence[int], widths: Sequence[int] = (1000, 1000)) -> Decoder:
    """Dense layers with ReLU and a sigmoid at the end, as published for MNIST.

    Args:
      input_shape: of a record.
      widths: of the hidden layers.

    Returns:
      The decoder.
    """
    shape = tuple(input_shape)
    model = mlp(widths, int(np.prod(shape)), init="lecun")

    def apply(weights: Params, features: Array) -> Array:
        return nnx.sigmoid(model.apply(weights, features)).reshape(-1, *shape)

    return Decoder(lambda key, count: model.init(key, (count,)), apply)


class Upsampler(nnx.Module):
    """A transposed convolution of one pixel, then residual blocks that double the sides."""

    def __init__(self, count: int, start, doublings: int, channels: int, width: int, rngs, conv):
        def layer(inputs: int, outputs: int, window: int = 3) -> nnx.Conv:
            sides = ((window // 2, window // 2),) * 2
            return nnx.Conv(
                inputs,
                outputs,
                (window, window),
                padding=sides,
                conv_general_dilated=conv,
                rngs=rngs,
            )

        widths = [max(1, 4 * width // 2**level) for level in range(doublings + 1)]
        self.start = (*start, widths[0])
        # What a transposed convolution makes of a single pixel is a dense layer.
        self.first = nnx.Linear(count, int(np.prod(self.start)), rngs=rngs)
        self.blocks = nnx.List(
            nnx.List(
                [
                    make_norm("group", before, rngs),
                    layer(before, after),
                    make_norm("group", after, rngs),
                    layer(after, after),
                    layer(before, after, 1),
                ]
            )
            for before, after in itertools.pairwise(widths)
        )
        self.norm = make_norm("group", widths[-1], rngs)
        self.last = layer(widths[-1], channels)

    def __call__(self, features: Array) -> Array:
        """Images of features."""
        x = self.first(features).reshape(-1, *self.start)
        for before, first, after, second, skip in self.blocks:
            inner = first(_doubled(nnx.relu(before(x))))
            x = second(nnx.relu(after(inner))) + skip(_doubled(x))
        return nnx.sigmoid(self.last(nnx.relu(self.norm(x))))


def _doubled(x: Array) -> Array:
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def convolutional_decoder(
    input_shape: Sequence[int], width: int = 64, backend: str | None = None
) -> Decoder:
    """A transposed-convolution generator, for images (after Maciążek et al. 2025).

    The sides are halved while they are even and stay at 4 pixels and more; from there on residual
    blocks double them, with half as many channels each. Group norm stands for batch norm.

    Args:
      input_shape: height, width and channels.
      width: a quarter of the channels at the start.
      backend: `cpu`, `gpu` or `tpu`: how convolutions are computed; the present one where `None`.

    Returns:
      The decoder.

    Raises:
      ValueError: inputs that are no images, or a width below 1.
    """
    check_image_shape(input_shape)
    check_count("width", width, 1)
    (height, length, channels), doublings = input_shape, 0
    while height % 2 == length % 2 == 0 and min(height, length) >= 8:
        height, length, doublings = height // 2, length // 2, doublings + 1
    backend = jax.default_backend() if backend is None else backend
    convolution = conv.im2col_conv if backend == "cpu" else jax.lax.conv_general_dilated

    def build(key: Array, count: int) -> Upsampler:
        sizes = (count, (height, length), doublings, channels, width)
        return Upsampler(*sizes, nnx.Rngs(key), convolution)

    def init(key: Array, count: int) -> Params:
        return nnx.to_pure_dict(nnx.state(build(key, count), nnx.Param))

    def apply(weights: Params, features: Array) -> Array:
        module = nnx.eval_shape(lambda: build(jax.random.key(0), features.shape[1]))
        return pure_functions(module).apply(weights, features)

    return Decoder(init, apply)
