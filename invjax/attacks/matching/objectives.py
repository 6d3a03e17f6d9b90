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
from invjax.checks import check_number


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


def _leaf_by_leaf(
    distance: Callable[[Array, Array], Array], weights: PyTree | None, name: str
) -> Objective:
    def value(candidate, observation):
        return _weighted(weights, jax.tree.map(distance, candidate, observation.gradient))

    return Objective(value, name=name)


def squared_l2(weights: PyTree | None = None) -> Objective:
    """Sum of squared differences (Zhu et al. 2019, DLG; equation 4).

    Args:
      weights: tree like the parameters with a scalar a leaf; ones by default.

    Returns:
      The objective.
    """
    return _leaf_by_leaf(lambda a, b: jnp.sum(jnp.square(a - b)), weights, "squared_l2")


def l1(weights: PyTree | None = None) -> Objective:
    """Sum of absolute differences.

    Args:
      weights: tree like the parameters with a scalar a leaf; ones by default.

    Returns:
      The objective.
    """
    return _leaf_by_leaf(lambda a, b: jnp.sum(gradients.absolute(a - b)), weights, "l1")


def squared_l2_and_l1(weight: float = 0.01) -> Objective:
    """Squared L2 plus weighted L1 (Deng et al. 2021, TAG).

    Args:
      weight: of the L1 part.

    Returns:
      The objective.

    Raises:
      ValueError: a negative weight.
    """
    check_number("weight", weight, 0.0)

    def value(candidate, observation):
        squares = squared_l2().value(candidate, observation)
        return squares + weight * l1().value(candidate, observation)

    return Objective(value, name="squared_l2_and_l1")


def _cosine(dot: Array, squared_a: Array, squared_b: Array) -> Array:
    # Floors keep value and derivative finite at a zero gradient, where the cosine is undefined. One
    # for each norm: a trained network's gradients are small, and the product of two still smaller.
    a, b = (jnp.sqrt(jnp.maximum(squared, 1e-30)) for squared in (squared_a, squared_b))
    return 1.0 - dot / a / b


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
    """One minus the cosine of every leaf, summed (Chen and Campbell 2022).

    Args:
      weights: tree like the parameters with a scalar a leaf; ones by default.

    Returns:
      The objective.
    """

    def distance(a, b):
        return _cosine(jnp.sum(a * b), jnp.sum(a * a), jnp.sum(b * b))

    return _leaf_by_leaf(distance, weights, "cosine_per_layer")


def matched(defense: Defense, slack: float | None = None) -> Objective:
    """Negative log-likelihood of the defence's own channel (Balunovic et al. 2022).

    Args:
      defense: the defence that the client used; its deterministic part is replayed on the candidate.
      slack: standard deviation, in gradient units, that stands in where the channel is deterministic; a
        thousandth of the observation's root mean square by default.

    Returns:
      The objective; it wants per-sample gradients where the defence acts on them.

    Raises:
      ValueError: a slack that is not positive.
    """
    if slack is not None:
        check_number("slack", slack, 0.0, open_low=True)

    def value(candidate, observation):
        return -defense.log_likelihood(observation.gradient, candidate, observation.public, slack)

    return Objective(value, defense.stage, name=f"matched[{defense.name}]")
