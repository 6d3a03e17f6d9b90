"""Generalised linear models: what is released of one, and how it is trained to its optimum."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from invjax.base import Array, Batch
from invjax.checks import check_choice, check_count, check_number

Family = Literal["linear", "logistic", "softmax", "poisson"]

PATIENCE = 4
"""Newton steps without a smaller gradient, after which it is at the level of rounding."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Glm:
    """A generalised linear model of canonical link, and the objective that it minimises.

    `sum_i loss(w . x_i + b, y_i) + penalty |w|^2 / 2 + intercept_penalty b^2 / 2`, where the loss is half the
    squared error, cross-entropy, or minus the Poisson log-likelihood: its derivative in the predictor is the
    mean minus the label. Objectives that take the mean of the losses have penalties `n` times as large
    here.

    Attributes:
      weight: `[d]`; `[d, K]` for `softmax`.
      intercept: a scalar; `[K]` for `softmax`; `None` where the model has none.
      penalty: of the squared weights.
      intercept_penalty: of the squared intercept.
      family: `linear`, `logistic` (labels 0 and 1), `softmax` (classes 0 to K - 1) or `poisson`.
    """

    weight: Array
    intercept: Array | None
    penalty: Array | float = 0.0
    intercept_penalty: Array | float = 0.0
    family: Family = dataclasses.field(metadata={"static": True})


def in_float64(function: Callable) -> Callable:
    """Run in float64 where no argument is traced, and return NumPy arrays then.

    A traced call computes in the types that it is given, since no scope can be opened in it.
    """

    def wide(leaf):
        leaf = np.asarray(leaf)
        return leaf.astype(np.float64) if np.issubdtype(leaf.dtype, np.floating) else leaf

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        leaves = jax.tree.leaves((args, kwargs))
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            return function(*args, **kwargs)
        numbers = (jax.Array, np.ndarray, np.generic, float)
        args, kwargs = jax.tree.map(
            lambda leaf: wide(leaf) if isinstance(leaf, numbers) else leaf, (args, kwargs)
        )
        with jax.enable_x64(True), jax.default_matmul_precision("highest"):
            return jax.tree.map(np.asarray, function(*args, **kwargs))

    return wrapped


def mean(family: Family, predictor: Array) -> Array:
    """Mean of the labels, from the linear predictor `[..., K]`."""
    links = {
        "linear": lambda eta: eta,
        "logistic": jax.nn.sigmoid,
        "softmax": jax.nn.softmax,
        "poisson": jnp.exp,
    }
    return links[family](predictor)


def signals(glm: Glm, inputs: Array, labels: Array) -> Array:
    """Mean minus label of every record: the derivative of its loss in the predictor.

    Args:
      glm: the model.
      inputs: `[n, d]`.
      labels: `[n]`.

    Returns:
      `[n, K]`; `K = 1` for all families but `softmax`.
    """
    weight = columns(glm.weight)
    predictor = inputs @ weight
    if glm.intercept is not None:
        predictor = predictor + jnp.reshape(glm.intercept, (1, -1))
    return mean(glm.family, predictor) - _targets(glm.family, labels, predictor)


def columns(weight: Array) -> Array:
    """Weights as `[d, K]`, with `K = 1` for a vector."""
    weight = jnp.asarray(weight)
    return weight.reshape(weight.shape[0], -1)


def _targets(family: Family, labels: Array, like: Array) -> Array:
    if family == "softmax":
        return jax.nn.one_hot(labels, like.shape[1], dtype=like.dtype)
    return jnp.asarray(labels, like.dtype)[:, None]


def check_glm(glm: Glm, batch: Batch, minimum: int = 1) -> None:
    """Refuse a model and records that do not fit each other."""
    check_choice("family", glm.family, get_args(Family))
    check_number("penalty", glm.penalty, 0.0)
    check_number("intercept_penalty", glm.intercept_penalty, 0.0)
    width = 2 if glm.family == "softmax" else 1
    if jnp.ndim(glm.weight) != width:
        shape = "[d, K]" if width == 2 else "[d]"
        raise ValueError(
            f"weight must be {shape} for the family {glm.family}, got shape {jnp.shape(glm.weight)}."
        )
    if glm.intercept is not None and jnp.shape(glm.intercept) != jnp.shape(glm.weight)[1:]:
        raise ValueError(
            f"intercept must have shape {jnp.shape(glm.weight)[1:]}, got {jnp.shape(glm.intercept)}."
        )
    size = int(np.prod(jnp.shape(batch.inputs)[1:]))
    if size != jnp.shape(glm.weight)[0]:
        raise ValueError(
            f"The records must have {jnp.shape(glm.weight)[0]} values each, as the weight has, got {size}."
        )
    classes = jnp.shape(glm.weight)[1] if glm.family == "softmax" else None
    check_records(glm.family, batch, classes, minimum)


def check_records(family: Family, batch: Batch, classes: int | None, minimum: int = 1) -> None:
    """Refuse inputs that are not finite, and labels that the family does not have."""
    number = len(batch.inputs)
    if number < minimum or jnp.shape(batch.labels) != (number,):
        raise ValueError(
            f"The batch must hold at least {minimum} records and a label each, got "
            f"{number} records and labels of shape {jnp.shape(batch.labels)}."
        )
    if any(isinstance(leaf, jax.core.Tracer) for leaf in batch):
        return
    if not np.isfinite(np.asarray(batch.inputs)).all():
        raise ValueError("The batch's inputs must be finite, got NaN or infinity.")
    labels = np.asarray(batch.labels)
    allowed = {
        "linear": np.isfinite(labels),
        "logistic": (labels == 0) | (labels == 1),
        "softmax": (labels == np.round(labels)) & (labels >= 0) & (labels < (classes or np.inf)),
        "poisson": np.isfinite(labels) & (labels >= 0),
    }[family]
    if not allowed.all():
        wanted = {
            "linear": "finite numbers",
            "logistic": "0 or 1",
            "softmax": f"integers from 0 to {(classes or 0) - 1}",
            "poisson": "finite numbers from 0 on",
        }[family]
        raise ValueError(
            f"labels of the family {family} must be {wanted}, got {labels[~allowed][0]}."
        )


@in_float64
def fit(
    batch: Batch,
    family: Family,
    *,
    penalty: Array | float = 0.0,
    intercept_penalty: Array | float = 0.0,
    intercept: bool = True,
    num_classes: int | None = None,
    max_steps: int = 100,
) -> Glm:
    """Train a victim to the optimum, by Newton's method with step halving, until rounding ends it.

    The attack divides by residuals that may be tiny, so anything short of the optimum shows
    (`reconstruct`). Float64 on the host; in the given types under `jit` and `vmap`, integers as JAX's
    default float.

    Args:
      batch: inputs `[n, ...]`, flattened, floats or integers; labels `[n]`.
      family: of the model.
      penalty: of the squared weights, as `Glm` has it.
      intercept_penalty: of the squared intercept.
      intercept: whether there is one.
      num_classes: `K` of `softmax`.
      max_steps: Newton steps at most.

    Returns:
      The model. Without a penalty there may be no optimum (separable classes); see
      `residual_gradient`.

    Raises:
      ValueError: an unknown family, a negative penalty, inputs that are not finite, labels that the
        family does not have, `softmax` without `num_classes`.
    """
    check_choice("family", family, get_args(Family))
    check_number("penalty", penalty, 0.0)
    check_number("intercept_penalty", intercept_penalty, 0.0)
    check_count("max_steps", max_steps, 1)
    if family == "softmax":
        check_count("num_classes", num_classes, 2)
    check_records(family, batch, num_classes)
    width = int(num_classes) if family == "softmax" and num_classes is not None else 1
    inputs = jnp.asarray(batch.inputs).reshape(len(batch.inputs), -1)
    if not jnp.issubdtype(inputs.dtype, jnp.floating):
        inputs = inputs.astype(float)
    penalties = jnp.full((inputs.shape[1], 1), penalty, inputs.dtype)
    if intercept:
        inputs = jnp.concatenate([jnp.ones((len(inputs), 1), inputs.dtype), inputs], axis=1)
        own = jnp.full((1, 1), intercept_penalty, inputs.dtype)
        penalties = jnp.concatenate([own, penalties])
    targets = _targets(family, batch.labels, jnp.zeros((1, width), inputs.dtype))
    theta = _newton(family, inputs, targets, penalties, max_steps)
    shape = (-1, width) if family == "softmax" else (-1,)
    return Glm(
        weight=theta[1:].reshape(shape) if intercept else theta.reshape(shape),
        intercept=theta[0].reshape(shape[1:]) if intercept else None,
        penalty=jnp.asarray(penalty, inputs.dtype),
        intercept_penalty=jnp.asarray(intercept_penalty, inputs.dtype),
        family=family,
    )


@functools.partial(jax.jit, static_argnums=0)
def _newton(family: Family, inputs, targets, penalties, max_steps) -> Array:
    """The minimiser, `[m, K]`."""
    size, width = inputs.shape[1], targets.shape[1]
    eps = jnp.finfo(inputs.dtype).eps

    def objective(theta):
        predictor = inputs @ theta
        losses = {
            "linear": lambda: jnp.square(predictor - targets).sum() / 2,
            "logistic": lambda: jnp.sum(jax.nn.softplus(predictor) - targets * predictor),
            "softmax": lambda: jnp.sum(
                jax.nn.logsumexp(predictor, axis=1) - jnp.sum(targets * predictor, axis=1)
            ),
            "poisson": lambda: jnp.sum(jnp.exp(predictor) - targets * predictor),
        }
        return losses[family]() + jnp.sum(penalties * jnp.square(theta)) / 2

    def slope(theta):
        return inputs.T @ (mean(family, inputs @ theta) - targets) + penalties * theta

    def hessian(theta):
        means = mean(family, inputs @ theta)
        if family == "softmax":
            spread = means[:, :, None] * (jnp.eye(width)[None] - means[:, None, :])
            weighted = spread[:, :, :, None] * inputs[:, None, None, :]
            curvature = jnp.einsum("ni,nklj->kilj", inputs, weighted)
            curvature = curvature.reshape(width * size, width * size)
            # A shift common to all classes changes no loss; the slope has no part along it.
            common = jnp.kron(jnp.ones((width, width)), jnp.eye(size))
            curvature = curvature + jnp.diagonal(curvature).max() * common
        else:
            factor = {
                "linear": jnp.ones_like(means),
                "logistic": means * (1 - means),
                "poisson": means,
            }[family]
            curvature = (inputs * factor).T @ inputs
        diagonal = jnp.tile(penalties[:, 0], width)
        # An input that is the same in all records has no curvature.
        floor = 1e2 * eps * jnp.diagonal(curvature).max() + jnp.finfo(inputs.dtype).tiny
        return curvature + jnp.diag(diagonal + floor)

    lengths = 0.5 ** jnp.arange(30.0, dtype=inputs.dtype)

    def step(carry):
        count, theta, best, least, stale = carry
        steepest = slope(theta)
        move = jax.scipy.linalg.solve(hessian(theta), steepest.T.ravel(), assume_a="pos")
        move = move.reshape(width, size).T
        here = objective(theta)
        there = jax.vmap(lambda length: objective(theta - length * move))(lengths)
        # The longest that does not climb, up to rounding.
        theta = theta - lengths[jnp.argmax(there <= here + 10 * eps * jnp.abs(here))] * move
        norm = jnp.linalg.norm(slope(theta))
        better = norm < least
        return (
            count + 1,
            theta,
            jnp.where(better, theta, best),
            jnp.where(better, norm, least),
            jnp.where(better, 0, stale + 1),
        )

    def unfinished(carry):
        count, _, _, least, stale = carry
        return (count < max_steps) & (stale < PATIENCE) & (least > 0)

    start = jnp.zeros((size, width), inputs.dtype)
    carry = (0, start, start, jnp.linalg.norm(slope(start)), 0)
    return jax.lax.while_loop(unfinished, step, carry)[2]


@in_float64
def residual_gradient(glm: Glm, data: Batch) -> tuple[Array, Array | None]:
    """The objective's gradient on all data, which is zero at an optimum.

    Args:
      glm: the model.
      data: all records that it was trained on, the target among them.

    Returns:
      Like the weight, and like the intercept (or `None`).

    Raises:
      ValueError: a model and records that do not fit.
    """
    check_glm(glm, data)
    weight, intercept = total_gradient(glm, data)
    weight = weight.reshape(jnp.shape(glm.weight))
    if intercept is None or glm.intercept is None:
        return weight, None
    return weight, intercept.reshape(jnp.shape(glm.intercept))


@jax.jit
def total_gradient(glm: Glm, data: Batch) -> tuple[Array, Array | None]:
    """The same as `[d, K]` and `[K]`, from any of the records."""
    inputs = jnp.asarray(data.inputs).reshape(len(data.inputs), -1)
    signal = signals(glm, inputs, data.labels)
    weight = inputs.T @ signal + glm.penalty * columns(glm.weight)
    if glm.intercept is None:
        return weight, None
    own = glm.intercept_penalty * jnp.reshape(glm.intercept, (-1,))
    return weight, signal.sum(axis=0) + own
