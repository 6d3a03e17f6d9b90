"""The security boundary of exact reconstruction, as far as neuron exclusivity tells it.

A ReLU neuron that is active on exactly one sample of the batch (an ExAN; Pan et al. 2022) has a
gradient of that sample alone. With enough of them, labels, number and inputs of a batch follow from
its mean gradient by a deterministic algorithm: the batch is insecure (`is_sufficient`). On the
other side batches exist that share their exact gradient with others (`secure_boundary`,
`frozen_kernel`, `twin_batch`). Between the two neither says anything: a batch without a single
ExAN may be the only one with its gradient, and other attacks then find it.

The theorem of the secure side is ours; that of Pan et al. is not public in full. Everything reads
the truth.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from invjax.base import Array, Batch, Model, Params
from invjax.checks import check_count, check_number
from invjax.defenses.exclusivity import exclusive, hidden_values
from invjax.models.layers import backpropagate, dense_layers, loss_vectors, preactivations
from invjax.observe import check_batch, check_params

TOLERANCE = 1e-10
"""Singular values below this, relative to the largest, count as zero."""


class Boundary(NamedTuple):
    """Ranks that decide whether a batch has twins of any size.

    Attributes:
      signal_rank: rank of `A`, the `[d_1, M]` derivatives of the samples' losses by what the first
        layer computes.
      weight_rank: rank of the first weight.
      kernel_dimension: `(M - signal_rank) (d_0 - weight_rank)`, the dimensions in which the batch
        may move without limit; a lower bound on that of `frozen_kernel`.
      hidden: `[M]` booleans, the samples that move there; the others have no twin of this kind.
      secure: whether there is any such dimension.
    """

    signal_rank: int
    weight_rank: int
    kernel_dimension: int
    hidden: np.ndarray
    secure: bool


class FrozenKernel(NamedTuple):
    """The changes of a batch that leave its gradient and its activation patterns as they are.

    Attributes:
      dimension: of the space.
      basis: `[dimension, M, ...]`, orthonormal changes of the inputs.
    """

    dimension: int
    basis: np.ndarray


class Statistics(NamedTuple):
    """How exclusive random batches are.

    Attributes:
      probability: share of batches with sufficient exclusivity.
      mean_counts: `[H]`, mean number of ExANs a sample, at every hidden layer.
    """

    probability: Array
    mean_counts: Array


def exclusivity_state(model: Model, params: Params, inputs: Array) -> Array:
    """The neuron exclusivity state of a batch (Pan et al. 2022): ExANs of each layer and sample.

    Args:
      model: a model that ends in dense ReLU layers with at least one hidden; what comes before, such
        as convolutions, is applied and not counted.
      params: its parameters.
      inputs: `[M, ...]`.

    Returns:
      `[H, M]` integers: neurons of a hidden layer that are active on this sample alone.

    Raises:
      ValueError: no such head.
    """
    values = hidden_values(model, params, inputs)
    return jnp.stack([exclusive(value).sum(axis=1) for value in values])


def is_sufficient(state: Array) -> Array:
    """Whether a batch has sufficient exclusivity (Pan et al. 2022): the insecure side.

    Every sample owns at least two ExANs at the last hidden layer and one at every other. With three
    classes or more, loss vectors that are pairwise not parallel, no sample with a loss of zero, and
    the exact gradient including the hidden biases (or a network without any), such a batch is
    recovered. Less exclusivity promises nothing: see the module.

    Args:
      state: `[H, M]`, of `exclusivity_state`.

    Returns:
      A boolean scalar.
    """
    return (state[-1] >= 2).all() & (state[:-1] >= 1).all()


def exclusivity_probability(
    key: Array,
    model: Model,
    params: Params,
    inputs: Array,
    batch_size: int,
    num_batches: int = 1000,
) -> Statistics:
    """How likely a random batch has sufficient exclusivity.

    Widths, depths and batch sizes are swept by a loop over models and sizes, each of which is
    compiled on its own; a course of training by a `vmap` over stacked parameters::

        over_training = jax.vmap(exclusivity_probability, (None, None, 0, None, None))
        for width in (128, 512, 2048):
            model = invjax.models.mlp((width,))
            snapshots = ...  # parameters with a leading axis
            found = over_training(key, model, snapshots, inputs, 8)

    Args:
      key: PRNG key of the batches.
      model: as in `exclusivity_state`.
      params: its parameters.
      inputs: `[N, ...]`, from which batches are drawn without replacement.
      batch_size: samples of a batch, 1 to N.
      num_batches: batches, at least 1.

    Returns:
      The share of sufficient batches, of standard error at most `1 / (2 sqrt(num_batches))`, and
      mean counts.

    Raises:
      ValueError: a number that is out of range or not whole, a model without such a head.
    """
    check_count("batch_size", batch_size, 1, len(inputs))
    check_count("num_batches", num_batches, 1)
    return _probability(key, model, params, inputs, batch_size, num_batches)


@functools.partial(jax.jit, static_argnums=(1, 4, 5))
def _probability(key, model, params, inputs, batch_size, num_batches) -> Statistics:
    # Whether a sample activates a neuron does not depend on the batch it is in.
    values = hidden_values(model, params, inputs)

    def draw(key):
        # Without replacement, and many times faster than a permutation.
        _, chosen = jax.lax.top_k(jax.random.uniform(key, (len(inputs),)), batch_size)
        state = jnp.stack([exclusive(value[chosen]).sum(axis=1) for value in values])
        return is_sufficient(state), state.mean(axis=1)

    sufficient, counts = jax.lax.map(draw, jax.random.split(key, num_batches), batch_size=64)
    return Statistics(sufficient.mean(), counts.mean(axis=0))


def secure_boundary(
    model: Model, params: Params, batch: Batch, *, tolerance: float = TOLERANCE
) -> Boundary:
    """Whether a batch has twins: other batches, however far, of exactly the same gradient.

    Let `A` hold the derivatives of the samples' losses by what the first layer computes. For `v` in
    the null space of the first weight and `c` in that of `A`, sample `m` may move by `c_m v`: no
    neuron sees it, and in the gradient it cancels. Both spaces are there where a batch exceeds the
    width of the first layer, or where as many samples as there are classes share all their
    activation patterns; and the first layer has fewer units than inputs. Where every sample owns an
    ExAN of the first layer, and a signal at it, `A` has full rank and there is no twin.

    A secure batch is hidden in these dimensions only: what neurons see of it may still be found, and
    a known range of inputs limits the twins. Nor is a batch that is not secure lost: `frozen_kernel`
    counts bounded moves too. Samples with a loss of nearly zero lower the rank: they are hidden.

    Host code in float64: neither jit- nor vmap-able.

    Args:
      model: a fully connected ReLU network with softmax logits.
      params: its parameters.
      batch: the truth: inputs `[M, ...]`, labels `[M]`.
      tolerance: of the ranks, relative to the largest singular value.

    Returns:
      The ranks, and what follows.

    Raises:
      ValueError: another model, parameters unlike it, a batch that cannot be its, a tolerance out of
        range.
      TypeError: inputs that are not floats, labels that are not integers.
    """
    truth = _truth(model, params, batch, tolerance)
    signals, weights = _signal_kernel(truth, tolerance), _weight_kernel(truth, tolerance)
    size, inputs = signals.shape[1], weights.shape[1]
    dimension = len(signals) * len(weights)
    moves = np.abs(signals).max(axis=0, initial=0.0) > np.sqrt(tolerance)
    return Boundary(
        size - len(signals),
        inputs - len(weights),
        dimension,
        moves & (dimension > 0),
        dimension > 0,
    )


def frozen_kernel(
    model: Model, params: Params, batch: Batch, *, tolerance: float = TOLERANCE
) -> FrozenKernel:
    """All changes of a batch that keep its gradient exactly, as long as no activation flips.

    Those that leave every sample's logits as they are and, at every layer, cancel in the weight's
    gradient. Signals and bias gradients then stay too, so this holds for finite changes, up to
    where a neuron first flips; changes that no neuron sees (`secure_boundary`) have no such limit.
    An empty kernel says that no batch with the same patterns and logits has the same gradient.

    Host code in float64: neither jit- nor vmap-able; a singular value decomposition of `M d_0`
    columns, so for batches of up to about 3,000 input values.

    Args:
      model: a fully connected ReLU network with softmax logits.
      params: its parameters.
      batch: the truth: inputs `[M, ...]`, labels `[M]`.
      tolerance: of the rank, relative to the largest singular value.

    Returns:
      The dimension and an orthonormal basis.

    Raises:
      ValueError: as `secure_boundary`.
      TypeError: likewise.
    """
    truth = _truth(model, params, batch, tolerance)
    size, width = truth.inputs.shape
    jacobian = np.broadcast_to(np.eye(width), (size, width, width))
    blocks = []
    for weight, value, delta in zip(truth.weights, truth.values, truth.deltas, strict=True):
        # sum_m delta^m (J^m x^m)^T = 0 is R (J x) = 0 with delta^T = Q R, of the same singular values.
        triangle = np.linalg.qr(delta.T / size, mode="r")
        block = np.einsum("km,mij->kimj", triangle, jacobian)
        blocks.append(block.reshape(-1, size * width))
        jacobian = np.einsum("io,mij->moj", weight, jacobian)
        if value is not truth.values[-1]:
            jacobian = jacobian * (value > 0)[:, :, None]
    logits = np.zeros((size, jacobian.shape[1], size, width))
    logits[np.arange(size), :, np.arange(size)] = jacobian
    basis = _null_space(np.concatenate([*blocks, logits.reshape(-1, size * width)]), tolerance)
    return FrozenKernel(len(basis), basis.reshape(-1, *batch.inputs.shape))


def twin_batch(
    key: Array,
    model: Model,
    params: Params,
    batch: Batch,
    size: float = 1.0,
    *,
    tolerance: float = TOLERANCE,
) -> Batch:
    """Another batch of exactly the same gradient, a random one of those of `secure_boundary`.

    Every sample moves by `c_m v`, with `c` random in the null space of the signals and `v` in that of
    the first weight. Host code in float64, and float64 is what makes the gradients agree: compare
    them inside `jax.enable_x64`, with parameters in float64. Elsewhere JAX rounds the twin to float32.

    Args:
      key: PRNG key of the direction.
      model: a fully connected ReLU network with softmax logits.
      params: its parameters.
      batch: inputs `[M, ...]`, labels `[M]`.
      size: root mean square of the change over all input values, positive; inputs may leave their
        range.
      tolerance: of the ranks, relative to the largest singular value.

    Returns:
      The twin: inputs as a NumPy array in float64, the same labels.

    Raises:
      ValueError: as `secure_boundary`, a size out of range; and where there is no twin, with the
        reason.
      TypeError: as `secure_boundary`.
    """
    check_number("size", size, 0.0, open_low=True, open_high=True)
    truth = _truth(model, params, batch, tolerance)
    signals, weights = _signal_kernel(truth, tolerance), _weight_kernel(truth, tolerance)
    if not len(signals):
        raise ValueError(
            f"The batch has no twin: its {len(truth.inputs)} first-layer signals are linearly "
            "independent, as they are where every sample has an exclusive neuron there."
        )
    if not len(weights):
        raise ValueError(
            f"The batch has no twin of any size: the first weight, {truth.weights[0].shape}, "
            "sees every direction of the inputs."
        )
    along, across = (
        np.asarray(jax.random.normal(key, (len(basis),)), np.float64) @ basis
        for key, basis in zip(jax.random.split(key), (signals, weights), strict=True)
    )
    change = np.outer(along, across)
    change *= size / np.sqrt(np.mean(np.square(change)))
    return batch._replace(inputs=(truth.inputs + change).reshape(batch.inputs.shape))


class _Truth(NamedTuple):
    """A batch inside a network, in float64: `[M, d_0]`, and of every layer weight, values, deltas."""

    inputs: np.ndarray
    weights: list[np.ndarray]
    values: list[np.ndarray]
    deltas: list[np.ndarray]


def _truth(model: Model, params: Params, batch: Batch, tolerance: float) -> _Truth:
    check_number("tolerance", tolerance, 0.0, 1.0, open_high=True)
    check_batch(model, batch)
    check_params(model, params, batch.inputs.shape[1:])
    inputs = np.asarray(batch.inputs, np.float64).reshape(len(batch.inputs), -1)
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        exact = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        found = _inside(model, exact, jnp.asarray(inputs), jnp.asarray(batch.labels))
    return _Truth(inputs, *jax.tree.map(np.asarray, found))


@functools.partial(jax.jit, static_argnums=0)
def _inside(model: Model, params: Params, inputs: Array, labels: Array):
    layers = dense_layers(model, params)
    values = preactivations(layers, inputs)
    deltas = backpropagate(layers, values, loss_vectors(values[-1], labels))
    return [layer.weight for layer in layers], values, deltas


def _signal_kernel(truth: _Truth, tolerance: float) -> np.ndarray:
    return _null_space(truth.deltas[0].T, tolerance)


def _weight_kernel(truth: _Truth, tolerance: float) -> np.ndarray:
    return _null_space(truth.weights[0].T, tolerance)


def _null_space(matrix: np.ndarray, tolerance: float) -> np.ndarray:
    """Orthonormal rows that the matrix maps to zero, `[dimension, columns]`."""
    return scipy.linalg.null_space(np.linalg.qr(matrix, mode="r"), rcond=tolerance).T
