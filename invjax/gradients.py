"""What leaves the client: per-sample and mean gradients, clipped sums, federated updates.

Everything here is a pure function of a model's loss. Gradients that an attack will differentiate
again go through the oracle, whose derivative is taken forward over reverse.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from invjax.base import Array, Batch, LocalTraining, Model, Params, PyTree


def _is_smooth(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def gradient_oracle(loss: Callable[..., Array]) -> Callable[[Params, PyTree], Params]:
    """Gradient of `loss` in its parameters, cheap to differentiate once more.

    `g(params, data) = grad_params loss(params, data)` as a `custom_vjp`: its backward pass applies
    the linearised map of `params -> grad_{params, data} loss` to the cotangent. The Hessian of a
    scalar is symmetric, so this is exact for the parameters and for the data, and it spares XLA
    the reverse-over-reverse form, which multiplies padding on CPU.

    Args:
      loss: `loss(params, data) -> scalar`. Integer leaves of `data` are held fixed.

    Returns:
      `g(params, data)`, a tree like `params`. It has a first derivative (reverse mode) and no second.
    """

    @jax.custom_vjp
    def oracle(params, data):
        return jax.grad(loss)(params, data)

    def forward(params, data):
        leaves, treedef = jax.tree.flatten(data)
        smooth = [leaf if _is_smooth(leaf) else None for leaf in leaves]

        def gradients(params):
            def with_smooth(params, smooth):
                merged = [
                    leaf if value is None else value
                    for leaf, value in zip(leaves, smooth, strict=True)
                ]
                return loss(params, jax.tree.unflatten(treedef, merged))

            return jax.grad(with_smooth, argnums=(0, 1))(params, smooth)

        (gradient, _), linear = jax.linearize(gradients, params)
        return gradient, (linear, jax.tree.unflatten(treedef, [None] * len(leaves)))

    def backward(residuals, cotangent):
        linear, skeleton = residuals
        params_cotangent, data_cotangents = linear(cotangent)
        treedef = jax.tree.structure(skeleton, is_leaf=lambda leaf: leaf is None)
        return params_cotangent, jax.tree.unflatten(treedef, data_cotangents)

    oracle.defvjp(forward, backward)
    return oracle


def absolute(x: Array) -> Array:
    """`|x|` whose derivative at 0 is 0, in the middle of its subgradients; that of `jnp.abs` is 1 there.

    Exact zeros are common: neighbours that the box has clipped, entries of a gradient that no sample
    touches. With 1 the terms of a total variation pull such pixels, and an L1 distance such entries.

    Args:
      x: any shape.

    Returns:
      Its shape.
    """
    return x * jax.lax.stop_gradient(jnp.sign(x))


def gradient(model: Model, params: Params, batch: Batch) -> Params:
    """Mean gradient of a batch, differentiable in the parameters, the inputs and soft labels.

    Args:
      model: the model.
      params: its parameters.
      batch: inputs `[B, ...]`, labels `[B]` or `[B, C]`.

    Returns:
      `grad_params` of the mean loss, a tree like `params`.
    """
    return gradient_oracle(model.loss)(params, batch)


def per_sample_gradients(model: Model, params: Params, batch: Batch) -> Params:
    """Gradient of every sample's own loss, by `vmap`; differentiable like `gradient`.

    Args:
      model: the model.
      params: its parameters.
      batch: inputs `[B, ...]`, labels `[B]` or `[B, C]`.

    Returns:
      A tree like `params` whose leaves carry a leading sample axis `B`.
    """
    oracle = gradient_oracle(model.loss)

    def one(sample):
        return oracle(params, jax.tree.map(lambda leaf: leaf[None], sample))

    return jax.vmap(one)(batch)


def clip_scale(gradients: PyTree, clip_norm: Array | float) -> Array:
    """Factors that bring per-sample gradients into a ball: `min(1, clip_norm / norm)`.

    Args:
      gradients: per-sample gradients, leaves `[B, ...]`.
      clip_norm: L2 radius over all parameters together, positive.

    Returns:
      `[B]` factors, of single precision at least; 1 for a zero gradient.
    """

    def square(leaf: Array) -> Array:
        # A square of half precision overflows at 256.
        wide = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
        return jnp.sum(jnp.square(wide), axis=tuple(range(1, leaf.ndim)))

    squared = sum(map(square, jax.tree.leaves(gradients)))
    # The double where keeps the derivative at a zero gradient finite.
    outside = squared > clip_norm**2
    return jnp.where(outside, clip_norm / jnp.sqrt(jnp.where(outside, squared, 1.0)), 1.0)


def scale_samples(gradients: PyTree, scale: Array) -> PyTree:
    """Multiply every sample's gradient by its own factor.

    Args:
      gradients: per-sample gradients, leaves `[B, ...]`.
      scale: `[B]` factors.

    Returns:
      The scaled tree.
    """
    return jax.tree.map(
        lambda leaf: leaf * scale.reshape((-1,) + (1,) * (leaf.ndim - 1)), gradients
    )


def sum_samples(gradients: PyTree) -> PyTree:
    """Sum of per-sample gradients.

    As a product with ones: XLA's CPU lowering of `sum(axis=0)` over the outer products of a dense
    layer is many times slower.

    Args:
      gradients: per-sample gradients, leaves `[B, ...]`.

    Returns:
      A tree without the sample axis.
    """

    def total(leaf):
        ones = jnp.ones(leaf.shape[0], leaf.dtype)
        return jnp.tensordot(ones, leaf, 1, precision=jax.lax.Precision.HIGHEST)

    return jax.tree.map(total, gradients)


def mean_samples(gradients: PyTree) -> PyTree:
    """Mean of per-sample gradients; see `sum_samples`.

    Args:
      gradients: per-sample gradients, leaves `[B, ...]`.

    Returns:
      A tree without the sample axis.
    """
    return jax.tree.map(
        lambda leaf, total: total / leaf.shape[0], gradients, sum_samples(gradients)
    )


def clipped_sum(
    model: Model,
    params: Params,
    batch: Batch,
    clip_norm: float,
    microbatch_size: int | None = None,
) -> Params:
    """Sum of per-sample gradients, each clipped to `clip_norm` (Abadi et al. 2016, algorithm 1).

    Args:
      model: the model.
      params: its parameters.
      batch: inputs `[B, ...]`, labels `[B]` or `[B, C]`.
      clip_norm: L2 radius over all parameters together, positive.
      microbatch_size: samples whose gradients are held at once, a divisor of `B`; `None` holds
        all. Less memory, and on CPU much slower with convolutions: a knob for accelerators.

    Returns:
      A tree like `params`.

    Raises:
      ValueError: `clip_norm` is not positive, or `microbatch_size` does not divide `B`.
    """
    if not clip_norm > 0:
        raise ValueError(f"clip_norm must be positive, got {clip_norm}.")

    def clipped(batch: Batch) -> Params:
        gradients = per_sample_gradients(model, params, batch)
        total = sum_samples(scale_samples(gradients, clip_scale(gradients, clip_norm)))
        return jax.tree.map(lambda leaf, param: leaf.astype(param.dtype), total, params)

    size = batch.inputs.shape[0]
    if microbatch_size is None or microbatch_size == size:
        return clipped(batch)
    if microbatch_size <= 0 or size % microbatch_size:
        raise ValueError(
            f"microbatch_size must divide the batch of {size} samples, got {microbatch_size}."
        )
    chunks = jax.tree.map(lambda leaf: leaf.reshape((-1, microbatch_size) + leaf.shape[1:]), batch)

    def accumulate(total, chunk):
        return jax.tree.map(jnp.add, total, clipped(chunk)), None

    total, _ = jax.lax.scan(accumulate, jax.tree.map(jnp.zeros_like, params), chunks)
    return total


def federated_update(
    key: Array,
    model: Model,
    params: Params,
    batch: Batch,
    local: LocalTraining,
    optimizer: optax.GradientTransformation | None = None,
) -> Params:
    """What a federated client sends: `start - end` of E epochs of mini-batch training.

    Every epoch visits the samples in a fresh random order; a last short mini-batch is kept.

    Args:
      key: PRNG key of the orders; the server does not know it.
      model: the model.
      params: the parameters that the server sent.
      batch: the client's samples, `local.num_samples` of them.
      local: epochs, mini-batch size, learning rate: the round's public facts.
      optimizer: the client's optimizer, which `local.optimizer` should name; plain SGD at
        `local.learning_rate` by default.

    Returns:
      The update, a tree like `params`.

    Raises:
      ValueError: the batch does not hold `local.num_samples` samples, or `local.optimizer` names
        another optimizer than SGD and none is given.
    """
    size = batch.inputs.shape[0]
    if size != local.num_samples:
        raise ValueError(
            f"local.num_samples is {local.num_samples}, but the batch holds {size} samples."
        )
    if optimizer is None:
        if local.optimizer != "sgd":
            raise ValueError(f"local.optimizer is {local.optimizer!r}: give it as optimizer.")
        optimizer = optax.sgd(local.learning_rate)

    @jax.jit
    def train(params, state, mini_batch):
        updates, state = optimizer.update(gradient(model, params, mini_batch), state, params)
        return optax.apply_updates(params, updates), state

    end, state = params, optimizer.init(params)
    for epoch in range(local.epochs):
        order = jax.random.permutation(jax.random.fold_in(key, epoch), size)
        for start in range(0, size, local.batch_size):
            chosen = order[start : start + local.batch_size]
            end, state = train(end, state, jax.tree.map(lambda leaf, i=chosen: leaf[i], batch))
    chex.assert_trees_all_equal_shapes(end, params)
    return optax.tree.sub(params, end)
