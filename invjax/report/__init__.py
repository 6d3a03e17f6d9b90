"""Figures, and one self-contained HTML page, of what an attack brought back."""

from invjax.report.figures import comparison as comparison
from invjax.report.figures import objective_curves as objective_curves
from invjax.report.page import attack_page as attack_page
from invjax.report.sweep_page import sweep_page as sweep_page

__all__ = ["attack_page", "comparison", "objective_curves", "sweep_page"]
