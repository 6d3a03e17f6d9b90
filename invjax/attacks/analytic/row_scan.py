"""The certified row scan: read samples off single rows of the first layer, subtract them, repeat."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from invjax.attacks.analytic.checks import check_one_step
from invjax.base import Array, Attack, Model, Observation, Reconstruction, closed_form
from invjax.checks import check_count, check_number
from invjax.models.layers import Layers, backpropagate, dense_layers, loss_vectors, preactivations
from invjax.observe import check_observation, per_step_gradient


class Scan(NamedTuple):
    """Samples found so far, in the first of the slots.

    Attributes:
      inputs: `[S, d]`.
      labels: `[S]`.
      support: `[S]`, how many units certified it at once.
      count: how many there are.
      accepted: how many the last round added.
      rounds: rounds so far.
    """

    inputs: Array
    labels: Array
    support: Array
    count: Array
    accepted: Array
    rounds: Array


def row_scan(
    model: Model,
    *,
    cascade: bool = True,
    max_samples: int = 128,
    tolerance: float | None = None,
) -> Attack:
    """Read every sample that owns a unit of the first layer alone, peel it off, and go on.

    The weight gradient of a unit over its bias gradient is an input, if one sample alone activates
    the unit (the bias trick). Whether it is: that input, passed forward and backward with some
    label, must give the unit's bias gradient. That is a certificate of the input and of its label.
    What is certified is subtracted from the gradient, which may free other units, and so on
    (Shariati and Alambardar Meybodi, *Cascading Gradient Inversion via LT-Code Inspired Peeling*).
    Any depth, two classes or more; only the gradient of the first layer is read.

    The cascade is all or nothing: where no unit belongs to one sample alone it stops. Noise on the
    gradient beyond the tolerance ends it at once, and so does any other defence that changes values.
    In single precision one of very many mixtures of samples may meet its certificate by chance, so
    unless the whole gradient is explained, a sample counts as found only if two units agree on it.

    Args:
      model: a fully connected ReLU network with a bias in the first layer.
      cascade: whether samples are peeled off, rather than read off the original gradient only.
      max_samples: slots, where the batch size is not known; it is then inferred.
      tolerance: largest relative deviation of a certificate; by default 1e-8 for gradients of double
        precision and 1e-5 for single.

    Returns:
      The attack, a closed form; it computes in the observation's precision. Inputs are
      `[S, *input_shape]` with S the batch size or `max_samples`; an empty slot is zero, with the
      label 0. Granted labels are not read. `found` is true where a slot holds a certified sample, in
      single precision under the condition above. The objective is the norm of the first layer's
      weight gradient that stays unexplained, relative to the whole: zero up to rounding if no sample
      is missing. `diagnostics`: `batch_size` as known or inferred (0 if no unit has one), `rounds`.

    Raises:
      ValueError: a number out of range; and at its use, a model of another kind or without the bias,
        an observation of several local steps.
    """
    check_count("max_samples", max_samples, 1)
    if tolerance is not None:
        check_number("tolerance", tolerance, 0.0, 1.0, open_low=True)

    def check(observation: Observation) -> None:
        check_observation(model, observation)
        check_one_step(observation, "row_scan")
        if dense_layers(model, observation.params)[0].bias is None:
            raise ValueError(f"row_scan needs a bias in the first layer of {model.name}.")

    def init(key: Array, observation: Observation) -> Reconstruction:
        del key
        with jax.default_matmul_precision("highest"):
            return solve(observation)

    def solve(observation: Observation) -> Reconstruction:
        layers = dense_layers(model, observation.params)
        first = dense_layers(model, per_step_gradient(observation))[0]
        assert first.weight is not None and first.bias is not None
        weight, bias = first.weight, first.bias
        double = bias.dtype == jnp.float64
        allowed = (1e-8 if double else 1e-5) if tolerance is None else tolerance
        floor = (1e-12 if double else 1e-6) * jnp.abs(bias).max()

        facts = observation.facts
        slots = facts.batch_size or max_samples
        if facts.batch_size is None:
            size = infer_batch_size(layers, weight, bias, floor, allowed, max_samples)
        else:
            size = jnp.asarray(facts.batch_size, bias.dtype)

        def left(scan: Scan) -> tuple[Array, Array]:
            return unexplained(layers, weight, bias, size, scan)

        def unfinished(scan: Scan) -> Array:
            return (scan.accepted > 0) & (scan.count < jnp.minimum(slots, size))

        def advance(scan: Scan) -> Scan:
            return scan_rows(layers, *left(scan), size, floor, allowed, scan)

        scan = Scan(
            jnp.zeros((slots, weight.shape[0]), weight.dtype),
            jnp.zeros(slots, jnp.int32),
            jnp.zeros(slots, jnp.int32),
            *(jnp.asarray(number) for number in (0, 1, 0)),
        )
        scan = jax.lax.while_loop(unfinished, advance, scan) if cascade else advance(scan)
        rest = jnp.linalg.norm(left(scan)[0]) / jnp.maximum(
            jnp.linalg.norm(weight), jnp.finfo(weight.dtype).tiny
        )
        complete = (scan.count == size) & (rest < 1e-4)
        sure = complete | (scan.support > 1) | double
        return Reconstruction(
            inputs=scan.inputs.reshape((slots, *facts.input_shape)),
            labels=scan.labels,
            found=(jnp.arange(slots) < scan.count) & sure,
            objective=rest,
            diagnostics={"batch_size": size, "rounds": scan.rounds},
        )

    return closed_form(init, check)


def unexplained(
    layers: Layers, weight: Array, bias: Array, size: Array, scan: Scan
) -> tuple[Array, Array]:
    """The first layer's gradient without the samples that were found."""
    values = preactivations(layers, scan.inputs)
    signal = loss_vectors(values[-1], scan.labels)
    delta = backpropagate(layers, values, signal)[0] / size
    delta = jnp.where((jnp.arange(delta.shape[0]) < scan.count)[:, None], delta, 0.0)
    return weight - scan.inputs.T @ delta, bias - delta.sum(axis=0)


def candidates(
    layers: Layers, weight: Array, bias: Array, floor: Array
) -> tuple[Array, Array, Array]:
    """Every unit's candidate input, what it implies for the unit, and whether the unit is alive.

    Shapes `[d_1, d]`, `[d_1, K]` (the loss's derivative by the unit, for each label) and `[d_1]`.
    """
    alive = jnp.abs(bias) > floor
    inputs = (weight / jnp.where(alive, bias, 1.0)[None]).T
    inputs = jnp.where(alive[:, None], inputs, 0.0)
    values, jacobian = preactivations(layers, inputs), jnp.eye(bias.size, dtype=bias.dtype)
    # One pass forward gives the derivative of the logits by each candidate's own unit.
    for layer, before in zip(layers[1:], values, strict=False):
        assert layer.weight is not None
        jacobian = jnp.where(before > 0, jacobian, 0.0) @ layer.weight
    mean = (jax.nn.softmax(values[-1]) * jacobian).sum(axis=1, keepdims=True)
    return inputs, mean - jacobian, alive


def infer_batch_size(
    layers: Layers, weight: Array, bias: Array, floor: Array, allowed: float, max_samples: int
) -> Array:
    """The whole number that implied over observed derivatives of most units agree on, or 0."""
    _, implied, alive = candidates(layers, weight, bias, floor)
    ratio = implied / jnp.where(alive, bias, 1.0)[:, None]
    whole = jnp.round(ratio)
    fits = alive[:, None] & (jnp.abs(ratio - whole) <= allowed * whole) & (whole <= max_samples)
    votes = jnp.zeros(max_samples + 1, jnp.int32)
    votes = votes.at[jnp.where(fits, whole, 0).astype(jnp.int32)].add(fits.astype(jnp.int32))
    return jnp.argmax(votes.at[0].set(0)).astype(bias.dtype)


def scan_rows(
    layers: Layers,
    weight: Array,
    bias: Array,
    size: Array,
    floor: Array,
    allowed: float,
    scan: Scan,
) -> Scan:
    """Add the certified candidates of what is left of a gradient, each sample once."""
    inputs, implied, alive = candidates(layers, weight, bias, floor)
    error = jnp.abs(implied - size * bias[:, None]) / jnp.maximum(jnp.abs(implied), floor)
    labels = jnp.argmin(error, axis=1)
    certified = alive & (error.min(axis=1) <= allowed)
    same = certified[None] & certified[:, None] & twins(inputs, certified)
    # Of a sample's units the one with the largest bias gradient rounds least.
    strongest = jnp.argmax(jnp.where(same, jnp.abs(bias)[None], -1.0), axis=1)
    chosen = certified & (strongest == jnp.arange(bias.size))
    slots = scan.labels.size
    rows = jnp.nonzero(chosen, size=slots, fill_value=0)[0]
    accepted = jnp.minimum(chosen.sum(), slots - scan.count)
    where = jnp.where(jnp.arange(slots) < accepted, scan.count + jnp.arange(slots), slots)

    def put(into: Array, values: Array) -> Array:
        return into.at[where].set(values[rows].astype(into.dtype), mode="drop")

    return Scan(
        put(scan.inputs, inputs),
        put(scan.labels, labels),
        put(scan.support, same.sum(axis=1)),
        scan.count + accepted,
        accepted,
        scan.rounds + 1,
    )


def twins(inputs: Array, certified: Array) -> Array:
    """Which candidates are the same sample, `[d_1, d_1]`.

    Those of which a few random projections agree, to a thousandth of the largest.
    """
    directions = np.random.default_rng(0).normal(size=(inputs.shape[1], 16))
    shadow = inputs @ jnp.asarray(directions, inputs.dtype)
    spread = jnp.linalg.norm(jnp.where(certified[:, None], shadow, 0.0), axis=1).max()
    square = (shadow**2).sum(axis=1)
    distance = square[:, None] + square[None] - 2 * shadow @ shadow.T
    return distance <= (1e-3 * spread) ** 2
