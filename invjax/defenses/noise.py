"""Additive noise."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from invjax.base import Array, Defense, PyTree, Stage
from invjax.checks import check_number, describe, equals
from invjax.defenses.base import Elementary, from_stages, nothing
from invjax.defenses.law import Law, add_variance


class KeyState(NamedTuple):
    """State of a random stage: the key of its next draw."""

    key: Array


def seeded(key: Array, params: PyTree) -> KeyState:
    """The state of a random stage."""
    del params
    return KeyState(key)


def next_keys(state: KeyState, tree: PyTree) -> tuple[PyTree, KeyState]:
    """One fresh key a leaf, and the following state."""
    key, draw = jax.random.split(state.key)
    return optax.tree.split_key_like(draw, tree), KeyState(key)


def _add(draw: Callable, gradients: PyTree, state: KeyState, scale: Array | float):
    """Add `scale` times fresh draws."""
    keys, state = next_keys(state, gradients)

    def leaf(gradient, key):
        unit = draw(key, gradient.shape, gradient.dtype)
        return gradient + jnp.asarray(scale, gradient.dtype) * unit

    return jax.tree.map(leaf, gradients, keys), state


def gaussian_stage(name: str, stage: Stage, std: Callable[[int], Array | float]) -> Elementary:
    """The stage of Gaussian noise.

    Args:
      name: of the stage.
      stage: where it acts.
      std: standard deviation as a function of the number of samples behind the gradient.

    Returns:
      The stage.
    """

    def update(gradients, state, count):
        return _add(jax.random.normal, gradients, state, std(count))

    def propagate(law: Law, observed, public) -> Law:
        del observed, public
        return add_variance(law, std(law.count) ** 2)

    return Elementary(name, stage, seeded, update, propagate)


def gaussian_noise(std: float, per_sample: bool = False) -> Defense:
    """Independent Gaussian noise on every coordinate.

    Args:
      std: standard deviation, in gradient units; zero does nothing.
      per_sample: whether every sample's gradient gets its own noise before the mean, which then
        carries `std / sqrt(B)` (Balunovic et al. 2022).

    Returns:
      The defence.

    Raises:
      ValueError: a negative deviation.

    Example:
      >>> import jax, invjax
      >>> defense = invjax.defenses.gaussian_noise(0.1)
      >>> gradient = {"w": jax.numpy.zeros(1000)}
      >>> noisy, _ = defense.update(gradient, defense.init(gradient))
      >>> round(float(noisy["w"].std()), 2)
      0.1
    """
    check_number("std", std, 0.0, open_high=True)
    settings = {"per_sample": True} if per_sample else {}
    name = describe("gaussian_noise", std, **settings)
    stage = "per_sample" if per_sample else "aggregate"
    if equals(std, 0):
        return from_stages(nothing(name, stage))
    return from_stages(gaussian_stage(name, stage, lambda count: std))


def laplace_noise(scale: float) -> Defense:
    """Independent Laplace noise on every coordinate of the aggregate.

    The mean of per-sample Laplace noise has no closed form for batches over 1, and for one sample
    it is this; so there is no per-sample form.

    Args:
      scale: the Laplace scale `b`; the standard deviation is `b sqrt(2)`. Zero does nothing.

    Returns:
      The defence.

    Raises:
      ValueError: a negative scale; and, when its law is asked for, two Laplace stages in a chain.
    """
    check_number("scale", scale, 0.0, open_high=True)
    name = describe("laplace_noise", scale)
    if equals(scale, 0):
        return from_stages(nothing(name, "aggregate"))

    def update(gradients, state, count):
        del count
        return _add(jax.random.laplace, gradients, state, scale)

    def propagate(law: Law, observed, public) -> Law:
        del observed, public
        if law.laplace is not None:
            raise ValueError("Two Laplace noises in one chain have no closed-form likelihood here.")
        return law._replace(laplace=scale)

    return from_stages(Elementary(name, "aggregate", seeded, update, propagate))
