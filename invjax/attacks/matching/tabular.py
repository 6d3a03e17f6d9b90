"""Reconstruction of tables of mixed columns (Vero et al. 2023, TabLeak).

`datasets.tabular` has the schema. Inside, an entry is measured by its place in its range, from 0
to 1: for a category that is its probability.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from invjax import metrics
from invjax.attacks.matching import objectives
from invjax.attacks.matching.loop import Labels, State, gradient_matching
from invjax.base import Array, Attack, Model, Observation, Reconstruction
from invjax.checks import check_number
from invjax.datasets.tabular import Categorical, Schema, check_inputs, decode, input_range

# Two values of a continuous column count as the same within this many standard deviations.
TOLERANCE = 0.319
# Below this sum the medians of a slice are rounding errors: no category has a majority.
_NO_MAJORITY = 1e-4
# Keeps the entropy of a column finite that all members agree on.
_LEAST_VARIANCE = 1e-12


def tableak(
    model: Model,
    schema: Schema,
    *,
    num_steps: int = 1500,
    learning_rate: float = 0.06,
    restarts: int = 30,
    labels: Labels = "known",
    relaxation: bool = True,
    pooling: bool = True,
    **settings: Any,
) -> Attack:
    """TabLeak (Vero et al. 2023): cosine, Adam on signs, categories as softmax, restarts pooled.

    Every candidate is a valid soft row (`relaxed`). All restarts are aligned to the one of lowest
    objective, and their median is the answer (`pooled`)::

        attack = tableak(model, schema, restarts=12)
        found = jax.jit(attack)(key, observation)
        table = decode(schema, found.inputs)             # codes and raw values
        surest = found.diagnostics["entropy"].argmin()   # [B, columns]: see `confidence`

    Departures: the optimised variables are the logits themselves, where the published ones are
    multiplied by the deviation of their entry, which holds rare categories back; restarts are
    aligned by the squared distance of standardised rows, not by the number of entries that differ;
    where no category has a majority, the mean stands in for the median. The published code's
    weighted cosine applies its weights twice; `objectives.cosine` applies them once. Of a federated
    update only the single-gradient approximation is attacked.

    Args:
      model: the model; it sees the encoded rows.
      schema: the columns.
      num_steps: steps.
      learning_rate: of Adam on signs; constant.
      restarts: members of the ensemble.
      labels: `known`, `recovered` (their counts, off the gradient) or `joint`.
      relaxation: whether categories are the softmax of logits, and continuous columns a sigmoid
        into their range; otherwise the encoded rows themselves are optimised.
      pooling: whether the answer is the median of the restarts; otherwise the best one.
      **settings: of `gradient_matching`; not `decode` or `pool`, which are the two above.

    Returns:
      The attack. `diagnostics` holds, besides those of the loop, `members [R, B, D]`, the aligned
      restarts, NaN where one failed, and `entropy [B, columns]`, their `confidence`.

    Raises:
      ValueError: a number out of range; at its first use, an observation whose inputs are not of
        the schema's width.
    """
    check_number("learning_rate", learning_rate, 0.0, open_low=True)
    settings: dict[str, Any] = {
        "objective": objectives.cosine(),
        "optimizer": optax.chain(optax.scale_by_sign(), optax.adam(learning_rate)),
        "initializer": _uniform,
        **settings,
    }
    matching = gradient_matching(
        model,
        num_steps=num_steps,
        restarts=restarts,
        labels=labels,
        decode=(lambda variables, _: relaxed(schema, variables["inputs"])) if relaxation else None,
        pool=None,
        **settings,
    )

    def check_width(observation: Observation) -> None:
        shape = observation.facts.input_shape
        if shape != (schema.width,):
            raise ValueError(
                f"The observation is of inputs {shape}, but the schema's {len(schema.columns)} "
                f"columns encode to ({schema.width},)."
            )
        assert matching.check is not None
        matching.check(observation)

    def result(observation: Observation, state: State) -> Reconstruction:
        # Not by the loop's `pool`, which would keep the members to itself.
        found = matching.result(observation, state)
        unpack = relaxed if relaxation else softened
        members = aligned(unpack(schema, state.best["inputs"]), state.best_value)
        inputs = pooled(schema, members) if pooling else found.inputs
        told = {"members": members, "entropy": confidence(schema, members)}
        return found._replace(inputs=inputs, diagnostics={**found.diagnostics, **told})

    return dataclasses.replace(matching, result=result, check=check_width)


def _uniform(key: Array, shape: tuple[int, ...], observation: Observation) -> Array:
    del observation
    return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)


def relaxed(schema: Schema, raw: Array) -> Array:
    """Soft rows of free variables: a softmax in every categorical slice, a sigmoid elsewhere.

    Args:
      schema: the columns.
      raw: `[..., D]` any numbers.

    Returns:
      `[..., D]` encoded rows, within the schema's ranges.

    Raises:
      ValueError: another width than the schema's.
    """
    check_inputs(schema, "raw", raw.shape)
    places = jnp.where(_is_categorical(schema, raw), _softmax(schema, raw), jax.nn.sigmoid(raw))
    return _from_places(schema, places)


def softened(schema: Schema, inputs: Array) -> Array:
    """Encoded rows whose categories are made probabilities by a softmax of the indicators.

    Args:
      schema: the columns.
      inputs: `[..., D]`.

    Returns:
      `[..., D]`, continuous columns as they were.
    """
    places = _places(schema, inputs)
    soft = jnp.where(_is_categorical(schema, inputs), _softmax(schema, places), places)
    return _from_places(schema, soft)


def aligned(members: Array, values: Array) -> Array:
    """Restarts in the order of the best one, by the assignment of least squared distance.

    Args:
      members: `[R, B, D]` encoded rows.
      values: `[R]` objectives, lower is better.

    Returns:
      `[R, B, D]`; NaN where the objective is not finite.
    """
    finite = jnp.isfinite(values)
    best = members[jnp.argmin(jnp.where(finite, values, jnp.inf))]
    order = jax.vmap(metrics.match, in_axes=(0, None))(members, best)
    members = jnp.take_along_axis(members, order[:, :, None], axis=1)
    return jnp.where(finite[:, None, None], members, jnp.nan)


def pooled(schema: Schema, members: Array) -> Array:
    """Median of aligned restarts; the medians of a category's probabilities are scaled to sum to one.

    Args:
      schema: the columns.
      members: `[R, B, D]` soft rows; those that are NaN do not count.

    Returns:
      `[B, D]` soft rows. The mean stands in where no category has a majority.
    """
    return _from_places(schema, _pooled_places(schema, members))


def _pooled_places(schema: Schema, members: Array) -> Array:
    places = _places(schema, members)
    median, mean = jnp.nanmedian(places, axis=0), jnp.nanmean(places, axis=0)
    shares = jnp.maximum(median, 0.0)
    total = _slice_sums(schema, shares)
    majority = total > _NO_MAJORITY
    shares = jnp.where(majority, shares / jnp.where(majority, total, 1.0), mean)
    return jnp.where(_is_categorical(schema, median), shares, median)


def confidence(schema: Schema, members: Array) -> Array:
    """How sure the ensemble is of every entry, as an entropy: lower is surer (Vero et al. 2023).

    Args:
      schema: the columns.
      members: `[R, B, D]` aligned soft rows, as `diagnostics["members"]` of `tableak`; those that
        are NaN do not count.

    Returns:
      `[B, columns]`. For a category the entropy of the pooled probabilities over that of the
      uniform law, in [0, 1]; for a number `1/2 + 1/2 log(2 pi s^2)`, the entropy of a Gaussian of
      the members' variance, standardised units. The two are not on one scale.

    Raises:
      ValueError: members of another width.
    """
    check_inputs(schema, "members", members.shape)
    places = jnp.clip(_pooled_places(schema, members), 0.0, 1.0)
    entropy = _product(jax.scipy.special.entr(places), _membership(schema))
    # One entry, for a number; of a category it is not used.
    variance = jnp.nanvar(members, axis=0)[:, [part.start for part in schema.slices]]
    gaussian = 0.5 + 0.5 * jnp.log(2 * jnp.pi * jnp.maximum(variance, _LEAST_VARIANCE))
    categorical = np.array([isinstance(column, Categorical) for column in schema.columns])
    uniform = np.log(np.maximum(_widths(schema), 2))
    return jnp.where(categorical[None], entropy / uniform[None], gaussian)


def match(schema: Schema, reconstruction: Array, truth: Array) -> Array:
    """Which reconstructed row belongs to which true one: the assignment of fewest wrong entries.

    Args:
      schema: the columns.
      reconstruction: `[B, D]` encoded rows.
      truth: `[B, D]`.

    Returns:
      `[B]` indices: `reconstruction[match(...)]`, or an entropy so indexed, is in the truth's order.

    Raises:
      ValueError: different shapes, or another width than the schema's.
    """
    return metrics.assignment(-_pairs(schema, reconstruction, truth).mean(axis=-1))


def accuracy(schema: Schema, reconstruction: Array, truth: Array) -> Array:
    """Which entries are right, after alignment to the truth (Vero et al. 2023).

    A category is right or wrong; a number is right within 0.319 standard deviations, once clipped
    to its range.

    Args:
      schema: the columns.
      reconstruction: `[B, D]` encoded rows; a row that is not finite is wrong everywhere.
      truth: `[B, D]`.

    Returns:
      `[B, columns]` booleans, in the truth's order; their mean is the published accuracy.

    Raises:
      ValueError: different shapes, or another width than the schema's.
    """
    pairs = _pairs(schema, reconstruction, truth)
    order = metrics.assignment(-pairs.mean(axis=-1))
    return jnp.take_along_axis(pairs, order[:, None, None], axis=1)[:, 0]


def _pairs(schema: Schema, reconstruction: Array, truth: Array) -> Array:
    """`[B, B, columns]`: whether an entry of truth `i` is right in reconstruction `j`."""
    check_inputs(schema, "reconstruction", reconstruction.shape)
    if reconstruction.shape != truth.shape or truth.ndim != 2:
        raise ValueError(
            f"reconstruction and truth must both be [B, {schema.width}], got "
            f"{reconstruction.shape} and {truth.shape}."
        )
    low, high, tolerance = np.array(
        [
            (0.0, column.num_categories, 0.5)
            if isinstance(column, Categorical)
            else (column.low, column.high, TOLERANCE * column.std)
            for column in schema.columns
        ],
        np.float32,
    ).T
    rows = jnp.clip(decode(schema, reconstruction), low[None], high[None])
    errors = jnp.abs(decode(schema, truth)[:, None] - rows[None])
    right = errors <= tolerance[None, None]
    return right & jnp.isfinite(reconstruction).all(axis=-1)[None, :, None]


def _widths(schema: Schema) -> list[int]:
    return [part.stop - part.start for part in schema.slices]


def _membership(schema: Schema) -> np.ndarray:
    """`[D, columns]`: one where an entry belongs to a column."""
    return np.repeat(np.eye(len(schema.columns), dtype=np.float32), _widths(schema), axis=0)


def _is_categorical(schema: Schema, like: Array) -> np.ndarray:
    """At every entry whether it is a category's, of the rank of `like`."""
    columns = [isinstance(column, Categorical) for column in schema.columns]
    return np.repeat(columns, _widths(schema)).reshape((1,) * (like.ndim - 1) + (-1,))


def _product(values: Array, matrix: np.ndarray) -> Array:
    return jnp.matmul(values, matrix, precision=jax.lax.Precision.HIGHEST)


def _slice_sums(schema: Schema, values: Array) -> Array:
    """`[..., D]`: at every entry the sum over its slice."""
    owner = _membership(schema)
    return _product(values, owner @ owner.T)


def _softmax(schema: Schema, logits: Array) -> Array:
    """Softmax within every slice. One product for all: a loop over columns is slow to compile."""
    owner = np.repeat(np.arange(len(schema.columns)), _widths(schema))
    fixed = jax.lax.stop_gradient(logits)
    tops = jnp.stack([fixed[..., part].max(axis=-1) for part in schema.slices], axis=-1)
    powers = jnp.exp(logits - tops[..., owner])
    return powers / _slice_sums(schema, powers)


def _bounds(schema: Schema, like: Array) -> tuple[Array, Array]:
    shape = (1,) * (like.ndim - 1) + (-1,)
    low, high = (jnp.asarray(bound, like.dtype).reshape(shape) for bound in input_range(schema))
    return low, high


def _places(schema: Schema, inputs: Array) -> Array:
    """Encoded entries by their place in their range, 0 to 1."""
    low, high = _bounds(schema, inputs)
    return (inputs - low) / (high - low)


def _from_places(schema: Schema, places: Array) -> Array:
    low, high = _bounds(schema, places)
    return low + (high - low) * places
