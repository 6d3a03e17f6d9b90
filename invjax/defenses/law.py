"""The law of a defended gradient given a candidate: what a matched adversary can compute.

A defence is a chain of stages; each stage moves the law of its input to the law of its output.
The end of the chain gives the likelihood of the observation. Coordinates are independent given the
candidate, so the law is a tree of per-coordinate numbers.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from invjax.base import Array, PyTree
from invjax.defenses import densities
from invjax.defenses.densities import Noise, log_density, log_interval, log_stochastic_rounding
from invjax.gradients import mean_samples


class Rounding(NamedTuple):
    """How the observation was rounded.

    Attributes:
      kind: to the `nearest` point of the grid, or to one of the two beside by chance (`stochastic`).
      steps: tree of grid steps, one a tensor, in gradient units.
    """

    kind: Literal["nearest", "stochastic"]
    steps: PyTree


class Law(NamedTuple):
    """Per-coordinate law of an observation given a candidate gradient.

    An observed coordinate is `location + Gaussian + Laplace`, perhaps dropped, pruned or rounded.

    Attributes:
      location: tree, the deterministic part replayed on the candidate; differentiable.
      count: samples behind the gradient (static).
      slack: standard deviation that stands in where the channel is deterministic.
      variance: tree of Gaussian variances, or `None` where no Gaussian noise was added.
      laplace: Laplace scale, or `None`.
      dropped: probability that a mask, unknown to the adversary, zeroed the location; or `None`.
      informative: tree of booleans, the coordinates that the location explains; `None` for all.
      pruned: tree of thresholds, one a tensor: a zero of the observation says that the coordinate
        lay within, and nothing where the threshold is infinite; `None` where nothing was pruned, or
        the zeros cannot be seen.
      rounding: the last rounding, or `None`.
      log_weight: log-likelihood of what is not in the fields above (signs).
    """

    location: PyTree
    count: int
    slack: Array | float
    variance: PyTree | None = None
    laplace: Array | float | None = None
    dropped: Array | float | None = None
    informative: PyTree | None = None
    pruned: PyTree | None = None
    rounding: Rounding | None = None
    log_weight: Array | float = 0.0

    @property
    def noisy(self) -> bool:
        """Whether any continuous noise was added."""
        return self.variance is not None or self.laplace is not None


def noise(law: Law) -> PyTree:
    """The noise on every coordinate; Gaussian of the slack's width where there is none.

    Args:
      law: the law.

    Returns:
      A tree of `densities.Noise`.
    """
    laplace = law.laplace
    if law.variance is None:
        # A traced scale may turn out zero.
        scale = None if laplace is None else jnp.where(laplace > 0, laplace, law.slack)
        part = Noise(law.slack if laplace is None else None, scale)
        return jax.tree.map(lambda _: part, law.location)

    def leaf(variance):
        total = variance + (0.0 if laplace is None else 2 * jnp.square(laplace))
        variance = jnp.where(total > 0, variance, jnp.square(law.slack))
        return Noise(jnp.sqrt(jnp.maximum(variance, 1e-30)), laplace)

    return jax.tree.map(leaf, law.variance)


def deviation(law: Law) -> PyTree:
    """Standard deviation of every coordinate of a law; the slack where it is deterministic.

    Args:
      law: the law.

    Returns:
      A tree like `law.location`.
    """

    def leaf(location, noise):
        return jnp.broadcast_to(densities.deviation(noise), location.shape)

    return jax.tree.map(leaf, law.location, noise(law))


def add_variance(law: Law, variance: PyTree) -> Law:
    """The law after independent Gaussian noise.

    Args:
      law: the law before.
      variance: of the noise, one number or a tree.

    Returns:
      The law after.
    """
    variance = jax.tree.map(
        lambda leaf, part: jnp.broadcast_to(jnp.asarray(part, leaf.dtype), leaf.shape),
        law.location,
        jax.tree.broadcast(variance, law.location),
    )
    if law.variance is not None:
        variance = jax.tree.map(jnp.add, law.variance, variance)
    return law._replace(variance=variance)


def rescale(law: Law, factor: Array | float) -> Law:
    """The law after multiplication by a number.

    Args:
      law: the law before.
      factor: a scalar.

    Returns:
      The law after.
    """
    return law._replace(
        location=jax.tree.map(lambda leaf: leaf * factor, law.location),
        variance=jax.tree.map(lambda leaf: leaf * factor**2, law.variance),
        laplace=None if law.laplace is None else law.laplace * factor,
    )


def inform(law: Law, mask: PyTree) -> Law:
    """The law after a mask that the adversary knows.

    Args:
      law: the law before.
      mask: tree of booleans, false where the gradient was zeroed.

    Returns:
      The law after.
    """
    location = jax.tree.map(lambda leaf, kept: jnp.where(kept, leaf, 0.0), law.location, mask)
    if law.informative is not None:
        mask = jax.tree.map(jnp.logical_and, law.informative, mask)
    return law._replace(location=location, informative=mask)


def aggregate(law: Law) -> Law:
    """From the law of per-sample gradients (leading axis) to the law of their mean.

    Args:
      law: the law before.

    Returns:
      The law after.

    Raises:
      ValueError: per-sample Laplace noise of more than one sample.
    """
    if law.laplace is not None and law.count > 1:
        raise ValueError(
            "The mean of per-sample Laplace noise has no closed form for batches over 1."
        )
    variance = jax.tree.map(lambda leaf: leaf / law.count, mean_samples(law.variance))
    return law._replace(location=mean_samples(law.location), variance=variance)


def mix(law: Law, slab: Array, spike: Array) -> Array:
    """Log-likelihood under an unknown mask.

    Args:
      law: the law.
      slab: log-likelihoods of coordinates that passed the mask.
      spike: log-likelihoods of coordinates that it zeroed.

    Returns:
      Log-likelihoods: the slab's where nothing was dropped.
    """
    if law.dropped is None:
        return slab
    return jnp.logaddexp(jnp.log1p(-jnp.asarray(law.dropped)) + slab, jnp.log(law.dropped) + spike)


def log_likelihood(law: Law, observed: PyTree) -> Array:
    """Log-likelihood of an observation.

    Where a rounding meets a noise before it, stochastic rounding counts as Gaussian noise of the
    same variance, `step^2 / 6`; rounding to the nearest is exact but for the outermost cells, which
    are taken as whole ones.

    Args:
      law: the law of the observation given the candidate.
      observed: the defended gradient, a tree like `law.location`.

    Returns:
      A scalar; comparable between candidates of one observation.
    """
    rounding = law.rounding

    def coordinate(observed, location, noise, step, threshold):
        # Half precision cannot tell candidates apart in so large a sum.
        wide = jnp.result_type(observed, location, jnp.float32)
        observed, location = observed.astype(wide), location.astype(wide)
        residual = observed - location
        if rounding is None:
            value = log_density(noise, residual)
        elif rounding.kind == "nearest":
            value = log_interval(residual, 0.0, step / 2, noise)
        elif not law.noisy:
            value = log_stochastic_rounding(residual, step, noise)
        else:
            before = 0.0 if noise.gaussian is None else jnp.square(noise.gaussian)
            spread = jnp.sqrt(before + jnp.square(step) / 6)
            value = log_density(Noise(spread, noise.laplace), residual) + jnp.log(step)
        if law.pruned is not None:
            known = jnp.isfinite(threshold)
            below = log_interval(location, 0.0, jnp.where(known, threshold, 1.0), noise)
            value = jnp.where(observed == 0, jnp.where(known, below, 0.0), value)
        return value

    def leaf(observed, location, noise, informative, *rest):
        slab = coordinate(observed, location, noise, *rest)
        if law.dropped is not None:
            spike = coordinate(observed, jnp.zeros_like(location), noise, *rest)
            # What was zeroed, and no noise added, is zero.
            if not law.noisy:
                spike = jnp.where(observed == 0, spike, -jnp.inf)
            slab = mix(law, slab, spike)
        return jnp.where(informative, slab, 0.0).sum()

    unused = jax.tree.map(lambda _: True, observed)
    terms = jax.tree.map(
        leaf,
        observed,
        law.location,
        noise(law),
        unused if law.informative is None else law.informative,
        unused if rounding is None else rounding.steps,
        unused if law.pruned is None else law.pruned,
    )
    return jnp.asarray(optax.tree.sum(terms) + law.log_weight)


def need_public(name: str, what: str, public: Any) -> None:
    """Refuse to make a law without what the defence published.

    Args:
      name: of the defence.
      what: what it published.
      public: what the observation holds of it.

    Raises:
      ValueError: the observation holds nothing.
    """
    if public is None:
        raise ValueError(
            f"{name}: the likelihood needs {what}; pass public=defense.public(state), which "
            "invjax.observe puts into observation.public."
        )
