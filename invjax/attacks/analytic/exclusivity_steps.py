"""The steps of `exclusivity`, by its numbers: every sample in a slot of its own, shapes fixed.

Weights are `[in, out]`: row `j` of the last layer's gradient is `sum_m a_j^m g^m / M`, one multiple of
a sample's loss vector where the hidden unit `j` is active on that sample only.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from invjax.base import Array
from invjax.checks import equals
from invjax.models.layers import Layers, backpropagate, preactivations


class Tolerances(NamedTuple):
    """What counts as equal.

    Attributes:
      direction: distance of two unit rows that belong to one sample, without noise.
      zero: an entry of a single sample's column is zero below this share of its largest.
      certificate: relative error of a certificate that holds.
      noise: standard deviation of the noise on an entry of the gradient.
    """

    direction: Array | float
    zero: Array | float
    certificate: Array | float
    noise: Array | float


class Groups(NamedTuple):
    """The samples that show at the last layer, strongest first, in `S` slots.

    Attributes:
      members: `[S, d_H]`, the last hidden layer's units that are active on the sample alone.
      signals: `[S, K]`, the loss vector over `1 - p_y`: -1 at the label, and a distribution elsewhere.
      labels: `[S]` classes.
      spread: `[S]`, relative error of a signal under noise, over the deviation of the noise.
      exists: `[S]`, whether the slot is taken.
      count: groups of two and more, whether or not there is a slot for them.
    """

    members: Array
    signals: Array
    labels: Array
    spread: Array
    exists: Array
    count: Array


class Read(NamedTuple):
    """Inputs read off one exclusive unit of the first layer each.

    Attributes:
      inputs: `[S, d_0]`; NaN where a sample owns no such unit.
      unit: `[S]`, the unit.
      spread: `[S]`, deviation of an entry under noise, over that of the noise.
    """

    inputs: Array
    unit: Array
    spread: Array


def group_units(rows: Array, slots: int, tolerances: Tolerances) -> Groups:
    """Step 1: hidden units whose rows of the last layer's gradient point the same way.

    Args:
      rows: `[d_H, K]`, the gradient of the last weight.
      slots: how many samples there is room for.
      tolerances: what counts as equal.

    Returns:
      The groups.
    """
    norms = jnp.linalg.norm(rows, axis=1)
    sigma = tolerances.noise * rows.shape[1] ** 0.5
    live = (norms > 1e-12 * norms.max()) & (norms > 12 * sigma)
    safe = jnp.where(live, norms, 1.0)
    units = rows / safe[:, None]
    radius = tolerances.direction / 2 + 4 * sigma / safe
    # The loss vector of one sample has one negative entry, and activations are positive.
    below = 1e-9 + 4 * sigma / safe / rows.shape[1] ** 0.5
    live &= (units < -below[:, None]).sum(axis=1) == 1
    near = jnp.sqrt(squared_distances(units)) < radius[:, None] + radius[None]
    # Compared once: fused into the search for the largest, it would be compared anew for every pass.
    near = jax.lax.optimization_barrier(near & live[:, None] & live[None])
    leader = jnp.argmax(jnp.where(near, norms[None], -1.0), axis=1)
    grouped = jnp.zeros(norms.size, jnp.int32).at[leader].add(live.astype(jnp.int32)) >= 2
    total = jnp.zeros_like(norms).at[leader].add(jnp.where(live, norms, 0.0))
    weight = jnp.where(grouped, total, 0.0)
    chosen = jnp.argsort(-weight)[jnp.minimum(jnp.arange(slots), norms.size - 1)]
    exists = grouped[chosen] & (jnp.arange(slots) < norms.size)
    members = (leader[None] == chosen[:, None]) & live[None] & exists[:, None]
    total = members.astype(rows.dtype) @ rows
    labels = jnp.argmin(total, axis=1)
    # Over the other entries' sum: in float32 the label's entry of a sure sample is mostly rounding.
    others = jnp.where(_at(labels, rows.shape[1]), 0.0, total).sum(axis=1)
    exists &= others > 0
    others = jnp.where(exists, others, 1.0)
    spread = jnp.sqrt(rows.shape[1] * members.sum(axis=1)) / others
    return Groups(members, total / others[:, None], labels, spread, exists, grouped.sum())


def squared_distances(rows: Array) -> Array:
    """Squared distances `[N, N]` of rows `[N, K]`.

    Of differences and not a Gram matrix: that resolves directions to the root of the rounding only.
    """
    if rows.shape[1] > 16:
        return jnp.square(rows[:, None] - rows[None]).sum(axis=-1)
    # Few columns, written out: a sixth of the time of the reduction.
    first, *others = (jnp.square(column[:, None] - column[None]) for column in rows.T)
    return sum(others, first)


def support_patterns(
    weights: list[Array], groups: Groups, tolerances: Tolerances
) -> tuple[list[Array], Array]:
    """Step 3: hidden activation patterns from the top down, off columns of a single sample.

    Args:
      weights: gradients of the weights between hidden layers, `[d_l, d_{l+1}]` for l = 1..H-1.
      groups: the samples.
      tolerances: what counts as zero.

    Returns:
      Patterns `[S, d_l]` for l = 1..H-1, and `[S, d_1]`, the first hidden layer's exclusive units.
    """
    exclusive, patterns = groups.members, []
    for weight in weights[::-1]:
        strength = jnp.where(exclusive, jnp.linalg.norm(weight, axis=0)[None], -1.0)
        columns = jnp.abs(weight.T[jnp.argmax(strength, axis=1)])
        floor = tolerances.zero * columns.max(axis=1, keepdims=True) + 4 * tolerances.noise
        active = columns > floor
        active &= exclusive.any(axis=1, keepdims=True)
        exclusive = active & (active.sum(axis=0) == 1)[None]
        patterns.append(active)
    return patterns[::-1], exclusive


def read_rows(weight: Array, bias: Array, exclusive: Array) -> Read:
    """Step 4 with a bias: the quotient at the exclusive unit with the largest bias gradient.

    Args:
      weight: `[d_0, d_1]`, gradient of the first weight.
      bias: `[d_1]`, gradient of the first bias.
      exclusive: `[S, d_1]`, the samples' exclusive units.

    Returns:
      The samples' inputs, as far as they can be read.
    """
    strength = jnp.where(exclusive, jnp.abs(bias)[None], 0.0)
    unit = jnp.argmax(strength, axis=1)
    divisor = jnp.where(strength.max(axis=1) > 0, bias[unit], jnp.nan)
    inputs = weight.T[unit] / divisor[:, None]
    spread = jnp.sqrt(1 + jnp.square(inputs).mean(axis=1)) / jnp.abs(divisor)
    return Read(inputs, unit, spread)


def read_directions(head: Layers, weight: Array, groups: Groups, exclusive: Array) -> Read:
    """Step 4 without any bias: an exclusive column gives the direction, and the logits the length.

    A network without biases is positively homogeneous, `f(s x) = s f(x)`, and the loss vector tells
    `f(x)` up to a constant: `s` is the slope of the direction's logits over `log u`.

    Args:
      head: the dense layers, of parameters.
      weight: `[d_0, d_1]`, gradient of the first weight.
      groups: the samples.
      exclusive: `[S, d_1]`, the samples' exclusive units.

    Returns:
      The samples' inputs, as far as they can be read.
    """
    assert head[0].weight is not None
    strength = jnp.where(exclusive, jnp.linalg.norm(weight, axis=0)[None], 0.0)
    unit = jnp.argmax(strength, axis=1)
    columns = weight.T[unit]
    # The unit is active on its sample, which settles the sign of its error.
    columns *= jnp.sign((head[0].weight.T[unit] * columns).sum(axis=1, keepdims=True))
    length = jnp.where(strength.max(axis=1) > 0, strength.max(axis=1), jnp.nan)
    columns /= length[:, None]
    other = ~_at(groups.labels, groups.signals.shape[1]) & (groups.signals > 0)
    level = jnp.log(jnp.where(other, groups.signals, 1.0))
    logits = preactivations(head, columns)[-1]

    def centered(values):
        mean = jnp.where(other, values, 0.0).sum(axis=1) / other.sum(axis=1)
        return jnp.where(other, values - mean[:, None], 0.0)

    level, logits = centered(level), centered(logits)
    slope = (level * logits).sum(axis=1) / jnp.square(level).sum(axis=1)
    inputs = columns / jnp.where(slope > 0, slope, jnp.nan)[:, None]
    return Read(inputs, unit, jnp.linalg.norm(inputs, axis=1) / length)


def enumerate_patterns(terms: Array, total: Array) -> Array:
    """The binary equation: which samples a last hidden unit is active on, off its bias gradient.

    Args:
      terms: `[S, d_H]`, what a sample adds to the unit's bias gradient if it is active.
      total: `[d_H]`, the bias gradient.

    Returns:
      `[S, d_H]`, of the `2^S` subsets of samples the one whose sum is nearest.
    """
    slots = terms.shape[0]
    subsets = np.array(list(itertools.product([False, True], repeat=slots)))

    def best(unit):
        column, value = unit
        sums = jnp.asarray(subsets, column.dtype) @ column
        return jnp.asarray(subsets)[jnp.argmin(jnp.abs(sums - value))]

    return jax.lax.map(best, (terms.T, total)).T


def first_signals(head: Layers, patterns: list[Array], signals: Array) -> Array:
    """A signal at the logits, back through given patterns to the first layer.

    Args:
      head: the dense layers, of parameters.
      patterns: `[S, d_l]` for l = 1..H.
      signals: `[S, K]`.

    Returns:
      `[S, d_1]`.
    """
    # A pattern as a preactivation: positive where active.
    values = [pattern.astype(signals.dtype) for pattern in patterns]
    return backpropagate(head, [*values, signals], signals)[0]


def solve_inputs(signals: Array, weight: Array) -> Array:
    """Step 5: least squares for all inputs in `G_0 = X^T Delta`, the gradient equation.

    Args:
      signals: `[S, d_1]`, the first layer's signal of every sample; zero in an empty slot.
      weight: `[d_0, d_1]`, gradient of the first weight.

    Returns:
      `[S, d_0]`; zero in an empty slot.
    """
    # Columns of one length: the cut of small singular values is then no cut of sure samples.
    length = jnp.linalg.norm(signals, axis=1)
    length = jnp.where(length > 0, length, 1.0)
    solution = jnp.linalg.lstsq((signals / length[:, None]).T, weight.T)[0]
    return solution / length[:, None]


def certify(head: Layers, inputs: Array, groups: Groups) -> tuple[Array, Array]:
    """Step 6: whether an input has the loss vector that it was read with.

    Args:
      head: the dense layers, of parameters.
      inputs: `[S, d_0]`.
      groups: the samples.

    Returns:
      Relative error of the loss vector's other entries (infinite where the input is not finite),
      and `1 - p_y`.
    """
    logits = preactivations(head, inputs)[-1]
    label = _at(groups.labels, logits.shape[1])
    expected = jnp.where(label, 0.0, groups.signals)
    error = jnp.linalg.norm(_others(logits, label) - expected, axis=1)
    error /= jnp.maximum(jnp.linalg.norm(expected, axis=1), 1e-30)
    rest = jnp.where(label, 0.0, jax.nn.softmax(logits)).sum(axis=1)
    return jnp.where(jnp.isfinite(error), error, jnp.inf), rest


def allowance(head: Layers, read: Read, groups: Groups, tolerances: Tolerances) -> Array:
    """Error that a certificate may have: rounding, and what the noise makes of it to first order.

    Args:
      head: the dense layers, of parameters.
      read: the inputs as they were read.
      groups: the samples.
      tolerances: what counts as equal.

    Returns:
      `[S]`, relative; a tenth at most, where a certificate no longer tells.
    """
    base = jnp.full(groups.exists.shape, tolerances.certificate, read.inputs.dtype)
    if equals(tolerances.noise, 0.0):
        return base
    label = _at(groups.labels, groups.signals.shape[1])

    def others(values, label):
        return _others(preactivations(head, values[None])[-1], label[None])[0]

    slopes = jax.vmap(jax.jacrev(others))(read.inputs, label)
    length = jnp.linalg.norm(jnp.where(label, 0.0, groups.signals), axis=1)
    error = groups.spread + read.spread * jnp.linalg.norm(slopes, axis=(1, 2)) / length
    error = jnp.where(jnp.isfinite(error), error, 0.0)
    return jnp.minimum(base + 4 * tolerances.noise * error, 0.1)


def _others(logits: Array, label: Array) -> Array:
    """Probabilities of the other classes among themselves."""
    return jax.nn.softmax(jnp.where(label, -jnp.inf, logits))


def _at(labels: Array, classes: int) -> Array:
    return labels[:, None] == jnp.arange(classes)[None]
