"""The Bayes-optimal adversary (Balunovic, Dimitrov, Staab, Vechev 2022), and the risk of any attack."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from invjax import gradients
from invjax.attacks.matching import objectives, priors
from invjax.attacks.matching.ball import Ball, Mode
from invjax.attacks.matching.loop import Labels, gradient_matching, normal
from invjax.attacks.matching.presets import cosine_adam
from invjax.base import Array, Attack, Batch, Defense, Model, Observation, PyTree
from invjax.checks import check_count, check_number
from invjax.defenses import chain
from invjax.observe import check_sgd


def bayes(
    model: Model,
    defense: Defense | None,
    prior: priors.Prior | None = None,
    *,
    mode: Literal["map"] | Mode = "map",
    delta: float = 0.0,
    num_samples: int = 10,
    antithetic: bool = True,
    schedule: Literal["constant", "paper"] | optax.Schedule = "constant",
    learning_rate: float = 0.1,
    num_steps: int = 1000,
    restarts: int = 1,
    labels: Labels = "known",
    **settings: Any,
) -> Attack:
    """The adversary that knows the defence and the prior, and maximises the posterior in a ball.

    The risk of missing the truth by more than `delta` is least where the posterior's mass in a ball
    of that radius is largest (their equation 4). `map` takes its limit for `delta` to 0, as their
    released attack does; `jensen` is the published surrogate, which a broad peak can fool;
    `exact_mc` estimates the mass itself.

    Departures: the likelihood keeps weight one, as their annealing (`schedule="paper"`) gains or
    costs up to a decibel with the weight of the prior, and has no meaning of its own; points are
    uniform in the ball (the authors' code draws radii that crowd its centre, and does not use them).
    Of a federated update the local steps are read as equal: as many times one gradient as there are,
    times the rate, and the likelihood is that of the update.

    Args:
      model: the model.
      defense: the client's defence; its likelihood is the data term. `None` is no defence.
      prior: on the inputs; uniform by default. A density's weight is 1.
      mode: `map`, `jensen` or `exact_mc`.
      delta: radius of the ball, in the L2 norm over the batch of inputs; of no use in mode `map`.
      num_samples: points in the ball at every step.
      antithetic: draw them in pairs `u, -u`.
      schedule: weight of the likelihood: `constant` is 1, `paper` is `annealed(num_steps)`, or
        a function of the step.
      learning_rate: of Adam with cosine decay.
      num_steps: steps.
      restarts: independent starts.
      labels: `known`, `recovered` or `joint`.
      **settings: of `gradient_matching`; an `objective` takes the place of the defence's likelihood.

    Returns:
      The attack.

    Raises:
      ValueError: an unknown mode or schedule, a radius or a number of points that suits no ball, a
        rate that is not positive.
    """
    if isinstance(schedule, str) and schedule not in ("constant", "paper"):
        raise ValueError(
            f"schedule must be 'constant', 'paper' or a function of the step, got {schedule!r}."
        )

    def update(model: Model, observation: Observation, batch: Batch, variables) -> PyTree:
        """On the scale of the observation, which is that of its noise; the loop's own is of a gradient."""
        del variables
        gradient = gradients.gradient(model, observation.params, batch)
        local = observation.facts.local
        if local is None:
            return gradient
        check_sgd(observation)
        return optax.tree.scale(local.num_steps * local.learning_rate, gradient)

    named = {"constant": None, "paper": annealed(num_steps)}
    settings: dict[str, Any] = {
        "objective": objectives.matched(chain() if defense is None else defense),
        "optimizer": cosine_adam(learning_rate, num_steps),
        "constraint": priors.project_to_box,
        "initializer": normal(),
        "ball": None if mode == "map" else Ball(delta, num_samples, mode, antithetic),
        "likelihood_weight": named[schedule] if isinstance(schedule, str) else schedule,
        **settings,
    }
    if settings["objective"].stage == "aggregate":
        settings = {"candidate": update, **settings}
    return gradient_matching(
        model, prior=prior, num_steps=num_steps, restarts=restarts, labels=labels, **settings
    )


def annealed(num_steps: int, start: float = 0.25) -> optax.Schedule:
    """The published weight of the likelihood: geometric from `start` to 1 in half of the steps, then 1.

    Args:
      num_steps: of the attack.
      start: first weight; a multiple of the noise's variance, tuned in the paper. 0.25 gives their
        published figures for noise of standard deviation 0.1.

    Returns:
      The schedule.

    Raises:
      ValueError: a start outside (0, 1].
    """
    check_number("start", start, 0.0, 1.0, open_low=True)
    half = max(1, num_steps // 2)
    return lambda step: start ** (1 - jnp.minimum(step / half, 1.0))


class Risk(NamedTuple):
    """How often an attack misses by more than a radius.

    Attributes:
      value: probabilities, of the shape of `delta`.
      standard_error: of these.
      distances: `[N]` L2 distances of the reconstructions from the truth.
    """

    value: Array
    standard_error: Array
    distances: Array


def risk(
    attack: Attack,
    draw: Callable[[Array], tuple[Array, Observation]],
    key: Array,
    delta: Array | float,
    num_samples: int = 1000,
) -> Risk:
    """Monte Carlo estimate of `P(|x - f(g)| > delta)` over victims and defences.

    Args:
      attack: the adversary `f`.
      draw: `draw(key) -> (inputs [B, ...], observation)`, one victim and what is seen of it.
      key: a PRNG key.
      delta: radius or radii, in the L2 norm over the batch of inputs. Samples are not matched: for
        batches over 1 the order counts.
      num_samples: victims, all attacked at once.

    Returns:
      The risk.

    Raises:
      ValueError: no victims.
    """
    check_count("num_samples", num_samples, 1)

    def one(key):
        draw_key, attack_key = jax.random.split(key)
        truth, observation = draw(draw_key)
        found = attack(attack_key, observation).inputs
        return jnp.sqrt(jnp.sum(jnp.square(found - truth)))

    distances = jax.vmap(one)(jax.random.split(key, num_samples))
    radii = jnp.asarray(delta)
    # A reconstruction that is not finite is a miss.
    hits = distances.reshape((1,) * radii.ndim + (-1,)) <= radii[..., None]
    value = jnp.mean(~hits, axis=-1)
    return Risk(value, jnp.sqrt(value * (1 - value) / num_samples), distances)
