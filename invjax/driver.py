"""The one host loop: runs any attack in compiled chunks, with progress, early stop and interruption."""

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from invjax import conv
from invjax.base import Array, Attack, Observation, PyTree, Reconstruction


class Progress(NamedTuple):
    """What a caller is told between chunks.

    Attributes:
      step: steps done.
      num_steps: steps at most.
      objective: the attack's best objective so far, `[]`, or `[N]` over victims; `None` for a closed form.
    """

    step: int
    num_steps: int
    objective: np.ndarray | None


def quick_jit(function: Callable, **options: Any) -> Callable:
    """`jax.jit` for what runs seldom, such as a client: a CPU compiles random draws ten times faster so.

    Args:
      function: to compile.
      **options: of `jax.jit`.

    Returns:
      The compiled function; it runs as fast.
    """
    on_cpu = jax.default_backend() == "cpu"
    level = {"xla_backend_optimization_level": 1} if on_cpu else None
    return jax.jit(function, compiler_options=level, **options)


Run = Callable[..., Reconstruction]
MAX_CHUNK = 256
"""Steps of the largest chunk."""


def chunk_size(attack: Attack, observation: Observation, state, backend: str | None = None) -> int:
    """Steps in one compiled call.

    A CPU runs `lax.conv` derivatives inside a compiled loop up to a hundred times slower than
    outside, so an attack that keeps them goes one step a call; everything else goes in chunks.

    Args:
      attack: the attack.
      observation: what it will be given.
      state: its state, or the shapes of it.
      backend: `cpu`, `gpu` or `tpu`; the present one where `None`.

    Returns:
      1, or `MAX_CHUNK`: a chunk never holds more.
    """
    backend = jax.default_backend() if backend is None else backend
    slow = backend == "cpu" and conv.keeps_lax_conv(attack.step, observation, state)
    return 1 if slow else MAX_CHUNK


def advance_in_chunks(
    advance: Callable[[PyTree, int], PyTree],
    summary: Callable[[PyTree], tuple[Array | None, Array]],
    state: PyTree,
    steps: int,
    num_steps: int,
    after: Callable[[int, PyTree, np.ndarray | None], None],
    *,
    chunk: int | None = None,
    stepwise: bool = False,
) -> tuple[PyTree, int, KeyboardInterrupt | None]:
    """Advance a state to its last step, or until all in it is done, or until an interruption.

    Args:
      advance: `advance(state, count) -> state`, compiled; it may take the state over.
      summary: `summary(state) -> (objective, done)`, compiled.
      state: where to begin.
      steps: steps that it has behind it.
      num_steps: steps at most.
      after: `after(steps, state, objective)`, called on the host after every chunk.
      chunk: steps of a chunk; where `None` chunks grow while they are quick, so that the host neither
        idles nor waits.
      stepwise: call `advance` for one step at a time.

    Returns:
      The state, its steps, and the `KeyboardInterrupt` that ended it, if one did. Ctrl-C ends it after
      the chunk, or the step, that is running; a second one at once, and raises where the state was lost.
    """
    count = chunk or 1
    with _held_interrupts() as pressed:
        try:
            while steps < num_steps and not pressed:
                started = time.perf_counter()
                count = min(count, num_steps - steps)
                for part in [1] * count if stepwise else [count]:
                    state, steps = advance(state, part), steps + part
                    if pressed:
                        break
                objective, done = jax.tree.map(np.asarray, summary(state))
                after(steps, state, objective)
                if done.all():
                    break
                if chunk is None and time.perf_counter() - started < 0.1:
                    count = min(2 * count, MAX_CHUNK)
        except KeyboardInterrupt as interruption:
            if any(leaf.is_deleted() for leaf in jax.tree.leaves(state) if isinstance(leaf, Array)):
                raise
            return state, steps, interruption
        return state, steps, KeyboardInterrupt() if pressed else None


@contextlib.contextmanager
def _held_interrupts() -> Iterator[list[int]]:
    """Note a Ctrl-C in the list that is yielded instead of raising; a second one raises.

    Raised in the midst of a call that has taken a state over, it would leave neither the old nor the new.
    """
    pressed: list[int] = []

    def note(number, frame):
        del frame
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    # Handlers belong to the main thread, and another than Python's own is somebody else's.
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if not ours:
        yield pressed
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def runner(attack: Attack, *, batched: bool = False, chunk: int | None = None) -> Run:
    """Compile an attack once, for many observations of the same shapes.

    Args:
      attack: the attack.
      batched: whether keys and observations carry a leading axis of victims.
      chunk: steps in one compiled call; chosen by backend where `None`.

    Returns:
      `run(key, observation, on_chunk=None) -> Reconstruction`. `on_chunk(progress)` is called on the
      host between chunks. A `KeyboardInterrupt` ends the loop and returns the best so far with
      `diagnostics["interrupted"]` true.

    Raises:
      ValueError: a chunk smaller than 1.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}.")

    def vectorized(function: Callable) -> Callable:
        return jax.vmap(function) if batched else function

    init = jax.jit(vectorized(attack.init))
    step = conv.grouped_vmap(attack.step) if batched else attack.step
    result = jax.jit(vectorized(attack.result))
    one = jax.jit(step, donate_argnums=1)

    def several(observation, state, count):
        return jax.lax.fori_loop(0, count, lambda _, state: step(observation, state), state)

    many = jax.jit(several, donate_argnums=1)
    summary = jax.jit(
        lambda state: (
            None if attack.objective is None else vectorized(attack.objective)(state),
            jnp.zeros((), bool) if attack.done is None else vectorized(attack.done)(state).all(),
        )
    )

    def run(
        key: Array,
        observation: Observation,
        on_chunk: Callable[[Progress], None] | None = None,
    ) -> Reconstruction:
        if attack.check is not None:
            # One victim of many speaks for the shapes; one with a bad gradient fails by itself.
            first = jax.tree.map(lambda leaf: leaf[0], observation) if batched else observation
            attack.check(first)
        state = init(key, observation)
        # Donation wants every buffer once, and a start may share some between fields.
        state = jax.tree.map(jnp.copy, state)
        # Compiled now, so that an interruption need not wait for it.
        reconstruction = result(observation, state)
        largest = chunk
        if chunk is None and attack.num_steps:
            largest = chunk_size(dataclasses.replace(attack, step=step), observation, state)

        def advance(state, count):
            return one(observation, state) if largest == 1 else many(observation, state, count)

        def after(steps, state, objective):
            if on_chunk is not None:
                on_chunk(Progress(steps, attack.num_steps, objective))

        state, steps, interruption = advance_in_chunks(
            advance, summary, state, 0, attack.num_steps, after, chunk=chunk, stepwise=largest == 1
        )
        if steps:
            reconstruction = result(observation, state)
        diagnostics = {**reconstruction.diagnostics, "interrupted": interruption is not None}
        return reconstruction._replace(diagnostics=diagnostics)

    return run


def run(
    attack: Attack,
    key: Array,
    observation: Observation,
    *,
    batched: bool = False,
    chunk: int | None = None,
    on_chunk: Callable[[Progress], None] | None = None,
) -> Reconstruction:
    """Run an attack once from the host; `runner` where it runs many times.

    Args:
      attack: the attack.
      key: a PRNG key (keys where batched).
      observation: an observation (stacked where batched).
      batched: whether these carry a leading axis of victims.
      chunk: steps in one compiled call; chosen by backend where `None`.
      on_chunk: called between chunks with the progress.

    Returns:
      The reconstruction.

    Raises:
      ValueError: a chunk smaller than 1, or an observation that the attack cannot use.
    """
    return runner(attack, batched=batched, chunk=chunk)(key, observation, on_chunk)
