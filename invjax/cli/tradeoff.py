"""`invjax tradeoff`: defences at equal utility, recorded as they are measured, and their page."""

import dataclasses
import functools
import pathlib
import shlex
import time
from collections.abc import Sequence

import tyro
from rich.console import Console

from invjax import files
from invjax.cli import shared
from invjax.evaluation import jobs, run
from invjax.evaluation import tradeoff as engine
from invjax.evaluation.tradeoff_settings import PRESETS, Tradeoff, from_toml
from invjax.report.tradeoff_page import tradeoff_page

PLAIN_SECONDS = 15.0
"""Time between lines of progress of one sweep of attacks."""


@dataclasses.dataclass(frozen=True)
class TradeoffConfig:
    """Compare defences that cost the same utility, by the strongest attack on each.

    Every family is on record once it is done: a comparison that was killed goes on with --resume.

    invjax tradeoff --preset digits

    invjax tradeoff tradeoff.toml --out runs/first
    """

    file: tyro.conf.Positional[pathlib.Path | None] = None
    """TOML file of settings: dataset, model, defenses, attacks, utility, levels, seeds and more."""
    preset: str | None = None
    """A comparison that comes with the package: digits."""
    out: pathlib.Path | None = None
    """Folder of the record; invjax-runs/tradeoff-NAME if not given."""
    resume: bool = False
    """Go on with the comparison in that folder."""
    overwrite: bool = False
    """Replace an earlier comparison in that folder."""
    checkpoint_seconds: float = 60.0
    """Time between checkpoints of a running attack."""
    quiet: bool = False
    """Print nothing but errors; the log file in the folder has everything."""


def tradeoff(argv: Sequence[str]) -> int:
    """Run `invjax tradeoff`.

    Args:
      argv: its arguments.

    Returns:
      0; 10 and the number of failed jobs and trainings, 99 at most; 1 if writing failed, 2 for bad
      input, 130 if interrupted.
    """
    config = tyro.cli(TradeoffConfig, args=argv, prog="invjax tradeoff")

    def work() -> int:
        settings, out = shared.chosen(
            config, "tradeoff", PRESETS, from_toml, lambda folder: engine.read(folder)[0]
        )
        shared.check_new(config, out)
        return _run(config, settings, out)

    return shared.guarded("tradeoff", work, resumable=True)


def _run(config: TradeoffConfig, settings: Tradeoff, out: pathlib.Path) -> int:
    console = Console(quiet=config.quiet)
    shown: tuple[str, str, float] = ("", "", 0.0)

    def tell(event: engine.Event) -> None:
        nonlocal shown
        line, part = (
            f"{event.index + 1} of {event.total}: {event.family}: {event.phase}",
            event.attacks,
        )
        message = event.message or (part.message if part is not None else "")
        if event.phase == "done":
            line = "done"
        elif part is not None:
            line += f" {part.jobs_done} of {part.jobs_total} jobs"
        same = shown[:2] == (event.family, event.phase)
        if message or not same or time.monotonic() - shown[2] > PLAIN_SECONDS:
            shown = (event.family, event.phase, time.monotonic())
            console.print(
                message.splitlines()[-1] if message else line,
                style="yellow" if message else None,
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
            with open(out / "tradeoff.log", "a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {(message or line).rstrip()}\n")

    result = engine.tradeoff(
        settings,
        out,
        resume=config.resume,
        overwrite=config.overwrite,
        checkpoint_seconds=config.checkpoint_seconds,
        on_event=tell,
    )
    console.print(f"{len(result.table)} rows: {out / 'results.parquet'}", soft_wrap=True)
    console.print(f"Report: {write_report(out)}", soft_wrap=True)
    failed = result.failed_jobs + sum(one["attack"] == "training" for one in result.failed)
    return shared.failures("tradeoff", failed)


def write_report(folder: pathlib.Path) -> pathlib.Path:
    """Write a finished comparison's page into its folder.

    Args:
      folder: of the comparison.

    Returns:
      The page's path.

    Raises:
      ValueError: a folder without a finished comparison, or a data set that cannot be read.
      OSError: a full disk, say.
    """
    settings, versions, result = engine.read(folder)
    if result is None:
        raise ValueError(f"{folder}: the comparison is not finished; go on with --resume.")
    dataset = jobs.load(settings.dataset, settings.data_dir)
    page = tradeoff_page(
        settings=settings,
        result=result,
        samples=functools.partial(engine.reconstructions, folder),
        versions={name: value for name, value in versions.items() if value},
        command=shlex.join(["invjax", "tradeoff", "--resume", "--out", str(folder)]),
        input_range=run.raw_range(dataset),
    )
    path = folder / "report.html"
    files.write_atomic(path, page.encode())
    return path
