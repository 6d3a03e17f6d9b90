"""The rank index of layer-wise reconstruction: which layer of a chain gives its input away.

A convolution ties its input `x` down by its weight rows `W x = z` and by its gradient rows
`K x = dL/dW` (`invjax.linalg`). Where every layer has as many independent rows as unknowns, the
recursion of R-GAP (Zhu and Blaschko 2021) from the last layer to the first returns the sample of a
batch of one exactly. Chen and Campbell 2021 add up what is missing: `c(M)`, 0 for exact recovery.

Two facts reach further than the recursion. A vector in the kernel of the *first* layer's rows changes
no gradient at all, whatever comes after that layer: what is missing there is lost to every attack
without a prior. What is missing deeper, the gradients of earlier layers may replace; `jacobian_rank`
counts them all, for any attack, near the sample. Both are ours. Host code; ranks in float64.
"""

from fractions import Fraction
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from invjax import conv, linalg
from invjax.base import Array, Batch, Model, Params
from invjax.checks import check_choice, check_count
from invjax.linalg import Geometry
from invjax.models.layers import layers_of
from invjax.observe import check_batch, check_params
from invjax.theory import layer_rows
from invjax.theory.layer_rows import Ranks, Stage

Mode = Literal["closed", "numeric"]


class LayerIndex(NamedTuple):
    """What a convolution's equations say of its input.

    Attributes:
      position: of the layer in the chain.
      unknowns: numbers in its input.
      mode: of the ranks: `closed` (formulas) or `numeric`.
      rank: of the rows that the recursion can write down; `None` where it cannot get that far.
      deficit: `rank - unknowns`, 0 where the input is determined; `None` with the rank.
      weight: of the deficit in the index: 1 for the first convolution, 1/d for the last of d.
      term: the rounded product of the two; `None` with the rank.
      rows: those counted: `all`, `gradient` (behind ReLU, without a sample), `active` (behind ReLU:
        gradient rows, and weight rows where the output is positive), `none`.
      gradient_rank: of the gradient rows alone.
      joint_rank: of all rows, as if the recursion knew their right sides: an upper bound on `rank`.
      margin: unknowns less equations, `|x| - |z| - |W|`, the count of R-GAP: naive, because rows
        repeat each other. Zero or negative where it expects recovery.
      reason: what limits the rank, in words, or empty.
    """

    position: int
    unknowns: int
    mode: Mode
    rank: int | None
    deficit: int | None
    weight: float
    term: int | None
    rows: str
    gradient_rank: int
    joint_rank: int
    margin: int
    reason: str


class SecurityIndex(NamedTuple):
    """The index of a chain model.

    Attributes:
      index: `c(M)`, the sum of the layers' terms: 0 or negative; `None` where the recursion ends
        before the first layer.
      exact: whether the recursion recovers the sample: no layer lacks an equation, nothing stops it.
      layers: one entry a convolution, from the input on; none for a fully connected model.
      reason: what besides the convolutions stops or qualifies the recursion, or empty.
    """

    index: int | None
    exact: bool
    layers: tuple[LayerIndex, ...]
    reason: str


class Change(NamedTuple):
    """A first convolution that leaves its input open.

    Attributes:
      filters: of it.
      stride: of it, pixels.
      deficit: of its rows, all counted: negative.
    """

    filters: int
    stride: int
    deficit: int


class MinimumFilters(NamedTuple):
    """Fewest filters with which a first convolution determines its input; `None` where none do.

    Attributes:
      joint: by weight and gradient rows together.
      weights: by weight rows alone, as many outputs as inputs.
      gradients: by gradient rows alone.
    """

    joint: int | None
    weights: int | None
    gradients: int | None


def security_index(
    model: Model,
    input_shape: tuple[int, int, int],
    *,
    mode: Mode = "closed",
    key: Array | None = None,
    params: Params | None = None,
    batch: Batch | None = None,
) -> SecurityIndex:
    """The rank index `c(M)` of Chen and Campbell 2021, layer by layer.

    `c(M) = sum_i round((d - i) / d * (rank_i - n_i))` over the convolutions `i = 0, ..., d - 1`, each
    term rounded half to even as the authors' program does. Ranks are generic: random weights and
    derivatives of the right shapes have, with probability one, the rank of almost all others. An
    average pool directly after a convolution, before the activation, is part of its weight rows
    (their program refuses pools). Behind ReLU gradient rows alone count, as if all outputs took part;
    with a sample its own rows do, and the weight rows of its positive outputs.

    The recursion is for a batch of one, an undefended gradient and a known or inferred label.

    Args:
      model: a chain of layers, of any weights.
      input_shape: `(height, width, channels)` of its inputs.
      mode: `closed` counts rows by a formula (`linalg.closed_form_rank`, exact but for maps nearly as
        small as the window; at once); `numeric` computes ranks in float64 (seconds to minutes; maps
        of at most 4096 pixels).
      key: of the random weights and derivatives of `numeric`; `jax.random.key(0)` by default.
      params: for `numeric`: parameters to take instead of random ones.
      batch: for `numeric`, with `params`: one sample, whose own derivatives and activation pattern
        are taken. It reads the truth, as the recursion's exact intermediate results would be.

    Returns:
      The index and its layers.

    Raises:
      ValueError: a model without a layer view, inputs that it cannot take, an unknown mode, a batch
        of more than one sample or of another shape, parameters unlike the model, arguments that the
        mode does not use, a map too large for `numeric`.
      TypeError: inputs that are not floats, labels that are not integers.

    Example:
      >>> import invjax
      >>> found = invjax.theory.security_index(invjax.models.cnn6(), (32, 32, 3))
      >>> found.index, found.exact
      (0, True)
    """
    check_choice("mode", mode, ("closed", "numeric"))
    if mode == "closed" and not (key is None and params is None and batch is None):
        raise ValueError("key, params and batch are used by mode='numeric' only.")
    if batch is not None:
        if params is None:
            raise ValueError("batch needs the params that its gradient is taken at.")
        _check_sample(model, params, batch)
        if batch.inputs.shape[1:] != tuple(input_shape):
            raise ValueError(
                f"batch must hold a sample of shape {tuple(input_shape)}, got "
                f"{batch.inputs.shape[1:]}."
            )
    elif params is not None:
        check_params(model, params, input_shape)
    layers, shapes = layer_rows.input_shapes(model, input_shape)
    positions = [index for index, layer in enumerate(layers) if layer.kind == "conv"]
    stages = [layer_rows.stage(layers, position, shapes[position]) for position in positions]
    stopped, note = layer_rows.beside_convolutions(layers, shapes)
    reason = "; ".join(part for part in (stopped, note) if part)
    ranks = _ranks(model, stages, mode, key, params, batch)
    found: list[LayerIndex] = []
    for number in reversed(range(len(stages))):
        here = f"not reached: {stopped}" if stopped else stages[number].problem
        weight = Fraction(len(stages) - number, len(stages))
        found.insert(0, _entry(stages[number], ranks[number], weight, here, mode))
        if here and not stopped:
            stopped = f"the recursion ends at layer {positions[number]}"
    index = None if stopped else sum(entry.term or 0 for entry in found)
    exact = not stopped and all(entry.deficit == 0 for entry in found)
    return SecurityIndex(index, exact, tuple(found), reason)


def _ranks(
    model: Model,
    stages: list[Stage],
    mode: str,
    key: Array | None,
    params: Params | None,
    batch: Batch | None,
) -> list[Ranks]:
    if mode == "closed":
        return [layer_rows.closed_ranks(stage) for stage in stages]
    if params is not None and batch is not None:
        draws = layer_rows.draws_of_sample(model, stages, params, batch)
    else:
        view = () if params is None else layers_of(model, params)
        weights: dict[int, Any] = {i: layer.weight for i, layer in enumerate(view)}
        key = jax.random.key(0) if key is None else key
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        draws = [
            layer_rows.random_draw(rng, stage, weights.get(stage.position)) for stage in stages
        ]
    return [layer_rows.numerical_ranks(*pair) for pair in zip(stages, draws, strict=True)]


def _entry(stage: Stage, ranks: Ranks, weight: Fraction, blocked: str, mode: Mode) -> LayerIndex:
    shape = stage.shape
    rank, rows, reason = ranks.joint, "all", blocked
    if blocked:
        rank, rows = None, "none"
    elif stage.relu and ranks.active is not None:
        rank, rows = ranks.active, "active"
        reason = "weight rows only where its relu is positive"
    elif stage.relu:
        rank, rows = ranks.gradient, "gradient"
        reason = "its relu hides outputs: gradient rows alone are counted"
    deficit = None if rank is None else rank - shape.unknowns
    if deficit and not reason:
        reason = f"{-deficit} equations short"
    weights = shape.filters * shape.channels * shape.window[0] * shape.window[1]
    return LayerIndex(
        position=stage.position,
        unknowns=shape.unknowns,
        mode=mode,
        rank=rank,
        deficit=deficit,
        weight=float(weight),
        term=None if deficit is None else round(deficit * weight),
        rows=rows,
        gradient_rank=ranks.gradient,
        joint_rank=ranks.joint,
        margin=shape.unknowns - stage.outputs - weights,
        reason=reason,
    )


def minimum_filters(
    input_shape: tuple[int, int, int], window: int, stride: int = 1, padding: int = 0
) -> MinimumFilters:
    """Fewest filters of a convolution that determine its input, in closed form.

    The count of Qian and Hansen 2020 is that of the weight rows; all rows together need fewer.

    Args:
      input_shape: `(height, width, channels)`.
      window: side of the kernel, pixels.
      stride: pixels.
      padding: pixels on every side.

    Returns:
      The numbers; all `None` where the window never reads some pixel.

    Raises:
      ValueError: a size that is no whole number or below 1, a negative padding, a window larger than
        the padded input.
    """
    for name, value in (("window", window), ("stride", stride)):
        check_count(name, value, 1)
    check_count("padding", padding, 0)
    for size in input_shape:
        check_count("input_shape", size, 1)
    if window > min(input_shape[:2]) + 2 * padding:
        raise ValueError(f"window {window} is larger than the padded input {tuple(input_shape)}.")

    def shape(filters: int) -> Geometry:
        pads = ((padding, padding),) * 2
        return Geometry(*input_shape, filters, (window,) * 2, (stride,) * 2, pads)

    one = shape(1)
    phases = linalg.phases(one)
    if sum(pixels for _, pixels in phases) < one.pixels:
        return MinimumFilters(None, None, None)
    gradients = max(-(-pixels // taps) for taps, pixels in phases if taps)
    weights = -(-one.unknowns // one.outputs)
    joint = next(
        filters
        for filters in range(1, gradients + 1)
        if linalg.closed_form_rank(shape(filters)) == one.unknowns
    )
    return MinimumFilters(joint, weights, gradients)


def closing_changes(model: Model, input_shape: tuple[int, int, int]) -> tuple[Change, ...]:
    """Least changes of a first convolution that leave its input open, found by trying.

    Fewer filters at its stride, and a larger stride with its filters. Pixels that a change leaves
    unread do not count for it.

    Args:
      model: a chain of layers with a convolution.
      input_shape: `(height, width, channels)`.

    Returns:
      At most one change of each kind; none where none helps, or the input is open as it is.

    Raises:
      ValueError: a model without a layer view or without a convolution.
    """
    layers, shapes = layer_rows.input_shapes(model, input_shape)
    positions = [index for index, layer in enumerate(layers) if layer.kind == "conv"]
    if not positions:
        raise ValueError(f"The model {model.name} has no convolution.")
    first = layer_rows.stage(layers, positions[0], shapes[positions[0]])
    now = first.shape

    def attempt(filters: int, stride: int) -> Change | None:
        shape = now._replace(filters=filters, strides=(stride, stride))
        rank = layer_rows.closed_ranks(first._replace(shape=shape)).joint
        many = shape._replace(filters=shape.pixels)
        if rank < layer_rows.closed_ranks(first._replace(shape=many)).joint:
            return Change(filters, stride, rank - shape.unknowns)
        return None

    if attempt(now.filters, now.strides[0]):
        return ()
    fewer = (attempt(filters, now.strides[0]) for filters in range(now.filters - 1, 0, -1))
    wider = (
        attempt(now.filters, stride) for stride in range(now.strides[0] + 1, min(now.output) + 1)
    )
    found = [next(filter(None, kind), None) for kind in (fewer, wider)]
    return tuple(change for change in found if change is not None)


def jacobian_rank(model: Model, params: Params, batch: Batch, *, chunk: int = 64) -> int:
    """Rank of the derivative of the whole gradient by the input: what any attack could tell, locally.

    Equal to the input's size where no small change of the sample leaves its gradient as it is, to
    first order. One convolution before dense layers: the rank of that convolution's rows. More of
    them: a deficit deeper in the chain may be made up by the gradients of earlier layers, one of the
    first layer never (ours; verified on the networks of Chen and Campbell 2021).

    Args:
      model: any model.
      params: its parameters.
      batch: one sample, with its label; it reads the truth.
      chunk: columns that are computed together.

    Returns:
      The rank.

    Raises:
      ValueError: parameters or a batch unlike the model, more than one sample, a chunk below 1.
      TypeError: inputs that are not floats, labels that are not integers.
    """
    check_count("chunk", chunk, 1)
    _check_sample(model, params, batch)
    fast = conv.for_matching(model)

    def gradient(params, inputs, labels):
        return jax.grad(fast.loss)(params, Batch(inputs, labels))

    def columns(params, inputs, labels, directions):
        _, push = jax.linearize(lambda inputs: gradient(params, inputs, labels), inputs)
        return jax.vmap(push)(directions)

    size = batch.inputs.size
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        params, inputs = jax.tree.map(
            lambda leaf: jnp.asarray(leaf, jnp.float64), (params, batch.inputs)
        )
        labels, eye = jnp.asarray(batch.labels), np.eye(-(-size // chunk) * chunk, size)
        compute = jax.jit(columns)
        parts = [
            compute(params, inputs, labels, eye[start : start + chunk].reshape(-1, *inputs.shape))
            for start in range(0, size, chunk)
        ]
    # Tensors brought to one size, which leaves the rank as it is and the numbers nearer.
    blocks = [
        np.concatenate([np.reshape(part, (chunk, -1)) for part in leaves])[:size]
        for leaves in zip(*map(jax.tree.leaves, parts), strict=True)
    ]
    whole = np.concatenate([block / (np.linalg.norm(block) or 1.0) for block in blocks], axis=1)
    return layer_rows.rank_beyond(whole, float(np.linalg.norm(whole, axis=1).max()))


def _check_sample(model: Model, params: Params, batch: Batch) -> None:
    check_batch(model, batch)
    check_params(model, params, batch.inputs.shape[1:])
    if batch.inputs.shape[0] != 1:
        raise ValueError(f"batch must hold one sample, got {batch.inputs.shape[0]}.")
