"""Analytic attacks: closed forms and linear algebra in place of optimisation.

Every attack is an `invjax.base.Attack` of no steps, which does its work in `init`.
"""

from invjax.attacks.analytic.bias_trick import bias_trick as bias_trick
from invjax.attacks.analytic.bias_trick import first_dense as first_dense
from invjax.attacks.analytic.row_scan import row_scan as row_scan

__all__ = ["bias_trick", "first_dense", "row_scan"]
