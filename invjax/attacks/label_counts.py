"""How often every class occurs in a client's data, read off its update in whole numbers."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import optax

from invjax import conv
from invjax.attacks.heads import (
    FindHead,
    batch_size_of,
    head_gradient,
    head_of,
    local_steps,
    probabilities,
)
from invjax.base import Array, Model, Observation, Params
from invjax.checks import check_choice, check_count
from invjax.observe import check_observation

Form = Literal["auto", "weight", "bias"]


def estimate_label_counts(
    key: Array,
    model: Model,
    observation: Observation,
    num_dummies: int = 3000,
    form: Form = "auto",
    batch_size: int | None = None,
    head: FindHead | None = None,
) -> Array:
    """Label counts of an update (Dimitrov et al. 2022, after Geng et al. 2021).

    With softmax cross-entropy the mean gradient of the last layer is, in class `c`, `p_c - n_c / K`
    in the bias, and about that times the sum of the features `O` in the sum `W_c` of the weights.
    So the counts are `n_c = K p_c - K W_c / O`, or `K p_c - K b_c` with the bias gradient. Means of
    `p` and `O` over normal noise stand in for the unknown ones; those of a local step are
    interpolated between the sent and the returned parameters, and the counts averaged over the
    steps. Unlike `labels.estimate_counts`, whole numbers come out, and exactly `K` of them.

    Departures: the bias form is not in the paper; a negative count goes by projection on the
    simplex before the rounding, where they cut it off and correct the sum afterwards.

    Args:
      key: PRNG key of the dummies.
      model: the model, with a dense head under softmax cross-entropy.
      observation: what the adversary was granted; a plain gradient counts as one step.
      num_dummies: normal inputs, all at once in memory.
      form: `weight` as published, which wants features whose sum is far from zero (ReLU, sigmoid);
        `bias`; or `auto`: `bias` where the head has one.
      batch_size: `K`, static; the observation's own or the client's samples where `None`.
      head: `tree -> (weight [in, C], bias [C] or None)`; `labels.find_head` where `None`.

    Returns:
      `[C]` integers that add up to `K`; 2 for a model with one logit.

    Raises:
      ValueError: an unknown form, or one that needs a bias where there is none; a number out of
        range; local training by another optimizer than SGD; no gradient, or no head found.
    """
    check_choice("form", form, get_args(Form))
    check_count("num_dummies", num_dummies, 1)
    check_observation(model, observation)
    size = batch_size_of(observation, batch_size)
    dummies = jax.random.normal(key, (num_dummies, *observation.facts.input_shape))
    shares = _shares(model, observation, dummies, form, head)
    return round_counts(size * shares, size)


def round_counts(estimate: Array, total: int) -> Array:
    """Whole numbers near real ones: floors, and one more for the largest remainders.

    Args:
      estimate: `[C]`; projected on the simplex of sum `total` first, which changes nothing where
        no count is negative and the sum is right.
      total: their sum, static.

    Returns:
      `[C]` integers that are not negative and add up to `total`.
    """
    shares = optax.projections.projection_simplex(estimate, total)
    floor = jnp.floor(shares)
    missing = total - floor.sum()
    rank = jnp.argsort(jnp.argsort(floor - shares))
    return (floor + (rank < missing)).astype(jnp.int32)


def labels_of(counts: Array, total: int) -> Array:
    """Labels in rising order.

    Args:
      counts: `[C]` integers.
      total: their sum, static.

    Returns:
      `[total]` labels, for `observation._replace(labels=...)`.
    """
    return jnp.repeat(jnp.arange(counts.shape[0]), counts, total_repeat_length=total)


def _shares(
    model: Model, observation: Observation, dummies: Array, form: Form, head: FindHead | None
) -> Array:
    """`[C]` estimated shares of the classes, real numbers."""
    weight, bias = head_gradient(model, observation, head)
    steps = local_steps(observation)
    if form == "bias" and bias is None:
        raise ValueError(f"form='bias', but the last layer of {model.name} has none; use 'weight'.")
    matching = conv.for_matching(model)

    def first_logit(params: Params) -> tuple[Array, Array]:
        logits = matching.apply(params, dummies)
        return logits[:, 0].mean(), logits

    # Compiled, so that the gradients of the layers below the head are dropped.
    @jax.jit
    def statistics(params: Params) -> tuple[Array, Array]:
        """Mean probabilities and the mean sum of the features, which is a derivative of a logit."""
        slope, logits = jax.grad(first_logit, has_aux=True)(params)
        return probabilities(logits), head_of(model, slope, head)[0][:, 0].sum()

    start = statistics(observation.params)
    end = start
    if steps > 1:
        end = statistics(optax.tree.sub(observation.params, observation.gradient))
    fraction = jnp.arange(steps) / steps
    mean = start[0] + fraction.mean() * (end[0] - start[0])
    if bias is None or form == "weight":
        features = start[1] + fraction * (end[1] - start[1])
        # Without any feature the gradient says nothing, and the shares are the probabilities.
        bias = weight.sum(axis=0) * jnp.mean(1 / jnp.where(features == 0, jnp.inf, features))
    return mean - bias
