"""Analytic attacks: closed forms and linear algebra in place of optimisation.

Every attack is an `invjax.base.Attack` of no steps, which does its work in `init`.
"""

from invjax.attacks.analytic.bias_trick import bias_trick as bias_trick
from invjax.attacks.analytic.bias_trick import first_dense as first_dense
from invjax.attacks.analytic.exclusivity import exclusivity as exclusivity
from invjax.attacks.analytic.features import head_model as head_model
from invjax.attacks.analytic.features import head_observation as head_observation
from invjax.attacks.analytic.features import invert_features as invert_features
from invjax.attacks.analytic.features import through_features as through_features
from invjax.attacks.analytic.row_scan import row_scan as row_scan

__all__ = [
    "bias_trick",
    "exclusivity",
    "first_dense",
    "head_model",
    "head_observation",
    "invert_features",
    "row_scan",
    "through_features",
]
