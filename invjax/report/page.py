"""One self-contained HTML page."""

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#1b1b1b}
h1{font-size:1.5rem;margin-bottom:.2rem}h2{font-size:1.1rem;margin-top:2rem}
img{max-width:100%;height:auto}
table{border-collapse:collapse;font-size:.9rem}
td,th{padding:.2rem .7rem;text-align:left;border-bottom:1px solid #ddd}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
code,pre{background:#f4f4f4;padding:.1rem .3rem}pre{padding:.7rem;overflow-x:auto}
.lead{font-size:1.1rem}.note{color:#555}
.wide{overflow-x:auto}.wide table{font-size:.8rem}.wide td,.wide th{padding:.2rem .4rem}
.wide td.n{white-space:nowrap}.wide th{vertical-align:bottom}
"""


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """An HTML table; numbers are aligned to the right.

    Args:
      rows: dicts with the same keys.

    Returns:
      HTML, with everything escaped.
    """
    if not rows:
        return "<p>none</p>"

    def cell(tag: str, value: Any) -> str:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        text = {"True": "yes", "False": "no"}.get(text, text)
        return f"<{tag}{' class=n' if number else ''}>{html.escape(text)}</{tag}>"

    head = "".join(
        f"<th{' class=n' if isinstance(rows[0][name], int | float) else ''}>{html.escape(name)}</th>"
        for name in rows[0]
    )
    body = "".join(
        "<tr>" + "".join(cell("td", value) for value in row.values()) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def image(png: bytes, description: str) -> str:
    """An embedded picture."""
    data = base64.b64encode(png).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{data}">'


def document(
    headline: str,
    body: str,
    *,
    settings: Mapping[str, Any],
    versions: Mapping[str, Any],
    command: str,
    style: str = "",
    script: str = "",
) -> str:
    """A whole page: what it says, then how to do it again.

    Args:
      headline: its title.
      body: HTML between the headline and the command.
      settings: of the run.
      versions: of what made it.
      command: that repeats or resumes it.
      style: CSS, besides that of every page.
      script: JavaScript at the end.

    Returns:
      An HTML page that needs no other file; the texts are escaped, body, style and script are not.
    """
    facts = [{"setting": name, "value": str(value)} for name, value in settings.items()]
    made = [{"with": name, "version": str(value)} for name, value in versions.items()]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(headline)}</title><style>{STYLE}{style}</style>"
        f"<h1>{html.escape(headline)}</h1>{body}"
        f"<h2>Again</h2><pre>{html.escape(command)}</pre>"
        f"<h2>Settings</h2>{table(facts)}<h2>Versions</h2>{table(made)}"
        f"{f'<script>{script}</script>' if script else ''}</html>\n"
    )


def attack_page(
    *,
    headline: str,
    lead: str,
    rows: Sequence[Mapping[str, Any]],
    figures: Mapping[str, bytes],
    settings: Mapping[str, Any],
    versions: Mapping[str, str],
    command: str,
) -> str:
    """The report of one attack.

    Args:
      headline: what was attacked.
      lead: what came of it, in plain words.
      rows: a dict a sample.
      figures: PNG files by caption.
      settings: of the run.
      versions: of what made it.
      command: that repeats it.

    Returns:
      An HTML page that needs no other file.
    """
    pictures = "".join(
        f"<h2>{html.escape(caption)}</h2>{image(png, caption)}" for caption, png in figures.items()
    )
    body = (
        f"<p class=lead>{html.escape(lead)}</p>{pictures}"
        f"<h2>Every sample</h2>{table(rows)}"
        "<p class=note>PSNR in decibels, higher is closer. <em>grey</em> and <em>mean</em> are guesses "
        "that saw no gradient: a mid-grey image and the mean image of the data set. Restarts are chosen "
        "by the attack's own objective; the truth is used to match the samples of a batch and to "
        "measure, and for nothing else.</p>"
    )
    return document(headline, body, settings=settings, versions=versions, command=command)
