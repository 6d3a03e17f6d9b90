"""Samples from the gradient of two dense layers: subspace, tensor, components, signs, polish."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from invjax.attacks.analytic.tensor import moments, readout
from invjax.attacks.analytic.tensor.decompose import decompose
from invjax.attacks.analytic.tensor.hermite import (
    ACTIVATIONS,
    hermite_coefficients,
    is_homogeneous,
    is_odd,
    leading_order,
)
from invjax.attacks.analytic.tensor.moments import Problem
from invjax.attacks.analytic.tensor.polish import (
    Candidate,
    Scales,
    balanced,
    deviations,
    polish,
    standard_errors,
)
from invjax.base import Array


class Settings(NamedTuple):
    """What is static of the attack; see `attack.tensor`.

    With `constant` the last input is that of a hidden bias, the number one, and `norm` counts it.
    """

    activation: str
    method: str
    estimator: moments.Estimator
    norm: float | None
    polish: bool
    noise_std: float | None
    restarts: int
    max_steps: int
    contractions: int = 8
    constant: bool = False


class Recovered(NamedTuple):
    """What was found.

    Attributes:
      candidate: the samples, in the coordinates of `Problem`.
      objective: norm of the unexplained gradient over that of the gradient, both blocks balanced; with
        a noise level, the root mean square deviation in its units.
      residual: `[B]`, of each sample the unexplained norm over that of its own part; or, where it is
        larger, the error of the fitted input over its norm, to first order, were an error all that is
        unexplained; with a noise level three standard errors over the norm, and more where more is
        unexplained than noise. Times the own part over the gradient, where that is larger. Infinite
        where there are not twice as many transmitted entries as unknowns, or the sign is not told.
      tensor_residual: of the decomposition.
      gap: singular value `B + 1` over `B` of the hidden gradient; 1 where there is no value `B`.
    """

    candidate: Candidate
    objective: Array
    residual: Array
    tensor_residual: Array
    gap: Array


def recover(key: Array, problem: Problem, size: int, settings: Settings) -> Recovered:
    """The samples behind a gradient.

    Args:
      key: PRNG key of contractions and restarts.
      problem: two dense layers and their gradient.
      size: how many samples.
      settings: of the attack.

    Returns:
      What was found.
    """
    exact, values = moments.row_space(problem.weight_gradient, size)
    keys = jax.random.split(key, 3)
    space, start, tensor_residual = _by_moments(keys, problem, exact, size, settings)
    candidate = start
    if settings.polish:
        candidate = _polished(keys[2], problem, space, start, settings)
        candidate = _by_convention(candidate, settings)
    objective, residual = fit(problem, space, candidate, settings)
    residual = jnp.where(_tells_signs(candidate, settings), residual, jnp.inf)
    return Recovered(
        candidate, objective, residual, tensor_residual, moments.gap_after(values, size)
    )


def _by_moments(keys: Array, problem: Problem, exact: Array, size: int, settings: Settings):
    order, published = leading_order(settings.activation), settings.method == "paper"
    directions = exact
    if published:
        second = abs(hermite_coefficients(settings.activation)[2]) > 1e-4
        directions = moments.moment_space(
            keys[0], problem, size, 2 if second else 3, settings.estimator, settings.contractions
        )
    space = moments.whitened(problem, directions, whiten=not published)
    tensors = moments.hermite_tensors(
        problem, space, order, settings.estimator, regression=not published
    )
    parts = decompose(keys[1], tensors[order], trials=100 if published else 60)
    orders = readout.orders_of(settings.activation, order)
    weights = readout.weights_by_order(tensors, parts.directions, orders.used)
    scales = _norms(problem, space, parts.directions, weights, orders, settings)
    both, misfits = readout.signals_at(orders, weights, scales)
    constant = None
    if settings.constant:
        constant = space.inputs(parts.directions)[:, -1]
    odd = all(p % 2 for p in orders.used)
    signs, signals = readout.choose_signs(both, misfits, constant, odd=odd)
    start = readout.candidate_of(space, parts.directions, scales, signs, signals)
    return space, start, parts.residual


def _norms(problem, space, directions, weights, orders, settings: Settings) -> Array:
    if settings.norm is not None:
        return readout.known_norms(space, directions, settings.norm)
    if not is_homogeneous(settings.activation):
        return readout.fitted_norms(orders, weights)
    # The orders say nothing: take the derivatives to be those of even odds, `2 (1 - 1/C) / B`.
    size, classes = weights.shape[1:]
    ones = jnp.ones(size, weights.dtype)
    unit = jnp.abs(readout.signals_at(orders, weights, ones)[0][0]).sum(axis=1)
    return unit * size / (2 * (1 - 1 / max(classes, 2)))


def _polished(key, problem: Problem, space, start: Candidate, settings: Settings) -> Candidate:
    if settings.noise_std is not None:
        starts = _starts(key, start.inputs, start.signals, settings.restarts)
        return _first_good(problem, starts, jnp.asarray(True), settings)
    inner, sparse = _within(problem, space, settings)
    starts = _starts(key, space.coordinates(start.inputs), start.signals, settings.restarts)
    dense = _first_good(inner, starts, ~sparse, settings)
    dense = dense._replace(inputs=space.inputs(dense.inputs))
    if not settings.restarts:
        return dense
    # With entries missing the span is only near: fit what is there, in all coordinates.
    everywhere = starts._replace(inputs=jax.vmap(space.inputs)(starts.inputs))
    full = _first_good(problem, everywhere, sparse, settings)
    return jax.tree.map(lambda a, b: jnp.where(sparse, a, b), full, dense)


def _within(problem: Problem, space: moments.Subspace, settings: Settings):
    """The problem in the span, in which all rows lie and the fit is small; and whether entries lack."""
    alive = problem.weight_seen.max(axis=1)
    inner = problem._replace(
        weight=space.points,
        weight_gradient=space.coordinates(problem.weight_gradient),
        weight_seen=jnp.broadcast_to(alive[:, None], space.points.shape),
    )
    sparse = (problem.weight_seen < alive[:, None]).any() | (alive.sum() < space.points.shape[1])
    sparse &= settings.restarts > 0
    return inner, sparse


def _starts(key: Array, inputs: Array, signals: Array, restarts: int) -> Candidate:
    """The estimate, and such with all or about half of the inputs drawn anew, of norms like theirs."""
    keys = jax.random.split(key)
    drawn = jax.random.normal(keys[0], (restarts, *inputs.shape), inputs.dtype)
    norms = jnp.linalg.norm(inputs, axis=1)[None, :, None]
    drawn *= norms / jnp.linalg.norm(drawn, axis=2, keepdims=True)
    share = jnp.where(jnp.arange(restarts) % 2 == 0, 1.0, 0.5)[:, None, None]
    anew = jax.random.uniform(keys[1], (restarts, len(inputs), 1)) < share
    others = jnp.where(anew, drawn, inputs[None])
    return Candidate(
        jnp.concatenate([inputs[None], others]),
        jnp.broadcast_to(signals[None], (restarts + 1, *signals.shape)),
    )


def _first_good(problem: Problem, starts: Candidate, wanted: Array, settings: Settings):
    """The first start that leads to an exact fit, or to one within the noise, else the best.

    Nothing is done where it is not wanted.
    """
    activation = ACTIVATIONS[settings.activation]
    kinked = settings.noise_std is None and is_homogeneous(settings.activation)
    eps = float(jnp.finfo(starts.inputs.dtype).eps)
    tolerance = (eps / 4) ** 2 if settings.noise_std is None else 0.0
    enough = eps
    if settings.noise_std is not None:
        # Half the squared deviations of noise alone, and a twentieth more.
        enough = 0.525 * (problem.weight_seen.sum() + problem.outer_seen.sum())

    def attempt(best, begin: Candidate):
        steps = jnp.where(wanted & (best[1] > enough), settings.max_steps, 0)

        def fit_once(_, found: Candidate) -> Candidate:
            mine = _clear_of_kinks(problem, found) if kinked else problem
            scales = _scales(mine, settings)
            return polish(mine, activation, scales, found, max_steps=steps, tolerance=tolerance)[0]

        after = jax.lax.fori_loop(0, 8 if kinked else 1, fit_once, begin)
        left = deviations(problem, activation, _scales(problem, settings), after)
        cost = sum(jnp.sum(part**2) for part in left) / 2
        better = (cost < best[1]) & (steps > 0)
        return jax.tree.map(lambda new, old: jnp.where(better, new, old), (after, cost), best), None

    first = jax.tree.map(lambda leaf: leaf[0], starts)
    nothing = (first, jnp.asarray(jnp.inf, starts.inputs.dtype))
    return jax.lax.scan(attempt, nothing, starts)[0][0]


def _by_convention(candidate: Candidate, settings: Settings) -> Candidate:
    """Of all candidates with the same gradient the one that is meant."""
    if settings.norm is not None and is_homogeneous(settings.activation):
        # `c x` and `p / c` have the gradient of `x` and `p`.
        ratio = settings.norm / jnp.linalg.norm(candidate.inputs, axis=1, keepdims=True)
        return Candidate(candidate.inputs * ratio, candidate.signals / ratio)
    if is_odd(settings.activation):
        # And so have `-x` and `-p`.
        wrong = readout.wrong_sign(candidate.signals)
        if settings.constant:
            wrong = candidate.inputs[:, -1] < 0
        turned = jnp.where(wrong, -1.0, 1.0).astype(candidate.inputs.dtype)[:, None]
        return Candidate(candidate.inputs * turned, candidate.signals * turned)
    return candidate


def _tells_signs(candidate: Candidate, settings: Settings) -> Array:
    """`[B]`, whether a candidate's sign is more than convention; of one output it is taken on trust."""
    if not is_odd(settings.activation) or candidate.signals.shape[1] == 1:
        return jnp.ones(len(candidate.inputs), bool)
    if settings.constant:
        return candidate.inputs[:, -1] > 0.5
    eps = float(jnp.finfo(candidate.signals.dtype).eps)
    return readout.tells_sign(candidate.signals, eps**0.5)


def _clear_of_kinks(problem: Problem, candidate: Candidate) -> Problem:
    """Leave out the units that an error of the candidate may have switched on or off.

    On the others the gradient is bilinear in inputs and signals. The margin keeps the surest third.
    """
    margin = jnp.abs(problem.weight @ candidate.inputs.T)
    margin = (margin / jnp.linalg.norm(candidate.inputs, axis=1)[None]).min(axis=1)
    sure = (margin >= jnp.quantile(margin, 2 / 3)).astype(margin.dtype)[:, None]
    return problem._replace(
        weight_seen=problem.weight_seen * sure, outer_seen=problem.outer_seen * sure
    )


def _scales(problem: Problem, settings: Settings) -> Scales:
    if settings.noise_std is None:
        return balanced(problem)
    noise = jnp.asarray(settings.noise_std, problem.weight.dtype)
    return Scales(noise, noise)


def fit(
    problem: Problem, space: moments.Subspace, candidate: Candidate, settings: Settings
) -> tuple[Array, Array]:
    """How well a candidate explains what was transmitted; see `Recovered`."""
    activation, scales = ACTIVATIONS[settings.activation], _scales(problem, settings)
    tiny = jnp.finfo(candidate.inputs.dtype).tiny

    def norm(parts) -> Array:
        return jnp.sqrt(sum(jnp.sum(part**2) for part in parts))

    left = norm(deviations(problem, activation, scales, candidate))
    seen = problem.weight_seen.sum() + problem.outer_seen.sum()
    unknowns = candidate.inputs.size + candidate.signals.size
    freedom = jnp.maximum(seen - unknowns, 1.0)
    blank = problem._replace(
        weight_gradient=jnp.zeros_like(problem.weight_gradient),
        outer_gradient=jnp.zeros_like(problem.outer_gradient),
    )

    def own(inputs: Array, signals: Array) -> Array:
        return norm(deviations(blank, activation, scales, Candidate(inputs[None], signals[None])))

    parts = jnp.maximum(jax.vmap(own)(*candidate), tiny)
    nothing = jax.tree.map(jnp.zeros_like, candidate)
    whole = jnp.maximum(norm(deviations(problem, activation, scales, nothing)), tiny)
    # Large parts that cancel are those of a degenerate fit: two samples of one direction.
    cancelled = jnp.maximum(parts / whole, 1.0)
    if settings.noise_std is not None:
        objective = left / jnp.sqrt(freedom)
        # What is beyond chance is no noise, and may be the error of a fit that got stuck.
        beyond = jnp.maximum(left**2 - freedom - 3 * jnp.sqrt(2 * freedom), 0.0)
        errors = jnp.sqrt(9 + beyond) * _errors(problem, space, candidate, settings)
        residual = errors * cancelled
    else:
        objective = left / whole
        residual = left / parts * cancelled
        if settings.polish:
            errors = left * _errors(problem, space, candidate, settings)
            residual = jnp.maximum(residual, errors * cancelled)
    told = (seen >= 2 * unknowns) & jnp.isfinite(residual)
    return objective, jnp.where(told, residual, jnp.inf)


def _errors(problem: Problem, space: moments.Subspace, candidate: Candidate, settings) -> Array:
    """Relative standard errors of the inputs, in the coordinates of the fit."""
    errors = functools.partial(
        standard_errors,
        activation=ACTIVATIONS[settings.activation],
        scales=_scales(problem, settings),
        homogeneous=is_homogeneous(settings.activation),
    )
    everywhere = functools.partial(errors, problem, candidate=candidate)
    if settings.noise_std is not None:
        return everywhere()
    inner, sparse = _within(problem, space, settings)
    inside = functools.partial(
        errors, inner, candidate=candidate._replace(inputs=space.coordinates(candidate.inputs))
    )
    return jax.lax.cond(sparse, everywhere, inside) if settings.restarts else inside()
