"""`invjax sweep` and `invjax report`: many attacks, recorded as they go, and their page."""

import dataclasses
import json
import os
import pathlib
import shlex
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from invjax import files
from invjax import report as pages
from invjax.cli import shared
from invjax.evaluation import grid, jobs, journal, plan, run
from invjax.evaluation import sweep as engine

PLAIN_SECONDS = 30.0
"""Time between lines of progress where there is no terminal."""


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """Attack every combination of data sets, models, defences, attacks, batch sizes and seeds.

    Everything is on record as it is done: a sweep that was killed goes on with --resume.

    invjax sweep --preset digits

    invjax sweep sweep.toml --out runs/first
    """

    file: tyro.conf.Positional[pathlib.Path | None] = None
    """TOML file of settings. Swept: datasets, models, train_steps, defenses, attacks, batch_sizes, seeds.
    For all alike: num_victims, restarts, steps, labels, data_dir."""
    preset: str | None = None
    """A sweep that comes with the package: digits."""
    out: pathlib.Path | None = None
    """Folder of the record; invjax-runs/sweep-NAME if not given."""
    plan: bool = False
    """Print the number of cells, jobs and compilations and an estimate of the time; run nothing."""
    resume: bool = False
    """Go on with the sweep in that folder."""
    overwrite: bool = False
    """Replace an earlier sweep in that folder."""
    block_size: int | None = None
    """Jobs that are run and recorded together; from the devices' memory if not given."""
    checkpoint_seconds: float = 60.0
    """Time between checkpoints of a running attack."""
    quiet: bool = False
    """Print nothing but errors; the log file in the folder has everything."""
    coordinator: str | None = None
    """host:port of process 0, for several processes; Slurm and TPU pods are recognised."""
    num_processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """Which of them this is."""


def sweep(argv: Sequence[str]) -> int:
    """Run `invjax sweep`.

    Args:
      argv: its arguments.

    Returns:
      0; 10 and the number of failed jobs, 99 at most; 1 if writing failed, 2 for bad input, 130 if
      interrupted.
    """
    config = tyro.cli(SweepConfig, args=argv, prog="invjax sweep")

    def work() -> int:
        settings, out = shared.chosen(
            config, "sweep", grid.PRESETS, grid.from_toml, lambda folder: recorded(folder)[0]
        )
        if config.block_size is not None and config.block_size < 1:
            raise ValueError(f"--block-size must be at least 1, got {config.block_size}.")
        if config.coordinator is None and (config.num_processes, config.process_id) != (None, None):
            raise ValueError("--num-processes and --process-id need --coordinator.")
        if not config.plan:
            shared.check_new(config, out)  # Of several processes each, before any of them writes.
        connect(config)
        if config.plan:
            print(describe(plan.plan(settings, config.block_size)))
            return 0
        return _run(config, settings, out)

    return shared.guarded("sweep", work, resumable=True)


def recorded(folder: pathlib.Path) -> tuple[grid.Sweep, dict[str, Any]]:
    """Settings of the sweep in a folder, and its whole record.

    Args:
      folder: of the sweep.

    Returns:
      Both.

    Raises:
      ValueError: there is no sweep, or its record cannot be read.
    """
    try:
        record = json.loads((folder / "sweep.json").read_text())
        return grid.from_mapping(record["sweep"]), record
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} holds no sweep that can be read: {error}") from error


def connect(config: SweepConfig) -> None:
    """Join the other processes, where there are any; nothing may have touched a device before."""
    several = int(os.environ.get("SLURM_NTASKS", "1")) > 1
    several |= "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    if config.coordinator is not None:
        jax.distributed.initialize(config.coordinator, config.num_processes, config.process_id)
    elif several:
        jax.distributed.initialize()


def describe(found: plan.Plan) -> str:
    """A plan in words."""
    return (
        f"{found.cells} cells, {found.jobs} jobs, {found.samples} samples in {found.blocks} blocks "
        f"of up to {found.block_size} jobs\n"
        f"{found.compilations} compilations: {_span(found.compile_seconds)}\n"
        f"attacks: at most {_span(found.run_seconds)} on {jax.local_device_count()} "
        f"{jax.devices()[0].device_kind}, {_counted(jax.process_count(), 'process', 'processes')}"
    )


def _counted(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"


def _span(seconds: float) -> str:
    if seconds < 1:
        return "under a second"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class Display:
    """Progress on the terminal, or as plain lines, and everything in the log file."""

    def __init__(self, out: pathlib.Path, quiet: bool):
        """Show nothing yet.

        Args:
          out: the sweep's folder, for its log.
          quiet: whether the log is all.
        """
        self.console = Console(quiet=quiet)
        self.log = out / f"sweep-{jax.process_index():03d}.log"
        self.started, self.first, self.shown = time.monotonic(), -1, 0.0
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total} jobs"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self.task = self.bar.add_task("sweep", total=None, note="")

    def __call__(self, event: engine.Event) -> None:
        """Show an event."""
        if event.message:
            self._keep(event.message)
            self.console.print(event.message.splitlines()[-1], style="yellow", markup=False)
            return
        share = 0.0
        if event.progress is not None and event.block is not None:
            share = event.block.count * event.progress.step / event.progress.num_steps
        done = event.jobs_done + share
        if self.first < 0:
            self.first = event.jobs_done
        rate = (done - self.first) / max(time.monotonic() - self.started, 1e-9)
        name = "done" if event.block is None else event.block.name
        note = _counted(jax.local_device_count(), "device", "devices")
        # What a compilation and a few steps say of the rate is no rate yet.
        if done - self.first >= min(1.0, 0.02 * event.jobs_total):
            note = f"{rate:.2g} jobs/s, {_span((event.jobs_total - done) / rate)} left, {note}"
        note += f", {event.jobs_failed} failed" if event.jobs_failed else ""
        self.bar.update(
            self.task, description=name, completed=done, total=event.jobs_total, note=note
        )
        line = f"{done:.0f} of {event.jobs_total} jobs: {name}: {note}"
        if event.progress is None:
            self._keep(line)
        if not self.console.is_terminal and time.monotonic() - self.shown > PLAIN_SECONDS:
            self.shown = time.monotonic()
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _keep(self, text: str) -> None:
        with open(self.log, "a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text.rstrip()}\n")


def _run(config: SweepConfig, settings: grid.Sweep, out: pathlib.Path) -> int:
    display = Display(out, config.quiet)
    with display.bar:
        table = engine.sweep(
            settings,
            out,
            resume=config.resume,
            overwrite=config.overwrite,
            block_size=config.block_size,
            checkpoint_seconds=config.checkpoint_seconds,
            on_event=display,
        )
    rows = table.select(["status", "cell", "seed", "victim"]).to_pylist()
    failed = {
        (row["cell"], row["seed"], row["victim"]) for row in rows if row["status"] == "failed"
    }
    if jax.process_index() == 0:
        write_report(out)
        display.console.print(f"{table.num_rows} rows: {out / 'results.parquet'}", soft_wrap=True)
        display.console.print(f"Report: {out / 'report.html'}", soft_wrap=True)
    return shared.failures("sweep", len(failed))


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Write the page of a sweep, finished or running.

    That of a comparison is written by: invjax tradeoff --resume --out FOLDER
    """

    folder: tyro.conf.Positional[pathlib.Path]
    """The sweep's folder."""


def report(argv: Sequence[str]) -> int:
    """Run `invjax report`.

    Args:
      argv: its arguments.

    Returns:
      0, 1 if writing failed, 2 for a folder that holds no sweep.
    """
    config = tyro.cli(ReportConfig, args=argv, prog="invjax report")

    def work() -> int:
        print(f"Report: {write_report(config.folder)}")
        return 0

    return shared.guarded("report", work)


def write_report(folder: pathlib.Path) -> pathlib.Path:
    """Write a sweep's page into its folder.

    Args:
      folder: of the sweep.

    Returns:
      The page's path.

    Raises:
      ValueError: a folder without a sweep that can be read.
      OSError: a full disk, say.
    """
    settings, record = recorded(folder)
    found = journal.read(folder)
    rows = [row for entry in found.blocks.values() for row in entry["rows"]]
    blocks = grid.blocks(settings, record["plan"]["block_size"])
    planned = sum(block.count * block.cell.batch_size for block in blocks)
    page = pages.sweep_page(
        headline=f"Sweep: {', '.join(settings.datasets)}, {len(grid.cells(settings))} cells",
        rows=rows,
        samples=lambda cell: _samples(folder, found, blocks, cell),
        planned=planned,
        settings=record["sweep"] | record["plan"],
        versions={name: value for name, value in record.get("versions", {}).items() if value},
        command=shlex.join(["invjax", "sweep", "--resume", "--out", str(folder)]),
        problems=found.damaged,
        input_range=_input_range(settings),
    )
    path = folder / "report.html"
    files.write_atomic(path, page.encode())
    return path


def _input_range(settings: grid.Sweep) -> tuple[float, float]:
    """Least and greatest value of the data sets; [0, 1] where the files are not on this machine."""
    try:
        loaded = [jobs.load(name, settings.data_dir) for name in settings.datasets]
    except ValueError:
        return 0.0, 1.0
    lows, highs = zip(*map(run.raw_range, loaded), strict=True)
    return min(lows), max(highs)


def _samples(folder, found, blocks, cell):
    """Truth and reconstruction of a cell's samples on record, and their decibels."""
    names = [b.name for b in blocks if b.cell.name == cell and b.name in found.blocks]
    parts, psnr = [], []
    for name in names:
        arrays = journal.load_arrays(folder, found.blocks[name])
        if arrays:
            parts.append(arrays)
            psnr += [_psnr(row) for row in found.blocks[name]["rows"]]
    if not parts:
        return None
    joined = {}
    for side in ("truth", "reconstruction"):
        stacked = [array.reshape(-1, *array.shape[2:]) for array in (part[side] for part in parts)]
        joined[side] = np.concatenate(stacked)
    return {**joined, "psnr": np.array(psnr, float)}


def _psnr(row) -> float:
    """Of a sample that may be shown; NaN for one that is left out."""
    return row["psnr"] if row["status"] == "ok" else float("nan")
