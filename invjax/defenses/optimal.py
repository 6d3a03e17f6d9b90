"""Defences that spend a given loss of utility where it costs an attacker most (Chen et al. 2024).

For noise of variances `v_i`, the squared error of any attack is bounded below through
`sum_i n_i / v_i`, and its cost to training is `sum_i v_i q_i`, with the leakage `n_i` and the energy
`q_i` of `defenses.sensitivity`. Every defence here takes a source of these two:

* a `Sensitivity` that was computed once, of data that is not private (`population_sensitivity`). This
  is the one to use: the defence then depends on no private sample, and its law is public and exact;
* a `Model`: the sensitivities of every batch itself, as in the authors' code, computed by `prepare`, which
  every update needs. Where noise goes, or what is pruned, then tells of the batch, and no likelihood
  accounts for that.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from invjax.base import Array, Defense, Model, PyTree
from invjax.checks import check_count, check_number, check_shapes, describe, equals
from invjax.defenses.base import Elementary, from_stages, nothing
from invjax.defenses.law import Law, Rounding, add_variance, inform, need_public
from invjax.defenses.masking import apply_mask, random_mask
from invjax.defenses.sensitivity import (
    Sensitivity,
    gradient_sensitivity,
    keep_telling_least,
    pool_tensors,
    scaled_to,
)

NUM_PROBES = 10


class PlanState(NamedTuple):
    """State of an optimal defence.

    Attributes:
      key: of its next draw.
      plan: tree like the parameters: standard deviations, a mask or steps; `None` where it is fixed.
    """

    key: Array
    plan: PyTree | None


class _Source(NamedTuple):
    """Where the sensitivities come from."""

    origin: Sensitivity | Model
    layerwise: bool
    num_probes: int | None
    known: bool


class _Plan(NamedTuple):
    """What is done to every coordinate: a function of the sensitivities, and of none."""

    of: Callable[[Sensitivity], PyTree]
    start: Callable[[PyTree], PyTree]


def optimal_noise(
    source: Sensitivity | Model,
    std: float,
    *,
    layerwise: bool = False,
    num_probes: int | None = NUM_PROBES,
    known: bool = True,
) -> Defense:
    """Gaussian noise of variance `v_i` proportional to `sqrt(n_i / q_i)` on coordinate `i`.

    It brings the product of `sum n_i / v_i` and `sum v_i q_i` down to `(sum sqrt(n_i q_i))^2`, the least
    that there is (Cauchy-Schwarz); uniform noise has `sum n_i sum q_i`. Chen et al. 2024 print
    `sqrt(n_i / q_i)` as a deviation; their derivation and their code have it as the variance.

    A coordinate with `n_i = 0` is sent without noise. That is right for the batch whose sensitivities
    they are, but with those of public data it may leak of a private batch, in which another unit of a
    ReLU network is awake: prefer a smooth activation, much public data, or `layerwise`.

    Args:
      source: a `Sensitivity` of public data, recommended, or the `Model` for that of every batch.
      std: root mean square of the standard deviations over all parameters, in gradient units, so
        that the total power is that of `gaussian_noise(std)`; zero does nothing.
      layerwise: whether a tensor has one variance, of its summed leakage and energy.
      num_probes: of a model's sensitivities; `None` for exact ones.
      known: of a model's: whether the deviations are published with the observation, the worst case.
        Where not, the law takes the noise to be uniform.

    Returns:
      The defence. No privacy accounting applies to the one of a model.

    Raises:
      ValueError: a negative deviation, fewer than one probe; at the first use, sensitivities unlike the
        gradient; when its law is asked for, deviations that the observation does not hold.
      TypeError: a source of another type.
    """
    check_number("std", std, 0.0, open_high=True)
    origin = _Source(source, layerwise, num_probes, known)
    name = _describe("optimal_noise", origin, std)
    if equals(std, 0):
        return from_stages(nothing(name, "aggregate"))

    def propagate(law: Law, observed, deviations) -> Law:
        del observed
        if deviations is None:
            return add_variance(law, jnp.square(std))
        return add_variance(law, jax.tree.map(jnp.square, deviations))

    plan = _Plan(lambda found: scaled_to(found, std), lambda tree: optax.tree.full_like(tree, std))
    return from_stages(_stage(name, origin, plan, _add_noise, propagate))


def optimal_clipped_noise(
    source: Sensitivity | Model,
    bound: float,
    std: float,
    *,
    layerwise: bool = False,
    num_probes: int | None = NUM_PROBES,
    known: bool = True,
) -> Defense:
    """Clamp every coordinate, and add optimal noise to those that were not clamped.

    The variant that Chen et al. 2024 call DP-SGD. IT IS NOT DIFFERENTIALLY PRIVATE, at any strength: it
    clips the aggregate and no sample, and a clamped coordinate is sent without any noise, because
    there its derivative in the inputs is zero; which ones are clamped is plain to see. For a
    guarantee take `dp_sgd`.

    Args:
      source: as in `optimal_noise`.
      bound: largest magnitude of a coordinate, in gradient units; infinity clamps nothing.
      std: root mean square of the deviations over all parameters, before those of clamped
        coordinates are set to zero; zero adds no noise.
      layerwise: as in `optimal_noise`.
      num_probes: as there.
      known: as there.

    Returns:
      The defence. Its law sees which coordinates were clamped where it is the last of a chain, and
      replays the clamp otherwise.

    Raises:
      ValueError: a bound that is not positive, or as `optimal_noise`.
      TypeError: as there.
    """
    check_number("bound", bound, 0.0, open_low=True)
    check_number("std", std, 0.0, open_high=True)
    origin = _Source(source, layerwise, num_probes, known)
    name = _describe("optimal_clipped_noise", origin, bound, std)
    if equals(std, 0) and equals(bound, np.inf):
        return from_stages(nothing(name, "aggregate"))

    def clamped(leaf):
        limit = jnp.asarray(bound, leaf.dtype)
        return jnp.clip(leaf, -limit, limit)

    def silence(deviation, leaf):
        return jnp.where(jnp.abs(leaf) >= jnp.asarray(bound, leaf.dtype), 0.0, deviation)

    def update(gradient, deviations, key):
        deviations = jax.tree.map(silence, deviations, gradient)
        return _add_noise(jax.tree.map(clamped, gradient), deviations, key)

    def propagate(law: Law, observed, deviations) -> Law:
        location = law.location
        if deviations is None:
            deviations = optax.tree.full_like(location, std)
        seen = location
        if observed is not None:
            # Noise lands on the bound itself with probability zero.
            seen = jax.tree.map(
                lambda leaf: jnp.where(jnp.abs(leaf) == jnp.asarray(bound, leaf.dtype), leaf, 0.0),
                observed,
            )
        law = law._replace(location=jax.tree.map(clamped, location))
        if equals(std, 0):
            return law
        silenced = jax.tree.map(silence, deviations, seen)
        return add_variance(law, jax.tree.map(jnp.square, silenced))

    plan = _Plan(
        lambda found: scaled_to(found, std, floor=1e-6),
        lambda tree: optax.tree.full_like(tree, std),
    )
    return from_stages(_stage(name, origin, plan, update, propagate)._replace(reads_values=True))


def optimal_pruning(
    source: Sensitivity | Model,
    fraction: float,
    *,
    layerwise: bool = False,
    num_probes: int | None = NUM_PROBES,
    known: bool = False,
) -> Defense:
    """Zero the coordinates of the largest `n_i / q_i`, over all parameters together.

    A knapsack: what leaks most for every unit of `U_1 = sum of the kept q_i` goes first (Chen et al. 2024,
    whose code does this; one of their talks says the smallest, which is the worst choice).

    Args:
      source: as in `optimal_noise`; of a `Sensitivity` the mask is fixed and public.
      fraction: share of the coordinates that is zeroed, `floor(fraction * size)` of them, in [0, 1).
      layerwise: whether all coordinates of a tensor count alike; the tensor that the threshold cuts
        loses its last coordinates.
      num_probes: of a model's sensitivities; `None` for exact ones.
      known: of a model's: whether the mask is published. Where not, it is read off the zeros, or, where
        later stages hide them, the law is that of a random mask of the same share.

    Returns:
      The defence.

    Raises:
      ValueError: a fraction out of range, or as `optimal_noise`; when its law is asked for, a published
        mask that the observation does not hold.
      TypeError: as there.
    """
    check_number("fraction", fraction, 0.0, 1.0, open_high=True)
    origin = _Source(source, layerwise, num_probes, known)
    name = _describe("optimal_pruning", origin, fraction)
    if equals(fraction, 0):
        return from_stages(nothing(name, "aggregate"))
    (unknown,) = random_mask(fraction, known=False).stages

    def update(gradient, mask, key):
        del key
        return apply_mask(mask, gradient)

    def propagate(law: Law, observed, mask) -> Law:
        return unknown.propagate(law, observed, None) if mask is None else inform(law, mask)

    plan = _Plan(
        lambda found: keep_telling_least(found, fraction),
        lambda tree: jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), tree),
    )
    stage = _stage(name, origin, plan, update, propagate)
    return from_stages(stage._replace(keeps_zeros=True))


def optimal_rounding(
    source: Sensitivity | Model,
    step: float,
    *,
    layerwise: bool = False,
    num_probes: int | None = NUM_PROBES,
    known: bool = True,
) -> Defense:
    """Round coordinate `i` to multiples of a step proportional to `(n_i / q_i)^(1/4)`.

    The rounding error then has the variances of `optimal_noise`, but for a common factor (Chen et al.
    2024, the code).

    Args:
      source: as in `optimal_noise`.
      step: root mean square of the steps over all parameters, in gradient units; zero does nothing.
      layerwise: whether a tensor has one step.
      num_probes: of a model's sensitivities; `None` for exact ones.
      known: of a model's: whether the steps are published. Where not, the law has Gaussian noise of
        the variance of a uniform step.

    Returns:
      The defence. Where a later stage hides the grid, its law is as that of `quantize`: Gaussian noise of
      variance `step^2 / 12` behind noise, and otherwise the rounding, with the identity's derivative.

    Raises:
      ValueError: a negative step, or as `optimal_noise`.
      TypeError: as there.
    """
    check_number("step", step, 0.0, open_high=True)
    origin = _Source(source, layerwise, num_probes, known)
    name = _describe("optimal_rounding", origin, step)
    if equals(step, 0):
        return from_stages(nothing(name, "aggregate"))

    def nearest(leaf, size):
        # What tells nothing is sent as it is.
        safe = jnp.where(size > 0, size, 1.0)
        return jnp.where(size > 0, jnp.round(leaf / safe) * safe, leaf)

    def update(gradient, steps, key):
        del key
        return jax.tree.map(nearest, gradient, steps)

    def propagate(law: Law, observed, steps) -> Law:
        if steps is None:
            return add_variance(law, jnp.square(step) / 12)
        if observed is not None:
            least = jax.tree.map(lambda size: jnp.maximum(size, 1e-30), steps)
            return law._replace(rounding=Rounding("nearest", least))
        if law.noisy:
            return add_variance(law, jax.tree.map(lambda size: jnp.square(size) / 12, steps))
        replayed = jax.tree.map(
            lambda leaf, size: leaf + jax.lax.stop_gradient(nearest(leaf, size) - leaf),
            law.location,
            steps,
        )
        return law._replace(location=replayed)

    plan = _Plan(
        lambda found: scaled_to(found, step), lambda tree: optax.tree.full_like(tree, step)
    )
    return from_stages(_stage(name, origin, plan, update, propagate)._replace(reads_values=True))


def _add_noise(gradient: PyTree, deviations: PyTree, key: Array) -> PyTree:
    def leaf(value, deviation, key):
        unit = jax.random.normal(key, value.shape, value.dtype)
        return value + deviation.astype(value.dtype) * unit

    return jax.tree.map(leaf, gradient, deviations, optax.tree.split_key_like(key, gradient))


def _describe(constructor: str, source: _Source, *strengths) -> str:
    origin, layerwise, num_probes, known = source
    if isinstance(origin, Sensitivity):
        text = describe(constructor, *strengths, layerwise=layerwise)
        return text.replace("(", "(sensitivity, ", 1)
    if not isinstance(origin, Model):
        raise TypeError(
            f"source must be an invjax Sensitivity or a Model, got {type(origin).__name__}."
        )
    if num_probes is not None:
        check_count("num_probes", num_probes, 1)
    options = {"layerwise": layerwise, "num_probes": num_probes, "known": known}
    return describe(constructor, *strengths, **options).replace("(", f"({origin.name}, ", 1)


def _stage(
    name: str, source: _Source, plan: _Plan, change: Callable, propagate: Callable
) -> Elementary:
    """A stage `change(gradient, plan, key)` whose law is `propagate(law, observed, plan or None)`."""
    origin, layerwise, num_probes, known = source
    model = origin if isinstance(origin, Model) else None

    def make(found: Sensitivity) -> PyTree:
        return plan.of(pool_tensors(found) if layerwise else found)

    fixed = make(origin) if isinstance(origin, Sensitivity) else None

    def init(key, params):
        if model is not None:
            return PlanState(key, plan.start(params))
        _check_like(name, fixed, params)
        return PlanState(key, None)

    def prepare(batch, state: PlanState, params):
        key, draw = jax.random.split(state.key)
        assert model is not None
        found = gradient_sensitivity(model, params, batch, num_probes=num_probes, key=draw)
        return batch, PlanState(key, make(found))

    def update(gradient, state: PlanState, count):
        del count
        key, draw = jax.random.split(state.key)
        return change(gradient, fixed if model is None else state.plan, draw), PlanState(
            key, state.plan
        )

    def adversary(law: Law, observed, public) -> Law:
        if model is None:
            _check_like(name, fixed, law.location)
        elif known:
            need_public(name, "what was published", public)
        return propagate(law, observed, fixed if model is None else public)

    stage = Elementary(name, "aggregate", init, update, adversary)
    if model is None:
        return stage
    return stage._replace(prepare=prepare, public=lambda state: state.plan if known else None)


def _check_like(name: str, plan: PyTree, tree: PyTree) -> None:
    check_shapes(f"{name}: source must have the gradient's tree and shapes", plan, tree)
