"""Tables of mixed columns: rows as the vectors that a model sees, and back; the Adult data set."""

import dataclasses
import pathlib
import zipfile
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from invjax.base import Array
from invjax.datasets.arrays import npz
from invjax.datasets.files import check_split
from invjax.datasets.schema import Categorical as Categorical
from invjax.datasets.schema import Column
from invjax.datasets.schema import Continuous as Continuous
from invjax.datasets.schema import Schema as Schema
from invjax.datasets.schema import check_inputs as check_inputs
from invjax.datasets.schema import input_range as input_range
from invjax.datasets.schema import moments as moments
from invjax.datasets.types import Dataset, DatasetError, from_arrays


def fit_schema(
    table: ArrayLike, num_categories: Sequence[int | None], names: Sequence[str] | None = None
) -> Schema:
    """The schema of a table: frequencies, moments and ranges of its own values. Host code.

    Args:
      table: `[N, columns]` numbers; integers from 0 in categorical columns.
      num_categories: for every column the number of categories, `None` for a continuous one.
      names: for every column; its position where `None`.

    Returns:
      The schema. A constant continuous column gets a standard deviation and a range of length 1.

    Raises:
      ValueError: a table that is not finite, codes out of range, fewer than two categories, or other
        numbers of columns.
    """
    table = np.asarray(table)
    names = [str(index) for index in range(len(num_categories))] if names is None else names
    if len(names) != len(num_categories):
        raise ValueError(f"names must be {len(num_categories)}, one a column, got {names}.")
    _check_table(table, num_categories, names)
    columns = map(_fit_column, names, num_categories, table.T.astype(np.float64))
    return Schema(tuple(columns))


def _fit_column(name: str, count: int | None, values: np.ndarray) -> Column:
    if count is not None:
        shares = np.bincount(values.astype(np.int64), minlength=count) / len(values)
        return Categorical(name, count, tuple(shares.tolist()))
    mean, std, low, high = (float(of(values)) for of in (np.mean, np.std, np.min, np.max))
    if low == high:
        # Neither can be divided by.
        std, high = 1.0, low + 1.0
    return Continuous(name, mean, std, low, high)


def _check_table(
    table: np.ndarray, num_categories: Sequence[int | None], names: Sequence[str]
) -> None:
    if table.ndim != 2 or table.shape[1] != len(names) or not len(table):
        raise ValueError(
            f"table must be [N, {len(names)}] with N >= 1, a number for every column, "
            f"got shape {table.shape}."
        )
    if table.dtype.kind not in "buif" or not np.isfinite(table).all():
        raise ValueError(f"table must hold finite numbers, got others (type {table.dtype}).")
    for name, count, values in zip(names, num_categories, table.T, strict=True):
        if count is None:
            continue
        wrong = (values < 0) | (values >= count) | (values != np.floor(values))
        if wrong.any():
            raise ValueError(
                f"column {name!r} must hold integers in [0, {count - 1}], got {values[wrong][0]}."
            )


def encode(schema: Schema, table: ArrayLike) -> np.ndarray:
    """Rows of a table as the vectors that a model sees. Host code.

    Args:
      schema: the columns.
      table: `[N, columns]`: codes of categories, and raw values.

    Returns:
      `[N, schema.width]` float32, standardised.

    Raises:
      ValueError: a table that is not of this schema.
    """
    table = np.asarray(table)
    counts = [getattr(column, "num_categories", None) for column in schema.columns]
    _check_table(table, counts, [column.name for column in schema.columns])
    parts = [
        values[:, None].astype(np.float64) if count is None else np.eye(count)[values.astype(int)]
        for count, values in zip(counts, table.T, strict=True)
    ]
    mean, std = moments(schema)
    return ((np.concatenate(parts, axis=1) - mean[None]) / std[None]).astype(np.float32)


def decode(schema: Schema, inputs: Array) -> Array:
    """Vectors as rows of a table: the largest indicator of a slice is its category.

    Args:
      schema: the columns.
      inputs: `[..., schema.width]`, as `encode` gives them; categories may be soft.

    Returns:
      `[..., columns]` floats: codes of categories, and raw values.

    Raises:
      ValueError: inputs of another width.
    """
    inputs = jnp.asarray(inputs)
    check_inputs(schema, "inputs", inputs.shape)
    lead = (1,) * (inputs.ndim - 1) + (-1,)
    mean, std = (jnp.asarray(moment, inputs.dtype).reshape(lead) for moment in moments(schema))
    raw = inputs * std + mean
    columns = [
        raw[..., part].argmax(axis=-1).astype(raw.dtype)
        if isinstance(column, Categorical)
        else raw[..., part.start]
        for column, part in zip(schema.columns, schema.slices, strict=True)
    ]
    return jnp.stack(columns, axis=-1)


def from_table(
    name: str,
    schema: Schema,
    table: ArrayLike,
    labels: ArrayLike,
    class_names: tuple[str, ...] | None = None,
) -> Dataset:
    """A data set from a table.

    Args:
      name: for tables of results.
      schema: the columns.
      table: `[N, columns]`: codes of categories, and raw values.
      labels: `[N]` integers from 0.
      class_names: name of every class; the numbers where `None`.

    Returns:
      The data set of the encoded rows. It counts as normalised: `denormalize` gives indicators and
      raw values.

    Raises:
      ValueError: a table that is not of this schema, or labels that do not go with it.
    """
    dataset = from_arrays(name, encode(schema, table), np.asarray(labels), class_names)
    mean, std = (moment.astype(np.float32) for moment in moments(schema))
    return dataclasses.replace(
        dataset, input_range=input_range(schema), mean=mean, std=std, is_normalized=True
    )


def adult(path: str | pathlib.Path, split: str = "test") -> tuple[Dataset, Schema]:
    """Census Income (Becker and Kohavi 1996): 6 continuous and 8 categorical columns, 105 entries.

    As in TabLeak (Vero et al. 2023), rows with a missing value are dropped, which leaves 30,162 to
    train and 15,060 to test, and means, deviations and ranges are those of both splits together.

    Args:
      path: `adult.npz` or its folder; it holds `x_train, y_train, x_test, y_test` with categories as
        codes and -1 for a missing one, `feature_names, is_categorical`, and the names of categories
        as `categories_<feature>`.
      split: `train` or `test`.

    Returns:
      The data set and its schema.

    Raises:
      ValueError: an unknown split.
      DatasetError: a file that is not there, or without these arrays.
    """
    check_split(split)
    path = pathlib.Path(path)
    path = path / "adult.npz" if path.is_dir() else path
    raw = {part: npz(path, part) for part in ("train", "test")}
    names, num_categories = _adult_columns(path)
    try:
        complete = {part: _complete(raw[part], num_categories) for part in raw}
        tables = [table for table, _ in complete.values()]
        schema = fit_schema(np.concatenate(tables), num_categories, names)
    except (IndexError, ValueError) as error:
        raise DatasetError(f"{path}: {error}") from error
    return from_table("adult", schema, *complete[split], raw[split].class_names), schema


def _adult_columns(path: pathlib.Path) -> tuple[list[str], list[int | None]]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = [str(name) for name in arrays["feature_names"]]
            categorical = arrays["is_categorical"].tolist()
            counts = [
                len(arrays[f"categories_{name}"]) if is_categorical else None
                for name, is_categorical in zip(names, categorical, strict=True)
            ]
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise DatasetError(f"{path}: cannot read what its columns are: {error}") from error
    return names, counts


def _complete(dataset: Dataset, num_categories: Sequence[int | None]):
    """The rows in which no category is missing, with their labels."""
    categorical = np.array([count is not None for count in num_categories])
    kept = (dataset.inputs[:, categorical] >= 0).all(axis=1)
    return dataset.inputs[kept], dataset.labels[kept]
