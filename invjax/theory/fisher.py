"""Fisher information that a noisy release holds about one record, and the errors that it forces.

For `f(x) + N(0, s^2 I)`, with `f` any differentiable function of a record, the information is
`I = J^T J / s^2` with `J = df/dx`, and the diagonal Fisher information loss (dFIL) is its mean diagonal
`eta^2 = tr I / d` (Hannun, Guo and van der Maaten 2021; Guo et al. 2022). No estimator that is unbiased
around the record has a mean squared error below `tr I^-1 / d`, which is not below `1 / eta^2`.

`cramer_rao` has the bounds for a batch whose gradient a defence sends, read off the defence's own law;
`influence` the same matrix for plain gradients. Here is what they lack: releases of any kind (trained
weights), and whole runs of DP-SGD a record at a time, whose clipping must be smooth. Information adds
over the steps of a run. Everything may be jitted, and vmapped over records.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from invjax import conv
from invjax.base import Array, Batch, Model, Params, PyTree
from invjax.checks import check_count, check_number
from invjax.observe import check_params
from invjax.theory.gram import at_full_precision, inverse_trace, largest_ritz_value

Release = Callable[[Array], PyTree]

SMOOTH_CLIP_NORM = 1.11522
"""Supremum of the norm behind `smooth_clip`, in units of `clip_norm`, rounded up.

Privacy accounting of smoothly clipped DP-SGD takes the noise multiplier divided by it.
"""


class Leakage(NamedTuple):
    """Diagonal Fisher information loss, in inverse squared input units.

    Attributes:
      dfil: `eta^2 = tr I / d`; `1 / dfil` is the error that no unbiased attack beats.
      standard_error: of it, from the spread of the probes; 0 where the whole basis was taken.
    """

    dfil: Array
    standard_error: Array


def output_perturbation(
    release: Release,
    record: Array,
    std: Array | float,
    *,
    num_probes: int | None = None,
    key: Array | None = None,
) -> Leakage:
    """The dFIL of a release with Gaussian noise on every coordinate.

    By forward mode: `tr J^T J` is the sum of `|J e|^2` over the basis, or the mean of `|J v|^2` over
    independent signs (Hutchinson).

    Args:
      release: `release(record) -> tree`, differentiable in forward mode.
      record: the truth, any shape of `d` values.
      std: `s`, of the noise.
      num_probes: signs, at least 2; `None` takes the whole basis, one product with `J` a value.
      key: PRNG key of the signs; a fixed one where `None`.

    Returns:
      Scalars.

    Raises:
      ValueError: a deviation that is not positive, fewer than two probes.
    """
    check_number("std", std, 0.0, open_low=True)
    trace, error = _trace(release, record, num_probes, key)
    unit = record.size * jnp.square(jnp.asarray(std, trace.dtype))
    return Leakage(trace / unit, error / unit)


def dp_sgd_step(
    model: Model,
    params: Params,
    batch: Batch,
    *,
    clip_norm: Array | float,
    noise_multiplier: Array | float,
    sampling_rate: Array | float | None = None,
    delta: Array | float = 1e-5,
    num_probes: int | None = None,
    key: Array | None = None,
) -> Leakage:
    """The dFIL of one step of DP-SGD, for every record that takes part in it (Guo et al. 2022).

    The step releases the sum of smoothly clipped gradients with noise of `noise_multiplier * clip_norm`; all
    but the one record is granted. The dFIL of a run is the sum over the steps that a record takes part in,
    with a fresh key each.

    Args:
      model: the model, differentiable twice at the batch.
      params: its parameters at this step.
      batch: the records, inputs `[B, ...]`, labels `[B]`.
      clip_norm: `C` of `smooth_clip`.
      noise_multiplier: deviation of the noise in units of `C`.
      sampling_rate: of the step, for `subsampling_credit`; `None` claims none.
      delta: of that credit.
      num_probes: as in `output_perturbation`, for every record.
      key: as there; every record draws its own.

    Returns:
      `[B]` each.

    Raises:
      ValueError: parameters unlike the model, a number out of range.
    """
    check_number("clip_norm", clip_norm, 0.0, open_low=True)
    check_number("noise_multiplier", noise_multiplier, 0.0, open_low=True)
    inputs, labels = jnp.asarray(batch.inputs), jnp.asarray(batch.labels)
    check_params(model, params, inputs.shape[1:])
    model = conv.for_matching(model)
    credit = 1.0
    if sampling_rate is not None:
        credit = subsampling_credit(sampling_rate, noise_multiplier, delta)

    def one(sample):
        record, label, key = sample

        def release(record):
            gradient = jax.grad(model.loss)(params, Batch(record[None], label[None]))
            return smooth_clip(gradient, clip_norm)

        std = jnp.asarray(noise_multiplier * clip_norm, record.dtype)
        return output_perturbation(release, record, std, num_probes=num_probes, key=key)

    key = jax.random.key(0) if key is None else key
    found = jax.lax.map(one, (inputs, labels, jax.random.split(key, len(inputs))))
    return jax.tree.map(lambda leaf: (credit * leaf).astype(leaf.dtype), found)


def subsampling_credit(
    sampling_rate: Array | float, noise_multiplier: Array | float, delta: Array | float = 1e-5
) -> Array:
    """Weight of a step whose participants are hidden: `q / (q + (1 - q) exp(-e))` (Guo et al. 2022).

    With `e = 2 SMOOTH_CLIP_NORM sqrt(2 log(1.25 / delta)) / noise_multiplier`: having seen the step, nobody
    holds the record's part in it for more probable than this, but for a probability of `delta`. As published;
    the classical formula for `e` is proven up to 1 only and too small for noise multipliers below about 1.

    Args:
      sampling_rate: `q`, the probability that a record takes part.
      noise_multiplier: deviation of the noise in units of the clip norm.
      delta: the probability that is passed over.

    Returns:
      A scalar in [q, 1].

    Raises:
      ValueError: a number out of range.
    """
    check_number("sampling_rate", sampling_rate, 0.0, 1.0, open_low=True)
    check_number("noise_multiplier", noise_multiplier, 0.0, open_low=True)
    check_number("delta", delta, 0.0, 1.0, open_low=True, open_high=True)
    epsilon = 2 * SMOOTH_CLIP_NORM * jnp.sqrt(2 * jnp.log(1.25 / jnp.asarray(delta)))
    absent = (1 - jnp.asarray(sampling_rate)) * jnp.exp(-epsilon / noise_multiplier)
    return sampling_rate / (sampling_rate + absent)


def smooth_clip(gradient: PyTree, clip_norm: Array | float) -> PyTree:
    """Differentiable clipping: `g / (gelu(|g| / C - 1) + 1)` (Guo et al. 2022).

    Args:
      gradient: of one record, any tree.
      clip_norm: `C`, positive.

    Returns:
      A tree like it, of norm at most `SMOOTH_CLIP_NORM * C`; a short gradient comes out up to a
      fifth longer.

    Raises:
      ValueError: a `clip_norm` that is not positive.
    """
    check_number("clip_norm", clip_norm, 0.0, open_low=True)
    squared = optax.tree.norm(gradient, squared=True)
    positive = squared > 0
    # The double where keeps the derivative at a zero gradient finite.
    norm = jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1.0)), 0.0)
    divisor = jax.nn.gelu(norm / clip_norm - 1, approximate=False) + 1
    return jax.tree.map(lambda leaf: leaf / divisor.astype(leaf.dtype), gradient)


@at_full_precision
def fisher_information(release: Release, record: Array, std: Array | float) -> Array:
    """The whole matrix `J^T J / s^2`.

    Args:
      release: as in `output_perturbation`.
      record: the truth, `d` values.
      std: `s`.

    Returns:
      `[d, d]`.

    Raises:
      ValueError: a deviation that is not positive.
    """
    check_number("std", std, 0.0, open_low=True)
    jacobian = _jacobian(release, record) / jnp.asarray(std, record.dtype)
    return jacobian.T @ jacobian


@at_full_precision
def unbiased_mse(release: Release, record: Array, std: Array | float) -> Array:
    """The Cramér-Rao bound on the mean squared error of one value: `tr I^-1 / d`.

    From the singular values of `J` (inverting `I` would lose half the digits). Not below `1 / dfil`.

    Args:
      release: as in `output_perturbation`.
      record: the truth, `d` values.
      std: `s`.

    Returns:
      A scalar, in squared input units; infinite where the release does not determine the record.

    Raises:
      ValueError: a deviation that is not positive.
    """
    check_number("std", std, 0.0, open_low=True)
    jacobian = _jacobian(release, record)
    variance = jnp.square(jnp.asarray(std, jacobian.dtype))
    return inverse_trace(jacobian, variance / record.size)


def rdp_mse(epsilon: Array | float, diameters: Array) -> Array:
    """Mean squared error that Rényi DP of order 2 forces on unbiased attacks (Guo et al. 2022).

    `sum_i diam_i^2 / (4 d (e^epsilon - 1))`. An attack whose mean moves by at least `c` for every unit that
    the record moves by has `c^2` times that; a constant guess has `c = 0`, and beats the bound wherever
    `epsilon < log 2`. Output perturbation of sensitivity `Delta` has `epsilon = (Delta / s)^2`.

    Args:
      epsilon: of `(2, epsilon)`-RDP, positive.
      diameters: `[d]`, the range of every value of a record.

    Returns:
      A scalar, in squared input units.

    Raises:
      ValueError: an `epsilon` that is not positive.
    """
    check_number("epsilon", epsilon, 0.0, open_low=True)
    return jnp.mean(jnp.square(jnp.asarray(diameters))) / (4 * jnp.expm1(epsilon))


@at_full_precision
def largest_information(
    release: Release,
    record: Array,
    std: Array | float,
    *,
    num_steps: int = 20,
    key: Array | None = None,
) -> Array:
    """The largest eigenvalue of `I`, from below: what is told about the best told direction.

    Power iteration, a product with `J` and one with `J^T` a step, in the form that keeps all iterates
    (Lanczos): the last one alone was up to 16 % low after 20 steps where the two largest are close.
    `influence.largest_eigenvalue` bounds it from above where the release is a gradient.

    Args:
      release: differentiable in forward and reverse mode.
      record: the truth.
      std: `s`.
      num_steps: iterations.
      key: PRNG key of the start; a fixed one where `None`.

    Returns:
      A scalar, in inverse squared input units.

    Raises:
      ValueError: a deviation that is not positive, fewer than one step.
    """
    check_number("std", std, 0.0, open_low=True)
    check_number("num_steps", num_steps, 1)
    _, push = jax.linearize(release, record)
    _, pull = jax.vjp(release, record)
    largest = largest_ritz_value(push, lambda tree: pull(tree)[0], record, num_steps, key)
    return largest / jnp.square(jnp.asarray(std, largest.dtype))


def logistic_jacobian(
    params: Array, inputs: Array, record: Array, label: Array | float, penalty: Array | float
) -> Array:
    """How the weights of logistic regression move with one of its records, in closed form.

    `dtheta/dx = -s (1 - s) H^-1 [1; x] w^T - (s - y) (H^-1)_{:, 1:}`, with `H` the Hessian of the sum of the
    losses and of `penalty . theta^2 / 2` at its minimum (the implicit function theorem; Guo et al. 2022
    release such weights with noise, by output perturbation).

    Args:
      params: `[d + 1]`, the minimiser `theta`, intercept first.
      inputs: `[n, d]`, all records, the one in question among them.
      record: `[d]`, that one.
      label: its label, 0 or 1.
      penalty: of the sum of the losses, a number or `[d + 1]`, intercept first; `n` times that of the mean.

    Returns:
      `[d + 1, d]`.
    """
    padded = jnp.concatenate([jnp.ones((len(inputs), 1), inputs.dtype), inputs], axis=1)
    extended = jnp.concatenate([jnp.ones(1, record.dtype), record])
    chance = jax.nn.sigmoid(padded @ params)
    diagonal = jnp.broadcast_to(jnp.asarray(penalty, params.dtype), params.shape)
    hessian = (padded * (chance * (1 - chance))[:, None]).T @ padded + jnp.diag(diagonal)
    own = jax.nn.sigmoid(extended @ params)
    # The derivative of the record's own gradient, with the sign of the implicit function theorem.
    moved = own * (1 - own) * extended[:, None] * params[None, 1:]
    moved = moved + (own - label) * jnp.eye(len(params), dtype=params.dtype)[:, 1:]
    return -jnp.linalg.solve(hessian, moved)


def _jacobian(release: Release, record: Array) -> Array:
    """`[p, d]`."""

    def flat(values):
        return ravel_pytree(release(values.reshape(record.shape)))[0]

    return jax.jacfwd(flat)(record.ravel())


@at_full_precision
def _trace(
    release: Release, record: Array, num_probes: int | None, key: Array | None
) -> tuple[Array, Array]:
    """`tr J^T J` and its standard error."""
    _, push = jax.linearize(release, record)
    if num_probes is None:
        directions = jnp.eye(record.size, dtype=record.dtype)
    else:
        check_count("num_probes", num_probes, 2)
        key = jax.random.key(0) if key is None else key
        directions = jax.random.rademacher(key, (num_probes, record.size), record.dtype)

    def square(direction):
        return optax.tree.norm(push(direction.reshape(record.shape)), squared=True)

    squares = conv.grouped_vmap(square)(directions)
    if num_probes is None:
        return jnp.sum(squares), jnp.zeros((), squares.dtype)
    return jnp.mean(squares), jnp.std(squares, ddof=1) / math.sqrt(num_probes)
