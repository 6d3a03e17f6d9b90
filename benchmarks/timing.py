"""Side-by-side timing in one process: alternating rounds, medians, spread, a table and JSON."""

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


def write(path: str | None, rows: list[dict[str, Any]], **facts: Any) -> None:
    """Write rows and facts of the machine as JSON, if there is a path."""
    if path is not None:
        content = {"machine": platform.machine(), "python": platform.python_version(), **facts}
        pathlib.Path(path).write_text(json.dumps({**content, "rows": rows}, indent=2) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        cells = (f"{row[n]:.3g}" if isinstance(row[n], float) else str(row[n]) for n in names)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
