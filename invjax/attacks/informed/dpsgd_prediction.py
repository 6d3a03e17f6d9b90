"""What an adversary without a prior gets from DP-SGD in the worst case, in closed form (Ziller et al. 2024).

A crafted linear layer makes a record's gradient `x` itself, which is clipped to `C x / |x|`. Of it and the
noise of deviation `s C` an adversary who knows `|x|` reads `x + N(0, std^2)` with `std = |x| s / sqrt(T)`
after `T` steps: an unbiased estimate, whose error these functions tell before anything is trained. The
formulas were derived for this package and agree with simulations; the paper's own were not compared.
"""

from typing import NamedTuple

import numpy as np
from scipy import special

from invjax.checks import check_number


class Predicted(NamedTuple):
    """The quality of a reconstruction, in expectation.

    Attributes:
      mse: squared input units.
      psnr: decibels, of that error.
      ncc: normalised cross-correlation, for many dimensions.
    """

    mse: float
    psnr: float
    ncc: float


def noise_std(norm: float, noise_multiplier: float, num_steps: float = 1.0) -> float:
    """Deviation of the noise on a reconstruction.

    Args:
      norm: of the record `|x|`, at least the clipping norm.
      noise_multiplier: `s`.
      num_steps: steps that the record took part in.

    Returns:
      `|x| s / sqrt(T)`, input units.

    Raises:
      ValueError: a number out of range.
    """
    check_number("norm", norm, 0.0)
    check_number("noise_multiplier", noise_multiplier, 0.0)
    check_number("num_steps", num_steps, 0.0, open_low=True)
    return float(norm * noise_multiplier / np.sqrt(num_steps))


def predict(std: float, variance: float, data_range: float = 1.0) -> Predicted:
    """Expected quality under noise.

    Args:
      std: of `noise_std`, positive.
      variance: of the record's values about their mean.
      data_range: highest minus lowest possible value.

    Returns:
      `std^2`, `10 log10(range^2 / std^2)` and `1 / sqrt(1 + std^2 / variance)`.

    Raises:
      ValueError: a number out of range.
    """
    check_number("std", std, 0.0, open_low=True)
    check_number("variance", variance, 0.0, open_low=True)
    check_number("data_range", data_range, 0.0, open_low=True)
    return Predicted(
        mse=float(std**2),
        psnr=float(20 * np.log10(data_range / std)),
        ncc=float((1 + std**2 / variance) ** -0.5),
    )


def success_probability(error: float, dimension: int, std: float) -> float:
    """Probability that the mean squared error stays within `error`.

    Args:
      error: squared input units.
      dimension: values of a record `d`.
      std: of `noise_std`, positive.

    Returns:
      `P(chi^2_d <= d error / std^2)`.

    Raises:
      ValueError: a number out of range.
    """
    check_number("error", error, 0.0)
    check_number("dimension", dimension, 1)
    check_number("std", std, 0.0, open_low=True)
    return float(special.gammainc(dimension / 2, dimension * error / (2 * std**2)))
