"""Evaluation: victims, attacks on them, measurements, and folders of results."""

from invjax.evaluation.run import Experiment as Experiment
from invjax.evaluation.run import Outcome as Outcome
from invjax.evaluation.run import attack_victims as attack_victims
from invjax.evaluation.store import check_folder as check_folder
from invjax.evaluation.store import write_folder as write_folder

__all__ = ["Experiment", "Outcome", "attack_victims", "check_folder", "write_folder"]
