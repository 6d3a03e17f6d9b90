"""Calls written as text, as the command line takes them: `clip(1.0),gaussian(0.01)`."""

import ast
import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

Call = tuple[str, tuple, dict[str, Any]]
"""Name, positional arguments, keyword arguments."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a mistyped name, or nothing.

    Args:
      name: what was given.
      known: what is allowed.

    Returns:
      ` Did you mean 'x'?` or the empty string.
    """
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f" Did you mean {near[0]!r}?" if near else ""


def resolve(name: str, known: Mapping[str, Callable], what: str) -> Callable:
    """The function of a name, or of an unambiguous beginning of one.

    Args:
      name: what was given.
      known: functions by name.
      what: what the functions make, for the message.

    Returns:
      The function.

    Raises:
      ValueError: an unknown or ambiguous name; the message lists the known ones and the nearest.
    """
    if name in known:
        return known[name]
    matches = [full for full in known if full.startswith(name)] if name else []
    if len(matches) == 1:
        return known[matches[0]]
    problem = f"Ambiguous {what} {name!r}" if matches else f"Unknown {what} {name!r}"
    raise ValueError(
        f"{problem}: known are {', '.join(matches or sorted(known))}.{nearest(name, known)}"
    )


def parse(text: str, what: str) -> list[Call]:
    """Split a comma-separated list of calls with literal arguments.

    Args:
      text: for instance `clip(1.0),gaussian(0.01)` or `lenet(width=6)`.
      what: what the calls make, for the message.

    Returns:
      `(name, positional arguments, keyword arguments)` of every call.

    Raises:
      ValueError: text that is not that; nothing in it is ever run.
    """
    message = (
        f"Cannot read the {what} {text!r}: expected names with literal arguments, "
        "such as name(1.0) or first(0.5),second(bits=4)."
    )
    try:
        root = ast.parse(text.strip(), mode="eval").body
        nodes = root.elts if isinstance(root, ast.Tuple) else [root]
        return [_call(node) for node in nodes]
    except (SyntaxError, ValueError, TypeError) as error:
        raise ValueError(message) from error


def _call(node: ast.expr) -> Call:
    if isinstance(node, ast.Name):
        return node.id, (), {}
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise ValueError("not a call")
    keywords = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError("unpacking")
        keywords[keyword.arg] = ast.literal_eval(keyword.value)
    return node.func.id, tuple(ast.literal_eval(value) for value in node.args), keywords


def numbers(calls: Sequence[Call]) -> list[float]:
    """The strengths in a list of calls: what may vary without another compilation.

    Args:
      calls: from `parse`.

    Returns:
      Every finite float but zero (which turns things off), in order.
    """
    return [
        value
        for _, args, settings in calls
        for value in (*args, *settings.values())
        if _is_strength(value)
    ]


def with_numbers(calls: Sequence[Call], values: Iterable[Any]) -> list[Call]:
    """The same calls with other strengths.

    Args:
      calls: from `parse`.
      values: as many as `numbers(calls)` has; traced ones may be among them.

    Returns:
      The calls.
    """
    left: Iterator[Any] = iter(values)

    def fill(value):
        return next(left) if _is_strength(value) else value

    return [
        (name, tuple(map(fill, args)), {key: fill(value) for key, value in settings.items()})
        for name, args, settings in calls
    ]


def _is_strength(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value != 0


def build(
    text: str | Sequence[Call], known: Mapping[str, Callable], what: str, **defaults: Any
) -> list[Any]:
    """Call the functions that a text names.

    Args:
      text: a comma-separated list of calls, or what `parse` made of it.
      known: functions by name.
      what: what they make, for messages.
      **defaults: keywords for every call; those in the text win.

    Returns:
      The results, in order.

    Raises:
      ValueError: unknown names, arguments that a function does not take, or its own complaint.
    """
    results = []
    for name, args, kwargs in parse(text, what) if isinstance(text, str) else text:
        function = resolve(name, known, what)
        try:
            results.append(function(*args, **{**defaults, **kwargs}))
        except TypeError as error:
            raise ValueError(f"The {what} {name!r}: {error}") from error
    return results
