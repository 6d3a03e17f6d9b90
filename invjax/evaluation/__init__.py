"""Evaluation: victims, attacks on them, measurements, folders of results, and sweeps.

A sweep is data (`grid`), read into what jobs need (`jobs`), run on all devices (`parallel`), and
recorded block by block (`journal`, `checkpoint`, `store`); `sweep` puts them together, `plan` says
beforehand what it will take. `utility` trains under a defence, `course` attacks on the way, `tradeoff`
compares defences that cost the same. `shadows` trains the shadow models of an informed adversary.
"""

from invjax.evaluation import course as course
from invjax.evaluation import shadows as shadows
from invjax.evaluation import tradeoff as tradeoff
from invjax.evaluation import utility as utility
from invjax.evaluation.families import Family as Family
from invjax.evaluation.grid import Sweep as Sweep
from invjax.evaluation.run import Experiment as Experiment
from invjax.evaluation.run import Outcome as Outcome
from invjax.evaluation.run import attack_victims as attack_victims
from invjax.evaluation.store import check_folder as check_folder
from invjax.evaluation.store import write_folder as write_folder
from invjax.evaluation.tradeoff_settings import Tradeoff as Tradeoff

__all__ = [
    "Experiment",
    "Family",
    "Outcome",
    "Sweep",
    "Tradeoff",
    "attack_victims",
    "check_folder",
    "course",
    "shadows",
    "tradeoff",
    "utility",
    "write_folder",
]
