"""What the best blind guess of a record reaches, by the prior: `kappa = sup_z Pr[error(Z, z) <= eta]`.

The reconstruction robustness bounds of `rero` and `blowup` start from it (Balle, Cherubin and Hayes 2022).
Host code in NumPy, in float64.
"""

import math
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.spatial.distance import cdist
from scipy.special import betainc

from invjax.checks import check_choice, check_number

POOL_ROWS = 1024
"""Rows of a pool whose distances to the whole pool are held at a time."""


def kappa_uniform(num_records: int) -> float:
    """A uniform prior on distinct records, where only the right one counts: `1 / m`.

    Args:
      num_records: `m`; the error is 0 or 1, or `eta` below half the least distance of two records.

    Returns:
      Kappa.

    Raises:
      ValueError: fewer than one record, or a number that is not whole.
    """
    check_number("num_records", num_records, 1, open_high=True)
    if num_records != int(num_records):
        raise ValueError(f"num_records must be a whole number, got {num_records}.")
    return 1 / num_records


def kappa_ball(eta: ArrayLike, dimension: ArrayLike, radius: float = 1.0) -> np.ndarray:
    """A uniform prior on an L2 ball: `(eta / radius)^d`.

    Args:
      eta: allowed L2 error; `sqrt(d * mse)` where the error is a mean square.
      dimension: `d`.
      radius: of the ball.

    Returns:
      Kappa.

    Raises:
      ValueError: an argument out of range.
    """
    share, dimension = _share(eta, dimension, radius)
    return np.minimum(share, 1.0) ** dimension


def kappa_sphere(
    eta: ArrayLike,
    dimension: ArrayLike,
    radius: float = 1.0,
    guess: Literal["anywhere", "sphere"] = "anywhere",
) -> np.ndarray:
    """A uniform prior on the sphere in `d` dimensions: a cap's share of its surface.

    A guess off the sphere, at the norm `sqrt(radius^2 - eta^2)`, catches more than any on it, and from
    `eta = radius` on the centre catches all. `-log(kappa)` grows as `d`, so that a much larger
    epsilon stops reconstruction than membership inference.

    Args:
      eta: allowed L2 error; `sqrt(d * mse)` where the error is a mean square.
      dimension: `d`.
      radius: of the sphere.
      guess: `anywhere` allows every point as the guess and is sound; `sphere` only normalised ones.

    Returns:
      Kappa.

    Raises:
      ValueError: an argument out of range.
    """
    check_choice("guess", guess, ("anywhere", "sphere"))
    share, dimension = _share(eta, dimension, radius)
    # The squared sine of the angle between the cap's middle and its rim.
    if guess == "anywhere":
        sine = np.minimum(share, 1.0) ** 2
    else:
        sine = np.sin(2 * np.arcsin(np.minimum(share / 2, 1.0))) ** 2
    cap = np.where(dimension > 1, 0.5 * betainc(np.maximum(dimension - 1, 1) / 2, 0.5, sine), 0.5)
    if guess == "anywhere":
        return np.where(share >= 1, 1.0, cap)[()]
    cap = np.where(share > math.sqrt(2), 1 - cap, cap)
    return np.where(share >= 2, 1.0, cap)[()]


def kappa_pool_heuristic(pool: ArrayLike, eta: float) -> float:
    """A uniform prior on a finite pool, with guesses from the pool only: a heuristic, too small.

    A guess between records may be close to more of them than any record is. At twice `eta` it is
    sound: the records near some guess are all within `2 eta` of each other.

    Args:
      pool: records, `[m, ...]`.
      eta: allowed L2 error.

    Returns:
      The largest share of the pool within `eta` of one of its records.

    Raises:
      ValueError: a pool that is empty or not finite, or a negative error.
    """
    check_number("eta", eta, 0.0)
    points = np.asarray(pool, float)
    if points.ndim < 2 or not len(points):
        raise ValueError(f"pool must hold records, [m, ...], got shape {points.shape}.")
    if not np.isfinite(points).all():
        raise ValueError("pool must hold finite values, got NaN or infinite ones.")
    points = points.reshape(len(points), -1)
    counts = [
        (cdist(points[start : start + POOL_ROWS], points) <= eta).sum(1).max()
        for start in range(0, len(points), POOL_ROWS)
    ]
    return float(max(counts)) / len(points)


def _share(eta: ArrayLike, dimension: ArrayLike, radius: float) -> tuple[np.ndarray, np.ndarray]:
    check_number("radius", radius, 0.0, open_low=True)
    eta, dimension = np.asarray(eta, float), np.asarray(dimension, float)
    if not (eta >= 0).all():
        raise ValueError(f"eta must be at least 0, got {eta}.")
    if not (dimension >= 1).all():
        raise ValueError(f"dimension must be at least 1, got {dimension}.")
    return eta / radius, dimension
