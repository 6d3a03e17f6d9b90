"""What arguments may be, and how they are shown: numbers, counts, choices, ranges of inputs.

Traced numbers (a sweep's strengths) pass.
"""

import math
import numbers
from typing import Any

import chex
import jax
import numpy as np

PyTree = Any


def on_host(value: Any) -> bool:
    """Whether a strength is a number on the host, which may decide what a defence is made of."""
    return isinstance(value, numbers.Real | np.generic | np.ndarray)


def check_number(
    name: str,
    value: Any,
    low: float,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Refuse a strength that is no number, or outside an interval.

    Args:
      name: the argument's name.
      value: a number, on the host or a device, or a traced scalar, which passes.
      low: least allowed value.
      high: largest allowed value.
      open_low: whether `low` itself is refused.
      open_high: whether `high` itself is refused.

    Raises:
      ValueError: the value is not a number, or out of the interval.
    """
    interval = f"{'(' if open_low else '['}{low}, {high}{')' if open_high else ']'}"
    if np.shape(value) != () or not (on_host(value) or isinstance(value, jax.Array)):
        raise ValueError(f"{name} must be a number in {interval}, got {value!r}.")
    if isinstance(value, jax.core.Tracer):
        return
    # NumPy, because under an enclosing trace JAX would trace even this.
    value = np.asarray(value)[()]
    above = value > low if open_low else value >= low
    below = value < high if open_high else value <= high
    if not (above and below):
        raise ValueError(f"{name} must lie in {interval}, got {value}.")


def check_count(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Refuse what is no whole number, or one out of range.

    Args:
      name: the argument's name.
      value: what was given; it decides shapes or loops, so it cannot be traced.
      least: the smallest allowed.
      most: the largest allowed, if there is one.

    Raises:
      ValueError: it is not one of them.
    """
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        allowed = f"of at least {least}" if most is None else f"in [{least}, {most}]"
        raise ValueError(f"{name} must be a whole number {allowed}, got {value!r}.")


def check_shapes(message: str, expected: PyTree, given: PyTree) -> None:
    """Refuse a tree that has not the structure and shapes of another.

    Args:
      message: what must hold; the difference is added to it.
      expected: arrays, or what has their shapes.
      given: the tree in question.

    Raises:
      ValueError: it differs.
    """
    try:
        chex.assert_trees_all_equal_shapes(expected, given)
    except AssertionError as error:
        raise ValueError(f"{message}: {error}") from error


def check_key(key: Any) -> None:
    """Refuse what is no PRNG key.

    Args:
      key: what was given.

    Raises:
      TypeError: it is not one typed key.
    """
    typed = jax.dtypes.issubdtype(getattr(key, "dtype", None), jax.dtypes.prng_key)
    if not typed or key.shape != ():
        raise TypeError(
            f"key must be one typed PRNG key, jax.random.key(seed), got "
            f"{getattr(key, 'dtype', type(key).__name__)} of shape {np.shape(key)}."
        )


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Refuse what is not one of a few words.

    Args:
      name: the argument's name.
      value: what was given.
      allowed: the words.

    Raises:
      ValueError: it is not one of them.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")


def equals(value: Any, number: float) -> bool:
    """Whether a strength is known to be a certain number; false for traced ones."""
    return on_host(value) and bool(value == number)


def describe(name: str, *args: Any, **kwargs: Any) -> str:
    """A constructor's call as text; a traced strength has no value to show."""

    def text(value):
        if isinstance(value, jax.core.Tracer):
            return "traced"
        return str(value) if hasattr(value, "dtype") else repr(value)

    parts = [text(value) for value in args]
    parts += [f"{key}={text(value)}" for key, value in kwargs.items()]
    return f"{name}({', '.join(parts)})"
