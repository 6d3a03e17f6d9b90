"""The durable record of a sweep: blocks of jobs, each recorded whole or not at all."""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from invjax import files
from invjax.evaluation import store

OURS = ("journal/*.jsonl", "blocks/**/*.npz", "checkpoints/*.npz", "reconstructions/*.npz")


class Journal(NamedTuple):
    """What is on record: entries by block, what was passed over, and sha256 of `results.parquet`."""

    blocks: dict[str, dict[str, Any]]
    damaged: list[str]
    compacted: str


class _Place(NamedTuple):
    """Where a block's entry stands, without its rows: they may be many."""

    order: int
    path: pathlib.Path
    offset: int
    status: str
    file: dict[str, Any] | None


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _settings_crc(settings: Any) -> str:
    return f"{zlib.crc32(store.text(settings, sort_keys=True).encode()):08x}"


def _flat(value: Any, name: str = "") -> dict[str, str]:
    if not isinstance(value, dict) or not value:
        return {name: store.text(value)}  # As text, in which NaN equals NaN.
    inner = (_flat(value[key], f"{name}.{key}" if name else key) for key in value)
    return {key: text for part in inner for key, text in part.items()}


def open_sweep(
    folder: pathlib.Path, settings: Mapping[str, Any], resume: bool, overwrite: bool = False
) -> dict[str, Any]:
    """Begin a sweep in a folder, or go on with the one there; one process begins, others resume.

    Args:
      folder: new or empty to begin, a sweep's to resume.
      settings: `sweep`, which a resumed one must repeat, and facts (`plan`), whose record wins.
      resume: whether to go on with what is there.
      overwrite: whether to remove an earlier sweep first; other files stay.

    Returns:
      The settings on record, as JSON gives them back.

    Raises:
      FolderError: the folder does not suit, its `sweep.json` is damaged, or its settings differ.
    """
    path, now = folder / "sweep.json", json.loads(store.text(settings))
    store.check_folder(folder, overwrite=True)
    if resume:
        if overwrite or not path.exists():
            why = "cannot --overwrite as well" if overwrite else "holds no sweep.json to go on with"
            raise store.FolderError(f"--resume {folder}: {why}.")
        try:
            record = json.loads(path.read_bytes())
            whole = record.pop("crc32") == _settings_crc(record)
        except (ValueError, LookupError, TypeError, AttributeError):
            record, whole = {}, False
        if not whole:
            raise store.FolderError(f"{path}: damaged; restore it, or start anew: --overwrite.")
        old, new = _flat(record.get("sweep")), _flat(now.get("sweep"))
        differ = [name for name in sorted(old | new) if old.get(name) != new.get(name)]
        lines = (f"{n}: recorded {old.get(n, 'none')}, now {new.get(n, 'none')}" for n in differ)
        if differ:
            text = "\n".join((f"--resume {folder}: was begun with other settings.", *lines))
            raise store.FolderError(text)
        return record
    if path.exists() and not overwrite:
        raise store.FolderError(f"--out {folder}: holds a sweep; --resume it, or --overwrite.")
    if folder.is_dir() and not all(".partial-" in old.name for old in folder.iterdir()):
        store.check_folder(folder, overwrite)
        # The settings go first: a sweep removed by half cannot be resumed.
        for pattern in ("sweep.json", *OURS, "results.parquet"):
            for old in folder.glob(pattern):
                old.unlink()
    record = {**now, "crc32": _settings_crc(now)}
    files.write_atomic(path, store.json_file(record, sort_keys=True, indent=2))
    return now


def append(folder: pathlib.Path, process: int, entry: Mapping[str, Any]) -> None:
    """Append one entry to a process's file, durably.

    Args:
      folder: the sweep's.
      process: index of the process; each has one file, and writes to no other.
      entry: what JSON can hold, NaN, infinities and NumPy scalars too.

    Raises:
      OSError: a full disk, say; the line may then be torn, which no later one suffers from.
      TypeError: an entry that JSON cannot hold.
    """
    text = store.text(entry).encode()
    line = b"%08x %b\n" % (zlib.crc32(text), text)
    path = folder / "journal" / f"process-{process:03d}.jsonl"
    files.make(path.parent)
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        if os.write(descriptor, line) != len(line):
            raise OSError(errno.ENOSPC, "written in part only", str(path))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if not size:
        files.sync(path.parent)


def record_block(
    folder: pathlib.Path,
    process: int,
    block: str,
    rows: Sequence[Mapping[str, Any]],
    arrays: Mapping[str, Any] | None,
    status: str = "done",
    reason: str = "",
) -> None:
    """Record a block: its arrays, then its entry, which makes it count; its checkpoint goes.

    Args:
      folder: the sweep's.
      process: index of the process.
      block: its name.
      rows: one dict a row.
      arrays: by name, `[N, ...]` each; `None` without any.
      status: `done` or `failed`; a failed one never touches the file of a done one.
      reason: why it failed.

    Raises:
      ValueError: a name, a status or an array that cannot be recorded.
      TypeError: rows that JSON cannot hold.
      OSError: a full disk, say.
    """
    if status not in ("done", "failed"):
        raise ValueError(f"status must be done or failed, got {status!r}.")
    entry = {"kind": "block", "block": block, "status": status, "reason": reason, "rows": rows}
    store.text(entry)  # What cannot be recorded must not replace a file either.
    path, file = (
        store.npz_path(folder / "blocks" / ("failed" if status == "failed" else ""), block),
        None,
    )
    if arrays is not None:
        whole = {name: np.asarray(array) for name, array in arrays.items()}
        for name, array in whole.items():
            if array.dtype.kind in "OV":  # npz would forget that it is bfloat16, say.
                raise ValueError(f"block {block}, array {name!r}: npz cannot hold {array.dtype}.")
        content = store.npz(**whole)
        file = {"name": path.relative_to(folder).as_posix(), "bytes": len(content)}
        file["sha256"] = hashlib.sha256(content).hexdigest()
        files.write_atomic(path, content)
    append(folder, process, {**entry, "file": file})
    store.npz_path(folder / "checkpoints", block).unlink(missing_ok=True)


def _parse(line: bytes) -> dict[str, Any] | None:
    text = line[9:].removesuffix(b"\n")
    with contextlib.suppress(ValueError):
        return json.loads(text) if line[:9] == b"%08x " % zlib.crc32(text) else None
    return None


def _entry(place: _Place) -> dict[str, Any]:
    with open(place.path, "rb") as file:
        file.seek(place.offset)
        return json.loads(file.readline()[9:])


def _problem(folder: pathlib.Path, file: Mapping[str, Any] | None, verify: bool) -> str:
    if file is None:
        return ""
    path = folder / file["name"]
    size = path.stat().st_size if path.is_file() else None
    if size != file["bytes"]:
        what = "missing" if size is None else f"{size} bytes"
        return f"{file['name']}: {what}, recorded with {file['bytes']} bytes"
    if verify and _sha256(path) != file["sha256"]:
        return f"{file['name']}: does not match the sha256 on record"
    return ""


def _select(folder: pathlib.Path, verify: bool) -> tuple[dict[str, _Place], list[str], str]:
    """The one entry of each block that counts, what is damaged, and the last compaction."""
    candidates: dict[str, list[_Place]] = {}
    chosen, damaged, compacted, order = {}, [], "", 0
    paths = folder.glob("journal/process-*.jsonl")
    for path in sorted(paths, key=lambda path: (len(path.name), path.name)):
        offset = 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                entry = _parse(line)
                if entry is None:
                    torn = not line.endswith(b"\n")
                    what = "torn last line, as a kill leaves it" if torn else "damaged line"
                    damaged.append(f"journal/{path.name} line {number}: {what}")
                elif entry.get("kind") == "block":
                    place = _Place(order, path, offset, entry["status"], entry["file"])
                    candidates.setdefault(entry["block"], []).append(place)
                elif entry.get("kind") == "compacted":
                    compacted = entry["sha256"]
                offset, order = offset + len(line), order + 1
    for block, places in candidates.items():
        # A failure besides never hides that a done block's file is damaged: the block runs again.
        places = [place for place in places if place.status == "done"] or places
        problems = [_problem(folder, place.file, verify) for place in places]
        whole = [place for place, problem in zip(places, problems, strict=True) if not problem]
        if whole:
            chosen[block] = whole[-1]
        else:
            damaged.append(f"block {block}: {problems[-1]}")
    return dict(sorted(chosen.items(), key=lambda item: item[1].order)), damaged, compacted


def read(folder: pathlib.Path, verify: bool = True) -> Journal:
    """Read what every process recorded.

    Args:
      folder: the sweep's.
      verify: whether to check files by content, besides presence and size.

    Returns:
      The blocks that count, in journal order: of one recorded twice the later, and a done one before
      a failed one. Those whose files are damaged are left out, so that they run again.
    """
    chosen, damaged, compacted = _select(folder, verify)
    return Journal({block: _entry(place) for block, place in chosen.items()}, damaged, compacted)


def rows(folder: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Rows on record, of a running sweep too, one block in memory at a time.

    Args:
      folder: the sweep's.

    Yields:
      Each row, in journal order.
    """
    for place in _select(folder, verify=False)[0].values():
        yield from _entry(place)["rows"]


def load_arrays(folder: pathlib.Path, entry: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Load the arrays of a block, `[N, ...]` each, as they were recorded.

    Args:
      folder: the sweep's.
      entry: the block's, of `Journal.blocks`.

    Returns:
      Arrays by name; none where the block has no file.

    Raises:
      ValueError: the file is missing or damaged.
    """
    problem = _problem(folder, entry["file"], verify=True)
    if problem:
        raise ValueError(f"{folder}: {problem}.")
    if entry["file"] is None:
        return {}
    with np.load(folder / entry["file"]["name"], allow_pickle=False) as arrays:
        return dict(arrays)


def _joined(folder: pathlib.Path, cell: str, places: list[_Place]) -> dict[str, np.ndarray]:
    loaded = (load_arrays(folder, {"file": place.file}) for place in places)
    parts = [arrays for arrays in loaded if arrays]
    if any(arrays.keys() != parts[0].keys() for arrays in parts):
        raise ValueError(f"cell {cell}: its blocks hold arrays of different names.")
    try:
        names = parts[0] if parts else ()
        return {name: np.concatenate([part[name] for part in parts]) for name in names}
    except ValueError as error:
        raise ValueError(f"cell {cell}: {error}") from error


def compact(
    folder: pathlib.Path, cells: Callable[[str], str] | Mapping[str, str], order: Sequence[str]
) -> str:
    """Derive `reconstructions/<cell>.npz` and `results.parquet`; what is on record stays.

    Args:
      folder: the sweep's.
      cells: the cell of a block.
      order: blocks whose rows and arrays to write, in their order; the arrays of a cell are in memory
        together, the rows of one block at a time.

    Returns:
      sha256 of `results.parquet`, which process 0 records.

    Raises:
      ValueError: a block that is not on record whole, arrays of a cell that do not fit together, or
        values of a column of `results.parquet` that share no type.
      OSError: a full disk, say.
    """
    chosen = _select(folder, verify=True)[0]
    if missing := [block for block in order if block not in chosen]:
        raise ValueError(f"{folder}: not on record whole: {', '.join(missing)}.")
    of = cells if callable(cells) else cells.__getitem__
    members: dict[str, list[str]] = {}
    for block in order:
        members.setdefault(of(block), []).append(block)
    for cell, blocks in members.items():
        path = store.npz_path(folder / "reconstructions", cell)
        joined = _joined(folder, cell, [chosen[block] for block in blocks])
        if joined:
            files.write_atomic(path, store.npz(**joined))
        else:
            path.unlink(missing_ok=True)
    schema = pa.schema([])
    for block in order:
        rows = _entry(chosen[block])["rows"]
        names = dict.fromkeys(name for row in rows for name in row)
        try:
            table = pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})
            schema = pa.unify_schemas([schema, table.schema], promote_options="permissive")
        except (pa.ArrowException, OverflowError) as error:
            raise ValueError(f"rows of block {block}: {error}") from error
    path = folder / "results.parquet"
    with files.replacing(path) as file, pq.ParquetWriter(file, schema) as writer:
        for block in order:
            writer.write_table(pa.Table.from_pylist(_entry(chosen[block])["rows"], schema=schema))
    sha256 = _sha256(path)
    append(folder, 0, {"kind": "compacted", "sha256": sha256})
    return sha256
