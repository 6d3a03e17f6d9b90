"""The aggregate of DP-SGD, and the privacy that it spends."""

import math
from typing import Literal

from invjax.base import Defense
from invjax.checks import check_choice, check_number, describe, equals
from invjax.defenses.base import from_stages, nothing
from invjax.defenses.clipping import clip_per_sample_stage
from invjax.defenses.noise import gaussian_stage


def dp_sgd(
    clip_norm: float, noise_multiplier: float, noise_on: Literal["sum", "mean"] = "sum"
) -> Defense:
    """Clip, sum, add Gaussian noise, divide by the batch size (Abadi et al. 2016, algorithm 1).

    What it guarantees, it guarantees of noise from a key that nobody else has: train with
    `dp_sgd(...).with_key(secret)`, for the default key follows from the name; and of finite gradients, for
    one sample's NaN is the mean's.

    Args:
      clip_norm: L2 radius of every sample's gradient; infinity, without noise, does nothing.
      noise_multiplier: noise standard deviation in units of `clip_norm`.
      noise_on: `sum` adds the noise to the sum, so that the mean carries
        `noise_multiplier * clip_norm / B`: this is the convention of privacy accounting. `mean`
        adds `noise_multiplier * clip_norm` to the mean: B times as much.

    Returns:
      The defence.

    Raises:
      ValueError: a radius that is not positive, a negative multiplier, noise in units of an
        infinite radius, or an unknown convention.
    """
    check_number("clip_norm", clip_norm, 0.0, open_low=True)
    check_number("noise_multiplier", noise_multiplier, 0.0, open_high=True)
    check_choice("noise_on", noise_on, ("sum", "mean"))
    silent = equals(noise_multiplier, 0)
    if equals(clip_norm, math.inf) and not silent:
        raise ValueError("clip_norm must be finite where noise_multiplier is not zero, got inf.")
    name = describe("dp_sgd", clip_norm, noise_multiplier, noise_on)

    def std(count):
        return clip_norm * noise_multiplier / (count if noise_on == "sum" else 1)

    noise = nothing(name, "aggregate") if silent else gaussian_stage(name, "aggregate", std)
    return from_stages(clip_per_sample_stage(clip_norm), noise, name=name)


def privacy_spent(
    noise_multiplier: float, num_samples: int, batch_size: int, steps: int, delta: float
) -> float:
    """Epsilon of DP-SGD training, by the privacy loss distributions of Google's dp-accounting.

    Every step takes every sample independently with probability `batch_size / num_samples` (Poisson
    sampling); two data sets are neighbours that differ by one sample added or removed. Shuffled
    mini-batches are customarily accounted so too, which is optimistic.

    Little noise makes the distributions wide and this slow: most of a minute at a noise multiplier of 0.1.

    Args:
      noise_multiplier: of `dp_sgd` in the `sum` convention (in the `mean` convention, times
        `batch_size`).
      num_samples: size of the training set.
      batch_size: expected batch size.
      steps: training steps.
      delta: the delta of (epsilon, delta)-differential privacy.

    Returns:
      Epsilon; infinite without noise, zero without steps.

    Raises:
      ValueError: a number out of range.
    """
    check_number("noise_multiplier", noise_multiplier, 0.0)
    check_number("num_samples", num_samples, 1)
    check_number("batch_size", batch_size, 1, num_samples)
    check_number("steps", steps, 0)
    check_number("delta", delta, 0.0, 1.0, open_low=True, open_high=True)
    if steps == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    # A second to import, so only here.
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    step = dp_accounting.PoissonSampledDpEvent(
        batch_size / num_samples, dp_accounting.GaussianDpEvent(noise_multiplier)
    )
    accountant = PLDAccountant()
    accountant.compose(step, steps)
    return float(accountant.get_epsilon(delta))
