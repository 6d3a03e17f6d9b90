"""Reading files so that every failure names the file."""

import gzip
import pathlib
import zlib

from invjax.datasets.types import DatasetError


def check_split(split: str) -> None:
    """Refuse what is neither `train` nor `test`, with a `ValueError`."""
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}.")


def read_bytes(path: pathlib.Path) -> bytes:
    """The whole content of a file, decompressed where it is gzip, whatever its name.

    Args:
      path: the file.

    Returns:
      Its bytes.

    Raises:
      DatasetError: a file that is not there, may not be read, or is damaged gzip.
    """
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{path}: cannot be read: {error}") from error


def list_folder(path: pathlib.Path) -> list[pathlib.Path]:
    """What a folder holds, sorted by name, hidden entries left out.

    Args:
      path: the folder.

    Returns:
      Paths.

    Raises:
      DatasetError: a folder that is not there or may not be read.
    """
    try:
        return sorted(child for child in path.iterdir() if not child.name.startswith("."))
    except OSError as error:
        raise DatasetError(f"{path}: not a folder that can be read: {error}") from error
