"""Exclusivity of a batch as something to remove from its inputs, or to put into them.

`invjax.defenses.exclusivity` says what exclusivity is, and what its removal does not stop.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from invjax.base import Array, Batch, Bound, Defense, Model, Params
from invjax.checks import check_count, check_number, describe
from invjax.defenses.base import from_stages, nothing
from invjax.defenses.exclusivity import hidden_values
from invjax.models.layers import check_layer_view, dense_layers
from invjax.ranges import bounds, check_range

Range = tuple[Bound, Bound]


class Perturbed(NamedTuple):
    """Inputs after `remove_exclusive`.

    Attributes:
      inputs: `[B, ...]`.
      remaining: exclusive neurons that are left, 0 where it succeeded.
      num_steps: steps taken.
    """

    inputs: Array
    remaining: Array
    num_steps: Array


def reduce_exclusivity(
    model: Model,
    *,
    step: float = 0.02,
    margin: float = 1e-4,
    max_steps: int = 500,
    radius: float | None = None,
    input_range: Range | None = None,
) -> Defense:
    """Perturb the inputs until no neuron is exclusive.

    `remove_exclusive` before the gradient is taken. The state of the defence is the number of
    exclusive neurons that it could not remove: where that is not zero the batch should not be sent,
    as partial reduction is useless.

    What it does not stop: see `invjax.defenses.exclusivity`. SPEAR recovers the perturbed inputs exactly,
    which are close to the private ones; and the rows of nearly exclusive neurons still show single
    samples. The likelihood is of the perturbed batch and knows nothing of the perturbation.

    Args:
      model: the client's model, which ends in dense ReLU layers with at least one hidden.
      step: as in `remove_exclusive`, with all that follows.
      margin: as there.
      max_steps: as there.
      radius: as there.
      input_range: as there.

    Returns:
      The defence.

    Raises:
      ValueError: a setting out of range, a model without such a head; and, when it meets it, a
        batch of one sample.
    """
    settings = dict(
        step=step, margin=margin, max_steps=max_steps, radius=radius, input_range=input_range
    )
    _check_settings(**settings)
    check_layer_view(model)
    perturb = jax.jit(functools.partial(remove_exclusive, model, **settings))

    def prepare(batch: Batch, state, params: Params):
        del state
        perturbed = perturb(params, batch.inputs)
        return batch._replace(inputs=perturbed.inputs), perturbed.remaining

    name = describe("reduce_exclusivity", **{k: v for k, v in settings.items() if v is not None})
    stage = nothing(name, "inputs")._replace(
        init=lambda key, params: jnp.zeros((), jnp.int32), prepare=prepare
    )
    return from_stages(stage)


def remove_exclusive(
    model: Model,
    params: Params,
    inputs: Array,
    *,
    step: float = 0.02,
    margin: float = 1e-4,
    max_steps: int = 500,
    radius: float | None = None,
    input_range: Range | None = None,
) -> Perturbed:
    """Move a batch to where no neuron of the dense head is active on one sample alone.

    Every exclusive neuron asks for the cheaper of two changes: its owner switched off, or the
    sample nearest to activating it switched on. Each sample takes a step of fixed length along the
    sum of what is asked of it, pulled back through the activations as they are. This repeats until
    nothing is asked. Small batches need more: of a batch of two, either both or none must activate
    each neuron.

    Args:
      model: a model that ends in dense ReLU layers with at least one hidden.
      params: its parameters.
      inputs: `[B, ...]`, at least two samples.
      step: Euclidean length of a sample's step, in input units.
      margin: how far from zero a neuron must be on the samples that decide, in units of
        pre-activations; rounding may else make it exclusive again (more so where the client's
        matrix products are coarse, as on accelerators by default).
      max_steps: steps at most.
      radius: largest change of any input value; `None` for no limit.
      input_range: box of the inputs, each bound one number or one per channel; `None` for none.

    Returns:
      The inputs, how many exclusive neurons (within the margin) remain, and the steps.

    Raises:
      ValueError: a setting out of range, a model without such a head, a batch of one sample.
    """
    _check_settings(step, margin, max_steps, radius, input_range)
    if inputs.shape[0] < 2:
        raise ValueError(
            "Every active neuron is exclusive in a batch of one sample: give at least 2, got "
            f"inputs of shape {inputs.shape}."
        )
    low, high = _box(inputs, radius, input_range)

    def ask(inputs: Array):
        values, pull = jax.vjp(lambda inputs: hidden_values(model, params, inputs), inputs)
        signals, counts = zip(*(_ask(value, margin) for value in values), strict=True)
        return pull(list(signals))[0], jnp.stack(counts).sum(dtype=jnp.int32)

    def unfinished(carry):
        _, (_, remaining), count = carry
        return (remaining > 0) & (count < max_steps)

    def move(carry):
        inputs, (direction, _), count = carry
        norm = jnp.linalg.norm(direction.reshape(len(direction), -1), axis=1)
        scale = jnp.asarray(step, inputs.dtype) / jnp.where(norm > 0, norm, 1.0)
        moved = inputs + direction * scale.reshape((-1,) + (1,) * (inputs.ndim - 1))
        moved = jnp.clip(moved, low, high)
        return moved, ask(moved), count + 1

    with jax.default_matmul_precision("highest"):
        start = (inputs, ask(inputs), jnp.zeros((), jnp.int32))
        inputs, (_, remaining), count = jax.lax.while_loop(unfinished, move, start)
    return Perturbed(inputs, remaining, count)


def _ask(values: Array, margin: Array | float) -> tuple[Array, Array]:
    """Which way a layer's pre-activations should go, and how many neurons ask."""
    (first, second), (owner, other) = (part.T for part in jax.lax.top_k(values.T, 2))
    asks = (first > -margin) & (second < margin)
    switch_off = first + margin <= margin - second
    sign = jnp.where(asks, jnp.where(switch_off, -1.0, 1.0), 0.0).astype(values.dtype)
    sample = jnp.where(switch_off, owner, other)
    signal = jax.nn.one_hot(sample, len(values), axis=0, dtype=values.dtype) * sign[None]
    return signal, asks.sum(dtype=jnp.int32)


def _box(inputs: Array, radius: float | None, input_range: Range | None) -> tuple[Array, Array]:
    reach = jnp.asarray(jnp.inf if radius is None else radius, inputs.dtype)
    low, high = inputs - reach, inputs + reach
    if input_range is None:
        return low, high
    lowest, highest = bounds(input_range, inputs.shape, inputs.dtype)
    return jnp.maximum(low, lowest), jnp.minimum(high, highest)


def remove_exclusive_lp(
    model: Model,
    params: Params,
    batch: Batch,
    *,
    margin: float = 1e-3,
    input_range: Range | None = None,
    max_rounds: int = 100,
) -> Batch:
    """Remove exclusivity by the smallest change of any input value, with one hidden layer.

    With one hidden layer what a neuron computes is linear in the inputs. Every exclusive neuron is
    given the cheaper of the two changes of `remove_exclusive` as a linear constraint, and linear
    programs, one a sample, minimise the largest change of an input value; neurons that have become
    exclusive by it add constraints, until there are none. The choices are greedy, and together they
    may be infeasible, which is common in small batches and boxes: `remove_exclusive` then often succeeds.

    What it does not stop: see `invjax.defenses.exclusivity`. Host code, neither jit- nor vmap-able.

    Args:
      model: a fully connected ReLU network with one hidden layer.
      params: its parameters.
      batch: inputs `[B, ...]` of at least two samples, and labels.
      margin: how far from zero a neuron must be on the samples that decide, positive, in units of
        pre-activations.
      input_range: box of the inputs, each bound one number or one per channel; `None` for none.
      max_rounds: of constraints, at most.

    Returns:
      The batch, of the dtype that it had.

    Raises:
      ValueError: another model, a setting out of range, one sample; constraints that are infeasible,
        or still incomplete after the rounds.
    """
    check_count("max_rounds", max_rounds, 1)
    program = _program(model, params, batch, margin, input_range)
    if len(program.inputs) < 2:
        raise ValueError("Every active neuron is exclusive in a batch of one sample: give 2.")
    signs = np.zeros(program.values.shape)
    changes = np.zeros_like(program.inputs)
    for _ in range(max_rounds):
        values = program.values + changes @ program.weight
        order = np.argsort(values, axis=0)
        second, first = np.take_along_axis(values, order[-2:], axis=0)
        # Programs end on the margin itself.
        found = np.flatnonzero((first > -margin / 2) & (second < margin / 2))
        if not len(found):
            moved = (program.inputs + changes).reshape(np.shape(batch.inputs))
            return batch._replace(inputs=jnp.asarray(moved, batch.inputs.dtype))
        touched = [_choose(values[:, neuron], signs[:, neuron], margin) for neuron in found]
        for sample in {sample for samples in touched for sample in samples}:
            changes[sample] = _nearest(program, sample, signs[sample], margin)
    raise ValueError(
        f"Neurons still become exclusive after max_rounds={max_rounds} rounds of programs."
    )


def make_exclusive(
    model: Model,
    params: Params,
    batch: Batch,
    *,
    count: int = 2,
    margin: float = 1e-2,
    input_range: Range | None = None,
) -> Batch:
    """The inverse: give every sample neurons of its own, by the smallest change of any input value.

    Pan et al. (J. Comput. Res. Dev. 2022) make batches satisfy the condition of their attack by
    linear programming; the program here is ours. Every sample is assigned `count` neurons, those
    that cost least in all, on which it must be active and all other samples inactive.

    Host code, neither jit- nor vmap-able.

    Args:
      model: a fully connected ReLU network with one hidden layer.
      params: its parameters.
      batch: inputs `[B, ...]`, and labels.
      count: exclusive neurons a sample, at least 1; the condition is 2.
      margin: how far from zero these neurons must be on every sample, positive, in units of
        pre-activations.
      input_range: box of the inputs, each bound one number or one per channel; `None` for none.

    Returns:
      The batch, of the dtype that it had.

    Raises:
      ValueError: another model, a setting out of range, too few neurons, infeasible constraints.
    """
    check_count("count", count, 1)
    program = _program(model, params, batch, margin, input_range)
    size, width = program.values.shape
    if count * size > width:
        raise ValueError(f"{size} samples need {count * size} neurons, but there are {width}.")
    # What a neuron costs: how far an input value must move at least, squared, over the samples.
    reach = np.abs(program.weight).sum(axis=0)
    off = np.square(np.maximum(program.values + margin, 0) / reach)
    on = np.square(np.maximum(margin - program.values, 0) / reach)
    cost = off.sum(axis=0) - off + on
    owners, neurons = optimize.linear_sum_assignment(np.repeat(cost, count, axis=0))
    signs = np.zeros(program.values.shape)
    signs[:, neurons] = -1
    signs[owners // count, neurons] = 1
    changes = [_nearest(program, m, signs[m], margin) for m in range(size)]
    moved = (program.inputs + np.stack(changes)).reshape(np.shape(batch.inputs))
    return batch._replace(inputs=jnp.asarray(moved, batch.inputs.dtype))


class _Program(NamedTuple):
    """What the linear programs of a batch share; in float64."""

    inputs: np.ndarray
    values: np.ndarray
    weight: np.ndarray
    low: np.ndarray
    high: np.ndarray


def _program(model, params, batch: Batch, margin: float, input_range: Range | None) -> _Program:
    check_number("margin", margin, 0.0, open_low=True)
    if input_range is not None:
        check_range(input_range)
    layers = dense_layers(model, params)
    if len(layers) != 2:
        raise ValueError(
            f"Linear programs need one hidden layer, and {model.name} has {len(layers) - 1}."
        )
    weight, bias = layers[0].weight, layers[0].bias
    flat = np.asarray(batch.inputs, np.float64).reshape(len(batch.inputs), -1)
    weight = np.asarray(weight, np.float64)
    values = flat @ weight
    if bias is not None:
        values = values + np.asarray(bias, np.float64)[None]
    box = (-np.inf, np.inf) if input_range is None else input_range
    low, high = (
        np.broadcast_to(np.asarray(bound, np.float64), batch.inputs.shape).reshape(flat.shape)
        for bound in box
    )
    return _Program(flat, values, weight, low, high)


def _choose(values: np.ndarray, signs: np.ndarray, margin: float) -> tuple[int, ...]:
    """Fix signs of a neuron so that it is not exclusive; the samples that were touched."""
    owner = int(np.argmax(values))
    others = np.where((signs < 0) | (np.arange(len(values)) == owner), -np.inf, values)
    other = int(np.argmax(others))
    may_switch_off = signs[owner] <= 0
    if may_switch_off and values[owner] + margin <= margin - others[other]:
        signs[owner] = -1
        return (owner,)
    if np.isinf(others[other]):
        raise ValueError(_INFEASIBLE)
    signs[[owner, other]] = 1
    return owner, other


def _nearest(program: _Program, sample: int, signs: np.ndarray, margin: float) -> np.ndarray:
    """The change of a sample, smallest in its largest value, that gives neurons their signs."""
    neurons = np.flatnonzero(signs)
    rows = program.weight[:, neurons].T * signs[neurons, None]
    slack = program.values[sample, neurons] * signs[neurons] - margin
    size = rows.shape[1]
    eye, ones = np.eye(size), np.ones((size, 1))
    found = optimize.linprog(
        np.eye(size + 1)[size],
        A_ub=np.block([[-rows, np.zeros((len(rows), 1))], [eye, -ones], [-eye, -ones]]),
        b_ub=np.concatenate([slack, np.zeros(2 * size)]),
        bounds=[
            *zip(
                program.low[sample] - program.inputs[sample],
                program.high[sample] - program.inputs[sample],
                strict=True,
            ),
            (0, None),
        ],
    )
    if not found.success:
        raise ValueError(_INFEASIBLE)
    return found.x[:size]


_INFEASIBLE = (
    "The linear program is infeasible: the constraints contradict each other, or the box. "
    "Perturb by remove_exclusive, choose a smaller margin, or a larger box."
)


def _check_settings(step, margin, max_steps, radius, input_range) -> None:
    check_number("step", step, 0.0, open_low=True)
    check_number("margin", margin, 0.0)
    check_count("max_steps", max_steps, 1)
    if radius is not None:
        check_number("radius", radius, 0.0, open_low=True)
    if input_range is not None:
        check_range(input_range)
