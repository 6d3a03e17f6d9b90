"""Imprints: parameters that a malicious server plants so that single rows of a gradient are inputs.

Every constructor returns an `Imprint`: the model that the clients are sent, the planting of its
parameters, and the attack on what they send back. All attacks share one inversion of rows.
"""

from invjax.attacks.analytic.imprints.binning import robbing_the_fed as robbing_the_fed
from invjax.attacks.analytic.imprints.imprint import Imprint as Imprint
from invjax.attacks.analytic.imprints.loki import aggregate as aggregate
from invjax.attacks.analytic.imprints.loki import loki as loki
from invjax.attacks.analytic.imprints.soliton import robust_soliton as robust_soliton
from invjax.attacks.analytic.imprints.soliton import soliton_data as soliton_data
from invjax.attacks.analytic.imprints.soliton import soliton_free as soliton_free
from invjax.attacks.analytic.imprints.trap_weights import pairs as pairs
from invjax.attacks.analytic.imprints.trap_weights import qbi as qbi
from invjax.attacks.analytic.imprints.trap_weights import trap_weights as trap_weights

__all__ = [
    "Imprint",
    "aggregate",
    "loki",
    "pairs",
    "qbi",
    "robbing_the_fed",
    "robust_soliton",
    "soliton_data",
    "soliton_free",
    "trap_weights",
]
