"""What a sweep would take, before it is run."""

import time
from typing import NamedTuple

from invjax.evaluation import grid, jobs, parallel, sweep

PROBED_STEPS = 10


class Plan(NamedTuple):
    """The size of a sweep.

    Attributes:
      cells: combinations of everything but the seed.
      jobs: victims to attack, over cells and seeds.
      samples: rows of the table.
      blocks: jobs that are run and recorded together.
      block_size: jobs of a block.
      compilations: programs; cells that differ only in numbers share one.
      compile_seconds: measured, of all programs.
      run_seconds: at most, by the time of a few steps of every program; attacks may end earlier.
    """

    cells: int
    jobs: int
    samples: int
    blocks: int
    block_size: int
    compilations: int
    compile_seconds: float
    run_seconds: float


def plan(settings: grid.Sweep, block_size: int | None = None) -> Plan:
    """Count a sweep's parts, and time a few steps of one block of every program.

    Args:
      settings: of the sweep.
      block_size: jobs of a block, at least 1; chosen as `sweep` would where `None`.

    Returns:
      The plan; nothing is recorded.

    Raises:
      ValueError: a cell that cannot be read.
    """
    found = sweep.check(settings)
    size = block_size or sweep.choose_block_size(settings)
    blocks = grid.blocks(settings, size)
    keys = {cell: one.key for cell, one in zip(grid.cells(settings), found, strict=True)}
    counts: dict[str, int] = {}
    for block in blocks:
        counts[keys[block.cell]] = counts.get(keys[block.cell], 0) + 1
    first = {keys[block.cell]: block for block in reversed(blocks)}
    compiling = running = 0.0
    for prepared in sweep.prepare(settings, list(first.values())):
        started = time.perf_counter()
        block_seconds, probe_seconds = _probe(settings, prepared, size)
        compiling += time.perf_counter() - started - probe_seconds
        running += block_seconds * counts[prepared.setting.key]
    return Plan(
        cells=len(found),
        jobs=sum(block.count for block in blocks),
        samples=sum(block.count * block.cell.batch_size for block in blocks),
        blocks=len(blocks),
        block_size=size,
        compilations=len(first),
        compile_seconds=compiling,
        run_seconds=running,
    )


def _probe(settings, prepared, size) -> tuple[float, float]:
    """Seconds of a whole block, and of the probing itself once everything is compiled."""
    block, setting, client, program, params = prepared
    _, observation, keys = jobs.observed(settings, block, setting, client, params, size)

    def seconds(num_steps: int) -> float:
        part = program._replace(num_steps=min(num_steps, program.num_steps))
        return parallel.run(part, setting.numbers, params, observation, keys).seconds

    seconds(1)
    few, more = seconds(1), seconds(1 + PROBED_STEPS)
    step = max(more - few, 0.0) / PROBED_STEPS
    return few + step * max(program.num_steps - 1, 0), few + more
