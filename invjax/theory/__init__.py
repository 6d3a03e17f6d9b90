"""Theory: bounds and predictions of what any attack, or a whole family of them, can reach.

`influence` holds the inversion influence function: how far a perturbed gradient moves its own
inversion, a lower bound on it, and its mean under Gaussian noise (the Cramér-Rao bound). Pure
functions of a model, its parameters and a batch: they read the truth, as no attack may.
"""

from invjax.theory.influence import ExpectedError as ExpectedError
from invjax.theory.influence import Influence as Influence
from invjax.theory.influence import expected_psnr as expected_psnr
from invjax.theory.influence import expected_squared_error as expected_squared_error
from invjax.theory.influence import influence as influence
from invjax.theory.influence import largest_eigenvalue as largest_eigenvalue
from invjax.theory.influence import lower_bound as lower_bound

__all__ = [
    "ExpectedError",
    "Influence",
    "expected_psnr",
    "expected_squared_error",
    "influence",
    "largest_eigenvalue",
    "lower_bound",
]
