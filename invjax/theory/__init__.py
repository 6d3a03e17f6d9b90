"""Theory: bounds and predictions of what any attack, or a whole family of them, can reach.

`influence` holds the inversion influence function: how far a perturbed gradient moves its own inversion, a
lower bound on it, and its mean under Gaussian noise (the Cramér-Rao bound). `exclusivity` holds the
security boundary of ReLU networks: which neurons fire on one sample alone, and which batches have twins of
the very same gradient. `security_index` counts what the linear equations of every layer leave open.
`cramer_rao` computes lower bounds for any model and defence, and `two_layer` has the table of bounds, upper
and lower, for two-layer networks. `rero` bounds how often an informed adversary succeeds against
differential privacy, from what a blind guess reaches (`baselines`), `blowup` does so exactly for DP-SGD,
`accounting` compares protection at equal epsilon; `fisher` has the information that released weights carry
about a record. Pure functions of a model, its parameters and a batch: they read the truth, as no attack
may.
"""

from invjax.theory import accounting as accounting
from invjax.theory import baselines as baselines
from invjax.theory import fisher as fisher
from invjax.theory import rero as rero
from invjax.theory.blowup import blowup as blowup
from invjax.theory.blowup import calibrate_noise_multiplier as calibrate_noise_multiplier
from invjax.theory.blowup import monte_carlo_blowup as monte_carlo_blowup
from invjax.theory.cramer_rao import LowerBound as LowerBound
from invjax.theory.cramer_rao import cramer_rao as cramer_rao
from invjax.theory.cramer_rao import gaussian_prior_information as gaussian_prior_information
from invjax.theory.cramer_rao import score_prior_information as score_prior_information
from invjax.theory.cramer_rao import van_trees as van_trees
from invjax.theory.exclusivity import exclusivity_probability as exclusivity_probability
from invjax.theory.exclusivity import exclusivity_state as exclusivity_state
from invjax.theory.exclusivity import frozen_kernel as frozen_kernel
from invjax.theory.exclusivity import is_sufficient as is_sufficient
from invjax.theory.exclusivity import secure_boundary as secure_boundary
from invjax.theory.exclusivity import twin_batch as twin_batch
from invjax.theory.influence import ExpectedError as ExpectedError
from invjax.theory.influence import Influence as Influence
from invjax.theory.influence import expected_psnr as expected_psnr
from invjax.theory.influence import expected_squared_error as expected_squared_error
from invjax.theory.influence import influence as influence
from invjax.theory.influence import largest_eigenvalue as largest_eigenvalue
from invjax.theory.influence import lower_bound as lower_bound
from invjax.theory.security_index import closing_changes as closing_changes
from invjax.theory.security_index import jacobian_rank as jacobian_rank
from invjax.theory.security_index import minimum_filters as minimum_filters
from invjax.theory.security_index import security_index as security_index

__all__ = [
    "ExpectedError",
    "Influence",
    "LowerBound",
    "accounting",
    "baselines",
    "blowup",
    "calibrate_noise_multiplier",
    "closing_changes",
    "cramer_rao",
    "exclusivity_probability",
    "exclusivity_state",
    "expected_psnr",
    "expected_squared_error",
    "fisher",
    "frozen_kernel",
    "gaussian_prior_information",
    "influence",
    "is_sufficient",
    "jacobian_rank",
    "largest_eigenvalue",
    "lower_bound",
    "minimum_filters",
    "monte_carlo_blowup",
    "rero",
    "score_prior_information",
    "secure_boundary",
    "security_index",
    "twin_batch",
    "van_trees",
]
