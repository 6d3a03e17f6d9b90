"""The law of a defended gradient given a candidate: what a matched adversary can compute.

A defence is a chain of stages; each stage moves the law of its input to the law of its output.
The end of the chain gives the likelihood of the observation. Coordinates are independent given the
candidate, so the law is a tree of per-coordinate numbers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.scipy.special import log_ndtr

from invjax.base import Array, PyTree


class Rounding(NamedTuple):
    """How the observation was rounded: `kind` is `nearest` or `stochastic`, `steps` a tree of grid steps."""

    kind: str
    steps: PyTree


class Law(NamedTuple):
    """Per-coordinate law of an observation given a candidate gradient.

    An observed coordinate is `location + Gaussian + Laplace`, perhaps rounded, perhaps dropped.

    Attributes:
      location: tree, the deterministic part replayed on the candidate; differentiable.
      count: samples behind the gradient (static).
      slack: standard deviation that stands in where the channel is deterministic.
      variance: tree of Gaussian variances, or `None` where no Gaussian noise was added.
      laplace: Laplace scale, or `None`.
      dropped: probability that a mask, unknown to the adversary, zeroed the location; or `None`.
      informative: tree of booleans, the coordinates that the location explains; `None` for all.
      rounding: the last rounding, or `None`.
      log_weight: log-likelihood of what is not per-coordinate noise (signs, pruned coordinates).
    """

    location: PyTree
    count: int
    slack: Array | float
    variance: PyTree | None = None
    laplace: Array | float | None = None
    dropped: Array | float | None = None
    informative: PyTree | None = None
    rounding: Rounding | None = None
    log_weight: Array | float = 0.0


def deviation(law: Law) -> PyTree:
    """Standard deviation of every coordinate of a law; the slack where it is deterministic."""
    extra = law.slack**2 if law.variance is None and law.laplace is None else 0.0
    extra = extra if law.laplace is None else extra + 2 * jnp.square(law.laplace)
    if law.variance is None:
        return jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.sqrt(extra)), law.location)
    return jax.tree.map(lambda variance: jnp.sqrt(variance + extra), law.variance)


def inform(law: Law, mask: PyTree) -> PyTree:
    """The law's informative coordinates, restricted to `mask`."""
    if law.informative is None:
        return mask
    return jax.tree.map(jnp.logical_and, law.informative, mask)


def aggregate(law: Law) -> Law:
    """From the law of per-sample gradients (leading axis) to the law of their mean."""
    if law.laplace is not None and law.count > 1:
        raise ValueError(
            "The mean of per-sample Laplace noise has no closed form for batches over 1."
        )

    def mean(tree, power=1):
        return jax.tree.map(lambda leaf: leaf.mean(axis=0) / law.count ** (power - 1), tree)

    return law._replace(
        location=mean(law.location),
        variance=None if law.variance is None else mean(law.variance, power=2),
    )


def log_interval(location: Array, center: Array | float, half_width: Array, scale: Array) -> Array:
    """`log P(|location + N(0, scale^2) - center| <= half_width)`, stable in both tails."""
    distance = jnp.abs(location - center)
    upper = log_ndtr((half_width - distance) / scale)
    lower = log_ndtr((-half_width - distance) / scale)
    return upper + jnp.log1p(-jnp.exp(jnp.minimum(lower - upper, -1e-7)))


def _log_normal(residual: Array, scale: Array) -> Array:
    return -0.5 * jnp.square(residual / scale) - jnp.log(scale) - 0.5 * jnp.log(2 * jnp.pi)


def _log_normal_laplace(residual: Array, scale: Array, laplace: Array | float) -> Array:
    """Density of `N(0, scale^2) + Laplace(laplace)` (Reed 2006, the symmetric normal-Laplace law)."""
    ratio, tail = scale / laplace, residual / laplace
    left = log_ndtr(residual / scale - ratio) - tail
    right = log_ndtr(-residual / scale - ratio) + tail
    return 0.5 * jnp.square(ratio) - jnp.log(2 * laplace) + jnp.logaddexp(left, right)


def _log_stochastic_rounding(residual: Array, step: Array, slack: Array) -> Array:
    """`log(1 - |residual| / step)` inside one grid step, a quadratic wall of width `slack` outside."""
    relative = jnp.abs(residual) / step
    outside = jnp.maximum(relative - 1 + 1e-3, 0.0) * step
    return jnp.log(jnp.maximum(1 - relative, 1e-3)) - 0.5 * jnp.square(outside / slack)


def log_density(law: Law, residual: Array, scale: Array, step: Array | None) -> Array:
    """Log-density of one leaf's residuals under the law's noise.

    Args:
      law: the law; says which noises are there.
      residual: observation minus location.
      scale: the leaf's standard deviations (of the Gaussian part where there is one).
      step: the leaf's grid step where the law has a rounding.

    Returns:
      Log-densities of the residual's shape (log-probabilities where rounded).
    """
    if law.rounding is not None:
        assert step is not None
        if law.rounding.kind == "nearest":
            return log_interval(residual, 0.0, step / 2, scale)
        if law.variance is None and law.laplace is None:
            return _log_stochastic_rounding(residual, step, scale)
        # Gaussian plus triangular noise, matched in its second moment.
        return _log_normal(residual, jnp.sqrt(jnp.square(scale) + jnp.square(step) / 6))
    if law.laplace is None:
        return _log_normal(residual, scale)
    if law.variance is None:
        return -jnp.abs(residual) / law.laplace - jnp.log(2 * law.laplace)
    gaussian = jnp.sqrt(jnp.maximum(jnp.square(scale) - 2 * jnp.square(law.laplace), 1e-30))
    return _log_normal_laplace(residual, gaussian, law.laplace)


def log_likelihood(law: Law, observed: PyTree) -> Array:
    """Log-likelihood of an observation.

    Args:
      law: the law of the observation given the candidate.
      observed: the defended gradient, a tree like `law.location`.

    Returns:
      A scalar; comparable between candidates of one observation.
    """
    scales = deviation(law)
    everywhere = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), observed)
    informative = everywhere if law.informative is None else law.informative
    steps = everywhere if law.rounding is None else law.rounding.steps

    def leaf(observed, location, scale, informative, step):
        step = None if law.rounding is None else step
        logp = log_density(law, observed - location, scale, step)
        if law.dropped is not None:
            spike = log_density(law, observed, scale, step)
            logp = jnp.logaddexp(
                jnp.log1p(-jnp.asarray(law.dropped)) + logp, jnp.log(law.dropped) + spike
            )
        return jnp.where(informative, logp, 0.0).sum()

    terms = jax.tree.map(leaf, observed, law.location, scales, informative, steps)
    return optax.tree.sum(terms) + law.log_weight
