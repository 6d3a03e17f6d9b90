"""Defences by name, as the command line takes them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from invjax import calls
from invjax.base import Defense, Model
from invjax.defenses import (
    augmentation,
    clipping,
    compression,
    dp,
    masking,
    mixing,
    noise,
    optimal,
    pruning,
)
from invjax.defenses.activation_pruning import activation_count_pruning
from invjax.defenses.base import chain
from invjax.defenses.exclusivity import mask_exclusive_rows
from invjax.defenses.exclusivity_inputs import reduce_exclusivity
from invjax.defenses.soteria import soteria

_KNOWN: dict[str, Callable[..., Defense]] = {
    function.__name__: function
    for function in (
        augmentation.ats,
        clipping.clip_per_sample,
        clipping.global_clip,
        compression.quantize,
        compression.sign_compress,
        dp.dp_sgd,
        masking.gradient_dropout,
        masking.random_mask,
        mixing.instahide,
        mixing.mixup,
        noise.gaussian_noise,
        noise.laplace_noise,
        pruning.magnitude_prune,
    )
}

_OF_A_MODEL = (
    activation_count_pruning,
    mask_exclusive_rows,
    optimal.optimal_clipped_noise,
    optimal.optimal_noise,
    optimal.optimal_pruning,
    optimal.optimal_rounding,
    reduce_exclusivity,
    soteria,
)


def parse(text: str | Sequence[calls.Call], model: Model | None = None) -> Defense:
    """A defence from text.

    Args:
      text: a comma-separated list of constructors with literal arguments, in the order in which
        they act; the beginning of a name will do: `clip(1.0),gaussian(0.01)`. `none` is no defence.
        Calls that `calls.parse` has read will do too.
      model: the model, which `soteria` and the reductions of exclusivity need, and which tells `mixup`
        and `instahide` the classes.

    Returns:
      The defence, composed by `chain`.

    Raises:
      ValueError: an unknown name (the message lists the known ones), or arguments out of range.
    """
    parsed = calls.parse(text, "defense") if isinstance(text, str) else text
    if parsed == [("none", (), {})]:
        return chain()
    known: dict[str, Callable[..., Any]] = dict(_KNOWN)
    if model is not None:
        for make in _OF_A_MODEL:
            known[make.__name__] = functools.partial(make, model)
        for mix in (mixing.mixup, mixing.instahide):
            known[mix.__name__] = functools.partial(mix, num_classes=max(model.num_classes, 2))
    return chain(*calls.build(parsed, known, "defense"))
