"""Readers of files: idx, CIFAR-10 (binary and python), npz, folders of images."""

import gzip
import io
import math
import pathlib
import pickle
import zipfile
import zlib
from typing import Any

import numpy as np

from invjax.datasets.types import Dataset, DatasetError, from_arrays

CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")


def _read(path: pathlib.Path) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{path}: cannot be read: {error}") from error


def idx_array(path: pathlib.Path) -> np.ndarray:
    """One array of the idx format, gzipped or not.

    Args:
      path: the file.

    Returns:
      A uint8 array.

    Raises:
      DatasetError: not an idx file of bytes, or truncated.
    """
    data = _read(path)
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != 8 or not 1 <= data[3] <= 4:
        raise DatasetError(f"{path}: not an idx file of unsigned bytes.")
    ndim = data[3]
    if len(data) < 4 + 4 * ndim:
        raise DatasetError(f"{path}: truncated in its header.")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", ndim, offset=4))
    body = len(data) - 4 - 4 * ndim
    if body != math.prod(shape):
        raise DatasetError(
            f"{path}: an array of shape {shape} needs {math.prod(shape)} bytes, found {body}."
        )
    return np.frombuffer(data, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def idx(images: pathlib.Path, labels: pathlib.Path, name: str = "idx") -> Dataset:
    """Images and labels in the idx format of MNIST.

    Args:
      images: file of `[N, H, W]` bytes.
      labels: file of `[N]` bytes.
      name: for tables.

    Returns:
      The data set.

    Raises:
      DatasetError: a file that cannot be read or does not fit the other.
    """
    return from_arrays(name, idx_array(pathlib.Path(images)), idx_array(pathlib.Path(labels)))


def _cifar_dataset(data: list[np.ndarray], labels: list[np.ndarray]) -> Dataset:
    images = np.concatenate(data).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return from_arrays("cifar10", images, np.concatenate(labels), tuple(CIFAR10_CLASSES))


def cifar10_binary(paths: list[pathlib.Path]) -> Dataset:
    """CIFAR-10, binary version: records of one label byte and 3,072 bytes of R, G, B planes.

    Args:
      paths: the files, in order.

    Returns:
      The data set.

    Raises:
      DatasetError: a file that is not whole records, or a label over 9.
    """
    data, labels = [], []
    for path in paths:
        content = _read(path)
        if len(content) == 0 or len(content) % 3073:
            raise DatasetError(
                f"{path}: CIFAR-10 records have 3073 bytes, and {len(content)} is no multiple."
            )
        records = np.frombuffer(content, np.uint8).reshape(-1, 3073)
        labels.append(records[:, 0])
        data.append(records[:, 1:])
    return _cifar_dataset(data, labels)


class _ArraysOnly(pickle.Unpickler):
    """Admits numpy arrays and builtin containers; everything else is refused by name."""

    _ALLOWED = frozenset(
        {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy.core.multiarray", "scalar"),
            ("numpy._core.multiarray", "scalar"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise DatasetError(f"the pickle asks for {module}.{name}, which is refused")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def cifar10_python(paths: list[pathlib.Path]) -> Dataset:
    """CIFAR-10, python version: pickled batches, read without running anything they bring.

    Args:
      paths: the batch files, in order.

    Returns:
      The data set.

    Raises:
      DatasetError: a pickle that is damaged, holds anything but arrays and containers, or is no batch.
    """
    data, labels = [], []
    for path in paths:
        try:
            content = _ArraysOnly(io.BytesIO(_read(path)), encoding="bytes").load()
            batch = {_text(key): value for key, value in content.items()}
            images = np.asarray(batch["data"], np.uint8)
            classes = np.asarray(batch["labels"])
            if images.ndim != 2 or images.shape[1] != 3072:
                raise DatasetError(f"data must be [N, 3072] bytes, got shape {images.shape}")
        except DatasetError as error:
            raise DatasetError(f"{path}: {error}") from error
        except Exception as error:
            # Damaged pickles raise nearly anything.
            raise DatasetError(f"{path}: not a CIFAR-10 batch: {error!r}") from error
        data.append(images)
        labels.append(classes)
    return _cifar_dataset(data, labels)


def _text(key: bytes | str) -> str:
    return key.decode() if isinstance(key, bytes) else key


def npz(path: pathlib.Path, split: str = "test") -> Dataset:
    """Arrays of an npz file; never unpickles.

    Args:
      path: a file with `x_train, y_train, x_test, y_test`, or `x, y`, or `inputs, labels`; and
        perhaps `label_names`.
      split: `train` or `test`.

    Returns:
      The data set.

    Raises:
      DatasetError: a damaged file, missing arrays, pickled objects.
    """
    path = pathlib.Path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            pairs = [(f"x_{split}", f"y_{split}"), ("x", "y"), ("inputs", "labels")]
            pair = next((p for p in pairs if set(p) <= set(file.files)), None)
            if pair is None:
                raise DatasetError(
                    f"{path}: needs arrays x_{split} and y_{split} (or x and y, or inputs and "
                    f"labels), found {sorted(file.files)}."
                )
            inputs, labels = (file[key] for key in pair)
            names = tuple(map(str, file["label_names"])) if "label_names" in file.files else None
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"{path}: cannot be read as npz without pickles: {error}") from error
    return from_arrays(path.stem, inputs, labels, names)


def image_folder(path: pathlib.Path, size: tuple[int, int] | None = None) -> Dataset:
    """A folder of images: one subfolder a class, or all of one class.

    Args:
      path: the folder.
      size: height and width to crop (centred) and resize to; all images must be of one size where `None`.

    Returns:
      The data set, RGB.

    Raises:
      DatasetError: no images, an unreadable image, different sizes.
    """
    from PIL import Image, ImageOps

    path = pathlib.Path(path)
    classes = sorted(child for child in path.iterdir() if child.is_dir()) or [path]
    images, labels = [], []
    for label, folder in enumerate(classes):
        for file in sorted(folder.iterdir()):
            if file.suffix.lower() not in IMAGE_SUFFIXES:
                continue
            try:
                with Image.open(file) as image:
                    rgb = image.convert("RGB")
            except (OSError, SyntaxError, Image.DecompressionBombError) as error:
                raise DatasetError(f"{file}: cannot be read as an image: {error}") from error
            rgb = rgb if size is None else ImageOps.fit(rgb, (size[1], size[0]))
            images.append(np.asarray(rgb, np.uint8))
            labels.append(label)
            if images[-1].shape != images[0].shape:
                raise DatasetError(
                    f"{file}: is {images[-1].shape[:2]} pixels, the first image {images[0].shape[:2]}; "
                    "give size= to crop and resize."
                )
    if not images:
        raise DatasetError(f"{path}: holds no images ({', '.join(IMAGE_SUFFIXES)}).")
    names = tuple(folder.name for folder in classes)
    return from_arrays(path.name, np.stack(images), np.asarray(labels), names)
