"""Training under a defence: what it costs, and the weights that an attack meets on the way."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from invjax import conv, datasets, driver, gradients
from invjax.base import Array, Batch, Defense, Model, Params, PyTree
from invjax.defenses import chain
from invjax.defenses.precode import Precode

CHUNK = 500
"""Samples that are classified at once."""

HELD_OUT = 0.2
"""Share of a data set that accuracy is measured on, where it has no part of its own for that."""


class Snapshot(NamedTuple):
    """A model on its way.

    Attributes:
      step: optimizer steps behind it.
      params: the weights.
      accuracy: on the held-out samples, in [0, 1].
    """

    step: int
    params: Params
    accuracy: float


def split(
    dataset: datasets.Dataset, fraction: float = HELD_OUT, seed: int = 0
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """A data set in two parts, at random.

    Args:
      dataset: the whole.
      fraction: of the second part, in (0, 1).
      seed: of the draw.

    Returns:
      Both parts, as data sets.

    Raises:
      ValueError: a part would be empty.
    """
    first, second = (
        dataclasses.replace(dataset, inputs=dataset.inputs[part], labels=dataset.labels[part])
        for part in _parts(len(dataset), fraction, seed)
    )
    return first, second


def _parts(number: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of both parts of so many samples."""
    held_out = round(number * fraction)
    if not 0 < held_out < number:
        raise ValueError(
            f"fraction must leave both parts some of {number} samples, got {fraction}."
        )
    order = np.random.default_rng(seed).permutation(number)
    return order[held_out:], order[:held_out]


def train(
    model: Model | Precode,
    training: datasets.Dataset,
    held_out: datasets.Dataset,
    defense: Defense | None = None,
    *,
    steps: Sequence[int] = (0, 100),
    batch_size: int = 32,
    optimizer: optax.GradientTransformation | None = None,
    seed: int = 0,
) -> list[Snapshot]:
    """Train a model whose every gradient goes through a defence.

    Args:
      model: the model; one with a variational bottleneck draws its noise anew at every step.
      training: drawn from with replacement.
      held_out: for the accuracy.
      defense: on inputs, samples or gradients; none by default.
      steps: when to take a snapshot, increasing; training ends at the last.
      batch_size: of a step.
      optimizer: behind the defence; Adam at 1e-3 by default.
      seed: of the weights, the batches, the defence and the model's noise.

    Returns:
      A snapshot for each of `steps`.

    Raises:
      ValueError: steps that do not increase from 0 on.
    """
    steps = list(steps)
    if not steps or steps[0] < 0 or sorted(set(steps)) != steps:
        raise ValueError(f"steps must increase, from 0 on, got {steps}.")
    defense = chain() if defense is None else defense
    optimizer = optax.adam(1e-3) if optimizer is None else optimizer
    root = jax.random.key(seed)
    params = model.init(jax.random.fold_in(root, 3), training.input_shape)
    state = (defense.init_with_key(jax.random.fold_in(root, 5), params), optimizer.init(params))

    @jax.jit
    def update(params, state, key, batch: Batch):
        defense_state, optimizer_state = state
        sent, defense_state = _send(defense, at(model, key), params, batch, defense_state)
        updates, optimizer_state = optimizer.update(sent, optimizer_state, params)
        return optax.apply_updates(params, updates), (defense_state, optimizer_state)

    rng = np.random.default_rng([seed, 4])
    snapshots: list[Snapshot] = []
    for step in range(steps[-1] + 1):
        if step in steps:
            snapshots.append(Snapshot(step, params, accuracy(model, params, held_out)))
        if step < steps[-1]:
            picks = rng.integers(0, len(training), batch_size)
            key = jax.random.fold_in(root, 10 + step)
            params, state = update(params, state, key, datasets.take(training, picks))
    return snapshots


def _send(defense: Defense, model: Model, params: Params, batch: Batch, state: PyTree):
    """What a client sends of a batch, and its defence's next state."""
    batch, state = defense.prepare(batch, state, params)
    per_sample = defense.stage == "per_sample"
    take = gradients.per_sample_gradients if per_sample else gradients.gradient
    return defense.update(take(model, params, batch), state, params)


def at(model: Model | Precode, key: Array) -> Model:
    """The model with its noise fixed, where it has any.

    Args:
      model: a model, or one with PRECODE.
      key: PRNG key of the noise.

    Returns:
      The model itself where it is a plain one.
    """
    return model.at(key) if isinstance(model, Precode) else model


def accuracy(model: Model | Precode, params: Params, dataset: datasets.Dataset) -> float:
    """Share of samples that a model classifies right, in evaluation mode.

    Args:
      model: the model; a bottleneck's noise is left out.
      params: its weights.
      dataset: raw samples and labels.

    Returns:
      A number in [0, 1].
    """
    plain = model.mean() if isinstance(model, Precode) else model
    right = 0
    for start in range(0, len(dataset), CHUNK):
        part = datasets.take(dataset, np.arange(start, min(start + CHUNK, len(dataset))))
        right += int(jnp.sum(_right(plain, params, part)))
    return right / len(dataset)


def _right(model: Model, params: Params, batch: Batch) -> Array:
    """Which samples are classified right, `[B]`."""
    logits = model.apply(params, batch.inputs)
    guess = logits.argmax(-1) if model.num_classes > 1 else (logits[:, 0] > 0).astype(int)
    return guess == batch.labels


class Samples(NamedTuple):
    """What several trainings learn from and are judged by, a seed each.

    Attributes:
      inputs: `[N, ...]`, those of all parts.
      labels: `[N]`.
      training: `[S, n]` indices.
      held_out: `[S, m]` indices.
    """

    inputs: np.ndarray
    labels: np.ndarray
    training: np.ndarray
    held_out: np.ndarray


def samples(
    training: datasets.Dataset, held_out: datasets.Dataset | None, seeds: Sequence[int]
) -> Samples:
    """Samples for a training a seed.

    Args:
      training: to learn from.
      held_out: for the accuracy; where `None`, a fifth of `training` that every seed chooses
        anew, as `split` does.
      seeds: one a training.

    Returns:
      The samples.

    Raises:
      ValueError: too few samples to hold any out.
    """
    if held_out is None:
        parts = [_parts(len(training), HELD_OUT, seed) for seed in seeds]
        inputs, labels = training.inputs, training.labels
    else:
        ends = len(training), len(training) + len(held_out)
        parts = [(np.arange(ends[0]), np.arange(*ends)) for _ in seeds]
        inputs = np.concatenate([training.inputs, held_out.inputs])
        labels = np.concatenate([training.labels, held_out.labels])
    first, second = (np.stack([part[side] for part in parts]) for side in (0, 1))
    return Samples(inputs, labels, first, second)


class Trained(NamedTuple):
    """What `K` strengths cost, for `S` seeds.

    Attributes:
      accuracy: `[K, S]`, of held-out samples, in [0, 1].
      loss: `[K, S]`, the mean loss of training samples at the end, in nats where the loss is.
    """

    accuracy: np.ndarray
    loss: np.ndarray


def trainer(
    model: Model,
    data: Samples,
    defense: Callable[[Any], Defense],
    *,
    seeds: Sequence[int],
    steps: int,
    clients: int = 8,
    batch_size: int = 4,
    optimizer: optax.GradientTransformation | None = None,
    evaluated: int = 2000,
) -> Callable[[np.ndarray], Trained]:
    """Training under many strengths of a defence and for all seeds at once, in one compiled program.

    In every step every client takes the gradient of its batch and defends it on its own, with a state
    of its own (a fixed mask is another for every client), and the mean of what they send is applied. So
    what is trained with is what an adversary is shown: a defended gradient of `batch_size` samples.
    For one seed the weights, the batches and the defence's keys are the same under every strength and
    every defence, so that differences are the defence's.

    Args:
      model: the model.
      data: with a row of indices a seed.
      defense: `defense(numbers) -> Defense`; its numbers are traced.
      seeds: `S` of them.
      steps: of the optimizer.
      clients: gradients that are averaged in a step.
      batch_size: samples of a client's gradient.
      optimizer: behind the defence; Adam at 1e-3 by default.
      evaluated: how many held-out and how many training samples are looked at in the end, at most.

    Returns:
      `train(numbers [K, n]) -> Trained`; it compiles anew for another `K`.
    """
    optimizer = optax.adam(1e-3) if optimizer is None else optimizer
    model = conv.for_matching(model)
    inputs, labels = jnp.asarray(data.inputs), jnp.asarray(data.labels)
    shape = data.inputs.shape[1:]

    @driver.quick_jit
    @jax.vmap
    def start(numbers, key):
        params = model.init(jax.random.fold_in(key, 3), shape)
        keys = jax.random.split(jax.random.fold_in(key, 5), clients)
        one = defense(numbers)
        states = jax.vmap(lambda key: one.init_with_key(key, params))(keys)
        # A donated buffer must be there once only.
        return jax.tree.map(jnp.copy, (params, states, optimizer.init(params)))

    @functools.partial(driver.quick_jit, donate_argnums=1)
    def update(numbers, carry, picks, inputs, labels):
        def lane(numbers, carry, picks):
            params, states, optimizer_state = carry
            one = defense(numbers)

            def client(state, picks):
                return _send(one, model, params, Batch(inputs[picks], labels[picks]), state)

            sent, states = jax.vmap(client)(states, picks)
            mean = jax.tree.map(lambda leaf: leaf.mean(axis=0), sent)
            updates, optimizer_state = optimizer.update(mean, optimizer_state, params)
            return optax.apply_updates(params, updates), states, optimizer_state

        return conv.grouped_vmap(lane)(numbers, carry, picks)

    @driver.quick_jit
    def judge(params, picks, inputs, labels):
        def lane(params, picks):
            batch = Batch(inputs[picks], labels[picks])
            return _right(model, params, batch).mean(), model.loss(params, batch)

        return conv.grouped_vmap(lane)(params, picks)

    def mean(params, picks, count):
        """Accuracy and loss, `[2, K, S]`, of `[S, m]` samples."""
        total = 0.0
        for first in range(0, picks.shape[1], CHUNK):
            part = picks[:, first : first + CHUNK]
            found = np.asarray(judge(params, np.tile(part, (count, 1)), inputs, labels), float)
            total += found * part.shape[1]
        return np.reshape(total / picks.shape[1], (2, count, len(seeds)))

    def train(numbers) -> Trained:
        count = len(numbers)
        lanes = np.repeat(numbers, len(seeds), axis=0)
        keys = jnp.tile(jnp.stack([jax.random.key(seed) for seed in seeds]), count)
        carry = start(lanes, keys)
        draws = [np.random.default_rng([seed, 4]) for seed in seeds]
        for _ in range(steps):
            drawn = [
                rng.integers(0, data.training.shape[1], (clients, batch_size)) for rng in draws
            ]
            picks = np.stack([row[pick] for row, pick in zip(data.training, drawn, strict=True)])
            picks = np.tile(picks, (count, 1, 1))
            carry = update(lanes, carry, picks, inputs, labels)
        accuracy = mean(carry[0], data.held_out[:, :evaluated], count)[0]
        loss = mean(carry[0], data.training[:, :evaluated], count)[1]
        return Trained(accuracy, loss)

    return train
