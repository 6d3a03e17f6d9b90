"""Log-densities, log-probabilities and their derivatives, accurate far into the tails.

An adversary's first candidates lie thousands of standard deviations from the observation. There
the derivative of `jax.scipy.special.log_ndtr` is wrong in float32 (1 instead of 10^6 at -10^6), so
`log_ndtr` has its own here.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy import special

from invjax import gradients
from invjax.base import Array

# Where the Gaussian is this many times wider, the sum of the two noises is Gaussian to 10^-6.
_WIDE = 30.0
# Intervals whose half is narrower than this many standard deviations are density times width.
_NARROW = 0.03


class Noise(NamedTuple):
    """The sum of independent Gaussian and Laplace noise on one coordinate (or an array of them).

    Attributes:
      gaussian: standard deviation of the Gaussian part, or `None` where there is none.
      laplace: scale of the Laplace part (its standard deviation over sqrt 2), or `None`.
    """

    gaussian: Any
    laplace: Any = None


def deviation(noise: Noise) -> Array:
    """Standard deviation of a noise.

    Args:
      noise: the noise.

    Returns:
      An array of the shape of its parts.
    """
    if noise.laplace is None:
        return jnp.asarray(noise.gaussian)
    if noise.gaussian is None:
        return math.sqrt(2) * jnp.asarray(noise.laplace)
    return jnp.sqrt(jnp.square(noise.gaussian) + 2 * jnp.square(noise.laplace))


@jax.custom_jvp
def log_ndtr(x: Array) -> Array:
    """Logarithm of the standard normal distribution function.

    Args:
      x: array of floats.

    Returns:
      An array like `x`; it and its first derivative are accurate everywhere.
    """
    return special.log_ndtr(x)


@log_ndtr.defjvp
def _log_ndtr_jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    value = special.log_ndtr(x)
    # Laplace's continued fraction of the inverse Mills ratio.
    far = fraction = jnp.maximum(-x, 4.0)
    for term in range(16, 0, -1):
        fraction = far + term / fraction
    near = jnp.exp(-0.5 * jnp.square(jnp.maximum(x, -4.0)) - value) / math.sqrt(2 * math.pi)
    return value, jnp.where(x < -4, fraction, near) * tangent


def log_density(noise: Noise, x: Array) -> Array:
    """Log-density of a noise.

    The sum of both has the symmetric normal-Laplace law (Reed & Jorgensen 2004).

    Args:
      noise: the noise.
      x: where.

    Returns:
      An array of the shape of `x`.
    """
    if noise.laplace is None:
        return _log_normal(x, noise.gaussian)
    if noise.gaussian is None:
        return -gradients.absolute(x) / noise.laplace - jnp.log(2 * jnp.asarray(noise.laplace))
    scale, laplace, wide = _split(noise)
    left, right = _exponential_parts(x, scale, laplace)
    value = jnp.logaddexp(left, right) - jnp.log(2 * laplace)
    return jnp.where(wide, _log_normal(x, deviation(noise)), value)


def log_cdf(noise: Noise, x: Array) -> Array:
    """Log-probability that a noise is at most `x`.

    Args:
      noise: the noise.
      x: where.

    Returns:
      An array of the shape of `x`.
    """
    if noise.laplace is None:
        return log_ndtr(x / noise.gaussian)
    if noise.gaussian is None:
        tail = x / noise.laplace
        above = jnp.log1p(-0.5 * jnp.exp(-jnp.maximum(tail, 0)))
        return jnp.where(tail < 0, tail - math.log(2), above)
    scale, laplace, wide = _split(noise)
    left, right = _exponential_parts(x, scale, laplace)
    normal = log_ndtr(x / scale)
    # left <= normal: at most half of the normal probability goes.
    kept = normal + jnp.log1p(-0.5 * jnp.exp(jnp.minimum(left - normal, 0)))
    return jnp.where(wide, log_ndtr(x / deviation(noise)), jnp.logaddexp(kept, right - math.log(2)))


def log_interval(
    location: Array, center: Array | float, half_width: Array | float, noise: Noise
) -> Array:
    """`log P(|location + noise - center| <= half_width)`.

    Args:
      location: centre of the noise.
      center: centre of the interval.
      half_width: half of the interval's length, positive.
      noise: the noise.

    Returns:
      An array of the shape of `location`; intervals whose half is under 0.03 standard deviations count
      as density times width, which up to 3 deviations from the centre is their probability to 0.2 %,
      but 2 % too much at the peak of a Laplace density.
    """
    distance = jnp.abs(location - center)
    upper = log_cdf(noise, half_width - distance)
    lower = log_cdf(noise, -half_width - distance)
    wide = upper + jnp.log1p(-jnp.exp(jnp.minimum(lower - upper, -1e-6)))
    narrow = log_density(noise, distance) + jnp.log(2 * half_width)
    return jnp.where(half_width < _NARROW * deviation(noise), narrow, wide)


def log_stochastic_rounding(residual: Array, step: Array, noise: Noise) -> Array:
    """Log-probability that stochastic rounding moved a coordinate by `residual`.

    Args:
      residual: the grid point less the coordinate.
      step: the grid's step.
      noise: its deviation is the width of the wall that stands in for impossible moves.

    Returns:
      `log(1 - |residual| / step)` inside one step, a quadratic wall outside.
    """
    relative = jnp.abs(residual) / step
    outside = jnp.maximum(relative - 1 + 1e-3, 0.0) * step
    return jnp.log(jnp.maximum(1 - relative, 1e-3)) - 0.5 * jnp.square(outside / deviation(noise))


def _log_normal(x, scale) -> Array:
    return -0.5 * jnp.square(x / scale) - jnp.log(scale) - 0.5 * math.log(2 * math.pi)


def _split(noise: Noise) -> tuple[Array, Array, Array]:
    """Both scales in the range where the normal-Laplace formulas are exact, and where they are not.

    A Gaussian part of a thousandth of the Laplace scale stands in for smaller ones.
    """
    laplace = jnp.asarray(noise.laplace)
    scale = jnp.maximum(jnp.asarray(noise.gaussian), 1e-3 * laplace)
    return scale, jnp.maximum(laplace, scale / _WIDE), scale > _WIDE * laplace


def _exponential_parts(x: Array, scale: Array, laplace: Array) -> tuple[Array, Array]:
    """Log of the two exponential tails, each smoothed by the Gaussian."""
    ratio, tail = scale / laplace, x / laplace
    left = log_ndtr(x / scale - ratio) - tail
    right = log_ndtr(-x / scale - ratio) + tail
    return left + 0.5 * jnp.square(ratio), right + 0.5 * jnp.square(ratio)
