"""The Bayes-optimal objective: the posterior's mass in a ball around the candidate, and its bounds."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from invjax.base import Array
from invjax.checks import check_count, check_number

Mode = Literal["jensen", "exact_mc"]


class Ball(NamedTuple):
    """How the posterior around a candidate is summed up (Balunovic et al. 2022, section 3).

    Attributes:
      delta: radius, in the L2 norm over the whole batch of inputs; input units.
      num_samples: points drawn in the ball at every step.
      mode: `jensen` averages the log-posterior, their surrogate; `exact_mc` takes the logarithm of
        the average, a consistent estimate of the mass itself. Where the posterior has a narrow peak
        and a broad one the surrogate prefers the broad one, at the wrong place.
      antithetic: draw pairs `u, -u`; for a quadratic log-posterior their noise cancels exactly.
    """

    delta: float
    num_samples: int = 10
    mode: Mode = "jensen"
    antithetic: bool = True


def check_ball(ball: Ball) -> None:
    """Refuse a ball that cannot be sampled.

    Args:
      ball: what was given.

    Raises:
      ValueError: a radius that is not positive, no samples, an odd number of antithetic ones, an
        unknown mode.
    """
    if ball.mode not in get_args(Mode):
        raise ValueError(f"mode must be 'map' or one of {get_args(Mode)}, got {ball.mode!r}.")
    check_number("delta", ball.delta, 0.0, open_low=True)
    check_count("num_samples", ball.num_samples, 1)
    if ball.antithetic and ball.num_samples % 2:
        raise ValueError(f"num_samples must be even for antithetic pairs, got {ball.num_samples}.")


def sample_ball(key: Array, ball: Ball, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    """Points that are uniform in the ball.

    The radius is `delta * U^(1/d)`; with `delta * U`, as in the authors' code, the points crowd
    around the centre: `E |u|^2` is then `delta^2 / 3` instead of `delta^2 d / (d + 2)`.

    Args:
      key: a PRNG key.
      ball: radius, number, antithetic or not.
      shape: of one point.
      dtype: of the points.

    Returns:
      `[num_samples, *shape]`.
    """
    number = ball.num_samples // 2 if ball.antithetic else ball.num_samples
    unit = jnp.asarray(jax.random.ball(key, math.prod(shape), shape=(number,), dtype=dtype))
    points = ball.delta * unit.reshape((number, *shape))
    return jnp.concatenate([points, -points]) if ball.antithetic else points


def over_ball(
    value: Callable[[Array], Array], ball: Ball | None, key: Array | None
) -> Callable[[Array], Array]:
    """A negative log-posterior, summed up over a ball.

    Args:
      value: `value(inputs) -> scalar`, the negative log-posterior.
      ball: the ball; `None` for the posterior's mode.
      key: of the points; `None` without a ball.

    Returns:
      `inputs -> scalar`, lower is better.
    """
    if ball is None or key is None:
        return value

    def summed(inputs: Array) -> Array:
        points = sample_ball(key, ball, inputs.shape, inputs.dtype)
        values = jax.vmap(lambda offset: value(inputs + offset))(points)
        if ball.mode == "jensen":
            return values.mean()
        return jnp.log(ball.num_samples) - jax.nn.logsumexp(-values)

    return summed
