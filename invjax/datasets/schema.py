"""What the columns of a table are, and how a row becomes the vector that a model sees.

A row of a table has one number a column: the code of its category, or a value in raw units. The
vector that a model sees has a one-hot slice for every categorical column and one entry for every
continuous one, in the order of the columns, each standardised.
"""

import dataclasses
import math
import numbers
from typing import NamedTuple

import jax
import numpy as np


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

    Of your own table, by hand or from the data by `tabular.fit_schema`::

        schema = Schema((
            Continuous("age", mean=38.6, std=13.7, low=17.0, high=90.0),
            Categorical("smoker", 2),
            Categorical("blood_group", 4, frequencies=(0.45, 0.40, 0.11, 0.04)),
        ))
        inputs = tabular.encode(schema, table)  # [N, 3] to [N, 7], which is 1 + 2 + 4
        model = invjax.models.mlp((100, 100), num_classes=2)
        params = model.init(key, (schema.width,))
        batch = invjax.Batch(jnp.asarray(inputs[:8]), labels[:8])
        observation = invjax.observe(
            key, model, params, batch, input_range=tabular.input_range(schema), grant_labels=True
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
