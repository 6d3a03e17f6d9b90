"""Folders of results: written whole or not at all."""

import functools
import io
import json
import os
import pathlib
import platform
import shutil
from importlib import metadata
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from invjax.files import synced

PACKAGES = ("invjax", "jax", "jaxlib", "flax", "optax", "numpy")


class FolderError(ValueError):
    """A folder that results cannot go to."""


@functools.cache
def versions() -> dict[str, str]:
    """Versions of what made a result, and the device it ran on.

    Returns:
      Names and versions.
    """
    found = {name: metadata.version(name) for name in PACKAGES}
    return {**found, "python": platform.python_version(), "device": jax.devices()[0].device_kind}


def check_folder(path: pathlib.Path, overwrite: bool) -> None:
    """Refuse, before any work is done, a folder that results cannot go to.

    Args:
      path: the folder.
      overwrite: whether files of an earlier run may be replaced.

    Raises:
      FolderError: it is no folder or below a file, it is not empty, or it cannot be written to.
    """
    if path.exists() and not path.is_dir():
        raise FolderError(f"--out {path}: is a file, not a folder.")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise FolderError(
            f"--out {path}: exists and is not empty; choose another folder, or --overwrite."
        )
    parent = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not parent.is_dir():
        raise FolderError(f"--out {path}: {parent} is a file, not a folder.")
    if not os.access(parent, os.W_OK):
        raise FolderError(f"--out {path}: {parent} cannot be written to.")


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} cannot be recorded as JSON: {value!r}.")


def text(value: Any, **options: Any) -> str:
    """JSON on one line, with NumPy's scalars and arrays, and paths; `json.dumps` takes the options."""
    return json.dumps(value, default=_plain, **options)


def json_file(value: Any, **options: Any) -> bytes:
    """A JSON file's content; the options are those of `text`."""
    return (text(value, **options) + "\n").encode()


def npz_path(folder: pathlib.Path, name: str) -> pathlib.Path:
    """The npz file of a name; a `ValueError` where the name is fit for no file."""
    if not name or name.startswith(".") or "/" in name or "\0" in name:
        raise ValueError(f"{name!r} cannot name a file: empty, with a slash, or a dot first.")
    return folder / f"{name}.npz"


def parquet(rows: list[dict[str, Any]]) -> bytes:
    """Rows as a parquet file.

    Args:
      rows: one dict a row, the same keys in each.

    Returns:
      The file's content.
    """
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    """Arrays as a compressed npz file.

    Args:
      **arrays: by name.

    Returns:
      The file's content.
    """
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def write_folder(path: pathlib.Path, files: dict[str, bytes]) -> None:
    """Write files into a folder, all of them or none.

    They go to a temporary folder beside it first, are synced, and are then renamed into place. Other
    files that the folder holds stay.

    Args:
      path: the folder; made if it is not there.
      files: contents by relative name.

    Raises:
      OSError: a full disk, say; nothing is left behind then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        for name, content in files.items():
            target = temporary / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with synced(target) as file:
                file.write(content)
        if not path.exists():
            os.replace(temporary, path)
            return
        for name in files:
            target = path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary / name, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
