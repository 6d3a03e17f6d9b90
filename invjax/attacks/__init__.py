"""Attacks: estimators of the private batch from an observation.

`matching` holds gradient matching and its presets, `analytic` closed forms, `hybrid` layer-wise systems
corrected by matching, `strong` matching guided by features that the `tensor` method recovers, `labels` the
recovery of labels alone, `informed` the adversary who holds all records but one and the released weights.
Every other attack is an `invjax.base.Attack`:
pure, `jit`- and `vmap`-able.
"""

from invjax.attacks import informed as informed
from invjax.attacks import label_counts as label_counts
from invjax.attacks import labels as labels
from invjax.attacks.analytic import bias_trick as bias_trick
from invjax.attacks.analytic import exclusivity as exclusivity
from invjax.attacks.analytic import first_dense as first_dense
from invjax.attacks.analytic import imprints as imprints
from invjax.attacks.analytic import layerwise as layerwise
from invjax.attacks.analytic import row_scan as row_scan
from invjax.attacks.analytic import spear as spear
from invjax.attacks.analytic import tensor as tensor
from invjax.attacks.analytic import through_features as through_features
from invjax.attacks.by_name import by_name as by_name
from invjax.attacks.by_name import needs_labels as needs_labels
from invjax.attacks.hybrid import hybrid as hybrid
from invjax.attacks.matching import annealed as annealed
from invjax.attacks.matching import bayes as bayes
from invjax.attacks.matching import dlg as dlg
from invjax.attacks.matching import federated as federated
from invjax.attacks.matching import gradient_matching as gradient_matching
from invjax.attacks.matching import gradinversion as gradinversion
from invjax.attacks.matching import idlg as idlg
from invjax.attacks.matching import inverting_gradients as inverting_gradients
from invjax.attacks.matching import likelihoods as likelihoods
from invjax.attacks.matching import objectives as objectives
from invjax.attacks.matching import risk as risk
from invjax.attacks.matching import tableak as tableak
from invjax.attacks.matching import tag as tag
from invjax.attacks.strong import strong as strong

__all__ = [
    "annealed",
    "bayes",
    "bias_trick",
    "by_name",
    "dlg",
    "exclusivity",
    "federated",
    "first_dense",
    "gradient_matching",
    "gradinversion",
    "hybrid",
    "idlg",
    "imprints",
    "informed",
    "inverting_gradients",
    "label_counts",
    "labels",
    "layerwise",
    "likelihoods",
    "needs_labels",
    "objectives",
    "risk",
    "row_scan",
    "spear",
    "strong",
    "tableak",
    "tag",
    "tensor",
    "through_features",
]
