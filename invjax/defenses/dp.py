"""The aggregate of DP-SGD, and the privacy that it spends."""

from typing import Literal

from invjax.base import Defense
from invjax.defenses.base import from_stages
from invjax.defenses.checks import check
from invjax.defenses.clipping import clip_per_sample_stage
from invjax.defenses.noise import gaussian_stage


def dp_sgd(
    clip_norm: float, noise_multiplier: float, noise_on: Literal["sum", "mean"] = "sum"
) -> Defense:
    """Clip, sum, add Gaussian noise, divide by the batch size (Abadi et al. 2016, algorithm 1).

    Args:
      clip_norm: L2 radius of every sample's gradient.
      noise_multiplier: noise standard deviation in units of `clip_norm`.
      noise_on: `sum` adds the noise to the sum, so that the mean carries
        `noise_multiplier * clip_norm / B`: this is the convention of privacy accounting. `mean` adds
        `noise_multiplier * clip_norm` to the mean: B times as much.

    Returns:
      The defence.

    Raises:
      ValueError: a negative number, or an unknown convention.
    """
    check("clip_norm", clip_norm, 0.0)
    check("noise_multiplier", noise_multiplier, 0.0)
    if noise_on not in ("sum", "mean"):
        raise ValueError(f"noise_on must be 'sum' or 'mean', got {noise_on!r}.")
    std = clip_norm * noise_multiplier
    name = f"dp_sgd({clip_norm}, {noise_multiplier}, {noise_on!r})"
    noise = gaussian_stage(
        "noise", "aggregate", lambda count: std / count if noise_on == "sum" else std
    )
    return from_stages(clip_per_sample_stage(clip_norm), noise, name=name)


def privacy_spent(
    noise_multiplier: float, num_samples: int, batch_size: int, num_steps: int, delta: float
) -> float:
    """Epsilon of DP-SGD training with Poisson sampling, by Google's dp-accounting (PLD accountant).

    Args:
      noise_multiplier: of `dp_sgd` in the `sum` convention.
      num_samples: size of the training set.
      batch_size: expected batch size; the sampling rate is `batch_size / num_samples`.
      num_steps: training steps.
      delta: the delta of (epsilon, delta)-differential privacy.

    Returns:
      Epsilon; infinite without noise.

    Raises:
      ValueError: a number out of range.
    """
    check("noise_multiplier", noise_multiplier, 0.0)
    check("delta", delta, 0.0, 1.0)
    check("num_steps", num_steps, 0)
    check("batch_size", batch_size, 1, num_samples)
    if noise_multiplier == 0:
        return float("inf")
    # Three seconds to import, so only here.
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    step = dp_accounting.PoissonSampledDpEvent(
        batch_size / num_samples, dp_accounting.GaussianDpEvent(noise_multiplier)
    )
    accountant = PLDAccountant()
    accountant.compose(step, num_steps)
    return float(accountant.get_epsilon(delta))
