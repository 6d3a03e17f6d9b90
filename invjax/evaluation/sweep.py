"""Run a sweep: blocks of jobs over devices and processes, recorded one by one, resumed exactly."""

import collections
import functools
import itertools
import json
import pathlib
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jax.experimental import multihost_utils

from invjax import datasets, driver, files
from invjax.base import Observation, Params
from invjax.evaluation import checkpoint, grid, jobs, journal, parallel, run, store

JOBS_ON_CPU = 64
JOBS_ON_ACCELERATOR = 1024


class Event(NamedTuple):
    """What a caller is told while a sweep runs.

    Attributes:
      jobs_done: jobs on record, of earlier runs and other processes too as far as this one knows.
      jobs_total: jobs of the whole sweep.
      jobs_failed: of those on record.
      block: the block that is being run; `None` after the last.
      progress: of its attack; `None` before its first step.
      message: something that a log should keep; empty otherwise.
    """

    jobs_done: int
    jobs_total: int
    jobs_failed: int
    block: grid.Block | None
    progress: driver.Progress | None = None
    message: str = ""


Listener = Callable[[Event], None]


class Prepared(NamedTuple):
    """A block and what its jobs need."""

    block: grid.Block
    setting: jobs.Setting
    client: Callable[..., Observation]
    program: parallel.Program
    params: Params


def sweep(
    settings: grid.Sweep | Mapping[str, Any] | pathlib.Path | str,
    out: pathlib.Path | str | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    block_size: int | None = None,
    checkpoint_seconds: float = 60.0,
    on_event: Listener | None = None,
) -> pa.Table:
    """Attack every combination that the settings span, and return the table of reconstructions.

    Every block of jobs is on record in the folder before the next begins, and long attacks leave
    checkpoints, so a killed sweep loses little and resumes to the same table. A block that raises is
    recorded as failed with its reason, and the rest goes on.

    Args:
      settings: a `Sweep`, a mapping with its names, or a TOML file.
      out: folder of the record; a temporary one where `None`.
      resume: go on with the sweep in that folder, whose settings must be the same.
      overwrite: replace an earlier sweep there.
      block_size: jobs that are run and recorded together; chosen from the devices' memory where `None`.
      checkpoint_seconds: time between checkpoints of a running block.
      on_event: called as the sweep goes; a `KeyboardInterrupt` that it raises ends the sweep after a
        checkpoint.

    Returns:
      One row a reconstructed sample: settings, metrics, baselines, time, versions, and the status:
      `ok`; `not found` where the attack itself knows so; `not finite`; `failed` where it raised.

    Raises:
      ValueError: settings that cannot be read, or a folder that does not suit; nothing has run then.
      OSError: a full disk, say; what was recorded stays.
    """
    if not isinstance(settings, grid.Sweep):
        is_path = isinstance(settings, str | pathlib.Path)
        settings = grid.from_toml(settings) if is_path else grid.from_mapping(settings)
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}.")
    if out is None and (resume or jax.process_count() > 1):
        raise ValueError("out must name a folder to resume in, or for several processes to share.")
    check(settings)
    options = (resume, overwrite, block_size, checkpoint_seconds, on_event)
    if out is not None:
        return _sweep(settings, pathlib.Path(out), *options)
    with tempfile.TemporaryDirectory() as folder:
        return _sweep(settings, pathlib.Path(folder) / "sweep", *options)


def check(settings: grid.Sweep) -> list[jobs.Setting]:
    """Read every cell before anything runs.

    Args:
      settings: of the sweep.

    Returns:
      A setting a cell.

    Raises:
      ValueError: whatever is wrong in any of them, with the cell.
    """
    found = []
    for cell in grid.cells(settings):
        try:
            found.append(jobs.setting(settings, cell))
            needed = settings.num_victims * cell.batch_size
            if needed > len(found[-1].dataset):
                raise ValueError(
                    f"num_victims {settings.num_victims} of batch_size {cell.batch_size} need "
                    f"{needed} samples, {cell.dataset} has {len(found[-1].dataset)}."
                )
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{', '.join(f'{k}={v}' for k, v in cell._asdict().items())}: {error}"
            ) from error
    return found


def _sweep(settings, folder, resume, overwrite, block_size, seconds, on_event) -> pa.Table:
    process, processes = jax.process_index(), jax.process_count()
    tell = on_event or (lambda event: None)
    if process == 0:
        _open(settings, folder, resume, overwrite, block_size)
        files.clean(folder)
    if processes > 1:
        multihost_utils.sync_global_devices("invjax: the folder is there")
    record = _open(settings, folder, True, False, block_size)
    blocks = grid.blocks(settings, record["plan"]["block_size"])
    found = journal.read(folder)
    total = sum(block.count for block in blocks)
    for problem in found.damaged:
        tell(Event(0, total, 0, None, message=f"passed over: {problem}"))
    status = {name: entry["status"] for name, entry in found.blocks.items()}
    counts = collections.Counter()
    for block in blocks:
        counts[status.get(block.name, "open")] += block.count
    mine = [block for block in blocks[process::processes] if status.get(block.name) != "done"]
    for prepared in prepare(settings, mine):
        block = prepared.block
        event = Event(total - counts["open"], total, counts["failed"], block)
        tell(event)
        checkpoints = _checkpoints(folder, prepared, seconds, event, tell)
        size = record["plan"]["block_size"]
        rows, arrays, reason = _attempt(settings, prepared, size, checkpoints, event, tell)
        outcome = "failed" if reason else "done"
        journal.record_block(folder, process, block.name, rows, arrays, outcome, reason)
        counts[status.get(block.name, "open")] -= block.count
        counts[outcome] += block.count
    if processes > 1:
        multihost_utils.sync_global_devices("invjax: every process is done")
    if process == 0:
        _finish(folder, blocks)
    if processes > 1:
        multihost_utils.sync_global_devices("invjax: the table is there")
    tell(Event(total, total, counts["failed"], None))
    return pq.read_table(folder / "results.parquet")


def _open(settings, folder, resume, overwrite, block_size) -> dict[str, Any]:
    wanted: dict[str, Any] = {"sweep": grid.as_mapping(settings)}
    if not resume:
        wanted["plan"] = {"block_size": block_size or choose_block_size(settings)}
        wanted["versions"] = {**store.versions(), **commit()}
    return journal.open_sweep(folder, wanted, resume, overwrite)


def choose_block_size(settings: grid.Sweep) -> int:
    """Jobs of a block: as many as the devices of all processes' kind hold at once.

    On CPU a fixed number: memory does not bound it there, and what is recorded often is lost seldom.

    Args:
      settings: of the sweep; its first cell is measured.

    Returns:
      At least 1.
    """
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        return min(settings.num_victims, JOBS_ON_CPU)
    block = grid.blocks(settings, 1)[0]
    _, setting, client, program, params = next(prepare(settings, [block]))
    _, observation, keys = jobs.observed(settings, block, setting, client, params, 1)
    one = jax.tree.map(lambda leaf: leaf[0], observation)
    most = min(-(-settings.num_victims // len(devices)), JOBS_ON_ACCELERATOR)
    fitting = parallel.jobs_per_device(program, setting.numbers, params, one, keys[0], most)
    return min(settings.num_victims, fitting * len(devices))


def prepare(settings: grid.Sweep, blocks: Sequence[grid.Block]) -> Iterator[Prepared]:
    """Blocks with what they need, those of one compilation together; one of each is kept at a time."""
    read = {cell: jobs.setting(settings, cell) for cell in dict.fromkeys(b.cell for b in blocks)}
    order = {key: index for index, key in enumerate(dict.fromkeys(s.key for s in read.values()))}
    ordered = sorted(blocks, key=lambda block: order[read[block.cell].key])
    weights: tuple[Any, Any] = (None, None)
    for number, (_, members) in enumerate(
        itertools.groupby(ordered, key=lambda block: read[block.cell].key)
    ):
        if number:
            # JAX keeps all that it ever compiled, about 60 MB a program.
            jax.clear_caches()
        group = list(members)
        client = jobs.client(read[group[0].cell])
        program = parallel.program(read[group[0].cell].attack, read[group[0].cell].numbers)
        for block in group:
            setting = read[block.cell]
            wanted = (block.cell.dataset, block.cell.model, block.cell.train_steps, block.seed)
            if weights[0] != wanted:
                steps = block.cell.train_steps
                weights = (wanted, jobs.trained(setting.model, setting.dataset, steps, block.seed))
            yield Prepared(block, setting, client, program, weights[1])


def _checkpoints(folder, prepared, seconds, event, tell) -> parallel.Checkpoints:
    block, setting = prepared.block, prepared.setting
    # The key holds everything but the numbers; the block's name stands for seed and victims.
    fingerprint = json.dumps([block.name, setting.key, setting.numbers.tolist()])

    def load(like):
        found = checkpoint.load(folder, block.name, like, fingerprint)
        if found.problem not in ("", "none"):
            tell(event._replace(message=f"checkpoint of {block.name} not used: {found.problem}"))
        return None if found.problem else (found.step, found.state)

    def save(step, state):
        checkpoint.save(folder, block.name, step, state, fingerprint)

    return parallel.Checkpoints(load, save, seconds)


def _attempt(settings, prepared, size, checkpoints, event, tell):
    """Rows, arrays and an empty reason; of an attack that raises, rows that say so, and the reason."""
    try:
        return *_attack(settings, prepared, size, checkpoints, event, tell), ""
    except (KeyboardInterrupt, MemoryError, OSError):
        raise
    except Exception as error:
        block = prepared.block
        tell(event._replace(message=f"{block.name} failed: {traceback.format_exc()}"))
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:500]
        said = {**_facts(block), "status": "failed", "reason": reason}
        rows = [
            {**said, "victim": victim, "sample": sample}
            for victim in range(block.first, block.first + block.count)
            for sample in range(block.cell.batch_size)
        ]
        return rows, None, reason


def _attack(settings, prepared, size, checkpoints, event, tell):
    """Rows and arrays of a block."""
    started = time.perf_counter()
    block, setting, client, program, params = prepared
    batch, observation, keys = jobs.observed(settings, block, setting, client, params, size)
    prototype = setting.attack(setting.numbers)
    if prototype.check is not None:
        one = jax.tree.map(lambda leaf: leaf[0], observation)
        # Traced: one job's values speak for no other's, its shapes do.
        jax.eval_shape(
            lambda hidden, params: prototype.check(hidden._replace(params=params)), one, params
        )
    result = parallel.run(
        program,
        setting.numbers,
        params,
        observation,
        keys,
        checkpoints=checkpoints,
        on_chunk=lambda progress: tell(event._replace(progress=progress)),
    )
    inputs, labels, rows = run.score(setting.dataset, batch, result.reconstruction)
    rows = rows[: block.count * block.cell.batch_size]
    silent = jobs.zero_gradients(observation)
    facts, elapsed = _facts(block), time.perf_counter() - started
    for row in rows:
        victim = row["victim"]
        row["victim"] += block.first
        row["initial_objective"] = float(result.initial_objective[victim])
        row["steps"] = result.steps
        row["seconds"] = elapsed / len(rows)
        row["status"], row["reason"] = _status(row)
        if silent[victim]:
            # No failure: the defence won, and what came back is a guess.
            row["reason"] = "the defence left a gradient of zeros"
        row.update(facts)
    arrays = {
        "truth": np.asarray(datasets.denormalize(setting.dataset, batch.inputs)),
        "labels": np.asarray(batch.labels),
        "reconstruction": inputs,
        "recovered_labels": labels,
    }
    return rows, {name: array[: block.count] for name, array in arrays.items()}


def _status(row: Mapping[str, Any]) -> tuple[str, str]:
    """Status of a sample that came back, and the reason where it is not `ok`."""
    if row["found"] and np.isfinite(row["mse"]):
        return "ok", ""
    if np.isfinite([row["mse"], row["objective"]]).all():
        return "not found", "the attack knows that it has not found this sample"
    return "not finite", "the attack did not stay finite"


def _facts(block: grid.Block) -> dict[str, Any]:
    return {
        **block.cell._asdict(),
        "cell": block.cell.name,
        "seed": block.seed,
        "block": block.name,
    } | {name: str(value) for name, value in {**store.versions(), **commit()}.items()}


@functools.cache
def commit() -> dict[str, str]:
    """The git commit of the working folder, where it is one."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return {"commit": ""}
    return {"commit": found.stdout.strip()}


def _finish(folder: pathlib.Path, blocks: Sequence[grid.Block]) -> None:
    recorded = journal.read(folder).blocks
    order = [block.name for block in blocks if block.name in recorded]
    journal.compact(folder, {block.name: block.cell.name for block in blocks}, order)
