"""Attacks on a multi-epoch client update: simulated local training, and the surrogate model."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from invjax import gradients, metrics
from invjax.attacks.matching import objectives, priors
from invjax.attacks.matching.loop import Initializer, Labels, gradient_matching, normal
from invjax.attacks.matching.loss import as_variables
from invjax.attacks.matching.presets import decayed, smoothness
from invjax.attacks.matching.simulation import by_epoch, simulate_shares
from invjax.attacks.matching.simulation import simulate as simulate
from invjax.base import Array, Attack, LocalTraining, Model, Observation, PyTree
from invjax.checks import check_choice, check_number, equals
from invjax.observe import check_sgd, per_step_gradient

Copies = Literal["per_epoch", "shared"]
Orders = Literal["fixed", "learned"]
Aggregate = Literal["mean", "max"]
Distance = Literal["l2", "l1"]

_AGGREGATES = {"mean": jnp.mean, "max": jnp.max}
_DISTANCES = {"l2": jnp.square, "l1": gradients.absolute}


def order_invariant(
    weight: float,
    aggregate: Aggregate = "mean",
    distance: Distance = "l2",
    features: Callable[[Array], Array] | None = None,
) -> priors.Prior:
    """Every epoch visits the same set of samples (Dimitrov et al. 2022, the order-invariant prior).

    Args:
      weight: factor of the term.
      aggregate: `a`, which does not see the order of a set: its `mean` or its `max`.
      distance: mean squared (`l2`) or absolute (`l1`) difference.
      features: of inputs `[E N, ...]`, compared in their place; a random convolution was published.

    Returns:
      The prior of copies `[E N, ...]`: `weight` times the mean over the `E^2` pairs of epochs, an epoch
      and itself among them, of the distance between `a(X_i)` and `a(X_j)`.

    Raises:
      ValueError: an unknown aggregate or distance, a negative weight.
    """
    check_number("weight", weight, 0.0)
    check_choice("aggregate", aggregate, get_args(Aggregate))
    check_choice("distance", distance, get_args(Distance))

    def value(inputs, context):
        copies = inputs if features is None else features(inputs)
        copies = by_epoch(copies, _local_training(context.observation).epochs)
        sets = _AGGREGATES[aggregate](copies, axis=1)
        return weight * jnp.mean(_DISTANCES[distance](sets[:, None] - sets[None]))

    return value


def per_step(objective: objectives.Objective) -> objectives.Objective:
    """An objective of updates on the scale of one gradient: both are divided by rate times steps.

    Args:
      objective: of stage `aggregate`.

    Returns:
      The objective; its weight beside a prior's then does not depend on the number of steps.
    """

    def value(candidate, observation):
        candidate, observed = (
            per_step_gradient(observation._replace(gradient=update))
            for update in (candidate, observation.gradient)
        )
        return objective.value(candidate, observation._replace(gradient=observed))

    return objective._replace(value=value)


def fedavg(
    model: Model,
    *,
    copies: Copies | None = None,
    orders: Orders | Array = "fixed",
    order_prior: float | priors.Prior = 1.0,
    order_rate: float = 0.1,
    total_variation: float = 1e-4,
    learning_rate: float = 0.1,
    num_steps: int = 400,
    restarts: int = 1,
    labels: Labels = "known",
    **settings: Any,
) -> Attack:
    """Data Leakage in Federated Averaging (Dimitrov et al., TMLR 2022): simulate the local training.

    The client's orders are unknown. As published, one fixed order is simulated, with a copy of the
    samples for every epoch; the order-invariant prior ties the copies, and in the end they are
    paired with the first epoch's (least squared error) and averaged.

    Departures: `orders="learned"` is not in the paper, and recovers far more. The data term is on
    the scale of one gradient, because the published weights (2 on the squared sum over all steps,
    1000 on the order prior) hang on the number of steps; layers weigh the same; the box is a
    constraint, not a penalty of weight 2; the published rate of 0.4 is for normalised inputs.

    Args:
      model: the model.
      copies: `per_epoch`, or `shared`: one for all epochs. Where `None`, `per_epoch` for fixed
        orders and else `shared`.
      orders: `fixed`; `learned`: the share of every sample in every mini-batch is optimised with
        the inputs, and a step costs `N / batch_size` times as much; or `[E, N]`, the client's own,
        where the threat model grants them.
      order_prior: weight of `order_invariant`, or another form of it; of copies per epoch.
      order_rate: step size of Adam on the logits of learned orders.
      total_variation: weight of the anisotropic total variation; 0 for inputs that are no images.
      learning_rate: of Adam, in input units, times 0.995 every 10 steps.
      num_steps: steps.
      restarts: independent starts.
      labels: `known`; `recovered`, as of one gradient, or see `label_counts.labels_of`; `joint`.
      **settings: of `gradient_matching`; an `objective` sees updates unscaled, see `per_step`.

    Returns:
      The attack, for observations with the facts of a local training by SGD.

    Raises:
      ValueError: an unknown choice, a weight or rate out of range, learned orders of copies per
        epoch, an objective of per-sample gradients.
    """
    if isinstance(orders, str):
        check_choice("orders", orders, get_args(Orders))
    given = None if isinstance(orders, str) else orders
    learned = given is None and orders == "learned"
    copies = copies or ("per_epoch" if given is None and not learned else "shared")
    check_choice("copies", copies, get_args(Copies))
    check_number("order_rate", order_rate, 0.0)
    check_number("learning_rate", learning_rate, 0.0, open_low=True)
    if learned and copies == "per_epoch":
        raise ValueError("orders='learned' needs copies='shared', got copies='per_epoch'.")
    several, terms = copies == "per_epoch", smoothness(total_variation, "anisotropic")
    if several:
        terms.append(order_prior if callable(order_prior) else order_invariant(order_prior))
    settings: dict[str, Any] = {
        "objective": per_step(objectives.squared_l2()),
        "prior": priors.combine(*terms),
        "optimizer": optax.adam(optax.exponential_decay(learning_rate, 10, 0.995)),
        "constraint": priors.project_to_box,
        "initializer": normal(),
        "pool": _align_best if several else None,
        **settings,
    }
    if settings["objective"].stage == "per_sample":
        name = settings["objective"].name
        raise ValueError(f"objective must compare updates, {name} wants per-sample gradients.")
    if several:
        settings["initializer"] = _copied(settings["initializer"])
    if learned:
        settings["initializer"] = _also(settings["initializer"], "orders", _order_logits)
        settings["optimizer"] = _beside(settings["optimizer"], "orders", optax.adam(order_rate))

    def candidate(model, observation, batch, variables):
        local = _local_training(observation)
        if not learned:
            return simulate(model, observation.params, batch, local, given)
        return simulate_shares(model, observation.params, batch, local, variables["orders"])

    settings["candidate"] = candidate
    return _federated(model, num_steps=num_steps, restarts=restarts, labels=labels, **settings)


def surrogate(
    model: Model,
    *,
    alpha: float = 0.5,
    alpha_rate: float = 1e-3,
    total_variation: float = 1e-2,
    learning_rate: float = 0.1,
    num_steps: int = 1000,
    restarts: int = 1,
    labels: Labels = "known",
    **settings: Any,
) -> Attack:
    """Surrogate model extension (Zhu, Yao, Blaschko, ICML 2023): one gradient, at moved weights.

    The update should point along the gradient at `w(alpha) = (1 - alpha) start + alpha end`: cosine,
    total variation and box, with `alpha` optimised along with the inputs.

    Args:
      model: the model.
      alpha: where it starts, in [0, 1]; it stays at 0 (the single-gradient approximation) and at 1.
      alpha_rate: its step size under Adam; decays like `learning_rate`.
      total_variation: weight of the anisotropic total variation; 0 for inputs that are no images.
      learning_rate: of Adam, in input units, a tenth after 3/8, 5/8 and 7/8 of the steps;
        published as 1 on inputs of unit variance.
      num_steps: steps.
      restarts: independent starts, each with its own `alpha`.
      labels: `known` as published; `recovered` or `joint`.
      **settings: of `gradient_matching`; `optimizer` is that of all but `alpha`. An `objective`
        compares one gradient with the whole update, so it must not see lengths, as a cosine.

    Returns:
      The attack, for observations with the facts of a local training by SGD.

    Raises:
      ValueError: `alpha`, a rate or a weight out of range.
    """
    check_number("alpha", alpha, 0.0, 1.0)
    check_number("alpha_rate", alpha_rate, 0.0)
    check_number("learning_rate", learning_rate, 0.0, open_low=True)
    moving = optax.chain(optax.adam(decayed(alpha_rate, num_steps)), optax.stateless(_within_unit))
    settings: dict[str, Any] = {
        "objective": objectives.cosine(),
        "prior": priors.combine(*smoothness(total_variation, "anisotropic")),
        "constraint": priors.project_to_box,
        "optimizer": optax.adam(decayed(learning_rate, num_steps)),
        "initializer": normal(),
        **settings,
    }
    held, start = equals(alpha, 0) or equals(alpha, 1), 1.0 * jnp.asarray(alpha)
    own = optax.set_to_zero() if held else moving
    settings["optimizer"] = _beside(settings["optimizer"], "alpha", own)
    settings["initializer"] = _also(settings["initializer"], "alpha", lambda *_: start)

    def candidate(model, observation, batch, variables):
        def between(start, update):
            return start - variables["alpha"] * update

        params = jax.tree.map(between, observation.params, observation.gradient)
        return gradients.gradient(model, params, batch)

    settings["candidate"] = candidate
    return _federated(model, num_steps=num_steps, restarts=restarts, labels=labels, **settings)


def _federated(model: Model, **settings: Any) -> Attack:
    """The loop, with a check that refuses a round before anything is compiled."""
    attack = gradient_matching(model, **settings)

    def check_round(observation: Observation) -> None:
        local = _local_training(observation)
        size = settings.get("batch_size") or observation.facts.batch_size
        if size not in (None, local.num_samples):
            raise ValueError(
                f"batch_size must be facts.local.num_samples = {local.num_samples}, got {size}."
            )
        assert attack.check is not None
        attack.check(observation)

    return dataclasses.replace(attack, check=check_round)


def _order_logits(key: Array, observation: Observation) -> Array:
    local = _local_training(observation)
    return 0.01 * jax.random.normal(key, (local.num_steps, local.num_samples))


def _copied(initializer: Initializer) -> Initializer:
    def initialize(key, shape, observation):
        epochs = _local_training(observation).epochs
        return initializer(key, (epochs * shape[0], *shape[1:]), observation)

    return initialize


def _also(initializer: Initializer, name: str, make: Callable) -> Initializer:
    """One more variable, `make(key, observation)`."""

    def initialize(key, shape, observation):
        variables = as_variables(initializer(key, shape, observation))
        return {**variables, name: make(jax.random.fold_in(key, 1), observation)}

    return initialize


def _beside(
    optimizer: optax.GradientTransformation, name: str, own: optax.GradientTransformation
) -> optax.GradientTransformation:
    """An optimizer of all variables but one, which has its own."""
    return optax.partition(
        {name: own, "rest": optimizer},
        lambda variables: {other: name if other == name else "rest" for other in variables},
    )


def _within_unit(updates: PyTree, values: PyTree) -> PyTree:
    """Cut steps off where they would leave [0, 1]."""
    return jax.tree.map(lambda u, v: jnp.clip(v + u, 0.0, 1.0) - v, updates, values)


def _align_best(inputs: Array, values: Array, observation: Observation) -> Array:
    """The best restart's copies, paired with those of the first epoch, and their mean."""
    best = inputs[jnp.argmin(jnp.where(jnp.isfinite(values), values, jnp.inf))]
    copies = by_epoch(best, _local_training(observation).epochs)
    return jax.lax.map(lambda copy: copy[metrics.match(copy, copies[0])], copies).mean(axis=0)


def _local_training(observation: Observation) -> LocalTraining:
    local = observation.facts.local
    if local is None:
        raise ValueError(
            "This attack needs to know the local training, but observation.facts.local is None: "
            "observe(..., local=LocalTraining(...))."
        )
    check_sgd(observation)
    return local
