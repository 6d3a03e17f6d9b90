"""The one value that every reader returns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from invjax.base import Batch, Bound


class DatasetError(ValueError):
    """A data file that cannot be read: names the file, what was expected and what was found."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Samples with their labels and public facts.

    Attributes:
      name: for tables.
      inputs: `[N, H, W, C]` or `[N, d]` float32.
      labels: `[N]` int32.
      class_names: name of every class.
      value_range: lowest and highest value, each one number or one per channel.
      mean: `[C]` channel means of the raw data in [0, 1].
      std: `[C]` channel standard deviations of the raw data.
    """

    name: str
    inputs: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    value_range: tuple[Bound, Bound]
    mean: np.ndarray
    std: np.ndarray

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
) -> Dataset:
    """A data set from arrays.

    Args:
      name: for tables.
      inputs: `[N, H, W]` (grey), `[N, H, W, C]` or `[N, d]`; uint8 is scaled from [0, 255] to [0, 1].
      labels: `[N]` integers from 0.
      class_names: name of every class; the numbers where `None`.

    Returns:
      The data set.

    Raises:
      DatasetError: shapes, lengths, labels or values that make no data set.
    """
    inputs, labels = np.asarray(inputs), np.asarray(labels).reshape(-1)
    if inputs.ndim not in (2, 3, 4) or len(inputs) == 0:
        raise DatasetError(
            f"{name}: inputs must be [N, d], [N, H, W] or [N, H, W, C] with N >= 1, "
            f"got shape {inputs.shape}."
        )
    if len(inputs) != len(labels):
        raise DatasetError(f"{name}: {len(inputs)} inputs, but {len(labels)} labels.")
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise DatasetError(f"{name}: labels must be integers from 0.")
    scale = np.float32(1 / 255) if inputs.dtype == np.uint8 else np.float32(1)
    inputs = inputs.astype(np.float32) * scale
    if not np.isfinite(inputs).all():
        raise DatasetError(f"{name}: inputs must be finite, got NaN or infinity.")
    inputs = inputs[..., None] if inputs.ndim == 3 else inputs
    names = class_names or tuple(str(label) for label in range(int(labels.max()) + 1))
    if labels.max() >= len(names):
        raise DatasetError(
            f"{name}: label {labels.max()} is out of range for {len(names)} classes."
        )
    channels = tuple(range(inputs.ndim - 1))
    low, high = float(min(inputs.min(), 0.0)), float(max(inputs.max(), 1.0))
    return Dataset(
        name=name,
        inputs=inputs,
        labels=labels.astype(np.int32),
        class_names=tuple(names),
        value_range=(low, high),
        mean=inputs.mean(axis=channels, dtype=np.float64).astype(np.float32),
        std=inputs.std(axis=channels, dtype=np.float64).astype(np.float32),
    )


def normalized(dataset: Dataset) -> Dataset:
    """The same data with zero mean and unit variance in every channel.

    Args:
      dataset: data in raw units.

    Returns:
      The data set; its range is one number per channel, and `denormalize` undoes it.
    """
    std = np.maximum(dataset.std, 1e-6)
    bounds = [(np.asarray(bound, np.float32) - dataset.mean) / std for bound in dataset.value_range]
    low, high = (tuple(float(value) for value in np.atleast_1d(bound)) for bound in bounds)
    return dataclasses.replace(
        dataset, inputs=(dataset.inputs - dataset.mean) / std, value_range=(low, high)
    )


def denormalize(dataset: Dataset, inputs):
    """Raw units again.

    Args:
      dataset: the data set that the inputs were normalised with.
      inputs: `[..., C]`.

    Returns:
      `[..., C]`.
    """
    shape = (1,) * (np.ndim(inputs) - 1) + (-1,)
    return inputs * np.maximum(dataset.std, 1e-6).reshape(shape) + dataset.mean.reshape(shape)


def take(dataset: Dataset, indices) -> Batch:
    """The samples of given indices.

    Args:
      dataset: the data.
      indices: `[B]` integers.

    Returns:
      The batch, on the device.
    """
    indices = np.asarray(indices)
    return Batch(jnp.asarray(dataset.inputs[indices]), jnp.asarray(dataset.labels[indices]))


def draw(key: jax.Array, dataset: Dataset, size: int, distinct_labels: bool = False) -> Batch:
    """Draw a batch without replacement, reproducibly.

    Args:
      key: PRNG key.
      dataset: the data.
      size: samples.
      distinct_labels: whether every class may occur once only.

    Returns:
      The batch.

    Raises:
      ValueError: more samples than there are (or than classes, with distinct labels).
    """
    available = len(np.unique(dataset.labels)) if distinct_labels else len(dataset)
    if not 1 <= size <= available:
        raise ValueError(
            f"size must lie in [1, {available}] "
            f"({'distinct classes' if distinct_labels else 'samples'} of {dataset.name}), got {size}."
        )
    order = np.asarray(jax.random.permutation(key, len(dataset)))
    if distinct_labels:
        _, first = np.unique(dataset.labels[order], return_index=True)
        order = order[np.sort(first)]
    return take(dataset, order[:size])
