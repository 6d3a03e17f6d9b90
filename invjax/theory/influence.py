"""The inversion influence function: how far a perturbed gradient moves its own inversion.

With `J` the Jacobian of the mean gradient in the inputs at the private batch (`p` parameters by
`d` input values), whoever matches the gradient `g + delta` finds, to first order in `delta`, inputs
displaced by `(J^T J)^-1 J^T delta` (Zhang, Hong and Zhou 2023; a Gauss-Newton step from the truth).

Everything reads the truth, and only the dense method of `expected_squared_error` builds `J`; the
rest takes products with it. All of it may be jitted, and vmapped over victims.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from invjax import conv
from invjax.base import Array, Batch, Model, Params, PyTree
from invjax.checks import check_choice, check_count, check_number, check_shapes
from invjax.observe import check_params
from invjax.theory.gram import (
    at_full_precision,
    inverse_trace,
    lanczos_gap,
    largest_ritz_value,
    probed_trace,
    solve,
)


class Influence(NamedTuple):
    """A predicted displacement of a reconstruction.

    Attributes:
      displacement: like the inputs: reconstruction less truth, to first order.
      residual: relative residual of the normal equations at it, recomputed; a solve that ran out of
        steps, or of precision, shows here.
    """

    displacement: Array
    residual: Array


class ExpectedError(NamedTuple):
    """A mean squared distance from the truth.

    Attributes:
      total: expected squared error, summed over all values of the batch, in squared input units.
      standard_error: of `total`, from the spread of the probes; 0 for the dense method.
      residual: largest relative residual of the probes' solves; 0 for the dense method.
    """

    total: Array
    standard_error: Array
    residual: Array


def influence(
    model: Model,
    params: Params,
    batch: Batch,
    perturbation: PyTree,
    *,
    damping: Array | float = 0.0,
    num_steps: int = 1000,
    tolerance: float = 1e-6,
) -> Influence:
    """Predicted displacement of an inversion: `(J^T J + damping I)^-1 J^T delta`.

    The inversion influence function of Zhang et al. 2023, which is the norm of this, by conjugate
    gradients from zero (they descend on the same quadratic). Without damping a singular `J^T J`
    gives the displacement of least norm.

    Args:
      model: the model, differentiable twice at the batch.
      params: its parameters.
      batch: the truth: inputs `[B, ...]`, labels `[B]` or `[B, C]`.
      perturbation: `delta`, a tree like `params`: the defended gradient less `gradients.gradient`.
      damping: weight of the squared displacement in the attack's objective, not negative, in
        squared gradient units over squared input units.
      num_steps: iterations at most, each one product with `J` and one with `J^T`.
      tolerance: the iteration ends where it holds the relative residual of the normal equations to
        be below this.

    Returns:
      The displacement and its residual.

    Raises:
      ValueError: parameters unlike the model, a perturbation unlike them, a number out of range.
    """
    batch = checked_batch(model, params, batch)
    check_shapes("perturbation must have the shapes of params", params, perturbation)
    check_number("num_steps", num_steps, 1)
    check_number("damping", damping, 0.0)
    check_number("tolerance", tolerance, 0.0, 1.0, open_low=True)
    push, pull = _jacobian(model, params, batch)
    damping = jnp.asarray(damping, batch.inputs.dtype)

    def operator(inputs):
        return pull(push(inputs)) + damping * inputs

    return Influence(*solve(operator, pull(perturbation), num_steps, tolerance))


def lower_bound(
    model: Model,
    params: Params,
    batch: Batch,
    perturbation: PyTree,
    *,
    damping: Array | float = 0.0,
    num_steps: int = 64,
    key: Array | None = None,
) -> Array:
    """Lower bound on the displacement's norm: `||J^T delta|| / (lambda_max(J^T J) + damping)`.

    The bound of Zhang et al. 2023: one product instead of a solve, and one eigenvalue for all
    perturbations of a batch (a `vmap` over perturbations computes it once).

    Args:
      model: the model.
      params: its parameters.
      batch: the truth: inputs `[B, ...]`, labels `[B]` or `[B, C]`.
      perturbation: `delta`, a tree like `params`.
      damping: as in `influence`.
      num_steps: as in `largest_eigenvalue`, which says how far it overestimates.
      key: as there.

    Returns:
      A scalar, in input units; never above the norm of `influence`, but for rounding and a
      probability of 1e-6.

    Raises:
      ValueError: as `influence` and `largest_eigenvalue`.
    """
    batch = checked_batch(model, params, batch)
    check_shapes("perturbation must have the shapes of params", params, perturbation)
    check_number("num_steps", num_steps, 1)
    check_number("damping", damping, 0.0)
    gap = lanczos_gap(batch.inputs.size, num_steps)
    push, pull = _jacobian(model, params, batch)
    largest = largest_ritz_value(push, pull, batch.inputs, num_steps, key) / (1 - gap)
    slope = jnp.linalg.norm(pull(perturbation).ravel())
    return slope / (largest + jnp.asarray(damping, slope.dtype))


def largest_eigenvalue(
    model: Model, params: Params, batch: Batch, *, num_steps: int = 64, key: Array | None = None
) -> Array:
    """The largest eigenvalue of `J^T J`, from above.

    The largest Ritz value of `k` Lanczos steps with full reorthogonalisation lies below it. From a
    uniformly random start the relative gap exceeds `e` with probability at most
    `1.648 sqrt(d) exp(-(2 k - 1) sqrt(e))`, whatever the spectrum (Kuczyński and Woźniakowski
    1992), so the Ritz value is divided by `1 - e`, with the `e` of a probability of 1e-6. A
    Ritz value plus its residual would be closer but is no bound: it may have met the second eigenvalue.

    Args:
      model: the model.
      params: its parameters.
      batch: inputs `[B, ...]`, labels `[B]` or `[B, C]`.
      num_steps: Lanczos steps, each one product with `J` and one with `J^T`. The overestimate is
        at most 2.3 % for 64 steps and `d` up to 10,000; none but rounding for `d` steps and more.
      key: PRNG key of the start; a fixed one where `None`.

    Returns:
      A scalar, not below the largest eigenvalue but for that probability.

    Raises:
      ValueError: parameters unlike the model, or too few steps to bound anything.
    """
    batch = checked_batch(model, params, batch)
    check_number("num_steps", num_steps, 1)
    gap = lanczos_gap(batch.inputs.size, num_steps)
    push, pull = _jacobian(model, params, batch)
    return largest_ritz_value(push, pull, batch.inputs, num_steps, key) / (1 - gap)


def expected_squared_error(
    model: Model,
    params: Params,
    batch: Batch,
    std: Array | float,
    *,
    prior_covariance: Array | None = None,
    method: Literal["dense", "hutchinson"] = "dense",
    num_probes: int = 100,
    num_steps: int = 1000,
    tolerance: float = 1e-6,
    key: Array | None = None,
) -> ExpectedError:
    """Mean squared error under Gaussian noise: `std^2 tr (J^T J)^-1`.

    The mean square of `influence`, and the Cramér-Rao bound: no estimator that is unbiased around
    this batch has less. With a Gaussian prior of covariance `S` it is
    `std^2 tr (J^T J + std^2 S^-1)^-1`: exact for a gradient linear in the inputs, the Laplace
    approximation of the posterior at this batch otherwise. Its mean over the prior's batches is not
    below the van Trees bound, which takes the mean of `J^T J` before the inverse.

    Args:
      model: the model.
      params: its parameters.
      batch: the truth: inputs `[B, ...]`, labels `[B]` or `[B, C]`.
      std: standard deviation of the noise on every coordinate of the gradient, positive.
      prior_covariance: `[n, n]` covariance of the `n` values of one input; samples are independent.
        It may be singular. `None` is no prior.
      method: `dense` builds `J` column by column and takes its singular values, for `d` up to about
        2,000 (`d p` numbers are held); `hutchinson` estimates the trace from random signs.
      num_probes: of `hutchinson`, at least 2.
      num_steps: of `hutchinson`, conjugate gradient iterations of a probe at most.
      tolerance: of `hutchinson`, as in `influence`.
      key: of `hutchinson`, PRNG key of the probes; a fixed one where `None`.

    Returns:
      The total over the batch (`expected_psnr` gives decibels). Where the gradient does not
      determine the inputs and there is no prior, `dense` is infinite and `hutchinson` has a large residual.

    Raises:
      ValueError: parameters unlike the model, a number out of range, a covariance of another shape,
        not symmetric, or with negative eigenvalues.
    """
    batch = checked_batch(model, params, batch)
    check_number("num_steps", num_steps, 1)
    check_number("std", std, 0.0, open_low=True)
    check_number("tolerance", tolerance, 0.0, 1.0, open_low=True)
    check_count("num_probes", num_probes, 2)
    check_choice("method", method, ("dense", "hutchinson"))
    variance = jnp.square(jnp.asarray(std, batch.inputs.dtype))
    root = None if prior_covariance is None else _root(prior_covariance, batch.inputs)
    push, pull = _jacobian(model, params, batch)
    if method == "dense":
        total = _dense_trace(push, batch.inputs, variance, root)
        return ExpectedError(total, jnp.zeros_like(total), jnp.zeros_like(total))
    key = jax.random.key(0) if key is None else key
    probes = jax.random.rademacher(key, (num_probes, *batch.inputs.shape), batch.inputs.dtype)
    return ExpectedError(*probed_trace(push, pull, probes, variance, root, num_steps, tolerance))


def expected_psnr(error: Array | float, num_values: int, *, data_range: float = 1.0) -> Array:
    """The PSNR of a mean squared error; the mean PSNR of single reconstructions is not below it.

    Args:
      error: total expected squared error of a batch (`ExpectedError.total`).
      num_values: values of the batch that it is summed over, `batch.inputs.size`.
      data_range: difference of the largest and smallest possible input value.

    Returns:
      Decibels.

    Raises:
      ValueError: `num_values` below 1 or `data_range` not positive.
    """
    check_number("num_values", num_values, 1)
    check_number("data_range", data_range, 0.0, open_low=True)
    return 10 * jnp.log10(data_range**2 * num_values / error)


@at_full_precision
def _jacobian(model: Model, params: Params, batch: Batch) -> tuple[Callable, Callable]:
    """Products with `J` (from inputs to parameters) and with its transpose."""
    model = conv.for_matching(model)

    def loss(params, inputs):
        return model.loss(params, batch._replace(inputs=inputs))

    _, push = jax.linearize(lambda inputs: jax.grad(loss)(params, inputs), batch.inputs)
    # Second derivatives commute, so the transpose is forward over reverse too, and cheap on CPU.
    _, pull = jax.linearize(lambda params: jax.grad(loss, 1)(params, batch.inputs), params)
    return push, pull


def _root(covariance: Array, inputs: Array) -> Array:
    """`L` with `L L^T` the covariance of one input; a singular covariance has one too."""
    size = inputs[0].size
    if jnp.shape(covariance) != (size, size):
        raise ValueError(
            f"prior_covariance must have shape {(size, size)} for inputs of shape "
            f"{inputs.shape[1:]}, got {jnp.shape(covariance)}."
        )
    values, vectors = jnp.linalg.eigh(jnp.asarray(covariance, inputs.dtype))
    if not isinstance(values, jax.core.Tracer):
        given, scale = np.asarray(covariance), float(np.abs(values).max())
        if not np.allclose(given, given.T, atol=1e-4 * scale) or values[0] < -1e-4 * scale:
            raise ValueError(
                "prior_covariance must be symmetric without negative eigenvalues, got a smallest "
                f"eigenvalue of {values[0]} and an asymmetry of {np.abs(given - given.T).max()}."
            )
    return vectors * jnp.sqrt(jnp.maximum(values, 0))[None]


@at_full_precision
def _dense_trace(push: Callable, inputs: Array, variance: Array, root: Array | None) -> Array:
    """`variance tr (J^T J)^-1`, or `variance tr L (L^T J^T J L + variance I)^-1 L^T`."""
    one = jnp.eye(inputs[0].size, dtype=inputs.dtype) if root is None else root.T
    basis = jnp.kron(jnp.eye(inputs.shape[0], dtype=inputs.dtype), one)
    columns = conv.grouped_vmap(push)(basis.reshape(-1, *inputs.shape))
    leaves = [leaf.reshape(inputs.size, -1) for leaf in jax.tree.leaves(columns)]
    jacobian = jnp.concatenate(leaves, axis=1).T
    if root is None:
        return inverse_trace(jacobian, variance)
    _, values, vectors = jnp.linalg.svd(jnp.linalg.qr(jacobian, mode="r"), full_matrices=True)
    values = jnp.pad(values, (0, inputs.size - len(values)))
    weights = jnp.sum(jnp.square(vectors @ basis), axis=1)
    return variance * jnp.sum(weights / (jnp.square(values) + variance))


def checked_batch(model: Model, params: Params, batch: Batch) -> Batch:
    """A batch as arrays, where a model and its parameters can take it.

    Args:
      model: the model.
      params: its parameters.
      batch: inputs `[B, ...]`, labels as the model's loss takes them.

    Returns:
      The batch.

    Raises:
      ValueError: no samples, or parameters unlike the model.
    """
    inputs, labels = batch
    if jnp.ndim(inputs) < 2 or inputs.shape[0] == 0:
        raise ValueError(
            f"batch.inputs must be [B, ...] with B >= 1, got shape {jnp.shape(inputs)}."
        )
    check_params(model, params, inputs.shape[1:])
    return Batch(jnp.asarray(inputs), jnp.asarray(labels))
