"""The hybrid attack: layer-wise linear systems, each corrected by gradient matching."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from invjax.attacks.analytic.layerwise.chains import Block, blocks_of, convolve
from invjax.attacks.analytic.layerwise.recursion import (
    Branch,
    System,
    check_layerwise,
    check_settings,
    reconstruct,
    residual_allowed,
)
from invjax.attacks.analytic.layerwise.solvers import Solver
from invjax.attacks.matching.objectives import cosine_per_layer
from invjax.attacks.matching.priors import Context, project_to_box, total_variation
from invjax.base import Array, Attack, Batch, Model, Observation, Reconstruction, closed_form
from invjax.checks import check_choice, check_count, check_number
from invjax.gradients import gradient_oracle
from invjax.models.chain import average_pool
from invjax.models.layers import Layers, apply_layers, layers_of
from invjax.models.losses import cross_entropy
from invjax.observe import per_step_gradient

Schedule = Literal["ours", "paper"]


class Correction(NamedTuple):
    """What follows the linear system of a convolution.

    Attributes:
      steps: of Adam; 0 for none.
      cosine: weight of one minus the cosine, summed over the gradients of this layer and those behind.
      variation: weight of the total variation.
      linear: weight of the squared error of the linear system.
      learning_rate: of Adam.
      decay: whether that falls to zero along half a cosine.
      adaptive: leave a solved system alone, keep the image in its public range, and drop the linear
        term where a layer behind is deficient, so that the system's right sides are guesses.
    """

    steps: int
    cosine: float
    variation: float
    linear: float
    learning_rate: float = 1e-3
    decay: bool = False
    adaptive: bool = False


def schedule_of(schedule: Schedule, layers: int) -> tuple[Correction, ...]:
    """A correction for every convolution, by name.

    Args:
      schedule: `paper` (the code of Chen and Campbell 2022) or `ours`: weights that served better
        on small images, and no correction where the system is of full rank and solved.
      layers: number of convolutions.

    Returns:
      The corrections, from the input on.

    Raises:
      ValueError: an unknown name.
    """
    check_choice("schedule", schedule, get_args(Schedule))
    if schedule == "ours":
        image = Correction(6000, 30.0, 0.2, 0.05, 0.1, decay=True, adaptive=True)
        inner = image._replace(steps=1000, linear=0.1)
        return (image, *[inner] * (layers - 1))
    named = [Correction(10_000, 1.0, 1.0, 0.05), Correction(8000, 1.0, 1.0, 0.1)]
    return (*named, *[Correction(1000, 10.0, 0.1, 1.0)] * layers)[:layers]


def hybrid(
    model: Model,
    *,
    schedule: Schedule | Sequence[Correction] = "ours",
    solver: Solver | Sequence[Solver] = "nullspace",
    branch: Branch = None,
    rtol: float = 1e-11,
    tolerance: float | None = None,
) -> Attack:
    """`layerwise` with a correction by gradient matching behind every system (Chen and Campbell 2022).

    From the solution of a layer's system, Adam lowers a weighted sum of one minus the cosine between
    the gradients of this layer and all behind it and those observed (a term a tensor), the total
    variation (means, no clipping), and the squared error of the system itself. The corrected
    input is what the layers in front go on with. In a network of one convolution all solutions of the
    system have the same gradients, so that only the prior can help there.

    Departures: the published correction spoils a system that was solved exactly (squared error
    2e-32 to 2e-4), so `ours` leaves such alone, and where a layer behind is deficient it trusts the
    gradients more than a system made of guesses; the published code's padding and matrices are
    convolutions here; its four runs of 2,000 steps for the second layer are one of 8,000.

    Args:
      model: as for `layerwise`.
      schedule: `ours`, `paper`, or a correction for each convolution, from the input on.
      solver: as for `layerwise`.
      branch: as for `layerwise`.
      rtol: as for `layerwise`.
      tolerance: as for `layerwise`; also what `ours` takes for solved.

    Returns:
      The attack, as `layerwise`; `found` is true where that would find the image and no correction
      has moved it, so never by `paper`. Corrections run in single precision, in a compiled loop.
      `diagnostics` holds those of `layerwise`: residuals are those before the corrections.

    Raises:
      ValueError: as `layerwise`; a schedule that is none, a number below zero in it, and at its use
        one of another length.
      NotImplementedError: as `layerwise`.
    """
    if isinstance(schedule, str):
        schedule_of(schedule, 1)
    else:
        schedule = tuple(schedule)
        for correction in schedule:
            check_count("schedule: steps", correction.steps, 0)
            for name, value in correction._asdict().items():
                check_number(f"schedule: {name}", value, 0.0)
    check_settings(solver, branch, rtol, tolerance)

    def corrections(observation: Observation) -> dict[int, Correction]:
        layers = layers_of(model, observation.params)
        blocks = blocks_of(model, layers, observation.facts.input_shape, solver)
        indices = [block.index for block in blocks if block.shape is not None]
        if not indices and isinstance(schedule, str):
            raise ValueError(
                f"hybrid corrects convolutions, of which {model.name} has none: use layerwise."
            )
        each = schedule_of(schedule, len(indices)) if isinstance(schedule, str) else schedule
        if len(each) != len(indices):
            raise ValueError(
                f"schedule must have a correction for each of the {len(indices)} convolutions of "
                f"{model.name}, got {len(each)}."
            )
        return dict(zip(indices, each, strict=True))

    def check(observation: Observation) -> None:
        check_layerwise(model, observation, solver, "hybrid")
        corrections(observation)

    def init(key: Array, observation: Observation) -> Reconstruction:
        del key
        planned = corrections(observation)

        def correct(inputs: Array, system: System) -> Array:
            plan = planned[system.block.index]
            if not plan.steps:
                return inputs
            report = system.report
            allowed = residual_allowed(inputs.dtype, tolerance)
            solved = (report.rank == report.unknowns) & (report.residual <= allowed)

            def improve(inputs: Array) -> Array:
                return descend(model, observation, system, plan, inputs)

            if not plan.adaptive:
                return improve(inputs)
            return jax.lax.cond(solved, lambda inputs: inputs, improve, inputs)

        # An adaptive correction moves no solved layer; another one moves every layer.
        moved = any(plan.steps and not plan.adaptive for plan in planned.values())
        with jax.default_matmul_precision("highest"):
            result = reconstruct(model, observation, solver, branch, rtol, tolerance, correct)
        return result._replace(found=result.found & (not moved))

    return closed_form(init, check)


def descend(
    model: Model,
    observation: Observation,
    system: System,
    plan: Correction,
    inputs: Array,
) -> Array:
    """Adam on the objective of a layer, in single precision, from the solution of its system.

    Args:
      model: the model.
      observation: what the adversary was granted.
      system: of the layer.
      plan: steps and weights.
      inputs: of the block's input shape.

    Returns:
      The corrected inputs.
    """
    dtype, index = inputs.dtype, system.block.index
    inputs, layers, observed, system = (
        _single(part)
        for part in (
            inputs,
            _trained(layers_of(model, observation.params)[index:]),
            _trained(layers_of(model, per_step_gradient(observation))[index:]),
            system,
        )
    )
    statics = layers_of(model, observation.params)[index:]

    def apply(trained: list, values: Array) -> Array:
        return apply_layers(_filled(statics, trained), values)

    oracle = gradient_oracle(cross_entropy(apply))
    linear = jnp.where(system.exact, plan.linear, 0.0) if plan.adaptive else plan.linear
    distance, variation = cosine_per_layer(), total_variation(plan.variation)

    def objective(inputs: Array) -> Array:
        gradient = oracle(layers, Batch(inputs[None], system.label[None]))
        seen = observation._replace(gradient=observed)
        value = plan.cosine * distance.value(gradient, seen)
        value += variation(inputs[None], Context(seen, inputs[None]))
        return value + linear * system_error(system, layers[0], observed[0], inputs)

    # Of the image alone the range is known.
    boxed = plan.adaptive and index == 0
    rate = plan.learning_rate
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, plan.steps) if plan.decay else rate)

    def step(carry, _):
        inputs, state = carry
        updates, state = optimizer.update(jax.grad(objective)(inputs), state)
        moved = jnp.asarray(optax.apply_updates(inputs, updates))
        if boxed:
            moved = project_to_box(moved[None], observation)[0]
        return (moved, state), None

    (inputs, _), _ = jax.lax.scan(step, (inputs, optimizer.init(inputs)), length=plan.steps)
    return inputs.astype(dtype)


def system_error(system: System, layer: dict, observed: dict, inputs: Array) -> Array:
    """`|U x - V|^2` of a convolution's rows, without forming them.

    Args:
      system: of the layer.
      layer: `weight`, its own.
      observed: `weight`, its gradient.
      inputs: of the block's input shape.

    Returns:
      A scalar.
    """
    block: Block = system.block
    outputs, pull = jax.vjp(lambda weight: convolve(block, weight, inputs), layer["weight"])
    pooled = average_pool(outputs[None], block.pool)[0]
    weight_rows = jnp.where(system.known, pooled - system.before, 0.0)
    gradient_rows = pull(system.signal)[0] - observed["weight"]
    return jnp.sum(jnp.square(weight_rows)) + jnp.sum(jnp.square(gradient_rows))


def _trained(layers: Layers) -> list[dict[str, Array]]:
    """Weights and biases of the layers that have any."""
    parts = [{"weight": layer.weight, "bias": layer.bias} for layer in layers]
    return [{k: v for k, v in part.items() if v is not None} for part in parts]


def _filled(layers: Layers, trained: list[dict[str, Array]]) -> Layers:
    return tuple(
        layer._replace(weight=part.get("weight"), bias=part.get("bias"))
        for layer, part in zip(layers, trained, strict=True)
    )


def _single(tree: Any) -> Any:
    def cast(leaf):
        inexact = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(jnp.float32) if inexact else leaf

    return jax.tree.map(cast, tree)
