"""How much every coordinate of a gradient tells of the inputs, and how much it is worth.

The optimal defences weigh these two against each other: `leakage` is `n_i = E |grad_x g_i|^2`, the
diagonal of `E J J^T` for the Jacobian `J` of the mean gradient in all inputs of a batch, and `energy`
is `q_i = E g_i^2`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from invjax import conv
from invjax.base import Array, Batch, Model, Params, PyTree
from invjax.checks import check_count
from invjax.defenses import ranking

CHUNK = 16
"""Directions that are pushed through the model together."""


class Sensitivity(NamedTuple):
    """What a gradient coordinate leaks and what it is worth to training.

    Attributes:
      leakage: tree like the parameters, `E |grad_x g_i|^2`, squared gradient over squared input units.
      energy: tree like the parameters, `E g_i^2`, squared gradient units.
    """

    leakage: PyTree
    energy: PyTree


def gradient_sensitivity(
    model: Model,
    params: Params,
    batch: Batch,
    *,
    num_probes: int | None = None,
    key: Array | None = None,
) -> Sensitivity:
    """Sensitivity of the mean gradient of one batch to its inputs.

    By forward mode: `|grad_x g_i|^2` is the sum of `(J e)_i^2` over the basis, or the mean of
    `(J v)_i^2` over Gaussian `v`, which has no bias and a relative deviation of `sqrt(2 / S)` for
    `S` probes (Chen et al. 2024, whose code takes 10).

    Args:
      model: the model, differentiable twice at the batch.
      params: its parameters.
      batch: inputs `[B, ...]`, labels.
      num_probes: Gaussian probes; `None` takes the whole basis, one product with `J` an input value.
      key: PRNG key of the probes; a fixed one where `None`.

    Returns:
      Leakage and energy at this batch.

    Raises:
      ValueError: fewer than one probe.
    """
    push, gradient = _linearized(model, params, batch)
    energy = jax.tree.map(jnp.square, gradient)
    inputs = batch.inputs
    if num_probes is None:
        basis = jnp.eye(inputs.size, dtype=inputs.dtype)
        return Sensitivity(
            _sum_of_squares(push, basis.reshape(-1, *inputs.shape), gradient), energy
        )
    check_count("num_probes", num_probes, 1)
    key = jax.random.key(0) if key is None else key
    probes = jax.random.normal(key, (num_probes, *inputs.shape), inputs.dtype)
    total = _sum_of_squares(push, probes, gradient)
    return Sensitivity(jax.tree.map(lambda leaf: leaf / num_probes, total), energy)


def population_sensitivity(
    model: Model,
    params: Params,
    batches: Batch,
    *,
    num_probes: int | None = None,
    key: Array | None = None,
) -> Sensitivity:
    """Sensitivity averaged over batches: of auxiliary data, it depends on no private batch.

    Args:
      model: the model.
      params: its parameters.
      batches: inputs `[V, B, ...]`, labels `[V, B]`; `B` as in training.
      num_probes: as in `gradient_sensitivity`, for every batch.
      key: as there; every batch draws its own.

    Returns:
      Mean leakage and mean energy.

    Raises:
      ValueError: fewer than one probe.
    """
    key = jax.random.key(0) if key is None else key
    number = batches.inputs.shape[0]

    def one(batch_and_key):
        batch, key = batch_and_key
        return gradient_sensitivity(model, params, batch, num_probes=num_probes, key=key)

    def add(total, batch_and_key):
        return jax.tree.map(jnp.add, total, one(batch_and_key)), None

    sequence = (batches, jax.random.split(key, number))
    first = jax.eval_shape(one, jax.tree.map(lambda leaf: leaf[0], sequence))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)
    total, _ = jax.lax.scan(add, zeros, sequence)
    return jax.tree.map(lambda leaf: leaf / number, total)


def pool_tensors(sensitivity: Sensitivity) -> Sensitivity:
    """The layer-wise form: every coordinate gets the mean of its tensor.

    The ratio of leakage to energy is then that of the Frobenius norms of the tensor's Jacobian and
    of its gradient.

    Args:
      sensitivity: by coordinate.

    Returns:
      The same tree, constant on every tensor.
    """
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, leaf.mean()), sensitivity)


def ratio(sensitivity: Sensitivity, floor: float = 1e-8, cap: float = 1e6) -> PyTree:
    """`sqrt(n_i / q_i)`: leakage for every unit of gradient (Chen et al. 2024).

    Args:
      sensitivity: by coordinate or by tensor.
      floor: least `sqrt(q_i)`, in gradient units.
      cap: largest ratio.

    Returns:
      A tree like the parameters, one over input units; 0 where nothing leaks.
    """

    def leaf(leakage, energy):
        return jnp.minimum(jnp.sqrt(leakage) / jnp.maximum(jnp.sqrt(energy), floor), cap)

    return jax.tree.map(leaf, sensitivity.leakage, sensitivity.energy)


def scaled_to(sensitivity: Sensitivity, scale: Array | float, floor: float = 1e-8) -> PyTree:
    """Deviations proportional to `(n_i / q_i)^(1/4)`, of a given root mean square.

    Args:
      sensitivity: of every coordinate.
      scale: root mean square over all coordinates.
      floor: as in `ratio`.

    Returns:
      A tree like the parameters; equal everywhere where nothing leaks at all.
    """
    ratios = ratio(sensitivity, floor)
    size = sum(leaf.size for leaf in jax.tree.leaves(ratios))
    mean = jnp.asarray(optax.tree.sum(ratios)) / size

    def leaf(value):
        share = jnp.where(mean > 0, value / jnp.where(mean > 0, mean, 1.0), 1.0)
        return jnp.asarray(scale, value.dtype) * jnp.sqrt(share)

    return jax.tree.map(leaf, ratios)


def keep_telling_least(sensitivity: Sensitivity, fraction: Array | float) -> PyTree:
    """All coordinates but the `floor(fraction * size)` of the largest `n_i / q_i`.

    Args:
      sensitivity: of every coordinate.
      fraction: share to leave out, in [0, 1).

    Returns:
      A tree of booleans. Of equals the last go first.
    """
    leaves, treedef = jax.tree.flatten(ratio(sensitivity, floor=1e-30, cap=math.inf))
    values = jnp.concatenate([leaf.ravel() for leaf in leaves])
    kept = ranking.smallest(values, values.size - jnp.floor(fraction * values.size).astype(int))
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
    parts = jnp.split(kept, ends)
    shaped = [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(treedef, shaped)


def _linearized(model: Model, params: Params, batch: Batch) -> tuple[Callable, PyTree]:
    """Products with `J`, and the gradient."""
    model = conv.for_matching(model)

    def gradient(inputs):
        # The oracle of `gradients` has no forward mode.
        return jax.grad(model.loss)(params, batch._replace(inputs=inputs))

    value, push = jax.linearize(gradient, batch.inputs)
    return push, value


def _sum_of_squares(push: Callable, directions: Array, like: PyTree) -> PyTree:
    """`sum_s (J v_s)^2`, a tree like the gradient, holding a few `J v_s` at a time."""
    number = directions.shape[0]
    size = min(CHUNK, number)
    chunks = math.ceil(number / size)
    # Zero directions add nothing.
    padded = jnp.pad(directions, [(0, chunks * size - number)] + [(0, 0)] * (directions.ndim - 1))

    def add(total, chunk):
        pushed = jax.vmap(push)(chunk)
        return jax.tree.map(lambda t, p: t + jnp.sum(p**2, axis=0), total, pushed), None

    zeros = jax.tree.map(jnp.zeros_like, like)
    return jax.lax.scan(add, zeros, padded.reshape(chunks, size, *directions.shape[1:]))[0]
