"""Data sets by name: the embedded digits, and files found in a folder."""

import difflib
import pathlib
from collections.abc import Callable

import numpy as np

from invjax.datasets import files
from invjax.datasets.types import Dataset, DatasetError, from_arrays

NAMES = ("digits", "mnist", "fashion_mnist", "cifar10")


def digits() -> Dataset:
    """The 1,797 handwritten digits of 8x8 pixels that scikit-learn brings, scaled to [0, 1].

    Returns:
      The data set (Alpaydin and Kaynak 1998; test part of UCI's optical recognition set).
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    return from_arrays("digits", data.images.astype(np.float32) / 16, data.target)


def load(name: str, data_dir: str | pathlib.Path | None = None, split: str = "test") -> Dataset:
    """A data set by name, or from a path.

    Args:
      name: `digits` (embedded); `mnist`, `fashion_mnist` or `cifar10`, searched in `data_dir` as npz,
        idx, CIFAR binary or CIFAR python files; or the path of an npz file or a folder of images.
      data_dir: where the files are.
      split: `train` or `test`.

    Returns:
      The data set.

    Raises:
      ValueError: an unknown name or split, or a name that needs a `data_dir`.
      DatasetError: files that are not there or cannot be read.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}.")
    if name == "digits":
        return digits()
    path = pathlib.Path(name)
    if name not in NAMES:
        if path.is_dir():
            return files.image_folder(path)
        if path.is_file():
            return files.npz(path, split)
        near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"Unknown data set {name!r}: known are {', '.join(NAMES)}, or the path of an npz file or "
            f"of a folder of images.{hint}"
        )
    if data_dir is None:
        raise ValueError(f"The data set {name!r} is read from files: give data_dir.")
    root = pathlib.Path(data_dir)
    if not root.is_dir():
        raise DatasetError(f"{root}: no such folder.")
    readers = [_find_npz, _find_cifar10] if name == "cifar10" else [_find_npz, _find_idx]
    for find in readers:
        read = find(root, name, split)
        if read is not None:
            return read()
    raise DatasetError(f"{root}: holds no files of {name} ({split}) in a layout that is known.")


Reader = Callable[[], Dataset]


def _find_npz(root: pathlib.Path, name: str, split: str) -> Reader | None:
    path = root / f"{name}.npz"
    return (lambda: files.npz(path, split)) if path.is_file() else None


def _find_idx(root: pathlib.Path, name: str, split: str) -> Reader | None:
    prefix = "t10k" if split == "test" else "train"
    folders = {"mnist": ["MNIST", "mnist"], "fashion_mnist": ["FashionMNIST", "fashion_mnist"]}
    for folder in [root / f / raw for f in folders[name] for raw in ("raw", ".")] + [root]:
        for suffix in ("", ".gz"):
            images = folder / f"{prefix}-images-idx3-ubyte{suffix}"
            labels = folder / f"{prefix}-labels-idx1-ubyte{suffix}"
            if images.is_file() and labels.is_file():
                return lambda images=images, labels=labels: files.idx(images, labels, name)
    return None


def _find_cifar10(root: pathlib.Path, name: str, split: str) -> Reader | None:
    del name
    layouts = [
        ("cifar-10-batches-bin", "test_batch*.bin", "data_batch_*.bin", files.cifar10_binary),
        ("cifar-10-batches-py", "test_batch", "data_batch_[1-5]", files.cifar10_python),
    ]
    for folder, test, train, reader in layouts:
        for where in (root / folder, root):
            paths = sorted(where.glob(test if split == "test" else train))
            if paths:
                return lambda reader=reader, paths=paths: reader(paths)
    return None
