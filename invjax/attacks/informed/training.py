"""The training that victims and shadow models share: one pure function of a key and the data."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from invjax import conv
from invjax.base import Array, Batch, Defense, Model, Params
from invjax.checks import check_count

Training = Callable[..., Params]
"""`training(key, batch, target=None) -> params`."""

Train = Callable[[Batch], Params]
"""A deterministic training procedure, with everything but the data closed over."""


def training(
    model: Model,
    optimizer: optax.GradientTransformation,
    steps: int,
    *,
    params: Params | None = None,
    batch_size: int | None = None,
    order: Array | None = None,
    defense: Defense | None = None,
) -> Training:
    """A training procedure that may be jitted, vmapped over keys and data, and differentiated.

    What is not fixed here is drawn from the key of the call: the initial weights, the order of
    mini-batches, the noise of a defence. With weights that are given, full batches and no noise the
    key decides nothing: the default threat model of Balle, Cherubin and Hayes (2022), and the one
    in which the attack of `reconstructor` works.

    Mini-batches run through one fresh order of all samples after another, and over the ends of
    passes: every sample is seen equally often, to within one step.

    Args:
      model: the model.
      optimizer: behind the defence.
      steps: optimizer steps.
      params: initial weights, known to all; drawn by `model.init` where `None`.
      batch_size: samples of a step; all of them where `None`.
      order: a PRNG key that fixes the order of mini-batches; drawn where `None`.
      defense: what every gradient goes through; `defenses.dp_sgd` makes this DP-SGD.

    Returns:
      `training(key, batch, target=None) -> params`. A target is one more batch, trained on as though
      appended to `batch`. Given apart, a `vmap` over targets shares the products with `batch`,
      which for full batches without a defence is several times faster on wide inputs.

    Raises:
      ValueError: a number out of range, or an order of nothing; in the call, a batch of fewer
        samples than a step takes.
    """
    check_count("steps", steps, 1)
    if batch_size is not None:
        check_count("batch_size", batch_size, 1)
    elif order is not None:
        raise ValueError("order is that of mini-batches, got one without a batch_size.")
    # Convolutions of a compiled loop.
    model = conv.for_matching(model)
    together = defense is None and batch_size is None

    def run(key: Array, batch: Batch, target: Batch | None = None) -> Params:
        if target is not None and not together:
            batch, target = join(batch, target), None
        size = len(batch.labels)
        if batch_size is not None and batch_size > size:
            raise ValueError(f"batch_size must be at most the {size} samples, got {batch_size}.")
        start = params
        if start is None:
            start = model.init(jax.random.fold_in(key, 0), batch.inputs.shape[1:])
        picks = None
        if batch_size is not None:
            drawn = jax.random.fold_in(key, 1) if order is None else order
            picks = _order(drawn, steps, batch_size, size)
        state: tuple = ()
        if defense is not None:
            state = defense.init_with_key(jax.random.fold_in(key, 2), start)

        def step(carry, picks):
            params, optimizer_state, state = carry
            part = batch if picks is None else jax.tree.map(lambda leaf: leaf[picks], batch)
            if defense is None:
                gradient = _mean_gradient(model, params, part, target)
            else:
                part, state = defense.prepare(part, state, params)
                take = _per_sample if defense.stage == "per_sample" else _mean_gradient
                gradient, state = defense.update(take(model, params, part), state, params)
            updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
            return (optax.apply_updates(params, updates), optimizer_state, state), None

        carry = (start, optimizer.init(start), state)
        return jax.lax.scan(step, carry, picks, length=steps)[0][0]

    return run


def deterministic(procedure: Training, key: Array | None = None) -> Train:
    """A training procedure as a function of the data alone.

    Args:
      procedure: of `training`.
      key: what it draws from, if it draws: an adversary who is told the seed; any where `None`.

    Returns:
      `train(batch) -> params`.
    """

    def train(batch: Batch) -> Params:
        return procedure(jax.random.key(0) if key is None else key, batch)

    return train


def join(*batches: Batch) -> Batch:
    """Batches one after another.

    Args:
      *batches: of one input shape.

    Returns:
      One batch.
    """
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *batches)


def _order(key: Array, steps: int, batch_size: int, size: int) -> Array:
    """Indices of every step's samples, `[steps, batch_size]`."""
    passes = jax.random.split(key, -(-steps * batch_size // size))
    orders = jax.vmap(lambda key: jax.random.permutation(key, size))(passes)
    return orders.reshape(-1)[: steps * batch_size].reshape(steps, batch_size)


# Not the oracle of `gradients`, which could not be differentiated forward.
def _mean_gradient(
    model: Model, params: Params, batch: Batch, target: Batch | None = None
) -> Params:
    def loss(params):
        if target is None:
            return model.loss(params, batch)
        parts = [(len(part.labels), model.loss(params, part)) for part in (batch, target)]
        return sum(size * value for size, value in parts) / sum(size for size, _ in parts)

    return jax.grad(loss)(params)


def _per_sample(model: Model, params: Params, batch: Batch) -> Params:
    def one(sample):
        return jax.grad(model.loss)(params, jax.tree.map(lambda leaf: leaf[None], sample))

    return jax.vmap(one)(batch)
