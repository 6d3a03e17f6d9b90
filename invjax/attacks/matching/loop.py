"""The one loop of gradient matching: objective + prior + optimizer + constraint + restarts."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from invjax import conv
from invjax.attacks import labels as label_recovery
from invjax.attacks.matching.ball import Ball, check_ball
from invjax.attacks.matching.loss import (
    Candidate,
    Decode,
    Terms,
    Variables,
    as_variables,
    context_of,
    decoded,
    loss_of,
)
from invjax.attacks.matching.objectives import Objective
from invjax.attacks.matching.priors import Prior, input_bounds
from invjax.base import Array, Attack, Model, Observation, PyTree, Reconstruction
from invjax.checks import check_choice, check_count, check_number
from invjax.observe import check_observation, check_sgd

Labels = Literal["known", "recovered", "joint"]
Initializer = Callable[[Array, tuple[int, ...], Observation], Array | Variables]
Constraint = Callable[[Array, Observation], Array]
Pool = Callable[[Array, Array, Observation], Array]


class State(NamedTuple):
    """State of the loop; everything but `count` and `labels` has a leading axis of restarts `R`.

    Attributes:
      variables: `{"inputs": [R, B, ...]}`; `"labels"`, logits `[R, B, C]`, where labels are optimised;
        and what else the initializer gave.
      optimizer: optimizer states.
      value: `[R]` objective at `variables`.
      gradient: its gradient.
      best: variables of the lowest objective so far.
      best_value: `[R]` that objective.
      reference: `[R]` the lowest objective when it last fell noticeably.
      stale: `[R]` steps since then.
      finished: `[R]` restarts that are done.
      trace: `[R, num_steps + 1]` objectives, NaN where not run.
      count: steps done.
      labels: `[B]` fixed labels, or `None` where they are optimised.
      keys: `[R]` of the points in a ball; `None` without one.
    """

    variables: Variables
    optimizer: Any
    value: Array
    gradient: Variables
    best: Variables
    best_value: Array
    reference: Array
    stale: Array
    finished: Array
    trace: Array
    count: Array
    labels: Array | None
    keys: Array | None = None


def normal(std: float = 1.0, mean: float = 0.0) -> Initializer:
    """Start from Gaussian noise.

    Args:
      std: standard deviation, in input units.
      mean: mean.

    Returns:
      The initializer.
    """
    return lambda key, shape, observation: mean + std * jax.random.normal(key, shape)


def uniform_box() -> Initializer:
    """Start uniformly in the public input range.

    Returns:
      The initializer.
    """

    def initialize(key, shape, observation):
        unit = jax.random.uniform(key, shape)
        low, high = input_bounds(observation, unit.dtype, unit.ndim)
        return unit * (high - low) + low

    return initialize


def gradient_matching(
    model: Model,
    *,
    objective: Objective,
    prior: Prior | None = None,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    constraint: Constraint | None = None,
    labels: Labels = "known",
    initializer: Initializer | None = None,
    restarts: int = 1,
    patience: int | None = None,
    tolerance: float = 1e-3,
    batch_size: int | None = None,
    backend: str | None = None,
    decode: Decode | None = None,
    candidate: Candidate | None = None,
    pool: Pool | None = None,
    ball: Ball | None = None,
    likelihood_weight: optax.Schedule | None = None,
) -> Attack:
    """Reconstruct a batch by making its gradient match the observed one.

    The restarts are vmapped; the best by objective is returned, and the truth is never looked at. Of
    an objective that changes from step to step (a ball, a schedule) the last variables count.

    Args:
      model: the model that the client used.
      objective: the data term.
      prior: the prior on inputs; uniform by default.
      optimizer: any optax optimizer; one with a line search is given what it needs.
      num_steps: optimizer steps, at most.
      constraint: `constraint(inputs, observation) -> inputs`, applied after every step.
      labels: `known` reads those that the observation grants, `recovered` infers them from the
        gradient first, `joint` optimises soft labels along with the inputs.
      initializer: `initializer(key, shape, observation) -> inputs`, or a dict of variables with
        `"inputs"` among them; standard normal by default.
      restarts: independent starts.
      patience: a restart ends when the objective did not fall by `tolerance` in this many steps;
        never where `None`.
      tolerance: relative to the objective.
      batch_size: how many inputs to reconstruct; the observation's own where `None`.
      backend: `cpu`, `gpu` or `tpu`: how convolutions are computed; the present one where `None`.
      decode: `decode(variables, observation) -> inputs [B, ...]`; `variables["inputs"]` by default.
      candidate: `candidate(model, observation, batch, variables) -> gradient`, what the client would
        have sent of a batch; its plain gradient by default, a federated update then being read on
        the scale of one gradient.
      pool: `pool(inputs [R, B, ...], values [R], observation) -> inputs`, what the restarts say
        together; the best one's by default.
      ball: sum up the posterior around the candidate instead of taking its value there.
      likelihood_weight: of the data term, by step; 1 by default.

    Returns:
      The attack. `diagnostics` holds `trace [R, num_steps + 1]` (objectives, NaN where not run),
      `status [R]` (0 ran to the end, 1 plateau, 2 not finite), `best [R]` (lowest objectives) and
      `restart` (the index of the one returned).

    Raises:
      ValueError: a number out of range, an unknown choice; and at its first use, an observation
        that does not fit.
    """
    check_count("num_steps", num_steps, 1)
    check_count("restarts", restarts, 1)
    check_number("tolerance", tolerance, 0.0)
    if patience is not None:
        check_count("patience", patience, 1)
    check_choice("labels", labels, get_args(Labels))
    if labels == "joint" and model.num_classes < 2:
        raise ValueError("labels='joint' needs a model with at least two logits.")
    if ball is not None:
        check_ball(ball)
    model = conv.for_matching(model, backend)
    loop = _Loop(
        terms=Terms(model, objective, prior, decode, candidate, ball, likelihood_weight),
        optimizer=optax.with_extra_args_support(optimizer),
        num_steps=num_steps,
        constraint=constraint,
        labels=labels,
        initializer=normal() if initializer is None else initializer,
        restarts=restarts,
        patience=patience,
        tolerance=tolerance,
        batch_size=batch_size,
        backend=backend,
        pool=pool,
    )
    return Attack(
        functools.partial(_init, loop),
        functools.partial(_step, loop),
        functools.partial(_result, loop),
        num_steps,
        done=lambda state: state.finished.all(),
        objective=lambda state: jnp.min(state.best_value),
        check=functools.partial(_check, loop),
    )


class _Loop(NamedTuple):
    """The settings of `gradient_matching`, for its parts."""

    terms: Terms
    optimizer: optax.GradientTransformationExtraArgs
    num_steps: int
    constraint: Constraint | None
    labels: Labels
    initializer: Initializer
    restarts: int
    patience: int | None
    tolerance: float
    batch_size: int | None
    backend: str | None
    pool: Pool | None


def _check(loop: _Loop, observation: Observation) -> None:
    check_observation(loop.terms.model, observation)
    if loop.terms.candidate is None:
        check_sgd(observation)
    size = _batch_size(observation, loop.batch_size)
    if loop.labels == "known":
        _known_labels(observation, size)


def _init(loop: _Loop, key: Array, observation: Observation) -> State:
    size = _batch_size(observation, loop.batch_size)
    labels = _fixed_labels(loop.terms.model, observation, loop.labels, size)
    keys = jax.random.split(key, loop.restarts)
    # Restarts share the points, by which they are compared; no start was drawn from this key.
    shared = jnp.broadcast_to(jax.random.fold_in(key, loop.restarts), (loop.restarts,))
    ball_keys = None if loop.terms.ball is None else shared
    variables = jax.vmap(functools.partial(_start, loop, observation, size))(keys)
    context = context_of(loop.terms, observation, variables)
    count = jnp.zeros((), jnp.int32)

    def evaluate(variables, key):
        value_fn = loss_of(loop.terms, labels, context, key, count)
        value, gradient = jax.value_and_grad(value_fn)(variables)
        state = loop.optimizer.init(variables)
        if _has_line_search(state):
            state = optax.tree.set(state, value=value, grad=gradient)
        return value, gradient, state

    value, gradient, optimizer_state = jax.vmap(evaluate)(variables, ball_keys)
    return State(
        variables=variables,
        optimizer=optimizer_state,
        value=value,
        gradient=gradient,
        best=variables,
        best_value=value,
        reference=value,
        stale=jnp.zeros(loop.restarts, jnp.int32),
        finished=~jnp.isfinite(value),
        trace=jnp.full((loop.restarts, loop.num_steps + 1), jnp.nan).at[:, 0].set(value),
        count=count,
        labels=labels,
        keys=ball_keys,
    )


def _start(loop: _Loop, observation: Observation, size: int, key: Array) -> Variables:
    """The first variables of one restart."""
    inputs_key, labels_key = jax.random.split(key)
    shape = (size, *observation.facts.input_shape)
    variables = as_variables(loop.initializer(inputs_key, shape, observation))
    if loop.constraint is not None:
        variables["inputs"] = loop.constraint(variables["inputs"], observation)
    if loop.labels == "joint":
        logits = jax.random.normal(labels_key, (size, loop.terms.model.num_classes))
        variables["labels"] = logits
    return variables


def _step(loop: _Loop, observation: Observation, state: State) -> State:
    context = context_of(loop.terms, observation, state.variables)
    old = (state.variables, state.optimizer, state.value, state.gradient)
    count = state.count + 1
    one = functools.partial(_advance, loop, labels=state.labels, context=context, count=count)
    moved = conv.grouped_vmap(one, loop.backend)(*old, state.keys)
    variables, optimizer_state, value, gradient = _select(state.finished, old, moved)
    better = jnp.isfinite(value) if loop.terms.moving else value < state.best_value
    noticeable = value < state.reference - loop.tolerance * jnp.abs(state.reference)
    stale = jnp.where(noticeable, 0, state.stale + 1)
    finished = state.finished | ~jnp.isfinite(value)
    if loop.patience is not None:
        finished |= stale >= loop.patience
    traced = jnp.where(state.finished, jnp.nan, value)
    return State(
        variables=variables,
        optimizer=optimizer_state,
        value=value,
        gradient=gradient,
        best=_select(better, variables, state.best),
        best_value=jnp.where(better, value, state.best_value),
        reference=jnp.where(noticeable, value, state.reference),
        stale=stale,
        finished=finished,
        trace=state.trace.at[:, count].set(traced),
        count=count,
        labels=state.labels,
        keys=state.keys,
    )


def _advance(loop: _Loop, variables, optimizer_state, value, gradient, key, labels, context, count):
    """One optimizer step of one restart."""
    value_fn = loss_of(loop.terms, labels, context, key, count)
    updates, optimizer_state = loop.optimizer.update(
        gradient, optimizer_state, variables, value=value, grad=gradient, value_fn=value_fn
    )
    variables: Any = optax.apply_updates(variables, updates)
    if loop.constraint is not None:
        inputs = loop.constraint(variables["inputs"], context.observation)
        variables = {**variables, "inputs": inputs}
    if loop.constraint is None and not loop.terms.moving and _has_line_search(optimizer_state):
        # The line search has evaluated the point that it accepted.
        value = optax.tree.get(optimizer_state, "value")
        gradient = optax.tree.get(optimizer_state, "grad")
    else:
        value, gradient = jax.value_and_grad(value_fn)(variables)
    return variables, optimizer_state, value, gradient


def _result(loop: _Loop, observation: Observation, state: State) -> Reconstruction:
    finite = jnp.isfinite(state.best_value)
    winner = jnp.argmin(jnp.where(finite, state.best_value, jnp.inf))
    best = jax.tree.map(lambda leaf: leaf[winner], state.best)
    if loop.pool is None:
        inputs = decoded(loop.terms, best, observation)
    else:
        every = jax.vmap(lambda one: decoded(loop.terms, one, observation))(state.best)
        inputs = loop.pool(every, state.best_value, observation)
    found = jnp.broadcast_to(finite[winner], inputs.shape[:1])
    plateau = state.finished & jnp.isfinite(state.value)
    return Reconstruction(
        inputs=inputs,
        labels=best["labels"].argmax(-1) if state.labels is None else state.labels,
        found=found,
        objective=state.best_value[winner],
        diagnostics={
            "trace": state.trace,
            "best": state.best_value,
            "restart": winner,
            "status": jnp.where(jnp.isfinite(state.value), plateau.astype(jnp.int32), 2),
        },
    )


def _batch_size(observation: Observation, batch_size: int | None) -> int:
    size = observation.facts.batch_size if batch_size is None else batch_size
    if size is None:
        raise ValueError(
            "The observation does not say how many samples there are: give batch_size, or estimate "
            "it with invjax.attacks.labels.estimate_batch_size."
        )
    check_count("batch_size", size, 1)
    return size


def _fixed_labels(
    model: Model, observation: Observation, labels: Labels, size: int
) -> Array | None:
    if labels == "joint":
        return None
    if labels == "recovered":
        return label_recovery.recover(model, observation, size)
    return _known_labels(observation, size)


def _known_labels(observation: Observation, size: int) -> Array:
    if observation.labels is None:
        raise ValueError(
            "labels='known', but the observation grants none: observe(..., grant_labels=True), "
            "or labels='recovered' or 'joint'."
        )
    if observation.labels.shape[0] != size:
        raise ValueError(
            f"The observation grants {observation.labels.shape[0]} labels for {size} samples."
        )
    return observation.labels


def _has_line_search(state: PyTree) -> bool:
    return optax.tree.get(state, "value") is not None and optax.tree.get(state, "grad") is not None


def _select(mask: Array, first: PyTree, second: PyTree) -> PyTree:
    """Leaf-wise `where` with a mask over the leading axis."""

    def choose(a, b):
        return jnp.where(mask.reshape(mask.shape + (1,) * (a.ndim - mask.ndim)), a, b)

    return jax.tree.map(choose, first, second)
