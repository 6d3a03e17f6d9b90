"""From a block of a sweep to what its jobs need: data, weights, observations, an attack."""

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from invjax import attacks, calls, datasets, defenses, driver, models
from invjax.base import Array, Attack, Batch, Defense, Model, Observation, Params
from invjax.evaluation import run
from invjax.evaluation.grid import Block, Cell, Sweep
from invjax.observe import observe

TRAINING_BATCH = 64
OPTIMIZER = optax.adam(1e-3)


class Setting(NamedTuple):
    """A cell made concrete, but for the numbers that share a compilation.

    Attributes:
      dataset: where victims come from.
      model: the model.
      numbers: `[K]` strengths of the defence, then of the attack.
      defense: `defense(numbers) -> Defense`.
      attack: `attack(numbers) -> Attack`.
      grant_labels: whether the adversary is told the labels.
      key: cells of equal keys differ in their numbers only, and share a compilation.
    """

    dataset: datasets.Dataset
    model: Model
    numbers: np.ndarray
    defense: Any
    attack: Any
    grant_labels: bool
    key: str


def setting(sweep: Sweep, cell: Cell) -> Setting:
    """Read a cell's texts.

    Args:
      sweep: settings of all cells.
      cell: one of them.

    Returns:
      The setting.

    Raises:
      ValueError: an unknown name, a strength out of range, a data set that cannot be read.
    """
    dataset = load(cell.dataset, sweep.data_dir)
    model = build(cell.model, dataset.num_classes)
    wanted = {"restarts": sweep.restarts, "num_steps": sweep.steps, "labels": sweep.labels}
    wanted = {name: value for name, value in wanted.items() if value is not None}
    defense_calls = calls.parse(cell.defense, "defense")
    attack_calls = calls.parse(cell.attack, "attack")
    of_defense, of_attack = calls.numbers(defense_calls), calls.numbers(attack_calls)

    def defense(numbers) -> Defense:
        made = calls.with_numbers(defense_calls, numbers[: len(of_defense)])
        return defenses.parse(made, model)

    def attack(numbers) -> Attack:
        attack_numbers = numbers[len(of_defense) :]
        return attacks.by_name(
            calls.with_numbers(attack_calls, attack_numbers), model, defense(numbers), **wanted
        )

    numbers = [*of_defense, *of_attack]
    # Once with Python's own numbers, so that what is out of range is said before anything is run.
    attack(numbers)
    blank = [
        calls.with_numbers(parsed, ["*"] * len(values))
        for parsed, values in ((defense_calls, of_defense), (attack_calls, of_attack))
    ]
    key = json.dumps([cell.dataset, cell.model, cell.batch_size, *blank], default=str)
    granted = attacks.needs_labels(cell.attack, sweep.labels)
    return Setting(dataset, model, np.asarray(numbers, np.float32), defense, attack, granted, key)


@functools.lru_cache(maxsize=4)
def load(name: str, data_dir: str | None) -> datasets.Dataset:
    """A data set, kept while the next cells may want it again."""
    return datasets.load(name, data_dir)


@functools.lru_cache(maxsize=16)
def build(name: str, num_classes: int) -> Model:
    """A model, the same object every time, so that what is compiled for it is found again."""
    return models.by_name(name, num_classes)


def keys(block: Block) -> tuple[Array, Array]:
    """Randomness of every job, from what it is: cell, seed and victim.

    Args:
      block: the jobs.

    Returns:
      `[count]` keys of the defences and `[count]` of the attacks.
    """
    root = jax.random.fold_in(jax.random.key(block.seed), block.cell.identity)
    numbers = jnp.arange(block.first, block.first + block.count)
    jobs = jax.vmap(lambda victim: jax.random.split(jax.random.fold_in(root, victim)))(numbers)
    return jobs[:, 0], jobs[:, 1]


def client(setting: Setting) -> Callable[..., Observation]:
    """The clients of many jobs, compiled once for all settings of one key.

    Args:
      setting: of a cell.

    Returns:
      `watch(numbers, params, keys [N], batch [N, B, ...])`: what the adversary sees of every job,
      stacked; without the parameters, which all jobs share.
    """

    def watch(numbers, params, key, sample):
        return observe(
            key,
            setting.model,
            params,
            sample,
            setting.defense(numbers),
            input_range=setting.dataset.input_range,
            grant_labels=setting.grant_labels,
        )._replace(params=None)

    return driver.quick_jit(jax.vmap(watch, in_axes=(None, None, 0, 0)))


def observed(
    sweep: Sweep, block: Block, setting: Setting, client: Callable, params: Params, size: int
) -> tuple[Batch, Observation, Array]:
    """What a block's jobs begin with, padded to `size` jobs, so that all blocks share a compilation.

    Args:
      sweep: says how many victims a seed has; they are the same for every model, defence, attack.
      block: the jobs.
      setting: of its cell.
      client: of that setting.
      params: of the model.
      size: at least `block.count`.

    Returns:
      The private batches `[size, B, ...]`, the observations and keys of the attacks `[size]`.
    """
    drawn = run.draw_victims(setting.dataset, block.seed, sweep.num_victims, block.cell.batch_size)
    picks = np.resize(np.arange(block.count), size)
    batch = jax.tree.map(lambda leaf: leaf[block.first + picks], drawn)
    watch_keys, attack_keys = jax.tree.map(lambda leaf: leaf[picks], keys(block))
    return batch, client(setting.numbers, params, watch_keys, batch), attack_keys


def trained(model: Model, dataset: datasets.Dataset, steps: int, seed: int) -> Params:
    """Weights after some steps of Adam (rate 1e-3, batches of 64), or fresh ones.

    Args:
      model: the model.
      dataset: to train on.
      steps: how many; 0 is fresh.
      seed: of the initialisation and of the batches.

    Returns:
      The parameters.
    """
    root = jax.random.key(seed)
    params = model.init(jax.random.fold_in(root, 3), dataset.input_shape)
    if not steps:
        return params
    state = OPTIMIZER.init(params)
    rng = np.random.default_rng([seed, 4])
    for _ in range(steps):
        picks = rng.integers(0, len(dataset), TRAINING_BATCH)
        params, state = _update(model, params, state, datasets.take(dataset, picks))
    return params


@functools.partial(jax.jit, static_argnums=0)
def _update(model, params, state, batch):
    updates, state = OPTIMIZER.update(jax.grad(model.loss)(params, batch), state, params)
    return optax.apply_updates(params, updates), state


def zero_gradients(observation: Observation) -> np.ndarray:
    """Which jobs' gradients are all zero, `[N]`: nothing is left to invert there."""
    leaves: Sequence[Array] = jax.tree.leaves(observation.gradient)
    flat = [np.asarray(leaf).reshape(leaf.shape[0], -1) for leaf in leaves]
    return np.all([(leaf == 0).all(axis=1) for leaf in flat], axis=0)
