"""What the benchmarks share: timing side by side in one process, options, a table and JSON."""

import argparse
import importlib.metadata
import json
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any


def alternate(
    systems: dict[str, Callable[[], Any]], rounds: int, seconds: float = 0.3
) -> dict[str, dict[str, float]]:
    """Time several systems by turns.

    Args:
      systems: functions of no argument that do the same work and wait for its end.
      rounds: rounds; every system is called in each.
      seconds: a system repeats its call in a round until about this much time has gone.

    Returns:
      For every system `median`, `low` and `high` (quartiles), milliseconds a call.
    """
    repeats = {}
    for name, function in systems.items():
        function()
        started = time.perf_counter()
        function()
        repeats[name] = max(1, int(seconds / max(time.perf_counter() - started, 1e-6)))
    samples: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(rounds):
        for name, function in systems.items():
            started = time.perf_counter()
            for _ in range(repeats[name]):
                function()
            samples[name].append(1e3 * (time.perf_counter() - started) / repeats[name])
    return {name: _summary(values) for name, values in samples.items()}


def _summary(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return {
        "median": statistics.median(ordered),
        "low": ordered[quarter],
        "high": ordered[-1 - quarter],
    }


def parser(description: str | None, data_dir: bool = False) -> argparse.ArgumentParser:
    """Options of a benchmark: those that all have, and a description that keeps its lines.

    Args:
      description: the script's docstring.
      data_dir: whether it reads data sets from files.

    Returns:
      The parser, to which a script adds its own.
    """
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--json", help="file for the rows of the table")
    if data_dir:
        options.add_argument("--data-dir", help="folder of data sets on disk")
    return options


def write(path: str | pathlib.Path | None, rows: list[dict[str, Any]], **facts: Any) -> None:
    """Write rows and facts of the machine as JSON, if there is a path."""
    if path is not None:
        content = {
            "machine": platform.machine(),
            "python": platform.python_version(),
            "jax": importlib.metadata.version("jax"),
            **facts,
        }
        pathlib.Path(path).write_text(json.dumps({**content, "rows": rows}, indent=2) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table; nothing of none."""
    if not rows:
        return ""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        cells = (f"{row[n]:.3g}" if isinstance(row[n], float) else str(row[n]) for n in names)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
