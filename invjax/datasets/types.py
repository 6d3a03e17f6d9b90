"""The one value that every reader returns, and what is done with it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from invjax.base import Batch, Bound

# Beyond any data set: labels above it are damage, and names for them would fill the memory.
MAX_CLASSES = 2**16


class DatasetError(ValueError):
    """A data file that cannot be read: names the file, what was expected and what was found."""


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Samples with their labels and public facts.

    Attributes:
      name: for tables.
      inputs: `[N, H, W, C]` or `[N, d]` float32.
      labels: `[N]` int32.
      class_names: name of every class.
      input_range: lowest and highest value of the inputs, each one number or one per channel.
      mean: `[C]` channel means of the raw data (`[d]` for vectors).
      std: `[C]` channel standard deviations of the raw data (`[d]` for vectors).
      is_normalized: whether the inputs are standardised, by `normalized` or as a table's are;
        `denormalize` then undoes that.
    """

    name: str
    inputs: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    input_range: tuple[Bound, Bound]
    mean: np.ndarray
    std: np.ndarray
    is_normalized: bool = False

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return self.inputs.shape[1:]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.inputs)


def from_arrays(
    name: str,
    inputs: np.ndarray,
    labels: np.ndarray,
    class_names: tuple[str, ...] | None = None,
    source: Any = None,
) -> Dataset:
    """A data set from arrays.

    Args:
      name: for tables.
      inputs: `[N, H, W]` (grey), `[N, H, W, C]` or `[N, d]`; uint8 is scaled from [0, 255] to
        [0, 1], any other type keeps its values.
      labels: `[N]` or `[N, 1]` integers from 0.
      class_names: name of every class; the numbers where `None`.
      source: what messages name, usually the file; the name where `None`.

    Returns:
      The data set. Its range is [0, 1], widened to the data where they leave that; vectors that
      leave it have the range of every feature instead, for features rarely share a unit.

    Raises:
      DatasetError: shapes, lengths, labels or values that make no data set.
    """
    source = name if source is None else source
    inputs, labels = np.asarray(inputs), np.asarray(labels)
    if inputs.ndim not in (2, 3, 4) or inputs.size == 0:
        raise DatasetError(
            f"{source}: inputs must be [N, d], [N, H, W] or [N, H, W, C] and not empty, "
            f"got shape {inputs.shape}."
        )
    if inputs.ndim == 4 and inputs.shape[1] in (1, 3) and inputs.shape[2] == inputs.shape[3] > 4:
        raise DatasetError(
            f"{source}: images have their channels last, [N, H, W, C], got shape {inputs.shape}: "
            "transpose them, inputs.transpose(0, 2, 3, 1)."
        )
    if inputs.dtype.kind not in "buif":
        raise DatasetError(f"{source}: inputs must be real numbers, got {inputs.dtype}.")
    if labels.shape not in ((len(inputs),), (len(inputs), 1)):
        raise DatasetError(f"{source}: {len(inputs)} inputs, but labels of shape {labels.shape}.")
    if labels.dtype.kind not in "ui" or labels.min() < 0:
        got = labels.min() if labels.dtype.kind in "ui" else labels.dtype
        raise DatasetError(f"{source}: labels must be integers from 0, got {got}.")
    if class_names is None and labels.max() >= MAX_CLASSES:
        raise DatasetError(f"{source}: label {labels.max()} is above {MAX_CLASSES - 1}.")
    labels = labels.reshape(-1)
    numbers = range(int(labels.max()) + 1)
    names = tuple(map(str, numbers) if class_names is None else class_names)
    if labels.max() >= len(names):
        raise DatasetError(
            f"{source}: label {labels.max()} is out of range for {len(names)} classes."
        )
    inputs = _as_float(source, inputs)
    mean, std = _moments(inputs)
    return Dataset(
        name=name,
        inputs=inputs,
        labels=labels.astype(np.int32),
        class_names=names,
        input_range=_input_range(inputs),
        mean=mean,
        std=std,
    )


def _as_float(source: Any, inputs: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        values = inputs.astype(np.float32)
    if inputs.dtype == np.uint8:
        values *= np.float32(1 / 255)
    elif not np.isfinite(values).all():
        raise DatasetError(f"{source}: inputs must be finite, got NaN or infinity.")
    return values[..., None] if values.ndim == 3 else values


def _moments(inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # Over the samples first, which is many times faster than over all axes but the last.
    flat, channels = inputs.reshape(len(inputs), -1), inputs.shape[-1]
    first = flat.mean(axis=0, dtype=np.float64)
    second = np.einsum("nd,nd->d", flat, flat, dtype=np.float64) / len(flat)
    mean, square = (moment.reshape(-1, channels).mean(axis=0) for moment in (first, second))
    std = np.sqrt(np.maximum(square - mean**2, 0.0))
    return mean.astype(np.float32), std.astype(np.float32)


def _input_range(inputs: np.ndarray) -> tuple[Bound, Bound]:
    low, high = float(inputs.min()), float(inputs.max())
    if inputs.ndim == 4 or (low >= 0 and high <= 1):
        return min(low, 0.0), max(high, 1.0)
    lows, highs = inputs.min(axis=0), inputs.max(axis=0)
    # An interval of no length cannot be divided by.
    highs = np.where(highs > lows, highs, lows + 1)
    return tuple(map(float, lows)), tuple(map(float, highs))


def _scale(dataset: Dataset) -> np.ndarray:
    """Standard deviations to divide by: 1 for a channel that is constant up to rounding."""
    constant = dataset.std <= 1e-6 * np.maximum(1.0, np.abs(dataset.mean))
    return np.where(constant, np.float32(1), dataset.std)


def normalized(dataset: Dataset) -> Dataset:
    """The same data with zero mean and unit variance in every channel (for vectors, every feature).

    Args:
      dataset: the data; returned as they are where they are normalised already.

    Returns:
      The data set. Its range is one number per channel; `mean` and `std` stay those of the raw
      data, and `denormalize` undoes it. A constant channel becomes zero.
    """
    if dataset.is_normalized:
        return dataset
    scale = _scale(dataset)
    low, high = (
        tuple(float(value) for value in (np.asarray(bound, np.float32) - dataset.mean) / scale)
        for bound in dataset.input_range
    )
    inputs = dataset.inputs - dataset.mean
    inputs /= scale
    return dataclasses.replace(dataset, inputs=inputs, input_range=(low, high), is_normalized=True)


def denormalize(dataset: Dataset, inputs):
    """Inputs in the raw units again ([0, 1] for images).

    Args:
      dataset: the data set whose units the inputs have; raw units are left as they are.
      inputs: `[..., C]` (`[..., d]` for vectors), a NumPy or JAX array.

    Returns:
      `[..., C]`, of the same kind of array.

    Raises:
      ValueError: another number of channels than the data set has.
    """
    shape = np.shape(inputs)
    if not shape or shape[-1] != len(dataset.mean):
        raise ValueError(
            f"inputs must have {len(dataset.mean)} channels last, as {dataset.name} has, "
            f"got shape {shape}."
        )
    if not dataset.is_normalized:
        return inputs
    lead = (1,) * (len(shape) - 1) + (-1,)
    return inputs * _scale(dataset).reshape(lead) + dataset.mean.reshape(lead)


def take(dataset: Dataset, indices) -> Batch:
    """The samples of given indices.

    Args:
      dataset: the data.
      indices: `[B]` (or more axes, which the batch then has) integers in [0, N).

    Returns:
      The batch, as JAX arrays.

    Raises:
      TypeError: indices that are not integers.
      ValueError: no axis, or an index out of range.
    """
    indices = np.asarray(indices)
    if indices.dtype.kind not in "ui":
        raise TypeError(f"indices must be integers, got {indices.dtype}.")
    if indices.ndim == 0 or not ((indices >= 0) & (indices < len(dataset))).all():
        raise ValueError(
            f"indices must be [B] in [0, {len(dataset)}) of {dataset.name}, got {indices}."
        )
    return Batch(jnp.asarray(dataset.inputs[indices]), jnp.asarray(dataset.labels[indices]))


def draw(key: jax.Array, dataset: Dataset, size: int, distinct_labels: bool = False) -> Batch:
    """Draw a batch uniformly without replacement; the same for the same key.

    Args:
      key: a typed PRNG key.
      dataset: the data.
      size: samples.
      distinct_labels: draw no class twice: of a random order, the first sample of every class.

    Returns:
      The batch.

    Raises:
      ValueError: `size` is below 1, or more samples than there are (or than classes that occur,
        with distinct labels).
    """
    available = len(np.unique(dataset.labels)) if distinct_labels else len(dataset)
    if not 1 <= size <= available:
        what = "distinct classes" if distinct_labels else "samples"
        raise ValueError(
            f"size must lie in [1, {available}] ({what} of {dataset.name}), got {size}."
        )
    order = np.asarray(jax.random.permutation(key, len(dataset)))
    if distinct_labels:
        _, first = np.unique(dataset.labels[order], return_index=True)
        order = order[np.sort(first)]
    return take(dataset, order[:size])
