"""What DP-SGD releases to the adversary of Hayes et al. (2023): every iterate and every noisy gradient."""

import math
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from invjax import gradients
from invjax.base import Array, Batch, Model, Params, PyTree
from invjax.checks import check_choice, check_number
from invjax.observe import check_batch

Sampling = Literal["poisson", "shuffled"]


class Run(NamedTuple):
    """The public settings of a DP-SGD training.

    Attributes:
      num_steps: steps `T`.
      learning_rate: of plain SGD on the noisy mean gradient.
      clip_norm: L2 radius `C` of every sample's gradient.
      noise_multiplier: deviation of the noise on the sum, in units of `clip_norm`; may be traced.
      sampling_rate: share `q` of the records that a step takes; 1 takes all.
      sampling: `poisson` takes every record independently with probability `q`; `shuffled` deals a
        new order into `1 / q` batches of nearly equal size in every epoch.
    """

    num_steps: int
    learning_rate: float
    clip_norm: float
    noise_multiplier: float | Array
    sampling_rate: float = 1.0
    sampling: Sampling = "poisson"


class Release(NamedTuple):
    """What the adversary sees of a training, besides the records that it knows.

    Attributes:
      params: `[T, ...]` the iterates at which the gradients were taken.
      gradients: `[T, ...]` the noisy clipped sums over the expected batch size.
      known_members: `[T, n - 1]` which of the known records were in a batch; `None` where all were.
      included: `[T]` whether the target was, where that is revealed, else `None`.
      final: the parameters after the last step.
    """

    params: Params
    gradients: PyTree
    known_members: Array | None
    included: Array | None
    final: Params


def release(
    key: Array,
    model: Model,
    params: Params,
    known: Batch,
    target: Batch,
    run: Run,
    *,
    reveal: bool = False,
) -> Release:
    """Train by DP-SGD and keep all that is released (Abadi et al. 2016, algorithm 1).

    The gradients of all records are taken at every step and those outside the batch are masked, so
    that shapes are fixed and `vmap` over trials works.

    Args:
      key: of the batches and the noise, which the adversary does not know.
      model: the model.
      params: the initial parameters.
      known: the `n - 1` records that the adversary holds.
      target: the one that it does not hold, a batch of one.
      run: public settings.
      reveal: whether it is told in which steps the target took part. (With `shuffled` batches of
        exactly equal size the known records' membership tells as much; the scores do not use that.)

    Returns:
      The release; leaves lead with `T`.

    Raises:
      ValueError: a setting out of range, or batches that do not fit.
      TypeError: inputs that are not floats, labels that are not integers.
    """
    check_run(run)
    check_batch(model, known)
    check_batch(model, target)
    if target.inputs.shape != (1, *known.inputs.shape[1:]):
        raise ValueError(
            f"target must be a batch of one like the known records {known.inputs.shape}, got "
            f"inputs of shape {target.inputs.shape}."
        )
    records: Batch = jax.tree.map(lambda *parts: jnp.concatenate(parts), known, target)
    count = records.labels.shape[0]
    batch_key, noise_key = jax.random.split(key)
    members = None if run.sampling_rate == 1 else _members(batch_key, count, run)
    std = run.noise_multiplier * run.clip_norm

    def step(params, drawn):
        chosen, key = drawn
        total = member_sum(model, params, records, chosen, run.clip_norm)
        noise = optax.tree.random_like(key, total, jax.random.normal)
        size = batch_size(run, count)
        noisy = jax.tree.map(lambda a, b: (a + jnp.asarray(std, a.dtype) * b) / size, total, noise)
        after = jax.tree.map(lambda a, b: a - run.learning_rate * b, params, noisy)
        return after, (params, noisy)

    drawn = (members, jax.random.split(noise_key, run.num_steps))
    final, (iterates, noisy) = jax.lax.scan(step, params, drawn)
    if members is None:
        included = jnp.ones(run.num_steps, bool) if reveal else None
        return Release(iterates, noisy, None, included, final)
    return Release(iterates, noisy, members[:, :-1], members[:, -1] if reveal else None, final)


def residuals(
    model: Model,
    released: Release,
    known: Batch,
    run: Run,
    *,
    deduct_known: bool = True,
    rescale_by_batch_size: bool = True,
) -> PyTree:
    """What is left of the noisy gradients for the target: its clipped gradients and noise.

    Args:
      model: the model.
      released: what was seen.
      known: the records that the adversary holds.
      run: public settings.
      deduct_known: whether to subtract the known records' clipped gradients.
      rescale_by_batch_size: whether to return the sum's scale, on which the target's gradient has
        norm `clip_norm` at most and the noise deviation `noise_multiplier * clip_norm`; the
        released mean's scale otherwise.

    Returns:
      A tree like the parameters with a leading axis of steps.

    Raises:
      ValueError: a setting out of range, or a sampling rate that is not the release's: 1 where it holds
        `known_members`, below 1 where it holds none and they are to be deducted.
    """
    check_run(run)
    sampled = released.known_members is not None
    if sampled == (run.sampling_rate == 1) and (sampled or deduct_known):
        raise ValueError(
            "run.sampling_rate must be below 1 where the release has known_members and 1 where it "
            f"has none, got {run.sampling_rate} {'with' if sampled else 'without'} them."
        )
    size = batch_size(run, known.labels.shape[0] + 1)

    def step(seen):
        params, noisy, chosen = seen
        if deduct_known:
            total = member_sum(model, params, known, chosen, run.clip_norm)
            noisy = jax.tree.map(lambda a, b: a - b / size, noisy, total)
        return jax.tree.map(lambda leaf: leaf * size, noisy) if rescale_by_batch_size else noisy

    return jax.lax.map(step, (released.params, released.gradients, released.known_members))


def member_sum(
    model: Model, params: Params, batch: Batch, members: Array | None, clip_norm: float
) -> Params:
    """Sum of the clipped gradients of a batch's members.

    Args:
      model: the model.
      params: its parameters.
      batch: the records.
      members: `[B]` booleans; all where `None`.
      clip_norm: L2 radius.

    Returns:
      A tree like `params`.
    """
    if members is None:
        return gradients.clipped_sum(model, params, batch, clip_norm)
    taken = gradients.per_sample_gradients(model, params, batch)
    scale = gradients.clip_scale(taken, clip_norm) * members
    return gradients.sum_samples(gradients.scale_samples(taken, scale))


def clipped_gradients(model: Model, params: Params, batch: Batch, clip_norm: float) -> Params:
    """Every sample's own clipped gradient.

    Args:
      model: the model.
      params: its parameters.
      batch: the records.
      clip_norm: L2 radius.

    Returns:
      A tree like `params` whose leaves lead with the samples; differentiable in the inputs.
    """
    taken = gradients.per_sample_gradients(model, params, batch)
    return gradients.scale_samples(taken, gradients.clip_scale(taken, clip_norm))


def batch_size(run: Run, count: int) -> float:
    """Expected batch size of `count` records.

    Args:
      run: the settings of training.
      count: records of the training set.

    Returns:
      The sampling rate times `count`.
    """
    return run.sampling_rate * count


def steps_per_epoch(run: Run) -> int:
    """Steps in which a record is expected once.

    Args:
      run: the settings of training.

    Returns:
      The inverse of the sampling rate, rounded.
    """
    return round(1 / run.sampling_rate)


def check_run(run: Run) -> None:
    """Refuse settings that are out of range.

    Args:
      run: the settings.

    Raises:
      ValueError: one of them is.
    """
    check_number("num_steps", run.num_steps, 1)
    check_number("learning_rate", run.learning_rate, 0.0)
    check_number("clip_norm", run.clip_norm, 0.0, open_low=True, open_high=True)
    check_number("noise_multiplier", run.noise_multiplier, 0.0, open_high=True)
    # The steps of an epoch come of it, so it is a number on the host.
    check_number("sampling_rate", float(run.sampling_rate), 0.0, 1.0, open_low=True)
    check_choice("sampling", run.sampling, get_args(Sampling))
    epoch = steps_per_epoch(run)
    whole = math.isclose(epoch * run.sampling_rate, 1.0) and run.num_steps % epoch == 0
    if run.sampling == "shuffled" and not whole:
        raise ValueError(
            "Shuffled batches need 1 / sampling_rate to be whole and num_steps a multiple of it, "
            f"got {run.sampling_rate} and {run.num_steps}."
        )


def _members(key: Array, count: int, run: Run) -> Array:
    """Which records every step takes, `[T, count]`."""
    if run.sampling == "poisson":
        return jax.random.bernoulli(key, run.sampling_rate, (run.num_steps, count))
    epoch = steps_per_epoch(run)
    deal = jnp.arange(count) % epoch
    keys = jax.random.split(key, run.num_steps // epoch)
    batch_of = jax.vmap(lambda key: jax.random.permutation(key, deal))(keys)
    members = batch_of[:, None] == jnp.arange(epoch)[None, :, None]
    return members.reshape(run.num_steps, count)
