"""From released weights to the record that they were trained on, learned from shadow models."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg

from invjax import metrics
from invjax.attacks.informed.decoders import Decoder, dense_decoder
from invjax.base import Array, Params
from invjax.checks import check_count, check_number
from invjax.ranges import check_range

Reconstruct = Callable[[Params], Array]
"""`reconstruct(released) -> inputs [...]`, of one model's weights; `vmap` it over many."""

STRENGTHS = tuple(np.logspace(-2, 6, 17))


class Scaler(NamedTuple):
    """What brings features to mean 0 and deviation 1 over the shadows.

    Attributes:
      mean: `[p]` means.
      scale: `[p]` deviations.
    """

    mean: Array
    scale: Array


def features(params: Params, parts: Sequence[str] | None = None) -> Array:
    """Released weights as one vector.

    Args:
      params: one model's.
      parts: which of them: keys on the way to a leaf (`"layer01"`, `"bias"`), or several joined by
        slashes (`"layer02/kernel"`); all where `None`.

    Returns:
      `[p]`.

    Raises:
      ValueError: parts that no leaf has.
    """
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    wanted = [True] * len(names)
    if parts is not None:
        for part in parts:
            if not any(f"/{part}/" in f"/{name}/" for name in names):
                raise ValueError(f"parts must be among those of {', '.join(names)}, got {part!r}.")
        wanted = [any(f"/{part}/" in f"/{name}/" for part in parts) for name in names]
    chosen = [jnp.ravel(leaf) for (_, leaf), want in zip(leaves, wanted, strict=True) if want]
    if not chosen:
        raise ValueError(f"parts must name some of {', '.join(names)}, got {parts!r}.")
    return jnp.concatenate(chosen)


def ridge(
    shadows: Params,
    inputs: Array,
    *,
    strength: float | None = None,
    parts: Sequence[str] | None = None,
    input_range: tuple[float, float] = (0.0, 1.0),
) -> Reconstruct:
    """A linear reconstructor in closed form: ridge regression of the records on standardised weights.

    Not published, and a strong baseline: one record moves the weights almost linearly. Host code, in
    the smaller of the numbers of weights (primal) and shadows (dual).

    Args:
      shadows: their parameters, stacked `[N, ...]`.
      inputs: `[N, ...]`, the record of each.
      strength: of the penalty on standardised weights, positive; where `None` that of `STRENGTHS`
        with the least leave-one-out error.
      parts: which weights, as in `features`.
      input_range: lowest and highest value, to which results are clipped.

    Returns:
      The reconstructor.

    Raises:
      ValueError: shadows and inputs of different numbers, a strength that is not positive, unknown
        parts, a range whose lowest value is not below its highest.
    """
    if strength is not None:
        check_number("strength", strength, 0.0, open_low=True)
    scaler, scaled, records = _prepare(shadows, inputs, parts, input_range)
    flat, shape = records.reshape(len(records), -1).astype(np.float64), records.shape[1:]
    strengths = STRENGTHS if strength is None else (strength,)
    found = _regression(scaled.astype(np.float64), flat, strengths, input_range)
    weights, intercept = (jnp.asarray(part, scaler.mean.dtype) for part in (found, flat.mean(0)))

    def reconstruct(released: Params) -> Array:
        flat = _scaled(scaler, features(released, parts)) @ weights + intercept
        return jnp.clip(flat, *input_range).reshape(shape)

    return reconstruct


def _regression(
    x: np.ndarray, y: np.ndarray, strengths: Sequence[float], input_range: tuple[float, float]
) -> np.ndarray:
    """`(x'x + a)^-1 x'y` for centred `x`, `[p, d]`, with the `a` of least leave-one-out error."""
    dual = len(x) <= x.shape[1]
    values, vectors = scipy.linalg.eigh(x @ x.T if dual else x.T @ x)
    kept = values > len(x) * np.finfo(float).eps * values[-1]
    values, vectors = values[kept], vectors[:, kept]
    left = vectors if dual else x @ vectors / np.sqrt(values)
    seen = left.T @ y

    def left_out(strength):
        shrink = values / (values + strength)
        # What a sample weighs in its own fit; the mean is fitted too.
        leverage = 1 / len(x) + np.square(left) @ shrink
        fitted = y.mean(axis=0) + left @ (shrink[:, None] * seen)
        predicted = y - (y - fitted) / (1 - leverage)[:, None]
        # Clipped as results are, which spares a weak penalty its worst.
        return np.square(np.clip(predicted, *input_range) - y).sum()

    best = strengths[0] if len(strengths) == 1 else min(strengths, key=left_out)
    scale = (np.sqrt(values) / (values + best))[:, None]
    right = x.T @ left / np.sqrt(values) if dual else vectors
    return right @ (scale * seen)


def absolute_and_squared(found: Array, truth: Array) -> Array:
    """The loss of Balle et al. 2022: mean absolute plus mean squared error.

    Args:
      found: reconstructed values.
      truth: of the same shape.

    Returns:
      A scalar, the means over all values.
    """
    error = found - truth
    return jnp.mean(jnp.abs(error)) + jnp.mean(jnp.square(error))


def network(
    key: Array,
    shadows: Params,
    inputs: Array,
    *,
    decoder: Decoder | None = None,
    optimizer: optax.GradientTransformation | None = None,
    loss: Callable[[Array, Array], Array] = absolute_and_squared,
    batch_size: int = 32,
    epochs: int = 200,
    parts: Sequence[str] | None = None,
    input_range: tuple[float, float] = (0.0, 1.0),
    on_epoch: Callable[[int, float, Reconstruct], None] | None = None,
) -> Reconstruct:
    """The reconstructor network (RecoNN) of Balle, Cherubin and Hayes 2022.

    The defaults are those of the authors' notebook for MNIST. Weights are standardised by the shadows alone,
    and the last short mini-batch of an epoch is left out. Host code around one compiled epoch.

    Args:
      key: a PRNG key.
      shadows: their parameters, stacked `[N, ...]`.
      inputs: `[N, ...]`, the record of each.
      decoder: the network; `dense_decoder` of two layers of 1000 where `None`.
      optimizer: RMSProp at 3e-4 where `None`.
      loss: `loss(found [B, ...], truth [B, ...]) -> scalar`.
      batch_size: shadows of a step.
      epochs: passes over the shadows.
      parts: which weights, as in `features`.
      input_range: lowest and highest value of the inputs, which the decoder's are scaled to.
      on_epoch: `on_epoch(epoch, loss, reconstruct)`, after every epoch, with its mean loss; what it
        raises ends the training.

    Returns:
      The reconstructor.

    Raises:
      ValueError: shadows and inputs of different numbers, a number below 1, unknown parts, a range
        whose lowest value is not below its highest.
    """
    check_count("batch_size", batch_size, 1)
    check_count("epochs", epochs, 1)
    scaler, scaled, records = _prepare(shadows, inputs, parts, input_range)
    decoder = dense_decoder(records.shape[1:]) if decoder is None else decoder
    optimizer = optax.rmsprop(3e-4) if optimizer is None else optimizer
    size = min(batch_size, len(records))
    steps = len(records) // size
    low, high = input_range

    def decode(weights, scaled):
        return low + (high - low) * decoder.apply(weights, scaled)

    # What the epoch reads is an argument: as constants of the program the data would be copied.
    @jax.jit
    def epoch(carry, key, scaled, records):
        def step(carry, picks):
            weights, state = carry
            value, gradient = jax.value_and_grad(
                lambda weights: loss(decode(weights, scaled[picks]), records[picks])
            )(weights)
            updates, state = optimizer.update(gradient, state, weights)
            return (optax.apply_updates(weights, updates), state), value

        order = jax.random.permutation(key, len(records))[: steps * size].reshape(steps, size)
        carry, values = jax.lax.scan(step, carry, order)
        return carry, values.mean()

    apply = jax.jit(decode)

    def reconstructor(weights) -> Reconstruct:
        def reconstruct(released: Params) -> Array:
            return apply(weights, _scaled(scaler, features(released, parts))[None])[0]

        return reconstruct

    weights = jax.jit(decoder.init, static_argnums=1)(jax.random.fold_in(key, 0), scaled.shape[1])
    carry = (weights, optimizer.init(weights))
    scaled, records = jnp.asarray(scaled), jnp.asarray(records)
    for index in range(epochs):
        carry, value = epoch(carry, jax.random.fold_in(key, 1 + index), scaled, records)
        if on_epoch is not None:
            on_epoch(index, float(value), reconstructor(carry[0]))
    return reconstructor(carry[0])


class Score(NamedTuple):
    """How reconstructions do against who only looks into what the adversary holds.

    Attributes:
      mse: `[B]`, squared input units.
      nearest: `[B]`, of every target its squared distance to the nearest record held.
      constant: `[B]`, squared error of the mean of the records held.
      success: share with `mse` below the mean of `nearest`.
      success_own: share with `mse` below the target's own `nearest`.
      false_positives: share of pairs of a reconstruction and a control that would be a success in
        the first sense, though the control was not trained on.
      false_positives_own: likewise in the second sense, by the control's own nearest record.
    """

    mse: Array
    nearest: Array
    constant: Array
    success: Array
    success_own: Array
    false_positives: Array
    false_positives_own: Array


@jax.jit
def score(reconstructed: Array, targets: Array, held: Array, controls: Array) -> Score:
    """Compare reconstructions with the nearest-neighbour oracle, a constant, and false positives.

    The oracle is the best guess among the records held (Balle et al. 2022); the control, after Maciążek
    et al. 2025, tells what a success is worth.

    Args:
      reconstructed: `[B, ...]`.
      targets: `[B, ...]`, in the same order.
      held: `[N, ...]`, all records of the adversary: the known ones and the pool.
      controls: `[M, ...]`, records that no victim was trained on and the adversary does not hold.

    Returns:
      The score.

    Raises:
      ValueError: records of different shapes, or none.
      TypeError: records that are not floats.
    """
    found = metrics.mse(reconstructed, targets)
    nearest = metrics.nearest_neighbor(targets, held)[1]
    controls_nearest = metrics.nearest_neighbor(controls, held)[1]
    guesses = metrics.baselines(targets, held.mean(axis=0), input_range=(0, 1), metric="mse")

    def false(control, own):
        distances = jnp.square(reconstructed - control[None])
        distances = distances.mean(axis=tuple(range(1, distances.ndim)))
        return jnp.mean(distances < nearest.mean()), jnp.mean(distances < own)

    false_mean, false_own = jax.lax.map(lambda pair: false(*pair), (controls, controls_nearest))
    return Score(
        found,
        nearest,
        guesses["mean"],
        jnp.mean(found < nearest.mean()),
        jnp.mean(found < nearest),
        false_mean.mean(),
        false_own.mean(),
    )


def _prepare(
    shadows: Params,
    inputs: Array,
    parts: Sequence[str] | None,
    input_range: tuple[float, float],
) -> tuple[Scaler, np.ndarray, np.ndarray]:
    """The scaler, standardised features `[N, p]`, and records, on the host."""
    check_range(input_range)
    flat = np.asarray(jax.vmap(functools.partial(features, parts=parts))(shadows))
    records = np.asarray(inputs)
    if len(records) != len(flat) or len(records) < 2:
        raise ValueError(
            f"inputs must hold the record of every shadow, of 2 or more, got {len(records)} for "
            f"{len(flat)}."
        )
    mean = flat.mean(axis=0, dtype=np.float64)
    deviation = flat.std(axis=0, dtype=np.float64)
    # A weight that no record moves has no deviation but rounding.
    still = deviation <= 1e-6 * np.abs(mean)
    scale = np.where(still, 1.0, deviation)
    scaler = Scaler(*(jnp.asarray(value, flat.dtype) for value in (mean, scale)))
    return scaler, np.asarray(_scaled(scaler, flat)), records


def _scaled(scaler: Scaler, flat):
    shape = (1,) * (flat.ndim - 1) + (-1,)
    return (flat - scaler.mean.reshape(shape)) / scaler.scale.reshape(shape)
