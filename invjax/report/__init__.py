"""Figures, and self-contained HTML pages: of an attack, of a sweep, of a comparison at equal utility."""

from invjax.report import tradeoff_figures as tradeoff_figures
from invjax.report.course import course_figure as course_figure
from invjax.report.figures import comparison as comparison
from invjax.report.figures import objective_curves as objective_curves
from invjax.report.page import attack_page as attack_page
from invjax.report.sweep_page import sweep_page as sweep_page
from invjax.report.tradeoff_page import tradeoff_page as tradeoff_page

__all__ = [
    "attack_page",
    "comparison",
    "course_figure",
    "objective_curves",
    "sweep_page",
    "tradeoff_figures",
    "tradeoff_page",
]
