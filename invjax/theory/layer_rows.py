"""The equations of a chain's convolutions: which ones an adversary can write down, and their ranks.

Under `security_index`, which has the story. Host code in numpy float64.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.sparse

from invjax import linalg
from invjax.base import Batch, Model, Params
from invjax.linalg import Geometry
from invjax.models.chain import activations
from invjax.models.layers import Layers, apply_layer, layers_of
from invjax.models.losses import cross_entropy

INVERTIBLE = ("identity", "sigmoid", "tanh", "softplus", "elu", "leaky_relu", "leaky_relu_0.2")
"""Activations whose output gives their input and their slope; that of ReLU gives the slope alone."""

MAX_PIXELS = 4096
"""Of a map whose ranks are computed numerically; the work grows with the cube."""


class Stage(NamedTuple):
    """A convolution and what follows it up to the next layer with weights.

    Attributes:
      position: of the convolution in the chain.
      shape: its geometry.
      pools: windows of the average pools before any activation; 0 for a global one.
      relu: whether a ReLU hides part of the output.
      problem: why the recursion cannot pass, or empty.
    """

    position: int
    shape: Geometry
    pools: tuple[int, ...]
    relu: bool
    problem: str

    @property
    def outputs(self) -> int:
        """Numbers in the output, behind the pools."""
        height, width = self.shape.output
        for window in self.pools:
            height, width = (height // window, width // window) if window else (1, 1)
        return height * width * self.shape.filters


class Ranks(NamedTuple):
    """Ranks of a convolution's rows.

    Attributes:
      gradient: of the gradient rows.
      joint: of all.
      active: of the gradient rows and the weight rows of positive outputs; `None` where it is not
        known which are.
    """

    gradient: int
    joint: int
    active: int | None = None


class Draw(NamedTuple):
    """What numerical ranks are taken of.

    Attributes:
      weight: `[height, width, in, out]`.
      signal: `[Q, out]`, the derivative by the convolution's output.
      active: `[rows]` booleans, weight rows whose output is positive; `None` if not known.
    """

    weight: np.ndarray
    signal: np.ndarray
    active: np.ndarray | None = None


def input_shapes(model: Model, input_shape: tuple[int, ...]) -> tuple[Layers, list[tuple]]:
    """The layer view of a model's parameter shapes, and the shape of every layer's input.

    Args:
      model: a chain of layers.
      input_shape: of one input.

    Returns:
      Both; the shapes are without the batch axis.

    Raises:
      ValueError: no layer view, or inputs that the model cannot take.
    """

    def trace(key, inputs):
        layers, found = layers_of(model, model.init(key, input_shape)), []
        for layer in layers:
            found.append(inputs)
            inputs = apply_layer(layer, inputs)
        return found

    probe = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    layers = layers_of(model, jax.eval_shape(lambda: model.init(jax.random.key(0), input_shape)))
    return layers, [value.shape[1:] for value in jax.eval_shape(trace, jax.random.key(0), probe)]


def stage(layers: Layers, position: int, input_shape: tuple[int, int, int]) -> Stage:
    """What the recursion meets at a convolution.

    Args:
      layers: the chain.
      position: of the convolution.
      input_shape: of its input.

    Returns:
      The stage.
    """
    names, pools, problem = [layers[position].activation], [], ""
    for layer in layers[position + 1 :]:
        if layer.weight is not None:
            break
        curved = [name for name in names if name != "identity"]
        if layer.kind == "max_pool":
            problem = problem or "the max-pool behind it does not say which pixel it passed on"
        elif layer.kind == "global_average_pool" and not curved:
            # Its rows are linear and counted, but `layerwise` does not undo it.
            problem = problem or "the global average pool behind it is not undone layer by layer"
            pools.append(0)
        elif layer.kind != "flatten" and curved:
            problem = problem or f"the pool behind its {curved[0]} hides outputs and slopes"
        elif layer.kind != "flatten":
            pools.append(1 if layer.window is None else layer.window[0])
        names.append(layer.activation)
    for name in names:
        if name not in (*INVERTIBLE, "relu"):
            problem = problem or f"its {name} has no inverse"
    shape = linalg.geometry(layers[position], input_shape)
    return Stage(position, shape, tuple(pools), "relu" in names, problem)


def beside_convolutions(layers: Layers, shapes: list[tuple]) -> tuple[str, str]:
    """What the recursion meets outside the convolutions.

    Args:
      layers: the chain.
      shapes: of their inputs.

    Returns:
      Why it cannot begin, and what else to know about its result; each may be empty.
    """
    weighted = [index for index, layer in enumerate(layers) if layer.weight is not None]
    dense = [index for index in weighted if layers[index].kind == "dense"]
    problem = note = ""
    if not weighted or layers[weighted[-1]].kind != "dense":
        return "the chain does not end in a dense layer, where the recursion begins", ""
    for index in dense:
        last, plain = index == weighted[-1], layers[index].activation == "identity"
        if len(shapes[index]) > 1:
            problem = f"the dense layer {index} adds up its gradient over pixels"
        elif layers[index].bias is None and last and not plain:
            problem = f"the last layer has no bias, and {layers[index].activation} on its logits"
        elif layers[index].bias is None and layers[index].activation not in (*INVERTIBLE, "relu"):
            problem = (
                f"the {layers[index].activation} of layer {index}, without bias, has no inverse"
            )
        elif layers[index].bias is None and last:
            note = (
                "without a bias the last layer gives its input up to the root of a scalar equation; "
                "where it has two, only a prior decides"
            )
    front = layers[: weighted[0]]
    if any(layer.kind != "flatten" or layer.activation != "identity" for layer in front):
        problem = problem or "a pool or activation comes before the first layer with weights"
    if any(layer.kind == "flatten" and layer.activation != "identity" for layer in layers):
        problem = problem or "a flatten has an activation of its own"
    return problem, note


def closed_ranks(found: Stage) -> Ranks:
    """Generic ranks by formulas.

    Rows of a stride's phases are apart from each other; a phase has a gradient row a filter and tap,
    and no more independent ones than pixels. Weight rows repeat gradient rows, the square of the
    filters in number. Behind an average pool the pixels are the sums that it reads, and no more
    filters differ than there are pooled outputs: exact for 57 of 60 random small convolutions.

    Args:
      found: the stage.

    Returns:
      Ranks.
    """
    shape = found.shape
    if not found.pools:
        gradient = sum(min(shape.filters * taps, pixels) for taps, pixels in linalg.phases(shape))
        return Ranks(shape.channels * gradient, linalg.closed_form_rank(shape))
    pool = _pool_matrix(found)
    differing = min(shape.filters, pool.shape[0])
    phases, pixels = _pooled_phases(found, pool)
    gradient = sum(min(differing * taps, sums) for taps, sums in phases)
    joint = sum(sums for taps, sums in phases if differing * taps >= sums)
    rest = [(taps, sums) for taps, sums in phases if differing * taps < sums]
    rank = shape.channels * joint
    if rest:
        rows = found.outputs + shape.channels * differing * sum(taps for taps, _ in rest)
        repeated = differing * shape.filters
        rank += min(shape.channels * sum(sums for _, sums in rest), rows - repeated)
    most = shape.channels * pixels
    return Ranks(min(shape.channels * gradient, most), min(rank, most))


def _pooled_phases(found: Stage, pool: scipy.sparse.csr_array) -> tuple[list[tuple[int, int]], int]:
    """Taps of every phase with the different sums of pixels that pools read, and all pixels read.

    Behind pools the stride is the product of theirs with the convolution's.
    """
    shape, read = found.shape, linalg.taps(found.shape)
    step = math.prod(window or max(shape.output) for window in found.pools)
    down, across = step * shape.strides[0], step * shape.strides[1]
    rows, columns = np.divmod(np.arange(read.shape[1]), shape.window[1])
    labels = rows % down * across + columns % across
    # A sum is known by its value on random pixels; the padding reads 0.
    pixels = np.append(np.random.default_rng(0).random(shape.pixels), 0.0)
    phases = []
    for label in np.unique(labels):
        mine = labels == label
        sums = np.unique((pool @ pixels[read[:, mine]]).round(12))
        phases.append((int(mine.sum()), int((sums > 0).sum())))
    kept = np.unique(read[pool.sum(axis=0) > 0])
    return phases, int((kept >= 0).sum())


def numerical_ranks(found: Stage, draw: Draw) -> Ranks:
    """Ranks in float64, by elimination.

    The gradient rows are the same block `B` for every channel; what they leave open, its null space
    `N` in every channel, the weight rows must determine: `rank [W; K] = C rank B + rank W (I x N)`.

    Args:
      found: the stage.
      draw: weights and derivatives.

    Returns:
      Ranks.

    Raises:
      ValueError: a map of more than `MAX_PIXELS`.
    """
    shape = found.shape
    if shape.pixels > MAX_PIXELS:
        raise ValueError(
            f"mode='numeric' takes maps of at most {MAX_PIXELS} pixels, layer {found.position} "
            f"reads {shape.pixels}; use 'closed'."
        )
    rows = linalg.pooled(linalg.conv_matrix(draw.weight, shape), _pool_matrix(found))
    block = np.linalg.qr(linalg.gradient_block(draw.signal, shape), mode="r")
    null = scipy.linalg.null_space(block, rcond=1e-9)
    rank = shape.pixels - null.shape[1]

    def joint(kept: scipy.sparse.csr_array) -> int:
        # Channel by channel, because an input is flattened as pixels by channels.
        left = [kept[:, channel :: shape.channels] @ null for channel in range(shape.channels)]
        return shape.channels * rank + rank_beyond(np.concatenate(left, axis=1), _norm(kept))

    active = None if draw.active is None else joint(rows[draw.active])
    return Ranks(shape.channels * rank, joint(rows), active)


def _norm(matrix: scipy.sparse.csr_array) -> float:
    """At least the largest singular value, and not much more."""
    sizes = abs(matrix)
    return float(np.sqrt(sizes.sum(axis=0).max(initial=0) * sizes.sum(axis=1).max(initial=0)))


def rank_beyond(matrix: np.ndarray, scale: float, tolerance: float = 1e-9) -> int:
    """How many singular values exceed a share of a scale.

    By a pivoted Cholesky factorisation of the smaller Gram matrix, many times faster than singular
    values. It takes what is below 3e-7 of the scale for zero; where its pivots show no gap down to
    there, the singular values are computed after all.

    Args:
      matrix: `[M, N]`.
      scale: what counts as large; pieces of a matrix share the whole's.
      tolerance: that share, where singular values are computed.

    Returns:
      The rank.
    """
    if not matrix.size or not scale:
        return 0
    matrix = matrix / scale
    gram = matrix @ matrix.T if len(matrix) < matrix.shape[1] else matrix.T @ matrix
    pivoted = scipy.linalg.get_lapack_funcs("pstrf", (gram,))
    factor, _, rank, _ = pivoted(gram, tol=1e-13)
    pivots = np.diag(factor)[:rank]
    if not rank or pivots[-1] > 1e-5:
        return int(rank)
    values = np.linalg.svd(matrix, compute_uv=False)
    return int((values > tolerance).sum())


def _pool_matrix(found: Stage) -> scipy.sparse.csr_array:
    """From the pixels of a convolution's output to those behind its average pools, which are one."""
    height, width = found.shape.output
    side = math.prod(window for window in found.pools if window)
    window = (height // side * side, width // side * side) if 0 in found.pools else (side, side)
    return linalg.pool_matrix((height, width), window)


def random_draw(rng: np.random.Generator, found: Stage, weight: np.ndarray | None) -> Draw:
    """Random derivatives, and random weights where none are given.

    Args:
      rng: source of the numbers.
      found: the stage.
      weight: `[height, width, in, out]` or `None`.

    Returns:
      The draw.
    """
    shape, pool = found.shape, _pool_matrix(found)
    if weight is None:
        weight = rng.normal(size=(*shape.window, shape.channels, shape.filters))
    signal = pool.T @ rng.normal(size=(pool.shape[0], shape.filters))
    return Draw(np.asarray(weight, np.float64), signal)


def draws_of_sample(model: Model, stages: list[Stage], params: Params, batch: Batch) -> list[Draw]:
    """A sample's own derivatives and activation patterns, in float64.

    Args:
      model: a chain of layers.
      stages: its convolutions.
      params: its parameters.
      batch: of one sample.

    Returns:
      A draw a stage.
    """
    positions = [found.position for found in stages]

    def forward(params, inputs, shifts):
        values, outputs = inputs, []
        for index, layer in enumerate(layers_of(model, params)):
            linear = apply_layer(layer._replace(activation="identity"), values)
            if index in positions:
                linear = linear + shifts[positions.index(index)]
                outputs.append(linear)
            values = activations[layer.activation](linear)
        return values, outputs

    def signals(params, inputs, labels):
        # The derivative by a convolution's output is that by zeros added to it.
        zeros = [
            jnp.zeros((1, *found.shape.output, found.shape.filters), inputs.dtype)
            for found in stages
        ]
        outputs = forward(params, inputs, zeros)[1]
        loss = cross_entropy(lambda shifts, inputs: forward(params, inputs, shifts)[0])
        return outputs, jax.grad(loss)(zeros, Batch(inputs, labels))

    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        params, inputs = jax.tree.map(
            lambda leaf: jnp.asarray(leaf, jnp.float64), (params, batch.inputs)
        )
        outputs, derivatives = jax.jit(signals)(params, inputs, jnp.asarray(batch.labels))
    weights = [layers_of(model, params)[position].weight for position in positions]
    draws = []
    for found, weight, output, signal in zip(stages, weights, outputs, derivatives, strict=True):
        flat = np.asarray(output).reshape(-1, found.shape.filters)
        active = (_pool_matrix(found) @ flat).ravel() > 0 if found.relu else None
        signal = np.asarray(signal).reshape(-1, found.shape.filters)
        draws.append(Draw(np.asarray(weight), signal, active))
    return draws
