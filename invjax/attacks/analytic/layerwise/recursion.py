"""Layer by layer from the logits to the image: one linear system after another."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from invjax.attacks import labels as label_recovery
from invjax.attacks.analytic.checks import check_one_step
from invjax.attacks.analytic.layerwise import bootstrap
from invjax.attacks.analytic.layerwise.chains import Block, blocks_of, conv_signal, pull_back
from invjax.attacks.analytic.layerwise.inverses import invert
from invjax.attacks.analytic.layerwise.solvers import Report, Solver, solve
from invjax.attacks.matching.priors import input_bounds
from invjax.base import Array, Attack, Batch, Layer, Model, Observation, Reconstruction, closed_form
from invjax.checks import check_choice, check_number
from invjax.models.layers import Layers, apply_layer, layers_of
from invjax.models.losses import cross_entropy
from invjax.observe import check_observation, per_step_gradient

Branch = Literal[0, -1] | None


class System(NamedTuple):
    """What a convolution's input is to satisfy.

    Attributes:
      block: the convolution.
      before: what it computes, less its bias and behind its pool, of the block's output shape.
      known: which of those are.
      signal: the derivative of the loss by its output, before the pool.
      label: the label that the derivatives start from.
      report: how the system was solved.
      exact: whether all layers behind are of full rank; else its right sides are guesses.
    """

    block: Block
    before: Array
    known: Array
    signal: Array
    label: Array
    report: Report
    exact: Array


Correct = Callable[[Array, System], Array]
"""`correct(inputs, system) -> inputs` after a convolution's solve."""


def layerwise(
    model: Model,
    *,
    solver: Solver | Sequence[Solver] = "nullspace",
    branch: Branch = None,
    rtol: float = 1e-11,
    tolerance: float | None = None,
) -> Attack:
    """Reconstruct one image by a linear system for every layer, from the last to the first.

    R-GAP (Zhu and Blaschko 2021), and the hybrid attack of Chen and Campbell 2022 without its
    correction. A dense head gives its input and the derivative of the loss; the derivative of the
    activation is read off its output, and then a convolution's input satisfies weight rows (its
    output is known) and gradient rows (so is its gradient). `gradient_only` is R-CONV (2024).

    Covered besides: biases of convolutions, strides, padding, average pools between a convolution
    and its activation, dense layers within (from their gradient alone), ReLU (outputs above zero
    alone count as weight rows), one logit or several, with a bias or without.

    With one logit, no bias anywhere and activations that are positively homogeneous (CNN6), the
    gradient of `t x` is that of `x` but for a factor. If a defense may have rescaled it (clipping),
    the brightness cannot be verified: too bright an image leaves the input range and is not found,
    but one too dark is in range, and `found` is then true of a wrong brightness. Several logits
    without a bias tell by the curvature of softmax, and the less the nearer they are to each other:
    a factor of 2 may leave a residual of 5e-3, which passes in single precision.

    Departures: null-space elimination in place of a pseudo-inverse; margins in closed form; outputs
    near the limits of an activation are not clipped unless they are at them.

    Args:
      model: a chain that ends in a dense layer, with activations that their output tells.
      solver: for all convolutions, or one for each, from the input on: `nullspace`, `joint`,
        `gradient_only` or `weight_only`; see `solvers.solve`.
      branch: of the margin of one logit without a bias: 0 (below 1.28), -1 (above), or `None`, which
        tries both where both fit the gradient.
      rtol: singular values below this share of the largest are zero.
      tolerance: largest relative residual of a layer that is solved; by default 1e-6 for
        observations of double precision and 1e-2 for single.

    Returns:
      The attack, a closed form for batches of one, with inputs `[1, *input_shape]`. It runs in the
      observation's precision, its linear algebra on the host in float64. The labels are those
      granted, or read off the head. `found` is true where every layer is of full rank and solved and
      the image lies in the input range. Of several candidates (branches, labels) the consistent one
      counts that does, of several such the largest, and then nothing is found: their gradients are
      the same. The objective is the largest residual.
      `diagnostics`, an entry for every weighted layer from the input to the head: `unknowns`,
      `rank`, `smallest` and `residual` of `solvers.Report`; and `candidates`, those consistent.

    Raises:
      ValueError: an unknown choice, a number out of range; and at its use, a batch of other than one
        sample, several local steps, what `chains.blocks_of` refuses.
      NotImplementedError: layers that cannot be undone (pools above all), at its use.
    """
    check_settings(solver, branch, rtol, tolerance)

    def check(observation: Observation) -> None:
        check_layerwise(model, observation, solver, "layerwise")

    def init(key: Array, observation: Observation) -> Reconstruction:
        del key
        with jax.default_matmul_precision("highest"):
            return reconstruct(model, observation, solver, branch, rtol, tolerance)

    return closed_form(init, check)


def residual_allowed(dtype: Any, tolerance: float | None) -> float:
    """The largest relative residual of a layer that counts as solved.

    Args:
      dtype: of the gradient.
      tolerance: what was asked for, if anything.

    Returns:
      It, or the default of the precision.
    """
    if tolerance is not None:
        return tolerance
    return 1e-6 if dtype == jnp.float64 else 1e-2


def check_settings(
    solver: Solver | Sequence[Solver], branch: Branch, rtol: float, tolerance: float | None
) -> None:
    """Refuse settings of `layerwise` that are out of range.

    Args:
      solver: as for `layerwise`.
      branch: as for `layerwise`.
      rtol: as for `layerwise`.
      tolerance: as for `layerwise`.

    Raises:
      ValueError: one of them is.
    """
    for name in [solver] if isinstance(solver, str) else solver:
        check_choice("solver", name, get_args(Solver))
    if branch not in (None, 0, -1):
        raise ValueError(f"branch must be 0, -1 or None, got {branch!r}.")
    check_number("rtol", rtol, 0.0, 1.0, open_low=True)
    if tolerance is not None:
        check_number("tolerance", tolerance, 0.0, open_low=True)


def check_layerwise(
    model: Model, observation: Observation, solver: Solver | Sequence[Solver], name: str
) -> None:
    """Refuse what a layer-wise attack cannot use.

    Args:
      model: the model.
      observation: what the adversary was granted.
      solver: as for `layerwise`.
      name: the attack's, for messages.

    Raises:
      ValueError: as `layerwise` says.
      NotImplementedError: likewise.
    """
    check_observation(model, observation)
    facts = observation.facts
    check_one_step(observation, name)
    if facts.batch_size != 1:
        raise ValueError(
            f"{name} reads one sample: the observation's batch_size must be 1, "
            f"got {facts.batch_size}."
        )
    blocks_of(model, layers_of(model, observation.params), facts.input_shape, solver)


def reconstruct(
    model: Model,
    observation: Observation,
    solver: Solver | Sequence[Solver],
    branch: Branch,
    rtol: float,
    tolerance: float | None,
    correct: Correct | None = None,
) -> Reconstruction:
    """The recursion for every candidate of the head, and the choice among them; traceable.

    Args:
      model: as for `layerwise`.
      observation: as for `layerwise`.
      solver: as for `layerwise`.
      branch: as for `layerwise`.
      rtol: as for `layerwise`.
      tolerance: as for `layerwise`.
      correct: applied to every convolution's solution.

    Returns:
      The reconstruction.
    """
    layers = layers_of(model, observation.params)
    gradients = layers_of(model, per_step_gradient(observation))
    blocks = blocks_of(model, layers, observation.facts.input_shape, solver)
    head = blocks[-1].index
    start = candidates(model, observation, layers[head], gradients[head], branch)

    def run(one: bootstrap.Start) -> tuple[Array, Report]:
        return walk(blocks, layers, gradients, one, rtol, correct)

    if start.labels.size == 1:
        only = run(jax.tree.map(lambda leaf: leaf[0], start))
        images, reports = jax.tree.map(lambda leaf: leaf[None], only)
    else:
        one = jax.tree.map(lambda leaf: leaf[0], start)
        blank = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(run, one))
        images, reports = jax.lax.map(
            lambda one: jax.lax.cond(one.valid, run, lambda _: blank, one), start
        )
    allowed = residual_allowed(images.dtype, tolerance)
    chosen, found, consistent = choice(observation, start.valid, images, reports, allowed)
    report = jax.tree.map(lambda leaf: leaf[chosen], reports)
    return Reconstruction(
        inputs=images[chosen].reshape((1, *observation.facts.input_shape)),
        labels=start.labels[chosen][None],
        found=found[None],
        objective=report.residual.max(),
        diagnostics={**report._asdict(), "candidates": consistent.sum()},
    )


def candidates(
    model: Model, observation: Observation, head: Layer, gradient: Layer, branch: Branch
) -> bootstrap.Start:
    """What the head says of its input, its signal and the label.

    Args:
      model: as for `layerwise`.
      observation: as for `layerwise`.
      head: the last dense layer, of parameters.
      gradient: the same, of the gradient.
      branch: as for `layerwise`.

    Returns:
      One candidate; for one logit without a bias one for each branch and label that may be.
    """
    assert head.weight is not None and gradient.weight is not None
    signal, labels = gradient.bias, observation.labels
    if signal is None and model.num_classes == 1:
        possible = jnp.arange(2) if labels is None else labels
        branches = (0, -1) if branch is None else (branch,)
        return bootstrap.logistic(head.weight, gradient.weight, possible, branches)
    if labels is None:
        labels = label_recovery.recover(model, observation, 1)
    if signal is None:
        inputs, signal = bootstrap.softmax(head.weight, gradient.weight, labels[0])
    else:
        inputs = bootstrap.rank_one_input(gradient.weight, signal)
    return bootstrap.Start(inputs[None], signal[None], labels, jnp.ones(1, bool))


def walk(
    blocks: tuple[Block, ...],
    layers: Layers,
    gradients: Layers,
    start: bootstrap.Start,
    rtol: float,
    correct: Correct | None = None,
) -> tuple[Array, Report]:
    """From the input of the head to the image.

    Args:
      blocks: of the chain.
      layers: of parameters.
      gradients: of the gradient.
      start: one candidate.
      rtol: as for `layerwise`.
      correct: applied to every convolution's solution.

    Returns:
      The image, and the reports of all blocks, stacked from the input to the head.
    """
    inputs, signal = start.inputs, start.signal
    head = layers[blocks[-1].index]
    again = signal
    if head.bias is None:
        # The factor between input and signal is not in the gradient; a rescaled one shows here.
        logits = apply_layer(head, inputs[None])
        loss = cross_entropy(lambda logits, _: logits)
        again = jax.grad(loss)(logits, Batch(inputs[None], start.labels[None]))[0]
    reports = [dense_report(weight_of(gradients, blocks[-1]), inputs, signal, (signal, again))]
    for block, above in zip(blocks[-2::-1], blocks[:0:-1], strict=True):
        derivative = pull_back(above, weight_of(layers, above), signal)
        outputs = inputs.reshape(block.output_shape)
        derivative = derivative.reshape(block.output_shape)
        weight, observed = weight_of(layers, block), weight_of(gradients, block)
        bias = layers[block.index].bias
        if block.shape is None:
            # A bias's gradient is the derivative itself.
            signal = gradients[block.index].bias
            if signal is None:
                signal = derivative * invert(block.activation, outputs)[2]
            inputs = bootstrap.rank_one_input(observed, signal)
            again = apply_layer(layers[block.index], inputs[None])[0]
            reports.append(dense_report(observed, inputs, signal, (outputs, again)))
            continue
        before, known, slope = invert(block.activation, outputs)
        if bias is not None:
            before = before - bias[None, None]
        signal = conv_signal(block, derivative * slope)
        inputs, report = solve(
            weight,
            observed,
            before,
            known,
            signal.reshape(-1, block.shape.filters),
            shape=block.shape,
            pool=block.pool,
            method=block.solver,
            rtol=rtol,
        )
        exact = jnp.stack([above.rank == above.unknowns for above in reports]).all()
        reports.append(report)
        if correct is not None:
            system = System(block, before, known, signal, start.labels, report, exact)
            inputs = correct(inputs, system)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *reports[::-1])
    return inputs.reshape(blocks[0].input_shape), stacked


def weight_of(layers: Layers, block: Block) -> Array:
    """The weight of a block in a list of layers."""
    weight = layers[block.index].weight
    assert weight is not None
    return weight


def dense_report(
    gradient: Array, inputs: Array, signal: Array, same: tuple[Array, Array]
) -> Report:
    """How well a dense layer's gradient is the product of its input and its signal.

    Args:
      gradient: `[in, out]`.
      inputs: `[in]`.
      signal: `[out]`.
      same: what else must agree: known, and as the input has it.

    Returns:
      The report: of full rank unless the signal is zero.
    """
    alive = (signal != 0).any()

    def error(known: Array, found: Array) -> Array:
        size = jnp.linalg.norm(known)
        return jnp.linalg.norm(known - found) / jnp.where(size > 0, size, 1.0)

    return Report(
        jnp.asarray(inputs.size, jnp.int32),
        jnp.where(alive, inputs.size, 0).astype(jnp.int32),
        alive.astype(inputs.dtype),
        jnp.maximum(error(gradient, inputs[:, None] * signal[None]), error(*same)),
    )


def choice(
    observation: Observation, valid: Array, images: Array, reports: Report, allowed: float
) -> tuple[Array, Array, Array]:
    """The candidate that counts, whether it is found, and which are consistent.

    Args:
      observation: says the input range.
      valid: `[C]`.
      images: `[C, ...]`.
      reports: `[C, L]`.
      allowed: largest residual of a solved layer.

    Returns:
      The index, a boolean, `[C]` booleans.
    """
    residual = jnp.where(valid, reports.residual.max(axis=1), jnp.inf)
    residual = jnp.where(jnp.isnan(residual), jnp.inf, residual)
    full = (reports.rank == reports.unknowns).all(axis=1)
    consistent = valid & (residual <= jnp.maximum(allowed, 10 * residual.min()))
    solved = full & (residual <= allowed)
    low, high = input_bounds(observation, images.dtype, images.ndim)
    axes = tuple(range(1, images.ndim))
    beyond = jnp.maximum(images - high, low - images).max(axis=axes)
    slack = 1e-6 if images.dtype == jnp.float64 else 1e-3
    beyond = jnp.where(beyond > slack * jnp.max(high - low), beyond, 0.0)
    size = jnp.linalg.norm(images.reshape(images.shape[0], -1), axis=1)
    chosen = jnp.lexsort((-size, beyond, ~consistent))[0]
    inside = solved & (beyond == 0)
    return chosen, inside[chosen] & (inside.sum() == 1), consistent
