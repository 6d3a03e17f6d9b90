"""Additive noise."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from invjax.base import Array, Defense, PyTree
from invjax.defenses.base import Elementary, from_stages
from invjax.defenses.checks import check
from invjax.defenses.law import Law


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


def add_variance(law: Law, variance: Array | float) -> Law:
    """The law after independent Gaussian noise of a variance."""
    before = law.variance
    if before is None:
        before = jax.tree.map(jnp.zeros_like, law.location)
    return law._replace(variance=jax.tree.map(lambda leaf: leaf + variance, before))


def gaussian_stage(name: str, stage: Any, std: Callable[[int], Any]) -> Elementary:
    """Gaussian noise whose standard deviation may depend on the number of samples."""

    def update(gradients, state, count):
        keys, state = next_keys(state, gradients)
        scale = std(count)

        def leaf(gradient, key):
            noise = jax.random.normal(key, gradient.shape, gradient.dtype)
            return gradient + jnp.asarray(scale, gradient.dtype) * noise

        return jax.tree.map(leaf, gradients, keys), state

    def propagate(law: Law, observed, public) -> Law:
        del observed, public
        scale = std(law.count)
        # No noise at all must leave the law deterministic, not a Gaussian of width zero.
        if isinstance(scale, int | float) and scale == 0:
            return law
        return add_variance(law, scale**2)

    return Elementary(name, stage, seeded, update, propagate)


def gaussian_noise(std: float, per_sample: bool = False) -> Defense:
    """Independent Gaussian noise on every coordinate.

    Args:
      std: standard deviation, in gradient units.
      per_sample: whether every sample's gradient gets its own noise before the mean, which then
        carries `std / sqrt(B)` (Balunovic et al. 2022).

    Returns:
      The defence.

    Raises:
      ValueError: a negative scale.
    """
    check("std", std, 0.0)
    name = f"gaussian_noise({std}{', per_sample=True' if per_sample else ''})"
    stage = "per_sample" if per_sample else "aggregate"
    return from_stages(gaussian_stage(name, stage, lambda count: std))


def laplace_noise(scale: float) -> Defense:
    """Independent Laplace noise on every coordinate of the aggregate.

    Args:
      scale: the Laplace scale `b`; the standard deviation is `b sqrt(2)`.

    Returns:
      The defence.

    Raises:
      ValueError: a negative scale; and, when its law is asked for, two Laplace stages in a chain.
    """
    check("scale", scale, 0.0)

    def update(gradients, state, count):
        del count
        keys, state = next_keys(state, gradients)

        def leaf(gradient, key):
            noise = jax.random.laplace(key, gradient.shape, gradient.dtype)
            return gradient + jnp.asarray(scale, gradient.dtype) * noise

        return jax.tree.map(leaf, gradients, keys), state

    def propagate(law: Law, observed, public) -> Law:
        del observed, public
        if isinstance(scale, int | float) and scale == 0:
            return law
        if law.laplace is not None:
            raise ValueError("Two Laplace noises in one chain have no closed-form likelihood.")
        return law._replace(laplace=scale)

    return from_stages(
        Elementary(f"laplace_noise({scale})", "aggregate", seeded, update, propagate)
    )
