"""Arrays of an npz file."""

import math
import pathlib
import zipfile

import numpy as np
from numpy.lib import format as npy

from invjax.datasets.files import check_split
from invjax.datasets.types import Dataset, DatasetError, from_arrays

_READ_HEADER = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def npz(path: str | pathlib.Path, split: str = "test") -> Dataset:
    """The arrays of one split of an npz file; never unpickles.

    Args:
      path: a file with `x_train, y_train, x_test, y_test`; or `x, y` or `inputs, labels`, which
        serve either split; and perhaps `label_names`.
      split: `train` or `test`.

    Returns:
      The data set, named after the file; uint8 inputs are scaled to [0, 1].

    Raises:
      ValueError: an unknown split.
      DatasetError: a damaged file, missing arrays, pickled objects, arrays that make no data set.
    """
    check_split(split)
    path = pathlib.Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            keys = {name.removesuffix(".npy") for name in archive.namelist()}
            pairs = [(f"x_{split}", f"y_{split}"), ("x", "y"), ("inputs", "labels")]
            pair = next((pair for pair in pairs if keys.issuperset(pair)), None)
            if pair is None:
                raise DatasetError(
                    f"{path}: needs arrays x_{split} and y_{split} (or x and y, or inputs and "
                    f"labels), found {', '.join(sorted(keys)) or 'none'}."
                )
            inputs, labels = (_array(path, archive, key) for key in pair)
            class_names = None
            if "label_names" in keys:
                names = _array(path, archive, "label_names").reshape(-1)
                class_names = tuple(map(str, names.astype(str)))
    except DatasetError:
        raise
    except Exception as error:
        # Damaged archives raise nearly anything.
        raise DatasetError(f"{path}: cannot be read as npz: {error}") from error
    return from_arrays(path.stem, inputs, labels, class_names, source=path)


def _array(path: pathlib.Path, archive: zipfile.ZipFile, key: str) -> np.ndarray:
    """One array, once its header has been held against the length of its data."""
    info = archive.getinfo(f"{key}.npy")
    with archive.open(info) as member:
        version = npy.read_magic(member)
        if version not in _READ_HEADER:
            raise DatasetError(f"{path}: array {key} is of the npy version {version}, not 1 or 2.")
        shape, _, dtype = _READ_HEADER[version](member)
        if dtype.hasobject:
            raise DatasetError(f"{path}: array {key} holds pickled objects, which are refused.")
        needed, found = math.prod(shape) * dtype.itemsize, info.file_size - member.tell()
        if needed != found:
            raise DatasetError(
                f"{path}: array {key} of shape {shape} and type {dtype} needs {needed} bytes, "
                f"found {found}."
            )
        member.seek(0)
        return npy.read_array(member, allow_pickle=False)
