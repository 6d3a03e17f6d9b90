"""SPEAR: a whole batch, exactly, because ReLU makes the derivatives behind a low-rank gradient sparse."""

import jax
import jax.numpy as jnp
import numpy as np

from invjax.attacks.analytic.checks import check_one_step
from invjax.attacks.analytic.spear_steps import (
    Problem,
    Search,
    advance,
    disagreements,
    factorize,
    number_of_blocks,
    share_wrong,
    start,
    unmixed,
)
from invjax.base import Array, Attack, Model, Observation, Reconstruction
from invjax.checks import check_count, check_number
from invjax.models.layers import backpropagate, dense_layers, loss_vectors, preactivations
from invjax.observe import check_observation


def spear(
    model: Model,
    *,
    batch_size: int | None = None,
    num_steps: int = 500,
    draws: int = 4096,
    sparsity: float = 0.05,
    tolerance: float | None = None,
) -> Attack:
    """Reconstruct a whole batch from the first layer's gradient (Dimitrov et al. 2024, SPEAR).

    The weight gradient of a batch of M has rank M: `G = L R`. The derivative by what the layer
    computes is `L Q` for some `Q [M, M]`, and the inputs are `inv(Q) R`. Behind a ReLU the derivative
    is sparse, and a column of `Q` is orthogonal to every row of `L` whose unit its sample leaves
    inactive. So rows are drawn at random and vectors orthogonal to all of them kept if they leave many
    more units at zero; the bias gradient gives their scale. The certificate is that zeros and signs
    agree: a derivative is zero exactly where the unit is not above zero on the recovered input.

    Departures: M rows are drawn at a time and inverted, which gives the M vectors that are orthogonal
    to all but one of them (as in information-set decoding of sparse code words), each a draw of the
    paper's; vectors are tested on a few other units first; those that pass are fitted again to all
    units that they leave at zero, which brings them to the precision of the gradient. The final
    swaps of the paper are tried one vector a step.

    The cost grows like one over the share of inactive units to the power M - 1. No unit has to be
    exclusive to a sample, and rows of units that a defence has zeroed are left out. Each sample must
    leave M active units of the batch at zero, or its column is like any other vector: layers
    of few units do not do. It wants an exact gradient: noise, or a defence that changes values, ends it,
    and so do samples with dependent derivatives.

    Args:
      model: a fully connected ReLU network with a hidden layer and a bias in the first layer.
      batch_size: M, static, where the observation does not tell it; `batch_size_by_rank` infers it.
      num_steps: steps at most.
      draws: matrices that are inverted in a step, about.
      sparsity: least share of units at zero of a vector that is kept, above 0.
      tolerance: below which, relative to its row of `L`, an entry is zero; by default 1e-9 for
        gradients of double precision and 1e-5 for single.

    Returns:
      The attack. It computes in the observation's precision and ends when all is certified. Inputs
      are `[M, *input_shape]`. `found` is true where a sample's signs are as certified and its input,
      with one of the labels, reproduces its column of the derivative; that label is returned, granted
      ones are not read. The objective is the share of entries that disagree, one minus the paper's
      score.
      `diagnostics`: `draws` so far; `candidates`, the directions kept.

    Raises:
      ValueError: a number out of range; and at its use, a model of another kind, without a hidden
        layer or without the bias, no batch size or two different ones, more samples than units or
        inputs, several local steps.
    """
    if batch_size is not None:
        check_count("batch_size", batch_size, 1)
    check_count("num_steps", num_steps, 1)
    check_count("draws", draws, 1)
    check_number("sparsity", sparsity, 0.0, 1.0, open_low=True, open_high=True)
    if tolerance is not None:
        check_number("tolerance", tolerance, 0.0, 1.0, open_low=True)

    def check(observation: Observation) -> None:
        check_observation(model, observation)
        check_one_step(observation, "spear")
        _check_layers(model, observation, batch_size)

    def init(key: Array, observation: Observation) -> Search:
        with jax.default_matmul_precision("highest"):
            return start(key, factorize(model, observation, _size_of(observation, batch_size)))

    def step(observation: Observation, search: Search) -> Search:
        del observation
        with jax.default_matmul_precision("highest"):
            return advance(search, draws, sparsity, _allowed(search.problem, tolerance))

    def result(observation: Observation, search: Search) -> Reconstruction:
        with jax.default_matmul_precision("highest"):
            zero = _allowed(search.problem, tolerance)
            inputs, labels, found = read(model, observation, search, zero)
        units, samples = search.problem.left.shape
        return Reconstruction(
            inputs=inputs.reshape((samples, *observation.facts.input_shape)),
            labels=labels,
            found=found,
            objective=share_wrong(search),
            diagnostics={
                "draws": search.step * number_of_blocks(units, samples, draws) * samples,
                "candidates": (search.zeros >= 0).sum(),
            },
        )

    return Attack(
        init,
        step,
        result,
        num_steps=num_steps,
        done=lambda search: search.wrong == 0,
        objective=share_wrong,
        check=check,
    )


def _size_of(observation: Observation, given: int | None) -> int:
    known = observation.facts.batch_size
    size = given if known is None else known
    if size is None:
        raise ValueError(
            "The observation does not tell its batch size: give spear batch_size=, for instance "
            "by batch_size_by_rank."
        )
    if given not in (None, size):
        raise ValueError(f"The observation's batch_size is {known}, spear's is {given}.")
    return size


def _check_layers(model: Model, observation: Observation, given: int | None) -> None:
    """Refuse layers that spear cannot read, or a batch too large for them."""
    first, *others = dense_layers(model, observation.params)
    assert first.weight is not None
    if first.bias is None:
        raise ValueError(f"spear needs a bias in the first layer of {model.name}.")
    if not others:
        raise ValueError(f"spear needs a hidden layer with ReLU, {model.name} has none.")
    samples = _size_of(observation, given)
    if samples > min(first.weight.shape):
        raise ValueError(
            f"spear reads at most as many samples as the first layer has inputs and units, "
            f"{first.weight.shape}; got a batch of {samples}."
        )


def _allowed(problem: Problem, tolerance: float | None) -> float:
    """Below which an entry is zero."""
    double = problem.left.dtype == jnp.float64
    return (1e-9 if double else 1e-5) if tolerance is None else tolerance


def batch_size_by_rank(
    model: Model, observation: Observation, tolerance: float | None = None
) -> int:
    """The batch size, as the rank of the first layer's weight gradient. Host code.

    Args:
      model: a fully connected ReLU network.
      observation: what the adversary was granted.
      tolerance: smallest singular value that counts, relative to the largest; by default the
        largest side of the matrix times the rounding of its type, as for `numpy.linalg.matrix_rank`.

    Returns:
      The rank: the batch size unless samples are dependent or saturated, or the gradient rounded.

    Raises:
      ValueError: a tolerance out of range, a model of another kind, no gradient, several local steps:
        samples are then counted once a step.
    """
    if tolerance is not None:
        check_number("tolerance", tolerance, 0.0, 1.0, open_high=True)
    check_observation(model, observation)
    check_one_step(observation, "batch_size_by_rank")
    weight = np.asarray(dense_layers(model, observation.gradient)[0].weight)
    return int(np.linalg.matrix_rank(weight, rtol=tolerance))


def read(
    model: Model, observation: Observation, search: Search, zero: float
) -> tuple[Array, Array, Array]:
    """Inputs `[M, d_0]`, labels and whether each is certified."""
    problem, samples = search.problem, search.chosen.shape[0]
    inverse = jnp.linalg.inv(search.chosen.T)
    derivative = samples * (inverse @ problem.total)[:, None] * (search.chosen @ problem.left.T)
    inputs = unmixed(problem, search.chosen, problem.right)
    layers = dense_layers(model, observation.params)
    values = preactivations(layers, inputs)

    def distance(label: Array) -> Array:
        signal = loss_vectors(values[-1], jnp.full(samples, label))
        delta = jnp.where(problem.active[None], backpropagate(layers, values, signal)[0], 0.0)
        return jnp.linalg.norm(delta - derivative, axis=1)

    distances = jax.lax.map(distance, jnp.arange(model.num_classes))
    error = 1e-6 if inputs.dtype == jnp.float64 else 1e-3
    certified = ~disagreements(problem, search.chosen, zero).any(axis=1)
    certified &= distances.min(axis=0) <= error * jnp.linalg.norm(derivative, axis=1)
    certified &= search.wrong <= problem.left.size
    return inputs, distances.argmin(axis=0), certified
