"""Attacks on DP-SGD by an adversary who knows all records but one and sees every step (Hayes et al. 2023)."""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from invjax import gradients
from invjax.attacks.informed.dpsgd_release import (
    Release,
    Run,
    check_run,
    clipped_gradients,
    residuals,
    steps_per_epoch,
)
from invjax.attacks.matching.loop import gradient_matching, uniform_box
from invjax.attacks.matching.objectives import Objective
from invjax.base import Array, Batch, Facts, Model, Observation, PyTree, Reconstruction
from invjax.checks import check_choice, check_number
from invjax.observe import check_batch

Score = Literal["dot", "likelihood_ratio", "hidden", "epoch_max"]


def prior_aware(
    model: Model,
    released: Release,
    known: Batch,
    candidates: Batch,
    run: Run,
    *,
    score: Score = "likelihood_ratio",
    deduct_known: bool = True,
    rescale_by_batch_size: bool = True,
) -> Reconstruction:
    """Which record of a finite prior was trained on (Hayes et al. 2023, the prior-aware attack).

    With `r_t` the residual of a step (`residuals`) and `g_t` a candidate's clipped gradient there, the
    scores are

    * `dot`: `sum_t <r_t, g_t>`, as published;
    * `likelihood_ratio`: `sum_t l_t` with `l_t = (<r_t, g_t> - |g_t|^2 / 2) / (s C)^2`, the Gaussian
      log-likelihood against no target at all: with all records in every batch and equal priors its
      largest is the most likely record;
    * `hidden`: the same where the adversary is not told when the target took part:
      `sum_t log(1 - q + q exp(l_t))`, or of shuffled batches the logarithm of the epoch's mean
      `exp(l_t)`, summed over epochs;
    * `epoch_max`: the largest `<r_t, g_t>` of every epoch, summed, as published for `q < 1`; nothing
      for an epoch in none of whose steps the target is known to have been.

    The last two departures from `dot` are not published; they use that clipping is seldom tight and
    that most steps of a sampled run are noise alone.

    An eager call compiles anew every time: wrap what is called again in `jax.jit`.

    Args:
      model: the model.
      released: what was seen; of a release that reveals the target's steps only those count.
      known: the records that the adversary holds.
      candidates: the prior, `m` records.
      run: public settings.
      score: what ranks the candidates.
      deduct_known: whether to subtract the known records' gradients, as published; without, they
        count as noise.
      rescale_by_batch_size: whether the adversary knows the batch size that the noisy sum was
        divided by, as published; without, likelihoods are those of a batch of one.

    Returns:
      The candidate of the largest score; its objective is minus that. `diagnostics` holds `scores
      [m]` and `index`. `found` is false where a score is not finite.

    Raises:
      ValueError: a setting out of range, a likelihood without noise, `hidden` on a release that
        reveals the target's steps, candidates unlike the known records, or a run or known records
        that are not the release's (their number is known where it holds `known_members`).
      TypeError: inputs that are not floats, labels that are not integers.
    """
    _check_score(run, score, released.included)
    found = products(
        model,
        released,
        known,
        candidates,
        run,
        deduct_known=deduct_known,
        rescale_by_batch_size=rescale_by_batch_size,
    )
    values = scores(found, run, score)
    index = jnp.argmax(values)
    return Reconstruction(
        inputs=candidates.inputs[index][None],
        labels=candidates.labels[index][None],
        found=jnp.isfinite(values).all()[None],
        objective=-values[index],
        diagnostics={"scores": values, "index": index},
    )


class Products(NamedTuple):
    """What every score is made of; zeros in steps that the target is known not to have been in.

    Attributes:
      inner: `[T, m]`, `<r_t, g_t>` of every candidate.
      squared: `[T, m]`, `|g_t|^2`.
      included: `[T]` the release's: whether the target was in a step, where that is revealed, else
        `None`.
    """

    inner: Array
    squared: Array
    included: Array | None = None


def products(
    model: Model,
    released: Release,
    known: Batch,
    candidates: Batch,
    run: Run,
    *,
    deduct_known: bool = True,
    rescale_by_batch_size: bool = True,
) -> Products:
    """The costly part of `prior_aware`, for those who want several scores of one release.

    Args:
      model: the model.
      released: what was seen.
      known: the records that the adversary holds.
      candidates: the prior.
      run: public settings.
      deduct_known: as in `prior_aware`.
      rescale_by_batch_size: as in `prior_aware`.

    Returns:
      The products.

    Raises:
      ValueError: a setting out of range, candidates unlike the known records, or a run or known
        records that are not the release's.
      TypeError: inputs that are not floats, labels that are not integers.
    """
    check_batch(model, candidates)
    if candidates.inputs.shape[1:] != known.inputs.shape[1:]:
        raise ValueError(
            "candidates must have the known records' shape "
            f"{known.inputs.shape[1:]}, got {candidates.inputs.shape[1:]}."
        )
    _check_release(model, released, known, run)
    left = residuals(
        model,
        released,
        known,
        run,
        deduct_known=deduct_known,
        rescale_by_batch_size=rescale_by_batch_size,
    )

    def step(seen):
        params, left = seen
        taken = clipped_gradients(model, params, candidates, run.clip_norm)
        inner = jax.vmap(lambda one: jnp.asarray(optax.tree.vdot(one, left)))(taken)
        squared = jax.vmap(lambda one: jnp.asarray(optax.tree.vdot(one, one)))(taken)
        return Products(inner, squared)

    found = jax.lax.map(step, (released.params, left))
    if released.included is None:
        return found
    inner, squared = (part * released.included[:, None] for part in found[:2])
    return Products(inner, squared, released.included)


def scores(found: Products, run: Run, score: Score) -> Array:
    """A score of every candidate; see `prior_aware`.

    Args:
      found: of `products`.
      run: public settings.
      score: which.

    Returns:
      `[m]`, larger is likelier.

    Raises:
      ValueError: as `prior_aware`.
    """
    inner, squared, included = found
    _check_score(run, score, included)
    _check_steps(len(inner), run)
    if score == "dot":
        return inner.sum(axis=0)
    epoch = steps_per_epoch(run)
    if score == "epoch_max":
        taken = jnp.ones(len(inner), bool) if included is None else included.astype(bool)
        # Poisson sampling may stop within an epoch.
        rest = -len(inner) % epoch
        taken = jnp.pad(taken, (0, rest)).reshape(-1, epoch, 1)
        by_epoch = jnp.pad(inner, ((0, rest), (0, 0))).reshape(-1, epoch, inner.shape[1])
        largest = jnp.where(taken, by_epoch, -jnp.inf).max(axis=1)
        return jnp.where(taken.any(axis=1), largest, 0.0).sum(axis=0)
    ratio = (inner - squared / 2) / (run.noise_multiplier * run.clip_norm) ** 2
    if score == "likelihood_ratio" or run.sampling_rate == 1:
        return ratio.sum(axis=0)
    if run.sampling == "shuffled":
        ratio = ratio.reshape(-1, epoch, ratio.shape[1])
        return (jax.nn.logsumexp(ratio, axis=1) - jnp.log(epoch)).sum(axis=0)
    inside = jnp.log(run.sampling_rate) + ratio
    return jnp.logaddexp(jnp.log1p(-run.sampling_rate), inside).sum(axis=0)


def alignment(inner: float = 1.0, distance: float = 1.0) -> Callable[[PyTree, PyTree], Array]:
    """The objective of the attack without a prior: `-<g, r> + |g - r|_1`, summed over steps.

    Args:
      inner: weight of the inner product.
      distance: weight of the L1 distance.

    Returns:
      `objective(candidate, residual) -> scalar` of two trees with leading axis of steps.
    """

    def objective(candidate: PyTree, residual: PyTree) -> Array:
        apart = jax.tree.map(lambda a, b: gradients.absolute(a - b).sum(), candidate, residual)
        product = optax.tree.vdot(candidate, residual)
        return jnp.asarray(distance * optax.tree.sum(apart) - inner * product)

    return objective


def negative_log_likelihood(candidate: PyTree, residual: PyTree) -> Array:
    """An objective for `invert`: half the squared distance, which Gaussian noise makes the likelihood.

    Args:
      candidate: a candidate's clipped gradients, leaves `[T, ...]`.
      residual: what was left of the noisy gradients.

    Returns:
      A scalar; up to a factor and a constant minus the log-likelihood, of targets in every batch.
    """
    apart = jax.tree.map(lambda a, b: jnp.sum(jnp.square(a - b)) / 2, candidate, residual)
    return jnp.asarray(optax.tree.sum(apart))


def invert(
    key: Array,
    model: Model,
    released: Release,
    known: Batch,
    run: Run,
    *,
    input_range: tuple[float, float] = (0.0, 1.0),
    objective: Callable[[PyTree, PyTree], Array] | None = None,
    num_steps: int = 1000,
    learning_rate: float = 1e-2,
    restarts: int = 1,
) -> Reconstruction:
    """The target without a prior, by matching its clipped gradients to what is left of the noisy ones.

    The loop of gradient matching, Adam in the box from uniform noise, on the gradients of all steps
    together, once a class; the label is that of the least objective (Hayes et al. 2023, the
    gradient-based attack).

    An eager call compiles anew every time: wrap what is called again in `jax.jit`.

    Args:
      key: of the starts.
      model: the model.
      released: what was seen; of a release that reveals the target's steps only those count.
      known: the records that the adversary holds.
      run: public settings.
      input_range: lowest and highest value of an input.
      objective: `objective(candidate, residual) -> scalar` of two trees with a leading axis of
        steps, on the scale of the sum; `alignment()` by default.
      num_steps: of Adam.
      learning_rate: of Adam, input units.
      restarts: starts a class.

    Returns:
      The reconstruction of one sample. `diagnostics` holds `objectives [K]`, a class each, and
      `inputs [K, ...]`.

    Raises:
      ValueError: a setting out of range, or a run or known records that are not the release's (their
        number is known where it holds `known_members`).
      TypeError: inputs that are not floats, labels that are not integers.
    """
    _check_release(model, released, known, run)
    goal = alignment() if objective is None else objective
    classes = max(model.num_classes, 2)
    left = residuals(model, released, known, run)
    weights = jnp.ones(run.num_steps) if released.included is None else released.included

    def steps_of_target(tree):
        return jax.tree.map(
            lambda leaf: leaf * weights.reshape((-1,) + (1,) * (leaf.ndim - 1)), tree
        )

    def candidate(model, observation, batch, variables):
        del variables

        def at(params):
            taken = clipped_gradients(model, params, batch, run.clip_norm)
            return jax.tree.map(lambda leaf: leaf[0], taken)

        return steps_of_target(jax.vmap(at)(observation.params))

    low, high = input_range
    attack = gradient_matching(
        model,
        objective=Objective(lambda one, observation: goal(one, observation.gradient)),
        optimizer=optax.adam(learning_rate),
        num_steps=num_steps,
        constraint=lambda inputs, observation: jnp.clip(inputs, low, high),
        initializer=uniform_box(),
        restarts=restarts,
        candidate=candidate,
    )
    # The observation of many steps is no single gradient's.
    attack = dataclasses.replace(attack, check=None)
    facts = Facts(
        input_shape=tuple(known.inputs.shape[1:]),
        num_classes=model.num_classes,
        batch_size=1,
        input_range=(low, high),
    )
    seen = Observation(released.params, steps_of_target(left), facts)

    def with_label(key, label):
        return attack(key, seen._replace(labels=label[None]))

    keys = jax.random.split(key, classes)
    found = jax.vmap(with_label)(keys, jnp.arange(classes))
    values = jnp.where(jnp.isfinite(found.objective), found.objective, jnp.inf)
    best = jnp.argmin(values)
    return Reconstruction(
        inputs=found.inputs[best],
        labels=found.labels[best],
        found=found.found[best],
        objective=values[best],
        diagnostics={"objectives": values, "inputs": found.inputs[:, 0]},
    )


def _check_score(run: Run, score: Score, included: Array | None) -> None:
    """Refuse a score that a run, or what is known of the target's steps, does not have."""
    check_choice("score", score, get_args(Score))
    check_run(run)
    if score in ("likelihood_ratio", "hidden"):
        check_number("noise_multiplier", run.noise_multiplier, 0.0, open_low=True)
    if score == "hidden" and included is not None:
        raise ValueError(
            "The release reveals the target's steps; score='likelihood_ratio' uses them."
        )


def _check_steps(steps: int, run: Run) -> None:
    if run.num_steps != steps:
        raise ValueError(f"run.num_steps must be the release's {steps} steps, got {run.num_steps}.")


def _check_release(model: Model, released: Release, known: Batch, run: Run) -> None:
    """Refuse a run and known records that are not those of a release, as far as its shapes tell."""
    check_batch(model, known)
    _check_steps(jax.tree.leaves(released.params)[0].shape[0], run)
    if released.known_members is None:
        return
    count = released.known_members.shape[1]
    if known.labels.shape[0] != count:
        raise ValueError(
            f"known must be the {count} records of the release, got {known.labels.shape[0]}."
        )
