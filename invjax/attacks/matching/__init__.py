"""Gradient matching: one loop, its data terms, priors, and the published attacks as presets."""

from invjax.attacks.matching import federated as federated
from invjax.attacks.matching import learned_priors as learned_priors
from invjax.attacks.matching import likelihoods as likelihoods
from invjax.attacks.matching import objectives as objectives
from invjax.attacks.matching import priors as priors
from invjax.attacks.matching.bayes import annealed as annealed
from invjax.attacks.matching.bayes import bayes as bayes
from invjax.attacks.matching.bayes import risk as risk
from invjax.attacks.matching.loop import gradient_matching as gradient_matching
from invjax.attacks.matching.presets import dlg as dlg
from invjax.attacks.matching.presets import gradinversion as gradinversion
from invjax.attacks.matching.presets import idlg as idlg
from invjax.attacks.matching.presets import inverting_gradients as inverting_gradients
from invjax.attacks.matching.presets import tag as tag
from invjax.attacks.matching.tabular import tableak as tableak

__all__ = [
    "annealed",
    "bayes",
    "dlg",
    "federated",
    "gradient_matching",
    "gradinversion",
    "idlg",
    "inverting_gradients",
    "learned_priors",
    "likelihoods",
    "objectives",
    "priors",
    "risk",
    "tableak",
    "tag",
]
