"""Defences: optax gradient transformations that also know their own channel.

`chain` composes them; every family has a file of its own. What an adversary may compute of a
defence is its `law`.
"""

from invjax.defenses.base import chain as chain
from invjax.defenses.clipping import clip_per_sample as clip_per_sample
from invjax.defenses.clipping import global_clip as global_clip
from invjax.defenses.compression import quantize as quantize
from invjax.defenses.compression import sign_compress as sign_compress
from invjax.defenses.dp import dp_sgd as dp_sgd
from invjax.defenses.dp import privacy_spent as privacy_spent
from invjax.defenses.law import Law as Law
from invjax.defenses.masking import gradient_dropout as gradient_dropout
from invjax.defenses.masking import random_mask as random_mask
from invjax.defenses.noise import gaussian_noise as gaussian_noise
from invjax.defenses.noise import laplace_noise as laplace_noise
from invjax.defenses.parse import parse as parse
from invjax.defenses.pruning import magnitude_prune as magnitude_prune

__all__ = [
    "Law",
    "chain",
    "clip_per_sample",
    "dp_sgd",
    "gaussian_noise",
    "global_clip",
    "gradient_dropout",
    "laplace_noise",
    "magnitude_prune",
    "parse",
    "privacy_spent",
    "quantize",
    "random_mask",
    "sign_compress",
]
