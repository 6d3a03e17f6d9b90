"""Analytic attacks: closed forms and linear algebra in place of optimisation.

Every attack is an `invjax.base.Attack`, most of no steps, which do their work in `init`; `imprints` are
those of a malicious server, `tensor` reads two dense layers.
"""

from invjax.attacks.analytic import imprints as imprints
from invjax.attacks.analytic import tensor as tensor
from invjax.attacks.analytic.bias_trick import bias_trick as bias_trick
from invjax.attacks.analytic.bias_trick import first_dense as first_dense
from invjax.attacks.analytic.exclusivity import exclusivity as exclusivity
from invjax.attacks.analytic.feature_inversion import invert_features as invert_features
from invjax.attacks.analytic.features import head_model as head_model
from invjax.attacks.analytic.features import head_observation as head_observation
from invjax.attacks.analytic.features import through_features as through_features
from invjax.attacks.analytic.layerwise import layerwise as layerwise
from invjax.attacks.analytic.row_scan import row_scan as row_scan
from invjax.attacks.analytic.spear import batch_size_by_rank as batch_size_by_rank
from invjax.attacks.analytic.spear import spear as spear

__all__ = [
    "batch_size_by_rank",
    "bias_trick",
    "exclusivity",
    "first_dense",
    "head_model",
    "head_observation",
    "imprints",
    "invert_features",
    "layerwise",
    "row_scan",
    "spear",
    "tensor",
    "through_features",
]
