"""Defences at equal utility: train under each, calibrate each, attack each, compare.

Which of two defences protects better can only be said where both cost the same. Every family is trained
with over its strengths, the strengths are found that cost given amounts of utility, and all attacks that
apply are run against these; the strongest one's error is what the defence is worth (Liu et al. 2024).

They set the training loss at the end against the root mean square error of reconstructed features. Here
the price is what test accuracy or training loss (`Tradeoff.utility`) differs by from an undefended twin of
the same seed, and the error is the mean squared one of the inputs, over victims and seeds.
"""

import json
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from invjax import defenses, files
from invjax.attacks import by_name
from invjax.evaluation import families, grid, jobs, journal, run, store, strongest
from invjax.evaluation import sweep as engine
from invjax.evaluation.families import Family, Strength
from invjax.evaluation.tradeoff_settings import (
    Tradeoff,
    as_mapping,
    attack_sweep,
    from_mapping,
    from_toml,
)
from invjax.evaluation.tradeoff_training import (
    UNDEFENDED,
    attacked_strengths,
    matches,
    train_family,
)


class Event(NamedTuple):
    """What a caller is told while a comparison runs.

    Attributes:
      family: text of the defence that is being measured.
      index: which of them, from 0; the undefended twin is the first.
      total: how many.
      phase: `training` or `attacks`, `done` after the last.
      attacks: how their sweep goes; `None` while training.
      message: something that a log should keep; empty otherwise.
    """

    family: str
    index: int
    total: int
    phase: str
    attacks: engine.Event | None = None
    message: str = ""


class Result(NamedTuple):
    """What a comparison found; JSON holds it.

    Attributes:
      table: a dict a family and level: the strength that costs so much, what it costs, and the errors
        of the attacks. `mse` is in squared raw units, `psnr` in decibels, `_error` a standard error
        over seeds; `None` stands for what there is none of, or what did not stay finite.
      curves: a dict a family and attacked strength, from weak to strong; the undefended one first.
      guess: `mse` and `psnr` of the data set's mean image, which saw no gradient; empty where nothing
        was attacked.
      refused: attacks that do not apply to a family, with the reason.
      failed: trainings and attacks that raised, with the reason.
      failed_jobs: how many attacked gradients that were.
    """

    table: list[dict[str, Any]]
    curves: list[dict[str, Any]]
    guess: dict[str, float]
    refused: list[dict[str, str]]
    failed: list[dict[str, str]]
    failed_jobs: int


Listener = Callable[[Event], None]


def tradeoff(
    settings: Tradeoff | Mapping[str, Any] | pathlib.Path | str,
    out: pathlib.Path | str | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    checkpoint_seconds: float = 60.0,
    on_event: Listener | None = None,
) -> Result:
    """Compare defences at equal utility.

    The trainings of every family are on record once they are done, and its attacks are a sweep of their
    own, so a killed comparison loses little and resumes to the same table.

    Args:
      settings: a `Tradeoff`, a mapping with its names, or a TOML file.
      out: folder of the record; a temporary one where `None`.
      resume: go on with the comparison in that folder, whose settings must be the same.
      overwrite: replace an earlier comparison there.
      checkpoint_seconds: time between checkpoints of a running attack.
      on_event: called as it goes; a `KeyboardInterrupt` that it raises ends the comparison.

    Returns:
      The result, which the folder holds as `results.json`, its table as `results.parquet`.

    Raises:
      ValueError: settings that cannot be read, a folder that does not suit, several processes, or an
        undefended training that diverges.
      OSError: a full disk, say; what was recorded stays.
    """
    if not isinstance(settings, Tradeoff):
        is_path = isinstance(settings, str | pathlib.Path)
        settings = from_toml(settings) if is_path else from_mapping(settings)
    check(settings)
    options = (resume, overwrite, checkpoint_seconds, on_event or (lambda event: None))
    if out is not None:
        return _tradeoff(settings, pathlib.Path(out), *options)
    with tempfile.TemporaryDirectory() as folder:
        return _tradeoff(settings, pathlib.Path(folder) / "tradeoff", *options)


def check(settings: Tradeoff) -> None:
    """Read every text before anything runs.

    Args:
      settings: of the comparison.

    Raises:
      ValueError: whatever is wrong in any of them, with the defence or attack; too few samples; several
        processes.
    """
    if jax.process_count() > 1:
        raise ValueError("A comparison runs in one process, on all of its devices.")
    dataset = jobs.load(settings.dataset, settings.data_dir)
    model = jobs.build(settings.model, dataset.num_classes)
    needed = settings.num_victims * settings.batch_size
    if needed > len(dataset):
        raise ValueError(
            f"num_victims {settings.num_victims} of batch_size {settings.batch_size} need {needed} "
            f"samples, {settings.dataset} has {len(dataset)}."
        )
    for text in settings.attacks:
        try:
            by_name(text, model, defenses.chain())
        except ValueError as error:
            # An attack that does not suit the model is listed in the end; a mistyped setting is not.
            if isinstance(error.__cause__, TypeError):
                raise
    for family in settings.defenses:
        for strength in dict.fromkeys((family.weak, family.strong)):
            text = families.at(family, strength)
            try:
                defenses.parse(text, model)
            except (ValueError, TypeError) as error:
                raise ValueError(f"defense {text}: {error}") from error


def _tradeoff(settings, folder, resume, overwrite, seconds, tell) -> Result:
    if overwrite and not resume:
        _remove(folder)
    record = {"sweep": as_mapping(settings), "versions": store.versions()}
    journal.open_sweep(folder, record, resume, overwrite)
    files.clean(folder)
    members = (UNDEFENDED, *settings.defenses)
    blocks = journal.read(folder).blocks
    done = {name: entry["rows"] for name, entry in blocks.items() if entry["status"] == "done"}
    measured, attacked, refused, failed = {}, {}, [], []
    for index, family in enumerate(members):
        event, name = Event(family.defense, index, len(members), "training"), _name(index, family)
        tell(event)
        rows, reason = done.get(name), ""
        if rows is None:
            rows, reason = _train(settings, family, measured.get("none", ()))
            outcome = "failed" if reason else "done"
            journal.record_block(folder, 0, name, rows, None, outcome, reason)
        if reason:
            tell(event._replace(message=f"{family.defense}: training failed: {reason}"))
            failed.append({"defense": family.defense, "attack": "training", "reason": reason})
            continue
        measured[family.defense] = rows
        chosen = attacked_strengths(settings, family, rows)
        usable, not_usable = applicable(settings, family, chosen[0])
        refused += not_usable
        if usable:
            inner = attack_folder(folder, index, family)
            attacked[family.defense] = engine.sweep(
                attack_sweep(settings, [families.at(family, one) for one in chosen], usable),
                inner,
                resume=(inner / "sweep.json").exists(),
                checkpoint_seconds=seconds,
                on_event=lambda part, event=event: tell(
                    event._replace(phase="attacks", attacks=part)
                ),
            ).to_pylist()
    result = _result(settings, measured, attacked, refused, failed)
    files.write_atomic(folder / "results.parquet", store.parquet(result.table))
    files.write_atomic(folder / "results.json", store.json_file(result._asdict()))
    tell(Event("", len(members), len(members), "done"))
    return result


def read(folder: pathlib.Path) -> tuple[Tradeoff, dict[str, Any], Result | None]:
    """What is on record in a folder.

    Args:
      folder: of the comparison.

    Returns:
      The settings, versions by name, and the result; `None` while there is none.

    Raises:
      ValueError: there is no comparison, or it cannot be read.
    """
    try:
        record = json.loads((folder / "sweep.json").read_text())
        settings = from_mapping(record["sweep"])
        path = folder / "results.json"
        result = Result(**json.loads(path.read_text())) if path.exists() else None
        return settings, record.get("versions", {}), result
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} holds no comparison that can be read: {error}") from error


def attack_folder(folder: pathlib.Path, index: int, family: Family) -> pathlib.Path:
    """Where the attacks of a family are on record, a sweep like any other.

    Args:
      folder: of the comparison.
      index: place of the family among those of the settings, from 1; 0 is no defence.
      family: the family of defences.

    Returns:
      The folder of the sweep.
    """
    return folder / "attacks" / _name(index, family)


def reconstructions(folder: pathlib.Path, point: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
    """What an attack gave back behind a defence, beside the truth.

    Args:
      folder: of the comparison.
      point: of `Result.table` or `Result.curves`. `family`, `defense` and `attack` are read, so
        `point | {"attack": text}` asks for another attack on the same defence.

    Returns:
      `truth` and `reconstruction`, `[N, ...]` in raw units, matched: samples of all seeds and victims.
      `None` where none are on record.

    Raises:
      ValueError: there is no comparison that can be read, or it has no such family.
    """
    if point["attack"] is None:
        return None
    settings = read(folder)[0]
    members = {family.defense: family for family in (UNDEFENDED, *settings.defenses)}
    if point["family"] not in members:
        raise ValueError(f"family must be one of {', '.join(members)}, got {point['family']!r}.")
    inner = attack_folder(folder, list(members).index(point["family"]), members[point["family"]])
    (cell,) = grid.cells(attack_sweep(settings, [point["defense"]], [point["attack"]]))
    path = inner / "reconstructions" / f"{cell.name}.npz"
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as arrays:
        sides = {side: arrays[side] for side in ("truth", "reconstruction")}
    return {side: array.reshape(-1, *array.shape[2:]) for side, array in sides.items()}


def _name(index: int, family: Family) -> str:
    plain = re.sub(r"[^A-Za-z0-9]+", "_", family.defense).strip("_")
    return f"{index:02d}-{plain[:60]}"


def _remove(folder: pathlib.Path) -> None:
    """Remove an earlier comparison's attacks; the settings go first, so that half of it cannot resume."""
    for path in (folder / "sweep.json", folder / "results.json"):
        if path.exists():
            path.unlink()
    for inner in folder.glob("attacks/*/sweep.json"):
        shutil.rmtree(inner.parent)


def _train(settings, family, undefended):
    """A row a strength and seed, and an empty reason; or none, and why it failed."""
    # JAX keeps all that it ever compiled.
    jax.clear_caches()
    try:
        rows = train_family(settings, family, undefended)
    except (KeyboardInterrupt, MemoryError, OSError):
        raise
    except Exception as error:
        if family is UNDEFENDED:
            raise
        return [], f"{type(error).__name__}: {error}".splitlines()[0][:500]
    if family is UNDEFENDED and not all(np.isfinite(row["loss"]) for row in rows):
        raise ValueError(
            f"Without a defence the training diverges: choose a lower rate than {settings.optimizer}."
        )
    return rows, ""


def applicable(
    settings: Tradeoff, family: Family, strength: Strength
) -> tuple[list[str], list[dict[str, str]]]:
    """Which attacks can be run against a family.

    Args:
      settings: of the comparison.
      family: of defences.
      strength: one of its strengths; what an attack can use does not depend on it.

    Returns:
      Texts of the attacks, and those that are refused with their reasons.
    """
    usable, refused = [], []
    text = families.at(family, strength)
    swept = attack_sweep(settings, [text], settings.attacks)
    for cell in grid.cells(swept):
        try:
            made = jobs.setting(swept, cell)
            params = made.model.init(jax.random.key(0), made.dataset.input_shape)
            parts = (made.dataset, made.model, params, made.defense(made.numbers))
            shown = (settings.batch_size, 1, made.grant_labels, settings.seeds[0])
            run.check(run.Experiment(*parts, made.attack(made.numbers), *shown))
            usable.append(cell.attack)
        except (ValueError, TypeError) as error:
            reason = str(error).splitlines()[0]
            refused.append({"defense": family.defense, "attack": cell.attack, "reason": reason})
    return usable, refused


def _result(settings, measured, attacked, refused, failed) -> Result:
    dataset = jobs.load(settings.dataset, settings.data_dir)
    low, high = run.raw_range(dataset)
    every = {name: strongest.errors(rows, high - low) for name, rows in attacked.items()}
    table, curves = [], []
    for family in (UNDEFENDED, *settings.defenses):
        if family.defense not in measured:
            continue
        rows = measured[family.defense]
        found = every[family.defense].by_defense if family.defense in every else {}
        at = {
            strength: _point(settings, family, rows, strength, found)
            for strength in attacked_strengths(settings, family, rows)
        }
        curves += at.values()
        if family is not UNDEFENDED:
            for level, match in matches(settings, family, rows).items():
                head = {"family": family.defense, "level": level, "status": match.status}
                table.append(head | at[match.strength])
    failed = failed + [one for errors in every.values() for one in errors.failed]
    guess = next((errors.guess for errors in every.values() if errors.guess), {})
    jobs_failed = sum(errors.failed_jobs for errors in every.values())
    return Result(_finite(table), _finite(curves), _finite(guess), refused, failed, jobs_failed)


def _finite(value: Any) -> Any:
    """The same without NaN and infinities, which JSON does not know."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _point(settings, family, rows, strength, found) -> dict[str, Any]:
    """One attacked strength: what it costs, and what the attacks make of it."""
    mine = [row for row in rows if row["strength"] == strength]
    text = families.at(family, strength)
    point: dict[str, Any] = {"family": family.defense, "defense": text, "strength": strength}
    for name in ("utility_loss", "accuracy", "loss"):
        point[name], point[f"{name}_error"] = strongest.mean_error([row[name] for row in mine])
    return point | strongest.summary(found.get(text, {}), settings.attacks, settings.reduce)
