"""The informed adversary, who holds all records but one and what was released of their training.

`glm` has closed forms for generalised linear models, `unrolled` inverts a deterministic training,
`reconstructor` learns to invert it from shadow models (trained by `training`, in numbers by
`invjax.evaluation.shadows`), `dpsgd` reads the iterates of DP-SGD. `kkt` knows no record at all: it
reconstructs training data from the weights of a trained network.
"""

from invjax.attacks.informed import decoders as decoders
from invjax.attacks.informed import dpsgd as dpsgd
from invjax.attacks.informed import dpsgd_prediction as dpsgd_prediction
from invjax.attacks.informed import dpsgd_release as dpsgd_release
from invjax.attacks.informed import glm as glm
from invjax.attacks.informed import kkt_scoring as kkt_scoring
from invjax.attacks.informed import reconstructor as reconstructor
from invjax.attacks.informed import training as training
from invjax.attacks.informed.kkt import kkt as kkt
from invjax.attacks.informed.unrolled import unrolled as unrolled

__all__ = [
    "decoders",
    "dpsgd",
    "dpsgd_prediction",
    "dpsgd_release",
    "glm",
    "kkt",
    "kkt_scoring",
    "reconstructor",
    "training",
    "unrolled",
]
