"""Data terms of gradient matching: how far a candidate's gradient is from the observation.

Every objective is a negative log-likelihood up to constants: squared L2 is Gaussian noise, L1 is
Laplace noise, the cosine is a von Mises-Fisher law of the direction, and `matched` reads the exact
likelihood from the defence (Balunovic et al. 2022, table 1).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from invjax import gradients
from invjax.base import Array, Defense, Observation, PyTree, Stage


class Objective(NamedTuple):
    """A data term.

    Attributes:
      value: `value(candidate, observation) -> scalar`, lower is better.
      stage: whether `candidate` is a per-sample gradient (leading sample axis) or their mean.
      name: for tables.
    """

    value: Callable[[PyTree, Observation], Array]
    stage: Stage = "aggregate"
    name: str = "objective"


def _weighted(weights: PyTree | None, terms: PyTree) -> Array:
    terms = terms if weights is None else jax.tree.map(jnp.multiply, weights, terms)
    return jnp.asarray(optax.tree.sum(terms))


def squared_l2(weights: PyTree | None = None) -> Objective:
    """Sum of squared differences (Zhu et al. 2019, DLG; equation 4).

    Args:
      weights: tree like the parameters with a scalar a leaf; ones by default.

    Returns:
      The objective.
    """

    def value(candidate, observation):
        return _weighted(
            weights,
            jax.tree.map(lambda a, b: jnp.sum(jnp.square(a - b)), candidate, observation.gradient),
        )

    return Objective(value, name="squared_l2")


def l1(weights: PyTree | None = None) -> Objective:
    """Sum of absolute differences.

    Args:
      weights: tree like the parameters with a scalar a leaf; ones by default.

    Returns:
      The objective.
    """

    def value(candidate, observation):
        return _weighted(
            weights,
            jax.tree.map(
                lambda a, b: jnp.sum(gradients.absolute(a - b)), candidate, observation.gradient
            ),
        )

    return Objective(value, name="l1")


def squared_l2_and_l1(weight: float = 0.01) -> Objective:
    """Squared L2 plus weighted L1 (Deng et al. 2021, TAG).

    Args:
      weight: of the L1 part.

    Returns:
      The objective.
    """

    def value(candidate, observation):
        return squared_l2().value(candidate, observation) + weight * l1().value(
            candidate, observation
        )

    return Objective(value, name="squared_l2_and_l1")


def _cosine(dot: Array, squared_a: Array, squared_b: Array) -> Array:
    # The floor keeps value and derivative finite at a zero gradient, where the cosine is undefined.
    return 1.0 - dot / jnp.sqrt(jnp.maximum(squared_a * squared_b, 1e-30))


def cosine(weights: PyTree | None = None) -> Objective:
    """One minus the cosine of the whole gradients (Geiping et al. 2020, equation 4).

    Args:
      weights: tree like the parameters with a scalar a leaf, a weight of its inner products; zero
        drops a leaf.

    Returns:
      The objective.
    """

    def value(candidate, observation):
        def inner(a, b):
            return _weighted(weights, jax.tree.map(lambda a, b: jnp.sum(a * b), a, b))

        observed = observation.gradient
        return _cosine(
            inner(candidate, observed), inner(candidate, candidate), inner(observed, observed)
        )

    return Objective(value, name="cosine")


def cosine_per_layer(weights: PyTree | None = None) -> Objective:
    """One minus the cosine of every leaf, summed.

    Args:
      weights: tree like the parameters with a scalar a leaf; ones by default.

    Returns:
      The objective.
    """

    def value(candidate, observation):
        def leaf(a, b):
            return _cosine(jnp.sum(a * b), jnp.sum(a * a), jnp.sum(b * b))

        return _weighted(weights, jax.tree.map(leaf, candidate, observation.gradient))

    return Objective(value, name="cosine_per_layer")


def matched(defense: Defense, slack: float | None = None) -> Objective:
    """Negative log-likelihood of the defence's own channel (Balunovic et al. 2022).

    Args:
      defense: the defence that the client used; its deterministic part is replayed on the candidate.
      slack: standard deviation that stands in where the channel is deterministic; a thousandth of
        the observation's root mean square by default.

    Returns:
      The objective; it wants per-sample gradients where the defence acts on them.
    """

    def value(candidate, observation):
        return -defense.log_likelihood(observation.gradient, candidate, observation.public, slack)

    return Objective(value, defense.stage, name=f"matched[{defense.name}]")
