"""Attacks by name, as the command line takes them."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from invjax import calls
from invjax.attacks import analytic
from invjax.attacks.hybrid import hybrid
from invjax.attacks.matching import bayes, presets
from invjax.attacks.strong import strong
from invjax.base import Attack, Defense, Model

_KNOWN: dict[str, Callable[..., Attack]] = {
    function.__name__: function
    for function in (
        analytic.bias_trick,
        analytic.exclusivity,
        analytic.layerwise,
        analytic.row_scan,
        analytic.spear,
        analytic.tensor.tensor,
        bayes,
        hybrid,
        presets.dlg,
        presets.gradinversion,
        presets.idlg,
        presets.inverting_gradients,
        presets.tag,
        strong,
    )
}


def by_name(
    text: str | Sequence[calls.Call], model: Model, defense: Defense, **settings: Any
) -> Attack:
    """An attack from text.

    Args:
      text: a name, perhaps with settings: `dlg`, `inverting_gradients(total_variation=0.1)`; or what
        `calls.parse` made of it. A name with dots is a function of anybody's, of the arguments
        `(model)` or `(model, defense)` and settings.
      model: the model under attack.
      defense: the client's defence, for attacks that know it.
      **settings: for the attack, where it has them: a closed form has no steps; those in the text win.

    Returns:
      The attack.

    Raises:
      ValueError: an unknown name (the message lists the known ones) or setting, no attack or
        several, or what the attack itself refuses.
    """

    def bind(make: Callable[..., Attack]) -> Callable[..., Attack]:
        parameters = inspect.signature(make).parameters
        given = (model, defense) if "defense" in parameters else (model,)
        open_ended = any(one.kind == one.VAR_KEYWORD for one in parameters.values())
        mine = {name: value for name, value in settings.items() if open_ended or name in parameters}
        return lambda *args, **kwargs: make(*given, *args, **{**mine, **kwargs})

    return calls.build([_single(text)], _KNOWN, "attack", bind)[0]


def _single(text: str | Sequence[calls.Call]) -> calls.Call:
    found = calls.parse(text, "attack") if isinstance(text, str) else text
    if len(found) != 1:
        raise ValueError(f"Name one attack, got {len(found)} in {text!r}.")
    return found[0]


def needs_labels(text: str | Sequence[calls.Call], labels: str | None = None) -> bool:
    """Whether an attack reads the labels, so that an experiment must grant them.

    Args:
      text: as for `by_name`; what it says of labels wins.
      labels: the setting that `by_name` is given; the attack's own default where `None`.

    Returns:
      True where its `labels` setting is `known`.

    Raises:
      ValueError: an unknown name, or text that names no attack or several.
    """
    name, _, settings = _single(text)
    parameters = inspect.signature(calls.resolve(name, _KNOWN, "attack")).parameters
    default = parameters["labels"].default if "labels" in parameters else None
    return settings.get("labels", labels or default) == "known"
