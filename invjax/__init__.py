"""invjax: reconstruction of private data from shared gradients, as an inverse problem, in JAX.

private batch x ──G──▶ gradient ──D──▶ observation y ──A──▶ reconstruction x̂
"""

from invjax import attacks as attacks
from invjax import datasets as datasets
from invjax import defenses as defenses
from invjax import driver as driver
from invjax import gradients as gradients
from invjax import metrics as metrics
from invjax import models as models
from invjax import theory as theory
from invjax.attacks.matching import learned_priors as learned_priors
from invjax.attacks.matching import priors as priors
from invjax.base import Attack as Attack
from invjax.base import Batch as Batch
from invjax.base import Defense as Defense
from invjax.base import Facts as Facts
from invjax.base import Layer as Layer
from invjax.base import LocalTraining as LocalTraining
from invjax.base import Model as Model
from invjax.base import Observation as Observation
from invjax.base import Reconstruction as Reconstruction
from invjax.defenses.base import chain as chain
from invjax.evaluation.grid import Sweep as Sweep
from invjax.evaluation.sweep import sweep as sweep
from invjax.observe import observe as observe

__version__ = "0.1.0"

__all__ = [
    "Attack",
    "Batch",
    "Defense",
    "Facts",
    "Layer",
    "LocalTraining",
    "Model",
    "Observation",
    "Reconstruction",
    "Sweep",
    "attacks",
    "chain",
    "datasets",
    "defenses",
    "driver",
    "gradients",
    "learned_priors",
    "metrics",
    "models",
    "observe",
    "priors",
    "sweep",
    "theory",
]
