"""The image operations of AutoAugment on 8-bit images, one image at a time.

`operation(sign, levels, magnitude) -> levels`: an index into `SIGNS`, grey levels `[H, W, C]`, integers
0 to 255, and an index 0 to 9 into the operation's range; all may be traced. They give what Pillow gives
on the same image, compiled or not; automatic contrast alone may lie a grey level above it, where
Pillow's double precision falls short of an integer.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from invjax.base import Array, Bound
from invjax.ranges import bounds

Operation = Callable[[int | Array, Array, int | Array], Array]

MAGNITUDES = 10
"""Values in every operation's range."""
SIGNS = (1, -1)
SHIFT = 150 / 331
"""Largest translation, as a share of the side."""
GREY = 128


def to_levels(inputs: Array, input_range: tuple[Bound, Bound]) -> Array:
    """Round to 8 bits.

    Args:
      inputs: any shape; values outside the range are clipped.
      input_range: lowest and highest value, each one number or one per channel.

    Returns:
      Integers 0 to 255.
    """
    low, high = bounds(input_range, inputs.shape, inputs.dtype)
    scaled = (inputs - low) / (high - low)
    return jnp.round(255 * jnp.clip(scaled, 0, 1)).astype(jnp.int32)


def from_levels(levels: Array, input_range: tuple[Bound, Bound], dtype) -> Array:
    """The inverse of `to_levels`, on 8-bit images.

    Args:
      levels: integers 0 to 255.
      input_range: lowest and highest value, each one number or one per channel.
      dtype: of the result.

    Returns:
      Inputs in their range.
    """
    scaled = levels.astype(dtype) / 255
    low, high = bounds(input_range, scaled.shape, scaled.dtype)
    return low + (high - low) * scaled


def operations(fill: int | Array = GREY) -> dict[str, Operation]:
    """Every operation by its name.

    Args:
      fill: grey level of what shears and translations bring in; rotations bring in grey (128).

    Returns:
      Operations. Shears, translations and the four blends have a sign; a rotation turns
      counter-clockwise, as released, and the others have no direction.
    """
    affine = {
        "shearX": (lambda value, width, height: (1, value, 0, 0, 1, 0), 0.3, fill),
        "shearY": (lambda value, width, height: (1, 0, 0, value, 1, 0), 0.3, fill),
        "translateX": (lambda value, width, height: (1, 0, value * width, 0, 1, 0), SHIFT, fill),
        "translateY": (lambda value, width, height: (1, 0, 0, 0, 1, value * height), SHIFT, fill),
        "rotate": (_rotation, 30, GREY),
    }
    blends = {"color": _grey, "contrast": _mean, "sharpness": _smooth, "brightness": jnp.zeros_like}
    return {
        **{name: functools.partial(_affine, *settings) for name, settings in affine.items()},
        **{name: functools.partial(_blend, origin) for name, origin in blends.items()},
        "posterize": _posterize,
        "solarize": _solarize,
        "autocontrast": _autocontrast,
        "equalize": _equalize,
        "invert": lambda sign, levels, magnitude: 255 - levels,
    }


def _rotation(degrees: float, width: int, height: int) -> tuple[float, ...]:
    """Output to input of a rotation about the middle, of either sign counter-clockwise."""
    angle = -math.radians(abs(degrees))
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = width / 2, height / 2
    return cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y


def _fixed_point(matrix: tuple[float, ...]) -> list[int]:
    """A map of pixel centres in the 16-bit fractions that Pillow steps through an image by."""
    a, b, c, d, e, f = matrix
    centred = (a, b, c + (a + b) / 2, d, e, f + (d + e) / 2)
    return [math.floor(value * 65536 + 0.5) for value in centred]


def _affine(matrix, largest, fill, sign, levels: Array, magnitude) -> Array:
    """Nearest-neighbour resampling by `matrix(value, width, height)`, output to input."""
    height, width, _ = levels.shape
    table = [
        [_fixed_point(matrix(side * value, width, height)) for side in SIGNS]
        for value in np.linspace(0, largest, MAGNITUDES)
    ]
    a, b, c, d, e, f = jnp.asarray(table, jnp.int32)[magnitude, sign]
    y, x = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
    from_x = (a * x + b * y + c) >> 16
    from_y = (d * x + e * y + f) >> 16
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    moved = levels[jnp.clip(from_y, 0, height - 1), jnp.clip(from_x, 0, width - 1)]
    return jnp.where(inside[..., None], moved, fill)


def _blend(origin, sign, levels: Array, magnitude) -> Array:
    """Away from, or towards, what the image is without the property: 1 plus or minus up to 0.5."""
    strengths = np.linspace(0, 0.5, MAGNITUDES)
    factors = np.stack([1 + side * strengths for side in SIGNS], axis=1).astype(np.float32)
    # Tabulated, because a compiler fuses a product and a sum, which truncate to other levels.
    products = jnp.asarray(factors[..., None] * np.arange(-255, 256, dtype=np.float32))
    start = origin(levels)
    step = products[magnitude, sign][levels - start + 255]
    return jnp.clip(start + step, 0, 255).astype(jnp.int32)


def _luma(levels: Array) -> Array:
    """`[H, W, 1]`: ITU-R 601 in 16-bit fractions, as Pillow has it."""
    if levels.shape[-1] == 1:
        return levels
    weights = jnp.array([19595, 38470, 7471])[None, None]
    return (jnp.sum(levels * weights, axis=-1, keepdims=True) + 32768) >> 16


def _grey(levels: Array) -> Array:
    return jnp.broadcast_to(_luma(levels), levels.shape)


def _mean(levels: Array) -> Array:
    luma = _luma(levels)
    return jnp.full_like(levels, (2 * jnp.sum(luma) + luma.size) // (2 * luma.size))


def _smooth(levels: Array) -> Array:
    """A 3x3 mean with five times the weight in the middle; the border stays."""
    height, width, _ = levels.shape
    if min(height, width) < 3:
        return levels
    rows = levels[:-2] + levels[1:-1] + levels[2:]
    total = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * levels[1:-1, 1:-1]
    return levels.at[1:-1, 1:-1].set((2 * total + 13) // 26)


def _posterize(sign, levels: Array, magnitude) -> Array:
    """The leading 8 to 4 bits."""
    bits = np.round(np.linspace(8, 4, MAGNITUDES)).astype(int)
    return levels & jnp.asarray(256 - 2 ** (8 - bits))[magnitude]


def _solarize(sign, levels: Array, magnitude) -> Array:
    """Inverted from a threshold on, 256 to 0."""
    threshold = jnp.asarray(np.linspace(256, 0, MAGNITUDES), jnp.float32)[magnitude]
    return jnp.where(levels < threshold, levels, 255 - levels)


def _autocontrast(sign, levels: Array, magnitude) -> Array:
    """Every channel stretched to the whole range."""
    low, high = (extreme(levels, axis=(0, 1), keepdims=True) for extreme in (jnp.min, jnp.max))
    stretched = (levels - low) * 255 // jnp.maximum(high - low, 1)
    return jnp.where(high > low, stretched, levels)


def _equalize(sign, levels: Array, magnitude) -> Array:
    """Every channel's histogram made flat; nothing happens to images of 255 pixels or fewer."""

    def channel(values: Array) -> Array:
        counts = jnp.bincount(values.reshape(-1), length=256)
        below = jnp.cumsum(counts) - counts
        step = below[jnp.max(values)] // 255
        table = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255)
        return jnp.where(step > 0, table[values], values)

    return jax.vmap(channel, in_axes=-1, out_axes=-1)(levels)
