"""Inversion of a known deterministic training, by least squares on the released weights."""

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from invjax.attacks.analytic.feature_inversion import minimize
from invjax.attacks.informed.training import Train
from invjax.base import Array, Batch, Bound, Params, Reconstruction
from invjax.checks import check_count, check_number, check_shapes
from invjax.ranges import check_range, flat_bounds


def unrolled(
    train: Train,
    released: Params,
    known: Batch,
    pool: Batch,
    *,
    num_classes: int,
    label: Array | int | None = None,
    input_range: tuple[Bound, Bound] | None = None,
    num_steps: int = 20,
    tolerance: float = 0.5,
    at_once: int = 1,
) -> Reconstruction:
    """The record that, trained on with the known ones, gives the released weights.

    Where initialisation, order and everything else about training are known, the weights are a function
    `F` of the missing record. For every label `|F(x) - released|^2` is minimised by Levenberg-Marquardt from
    the mean of that class, and the label of the least residual wins. An extension of the informed
    adversary of Balle et al. 2022 that needs no shadow models. Against a smooth network it is exact to
    rounding, and behind Gaussian noise on the weights it attains the Cramér-Rao bound; the kinks of
    ReLU slow it down.

    It may be jitted, and vmapped over victims. It computes in the types of its arguments: it is float64
    (inside `jax.enable_x64`, with all that `train` closes over) that makes it exact.

    Args:
      train: `train(batch) -> params`, deterministic, and differentiable in forward mode in the inputs; the
        record sought is the batch's last.
      released: the weights, a tree like those of `train`.
      known: all records but one: inputs `[n - 1, ...]`, integer labels `[n - 1]`.
      pool: records like it, for the class means: inputs `[m, ...]`, integer labels `[m]`. A class that it
        lacks starts from the mean of all.
      num_classes: number of classes.
      label: the target's, where it is known; it spares the other searches.
      input_range: lowest and highest value of an input, each a number or one per channel: a box for the
        search. Any values where `None`; behind noise only then unbiased.
      num_steps: Levenberg-Marquardt steps, each some `d + 3` times the work of a training.
      tolerance: the record counts as found where the residual is at most this share of what the start
        leaves.
      at_once: labels that are searched together; more is faster and takes more memory.

    Returns:
      One record. The objective is its residual `|F(x) - released|`. `diagnostics` holds for the labels tried
      `labels [C]`, `residuals [C]` and `candidates [C, ...]`; and `information [d, d]`, the Fisher
      information `J^T J` about the record behind noise of unit variance on the weights: noise of variance
      `s^2` costs every unbiased attack a mean squared error of `s^2 tr information^-1 / d`.

    Raises:
      ValueError: records of different shapes, weights unlike those of `train`, a number or a box out of
        range.
      TypeError: known inputs that are not floats.
    """
    check_count("num_classes", num_classes, 1)
    check_count("num_steps", num_steps, 1)
    check_number("tolerance", tolerance, 0.0)
    check_count("at_once", at_once, 1)
    if label is not None:
        check_number("label", label, 0, num_classes - 1)
    if not jnp.issubdtype(known.inputs.dtype, jnp.floating):
        raise TypeError(f"known.inputs must be floating point, got {known.inputs.dtype}.")
    if input_range is not None:
        check_range(input_range)
    shape = known.inputs.shape[1:]
    if pool.inputs.shape[1:] != shape or not len(pool.inputs):
        raise ValueError(
            f"pool must hold records of the known ones' shape {shape}, got inputs {pool.inputs.shape}."
        )

    def batch_with(flat, label):
        record = flat.reshape(1, *shape).astype(known.inputs.dtype)
        labels = jnp.concatenate([known.labels, jnp.asarray(label, known.labels.dtype)[None]])
        return Batch(jnp.concatenate([known.inputs, record]), labels)

    starts = _class_means(pool, num_classes).astype(known.inputs.dtype)
    _check_weights(train, released, batch_with(starts[0], 0))
    target = ravel_pytree(released)[0]
    box = (-jnp.inf, jnp.inf) if input_range is None else input_range
    low, high = flat_bounds(box, shape, starts.dtype)

    def misfit(flat, label):
        return ravel_pytree(train(batch_with(flat, label)))[0] - target

    def search(label):
        start = jnp.clip(starts[label], low, high)
        # The helper's weights, of terms that there are none of.
        weights = jnp.zeros(num_steps, start.dtype)
        found, squared = minimize(lambda flat, _: misfit(flat, label), start, low, high, weights)
        return found, jnp.sqrt(squared), jnp.linalg.norm(misfit(start, label))

    tried = jnp.arange(num_classes) if label is None else jnp.asarray(label)[None]
    with jax.default_matmul_precision("highest"):
        found, residuals, before = jax.lax.map(search, tried, batch_size=min(at_once, len(tried)))
        best = jnp.argmin(jnp.where(jnp.isfinite(residuals), residuals, jnp.inf))
        flat, residual = found[best], residuals[best]
        jacobian = jax.jacfwd(misfit)(flat, tried[best])
        information = jacobian.T @ jacobian
    good = jnp.isfinite(residual) & (residual <= tolerance * before[best])
    return Reconstruction(
        inputs=flat.reshape(1, *shape),
        labels=tried[best][None],
        found=good[None],
        objective=residual,
        diagnostics={
            "labels": tried,
            "residuals": residuals,
            "candidates": found.reshape(-1, *shape),
            "information": information,
        },
    )


def _class_means(pool: Batch, num_classes: int) -> Array:
    """`[C, d]`; the mean of all for a class of none."""
    inputs = jnp.asarray(pool.inputs).reshape(len(pool.inputs), -1)
    members = jax.nn.one_hot(pool.labels, num_classes, dtype=inputs.dtype)
    counts = members.sum(axis=0)[:, None]
    means = members.T @ inputs / jnp.where(counts > 0, counts, 1.0)
    return jnp.where(counts > 0, means, inputs.mean(axis=0, keepdims=True))


def _check_weights(train: Train, released: Params, batch: Batch) -> None:
    shapes = jax.eval_shape(train, batch)
    check_shapes("released must be weights as train returns them", shapes, released)
