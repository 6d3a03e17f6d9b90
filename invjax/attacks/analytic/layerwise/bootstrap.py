"""Where a layer-wise attack starts: the input of the last dense layer, and the derivative behind it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from invjax.base import Array

_LOWEST = -0.27846454276107377  # -W(1/e), the least value of -m / (1 + exp(m))


class Start(NamedTuple):
    """Candidates for the last dense layer, `C` of them.

    Attributes:
      inputs: `[C, in]`.
      signal: `[C, out]`, the derivative of the loss by what the layer computes.
      labels: `[C]`.
      valid: `[C]`.
    """

    inputs: Array
    signal: Array
    labels: Array
    valid: Array


def rank_one_input(gradient: Array, signal: Array) -> Array:
    """The input of a dense layer from its gradient `x k^T`, by least squares.

    Chen and Campbell 2022 divide by the first entry of `k` that is not zero; all entries together are
    as exact, and average noise.

    Args:
      gradient: `[in, out]`, of the weight.
      signal: `[out]`, `k`: the derivative by what the layer computes, which is its bias's gradient.

    Returns:
      `[in]`; zeros where `k` is zero.
    """
    square = signal @ signal
    return (gradient @ signal) / jnp.where(square > 0, square, 1.0)


def lambert_w(value: Array, branch: int) -> Array:
    """Lambert's W: the `w` of `w exp(w) = value`, by Halley's method.

    Args:
      value: `[...]`, at least -1/e (less is taken as -1/e); negative for branch -1.
      branch: 0 (`w >= -1`) or -1 (`w <= -1`).

    Returns:
      `[...]`.

    Raises:
      ValueError: another branch.
    """
    if branch not in (0, -1):
        raise ValueError(f"branch must be 0 or -1, got {branch}.")
    tiny = jnp.finfo(value.dtype).tiny
    value = jnp.maximum(value, -jnp.exp(jnp.asarray(-1.0, value.dtype)))
    value = value if branch == 0 else jnp.minimum(value, -tiny)
    root = jnp.sqrt(jnp.maximum(2 * (1 + jnp.e * value), 0.0))
    root = root if branch == 0 else -root
    near = -1 + root - root**2 / 3 + 11 * root**3 / 72
    if branch == 0:
        start = jnp.where(value > 0, jnp.log1p(value), near)
    else:
        far = jnp.log(-value)
        start = jnp.where(value > -0.25, far - jnp.log(-jnp.minimum(far, -1.0)), near)

    def halley(_, w):
        exponential = jnp.exp(w)
        error = w * exponential - value
        slope = exponential * (w + 1) - (w + 2) * error / jnp.where(w == -1, 1.0, 2 * w + 2)
        return w - jnp.where(
            (slope == 0) | (w == -1), 0.0, error / jnp.where(slope == 0, 1.0, slope)
        )

    return jax.lax.fori_loop(0, 12, halley, start)


def logistic_margin(product: Array, branch: int) -> Array:
    """The margin `m` of a logistic loss from `-m / (1 + exp(m))`: `m = -v - W(v exp(-v))`.

    R-GAP (Zhu and Blaschko 2021) finds it by gradient descent. Where `v` is not negative branch 0
    is the only one; below that either branch is a margin with the same gradient.

    Args:
      product: `[...]`, `v`: the inner product of the last weight with its gradient. Values below
        -0.2785 are none of a gradient (noise) and taken as that.
      branch: 0 for the lower margin, -1 for the one above 1.2785.

    Returns:
      `[...]`.
    """
    product = jnp.maximum(product, _LOWEST)
    return -product - lambert_w(product * jnp.exp(-product), branch)


def logistic(weight: Array, gradient: Array, labels: Array, branches: tuple[int, ...]) -> Start:
    """One logit without a bias: a candidate for every label and branch (Zhu and Blaschko 2021).

    The branches are twins: behind layers that are positively homogeneous and have no bias, the
    inputs differ by a factor and the gradients of all layers not at all.

    Args:
      weight: `[in, 1]`.
      gradient: `[in, 1]`.
      labels: `[L]`, 0 or 1, those that are possible.
      branches: of `logistic_margin`.

    Returns:
      `L` times as many candidates as branches; branch -1 is valid for a negative product only.
    """
    product = (weight * gradient).sum()
    parts = []
    for branch in branches:
        margin = logistic_margin(product, branch)
        signal = -(2.0 * labels.astype(weight.dtype) - 1.0) * jax.nn.sigmoid(-margin)
        inputs = gradient[:, 0][None] / signal[:, None]
        valid = jnp.broadcast_to((product < 0) | (branch == 0), labels.shape)
        parts.append(Start(inputs, signal[:, None], labels, valid & jnp.isfinite(margin)))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def softmax(weight: Array, gradient: Array, label: Array, roots: int = 4) -> tuple[Array, Array]:
    """Softmax logits without a bias: the gradient is `x k^T`, and one equation tells the scale.

    Its leading singular vectors give `x` and `k` but for a factor, the label (the one negative entry
    of `k`) the sign. With `q` the log odds of the label, `k` there is `-1 / (1 + exp(q))`, which
    gives the factor, which gives the logits, whose log odds must be `q`: a scan and bisections. Two
    logits have twins where one has (`logistic`): either may be found.

    Args:
      weight: `[in, out]`, at least two logits.
      gradient: `[in, out]`.
      label: the class.
      roots: sign changes that are followed up; the one that explains `k` best is taken.

    Returns:
      `[in]` the input, `[out]` the derivative of the loss by the logits.
    """
    unit = gradient[:, label]
    for _ in range(8):  # Exact at once without noise, where the rank is one.
        other = gradient.T @ unit
        unit = gradient @ (other / _norm(other))
        unit = unit / _norm(unit)
    signal = gradient.T @ unit
    sign = jnp.where(signal[label] > 0, -1.0, 1.0).astype(weight.dtype)
    unit, signal = sign * unit, sign * signal
    logits = unit @ weight
    rest = jnp.where(jnp.arange(logits.size) == label, -jnp.inf, 0.0).astype(weight.dtype)

    def scale(odds: Array) -> Array:
        return -signal[label] * (1 + jnp.exp(odds))

    def miss(odds: Array) -> Array:
        scaled = scale(odds) * logits
        return scaled[label] - jax.nn.logsumexp(scaled + rest) - odds

    def bisect(_, ends):
        low, high, side = ends
        middle = 0.5 * (low + high)
        same = jnp.sign(miss(middle)) == side
        return jnp.where(same, middle, low), jnp.where(same, high, middle), side

    def refine(low: Array, high: Array) -> Array:
        low, high, _ = jax.lax.fori_loop(0, 60, bisect, (low, high, jnp.sign(miss(low))))
        return 0.5 * (low + high)

    grid = jnp.linspace(-40.0, 40.0, 2001, dtype=weight.dtype)
    signs = jnp.sign(jax.vmap(miss)(grid))
    starts = jnp.nonzero(signs[1:] != signs[:-1], size=roots, fill_value=0)[0]
    odds = jax.vmap(refine)(grid[starts], grid[starts + 1])

    def misfit(odds: Array) -> Array:
        probabilities = jax.nn.softmax(scale(odds) * logits)
        expected = probabilities.at[label].set(-jax.nn.sigmoid(-odds))
        return jnp.linalg.norm(expected - signal / scale(odds)) / _norm(expected)

    found = scale(odds[jnp.argmin(jax.vmap(misfit)(odds))])
    return found * unit, signal / jnp.where(found > 0, found, 1.0)


def _norm(vector: Array) -> Array:
    size = jnp.linalg.norm(vector)
    return jnp.where(size > 0, size, 1.0)
