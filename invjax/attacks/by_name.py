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
      ValueError: an unknown name (the message lists the known ones) or setting.
    """

    def bind(make: Callable[..., Attack]) -> Callable[..., Attack]:
        parameters = inspect.signature(make).parameters
        given = (model, defense) if "defense" in parameters else (model,)
        open_ended = any(one.kind == one.VAR_KEYWORD for one in parameters.values())
        mine = {name: value for name, value in settings.items() if open_ended or name in parameters}
        return lambda *args, **kwargs: make(*given, *args, **{**mine, **kwargs})

    attacks = calls.build(text, _KNOWN, "attack", bind)
    if len(attacks) != 1:
        raise ValueError(f"Name one attack, got {len(attacks)} in {text!r}.")
    return attacks[0]


def needs_labels(text: str, labels: str | None = None) -> bool:
    """Whether an attack reads the labels, so that an experiment must grant them.

    Args:
      text: as for `by_name`; what it says of labels wins.
      labels: the setting that `by_name` is given; the attack's own default where `None`.

    Returns:
      True where its `labels` setting is `known`.
    """
    ((name, _, settings),) = calls.parse(text, "attack")
    parameters = inspect.signature(calls.resolve(name, _KNOWN, "attack")).parameters
    if "labels" not in parameters:
        return labels == "known"
    return settings.get("labels", labels or parameters["labels"].default) == "known"
