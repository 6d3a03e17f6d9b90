"""Files that are the old one or the new one, whenever the machine stops."""

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import IO


@contextlib.contextmanager
def synced(path: pathlib.Path) -> Iterator[IO[bytes]]:
    """A file to write into, which is on the disk at the end."""
    with open(path, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


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
        with synced(temporary) as file:
            yield file
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
