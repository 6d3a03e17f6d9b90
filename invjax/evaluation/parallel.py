"""Many jobs of one attack at once: `pmap` over devices, `vmap` over the jobs of a device."""

import functools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from invjax import conv, driver
from invjax.base import Array, Attack, Observation, Params, PyTree, Reconstruction

Build = Callable[[Any], Attack]

SHARE = 0.7
"""Share of a device's memory that a program may take."""


class Program(NamedTuple):
    """An attack compiled for stacked jobs `[devices, jobs, ...]`; compiled anew for every shape.

    `numbers [K]` are strengths, the same for all jobs; so are `params`, a copy a device, and the
    observations go without.

    Attributes:
      copy: `copy(params) -> params`, one copy a device.
      start: `start(numbers, params, observation, keys) -> state`.
      advance: `advance(numbers, params, observation, state, count) -> state`; it takes the state over.
      finish: `finish(numbers, params, observation, state) -> Reconstruction`.
      summary: `summary(state) -> (objective [devices, jobs], done [devices])`.
      num_steps: steps at most.
      devices: those that it runs on.
    """

    copy: Callable[[Params], Params]
    start: Callable[..., PyTree]
    advance: Any
    finish: Callable[..., Reconstruction]
    summary: Callable[[PyTree], tuple[Array, Array]]
    num_steps: int
    devices: tuple[jax.Device, ...]


class Checkpoints(NamedTuple):
    """Where a run keeps its state in case that it is killed.

    Attributes:
      load: `load(like) -> (step, state) | None`, for a state of these shapes `[jobs, ...]`.
      save: `save(step, state)`.
      interval: seconds between two.
    """

    load: Callable[[PyTree], tuple[int, PyTree] | None]
    save: Callable[[int, PyTree], None]
    interval: float


class Result(NamedTuple):
    """What became of `N` jobs.

    Attributes:
      reconstruction: stacked `[N, ...]`, on the host.
      initial_objective: `[N]`, before the first step.
      steps: steps run.
      seconds: wall time, compilation included.
    """

    reconstruction: Reconstruction
    initial_objective: np.ndarray
    steps: int
    seconds: float


def program(
    build: Build, numbers: np.ndarray, devices: Sequence[jax.Device] | None = None
) -> Program:
    """Compile an attack for many jobs.

    Args:
      build: `build(numbers) -> attack`; under `jit` the numbers are traced, so that programs that
        differ in nothing else share one compilation.
      numbers: `[K]` strengths to read the number of steps from.
      devices: of this process; all of them where `None`.

    Returns:
      The program.

    Raises:
      ValueError: an attack that takes steps and has no objective.
    """
    devices = tuple(jax.local_devices() if devices is None else devices)
    prototype = build(numbers)
    if prototype.num_steps and prototype.objective is None:
        raise ValueError("An attack that takes steps must tell its objective.")

    def start(numbers, params, observation, keys):
        def one(hidden, key):
            state = build(numbers).init(key, hidden._replace(params=params))
            # A donated buffer must be there once only, and a start may share some between fields.
            return jax.tree.map(jnp.copy, state)

        return jax.vmap(one)(observation, keys)

    def advance(numbers, params, observation, state, count):
        def one(hidden, state):
            return build(numbers).step(hidden._replace(params=params), state)

        several = conv.grouped_vmap(one)
        return jax.lax.fori_loop(0, count, lambda _, state: several(observation, state), state)

    def finish(numbers, params, observation, state):
        def one(hidden, state):
            return build(numbers).result(hidden._replace(params=params), state)

        return jax.vmap(one)(observation, state)

    def summary(state):
        objective, done = prototype.objective, prototype.done
        jobs = jax.tree.leaves(state)[0].shape[:1]
        return (
            jnp.full(jobs, jnp.nan) if objective is None else jax.vmap(objective)(state),
            jnp.zeros((), bool) if done is None else jax.vmap(done)(state).all(),
        )

    def spread(function, in_axes, **options):
        return jax.pmap(function, in_axes=in_axes, devices=devices, **options)

    identity = spread(lambda tree: tree, 0)

    def copy(params):
        lead = (len(devices),)
        return identity(jax.tree.map(lambda x: jnp.broadcast_to(x, lead + jnp.shape(x)), params))

    return Program(
        copy=copy,
        start=spread(start, (None, 0, 0, 0)),
        advance=spread(advance, (None, 0, 0, 0, None), donate_argnums=3),
        finish=spread(finish, (None, 0, 0, 0)),
        summary=spread(summary, 0),
        num_steps=prototype.num_steps,
        devices=devices,
    )


def run(
    program: Program,
    numbers: np.ndarray,
    params: Params,
    observation: Observation,
    keys: Array,
    *,
    checkpoints: Checkpoints | None = None,
    on_chunk: Callable[[driver.Progress], None] | None = None,
) -> Result:
    """Run `N` jobs, as many at once as the devices hold.

    Uneven numbers are padded with copies of the first jobs, whose results are dropped. Where the
    devices' memory does not suffice, half as many are tried, one half after the other.

    Args:
      program: the compiled attack.
      numbers: `[K]` strengths.
      params: the model's parameters, one set for all jobs.
      observation: what the adversary of every job sees, stacked `[N, ...]`; `params` is not read.
      keys: `[N]` PRNG keys, one a job: all its randomness.
      checkpoints: where the state goes every so often.
      on_chunk: called between chunks of steps; a `KeyboardInterrupt` that it raises passes through.

    Returns:
      The result, in the order of the jobs.
    """
    total, at_once = len(keys), len(keys)
    observation = observation._replace(params=None)
    while True:
        parts = [slice(first, first + at_once) for first in range(0, total, at_once)]
        try:
            results = [
                _run(
                    program,
                    numbers,
                    params,
                    jax.tree.map(lambda leaf, part=part: leaf[part], observation),
                    keys[part],
                    # A half is short, and another program's state would not fit it.
                    checkpoints if at_once == total else None,
                    on_chunk,
                )
                for part in parts
            ]
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or at_once <= len(program.devices):
                raise
            at_once = -(-at_once // 2)
            continue
        return Result(
            reconstruction=jax.tree.map(
                lambda *leaves: np.concatenate(leaves), *(part.reconstruction for part in results)
            ),
            initial_objective=np.concatenate([part.initial_objective for part in results]),
            steps=max(part.steps for part in results),
            seconds=sum(part.seconds for part in results),
        )


def _run(program, numbers, params, observation, keys, checkpoints, on_chunk) -> Result:
    started = time.perf_counter()
    number, devices = len(keys), len(program.devices)
    # Sent to the devices once, not with every chunk.
    copies = program.copy(params)
    observation, keys = _stack((observation, keys), devices)
    state = program.start(numbers, copies, observation, keys)
    initial = np.asarray(_unstack(program.summary(state)[0], number))
    steps = 0
    if checkpoints is not None and program.num_steps:
        found = checkpoints.load(jax.eval_shape(lambda tree: _unstack(tree, number), state))
        if found is not None:
            steps, saved = found
            state = jax.tree.map(
                lambda leaf, like: jax.device_put(leaf, like.sharding),
                _stack(saved, devices),
                state,
            )
    leaves, treedef = jax.tree.flatten(_shapes((numbers, copies, observation, state)))
    on_cpu = program.devices[0].platform == "cpu"
    stepwise = on_cpu and _keeps_lax_conv(program.advance, tuple(leaves), treedef)
    saved_at = time.perf_counter()

    def after(steps, state, objective):
        nonlocal saved_at
        if on_chunk is not None:
            on_chunk(driver.Progress(steps, program.num_steps, objective.reshape(-1)[:number]))
        if checkpoints is not None and time.perf_counter() - saved_at > checkpoints.interval:
            checkpoints.save(steps, _unstack(state, number))
            saved_at = time.perf_counter()

    state, steps, interruption = driver.advance_in_chunks(
        lambda state, count: program.advance(numbers, copies, observation, state, count),
        program.summary,
        state,
        steps,
        program.num_steps,
        after,
        stepwise=stepwise,
    )
    if interruption is not None:
        if checkpoints is not None and steps:
            checkpoints.save(steps, _unstack(state, number))
        raise interruption
    reconstruction = program.finish(numbers, copies, observation, state)
    return Result(
        reconstruction=jax.tree.map(np.asarray, _unstack(reconstruction, number)),
        initial_objective=initial,
        steps=steps,
        seconds=time.perf_counter() - started,
    )


def sharded_map(
    function: Callable[[PyTree, PyTree], PyTree], devices: Sequence[jax.Device] | None = None
) -> Callable[[PyTree, PyTree], PyTree]:
    """Compile a function for many inputs at once.

    Args:
      function: `function(shared, one) -> result`.
      devices: of this process; all of them where `None`.

    Returns:
      `mapped(shared, stacked) -> results`: of stacked inputs `[N, ...]`, stacked on the host in
      their order. Uneven numbers are padded; it compiles anew for another `N`.
    """
    devices = tuple(jax.local_devices() if devices is None else devices)

    def several(shared, stacked):
        return conv.grouped_vmap(lambda one: function(shared, one))(stacked)

    spread = jax.pmap(several, in_axes=(None, 0), devices=devices)

    def mapped(shared, stacked):
        number = len(jax.tree.leaves(stacked)[0])
        results = spread(shared, _stack(stacked, len(devices)))
        return jax.tree.map(np.asarray, _unstack(results, number))

    return mapped


@functools.partial(jax.jit, static_argnums=1)
def _stack(tree, devices):
    """Jobs `[N, ...]` as `[devices, jobs, ...]`, padded with copies of the first."""
    number = len(jax.tree.leaves(tree)[0])
    jobs = -(-number // devices)
    picks = np.resize(np.arange(number), devices * jobs)
    return jax.tree.map(lambda leaf: leaf[picks].reshape(devices, jobs, *leaf.shape[1:]), tree)


@functools.partial(jax.jit, static_argnums=1)
def _unstack(tree, number):
    """The first `[N, ...]` jobs of `[devices, jobs, ...]`."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:number], tree)


def _shapes(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), tree)


# One, because a key holds a program and all that was compiled for it.
@functools.lru_cache(maxsize=1)
def _keeps_lax_conv(advance, leaves, treedef) -> bool:
    """Whether the loop would fall to the slow convolutions of a compiled loop on CPU."""
    return conv.keeps_lax_conv(advance, *jax.tree.unflatten(treedef, leaves), 1)


def jobs_per_device(
    program: Program,
    numbers: np.ndarray,
    params: Params,
    observation: Observation,
    key: Array,
    most: int,
) -> int:
    """How many jobs fit a device at once, by the compiler's own account of memory.

    Args:
      program: the compiled attack.
      numbers: `[K]` strengths.
      params: the model's parameters.
      observation: that of one job, or the shapes of it.
      key: any key.
      most: how many are wanted.

    Returns:
      Between 1 and `most`: halved until the program fits.
    """
    limit = _memory(program.devices[0]) * SHARE
    devices = len(program.devices)

    def shaped(leaf, *lead):
        return jax.ShapeDtypeStruct((*lead, *leaf.shape), leaf.dtype)

    copies = jax.tree.map(lambda leaf: shaped(leaf, devices), params)
    count = most
    while count > 1:
        keys = shaped(key, devices, count)
        stacked = jax.tree.map(
            lambda leaf, count=count: shaped(leaf, devices, count),
            observation._replace(params=None),
        )
        state = jax.eval_shape(program.start, numbers, copies, stacked, keys)
        compiled = program.advance.lower(numbers, copies, stacked, state, 1).compile()
        analysis = compiled.memory_analysis()
        if analysis is None:
            return count
        used = analysis.temp_size_in_bytes + analysis.argument_size_in_bytes
        if used * (devices if program.devices[0].platform == "cpu" else 1) <= limit:
            return count
        count //= 2
    return 1


def _memory(device: jax.Device) -> float:
    """Bytes of memory: of the accelerator, or of the host."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
