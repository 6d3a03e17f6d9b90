"""An untrained network as the prior on images: what it draws easily is what images look like."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from invjax import conv
from invjax.attacks.matching.loop import Decode, Initializer
from invjax.attacks.matching.priors import input_bounds
from invjax.base import Array, Observation, Params
from invjax.checks import check_count
from invjax.models.chain import average_pool
from invjax.models.modules import check_image_shape, pure_functions


class Generator(NamedTuple):
    """Images as a function of weights.

    Attributes:
      init: `init(key) -> weights`.
      apply: `apply(weights, noise [B, H, W, K]) -> [B, H, W, C]`, in (0, 1).
      noise_shape: `(H, W, K)`, of one image.
    """

    init: Callable[[Array], Params]
    apply: Callable[[Params, Array], Array]
    noise_shape: tuple[int, int, int]


class UNet(nnx.Module):
    """Two convolutions a level, down by averaging, up by repetition, with skips between."""

    def __init__(self, shape, channels: int, width: int, levels: int, rngs, convolution):
        def layer(inputs: int, features: int, window: int = 3) -> nnx.Conv:
            return nnx.Conv(
                inputs,
                features,
                (window, window),
                padding=((window // 2, window // 2),) * 2,
                conv_general_dilated=convolution,
                rngs=rngs,
            )

        def stage(inputs: int, features: int) -> nnx.List:
            norm = nnx.GroupNorm(features, num_groups=math.gcd(8, features), rngs=rngs)
            return nnx.List([layer(inputs, features), norm, layer(features, features)])

        widths = [width * 2**level for level in range(levels + 1)]
        before = [channels, *widths[:-1]]
        self.down = nnx.List([stage(*pair) for pair in zip(before, widths, strict=True)])
        joined = [low + high for low, high in itertools.pairwise(widths)]
        self.up = nnx.List([stage(*pair) for pair in zip(joined, widths, strict=False)])
        self.out = layer(width, shape[2], 1)

    def __call__(self, noise: Array) -> Array:
        """Images of noise."""
        skips = [_stage(self.down[0], noise)]
        for stage in self.down[1:]:
            skips.append(_stage(stage, average_pool(skips[-1], 2)))
        x = skips.pop()
        for stage in reversed(self.up):
            x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
            x = _stage(stage, jnp.concatenate([skips.pop(), x], axis=-1))
        return nnx.sigmoid(self.out(x))


def _stage(layers: nnx.List, x: Array) -> Array:
    first, norm, second = layers
    return nnx.leaky_relu(second(nnx.leaky_relu(norm(first(x)), 0.2)), 0.2)


def unet(
    input_shape: Sequence[int],
    *,
    width: int = 32,
    channels: int = 16,
    levels: int | None = None,
    backend: str | None = None,
) -> Generator:
    """An untrained U-Net (Ulyanov et al. 2018, deep image prior; Ronneberger et al. 2015).

    Args:
      input_shape: height, width and channels of the images.
      width: channels of the first level; each further one has twice as many.
      channels: of the noise.
      levels: halvings, at most so many that both sides divide; two or fewer where `None`.
      backend: `cpu`, `gpu` or `tpu`: how convolutions are computed; the present one where `None`.

    Returns:
      The generator.

    Raises:
      ValueError: inputs that are no images, a number below 1, or sides that do not halve so often.
    """
    check_image_shape(input_shape)
    height, length, _ = input_shape
    check_count("width", width, 1)
    check_count("channels", channels, 1)
    most = (math.gcd(height, length) & -math.gcd(height, length)).bit_length() - 1
    levels = min(2, most) if levels is None else levels
    if not 0 <= levels <= most:
        raise ValueError(
            f"levels must be between 0 and {most} for {height}x{length}, got {levels}."
        )
    backend = jax.default_backend() if backend is None else backend
    convolution = conv.im2col_conv if backend == "cpu" else jax.lax.conv_general_dilated

    def build(key: Array) -> UNet:
        return UNet(tuple(input_shape), channels, width, levels, nnx.Rngs(key), convolution)

    def init(key: Array) -> Params:
        return nnx.to_pure_dict(nnx.state(build(key), nnx.Param))

    def apply(params: Params, noise: Array) -> Array:
        module = nnx.eval_shape(lambda: build(jax.random.key(0)))
        return pure_functions(module).apply(params, noise)

    return Generator(init, apply, (height, length, channels))


def generated(generator: Generator, spread: float = 0.1) -> tuple[Initializer, Decode]:
    """What `gradient_matching` needs to optimise a generator's weights in place of pixels.

    The samples of a batch share the weights, and each has noise of its own, drawn once.

    Args:
      generator: the generator.
      spread: standard deviation of the noise.

    Returns:
      `initializer` and `decode`. Images fill the public input range.
    """

    def initializer(key: Array, shape: tuple[int, ...], observation: Observation):
        del observation
        weights_key, noise_key = jax.random.split(key)
        noise = spread * jax.random.normal(noise_key, (shape[0], *generator.noise_shape))
        return {"inputs": noise, "weights": generator.init(weights_key)}

    def decode(variables, observation: Observation) -> Array:
        # The noise is no variable, only carried among them.
        noise = jax.lax.stop_gradient(variables["inputs"])
        unit = generator.apply(variables["weights"], noise)
        low, high = input_bounds(observation, unit.dtype, unit.ndim)
        return low + (high - low) * unit

    return initializer, decode
