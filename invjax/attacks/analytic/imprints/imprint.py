"""The record of an imprint, and the inversion of rows that all of them share."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from invjax.attacks.analytic.checks import check_one_step
from invjax.base import (
    Array,
    Attack,
    Batch,
    Facts,
    Model,
    Observation,
    Params,
    Reconstruction,
    closed_form,
)
from invjax.checks import check_count, check_number
from invjax.observe import check_observation, check_sgd


class Imprint(NamedTuple):
    """A malicious server's attack.

    Attributes:
      model: what the clients are sent; the given model itself where only its weights are changed.
      plant: `plant(key, params, auxiliary=None) -> params`: the planted parameters of `model`, from
        those of the given model in whatever state of training, and data that the server owns (a
        `Batch`; its labels are not looked at).
      attack: inverts an observation of `model` at planted parameters, in closed form. The slots hold
        each candidate once, the certified ones first and the others by strength; zeros where there are
        too few. A candidate is `found` where it lies in the input range (but for a hundredth of it) and,
        passed forward and backward with some label, which is returned, gives the bias gradient of its
        row. A mixture of samples passes only by chance, about once in ten thousand in single precision
        for every label. Under noise nothing passes, and the candidates are in the slots all the same.
        The objective is the share of the rows' bias gradients, in absolute values, that is not
        certified. `diagnostics`: `rows` that hold anything, and how many of them are `certified`. It
        refuses inputs of another shape and, but for `loki`, updates of several local steps. With a
        cascade it is `row_scan`.
    """

    model: Model
    plant: Callable[..., Params]
    attack: Attack


class Rows(NamedTuple):
    """Rows to invert, a candidate each.

    Attributes:
      weight: `[d, n]`, weight gradients; a candidate's is its input times `bias`.
      bias: `[n]`, bias gradients.
      floor: of `bias`, below which a row is empty but for rounding.
      low: `[d]`, least value of an input.
      high: `[d]`, largest.
    """

    weight: Array
    bias: Array
    floor: Array
    low: Array
    high: Array


class Inverted(NamedTuple):
    """Inverted rows.

    Attributes:
      inputs: `[S, d]`, each candidate once, the certified ones first; zero where a slot is empty.
      labels: `[S]`.
      found: `[S]`.
      objective: share of the rows' bias gradients, in absolute values, that is not certified.
      rows: how many rows hold anything.
      certified: how many rows are certified.
    """

    inputs: Array
    labels: Array
    found: Array
    objective: Array
    rows: Array
    certified: Array


def invert_rows(
    rows: Rows,
    implied: Callable[[Array], Array] | None,
    inside: Callable[[Array], Array] | None,
    sizes: tuple[int, int],
    slots: int,
    tolerance: float,
) -> Inverted:
    """Divide every row by its bias gradient, check what comes out and keep each input once.

    Args:
      rows: what to invert.
      implied: `implied(inputs [n, d]) -> [n, K]`: the bias gradient of every candidate's own row for
        that one sample and each label; the certificate compares it with what was observed.
      inside: `inside(inputs [n, d]) -> [n]`: a check that takes its place where there is none.
      sizes: least and largest number of samples behind the gradient; any between them will do.
      slots: how many inputs to return.
      tolerance: largest relative deviation of a certificate.

    Returns:
      The inputs. Without `implied` labels are -1.
    """
    alive = (jnp.abs(rows.bias) > rows.floor) & jnp.isfinite(rows.weight).all(axis=0)
    inputs = (rows.weight / jnp.where(alive, rows.bias, 1.0)[None]).T
    inputs = jnp.where(alive[:, None], inputs, 0.0)
    slack = 1e-2 * (rows.high - rows.low)
    passed = alive & (
        (inputs >= (rows.low - slack)[None]) & (inputs <= (rows.high + slack)[None])
    ).all(axis=1)
    labels = jnp.full(alive.size, -1)
    if inside is not None:
        passed &= inside(inputs)
    if implied is not None:
        ratio = implied(inputs) / jnp.where(alive, rows.bias, 1.0)[:, None]
        whole = jnp.clip(jnp.round(ratio), *sizes)
        error = jnp.abs(ratio - whole) / whole
        labels = jnp.argmin(error, axis=1)
        passed &= error.min(axis=1) <= tolerance
    strength = jnp.where(alive, jnp.abs(rows.bias), 0.0)
    order = strength / jnp.maximum(strength.max(), jnp.finfo(strength.dtype).tiny)
    order = jnp.where(alive, order + 2 * passed, -1.0)

    def take(order: Array, _) -> tuple[Array, tuple[Array, Array]]:
        at = jnp.argmax(order)
        gap = jnp.abs(inputs - inputs[at][None]) / (rows.high - rows.low)[None]
        taken = (at, order[at] >= 0)
        return jnp.where(jnp.sqrt((gap**2).mean(axis=1)) < 1e-3, -1.0, order), taken

    _, (at, exists) = jax.lax.scan(take, order, length=slots)
    total = jnp.maximum(strength.sum(), jnp.finfo(strength.dtype).tiny)
    return Inverted(
        inputs=jnp.where(exists[:, None], inputs[at], 0.0),
        labels=jnp.where(exists, labels[at], -1),
        found=exists & passed[at],
        objective=1 - jnp.where(passed, strength, 0.0).sum() / total,
        rows=alive.sum(),
        certified=passed.sum(),
    )


def read_rows(
    rows: Rows,
    implied: Callable[[Array], Array],
    facts: Facts,
    max_samples: int,
    tolerance: float | None,
) -> Reconstruction:
    """The reconstruction of one client's batch.

    Args:
      rows: what to invert.
      implied: as for `invert_rows`.
      facts: of the observation.
      max_samples: slots, where the batch size is not known.
      tolerance: of the certificates; see `exact_tolerance`.

    Returns:
      The reconstruction, with the diagnostics of `Imprint`.
    """
    slots = facts.batch_size or max_samples
    found = invert_rows(
        rows,
        implied,
        None,
        (facts.batch_size or 1, slots),
        slots,
        exact_tolerance(rows.bias.dtype, tolerance),
    )
    return Reconstruction(
        found.inputs.reshape((slots, *facts.input_shape)),
        found.labels,
        found.found,
        found.objective,
        {"rows": found.rows, "certified": found.certified},
    )


def implied_bias(tail: Callable[[Array], Array], values: Array, directions: Array) -> Array:
    """The bias gradient of every candidate's own row, for each label, by one pass forward.

    Args:
      tail: `tail(values [n, units]) -> logits [n, K]`.
      values: `[n, units]`, what the planted layer computes on the candidates.
      directions: `[n, units]`, how each candidate's row is made of units.

    Returns:
      `[n, K]`, for a batch of that one sample.
    """
    logits, slope = jax.jvp(tail, (values,), (directions,))
    mean = (jax.nn.softmax(logits) * slope).sum(axis=1, keepdims=True)
    return mean - slope


def exact_tolerance(dtype, tolerance: float | None) -> float:
    """The certificates' tolerance: by default 1e-6 in double precision, 1e-4 in single."""
    return (1e-6 if dtype == jnp.float64 else 1e-4) if tolerance is None else tolerance


def row_attack(
    model: Model,
    invert: Callable[[Observation], Reconstruction],
    input_shape: tuple[int, ...],
    name: str,
    *,
    several_steps: bool = False,
    further: Callable[[Observation], None] | None = None,
) -> Attack:
    """An attack of no steps around an inversion.

    Args:
      model: the model that the clients were sent.
      invert: the inversion; it runs with exact products.
      input_shape: what the imprint was made for.
      name: the imprint's, for messages.
      several_steps: whether updates of several local steps will do.
      further: what else to refuse of an observation.

    Returns:
      The attack; its check refuses other shapes, and several local steps where they will not do.
    """

    def init(key: Array, observation: Observation) -> Reconstruction:
        del key
        with jax.default_matmul_precision("highest"):
            return invert(observation)

    def refuse(observation: Observation) -> None:
        check_observation(model, observation)
        facts = observation.facts
        if tuple(facts.input_shape) != tuple(input_shape):
            raise ValueError(
                f"This {name} was made for inputs of shape {tuple(input_shape)}, the observation "
                f"speaks of {tuple(facts.input_shape)}."
            )
        if several_steps:
            check_sgd(observation)
        else:
            check_one_step(observation, name)
        if further is not None:
            further(observation)

    return closed_form(init, refuse)


def check_settings(
    model: Model, input_shape: Sequence[int], tolerance: float | None, **whole: int
) -> tuple[int, ...]:
    """Refuse what no imprint can use.

    Args:
      model: the model to attack.
      input_shape: shape of one input.
      tolerance: of the certificates, where one was given.
      **whole: settings that must be whole numbers of at least 1.

    Returns:
      The input shape, a tuple.

    Raises:
      ValueError: a single logit, an empty shape, a setting out of range.
    """
    shape = tuple(input_shape)
    if not shape or min(shape) < 1:
        raise ValueError(f"input_shape must have positive sides, got {shape}.")
    if model.num_classes < 2:
        raise ValueError(f"The model {model.name} must have softmax logits, got a single logit.")
    if tolerance is not None:
        check_number("tolerance", tolerance, 0.0, 1.0, open_low=True)
    for name, value in whole.items():
        check_count(name, value, 1)
    return shape


def auxiliary_inputs(auxiliary: Batch | None, input_shape: tuple[int, ...], name: str) -> Array:
    """Flattened inputs of the server's own data, `[A, d]`.

    Raises:
      ValueError: there are none, of another shape, or too few to have a spread.
      TypeError: they are not floats.
    """
    if auxiliary is None:
        raise ValueError(f"{name} plants by auxiliary data: give plant auxiliary=.")
    inputs = auxiliary.inputs
    if inputs.shape[1:] != tuple(input_shape):
        raise ValueError(
            f"auxiliary.inputs must be [A, {', '.join(map(str, input_shape))}], got {inputs.shape}."
        )
    if inputs.shape[0] < 2:
        raise ValueError(f"auxiliary must hold two samples or more, got {inputs.shape[0]}.")
    if not jnp.issubdtype(inputs.dtype, jnp.floating):
        raise TypeError(f"auxiliary.inputs must be floating point, got {inputs.dtype}.")
    return inputs.reshape(inputs.shape[0], math.prod(input_shape))
