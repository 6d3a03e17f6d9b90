"""One self-contained HTML page of a comparison of defences at equal utility."""

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from invjax.evaluation.tradeoff import Result
from invjax.evaluation.tradeoff_settings import Tradeoff, as_mapping
from invjax.report import page, tradeoff_figures

STYLE = """
h3{font-size:1rem;margin:1.4rem 0 .3rem}
ol.ranking{margin-top:.3rem}ol.ranking li{margin:.15rem 0}
"""

Samples = Callable[[Mapping[str, Any]], Mapping[str, np.ndarray] | None]


def tradeoff_page(
    *,
    settings: Tradeoff,
    result: Result,
    samples: Samples,
    versions: Mapping[str, str],
    command: str,
    input_range: tuple[float, float] = (0.0, 1.0),
) -> str:
    """The report of a comparison.

    Args:
      settings: of the comparison.
      result: what it found.
      samples: from a row of the table to `truth` and `reconstruction`, `[N, H, W, C]` or `[N, d]`, as
        `evaluation.tradeoff.reconstructions` gives them; `None` where there are none.
      versions: of what made it.
      command: that resumes or repeats it.
      input_range: what is drawn black and white.

    Returns:
      An HTML page that needs no other file.
    """
    headline = f"Defences at equal utility: {settings.dataset}, {settings.model}"
    ranked = "".join(_ranking(settings, result, level) for level in settings.levels)
    pictures = "".join(
        _pictures(settings, result, level, samples, input_range) for level in settings.levels
    )
    span = input_range[1] - input_range[0]
    body = (
        f"{_lead(settings, result)}"
        f"<h2>Ranking</h2>{ranked}"
        f"<h2>What this does not cover</h2>{_caveats(settings)}"
        f"<h2>Table</h2>{_table(settings, result)}"
        f"<h2>Lost utility against reconstruction error</h2>{_curves(settings, result, span)}"
        f"<h2>What the {_which(settings)} attack gives back</h2>{pictures}"
        f"<h2>Attacks that do not apply</h2>{_refused(settings, result)}"
        f"<h2>Failures</h2>{page.table(result.failed)}"
    )
    return page.document(
        headline,
        body,
        settings=as_mapping(settings),
        versions=versions,
        command=command,
        style=STYLE,
    )


def _amount(settings: Tradeoff, value: float | None, error: float | None = None) -> str:
    """An amount of utility in words; `None` where training diverged."""
    if value is None:
        return "a training that diverges"
    if settings.utility == "accuracy":
        share = None if error is None else 100 * error
        return f"{_number(100 * value, share)} points of accuracy"
    return f"{_number(value, error)} of training loss"


def _number(value: float | None, error: float | None = None, digits: str = ".3g") -> str:
    if value is None:
        return "–"
    if error is None:
        return f"{value:{digits}}"
    # One digit, but never as a power of ten for want of a second one.
    return f"{value:{digits}} ± " + (f"{error:.1g}" if error < 9.5 else f"{error:.0f}")


def _which(settings: Tradeoff) -> str:
    return "strongest" if settings.reduce == "min" else "weakest"


def _lead(settings: Tradeoff, result: Result) -> str:
    text = (
        f"{len(settings.defenses)} families of defences, each made as strong as it can be for the same "
        f"price in {settings.utility}, and attacked by every attack that applies. "
    )
    bare = next((point for point in result.curves if point["family"] == "none"), None)
    if bare is not None and bare["attack"] is not None:
        text += (
            f"Without a defence the model reaches {100 * bare['accuracy']:.1f} % accuracy, and "
            f"{bare['attack']} reconstructs at {bare['psnr']:.1f} dB. "
        )
    if result.guess:
        psnr = _number(result.guess["psnr"], digits=".1f")
        text += f"A guess that saw no gradient reaches {psnr} dB."
    return f"<p class=lead>{html.escape(text)}</p>"


def _ranking(settings: Tradeoff, result: Result, level: float) -> str:
    rows = [row for row in result.table if row["level"] == level]
    usable = [row for row in rows if row["mse"] is not None]
    equal = [row for row in usable if row["status"] == "matched"]
    equal.sort(key=lambda row: -row["mse"])
    items = []
    for index, row in enumerate(equal):
        text = f"<strong>{html.escape(row['defense'])}</strong> lets {_says(settings, result, row)}"
        if index and _alike(equal[index - 1], row):
            text += "; not told apart from the one above"
        items.append(f"<li>{text}.</li>")
    ordered = (
        f"<ol class=ranking>{''.join(items)}</ol>" if items else "<p>None is at this price.</p>"
    )
    for status, said in (
        ("nearest", "comes no nearer to this price than"),
        ("not reached", "costs less than this even at its strongest:"),
        ("already above", "costs more than this even at its weakest:"),
    ):
        outside = [row for row in usable if row["status"] == status]
        lines = "".join(
            f"<li><strong>{html.escape(row['defense'])}</strong> {said} "
            f"{_amount(settings, row['utility_loss'], row['utility_loss_error'])}; it lets "
            f"{_says(settings, result, row)}.</li>"
            for row in outside
        )
        ordered += f"<ul>{lines}</ul>" if lines else ""
    missing = [row["defense"] for row in rows if row["mse"] is None]
    if missing:
        ordered += f"<p>No attack was measured behind {html.escape(', '.join(missing))}.</p>"
    return f"<h3>At a price of {_amount(settings, level)}, best protection first</h3>{ordered}"


def _says(settings: Tradeoff, result: Result, row: Mapping[str, Any]) -> str:
    text = (
        f"the {_which(settings)} attack, {html.escape(row['attack'])}, reach a mean squared error of "
        f"{_number(row['mse'], row['mse_error'])} ({row['psnr']:.1f} dB)"
    )
    if result.guess and row["mse"] >= result.guess["mse"]:
        text += ", in this measure no better than a guess that saw no gradient"
    return text


def _alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two errors are within two standard errors of their difference."""
    if one["mse_error"] is None or other["mse_error"] is None:
        return False
    bar = 2 * np.hypot(one["mse_error"], other["mse_error"])
    return abs(one["mse"] - other["mse"]) <= bar


def _caveats(settings: Tradeoff) -> str:
    weights = (
        "fresh weights, the worst case for the client"
        if settings.attack_step == 0
        else f"weights after {settings.attack_step} undefended steps of training"
    )
    points = [
        "Attacks that were not run. A defence is as good as the best attack on it, and a better one may "
        f"exist: these were {', '.join(settings.attacks)}. Of those that come with invjax, only bayes is "
        "told the defence.",
        f"Other data, models and batch sizes: gradients were of {settings.batch_size} "
        f"sample{'s' if settings.batch_size > 1 else ''}, at {weights}.",
        "What the eye sees. A squared error no better than a guess's may still show a face: look at the "
        "pictures below.",
        "Tuning. Every defence was trained with by the same optimizer, rate and number of steps; some may "
        "cost less with their own.",
        "Several rounds: an adversary who sees many gradients of the same samples averages noise out.",
        "Guarantees. No row is a proof; differential privacy is a statement about all attacks, and this "
        "is about these.",
        f"Noise of the comparison. Error bars are standard errors over {len(settings.seeds)} seeds. The "
        f"{_which(settings)} of several attacks is chosen by the same victims as it is measured on, which "
        "favours it a little; the bar of its error, a jackknife over seeds, holds the noise of that "
        "choice, not its bias. Strengths were likewise chosen by the trainings that their price is from.",
    ]
    if settings.reduce == "max":
        points.append(
            "The strongest attack: as the definition is printed in Liu et al. 2024, a defence counts by "
            "the attack that errs most. With reduce = 'min' it counts by the one that errs least."
        )
    return f"<ul>{''.join(f'<li>{html.escape(point)}</li>' for point in points)}</ul>"


def _table(settings: Tradeoff, result: Result) -> str:
    lines = []
    for row in sorted(result.table, key=lambda row: (row["level"], -(row["mse"] or 0))):
        line = {
            "price": _amount(settings, row["level"]).split(" of ")[0],
            "defence": row["defense"],
            "status": row["status"],
            f"lost {settings.utility}": _lost(settings, row),
            "accuracy": _number(100 * row["accuracy"], digits=".1f") + " %",
            "training loss": _number(row["loss"]),
            f"{_which(settings)} attack": row["attack"] or "–",
            "MSE": _number(row["mse"], row["mse_error"]),
            "PSNR": _number(row["psnr"], row["psnr_error"], ".1f"),
        }
        each = {f"MSE of {text}": _number(row[f"mse of {text}"]) for text in settings.attacks}
        lines.append(line | each)
    return (
        f"<div class=wide>{page.table(lines)}</div>"
        "<p class=note>± standard errors over seeds, of the difference to the undefended model of the same "
        "seed where utility is lost. A sample that an attack knows it has not found counts as the mean "
        "image. <em>matched</em>: within "
        f"{100 * settings.tolerance:g} % of the price. PSNR is the mean over samples, an exact copy "
        "counting as 100 dB.</p>"
    )


def _lost(settings: Tradeoff, row: Mapping[str, Any]) -> str:
    share = 100 if settings.utility == "accuracy" else 1
    lost, error = (
        None if row[name] is None else share * row[name]
        for name in ("utility_loss", "utility_loss_error")
    )
    return _number(lost, error)


def _curves(settings: Tradeoff, result: Result, span: float) -> str:
    families: dict[str, list[Mapping[str, Any]]] = {}
    for point in result.curves:
        families.setdefault(point["family"], []).append(point)
    bare = families.pop("none", [])
    drawn = {
        name: points
        for name, points in families.items()
        if any(point["mse"] is not None for point in points)
    }
    if not bare or not drawn or bare[0]["mse"] is None:
        return "<p>none</p>"
    axis_name = {"accuracy": "accuracy lost", "loss": "training loss added"}[settings.utility]
    percent = settings.utility == "accuracy"
    png = tradeoff_figures.pareto(
        drawn,
        bare[0],
        result.guess["mse"],
        settings.levels,
        axis_name,
        percent,
        span,
        f"mean squared error of the {_which(settings)} attack",
    )
    return (
        page.image(png, "Reconstruction error against lost utility, a panel a family")
        + "<p class=note>Up and to the left is better. The star is no defence, the dashed line the mean "
        "image, dotted lines the prices that are compared; the other families are faint. Bars are "
        "standard errors over seeds. Errors below "
        f"{tradeoff_figures.FLOOR * span**2:g} are drawn there.</p>"
    )


def _refused(settings: Tradeoff, result: Result) -> str:
    """A row an attack and reason, with the defences that it holds for."""
    groups: dict[tuple[str, str], list[str]] = {}
    for one in result.refused:
        groups.setdefault((one["attack"], one["reason"]), []).append(one["defense"])
    rows = [
        {
            "attack": attack,
            "on": "all" if len(on) == len(settings.defenses) + 1 else ", ".join(on),
            "reason": reason,
        }
        for (attack, reason), on in groups.items()
    ]
    return page.table(rows)


def _pictures(settings, result, level, samples, input_range) -> str:
    rows: Sequence[Mapping[str, Any]] = [row for row in result.table if row["level"] == level]
    truth, found = None, {}
    for row in sorted(rows, key=lambda row: -(row["mse"] or 0)):
        if row["attack"] is None:
            continue
        arrays = samples(row)
        if arrays is None:
            continue
        truth = arrays["truth"] if truth is None else truth
        aside = "" if row["status"] == "matched" else f" ({row['status']})"
        found[f"{row['defense']}{aside}\n{row['psnr']:.1f} dB"] = arrays["reconstruction"]
    if truth is None:
        return ""
    png = tradeoff_figures.reconstructions(truth, found, input_range)
    caption = f"At a price of {_amount(settings, level)}"
    return f"<h3>{caption}</h3>{page.image(png, caption)}"
