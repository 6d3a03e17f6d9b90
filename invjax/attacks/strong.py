"""The strong attack on deep networks: an untrained generator, guided by features that algebra recovers."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from invjax import gradients
from invjax.attacks import labels as label_recovery
from invjax.attacks.analytic.tensor.head import (
    HeadFeatures,
    check_size,
    head_features,
    head_layers,
    head_problem,
    head_span,
)
from invjax.attacks.matching import generator as generators
from invjax.attacks.matching import objectives, presets, priors
from invjax.attacks.matching.loop import Initializer, State, gradient_matching, normal
from invjax.attacks.matching.loss import as_variables
from invjax.base import Array, Attack, Batch, Model, Observation, Reconstruction
from invjax.checks import check_choice, check_number
from invjax.models.layers import apply_layers
from invjax.observe import check_observation, check_sgd, per_step_gradient

Guide = Literal["subspace", "features", "none"]
Labels = Literal["known", "recovered"]


class Guidance(NamedTuple):
    """What the gradient of the dense head told of the features.

    Attributes:
      features: `[B, d]`, in the order of the labels; zero where they are not finite or were not sought.
      reliability: `[B]` in [0, 1], of each.
      subspace: `[B, d]`, orthonormal rows that span them.
      gate: how far the span can be relied on, in [0, 1].
    """

    features: Array
    reliability: Array
    subspace: Array
    gate: Array


def strong(
    model: Model,
    *,
    guide: Guide = "subspace",
    weight: float = 0.1,
    tolerance: float = 0.05,
    generator: Callable[[Sequence[int]], generators.Generator] | None = generators.unet,
    total_variation: float = 1e-6,
    learning_rate: float | None = None,
    num_steps: int = 2000,
    restarts: int = 1,
    noise_std: float | None = None,
    labels: Labels | None = None,
    **settings: Any,
) -> Attack:
    """Gradient inversion by an untrained generator, with feature matching (Liu et al. 2024).

    Features, that is what goes into the last two dense layers, are recovered from those layers'
    gradient by the tensor method; the true ones are never looked at. Sought are then the weights of a small
    network whose images have the observed gradient's direction, and features that agree::

        1 - cos(gradients) + weight * penalty(features) + total variation.

    `features` penalises `1 - cos` between a sample's features and those recovered, with several samples
    both less the recovered mean, because deep features are nearly collinear.
    `subspace` penalises the share of the features outside the span of the recovered ones, which the
    gradient gives without any decomposition or pairing. Each counts as far as it is reliable: a sample's
    weight falls from 1 to 0 as its relative residual goes to `tolerance`, the span's as the share of a
    singular value too many goes there.

    Departures: the published penalty is `1 - cos^2`, because its features come without sign; ours have
    one, and less their mean the square would draw them to the mirror image. The published coefficients
    are not known (0.1 is that of related work on text); the span, the mean and the gates are ours.

    Args:
      model: a model with a `head` of at least two dense layers.
      guide: what is asked of the features; `none` leaves the generator alone.
      weight: of the penalty.
      tolerance: where a recovered feature, or the span, counts nothing.
      generator: of the images, for their shape; `None` seeks the pixels, by signed Adam in the box.
      total_variation: weight of the anisotropic total variation.
      learning_rate: 5e-3 by default for the generator's weights (Adam), 0.1 for pixels.
      num_steps: steps.
      restarts: independent starts.
      noise_std: standard deviation of a defence's noise on every entry of the gradient, for the
        recovery of the features; in a federated round on the scale of one gradient.
      labels: `known` takes those that the observation grants, `recovered` those recovered with the
        features, or from the last layer where these are not reliable, whatever is granted; where
        `None`, those granted, if any.
      **settings: of `gradient_matching`; not `objective` or `candidate`, which the guide is.

    Returns:
      The attack. `diagnostics` holds the `Guidance` besides; features are only sought where they or
      their labels are needed, for that takes a wide layer (see `head_features`).

    Raises:
      ValueError: an unknown guide, a number out of range, or a model without such a head; at its
        first use, an observation that does not fit, or that does not grant `known` labels.
      TypeError: an `objective` or a `candidate` among the settings.
    """
    check_choice("guide", guide, get_args(Guide))
    check_choice("labels", labels or "known", get_args(Labels))
    check_number("weight", weight, 0.0)
    check_number("tolerance", tolerance, 0.0, open_low=True)
    if learning_rate is None:
        learning_rate = 0.1 if generator is None else 5e-3
    check_number("learning_rate", learning_rate, 0.0, open_low=True)
    if model.head is None:
        raise ValueError(f"The model {model.name} does not tell its dense head.")

    fixed: dict[str, Any] = {
        "objective": objectives.Objective(
            functools.partial(_distance, weight), name="cosine_and_features"
        ),
        "candidate": functools.partial(_candidate, guide),
        "num_steps": num_steps,
        "restarts": restarts,
        # Whatever their source, the labels are known before the loop starts.
        "labels": "known",
    }
    plan: dict[str, Any] = {
        "prior": priors.combine(*presets.smoothness(total_variation, "anisotropic")),
        **_variables(generator, learning_rate, num_steps),
        **settings,
    }
    loop = gradient_matching(model, **fixed, **plan)
    recovery = _Recovery(model, guide, tolerance, labels, settings.get("batch_size"), noise_std)

    def check(observation: Observation) -> None:
        _check(recovery, loop, observation)
        if generator is not None:
            generator(observation.facts.input_shape)

    def init(key: Array, observation: Observation) -> State:
        head_key, key = jax.random.split(key)
        mine, known = _recovered(recovery, head_key, observation)
        # For its start alone, whence the loop carries the guidance along.
        begun: dict[str, Any] = {**plan, "initializer": _carrying(known, plan["initializer"])}
        started = gradient_matching(model, **fixed, **begun)
        return started.init(key, observation._replace(labels=mine))

    def result(observation: Observation, state: State) -> Reconstruction:
        found = loop.result(observation, state)
        known = jax.tree.map(lambda leaf: leaf[0], state.best["known"])
        return found._replace(diagnostics={**found.diagnostics, **known._asdict()})

    return dataclasses.replace(loop, init=init, result=result, check=check)


class _Recovery(NamedTuple):
    """The settings of `strong` that say how labels and features are found."""

    model: Model
    guide: Guide
    tolerance: float
    labels: Labels | None
    batch_size: int | None
    noise_std: float | None


def _size(recovery: _Recovery, observation: Observation) -> int:
    size = recovery.batch_size or observation.facts.batch_size
    if size is None:
        raise ValueError("The strong attack needs an observation that tells its batch_size.")
    return size


def _granted(recovery: _Recovery, observation: Observation) -> Array | None:
    return None if recovery.labels == "recovered" else observation.labels


def _seeks_features(recovery: _Recovery, observation: Observation) -> bool:
    return recovery.guide == "features" or _granted(recovery, observation) is None


def _check(recovery: _Recovery, loop: Attack, observation: Observation) -> None:
    model = recovery.model
    if _granted(recovery, observation) is None:
        check_observation(model, observation)
    else:
        assert loop.check is not None
        loop.check(observation)
    check_sgd(observation)
    hidden, _ = head_layers(model, observation.params)
    size = _size(recovery, observation)
    if recovery.labels == "known" and observation.labels is None:
        raise ValueError("labels='known', but the observation grants none: use 'recovered'.")
    if _seeks_features(recovery, observation):
        problem = head_problem(model, observation.params, observation.gradient)
        check_size(size, problem, hidden.activation, "outer")


def _recovered(recovery: _Recovery, key: Array, observation: Observation) -> tuple[Array, Guidance]:
    """The labels that the loop is given, and what guides it."""
    model, tolerance = recovery.model, recovery.tolerance
    gradient, size = per_step_gradient(observation), _size(recovery, observation)
    labels = _granted(recovery, observation)
    if labels is not None and not _seeks_features(recovery, observation):
        return labels, only_span(*head_span(model, gradient, size), tolerance)
    found = head_features(
        model, observation.params, gradient, size, key=key, noise_std=recovery.noise_std
    )
    if labels is None:
        labels = _reliable_labels(recovery, observation, found)
    return labels, guidance(found, labels, tolerance)


def _reliable_labels(recovery: _Recovery, observation: Observation, found: HeadFeatures) -> Array:
    """Those of the features if these can be relied on; noise costs them long before the others."""
    model = recovery.model
    if model.num_classes < 2:
        return found.labels
    counted = label_recovery.recover(model, observation, _size(recovery, observation))
    reliable = (_trust(found.residual, recovery.tolerance) > 0).all()
    return jnp.where(reliable, found.labels, counted)


def _candidate(guide: Guide, model: Model, observation: Observation, batch: Batch, variables):
    """The gradient of a batch, and how far its features are from those recovered."""
    gradient = gradients.gradient(model, observation.params, batch)
    if guide == "none":
        return gradient, jnp.zeros(())
    assert model.head is not None
    below = model.head.features(observation.params, batch.inputs)
    between = model.head.layers(observation.params)[:-2]
    features = apply_layers(between, below.reshape(below.shape[0], -1))
    return gradient, disagreement(guide, features, jax.lax.stop_gradient(variables["known"]))


def _distance(weight: float, found, observation: Observation) -> Array:
    """Of a `_candidate` from the observation."""
    gradient, penalty = found
    seen = observation._replace(gradient=per_step_gradient(observation))
    return objectives.cosine().value(gradient, seen) + weight * penalty


def _variables(
    generator: Callable[[Sequence[int]], generators.Generator] | None,
    learning_rate: float,
    num_steps: int,
) -> dict[str, Any]:
    """What the loop optimises, and how: a generator's weights, or pixels."""
    if generator is None:
        return {
            "initializer": normal(),
            "optimizer": presets.signed_adam(learning_rate, num_steps),
            "constraint": priors.project_to_box,
        }

    def begin(key: Array, shape: tuple[int, ...], observation: Observation):
        return generators.generated(generator(shape[1:]))[0](key, shape, observation)

    def decode(variables, observation: Observation) -> Array:
        made = generator(observation.facts.input_shape)
        return generators.generated(made)[1](variables, observation)

    return {"initializer": begin, "decode": decode, "optimizer": optax.adam(learning_rate)}


def _carrying(known: Guidance, initializer: Initializer) -> Callable:
    """The initializer, with the guidance among its variables."""

    def start(key: Array, shape: tuple[int, ...], observation: Observation):
        return {**as_variables(initializer(key, shape, observation)), "known": known}

    return start


def guidance(found: HeadFeatures, labels: Array, tolerance: float) -> Guidance:
    """Recovered features in the order of the labels, and how far to rely on them.

    Args:
      found: of the head.
      labels: `[B]` classes.
      tolerance: relative residual, or share of a singular value too many, that counts nothing.

    Returns:
      The guidance. A feature whose label is not among those left counts nothing.
    """
    mismatch = (labels[:, None] != found.labels[None]).astype(found.features.dtype)
    slots, order = optax.assignment.hungarian_algorithm(mismatch)
    order = jnp.zeros_like(order).at[slots].set(order)
    features = found.features[order]
    finite = jnp.isfinite(features).all(axis=1)
    counts = finite & (labels == found.labels[order])
    return only_span(found.subspace, found.gap, tolerance)._replace(
        features=jnp.where(finite[:, None], features, 0.0),
        reliability=jnp.where(counts, _trust(found.residual[order], tolerance), 0.0),
    )


def only_span(subspace: Array, gap: Array, tolerance: float) -> Guidance:
    """Guidance without features.

    Args:
      subspace: `[B, d]`, orthonormal rows.
      gap: the share of a singular value too many.
      tolerance: of it, that counts nothing.

    Returns:
      The guidance; features and their reliabilities are zero.
    """
    features = jnp.zeros_like(subspace)
    return Guidance(features, features[:, 0], subspace, _trust(gap, tolerance))


def _trust(residual: Array, tolerance: float) -> Array:
    """From 1 to 0 at the tolerance, and 0 where it is no number."""
    return jnp.where(jnp.isfinite(residual), jnp.clip(1.0 - residual / tolerance, 0.0, 1.0), 0.0)


def disagreement(guide: Guide, features: Array, known: Guidance) -> Array:
    """How far a candidate's features are from those recovered; 0 where they agree, at most 2.

    Args:
      guide: `subspace` or `features`.
      features: `[B, d]`, the candidate's.
      known: those recovered.

    Returns:
      A scalar, the mean over the samples.
    """
    if guide == "subspace":
        inside = jnp.sum(jnp.square(features @ known.subspace.T), axis=1)
        whole = jnp.sum(jnp.square(features), axis=1)
        return known.gate * jnp.mean(1.0 - inside / jnp.maximum(whole, 1e-30))
    mine, theirs = features, known.features
    if features.shape[0] > 1:
        center = known.features.mean(axis=0, keepdims=True)
        mine, theirs = mine - center, theirs - center
    dot = jnp.sum(mine * theirs, axis=1)
    norms = jnp.sum(jnp.square(mine), axis=1) * jnp.sum(jnp.square(theirs), axis=1)
    cosine = dot / jnp.sqrt(jnp.maximum(norms, 1e-30))
    return jnp.mean(known.reliability * (1.0 - cosine))
