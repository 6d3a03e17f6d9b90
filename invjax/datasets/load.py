"""Data sets by name: the embedded digits, and files found in a folder."""

import pathlib

from invjax import calls
from invjax.datasets.arrays import npz
from invjax.datasets.cifar import cifar10_binary, cifar10_python, find_cifar10
from invjax.datasets.digits import digits
from invjax.datasets.files import check_split
from invjax.datasets.folder import image_folder
from invjax.datasets.idx import find_idx, idx
from invjax.datasets.types import Dataset, DatasetError

# The subfolders of `data_dir` in which a name is looked for, torchvision's spelling included.
_FOLDERS = {
    "mnist": ("mnist", "MNIST", "."),
    "fashion_mnist": ("fashion_mnist", "FashionMNIST", "."),
    "cifar10": ("cifar10", "cifar-10-batches-bin", "cifar-10-batches-py", "."),
}
NAMES = ("digits", *_FOLDERS)
"""Names that `load` knows; the path of a file or folder is the other way."""


def load(
    name: str | pathlib.Path, data_dir: str | pathlib.Path | None = None, split: str = "test"
) -> Dataset:
    """A data set by name, or from a path.

    Args:
      name: `digits` (embedded, without a split: both give all of it); `mnist`, `fashion_mnist` or
        `cifar10`, searched in `data_dir` as npz, idx (`.gz` or not), CIFAR binary or CIFAR python
        files, the first found; or the path of an npz file or of a folder (of idx or CIFAR files, or
        of images, whose subfolder `train` or `test` is taken where it has one).
      data_dir: where the files are.
      split: `train` or `test`.

    Returns:
      The data set.

    Raises:
      ValueError: an unknown name or split, or a name that needs a `data_dir`.
      DatasetError: files that are not there or cannot be read.
    """
    check_split(split)
    if name == "digits":
        return digits()
    if name not in _FOLDERS:
        return _from_path(str(name), split)
    if data_dir is None:
        raise ValueError(
            f"The data set {name!r} is read from files: give data_dir (--data-dir), their folder."
        )
    root = pathlib.Path(data_dir)
    if not root.is_dir():
        raise DatasetError(f"{root}: expected the folder of {name}, found no folder.")
    if (root / f"{name}.npz").is_file():
        return npz(root / f"{name}.npz", split)
    find = _find_cifar10 if name == "cifar10" else _find_idx
    for folder in _FOLDERS[name]:
        dataset = find(root / folder, name, split)
        if dataset is not None:
            return dataset
    layout = "CIFAR-10 batches" if name == "cifar10" else "idx files"
    raise DatasetError(
        f"{root}: expected {name}.npz or {layout} of the {split} split there or in "
        f"{', '.join(_FOLDERS[name][:-1])}, found neither."
    )


def _find_idx(folder: pathlib.Path, name: str, split: str) -> Dataset | None:
    found = find_idx(folder, split)
    return None if found is None else idx(*found, name)


def _find_cifar10(folder: pathlib.Path, name: str, split: str) -> Dataset | None:
    del name
    for suffix, read in ((".bin", cifar10_binary), ("", cifar10_python)):
        if find_cifar10(folder, split, suffix):
            return read(folder, split)
    return None


def _from_path(name: str, split: str) -> Dataset:
    path = pathlib.Path(name)
    if path.is_file():
        return npz(path, split)
    if not path.is_dir():
        raise ValueError(
            f"Unknown data set {name!r}: known are {', '.join(NAMES)}, or the path of an npz file "
            f"or of a folder, and there is none.{calls.nearest(name.lower(), NAMES)}"
        )
    for find in (_find_idx, _find_cifar10):
        dataset = find(path, path.resolve().name, split)
        if dataset is not None:
            return dataset
    part = path / split
    return image_folder(part if part.is_dir() else path, name=path.resolve().name)
