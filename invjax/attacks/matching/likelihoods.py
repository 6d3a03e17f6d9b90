"""Likelihoods by name: negative log-densities of the observation given a candidate's gradient.

`objectives.matched` reads the exact one from the client's defence. These are for an adversary who
assumes one, and for comparing attacks with what they assume (Balunovic et al. 2022, table 1). Each
is up to its constant.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from invjax.attacks.matching.objectives import Objective, cosine, l1
from invjax.base import Array, Observation, Params, PyTree
from invjax.checks import check_number


def gaussian(std: float | PyTree, per_sample: bool = False) -> Objective:
    """Gaussian noise: the sum of squared differences over `2 std^2`.

    Args:
      std: standard deviation, in gradient units: one number, or a tree like the parameters, of numbers
        or arrays of a leaf's shape.
      per_sample: whether it is that of the noise on every sample's gradient; that on the mean of `B`
        is then `std / sqrt(B)`, and the observation must say how many there are.

    Returns:
      The objective.

    Raises:
      ValueError: a standard deviation that is not positive; at its use with `per_sample`, an
        observation that does not tell its batch size.
    """
    for leaf in jax.tree.leaves(std):
        check_number("std", leaf.min() if jnp.ndim(leaf) else leaf, 0.0, open_low=True)

    def value(candidate, observation):
        deviations = jax.tree.broadcast(std, candidate)

        def term(a, b, s):
            return jnp.sum(jnp.square((a - b) / s)) / 2

        terms = jax.tree.map(term, candidate, observation.gradient, deviations)
        return _total(terms) * (_samples(observation) if per_sample else 1)

    return Objective(value, name="gaussian")


def laplace(scale: float) -> Objective:
    """Laplace noise on the observation: the sum of absolute differences over `scale`.

    Args:
      scale: of the density; the standard deviation over the square root of two. The mean of several
        samples' Laplace noise has another law: this is for noise on the aggregate, or one sample.

    Returns:
      The objective.

    Raises:
      ValueError: a scale that is not positive.
    """
    check_number("scale", scale, 0.0, open_low=True)
    return Objective(
        lambda candidate, observation: l1().value(candidate, observation) / scale, name="laplace"
    )


def von_mises_fisher(concentration: float, weights: PyTree | None = None) -> Objective:
    """A law of the direction alone: `concentration` times one minus the cosine.

    Args:
      concentration: how narrow it is.
      weights: as of `objectives.cosine`.

    Returns:
      The objective.

    Raises:
      ValueError: a concentration that is not positive.
    """
    check_number("concentration", concentration, 0.0, open_low=True)
    inner = cosine(weights)
    return Objective(
        lambda candidate, observation: concentration * inner.value(candidate, observation),
        name="von_mises_fisher",
    )


def product(*likelihoods: Objective) -> Objective:
    """Product of densities: the sum of the terms; Gaussian times Laplace is that of TAG.

    Args:
      *likelihoods: of one stage.

    Returns:
      The objective.

    Raises:
      ValueError: none, or some want per-sample gradients and some do not.
    """
    stages = {one.stage for one in likelihoods}
    if len(stages) != 1:
        raise ValueError(f"likelihoods must be some of one stage, got {[*likelihoods]}.")
    return Objective(
        lambda candidate, observation: _total(
            [one.value(candidate, observation) for one in likelihoods]
        ),
        *stages,
        name="*".join(one.name for one in likelihoods),
    )


def masked(likelihood: Objective, mask: PyTree) -> Objective:
    """A known mask: coordinates that it zeroed say nothing.

    Args:
      likelihood: of the others; additive over coordinates, or a cosine.
      mask: tree of booleans like the parameters, false where the gradient was zeroed.

    Returns:
      The objective.
    """

    def kept(tree):
        return jax.tree.map(lambda leaf, mask: jnp.where(mask, leaf, 0.0), tree, mask)

    def value(candidate, observation):
        seen = observation._replace(gradient=kept(observation.gradient))
        return likelihood.value(kept(candidate), seen)

    return Objective(value, likelihood.stage, name=f"masked[{likelihood.name}]")


def spike_and_slab(std: float, fraction: float) -> Objective:
    """An unknown mask below Gaussian noise: every coordinate passed it, or did not.

    `-sum log((1 - p) N(b; a, std^2) + p N(b; 0, std^2))`, the exact marginal over independent masks.

    Args:
      std: standard deviation of the noise.
      fraction: probability `p` that a coordinate was zeroed.

    Returns:
      The objective.

    Raises:
      ValueError: a number out of range.
    """
    check_number("std", std, 0.0, open_low=True)
    check_number("fraction", fraction, 0.0, 1.0, open_low=True, open_high=True)

    def value(candidate, observation):
        def leaf(a, b):
            slab, spike = (-jnp.square((b - at) / std) / 2 for at in (a, 0.0))
            mixed = jnp.logaddexp(jnp.log1p(-fraction) + slab, jnp.log(fraction) + spike)
            return -jnp.sum(mixed)

        return _total(jax.tree.map(leaf, candidate, observation.gradient))

    return Objective(value, name="spike_and_slab")


def top_k(std: float) -> Objective:
    """Magnitude pruning: a tensor's largest coordinates are seen, the others are known to be smaller.

    Seen coordinates are Gaussian; an unseen one costs what the candidate exceeds the smallest seen
    magnitude of its tensor by, squared: the hinge that a wall of Gaussian width leaves.

    Args:
      std: standard deviation of the seen, and width of the wall.

    Returns:
      The objective.

    Raises:
      ValueError: a standard deviation that is not positive.
    """
    check_number("std", std, 0.0, open_low=True)

    def value(candidate, observation):
        def leaf(a, b):
            size = jnp.abs(b)
            threshold = jnp.min(jnp.where(b == 0, jnp.inf, size))
            residual = jnp.where(b == 0, jax.nn.relu(jnp.abs(a) - threshold), a - b)
            return jnp.sum(jnp.square(residual / std)) / 2

        return _total(jax.tree.map(leaf, candidate, observation.gradient))

    return Objective(value, name="top_k")


def drop_layers(params: Params, dropped: Callable[[str], bool]) -> PyTree:
    """Weights of an objective that leave some parameters out.

    Args:
      params: a parameter tree.
      dropped: says of a leaf's path, as `jax.tree_util.keystr` writes it, whether it is left out.

    Returns:
      A tree of ones and zeros, for `weights` of `objectives.squared_l2`, `l1`, `cosine`,
      `cosine_per_layer`.

    Raises:
      ValueError: no leaf, or every one of them, is left out.
    """
    weights = jax.tree.map_with_path(
        lambda path, _: 0.0 if dropped(jax.tree_util.keystr(path)) else 1.0, params
    )
    if len(set(jax.tree.leaves(weights))) != 2:
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
        raise ValueError(f"dropped must pick some of the leaves and not all: {', '.join(paths)}.")
    return weights


def _samples(observation: Observation) -> int:
    size = observation.facts.batch_size
    if size is None:
        raise ValueError("per_sample=True, but the observation does not say how many there are.")
    return size


def _total(terms: PyTree) -> Array:
    return jnp.asarray(optax.tree.sum(terms))
