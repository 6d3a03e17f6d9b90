"""A client's local training, simulated so that derivatives pass through it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from invjax import gradients
from invjax.base import Array, Batch, LocalTraining, Model, Params

# Unrolled, a simulation runs twice as fast on CPU; its compilation grows with its steps.
_UNROLLED = 16


def simulate(
    model: Model, params: Params, batch: Batch, local: LocalTraining, orders: Array | None = None
) -> Params:
    """`start - end` of local SGD, differentiable in inputs and soft labels (Dimitrov et al. 2022).

    `gradients.federated_update` with given orders, and with samples that may differ between epochs.

    Args:
      model: the model.
      params: the parameters that the server sent.
      batch: inputs `[N, ...]`, or `[E N, ...]`: a copy for every epoch, one after another; labels
        `[N]` or `[N, C]`.
      local: the round's public facts.
      orders: `[E, N]`: every epoch's samples in the order of its visits, a permutation of 0 to `N - 1`
        each; rising where `None`.

    Returns:
      The update, a tree like `params`.

    Raises:
      ValueError: inputs or orders that do not fit the local training; traced orders that are no
        permutations pass.
    """
    epochs, size, small = local.epochs, local.num_samples, local.batch_size
    if batch.inputs.shape[0] not in (size, epochs * size):
        raise ValueError(
            f"batch.inputs must hold local.num_samples = {size} samples, or a copy for each of "
            f"{epochs} epochs, got {batch.inputs.shape[0]}."
        )
    if orders is None:
        orders = jnp.tile(jnp.arange(size), (epochs, 1))
    else:
        _check_orders(orders, epochs, size)
        orders = jnp.asarray(orders)
    copies = by_epoch(batch.inputs, epochs) if batch.inputs.shape[0] > size else None
    unroll = local.num_steps <= _UNROLLED
    count, whole = size // small, size // small * small

    def step(params, samples):
        return _descend(params, gradients.gradient(model, params, samples), local), None

    def epoch(params, visit):
        copy, order = visit
        samples = Batch((batch.inputs if copy is None else copy)[order], batch.labels[order])
        full = jax.tree.map(lambda a: a[:whole].reshape((count, small) + a.shape[1:]), samples)
        params, _ = jax.lax.scan(step, params, full, unroll=unroll)
        if whole < size:
            params, _ = step(params, jax.tree.map(lambda a: a[whole:], samples))
        return params, None

    end, _ = jax.lax.scan(epoch, params, (copies, orders), unroll=unroll)
    return optax.tree.sub(params, end)


def simulate_shares(
    model: Model, params: Params, batch: Batch, local: LocalTraining, logits: Array
) -> Params:
    """`simulate` with mini-batches of weighted samples, whose shares are learned."""
    places = local.num_samples - np.arange(0, local.num_samples, local.batch_size)
    sizes = np.minimum(local.batch_size, places).astype(np.float32)[None, :, None]
    logits = logits.reshape(local.epochs, -1, local.num_samples)
    for _ in range(5):
        # Sinkhorn: as many samples as a mini-batch has, and in an epoch every sample once.
        logits = jax.nn.log_softmax(logits, axis=2) + np.log(sizes)
        logits = jax.nn.log_softmax(logits, axis=1)
    shares = (jnp.exp(logits) / sizes).reshape(-1, local.num_samples)

    def loss(params, weighted):
        samples, share = weighted
        single = jax.tree.map(lambda leaf: leaf[:, None], samples)
        return jnp.sum(share * jax.vmap(lambda sample: model.loss(params, sample))(single))

    oracle = gradients.gradient_oracle(loss)

    def step(params, share):
        return _descend(params, oracle(params, (batch, share)), local), None

    end, _ = jax.lax.scan(step, params, shares, unroll=local.num_steps <= _UNROLLED)
    return optax.tree.sub(params, end)


def by_epoch(copies: Array, epochs: int) -> Array:
    """Copies `[E N, ...]` of every epoch, one after another, as `[E, N, ...]`."""
    return copies.reshape((epochs, -1) + copies.shape[1:])


def _descend(params: Params, gradient: Params, local: LocalTraining) -> Params:
    return jax.tree.map(lambda p, g: p - local.learning_rate * g, params, gradient)


def _check_orders(orders: Array, epochs: int, size: int) -> None:
    if jnp.shape(orders) != (epochs, size):
        raise ValueError(
            f"orders must be [E, N] = [{epochs}, {size}], got shape {jnp.shape(orders)}."
        )
    traced = isinstance(orders, jax.core.Tracer)
    if not traced and (np.sort(np.asarray(orders), axis=1) != np.arange(size)).any():
        raise ValueError(f"orders must be permutations of 0 to {size - 1}, got {orders}.")
