"""Draw victims, observe them, attack them, measure: one attack on many batches."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from invjax import datasets, driver, metrics
from invjax.base import Array, Attack, Batch, Defense, Model, Observation, Params, Reconstruction
from invjax.observe import observe


class Experiment(NamedTuple):
    """What is attacked, and how.

    Attributes:
      dataset: where the victims come from.
      model: the model.
      params: its parameters, one set for all victims.
      defense: the clients' defence.
      attack: the attack.
      batch_size: samples of one victim.
      num_victims: batches to attack, each on its own.
      grant_labels: whether the adversary is told the labels.
      seed: of the victims, the defence and the attack.
    """

    dataset: datasets.Dataset
    model: Model
    params: Params
    defense: Defense
    attack: Attack
    batch_size: int
    num_victims: int
    grant_labels: bool
    seed: int


class Outcome(NamedTuple):
    """What came out, for `N` victims of `B` samples.

    Attributes:
      truth: `[N, B, ...]` private inputs, raw units.
      labels: `[N, B]` private labels.
      reconstruction: `[N, B, ...]`, matched to the truth.
      recovered_labels: `[N, B]`, matched likewise.
      trace: `[N, T]` best objective after every step.
      rows: a dict a sample: victim, sample, metrics, baselines.
      interrupted: whether the attack was stopped early.
      seconds: wall time of the attacks, compilation included.
    """

    truth: np.ndarray
    labels: np.ndarray
    reconstruction: np.ndarray
    recovered_labels: np.ndarray
    trace: np.ndarray
    rows: list[dict[str, Any]]
    interrupted: bool
    seconds: float


def draw_victims(dataset: datasets.Dataset, seed: int, num_victims: int, batch_size: int) -> Batch:
    """Private batches; the same for the same seed, whatever is done to them.

    Args:
      dataset: where they come from.
      seed: of the draw.
      num_victims: how many batches, `N`.
      batch_size: samples of each, `B`.

    Returns:
      Stacked batches `[N, B, ...]`. A sample occurs once only.

    Raises:
      ValueError: more samples than the data set holds.
    """
    key = jax.random.fold_in(jax.random.key(seed), 0)
    batch = datasets.draw(key, dataset, num_victims * batch_size)
    shape = (num_victims, batch_size)
    return jax.tree.map(lambda leaf: leaf.reshape(shape + leaf.shape[1:]), batch)


def check(experiment: Experiment) -> None:
    """Refuse an attack that cannot use what it will be shown, before anything is computed.

    Args:
      experiment: what to do.

    Raises:
      ValueError: the attack's own complaint.
    """
    attack = experiment.attack
    if attack.check is None:
        return
    victims = draw_victims(experiment.dataset, experiment.seed, 1, experiment.batch_size)
    victim = jax.tree.map(lambda leaf: leaf[0], victims)
    jax.eval_shape(lambda key: attack.check(_watch(experiment, key, victim)), jax.random.key(0))


def _watch(experiment: Experiment, key: Array, batch: Batch) -> Observation:
    return observe(
        key,
        experiment.model,
        experiment.params,
        batch,
        experiment.defense,
        input_range=experiment.dataset.input_range,
        grant_labels=experiment.grant_labels,
    )


def attack_victims(
    experiment: Experiment, on_chunk: Callable[[driver.Progress], None] | None = None
) -> Outcome:
    """Attack every victim, all of them in one vmapped run.

    Samples are matched to the truth by the least squared error afterwards; nothing else looks at it.

    Args:
      experiment: what to do.
      on_chunk: called between chunks of steps with the progress.

    Returns:
      The outcome; of an interrupted attack, the best so far.

    Raises:
      ValueError: more samples than the data set holds, or what the attack cannot use.
    """
    started = time.perf_counter()
    victims = draw_victims(
        experiment.dataset, experiment.seed, experiment.num_victims, experiment.batch_size
    )
    root = jax.random.key(experiment.seed)
    observe_keys, attack_keys = (
        jax.random.split(jax.random.fold_in(root, purpose), experiment.num_victims)
        for purpose in (1, 2)
    )

    watch = functools.partial(_watch, experiment)
    observations = driver.quick_jit(jax.vmap(watch))(observe_keys, victims)
    # Measured once beforehand, so that an interruption need not wait for compilations.
    _match(victims.inputs, victims.inputs)
    truth = np.asarray(datasets.denormalize(experiment.dataset, victims.inputs))
    measure(experiment.dataset, truth, truth)
    reconstruction = driver.run(
        experiment.attack, attack_keys, observations, batched=True, on_chunk=on_chunk
    )
    inputs, labels, rows = score(experiment.dataset, victims, reconstruction)
    trace = reconstruction.diagnostics.get("trace")
    return Outcome(
        truth=truth,
        labels=np.asarray(victims.labels),
        reconstruction=inputs,
        recovered_labels=labels,
        trace=np.zeros((experiment.num_victims, 0)) if trace is None else best_so_far(trace),
        rows=rows,
        interrupted=bool(reconstruction.diagnostics["interrupted"]),
        seconds=time.perf_counter() - started,
    )


_match = jax.jit(jax.vmap(metrics.match))


def score(
    dataset: datasets.Dataset, victims: Batch, reconstruction: Reconstruction
) -> tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]:
    """Match what came back to the truth, and measure it.

    Args:
      dataset: where the victims come from.
      victims: `[N, B, ...]`.
      reconstruction: stacked `[N, ...]`.

    Returns:
      Inputs `[N, B, ...]` in raw units and labels `[N, B]`, both matched, and a dict a sample: what
      `measure` gives, `victim`, `sample`, `label`, `recovered_label`, `label_right`, `found`, and the
      `objective` of the batch.
    """
    order = _match(reconstruction.inputs, victims.inputs)
    inputs, labels, found = (
        np.asarray(jax.vmap(lambda leaf, index: leaf[index])(jnp.asarray(leaf), order))
        for leaf in (reconstruction.inputs, reconstruction.labels, reconstruction.found)
    )
    truth = np.asarray(datasets.denormalize(dataset, victims.inputs))
    inputs = np.asarray(datasets.denormalize(dataset, inputs))
    rows = measure(dataset, truth, inputs)
    private, objective = np.asarray(victims.labels), np.asarray(reconstruction.objective)
    for index, row in enumerate(rows):
        victim, sample = divmod(index, truth.shape[1])
        row["victim"], row["sample"] = victim, sample
        row["label"] = int(private[victim, sample])
        row["recovered_label"] = int(labels[victim, sample])
        row["label_right"] = row["label"] == row["recovered_label"]
        row["found"] = bool(found[victim, sample])
        row["objective"] = float(objective[victim])
    return inputs, labels, rows


def measure(
    dataset: datasets.Dataset, truth: np.ndarray, reconstruction: np.ndarray
) -> list[dict[str, Any]]:
    """Metrics and baselines of every sample.

    Args:
      dataset: says the input range and the mean image (over the whole set).
      truth: `[N, B, ...]`, raw units.
      reconstruction: `[N, B, ...]`, raw units, matched to the truth.

    Returns:
      `N * B` dicts, victim by victim: `psnr` in decibels, `mse` in squared raw units, `ssim` of images,
      and `baseline_grey_psnr`, `baseline_mean_psnr` of guesses that saw no gradient.
    """
    low, high = raw_range(dataset)
    flat = [jnp.asarray(side).reshape(-1, *side.shape[2:]) for side in (truth, reconstruction)]
    columns = {
        "psnr": metrics.psnr(flat[1], flat[0], data_range=high - low),
        "mse": metrics.mse(flat[1], flat[0]),
    }
    if flat[0].ndim == 4:
        columns["ssim"] = metrics.ssim(flat[1], flat[0], data_range=high - low)
    mean_image = jnp.asarray(datasets.denormalize(dataset, dataset.inputs.mean(axis=0)))
    guesses = metrics.baselines(flat[0], mean_image, input_range=(low, high))
    columns |= {f"baseline_{name}_psnr": value for name, value in guesses.items()}
    arrays = {name: np.asarray(value) for name, value in columns.items()}
    return [{name: float(value[i]) for name, value in arrays.items()} for i in range(len(flat[0]))]


def raw_range(dataset: datasets.Dataset) -> tuple[float, float]:
    """Lowest and highest value in raw units, averaged over channels where these differ."""
    channels = dataset.mean.shape
    low, high = (
        float(np.mean(datasets.denormalize(dataset, np.broadcast_to(bound, channels))))
        for bound in dataset.input_range
    )
    return low, high


def best_so_far(trace: Any) -> np.ndarray:
    """Objective of the best restart after every step, `[N, T]`, of a trace `[N, R, steps + 1]`.

    Steps that nobody ran are cut off.
    """
    trace = np.asarray(trace)
    finite = np.where(np.isfinite(trace), trace, np.inf)
    best = np.minimum.accumulate(finite.min(axis=1), axis=1)
    ran = np.isfinite(trace).any(axis=(0, 1))
    return best[:, : int(np.flatnonzero(ran).max(initial=0)) + 1]
