"""One self-contained HTML page of a sweep, finished or still running."""

import html
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from invjax.report import page, sweep_figures
from invjax.report.sweep_figures import column, is_number, mean_error, natural

AXES = ("dataset", "model", "train_steps", "defense", "attack", "batch_size")
OPEN = 12
"""Cells whose reconstructions are shown without unfolding."""

GOOD = 30.0
"""Decibels above which a reconstruction counts as a clear copy."""

STYLE = """
h3{font-size:1rem;margin:1.2rem 0 .3rem}
th[tabindex]{cursor:pointer}th[tabindex]:hover{background:#f4f4f4}
th[aria-sort=ascending]::after{content:" \\25b2"}th[aria-sort=descending]::after{content:" \\25bc"}
.cells{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(24rem,100%),1fr));gap:1rem 2rem}
figure{margin:0}figcaption,summary{font-size:.9rem;overflow-wrap:anywhere}
details{margin:.3rem 0}summary{cursor:pointer}details img{max-width:26rem;width:100%}
"""

SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, at) => {
    const key = row => row.cells[at].dataset.value;
    head.tabIndex = 0;
    head.onclick = () => {
      const sign = head.ariaSort === "ascending" ? -1 : 1, rows = [...body.rows];
      heads.forEach(other => { other.ariaSort = "none"; });
      head.ariaSort = sign > 0 ? "ascending" : "descending";
      const known = rows.filter(row => key(row) !== "").map(row => [Number(key(row)), row]);
      known.sort(([a], [b]) => a === b ? 0 : sign * (a < b ? -1 : 1));
      body.append(...known.map(([, row]) => row), ...rows.filter(row => key(row) === ""));
    };
    head.onkeydown = event => { if (event.key === "Enter") head.click(); };
  });
}
"""


class Cell(NamedTuple):
    """A cell's rows, and what is said of them.

    Attributes:
      name: its identifier.
      label: the values of the swept axes, in words; the name where no axis is swept.
      rows: all of its samples.
      kept: those that came back.
      median: of their PSNR in decibels; NaN where none came back.
    """

    name: str
    label: str
    rows: list[Mapping[str, Any]]
    kept: list[Mapping[str, Any]]
    median: float


def omission(row: Mapping[str, Any]) -> str:
    """Why a row is left out of every average; empty where it is not."""
    if row.get("status", "ok") != "ok":
        return str(row.get("reason") or row["status"])
    if row.get("psnr") is None:
        return "no PSNR recorded"
    return "" if row["psnr"] > -np.inf else "the PSNR is not finite"


def sweep_page(
    *,
    headline: str,
    rows: Sequence[Mapping[str, Any]],
    samples: Callable[[str], Mapping[str, np.ndarray] | None],
    planned: int,
    settings: Mapping[str, Any],
    versions: Mapping[str, str],
    command: str,
    problems: Sequence[str] = (),
    input_range: tuple[float, float] = (0.0, 1.0),
) -> str:
    """The report of a sweep.

    Args:
      headline: what was swept.
      rows: a dict a sample: `cell`, the axes `dataset`, `model`, `train_steps`, `defense`, `attack`
        and `batch_size`, `psnr` in decibels, `ssim`, `label_right`, `baseline_grey_psnr`,
        `baseline_mean_psnr`, `seconds` (a sample's share), `status` (`ok`, or the row is
        left out) and `reason`. A metric that is missing, `None` or NaN is left out of its average.
      samples: from a cell's name to `truth` and `reconstruction`, `[N, H, W, C]` or `[N, d]`, and
        `psnr`, `[N]` decibels; `None` while there are none. Called once a cell, for one at a time.
      planned: rows of the finished sweep.
      settings: of the sweep.
      versions: of what made it.
      command: that resumes or repeats it.
      problems: files that could not be read, a line each.
      input_range: what is drawn black and white.

    Returns:
      An HTML page that needs no other file.
    """
    values = {
        axis: sorted(dict.fromkeys(row.get(axis) for row in rows), key=natural) for axis in AXES
    }
    swept = [axis for axis in AXES if len(values[axis]) > 1]
    cells = _cells(rows, swept)
    kept = [row for cell in cells for row in cell.kept]
    curves = [_axis(kept, axis, swept, values, len(rows) < planned) for axis in swept if kept]
    body = (
        f"{_lead(cells, len(rows), planned, len(problems))}"
        f"<h2>Cells</h2>{_constants(values)}{_cell_table(cells, swept, values)}"
        f"<h2>Along every axis</h2>{''.join(curves) or '<p>none</p>'}"
        f"<h2>What came back</h2>{_pictures(cells, samples, input_range)}"
        f"<h2>Left out</h2>{_left_out(cells, problems)}"
    )
    return page.document(
        headline,
        body,
        settings=settings,
        versions=versions,
        command=command,
        style=STYLE,
        script=SCRIPT,
    )


def _cells(rows: Sequence[Mapping[str, Any]], swept: Sequence[str]) -> list[Cell]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(str(row["cell"]), []).append(row)
    found = []
    for name, group in groups.items():
        at = {axis.replace("_", " "): group[0].get(axis) for axis in swept}
        words = (f"{a} {v}" if is_number(v) else str(v) for a, v in at.items())
        kept = [row for row in group if not omission(row)]
        psnr = column(kept, "psnr")
        median = float(np.median(psnr)) if psnr.size else np.nan
        found.append(Cell(name, ", ".join(words) or name, group, kept, median))
    return sorted(found, key=lambda c: [natural(c.rows[0].get(axis)) for axis in swept])


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _lead(cells: Sequence[Cell], done: int, planned: int, damaged: int) -> str:
    so_far = " so far" if done < planned else ""
    text = f"{done} of {_count(planned, 'sample')}{so_far}, over {_count(len(cells), 'cell')}."
    reasons = Counter(filter(None, (omission(row) for cell in cells for row in cell.rows)))
    if reasons:
        told = [f"{sweep_figures.shorten(r, 80)} ({n})" for r, n in reasons.most_common(3)]
        if len(reasons) > 3:
            told.append(_count(len(reasons) - 3, "other reason"))
        text += f" {reasons.total()} left out: {'; '.join(told)}."
    elif cells:
        text += " None left out."
    known = [cell for cell in cells if not np.isnan(cell.median)]
    ranked = sorted(_strongest(known), key=lambda c: c.median)
    if len(ranked) > 1:
        ends = (("Best defended", ranked[0]), ("most exposed", ranked[-1]))
        told = [f"{what}: {c.label} (median PSNR {c.median:.1f} dB)" for what, c in ends]
        text += f" Against the strongest attack of each setting: {'; '.join(told)}."
    elif len(known) > 1:
        (best,) = ranked
        text += f" Strongest attack: {best.label} (median PSNR {best.median:.1f} dB)."
    elif ranked:
        text += f" Median PSNR {ranked[0].median:.1f} dB."
    if len(known) < len(cells):
        text += f" Nothing came back in {_count(len(cells) - len(known), 'cell')}, not ranked."
    if damaged:
        text += f" {_count(damaged, 'file')} could not be read: see Left out."
    return f"<p class=lead>{html.escape(text)}</p>"


def _strongest(cells: Sequence[Cell]) -> list[Cell]:
    """Of the cells that differ in their attack alone the one with the highest median."""
    found: dict[tuple, Cell] = {}
    for cell in cells:
        setting = tuple(str(cell.rows[0].get(axis)) for axis in AXES if axis != "attack")
        best = found.get(setting)
        if best is None or cell.median > best.median:
            found[setting] = cell
    return list(found.values())


def _constants(values: Mapping[str, Sequence[Any]]) -> str:
    same = [
        f"{html.escape(axis.replace('_', ' '))} <strong>{html.escape(str(found[0]))}</strong>"
        for axis, found in values.items()
        if len(found) == 1
    ]
    return f"<p class=constants>The same in every cell: {', '.join(same)}.</p>" if same else ""


def _measures(cell: Cell) -> dict[str, tuple[str, float]]:
    """Text and number of every column that is measured."""
    psnr, ssim = column(cell.kept, "psnr"), column(cell.kept, "ssim")
    mean, error = mean_error(psnr)
    middle = float(np.median(ssim)) if ssim.size else np.nan
    right, grey, average = (
        mean_error(column(cell.kept, name))[0]
        for name in ("label_right", "baseline_grey_psnr", "baseline_mean_psnr")
    )
    above, cost = mean_error(psnr > GOOD)[0], mean_error(column(cell.rows, "seconds"))[0]
    left_out = len(cell.rows) - len(cell.kept)
    return {
        "n": (str(len(cell.kept)), len(cell.kept)),
        "median PSNR": (f"{cell.median:.1f}", cell.median),
        "mean PSNR": (f"{mean:.1f}" + (f" ± {error:.1f}" if error >= 0 else ""), mean),
        "median SSIM": (f"{middle:.2f}", middle),
        f"above {GOOD:.0f} dB": (f"{above:.0%}", above),
        "labels right": (f"{right:.0%}", right),
        "grey guess": (f"{grey:.1f}", grey),
        "mean guess": (f"{average:.1f}", average),
        "left out": (str(left_out), left_out),
        "s / sample": (f"{cost:.3g}", cost),
    }


def _cell_table(
    cells: Sequence[Cell], swept: Sequence[str], values: Mapping[str, Sequence[Any]]
) -> str:
    if not cells:
        return "<p>none</p>"
    # Names where the axes alone do not tell the cells apart.
    named = not swept or len({cell.label for cell in cells}) < len(cells)
    body, heads = [], []
    for index, cell in enumerate(cells):
        entries = {"cell": (False, cell.name, float(index))} if named else {}
        for axis in swept:
            value = cell.rows[0].get(axis)
            number, order = is_number(value), float(values[axis].index(value))
            entries[axis.replace("_", " ")] = (number, str(value), order)
        entries |= {name: (True, *measure) for name, measure in _measures(cell).items()}
        heads = [(name, number) for name, (number, _, _) in entries.items()]
        body.append("".join(_entry(*entry) for entry in entries.values()))
    head = "".join(
        f'<th scope="col" aria-sort="none"{" class=n" if number else ""}>{html.escape(name)}</th>'
        for name, number in heads
    )
    return (
        f'<div class=wide><table class="sortable"><thead><tr>{head}</tr></thead><tbody>'
        + "".join(f"<tr>{row}</tr>" for row in body)
        + "</tbody></table></div><p class=note>A click on a column's head sorts by it. PSNR in decibels, "
        "higher is closer: more exposed; <em>mean PSNR</em> is given ± its standard error over samples "
        "(those of one batch are not independent of each other). <em>n</em> samples came back and are "
        "averaged; those <em>left out</em>, whose attack failed or knows that it did not find them, are not, "
        "whichever way they would move the figures. "
        "<em>grey</em> and <em>mean guess</em> are the mean PSNR of a mid-grey image and of the data "
        "set's mean image, which saw no gradient. A low PSNR says that these attacks did not succeed, "
        "not that none can.</p>"
    )


def _entry(number: bool, text: str, value: float) -> str:
    known = not np.isnan(value)
    key = {np.inf: "Infinity", -np.inf: "-Infinity"}.get(value, f"{value:.10g}") if known else ""
    style = " class=n" if number else ""
    return f'<td{style} data-value="{key}">{html.escape(text) if known else "–"}</td>'


def _axis(kept, axis, swept, values, running: bool) -> str:
    """A curve a line; attacks are the lines where there are several, defences otherwise."""
    by = "attack" if axis != "attack" and ("attack" in swept or axis == "defense") else "defense"
    at = [[row for row in kept if row.get(axis) == value] for value in values[axis]]
    lines = {
        str(name): np.transpose(
            [mean_error(column((r for r in here if r.get(by) == name), "psnr")) for here in at]
        )
        for name in values[by]
    }
    # The most exposed are never the ones left out.
    order = sorted(lines, key=lambda name: -np.nan_to_num(lines[name][0], nan=-np.inf).max())
    drawn = {name: lines[name] for name in lines if name in order[: sweep_figures.MAX_LINES]}
    baseline = [mean_error(column(here, "baseline_mean_psnr"))[0] for here in at]
    title = axis.replace("_", " ")
    note = f"Mean PSNR ± standard error over samples, a line per {by}"
    pooled = [other.replace("_", " ") for other in swept if other not in (axis, by)]
    note += f"; pooled over {', '.join(pooled)}." if pooled else "."
    if pooled and running:
        note += " The sweep is not finished, so that points may pool different cells."
    if len(lines) > len(drawn):
        note += f" Drawn are the {len(drawn)} that reach the highest PSNR;"
        note += f" {len(lines) - len(drawn)} more were left out."
    if any(np.isposinf(line[0]).any() for line in drawn.values()):
        note += " A mean over an exact reconstruction is infinite: an arrow."
    png = sweep_figures.curves(title, values[axis], drawn, np.asarray(baseline))
    picture = page.image(png, f"PSNR against {title}, a line per {by}")
    return f"<h3>PSNR against {title}</h3>{picture}<p class=note>{note}</p>"


def _pictures(
    cells: Sequence[Cell],
    samples: Callable[[str], Mapping[str, np.ndarray] | None],
    input_range: tuple[float, float],
) -> str:
    if not cells:
        return "<p>none</p>"
    blocks = [_picture(cell, samples, input_range) for cell in cells]
    shown = "".join(
        f"<figure><figcaption>{head}</figcaption>{body}</figure>" for head, body in blocks[:OPEN]
    )
    folded = "".join(
        f"<details><summary>{head}</summary>{body}</details>" for head, body in blocks[OPEN:]
    )
    return (
        "<p class=note>The best, the median and the worst sample of every cell by PSNR, truth above and "
        "reconstruction below. Which samples to show was chosen by looking at the truth; an adversary "
        f"could not choose so.</p><div class=cells>{shown}</div>{folded}"
    )


def _picture(cell: Cell, samples, input_range: tuple[float, float]) -> tuple[str, str]:
    """Head and body; a cell's arrays die with this call, before the next cell's are asked for."""
    arrays = samples(cell.name)
    head = html.escape(cell.label)
    if arrays is None:
        return head, "<p class=note>No arrays yet.</p>"
    found = sweep_figures.extremes_figure(arrays, input_range)
    if found is None:
        return head, "<p class=note>No sample came back.</p>"
    png, description = found
    return head, page.image(png, f"{cell.label}: {description}")


def _left_out(cells: Sequence[Cell], problems: Sequence[str]) -> str:
    where: dict[str, Counter[str]] = {}
    for cell in cells:
        for reason in filter(None, map(omission, cell.rows)):
            where.setdefault(reason, Counter())[cell.label] += 1
    table = []
    for reason, counts in sorted(where.items(), key=lambda item: -item[1].total()):
        told = [f"{label} ({n})" for label, n in counts.most_common(10)]
        told += [f"and {len(counts) - 10} more"] if len(counts) > 10 else []
        table.append({"reason": reason, "samples": counts.total(), "cells": "; ".join(told)})
    text = f"<div class=wide>{page.table(table)}</div>"
    if problems:
        lines = "".join(f"<li>{html.escape(str(problem))}</li>" for problem in problems)
        text += f"<h3>Files that could not be read</h3><ul class=problems>{lines}</ul>"
    return text
