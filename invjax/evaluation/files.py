"""Files that are the old one or the new one, whenever the machine stops."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import IO, Any


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be recorded as JSON: {value!r}.")


def text(value: Any, **options: Any) -> str:
    """JSON on one line, NumPy's scalars and arrays included; `json.dumps` takes the options."""
    return json.dumps(value, default=_plain, **options)


def npz_path(folder: pathlib.Path, name: str) -> pathlib.Path:
    """The npz file of a name; a `ValueError` where the name is fit for no file."""
    if not name or name.startswith(".") or "/" in name or "\0" in name:
        raise ValueError(f"{name!r} cannot name a file: empty, with a slash, or a dot first.")
    return folder / f"{name}.npz"


def sync(folder: pathlib.Path) -> None:
    """Put a folder's names on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make(folder: pathlib.Path) -> None:
    """Make a folder and those above it, and put them on the disk."""
    if not folder.is_dir():
        make(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[IO[bytes]]:
    """A file to write into, which takes the place of `path` once it is whole and on the disk."""
    make(path.parent)
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_atomic(path: pathlib.Path, content: bytes) -> None:
    """Write a file so that, whenever the machine stops, it is the old one or the new one.

    Args:
      path: the file; its folder is made if it is not there.
      content: all of it.

    Raises:
      OSError: a full disk, say; no temporary file is left behind then.
    """
    with replacing(path) as file:
        file.write(content)


def clean(folder: pathlib.Path, pid: int | None = None) -> list[pathlib.Path]:
    """Remove temporary files that a killed process left; call it while no live one is writing.

    Args:
      folder: the sweep's.
      pid: operating system's id of the process whose files go; every process's where `None`.

    Returns:
      What was removed.
    """
    pattern = f".*.partial-{'*' if pid is None else pid}"
    stale = sorted(path for path in folder.rglob(pattern) if path.is_file())
    for path in stale:
        path.unlink(missing_ok=True)
    return stale
