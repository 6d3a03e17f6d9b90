"""Attacks by name, as the command line takes them."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from invjax import calls
from invjax.attacks.analytic.bias_trick import bias_trick
from invjax.attacks.matching import bayes, presets
from invjax.base import Attack, Defense, Model

_KNOWN: dict[str, Callable[..., Attack]] = {
    function.__name__: function
    for function in (
        bayes,
        bias_trick,
        presets.dlg,
        presets.gradinversion,
        presets.idlg,
        presets.inverting_gradients,
        presets.tag,
    )
}


def by_name(
    text: str | Sequence[calls.Call], model: Model, defense: Defense, **settings: Any
) -> Attack:
    """An attack from text.

    Args:
      text: a name, perhaps with settings: `dlg`, `inverting_gradients(total_variation=0.1)`; or what
        `calls.parse` made of it.
      model: the model under attack.
      defense: the client's defence, for attacks that know it.
      **settings: for the attack; those in the text win.

    Returns:
      The attack.

    Raises:
      ValueError: an unknown name (the message lists the known ones) or setting.
    """
    bound: dict[str, Callable[..., Attack]] = {
        name: lambda *args, make=make, **kwargs: make(model, *args, **kwargs)
        for name, make in _KNOWN.items()
    }
    bound["bias_trick"] = lambda *args, **kwargs: bias_trick(
        # A closed form has no use for the settings of a loop.
        model,
        *args,
        **{name: value for name, value in kwargs.items() if name not in settings},
    )
    bound["bayes"] = lambda *args, **kwargs: _KNOWN["bayes"](model, defense, *args, **kwargs)
    attacks = calls.build(text, bound, "attack", **settings)
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
