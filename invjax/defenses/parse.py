"""Defences by name, as the command line takes them."""

import functools
import inspect
from collections.abc import Callable, Sequence

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
        activation_count_pruning,
        augmentation.ats,
        clipping.clip_per_sample,
        clipping.global_clip,
        compression.quantize,
        compression.sign_compress,
        dp.dp_sgd,
        mask_exclusive_rows,
        masking.gradient_dropout,
        masking.random_mask,
        mixing.instahide,
        mixing.mixup,
        noise.gaussian_noise,
        noise.laplace_noise,
        optimal.optimal_clipped_noise,
        optimal.optimal_noise,
        optimal.optimal_pruning,
        optimal.optimal_rounding,
        pruning.magnitude_prune,
        reduce_exclusivity,
        soteria,
    )
}


def parse(text: str | Sequence[calls.Call], model: Model | None = None) -> Defense:
    """A defence from text.

    Args:
      text: a comma-separated list of constructors with literal arguments, in the order in which
        they act; the beginning of a name will do: `clip(1.0),gaussian(0.01)`. `none` is no defence.
        Calls that `calls.parse` has read will do too. A name with dots is a function of anybody's, and
        is given the model if its first argument is called `model`.
      model: the model, which `soteria`, the reductions of exclusivity and the optimal defences need, and
        which tells `mixup` and `instahide` the classes.

    Returns:
      The defence, composed by `chain`.

    Raises:
      ValueError: an unknown name (the message lists the known ones), or arguments out of range.

    Example:
      >>> import invjax
      >>> invjax.defenses.parse("clip(1.0),gaussian(0.01)")
      clip_per_sample(1.0),gaussian_noise(0.01)
    """
    parsed = calls.parse(text, "defense") if isinstance(text, str) else text
    parsed = [call for call in parsed if call != ("none", (), {})]

    def bind(make: Callable[..., Defense]) -> Callable[..., Defense]:
        parameters = inspect.signature(make).parameters
        if next(iter(parameters), None) in ("model", "source"):
            if model is None:
                raise ValueError(f"The defense {make.__name__!r} needs a model: give model=.")
            return functools.partial(make, model)
        if "num_classes" in parameters and model is not None:
            return functools.partial(make, num_classes=max(model.num_classes, 2))
        return make

    return chain(*calls.build(parsed, _KNOWN, "defense", bind))
