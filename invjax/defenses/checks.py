"""Validation of strengths. Traced strengths (a sweep's) pass: only numbers on the host are checked."""

import numbers
from typing import Any

import numpy as np


def check(
    name: str, value: Any, low: float, high: float = float("inf"), *, open_high=False
) -> None:
    """Refuse a number outside `[low, high]` (or `[low, high)`).

    Args:
      name: the argument's name.
      value: a number, or a traced or device array, which passes.
      low: least allowed value.
      high: largest allowed value.
      open_high: whether `high` itself is refused.

    Raises:
      ValueError: the value is outside or not a number.
    """
    if not isinstance(value, numbers.Real | np.generic | np.ndarray):
        if isinstance(value, str | bytes | list | tuple | dict | type(None)):
            raise ValueError(f"{name} must be a number, got {value!r}.")
        return
    number = float(value)
    if not (low <= number < high or (number == high and not open_high)):
        bracket = ")" if open_high else "]"
        raise ValueError(f"{name} must lie in [{low}, {high}{bracket}, got {value}.")
