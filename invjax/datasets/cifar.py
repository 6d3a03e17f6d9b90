"""CIFAR-10 as its authors publish it, binary and python version."""

import io
import pathlib
import pickle
import pickletools
import re
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from invjax.datasets.files import check_split, read_bytes
from invjax.datasets.types import Dataset, DatasetError, from_arrays

CLASSES = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())
_PIXELS = 3 * 32 * 32

Part = tuple[np.ndarray, np.ndarray]


def find_cifar10(
    folder: pathlib.Path, split: str, suffix: str = ".bin"
) -> list[pathlib.Path] | None:
    """The batch files of a split in one folder, in order.

    Args:
      folder: where to look.
      split: `train` or `test`.
      suffix: `.bin` for the binary version, nothing for the python version.

    Returns:
      The paths, or `None` where there is none.

    Raises:
      DatasetError: some of the five training batches are missing.
    """
    if split == "test":
        pattern = f"test_batch*{suffix}" if suffix else "test_batch"
        return sorted(folder.glob(pattern))[:1] or None
    batches = [folder / f"data_batch_{number}{suffix}" for number in range(1, 6)]
    missing = [path.name for path in batches if not path.is_file()]
    if len(missing) == len(batches):
        return None
    if missing:
        raise DatasetError(
            f"{folder}: the training split has five batches, {', '.join(missing)} not found; "
            "give the path of one batch to read that alone."
        )
    return batches


def _read(path: str | pathlib.Path, split: str, suffix: str, read: Callable[..., Part]) -> Dataset:
    check_split(split)
    path = pathlib.Path(path)
    paths = find_cifar10(path, split, suffix) if path.is_dir() else [path]
    if paths is None:
        raise DatasetError(f"{path}: holds no CIFAR-10 batches of the {split} split.")
    images, labels = zip(*(_checked(file, *read(file)) for file in paths), strict=True)
    pixels = np.concatenate(images).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return from_arrays("cifar10", pixels, np.concatenate(labels), CLASSES, source=path)


def _checked(path: pathlib.Path, images: np.ndarray, labels: np.ndarray) -> Part:
    if labels.dtype.kind not in "ui" or labels.min() < 0 or labels.max() >= len(CLASSES):
        raise DatasetError(
            f"{path}: labels must be integers from 0 to 9, found {labels.min()} to {labels.max()}."
        )
    return images, labels


def cifar10_binary(path: str | pathlib.Path, split: str = "test") -> Dataset:
    """CIFAR-10, binary version: records of one label byte and 3,072 bytes of R, G, B planes.

    Args:
      path: one batch file, or the folder `cifar-10-batches-bin` of them.
      split: `train` or `test`, which batches of a folder; a file is read whole.

    Returns:
      The data set, inputs `[N, 32, 32, 3]` in [0, 1].

    Raises:
      ValueError: an unknown split.
      DatasetError: no or missing batches, a file that is not whole records, or a label over 9.
    """
    return _read(path, split, ".bin", _binary_part)


def _binary_part(path: pathlib.Path) -> Part:
    content = read_bytes(path)
    if len(content) == 0 or len(content) % (_PIXELS + 1):
        raise DatasetError(
            f"{path}: CIFAR-10 records have {_PIXELS + 1} bytes each, "
            f"and {len(content)} bytes are not whole records."
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, _PIXELS + 1)
    return records[:, 1:], records[:, 0]


def cifar10_python(path: str | pathlib.Path, split: str = "test") -> Dataset:
    """CIFAR-10, python version: pickled batches, read without running anything they bring.

    Args:
      path: one batch file, or the folder `cifar-10-batches-py` of them.
      split: `train` or `test`, which batches of a folder; a file is read whole.

    Returns:
      The data set, inputs `[N, 32, 32, 3]` in [0, 1].

    Raises:
      ValueError: an unknown split.
      DatasetError: no or missing batches, a pickle that is damaged, holds anything but arrays and
        builtin containers (the message names what was refused), or is no CIFAR-10 batch.
    """
    return _read(path, split, "", _python_part)


def _python_part(path: pathlib.Path) -> Part:
    content = read_bytes(path)
    try:
        _check_sizes(content)
        batch = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
    except DatasetError as error:
        raise DatasetError(f"{path}: {error}") from error
    except Exception as error:
        # Damaged pickles raise nearly anything.
        raise DatasetError(f"{path}: not a pickle that can be read: {error!r}") from error
    if not isinstance(batch, dict):
        raise DatasetError(f"{path}: a CIFAR-10 batch is a dict, found a {type(batch).__name__}.")
    # Python 2 wrote the keys as bytes.
    images, labels = (batch.get(key.encode(), batch.get(key)) for key in ("data", "labels"))
    images = images.value if isinstance(images, _Array) else None
    if images is None or images.dtype != np.uint8:
        raise DatasetError(f"{path}: data must be an array of bytes.")
    if images.ndim != 2 or images.shape[1] != _PIXELS or len(images) == 0:
        raise DatasetError(f"{path}: data must be [N, {_PIXELS}] bytes, found {images.shape}.")
    if not isinstance(labels, list) or len(labels) != len(images):
        raise DatasetError(f"{path}: labels must be a list of {len(images)} integers.")
    if not all(isinstance(label, int) for label in labels):
        raise DatasetError(f"{path}: labels must be integers, found other values.")
    return images, np.asarray(labels)


def _check_sizes(content: bytes) -> None:
    """Hold lengths and memo indices against the content: the unpickler allocates what they say."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > count:
            raise DatasetError(f"the pickle numbers {argument} objects, and has {count} so far.")


def _text(value: bytes | str) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else value


# NumPy's own constructors trust the state they are given: a hostile dtype corrupts memory. Pickles
# get these stand-ins in their place, which take nothing from them but numbers.


class _DType:
    """For `numpy.dtype`: a code such as `u1`, later the byte order."""

    def __init__(self, code: bytes | str, *copy: Any):
        del copy
        self.code = _text(code)

    def __setstate__(self, state: tuple):
        self.code = _text(state[1]) + self.code


class _Array:
    """For `numpy.ndarray`: `value` is the array, once its state has come."""

    value: np.ndarray | None = None

    def __setstate__(self, state: tuple):
        _, shape, dtype, is_fortran, data = state
        self.value = _from_buffer(data, dtype, shape, "F" if is_fortran else "C").value


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    del kind, shape, code
    return _Array()


def _from_buffer(data: Any, dtype: _DType, shape: Any, order: Any, *axis_order: Any) -> _Array:
    del axis_order
    if not re.fullmatch("[<>=|]?[biuf][1248]", dtype.code):
        raise DatasetError(f"the pickle holds an array of {dtype.code!r}, which is refused.")
    array = _Array()
    array.value = np.frombuffer(data, dtype.code).reshape(shape, order=order)
    return array


def _latin1(text: str, encoding: str) -> bytes:
    """For `_codecs.encode`: what Python 3 writes for bytes in Python 2's protocols."""
    if encoding != "latin1":
        raise DatasetError(f"the pickle asks for the codec {encoding!r}, which is refused.")
    return text.encode("latin1")


class _ArraysOnly(pickle.Unpickler):
    """Admits what numpy arrays are rebuilt from, and containers; all else is refused by name."""

    _STAND_INS: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _DType,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.numeric", "_frombuffer"): _from_buffer,
        ("_codecs", "encode"): _latin1,
    }

    def find_class(self, module: str, name: str) -> Any:
        # NumPy 1 called its core package `numpy.core`.
        key = (module.replace("numpy.core.", "numpy._core."), name)
        if key not in self._STAND_INS:
            raise DatasetError(f"the pickle asks for {module}.{name}, which is refused.")
        return self._STAND_INS[key]
