"""The one loop of gradient matching: objective + prior + optimizer + constraint + restarts."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from invjax import conv, gradients
from invjax.attacks import labels as label_recovery
from invjax.attacks.matching.ball import Ball, check_ball, over_ball
from invjax.attacks.matching.objectives import Objective
from invjax.attacks.matching.priors import Context, Prior, input_bounds
from invjax.base import Array, Attack, Batch, Model, Observation, PyTree, Reconstruction
from invjax.checks import check_choice, check_count, check_number
from invjax.observe import check_observation, per_step_gradient

Labels = Literal["known", "recovered", "joint"]
Variables = dict[str, Array]
Initializer = Callable[[Array, tuple[int, ...], Observation], Array | Variables]
Constraint = Callable[[Array, Observation], Array]
Decode = Callable[[Variables, Observation], Array]
Candidate = Callable[[Model, Observation, Batch, Variables], PyTree]
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
    initializer = normal() if initializer is None else initializer
    optimizer = optax.with_extra_args_support(optimizer)
    moving = ball is not None or likelihood_weight is not None
    plain = (
        gradients.per_sample_gradients if objective.stage == "per_sample" else gradients.gradient
    )

    def decoded(variables: Variables, observation: Observation) -> Array:
        return variables["inputs"] if decode is None else decode(variables, observation)

    def loss(variables, fixed_labels, context: Context, key, count) -> Array:
        target = jax.nn.softmax(variables["labels"]) if fixed_labels is None else fixed_labels
        observation = context.observation

        def at(raw: Array) -> Array:
            inputs = decoded({**variables, "inputs": raw}, observation)
            batch = Batch(inputs, target)
            if candidate is None:
                gradient = plain(model, observation.params, batch)
            else:
                gradient = candidate(model, observation, batch, variables)
            value = objective.value(gradient, observation)
            if likelihood_weight is not None:
                value = jnp.asarray(likelihood_weight(count)) * value
            known = context._replace(labels=target)
            return value if prior is None else value + prior(inputs, known)

        key = None if key is None else jax.random.fold_in(key, count)
        return over_ball(at, ball, key)(variables["inputs"])

    def prepare(observation: Observation, variables) -> Context:
        group = jax.vmap(lambda one: decoded(one, observation))(variables).mean(axis=0)
        if candidate is None:
            # A federated update is read on the scale of one gradient.
            observation = observation._replace(gradient=per_step_gradient(observation))
        return Context(observation, group)

    def check(observation: Observation) -> None:
        check_observation(model, observation)
        size = _batch_size(observation, batch_size)
        if labels == "known":
            _known_labels(observation, size)

    def init(key: Array, observation: Observation) -> State:
        size = _batch_size(observation, batch_size)
        fixed = _fixed_labels(model, observation, labels, size)
        shape = (size, *observation.facts.input_shape)

        def start(key):
            inputs_key, labels_key = jax.random.split(key)
            variables: Any = initializer(inputs_key, shape, observation)
            variables = dict(variables) if isinstance(variables, dict) else {"inputs": variables}
            if constraint is not None:
                variables["inputs"] = constraint(variables["inputs"], observation)
            if fixed is None:
                logits = jax.random.normal(labels_key, (size, model.num_classes))
                variables["labels"] = logits
            return variables

        keys = jax.random.split(key, restarts)
        ball_keys = jnp.broadcast_to(jax.random.fold_in(key, restarts), (restarts,))
        variables = jax.vmap(start)(keys)
        context = prepare(observation, variables)
        count = jnp.zeros((), jnp.int32)

        def evaluate(variables, key):
            key = key if ball is not None else None
            value, gradient = jax.value_and_grad(loss)(variables, fixed, context, key, count)
            state = optimizer.init(variables)
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
            stale=jnp.zeros(restarts, jnp.int32),
            finished=~jnp.isfinite(value),
            trace=jnp.full((restarts, num_steps + 1), jnp.nan).at[:, 0].set(value),
            count=count,
            labels=fixed,
            # Restarts share the points, by which they are compared; no start was drawn from this key.
            keys=None if ball is None else ball_keys,
        )

    def advance(variables, optimizer_state, value, gradient, key, fixed, context, count):
        """One optimizer step of one restart."""

        def value_fn(variables):
            return loss(variables, fixed, context, key, count)

        updates, optimizer_state = optimizer.update(
            gradient, optimizer_state, variables, value=value, grad=gradient, value_fn=value_fn
        )
        variables: Any = optax.apply_updates(variables, updates)
        if constraint is not None:
            inputs = constraint(variables["inputs"], context.observation)
            variables = {**variables, "inputs": inputs}
        if constraint is None and not moving and _has_line_search(optimizer_state):
            # The line search has evaluated the point that it accepted.
            value = optax.tree.get(optimizer_state, "value")
            gradient = optax.tree.get(optimizer_state, "grad")
        else:
            value, gradient = jax.value_and_grad(value_fn)(variables)
        return variables, optimizer_state, value, gradient

    def step(observation: Observation, state: State) -> State:
        context = prepare(observation, state.variables)
        old = (state.variables, state.optimizer, state.value, state.gradient)
        count = state.count + 1
        one = functools.partial(advance, fixed=state.labels, context=context, count=count)
        moved = conv.grouped_vmap(one, backend)(*old, state.keys)
        variables, optimizer_state, value, gradient = _select(state.finished, old, moved)
        better = jnp.isfinite(value) if moving else value < state.best_value
        noticeable = value < state.reference - tolerance * jnp.abs(state.reference)
        stale = jnp.where(noticeable, 0, state.stale + 1)
        finished = state.finished | ~jnp.isfinite(value)
        if patience is not None:
            finished |= stale >= patience
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

    def result(observation: Observation, state: State) -> Reconstruction:
        finite = jnp.isfinite(state.best_value)
        winner = jnp.argmin(jnp.where(finite, state.best_value, jnp.inf))
        best = jax.tree.map(lambda leaf: leaf[winner], state.best)
        if pool is None:
            inputs = decoded(best, observation)
        else:
            every = jax.vmap(lambda one: decoded(one, observation))(state.best)
            inputs = pool(every, state.best_value, observation)
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

    return Attack(
        init,
        step,
        result,
        num_steps,
        done=lambda state: state.finished.all(),
        objective=lambda state: jnp.min(state.best_value),
        check=check,
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
