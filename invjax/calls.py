"""Calls written as text, as the command line takes them: `clip(1.0),gaussian(0.01)`."""

import ast
import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any


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


def parse(text: str, what: str) -> list[tuple[str, tuple, dict[str, Any]]]:
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


def _call(node: ast.expr) -> tuple[str, tuple, dict[str, Any]]:
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


def build(text: str, known: Mapping[str, Callable], what: str, **defaults: Any) -> list[Any]:
    """Call the functions that a text names.

    Args:
      text: a comma-separated list of calls.
      known: functions by name.
      what: what they make, for messages.
      **defaults: keywords for every call; those in the text win.

    Returns:
      The results, in order.

    Raises:
      ValueError: unknown names, arguments that a function does not take, or its own complaint.
    """
    results = []
    for name, args, kwargs in parse(text, what):
        function = resolve(name, known, what)
        try:
            results.append(function(*args, **{**defaults, **kwargs}))
        except TypeError as error:
            raise ValueError(f"The {what} {name!r}: {error}") from error
    return results
