"""Lower bounds on the error of every attack, for any model and any defence with noise.

With `J` the Jacobian of the expected observation in the inputs and `S` the noise's covariance, no
estimator that is unbiased around a batch has a squared error below `tr (J^T S^-1 J)^-1` (Cramér-Rao), and
none at all one below `n^2 / (E tr J^T S^-1 J + tr J_prior)` on average over a prior (van Trees); `n` is the
number of unknown values. Location and variance are read off the defence's own law.

What a defence publishes, or shows (which coordinates were zeroed), is granted. Laplace noise of scale `b`
enters as a variance of `b^2`, its Fisher information (Stam's inequality behind Gaussian noise), and an
unknown mask as if it were known, both of which keep the bound one. Pruning and rounding behind the noise
can only lose information and are passed over. Clipping behind noise, signs and rounding to the nearest in
front of it have approximate laws: there the numbers are approximations too. A mask or a variance that a
defence took from the batch itself counts as given; what it tells of the batch does not count.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from invjax import conv, gradients
from invjax.base import Array, Batch, Defense, Model, Params, PyTree
from invjax.checks import check_choice, check_count, check_number
from invjax.defenses.law import Law
from invjax.theory.gram import at_full_precision, inverse_trace, probed_trace, relative_rounding
from invjax.theory.influence import checked_batch

Method = Literal["dense", "hutchinson", "trace"]
Field = Literal["inputs", "labels"]


class LowerBound(NamedTuple):
    """A squared error that no attack beats.

    Attributes:
      total: expected squared error, summed over all values of the batch, in squared input units.
      distance: `sqrt(total / B)`, the distance of a batch in Liu et al. 2024.
      standard_error: of `total`, from the spread of the probes; 0 where none were drawn.
      residual: largest relative residual of the probes' solves (method `hutchinson`), otherwise 0.
    """

    total: Array
    distance: Array
    standard_error: Array
    residual: Array


def cramer_rao(
    model: Model,
    params: Params,
    batch: Batch,
    defense: Defense,
    *,
    method: Method = "dense",
    unknown_labels: bool = False,
    num_probes: int | None = 100,
    num_steps: int = 1000,
    tolerance: float = 1e-6,
    key: Array | None = None,
) -> LowerBound:
    """The Cramér-Rao bound at one batch: `tr (J^T S^-1 J)^-1`.

    Args:
      model: the model, differentiable twice at the batch.
      params: its parameters.
      batch: the truth: inputs `[B, ...]`, labels as the model's loss takes them. Behind a defence on
        inputs the bound is on the inputs that it made.
      defense: with Gaussian or Laplace noise; `chain(defense, gaussian_noise(std))` adds some.
      method: `dense` builds `J` and works in float64, for up to about 2,000 input values; `hutchinson`
        estimates the trace from random signs in the inputs' type; `trace` is the weaker
        `n^2 / tr (J^T S^-1 J)`, the inequality of the means, which needs no solve.
      unknown_labels: whether the labels are nuisance parameters, free real numbers (method `dense`).
      num_probes: of `hutchinson` and `trace`, at least 2; `None` (`trace`) takes the whole basis.
      num_steps: of `hutchinson`, conjugate gradient iterations of a probe at most. An unfinished solve
        errs downward, so the result stays a bound.
      tolerance: of `hutchinson`, on the relative residual.
      key: PRNG key of the defence, as `invjax.observe` takes it, and of the probes.

    Returns:
      The bound. `dense` is infinite where the observation does not determine the inputs; `hutchinson` is
      then finite with a large residual. All are 0 where a coordinate that tells of the inputs is sent
      without noise.

    Raises:
      ValueError: parameters unlike the model, a defence without noise or one that sends signs, a number
        out of range, unknown labels that are integers or with another method.
      TypeError: a defence that is none of invjax.
    """
    check_choice("method", method, ("dense", "hutchinson", "trace"))
    check_number("num_steps", num_steps, 1)
    check_number("tolerance", tolerance, 0.0, 1.0, open_low=True)
    if unknown_labels and method != "dense":
        raise ValueError(f"unknown_labels needs the method 'dense', got {method!r}.")
    if unknown_labels and not jnp.issubdtype(jnp.result_type(batch.labels), jnp.floating):
        raise ValueError(
            "unknown_labels needs labels that are floats (one-hot rows, say), "
            f"got {jnp.result_type(batch.labels)}."
        )
    problem = _problem(model, params, batch, defense, key)
    zero = jnp.zeros((), batch.inputs.dtype)
    if method == "dense":
        return _bound(_dense(problem, unknown_labels), zero, zero, batch)
    if method == "hutchinson":
        check_count("num_probes", num_probes, 2)
        total, error, residual = _hutchinson(problem, num_probes, num_steps, tolerance)
        return _bound(total, error, residual, batch)
    trace, error = _trace(problem, num_probes)
    total = batch.inputs.size**2 / trace
    spread = jnp.where(error > 0, total * error / trace, 0.0)
    return _bound(total, spread, zero, batch)


def van_trees(
    model: Model,
    params: Params,
    batches: Batch,
    defense: Defense,
    prior_information: Array | float,
    *,
    num_probes: int | None = 100,
    key: Array | None = None,
) -> LowerBound:
    """The van Trees bound on the mean error over a prior: `n^2 / (E tr (J^T S^-1 J) + tr J_prior)`.

    The form by traces (the one behind the optimal defences of Chen et al. 2024). It needs a prior whose
    density vanishes at the border of its support, and holds for every attack, biased ones too.

    Args:
      model: the model.
      params: its parameters.
      batches: `[V, B, ...]` draws of the prior; labels `[V, B]`.
      defense: as in `cramer_rao`.
      prior_information: `tr J_prior` of a whole batch, in inverse squared input units:
        `gaussian_prior_information` or `score_prior_information`.
      num_probes: signs for every batch, at least 2; `None` takes the whole basis.
      key: as in `cramer_rao`; every batch draws its own.

    Returns:
      The bound; its standard error is that of the mean over the batches (probes included), and 0 for
      a single one.

    Raises:
      ValueError: as `cramer_rao`, or a negative information.
    """
    check_number("prior_information", prior_information, 0.0)
    key = jax.random.key(0) if key is None else key
    number, size = batches.inputs.shape[:2]

    def one(batch_and_key):
        batch, key = batch_and_key
        return _trace(_problem(model, params, batch, defense, key), num_probes)[0]

    traces = jax.lax.map(one, (batches, jax.random.split(key, number)))
    information = jnp.mean(traces) + jnp.asarray(prior_information, traces.dtype)
    total = (batches.inputs.size / number) ** 2 / information
    spread = jnp.std(traces, ddof=1) / jnp.sqrt(number) if number > 1 else jnp.zeros_like(total)
    return LowerBound(
        total, jnp.sqrt(total / size), total * spread / information, jnp.zeros_like(total)
    )


def gaussian_prior_information(covariance: Array, batch_size: int) -> Array:
    """`tr J_prior` of independent Gaussian inputs: `B tr C^-1`.

    Args:
      covariance: `[n, n]` of the values of one input, symmetric.
      batch_size: `B`.

    Returns:
      A scalar, in inverse squared input units; infinite where the covariance is singular.

    Raises:
      ValueError: not a square matrix, not symmetric, a negative eigenvalue, fewer than one sample.
    """
    check_count("batch_size", batch_size, 1)
    covariance = jnp.asarray(covariance)
    if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1]:
        raise ValueError(f"covariance must be a square matrix, got shape {covariance.shape}.")
    values = jnp.linalg.eigvalsh(covariance)
    rounding = len(values) * jnp.finfo(values.dtype).eps * jnp.max(jnp.abs(values))
    if not isinstance(values, jax.core.Tracer):
        given = np.asarray(covariance)
        symmetric = np.allclose(given, given.T, atol=1e-4 * np.abs(given).max())
        if not symmetric or values[0] < -rounding:
            raise ValueError(
                "covariance must be symmetric without negative eigenvalues, got a least of "
                f"{values[0]}{'' if symmetric else ' and an asymmetry'}."
            )
    positive = values > rounding
    inverse = 1 / jnp.where(positive, values, 1.0)
    return batch_size * jnp.where(positive.all(), jnp.sum(inverse), jnp.inf)


def score_prior_information(score: Callable[[Array], Array], inputs: Array) -> tuple[Array, Array]:
    """`tr J_prior` of any prior with a score function: the mean of `|grad log p|^2`.

    Args:
      score: `score(inputs [B, ...])`, the derivative of the log-density of a batch, like the inputs.
      inputs: `[V, B, ...]` draws of the prior.

    Returns:
      The mean and its standard error, in inverse squared input units.

    Raises:
      ValueError: fewer than two draws.
    """
    check_number("the number of draws", inputs.shape[0], 2)
    squares = jax.vmap(lambda batch: jnp.sum(jnp.square(score(batch))))(inputs)
    return jnp.mean(squares), jnp.std(squares, ddof=1) / jnp.sqrt(inputs.shape[0])


class _Problem(NamedTuple):
    """A batch behind a channel: what was observed, and what is public of it."""

    model: Model
    params: Params
    batch: Batch
    defense: Defense
    observed: PyTree
    public: PyTree
    key: Array


def _problem(model, params, batch: Batch, defense: Defense, key) -> _Problem:
    batch = checked_batch(model, params, batch)
    if not isinstance(defense, Defense):
        raise TypeError(f"defense must be an invjax defence, got {defense!r}.")
    probe_key, defense_key = jax.random.split(jax.random.key(0) if key is None else key)
    model = conv.for_matching(model)
    state = defense.init_with_key(defense_key, params)
    batch, state = defense.prepare(batch, state, params)
    candidate = _candidate(model, params, batch, defense, oracle=True)
    observed, state = defense.update(candidate, state, params)
    return _Problem(model, params, batch, defense, observed, defense.public(state), probe_key)


def _candidate(model, params, batch, defense, oracle: bool) -> PyTree:
    """The gradient that the defence acts on; the oracle for reverse mode, else for forward mode."""
    per_sample = defense.stage == "per_sample"
    if oracle:
        take = gradients.per_sample_gradients if per_sample else gradients.gradient
        return take(model, params, batch)
    slope = jax.grad(model.loss)
    if not per_sample:
        return slope(params, batch)
    return jax.vmap(slope, (None, 0))(params, jax.tree.map(lambda leaf: leaf[:, None], batch))


def _weights(law: Law, name: str) -> tuple[PyTree, PyTree]:
    """Root of the information of every coordinate, and where there is no noise at all."""
    if not law.noisy:
        raise ValueError(
            f"The defence {name} adds no noise, so no error but 0 is certain: compose it with "
            "gaussian_noise(std) by invjax.chain."
        )
    if not isinstance(law.log_weight, float):
        raise ValueError(f"The defence {name} sends signs, which have no Gaussian law.")
    laplace = 0.0 if law.laplace is None else law.laplace**2
    seen = 1.0 if law.dropped is None else 1 - law.dropped

    def leaf(location, variance, informative):
        total = jnp.broadcast_to(jax.lax.stop_gradient(variance) + laplace, location.shape)
        noisy = total > 0
        root = jnp.sqrt(seen / jnp.where(noisy, total, 1.0))
        return jnp.where(noisy & informative, root, 0.0), ~noisy & informative

    zeros = jax.tree.map(jnp.zeros_like, law.location)
    everywhere = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), law.location)
    pairs = jax.tree.map(
        leaf,
        law.location,
        zeros if law.variance is None else law.variance,
        everywhere if law.informative is None else law.informative,
    )
    return tuple(jax.tree.transpose(jax.tree.structure(zeros), None, pairs))


def _whitened(problem: _Problem, batch: Batch, oracle: bool = False) -> tuple[PyTree, PyTree]:
    """The expected observation in units of its noise, and those parts of it that have none."""
    candidate = _candidate(problem.model, problem.params, batch, problem.defense, oracle)
    law = problem.defense.law(problem.observed, candidate, problem.public)
    weights, silent = _weights(law, problem.defense.name)
    white = jax.tree.map(lambda w, leaf: jax.lax.stop_gradient(w) * leaf, weights, law.location)
    bare = jax.tree.map(lambda s, leaf: jnp.where(s, leaf, 0.0), silent, law.location)
    return white, bare


def _push(problem: _Problem, field: Field = "inputs") -> Callable:
    """`direction -> (S^-1/2 J direction, what of it shows without noise)`, in a field of the batch."""

    def forward(value):
        return _whitened(problem, problem.batch._replace(**{field: value}))

    return jax.linearize(forward, getattr(problem.batch, field))[1]


@at_full_precision
def _hutchinson(problem: _Problem, num_probes, num_steps: int, tolerance: float) -> tuple:
    inputs, push = problem.batch.inputs, _push(problem)

    def reverse(inputs):
        return _whitened(problem, problem.batch._replace(inputs=inputs), oracle=True)[0]

    _, pull = jax.vjp(reverse, inputs)
    probes = _signs(problem, num_probes)
    one = jnp.ones((), inputs.dtype)
    forward, backward = lambda direction: push(direction)[0], lambda tree: pull(tree)[0]
    settings = one, None, num_steps, tolerance
    total, error, residual = probed_trace(forward, backward, probes, *settings)
    return jnp.where(_any(push(probes[0])[1]), 0.0, total), error, residual


@at_full_precision
def _trace(problem: _Problem, num_probes: int | None) -> tuple[Array, Array]:
    """`tr J^T S^-1 J` and its standard error; infinite where something shows without noise."""
    inputs, push = problem.batch.inputs, _push(problem)

    def square(direction):
        white, bare = push(direction)
        return optax.tree.norm(white, squared=True), _any(bare)

    if num_probes is None:
        squares, shown = conv.grouped_vmap(square)(_basis(inputs))
        trace, error = jnp.sum(squares), jnp.zeros(())
    else:
        check_count("num_probes", num_probes, 2)
        squares, shown = conv.grouped_vmap(square)(_signs(problem, num_probes))
        trace, error = jnp.mean(squares), jnp.std(squares, ddof=1) / jnp.sqrt(num_probes)
    shown = shown.any()
    return jnp.where(shown, jnp.inf, trace), jnp.where(shown, 0.0, error)


def _any(tree: PyTree) -> Array:
    return jnp.stack([jnp.any(leaf != 0) for leaf in jax.tree.leaves(tree)]).any()


def _basis(value: Array) -> Array:
    return jnp.eye(value.size, dtype=value.dtype).reshape(-1, *value.shape)


def _signs(problem: _Problem, number: int) -> Array:
    inputs = problem.batch.inputs
    return jax.random.rademacher(problem.key, (number, *inputs.shape), inputs.dtype)


def _wide(tree: PyTree) -> PyTree:
    """Floats in float64."""

    def leaf(value):
        value = jnp.asarray(value)
        return value.astype(float) if jnp.issubdtype(value.dtype, jnp.floating) else value

    return jax.tree.map(leaf, tree)


def _dense(problem: _Problem, unknown_labels: bool) -> Array:
    dtype = problem.batch.inputs.dtype
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        wide = _wide((problem.params, problem.batch, problem.observed, problem.public))
        params, batch, observed, public = wide
        problem = problem._replace(params=params, batch=batch, observed=observed, public=public)
        jacobian, bare = _columns(problem, "inputs")
        if unknown_labels:
            nuisance, shown = _columns(problem, "labels")
            # What a change of labels explains says nothing; they may tell the same thing twice.
            left, values, _ = jnp.linalg.svd(nuisance, full_matrices=False)
            left = jnp.where((values > relative_rounding(nuisance) * values[0])[None], left, 0.0)
            jacobian = jacobian - left @ (left.T @ jacobian)
            bare = bare | shown
        return jnp.where(bare, 0.0, inverse_trace(jacobian)).astype(dtype)


def _columns(problem: _Problem, field: Field) -> tuple[Array, Array]:
    """The whitened Jacobian in one field of the batch, and whether anything shows without noise."""
    value = getattr(problem.batch, field)
    white, bare = conv.grouped_vmap(_push(problem, field))(_basis(value))
    leaves = [leaf.reshape(value.size, -1) for leaf in jax.tree.leaves(white)]
    return jnp.concatenate(leaves, axis=1).T, _any(bare)


def _bound(total: Array, error: Array, residual: Array, batch: Batch) -> LowerBound:
    distance = jnp.sqrt(total / batch.inputs.shape[0])
    return LowerBound(total, distance, error, residual)
