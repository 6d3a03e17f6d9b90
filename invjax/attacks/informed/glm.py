"""The missing record of a generalised linear model, in closed form (Balle, Cherubin and Hayes 2022).

At the optimum the gradients of all records and of the penalty add up to zero, so that of the one record
the adversary lacks is known, and it is a number times the record: `B = r [1; x]` with `r = h(w . x + b) - y`.
The intercept's part is `r`, and the rest over it the record. Without an intercept only the direction can be
read off, and a scalar equation is left.

A victim that stopped short of its optimum with a total gradient `g` gives `(r x - g_x) / (r - g_0)`: an
error of about `|g| (1 + |x|) / |r|`. Well-classified records (small `r`) are the hard ones, and float32 is
seldom enough.
"""

import jax
import jax.numpy as jnp

from invjax.attacks.informed.glm_model import (
    Family,
    Glm,
    check_glm,
    check_records,
    columns,
    in_float64,
    mean,
    signals,
    total_gradient,
)
from invjax.attacks.informed.glm_model import fit as fit
from invjax.attacks.informed.glm_model import residual_gradient as residual_gradient
from invjax.attacks.informed.glm_roots import Candidates, Missing, candidates
from invjax.attacks.informed.glm_sklearn import from_sklearn as from_sklearn
from invjax.base import Array, Batch, Bound, Reconstruction
from invjax.checks import check_number
from invjax.ranges import check_range, flat_bounds


@in_float64
def reconstruct(
    glm: Glm,
    known: Batch,
    *,
    label: Array | float | None = None,
    norm: Array | float | None = None,
    input_range: tuple[Bound, Bound] | None = None,
    tolerance: float = 1e-3,
) -> Reconstruction:
    """The record that is missing from a model's training data.

    With an intercept the record and its label are a quotient. Without, the linear predictor `t = w . x`
    solves `t (h(t) - y) = w . B`, which has at most two roots for every label: all are returned as
    candidates, and among those in the box the one is chosen whose norm is closest to `norm`, else to the
    median norm of the known records. To turn a record and its label around changes nothing that a logistic
    model without an intercept releases: only the label or the box tells these two apart.

    In float64 where called on the host (and NumPy arrays then); in the given types under `jit` or `vmap`.

    Args:
      glm: the released model, trained to its optimum.
      known: all records but one: inputs `[n - 1, ...]`, labels `[n - 1]`.
      label: the target's, where it is known. Read without an intercept only, where `linear` and
        `poisson` need it or the norm.
      norm: the target's, where it is known (normalised data). Read without an intercept only.
      input_range: lowest and highest value of an input, each a number or one per channel: the box. What
        lies outside by more than a thousandth of its width is not `found`.
      tolerance: the largest `objective` at which a record counts as found.

    Returns:
      One record. The objective is what remains of the equations: the distance of the label from 0 or 1,
      of `softmax(w . x + b) - r` from one-hot, or without an intercept that of `r t` from `w . B` or of `r`
      from its equations, relative; there is nothing to check for `linear` and `poisson` with an intercept.
      `diagnostics` holds `residual` (`r`; `[K]` for softmax), `label_value` (before rounding),
      `conditioning` (`(1 + |x|) / |r|`, the error for every unit of the total gradient's norm) and
      `rank_one_residual` (softmax, relative); without an intercept also `candidates [m, ...]`,
      `candidate_labels`, `valid` (there is such a root) and `feasible` (in the box, too).

    Raises:
      ValueError: a model and records that do not fit or are not finite, a number or a box out of range, a
        label that the family does not have, neither label nor norm where one is needed, a softmax of two
        classes without an intercept.

    Example:
      >>> import numpy as np, invjax
      >>> rng = np.random.default_rng(0)
      >>> batch = invjax.Batch(rng.normal(size=(20, 3)), rng.integers(2, size=20))
      >>> released = invjax.attacks.informed.glm.fit(batch, "logistic", penalty=0.1)
      >>> known = invjax.Batch(batch.inputs[1:], batch.labels[1:])
      >>> found = invjax.attacks.informed.glm.reconstruct(released, known)
      >>> bool(abs(found.inputs - batch.inputs[:1]).max() < 1e-6)
      True
    """
    check_glm(glm, known)
    if label is not None:
        target = Batch(known.inputs[:1], jnp.reshape(label, (1,)))
        check_records(glm.family, target, jnp.shape(glm.weight)[-1])
    _check(glm, label is not None, norm, input_range, tolerance)
    return _one(glm, known, label, norm, input_range, tolerance)


@jax.jit
def _one(glm: Glm, known: Batch, label, norm, input_range, tolerance) -> Reconstruction:
    inputs = jnp.asarray(known.inputs).reshape(len(known.inputs), -1)
    weight, intercept = total_gradient(glm, known)
    typical = jnp.median(jnp.linalg.norm(inputs, axis=1)) if norm is None else norm
    missing = Missing(
        -weight, None if intercept is None else -intercept, label, norm, jnp.asarray(typical)
    )
    shape = known.inputs.shape[1:]
    found = _shaped(_solve(glm, missing, _box(input_range, shape), tolerance), shape)
    return found._replace(
        inputs=found.inputs[None], labels=found.labels[None], found=found.found[None]
    )


@in_float64
def reconstruct_all(
    glm: Glm,
    data: Batch,
    *,
    grant_labels: bool = False,
    input_range: tuple[Bound, Bound] | None = None,
    tolerance: float = 1e-3,
) -> Reconstruction:
    """Every record of a data set in turn, from all the others: `reconstruct` for `n` targets.

    One pass over the data: the others' gradients are the total less the target's own. An evaluation, so it
    reads the truth; what it returns for a target is what the adversary finds who lacks that one.

    Args:
      glm: the released model.
      data: all `n` records.
      grant_labels: whether the adversary knows the target's label (without an intercept).
      input_range: as in `reconstruct`.
      tolerance: as there.

    Returns:
      `n` records; objective and diagnostics with a leading axis `n`, and besides
      `predicted_error [n]`: `conditioning` times the norm of the total gradient (`residual_gradient`).

    Raises:
      ValueError: as `reconstruct`.
    """
    check_glm(glm, data, minimum=2)
    _check(glm, grant_labels, None, input_range, tolerance)
    return _all(
        glm, data, jnp.asarray(data.labels) if grant_labels else None, input_range, tolerance
    )


@jax.jit
def _all(glm: Glm, data: Batch, labels, input_range, tolerance) -> Reconstruction:
    inputs = jnp.asarray(data.inputs).reshape(len(data.inputs), -1)
    weight, intercept = total_gradient(glm, data)
    own = signals(glm, inputs, data.labels)
    missing = Missing(
        inputs[:, :, None] * own[:, None, :] - weight[None],
        None if intercept is None else own - intercept[None],
        labels,
        None,
        _medians_of_others(jnp.linalg.norm(inputs, axis=1)),
    )
    shape = data.inputs.shape[1:]
    box = _box(input_range, shape)
    found = jax.vmap(lambda one: _shaped(_solve(glm, one, box, tolerance), shape))(missing)
    total = jnp.sum(weight**2) + (0.0 if intercept is None else jnp.sum(intercept**2))
    predicted = found.diagnostics["conditioning"] * jnp.sqrt(total)
    return found._replace(diagnostics=found.diagnostics | {"predicted_error": predicted})


def _check(glm: Glm, labelled: bool, norm: Array | float | None, input_range, tolerance) -> None:
    check_number("tolerance", tolerance, 0.0)
    if input_range is not None:
        check_range(input_range)
    if norm is not None:
        check_number("norm", norm, 0.0, open_low=True)
    if glm.intercept is not None:
        return
    if glm.family in ("linear", "poisson") and not labelled and norm is None:
        raise ValueError(
            f"A {glm.family} model without an intercept tells the direction of a record only: "
            "its label or its norm must be known."
        )
    if glm.family == "softmax" and jnp.shape(glm.weight)[1] < 3:
        raise ValueError(
            "A softmax without an intercept must have at least 3 classes, got "
            f"{jnp.shape(glm.weight)[1]}: pass two as a logistic model of the difference."
        )


def _box(input_range, shape: tuple[int, ...]) -> tuple[Array, Array] | None:
    """Flat bounds, with some room: what is wrong lies far outside."""
    if input_range is None:
        return None
    low, high = flat_bounds(input_range, shape, float)
    room = 1e-3 * (high - low)
    return low - room, high + room


def _medians_of_others(values: Array) -> Array:
    """For each of `n` values the median of the others."""
    order = jnp.argsort(values)
    rank, ranked = jnp.argsort(order), values[order]

    def at(index):
        return ranked[index + (index >= rank)]

    return (at((len(values) - 2) // 2) + at((len(values) - 1) // 2)) / 2


def _shaped(found: Reconstruction, shape: tuple[int, ...]) -> Reconstruction:
    """Inputs as they came."""
    extra = dict(found.diagnostics)
    if "candidates" in extra:
        extra["candidates"] = extra["candidates"].reshape(-1, *shape)
    return found._replace(inputs=found.inputs.reshape(shape), diagnostics=extra)


def _solve(glm: Glm, missing: Missing, box, tolerance) -> Reconstruction:
    if missing.intercept is not None:
        return _quotient(glm, missing, box, tolerance)
    return _chosen(glm.family, candidates(glm, missing), missing, box, tolerance)


def _inside(inputs: Array, box) -> Array:
    """Whether values `[..., d]` lie in the box."""
    if box is None:
        return jnp.ones(inputs.shape[:-1], bool)
    return ((inputs >= box[0]) & (inputs <= box[1])).all(axis=-1)


def _quotient(glm: Glm, missing: Missing, box, tolerance) -> Reconstruction:
    """`x r^T` and `r` to `x`, by least squares over the classes."""
    weight, residual = missing.weight, missing.intercept
    assert residual is not None and glm.intercept is not None
    squared = jnp.sum(residual**2)
    defined = squared > 0
    inputs = weight @ residual / jnp.where(defined, squared, 1.0)
    predictor = inputs @ columns(glm.weight) + jnp.reshape(glm.intercept, (-1,))
    values = mean(glm.family, predictor) - residual
    labels, objective = _label(glm.family, residual, values)
    scale = jnp.linalg.norm(weight)
    extra = {
        "residual": residual if glm.family == "softmax" else residual[0],
        "label_value": values if glm.family == "softmax" else values[0],
        "conditioning": _conditioning(inputs, residual),
    }
    if glm.family == "softmax":
        rest = jnp.linalg.norm(weight - inputs[:, None] * residual[None])
        extra["rank_one_residual"] = rest / jnp.where(scale > 0, scale, 1.0)
    good = defined & jnp.isfinite(inputs).all() & (objective <= tolerance) & _inside(inputs, box)
    return Reconstruction(inputs, labels, good, objective, extra)


def _label(family: Family, residual: Array, values: Array) -> tuple[Array, Array]:
    """A label, and how far the values `[K]` are from those of any."""
    if family == "softmax":
        label = jnp.argmin(residual)
        return label, jnp.abs(values - jax.nn.one_hot(label, len(values))).max()
    if family == "logistic":
        label = (residual[0] < 0).astype(int)
        return label, jnp.abs(values[0] - label)
    return values[0], jnp.zeros_like(values[0])


def _conditioning(inputs: Array, residual: Array) -> Array:
    return (1 + jnp.linalg.norm(inputs)) / jnp.linalg.norm(residual)


def _chosen(family: Family, found: Candidates, missing, box, tolerance) -> Reconstruction:
    """The candidate in the box whose norm is closest to the typical one."""
    feasible = found.valid & jax.vmap(lambda one: _inside(one, box))(found.inputs)
    distance = jnp.abs(jnp.linalg.norm(found.inputs, axis=1) - missing.typical)
    # Anything feasible goes before what is only valid, and that before what is neither.
    order = jnp.where(feasible, 0, jnp.where(found.valid, 1, 2))
    best = jnp.lexsort((distance, order))[0]
    inputs, residual = found.inputs[best], found.residual[best]
    good = feasible[best] & jnp.isfinite(inputs).all() & (found.error[best] <= tolerance)
    extra = {
        "residual": residual if family == "softmax" else residual[0],
        "label_value": found.labels[best],
        "conditioning": _conditioning(inputs, residual),
        "candidates": found.inputs,
        "candidate_labels": found.labels,
        "valid": found.valid,
        "feasible": feasible,
    }
    return Reconstruction(inputs, found.labels[best], good, found.error[best], extra)
