"""Calls written as text, as the command line takes them: `clip(1.0),gaussian(0.01)`.

A name with dots is a function of anybody's: `mylab.attacks.probe(0.1)` is `probe` of the module
`mylab.attacks`, which is imported.
"""

import ast
import difflib
import importlib
import inspect
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

    def likeness(full: str) -> float:
        # Names are often cut short.
        starts = (full, full[: len(name)])
        return max(difflib.SequenceMatcher(None, name, start).ratio() for start in starts)

    near = max(known, key=likeness, default="")
    return f" Did you mean {near!r}?" if near and likeness(near) >= 0.4 else ""


def resolve(name: str, known: Mapping[str, Callable], what: str) -> Callable:
    """The function of a name, of an unambiguous beginning of one, or of a module.

    Args:
      name: what was given; with dots, a module and a function of it.
      known: functions by name.
      what: what the functions make, for the message.

    Returns:
      The function.

    Raises:
      ValueError: an unknown or ambiguous name (the message lists the known ones and the nearest), a
        module that cannot be imported or has no such function.
    """
    if "." in name:
        return _imported(name, what)
    if name in known:
        return known[name]
    matches = [full for full in known if full.startswith(name)] if name else []
    if len(matches) == 1:
        return known[matches[0]]
    problem = f"Ambiguous {what} {name!r}" if matches else f"Unknown {what} {name!r}"
    raise ValueError(
        f"{problem}: known are {', '.join(matches or sorted(known))}."
        f"{'' if matches else nearest(name, known)}"
    )


def _imported(name: str, what: str) -> Callable:
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"Unknown {what} {name!r}: {error}.") from error
    if not callable(found):
        raise ValueError(f"The {what} {name!r} must be a function, got {found!r}.")
    return found


def parse(text: str, what: str) -> list[Call]:
    """Split a comma-separated list of calls with literal arguments.

    Args:
      text: for instance `clip(1.0),gaussian(0.01)`, `lenet(width=6)` or `mylab.defenses.mine(0.1)`.
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
    if not isinstance(node, ast.Call):
        return _name(node), (), {}
    keywords = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError("unpacking")
        keywords[keyword.arg] = ast.literal_eval(keyword.value)
    return _name(node.func), tuple(ast.literal_eval(value) for value in node.args), keywords


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    if not isinstance(node, ast.Name):
        raise ValueError("not a name")
    return node.id


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
    text: str | Sequence[Call],
    known: Mapping[str, Callable],
    what: str,
    bind: Callable[[Callable], Callable] = lambda function: function,
    **defaults: Any,
) -> list[Any]:
    """Call the functions that a text names.

    Args:
      text: a comma-separated list of calls, or what `parse` made of it.
      known: functions by name.
      what: what they make, for messages.
      bind: gives a function what the text does not say, the model for instance.
      **defaults: keywords for every call; those in the text win.

    Returns:
      The results, in order.

    Raises:
      ValueError: unknown names, arguments that a function does not take, or its own complaint.
    """
    results = []
    for name, args, kwargs in parse(text, what) if isinstance(text, str) else text:
        function = bind(resolve(name, known, what))
        try:
            taken = inspect.signature(function).parameters
        except ValueError as error:
            raise ValueError(f"The {what} {name!r}: {error}.") from error
        if all(parameter.kind != parameter.VAR_KEYWORD for parameter in taken.values()):
            for given in set(kwargs) - set(taken):
                raise ValueError(
                    f"The {what} {name!r} takes {', '.join(taken)}, not {given!r}."
                    f"{nearest(given, taken)}"
                )
        try:
            results.append(function(*args, **{**defaults, **kwargs}))
        except TypeError as error:
            raise ValueError(f"The {what} {name!r}: {error}") from error
    return results
