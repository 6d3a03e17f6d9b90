"""Training under a defence: what it costs, and the weights that an attack meets on the way."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from invjax import datasets, gradients
from invjax.base import Array, Batch, Defense, Model, Params
from invjax.defenses import chain
from invjax.defenses.precode import Precode


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
    dataset: datasets.Dataset, fraction: float = 0.2, seed: int = 0
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """A data set in two parts, at random.

    Args:
      dataset: the whole.
      fraction: of the second part, in (0, 1).
      seed: of the order.

    Returns:
      Both parts, as data sets.

    Raises:
      ValueError: a part would be empty.
    """
    held_out = round(len(dataset) * fraction)
    if not 0 < held_out < len(dataset):
        raise ValueError(
            f"fraction must leave both parts some of {len(dataset)} samples, got {fraction}."
        )
    order = np.random.default_rng(seed).permutation(len(dataset))
    first, second = (
        dataclasses.replace(dataset, inputs=dataset.inputs[part], labels=dataset.labels[part])
        for part in (order[held_out:], order[:held_out])
    )
    return first, second


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
        batch, defense_state = defense.prepare(batch, defense_state, params)
        plain = at(model, key)
        per_sample = defense.stage == "per_sample"
        take = gradients.per_sample_gradients if per_sample else gradients.gradient
        defended, defense_state = defense.update(take(plain, params, batch), defense_state, params)
        updates, optimizer_state = optimizer.update(defended, optimizer_state, params)
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


def at(model: Model | Precode, key: Array) -> Model:
    """The model with its noise fixed, where it has any."""
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
    for start in range(0, len(dataset), 500):
        part = datasets.take(dataset, np.arange(start, min(start + 500, len(dataset))))
        logits = plain.apply(params, part.inputs)
        guess = logits.argmax(-1) if plain.num_classes > 1 else (logits[:, 0] > 0).astype(int)
        right += int(jnp.sum(guess == part.labels))
    return right / len(dataset)
