"""Defences: optax gradient transformations that also know their own channel.

`chain` composes them; every family has a file of its own. What an adversary may compute of a
defence is its `law`.
"""

from invjax.defenses.activation_pruning import activation_count_pruning as activation_count_pruning
from invjax.defenses.augmentation import ats as ats
from invjax.defenses.base import chain as chain
from invjax.defenses.clipping import clip_per_sample as clip_per_sample
from invjax.defenses.clipping import global_clip as global_clip
from invjax.defenses.compression import quantize as quantize
from invjax.defenses.compression import sign_compress as sign_compress
from invjax.defenses.dp import dp_sgd as dp_sgd
from invjax.defenses.dp import privacy_spent as privacy_spent
from invjax.defenses.exclusivity import exclusivity_dropout as exclusivity_dropout
from invjax.defenses.exclusivity import mask_exclusive_rows as mask_exclusive_rows
from invjax.defenses.exclusivity_inputs import make_exclusive as make_exclusive
from invjax.defenses.exclusivity_inputs import reduce_exclusivity as reduce_exclusivity
from invjax.defenses.exclusivity_inputs import remove_exclusive as remove_exclusive
from invjax.defenses.exclusivity_inputs import remove_exclusive_lp as remove_exclusive_lp
from invjax.defenses.law import Law as Law
from invjax.defenses.masking import gradient_dropout as gradient_dropout
from invjax.defenses.masking import random_mask as random_mask
from invjax.defenses.mixing import instahide as instahide
from invjax.defenses.mixing import mixup as mixup
from invjax.defenses.noise import gaussian_noise as gaussian_noise
from invjax.defenses.noise import laplace_noise as laplace_noise
from invjax.defenses.optimal import optimal_clipped_noise as optimal_clipped_noise
from invjax.defenses.optimal import optimal_noise as optimal_noise
from invjax.defenses.optimal import optimal_pruning as optimal_pruning
from invjax.defenses.optimal import optimal_rounding as optimal_rounding
from invjax.defenses.parse import parse as parse
from invjax.defenses.precode import Precode as Precode
from invjax.defenses.precode import omit_stochastic_weights as omit_stochastic_weights
from invjax.defenses.precode import precode as precode
from invjax.defenses.pruning import magnitude_prune as magnitude_prune
from invjax.defenses.sensitivity import Sensitivity as Sensitivity
from invjax.defenses.sensitivity import population_sensitivity as population_sensitivity
from invjax.defenses.soteria import drop_layer_weights as drop_layer_weights
from invjax.defenses.soteria import read_mask as read_mask
from invjax.defenses.soteria import soteria as soteria

__all__ = [
    "Law",
    "Precode",
    "Sensitivity",
    "activation_count_pruning",
    "ats",
    "chain",
    "clip_per_sample",
    "dp_sgd",
    "drop_layer_weights",
    "exclusivity_dropout",
    "gaussian_noise",
    "global_clip",
    "gradient_dropout",
    "instahide",
    "laplace_noise",
    "magnitude_prune",
    "make_exclusive",
    "mask_exclusive_rows",
    "mixup",
    "omit_stochastic_weights",
    "optimal_clipped_noise",
    "optimal_noise",
    "optimal_pruning",
    "optimal_rounding",
    "parse",
    "population_sensitivity",
    "precode",
    "privacy_spent",
    "quantize",
    "random_mask",
    "read_mask",
    "reduce_exclusivity",
    "remove_exclusive",
    "remove_exclusive_lp",
    "sign_compress",
    "soteria",
]
