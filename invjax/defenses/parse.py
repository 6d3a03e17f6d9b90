"""Defences by name, as the command line takes them."""

from collections.abc import Sequence

from invjax import calls
from invjax.base import Defense
from invjax.defenses import clipping, compression, dp, masking, noise, pruning
from invjax.defenses.base import chain

_KNOWN = {
    function.__name__: function
    for function in (
        clipping.clip_per_sample,
        clipping.global_clip,
        compression.quantize,
        compression.sign_compress,
        dp.dp_sgd,
        masking.gradient_dropout,
        masking.random_mask,
        noise.gaussian_noise,
        noise.laplace_noise,
        pruning.magnitude_prune,
    )
}


def parse(text: str | Sequence[calls.Call]) -> Defense:
    """A defence from text.

    Args:
      text: a comma-separated list of constructors with literal arguments, in the order in which
        they act; the beginning of a name will do: `clip(1.0),gaussian(0.01)`. `none` is no defence.
        Calls that `calls.parse` has read will do too.

    Returns:
      The defence, composed by `chain`.

    Raises:
      ValueError: an unknown name (the message lists the known ones), or arguments out of range.
    """
    parsed = calls.parse(text, "defense") if isinstance(text, str) else text
    if parsed == [("none", (), {})]:
        return chain()
    return chain(*calls.build(parsed, _KNOWN, "defense"))
