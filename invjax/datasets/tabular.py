"""Tables of mixed columns: a schema, and rows as the vectors that a model sees and back.

A row of a table has one number a column: the code of its category, or a value in raw units. The
vector that a model sees has a one-hot slice for every categorical column and one entry for every
continuous one, in the order of the columns, each standardised.
"""

import dataclasses
import math
import numbers
import pathlib
import zipfile
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from invjax.base import Array
from invjax.datasets.arrays import npz
from invjax.datasets.files import check_split
from invjax.datasets.types import Dataset, DatasetError, from_arrays


class Categorical(NamedTuple):
    """A column of categories, coded 0, 1, and so on.

    Attributes:
      name: for tables.
      num_categories: how many there are, at least 2.
      frequencies: of every category; its one-hot entry is then standardised by them to mean 0 and
        variance 1 like everything else (an entry that does not vary is only centered). Where `None`
        the slice stays one-hot.
    """

    name: str
    num_categories: int
    frequencies: tuple[float, ...] | None = None


class Continuous(NamedTuple):
    """A column of numbers.

    Attributes:
      name: for tables.
      mean: subtracted from the raw value.
      std: then divided by, positive.
      low: lowest possible value, raw units.
      high: highest possible value, raw units.
    """

    name: str
    mean: float
    std: float
    low: float
    high: float


Column = Categorical | Continuous


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Schema:
    """What the columns of a table are: public, hashable, and static under `jit`.

    Of your own table, by hand or from the data by `fit_schema`::

        schema = Schema((
            Continuous("age", mean=38.6, std=13.7, low=17.0, high=90.0),
            Categorical("smoker", 2),
            Categorical("blood_group", 4, frequencies=(0.45, 0.40, 0.11, 0.04)),
        ))
        inputs = encode(schema, table)     # [N, 3] to [N, 7], which is 1 + 2 + 4
        model = invjax.models.mlp((100, 100), num_classes=2)
        params = model.init(key, (schema.width,))
        batch = invjax.Batch(jnp.asarray(inputs[:8]), labels[:8])
        observation = invjax.observe(
            key, model, params, batch, input_range=input_range(schema), grant_labels=True
        )

    Attributes:
      columns: one a column of the table, in its order.

    Raises:
      ValueError: no column, fewer than two categories, frequencies that are none, a `std` that is
        not positive, an empty range, or numbers that are not finite.
    """

    columns: tuple[Column, ...]

    def __post_init__(self):
        object.__setattr__(self, "columns", tuple(map(_checked, self.columns)))
        if not self.columns:
            raise ValueError("columns must not be empty.")

    @property
    def slices(self) -> tuple[slice, ...]:
        """Where every column lies in the encoded vector."""
        ends = np.cumsum([_width(column) for column in self.columns]).tolist()
        return tuple(map(slice, [0, *ends[:-1]], ends))

    @property
    def width(self) -> int:
        """Entries of the encoded vector."""
        return sum(map(_width, self.columns))


def _width(column: Column) -> int:
    return column.num_categories if isinstance(column, Categorical) else 1


def _checked(column: Column) -> Column:
    if isinstance(column, Categorical):
        return _checked_categorical(column)
    if not isinstance(column, Continuous):
        raise ValueError(f"columns must be Categorical or Continuous, got {column!r}.")
    if not all(map(math.isfinite, column[1:])):
        raise ValueError(
            f"mean, std, low and high of {column.name!r} must be finite, got {column}."
        )
    if column.std <= 0:
        raise ValueError(f"std of {column.name!r} must be positive, got {column.std}.")
    if column.low >= column.high:
        raise ValueError(
            f"low of {column.name!r} must be below high, got {column.low} and {column.high}."
        )
    return column


def _checked_categorical(column: Categorical) -> Categorical:
    name, count, frequencies = column
    if not isinstance(count, numbers.Integral) or count < 2:
        raise ValueError(
            f"num_categories of {name!r} must be an integer of at least 2, got {count!r}."
        )
    if frequencies is None:
        return column
    shares = tuple(map(float, frequencies))
    if len(shares) != count or not all(0 <= share <= 1 for share in shares):
        raise ValueError(
            f"frequencies of {name!r} must be {count} numbers in [0, 1], got {shares}."
        )
    if abs(sum(shares) - 1) > 1e-3:
        raise ValueError(f"frequencies of {name!r} must sum to 1, got {sum(shares)}.")
    return column._replace(frequencies=shares)


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
      ValueError: a table that is not finite, codes out of range, or other numbers of columns.
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


def check_inputs(schema: Schema, name: str, shape: tuple[int, ...]) -> None:
    """Refuse encoded inputs of another width than the schema's.

    Args:
      schema: what the columns are.
      name: of the argument, for the message.
      shape: of the inputs, `[..., schema.width]`.

    Raises:
      ValueError: another width.
    """
    if not shape or shape[-1] != schema.width:
        raise ValueError(
            f"{name} must have {schema.width} entries last, the width of the schema's "
            f"{len(schema.columns)} columns, got shape {shape}."
        )


def moments(schema: Schema) -> tuple[np.ndarray, np.ndarray]:
    """What every entry is standardised by: raw value or one-hot indicator minus mean, over deviation.

    Args:
      schema: the columns.

    Returns:
      Means and standard deviations, each `[schema.width]` float64.
    """
    means, stds = [], []
    for column in schema.columns:
        if isinstance(column, Continuous):
            means.append(column.mean)
            stds.append(column.std)
            continue
        for share in column.frequencies or (0.0,) * column.num_categories:
            means.append(share)
            stds.append(math.sqrt(share * (1 - share)) or 1.0)
    return np.array(means), np.array(stds)


def input_range(schema: Schema) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Lowest and highest value of every encoded entry, as `invjax.observe` wants them.

    Args:
      schema: the columns.

    Returns:
      Two tuples of `schema.width` numbers, in encoded units.
    """
    raw = []
    for column in schema.columns:
        if isinstance(column, Continuous):
            raw.append((column.low, column.high))
        else:
            raw += [(0.0, 1.0)] * column.num_categories
    mean, std = moments(schema)
    low, high = ((np.array(bound) - mean) / std for bound in zip(*raw, strict=True))
    return tuple(low.tolist()), tuple(high.tolist())


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
    counts = [
        column.num_categories if isinstance(column, Categorical) else None
        for column in schema.columns
    ]
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
        dataset, value_range=input_range(schema), mean=mean, std=std, is_normalized=True
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
