"""Evaluation: victims, attacks on them, measurements, folders of results, and sweeps.

A sweep is data (`grid`), read into what jobs need (`jobs`), run on all devices (`parallel`), and
recorded block by block (`journal`, `checkpoint`, `files`); `sweep` puts them together, `plan` says
beforehand what it will take. `shadows` trains the shadow models of an informed adversary.
"""

from invjax.evaluation import shadows as shadows
from invjax.evaluation.grid import Sweep as Sweep
from invjax.evaluation.run import Experiment as Experiment
from invjax.evaluation.run import Outcome as Outcome
from invjax.evaluation.run import attack_victims as attack_victims
from invjax.evaluation.store import check_folder as check_folder
from invjax.evaluation.store import write_folder as write_folder

__all__ = [
    "Experiment",
    "Outcome",
    "Sweep",
    "attack_victims",
    "check_folder",
    "shadows",
    "write_folder",
]
