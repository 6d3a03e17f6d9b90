"""What the loop of gradient matching minimises: a data term and a prior of one restart's variables."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from invjax import gradients
from invjax.attacks.matching.ball import Ball, over_ball
from invjax.attacks.matching.objectives import Objective
from invjax.attacks.matching.priors import Context, Prior
from invjax.base import Array, Batch, Model, Observation, PyTree
from invjax.observe import per_step_gradient

Variables = dict[str, Array]
Decode = Callable[[Variables, Observation], Array]
Candidate = Callable[[Model, Observation, Batch, Variables], PyTree]


class Terms(NamedTuple):
    """What the loss is made of, as `gradient_matching` says.

    Attributes:
      model: as it is differentiated.
      objective: the data term.
      prior: on inputs.
      decode: from variables to inputs.
      candidate: what the client would have sent.
      ball: what the posterior is summed up over.
      likelihood_weight: of the data term, by step.
    """

    model: Model
    objective: Objective
    prior: Prior | None
    decode: Decode | None
    candidate: Candidate | None
    ball: Ball | None
    likelihood_weight: optax.Schedule | None

    @property
    def moving(self) -> bool:
        """Whether the loss changes from step to step."""
        return self.ball is not None or self.likelihood_weight is not None


def context_of(terms: Terms, observation: Observation, variables: Variables) -> Context:
    """What the loss reads besides one restart's variables.

    Args:
      terms: of the loss.
      observation: what the adversary was granted.
      variables: of all restarts.

    Returns:
      The context, without labels.
    """
    group = jax.vmap(lambda one: decoded(terms, one, observation))(variables).mean(axis=0)
    if terms.candidate is None:
        # A federated update is read on the scale of one gradient.
        observation = observation._replace(gradient=per_step_gradient(observation))
    return Context(observation, group)


def as_variables(first: Array | Variables) -> Variables:
    """What an initializer gives, inputs or a dict with them, as a dict."""
    return dict(first) if isinstance(first, dict) else {"inputs": first}


def decoded(terms: Terms, variables: Variables, observation: Observation) -> Array:
    """The inputs `[B, ...]` that one restart's variables stand for."""
    return variables["inputs"] if terms.decode is None else terms.decode(variables, observation)


def loss_of(
    terms: Terms, labels: Array | None, context: Context, key: Array | None, count: Array
) -> Callable[[Variables], Array]:
    """The loss of one restart at one step.

    Args:
      terms: its terms.
      labels: `[B]` fixed labels, or `None` where they are optimised.
      context: of `context_of`.
      key: of the points in a ball; `None` without one.
      count: the step.

    Returns:
      `loss(variables) -> scalar`.
    """
    observation = context.observation

    def loss(variables: Variables) -> Array:
        target = jax.nn.softmax(variables["labels"]) if labels is None else labels

        def at(raw: Array) -> Array:
            inputs = decoded(terms, {**variables, "inputs": raw}, observation)
            gradient = _sent(terms, observation, Batch(inputs, target), variables)
            value = terms.objective.value(gradient, observation)
            if terms.likelihood_weight is not None:
                value = jnp.asarray(terms.likelihood_weight(count)) * value
            known = context._replace(labels=target)
            return value if terms.prior is None else value + terms.prior(inputs, known)

        drawn = None if key is None else jax.random.fold_in(key, count)
        return over_ball(at, terms.ball, drawn)(variables["inputs"])

    return loss


def _sent(terms: Terms, observation: Observation, batch: Batch, variables: Variables) -> PyTree:
    """What the client would have sent of a batch."""
    if terms.candidate is not None:
        return terms.candidate(terms.model, observation, batch, variables)
    per_sample = terms.objective.stage == "per_sample"
    plain = gradients.per_sample_gradients if per_sample else gradients.gradient
    return plain(terms.model, observation.params, batch)
