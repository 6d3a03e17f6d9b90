"""Attacks over the course of training: how much a gradient gives away, early and late."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from invjax import datasets, driver, metrics
from invjax.base import Attack, Batch, Defense, Model
from invjax.defenses import chain
from invjax.defenses.precode import Precode
from invjax.evaluation import parallel, run, utility
from invjax.observe import observe, prepared_batch

STEPS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def attack_over_training(
    model: Model | Precode,
    dataset: datasets.Dataset,
    defense: Defense | None,
    attacks: Mapping[str, Attack],
    *,
    steps: Sequence[int] = STEPS,
    num_victims: int = 8,
    batch_size: int = 1,
    training_batch: int = 32,
    optimizer: optax.GradientTransformation | None = None,
    grant_labels: bool = True,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Train under a defence, and attack the same victims' gradients at some steps of it.

    The victims are training samples. Each attack is compiled once for all steps.

    Args:
      model: the model; of one with a bottleneck the client's noise is drawn anew for every victim.
      dataset: a fifth is held out for the accuracy.
      defense: in training and before the adversary; none where `None`.
      attacks: by the name that the rows carry.
      steps: optimizer steps before each attack, increasing.
      num_victims: batches attacked at every step.
      batch_size: samples of a victim.
      training_batch: samples of a training step.
      optimizer: Adam at 1e-3 by default.
      grant_labels: whether the adversary is told the labels.
      seed: of all randomness.

    Returns:
      A dict a step, attack and sample: `step`, `attack`, `accuracy`, `victim`, `sample`, `psnr` and the
      rest that `run.score` measures, against the private batch; and `prepared_psnr`, against what a
      defence on inputs made of it, which is all that the gradient knows.

    Raises:
      ValueError: steps that do not increase, more victims than training samples, or an attack that
        cannot use what it will be shown; nothing is trained then.
    """
    defense = chain() if defense is None else defense
    training, held_out = utility.split(dataset, seed=seed)
    victims = run.draw_victims(training, seed, num_victims, batch_size)
    root = jax.random.key(seed)
    fresh = model.init(root, dataset.input_shape)
    for attack in attacks.values():
        shown = (batch_size, num_victims, grant_labels, seed)
        run.check(run.Experiment(training, utility.at(model, root), fresh, defense, attack, *shown))
    snapshots = utility.train(
        model,
        training,
        held_out,
        defense,
        steps=steps,
        batch_size=training_batch,
        optimizer=optimizer,
        seed=seed,
    )
    watch_keys, attack_keys, noise_keys = (
        jax.random.split(jax.random.fold_in(root, purpose), num_victims) for purpose in (6, 7, 8)
    )

    def watch(params, key, noise_key, batch):
        seen = observe(
            key,
            utility.at(model, noise_key),
            params,
            batch,
            defense,
            input_range=dataset.input_range,
            grant_labels=grant_labels,
        )
        return seen._replace(params=None), prepared_batch(key, params, batch, defense)

    client = driver.quick_jit(jax.vmap(watch, in_axes=(None, 0, 0, 0)))
    numbers = np.zeros(0, np.float32)
    programs = {
        name: parallel.program(lambda numbers, attack=attack: attack, numbers)
        for name, attack in attacks.items()
    }
    rows = []
    for snapshot in snapshots:
        observation, prepared = client(snapshot.params, watch_keys, noise_keys, victims)
        for name, program in programs.items():
            result = parallel.run(program, numbers, snapshot.params, observation, attack_keys)
            said = {"step": snapshot.step, "attack": name, "accuracy": snapshot.accuracy}
            rows += [
                {**said, **row}
                for row in _measured(dataset, victims, prepared, result.reconstruction)
            ]
    return rows


def _measured(dataset, victims: Batch, prepared: Batch, reconstruction) -> list[dict[str, Any]]:
    inputs, _, rows = run.score(dataset, victims, reconstruction)
    low, high = run.raw_range(dataset)
    # Of its own matching: the transformed images are other ones.
    order = jax.vmap(metrics.match)(reconstruction.inputs, prepared.inputs)
    matched = jax.vmap(lambda leaf, index: leaf[index])(reconstruction.inputs, order)
    sides = [
        jnp.asarray(datasets.denormalize(dataset, side)).reshape(-1, *inputs.shape[2:])
        for side in (matched, prepared.inputs)
    ]
    psnr = metrics.psnr(*sides, data_range=high - low)
    for row, value in zip(rows, np.asarray(psnr), strict=True):
        row["prepared_psnr"] = float(value)
    return rows
