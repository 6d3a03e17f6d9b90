"""The idx format of MNIST and its descendants."""

import math
import pathlib

import numpy as np

from invjax.datasets.files import read_bytes
from invjax.datasets.types import Dataset, DatasetError, from_arrays

_PREFIXES = {"train": "train", "test": "t10k"}


def _idx_array(path: pathlib.Path, ndim: int) -> np.ndarray:
    """The array of one idx file: `0 0 8 ndim`, big-endian sizes, bytes."""
    data = read_bytes(path)
    if data[:4] != bytes((0, 0, 8, ndim)):
        raise DatasetError(
            f"{path}: an idx file of {ndim}-dimensional bytes begins with 0000080{ndim}, "
            f"found {data[:4].hex() or 'an empty file'}."
        )
    start = 4 + 4 * ndim
    if len(data) < start:
        raise DatasetError(f"{path}: its header needs {start} bytes, found {len(data)}.")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", ndim, offset=4))
    if len(data) - start != math.prod(shape):
        raise DatasetError(
            f"{path}: an array of shape {shape} needs {math.prod(shape)} bytes, "
            f"found {len(data) - start}."
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def idx(images: str | pathlib.Path, labels: str | pathlib.Path, name: str = "idx") -> Dataset:
    """Images and labels in the idx format, each gzipped or not.

    Args:
      images: file of `[N, H, W]` bytes.
      labels: file of `[N]` bytes.
      name: for tables.

    Returns:
      The data set, inputs `[N, H, W, 1]` in [0, 1].

    Raises:
      DatasetError: a file that cannot be read, is no idx file of bytes or not of the length that
        its header says, or does not fit the other.
    """
    images, labels = pathlib.Path(images), pathlib.Path(labels)
    inputs, classes = _idx_array(images, 3), _idx_array(labels, 1)
    if len(inputs) != len(classes):
        raise DatasetError(
            f"{labels}: {len(classes)} labels, but {images} holds {len(inputs)} images."
        )
    return from_arrays(name, inputs, classes, source=images)


def find_idx(folder: pathlib.Path, split: str) -> tuple[pathlib.Path, pathlib.Path] | None:
    """The images' and the labels' file of a split in one folder.

    Args:
      folder: where to look; its `raw` subfolder (torchvision's layout) counts.
      split: `train` or `test`.

    Returns:
      Both paths, or `None` where neither or only one is there.
    """
    prefix = _PREFIXES[split]
    for where in (folder, folder / "raw"):
        for separator in "-.":
            for suffix in ("", ".gz"):
                images, labels = (
                    where / f"{prefix}-{kind}{separator}ubyte{suffix}"
                    for kind in (f"images{separator}idx3", f"labels{separator}idx1")
                )
                if images.is_file() and labels.is_file():
                    return images, labels
    return None
