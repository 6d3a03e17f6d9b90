"""Label recovery: the classes of a batch, read off the gradient of the last dense layer.

With softmax cross-entropy the gradient of the last bias is `mean_b (p_b - y_b)` and that of the
last weight `mean_b f_b (p_b - y_b)^T`: probabilities minus labels, weighted by features. A model
with one logit is read as the softmax of `(0, logit)`. All but `estimate_batch_size` is `jit`- and
`vmap`-able over observations; labels come in rising order, since a gradient does not tell the order
of its samples.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from invjax.base import Array, Model, Observation, Params, PyTree
from invjax.observe import check_observation, per_step_gradient

Head = Callable[[PyTree], tuple[Array, Array | None]]
Method = Literal["auto", "idlg", "row_minimum", "counts"]

_NUM_NOISE = 64
_MAX_AUXILIARY = 512
_MAX_POINTS = 8


def find_head(model: Model, tree: PyTree) -> tuple[Array, Array | None]:
    """The last dense layer's part of a parameter or gradient tree.

    Args:
      model: the model; its layer view is used where it has one. Otherwise the head is the one
        leaf of shape `[in, C]`, and its bias the one leaf of shape `[C]` beside it.
      tree: parameters or a gradient: nnx state, linen dictionary or any other tree.

    Returns:
      Weight `[in, C]` and bias `[C]` or `None`.

    Raises:
      ValueError: no leaf looks like the head, or several do.
    """
    classes = model.num_classes
    if model.layers is not None:
        kind, weight, bias = [
            (layer.kind, layer.weight, layer.bias)
            for layer in model.layers(tree)
            if layer.weight is not None
        ][-1]
        if kind != "dense" or weight.shape[-1] != classes:
            raise _no_head(f"the last layer is {kind} of shape {weight.shape}", classes)
        return weight, bias
    leaves = [(_location(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree)]
    weights = [pair for pair in leaves if pair[1].ndim == 2 and pair[1].shape[1] == classes]
    if len(weights) != 1:
        raise _no_head(f"{len(weights)} leaves have that shape", classes)
    ((path, weight),) = weights
    biases = [
        leaf for other, leaf in leaves if other[:-1] == path[:-1] and leaf.shape == (classes,)
    ]
    if len(biases) > 1:
        raise _no_head(f"{len(biases)} leaves beside it could be its bias", classes)
    return weight, biases[0] if biases else None


def idlg(model: Model, observation: Observation, head: Head | None = None) -> Array:
    """Label of a single sample (iDLG, Zhao et al. 2020): the one class whose gradient is negative.

    With a bias, that is the lowest bias gradient. Without one, the label's column of the weight
    gradient is the one with no positive inner product with another (their rule), for
    features of any sign. Two columns do not tell: the lower column sum is taken, which needs
    features with a positive sum (sigmoid, ReLU).

    Args:
      model: the model, with a dense head under softmax cross-entropy.
      observation: what the adversary was granted.
      head: `tree -> (weight [in, C], bias [C] or None)`; `find_head` where `None`.

    Returns:
      `[1]` labels.

    Raises:
      ValueError: no gradient, or no head found.
    """
    weight, bias = _head_gradient(model, observation, head)
    if bias is not None:
        return jnp.argmin(bias)[None]
    classes = weight.shape[1]
    if classes == 2:
        return jnp.argmin(weight.sum(axis=0))[None]
    products = jnp.where(jnp.eye(classes, dtype=bool), -jnp.inf, weight.T @ weight)
    return jnp.argmin(products.max(axis=0))[None]


def row_minimum(
    model: Model, observation: Observation, batch_size: int, head: Head | None = None
) -> Array:
    """Labels of a batch without repeats (GradInversion, Yin et al. 2021).

    The classes with the lowest minimum over features of the head's weight gradient. It wants
    features without negative values, and reads signs only: any local optimizer will do.

    Args:
      model: the model, with a dense head under softmax cross-entropy.
      observation: what the adversary was granted.
      batch_size: samples, at most the number of classes.
      head: `tree -> (weight [in, C], bias [C] or None)`; `find_head` where `None`.

    Returns:
      `[B]` different labels in rising order.

    Raises:
      ValueError: more samples than classes, no gradient, or no head found.
    """
    weight, _ = _head_gradient(model, observation, head)
    if batch_size > weight.shape[1]:
        raise ValueError(
            f"row_minimum knows no repeats: batch_size must be at most {weight.shape[1]}, "
            f"got {batch_size}; use counts."
        )
    return jnp.sort(jnp.argsort(weight.min(axis=0))[:batch_size])


def estimate_counts(
    model: Model, observation: Observation, batch_size: int, head: Head | None = None
) -> Array:
    """How often every class occurs, as real numbers (Dimitrov et al. 2022).

    `B (p_c - b_c)` with the bias gradient `b`; without a bias `B (p_c - w_c / o)`, where `w` sums
    the weight gradient over features and `o` sums the mean feature (features of both signs would
    cancel: their projection on the mean feature then stands for their sum). The mean probabilities
    `p` and the features are those of the model on dummy inputs: the auxiliary data where the
    adversary has some (512 of them at most, evenly spaced), else uniform noise of the input range
    (the paper: normal noise). In a federated round they are averaged along the line from the sent
    to the returned parameters, as in the paper, at 8 points at most. The bias form and the
    projection are not in the paper; the bias form is the more accurate one.

    Args:
      model: the model, with a dense head under softmax cross-entropy.
      observation: what the adversary was granted.
      batch_size: samples.
      head: `tree -> (weight [in, C], bias [C] or None)`; `find_head` where `None`.

    Returns:
      `[C]` estimated counts, 2 for one logit; their sum is near `B`, and some may be below zero.

    Raises:
      ValueError: local training by another optimizer than SGD, no gradient, or no head found.
    """
    weight, bias = _head_gradient(model, observation, head)
    return _estimate(weight, bias, _dummy_head(model, observation, head), batch_size)


def counts(
    model: Model, observation: Observation, batch_size: int, head: Head | None = None
) -> Array:
    """Labels of a batch with repeats: `estimate_counts` in whole numbers, corrected by signs.

    Probabilities are not negative, so a class with a negative bias gradient occurs for certain, and
    so does one with a negative entry in its weight gradient if no feature is negative. Those
    classes get one sample each, and the rest of the batch goes one by one to the class with the
    largest remainder of its estimate. A batch without repeats is so recovered exactly as long as
    each of its classes shows a negative sign, whatever the estimate. The sum of a gradient row
    over the classes is zero but for noise, so it gives the noise level that a sign must exceed.

    Args:
      model: the model, with a dense head under softmax cross-entropy.
      observation: what the adversary was granted.
      batch_size: samples.
      head: `tree -> (weight [in, C], bias [C] or None)`; `find_head` where `None`.

    Returns:
      `[B]` labels in rising order.

    Raises:
      ValueError: local training by another optimizer than SGD, no gradient, or no head found.
    """
    weight, bias = _head_gradient(model, observation, head)
    dummy = _dummy_head(model, observation, head)
    estimate = _estimate(weight, bias, dummy, batch_size)
    present = _certainly_present(weight, bias, dummy.nonnegative)

    def give(_, assigned):
        first = present & (assigned == 0)
        # A certain class comes before any other, so its remainder is lifted above all others.
        lift = jnp.where(first, jnp.abs(estimate).max() + batch_size, 0.0)
        return assigned.at[jnp.argmax(estimate - assigned + lift)].add(1)

    assigned = jax.lax.fori_loop(0, batch_size, give, jnp.zeros(estimate.shape, jnp.int32))
    return jnp.repeat(jnp.arange(estimate.size), assigned, total_repeat_length=batch_size)


def recover(
    model: Model,
    observation: Observation,
    batch_size: int | None = None,
    method: Method = "auto",
    head: Head | None = None,
) -> Array:
    """Labels of a batch from its gradient.

    Args:
      model: the model, with a dense head under softmax cross-entropy.
      observation: what the adversary was granted; granted labels are not read.
      batch_size: samples, static; the observation's own (for a federated round, the client's
        number of samples) where `None`.
      method: `idlg` (one sample), `row_minimum` (no repeats), `counts` (repeats), or `auto`:
        `idlg` for one sample, else `counts`.
      head: `tree -> (weight [in, C], bias [C] or None)`; `find_head` where `None`.

    Returns:
      `[B]` labels in rising order.

    Raises:
      ValueError: an unknown method, an unknown or non-positive batch size, several samples for
        `idlg`, or what the method itself refuses.
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}.")
    facts = observation.facts
    size = facts.batch_size if batch_size is None else batch_size
    if size is None and facts.local is not None:
        size = facts.local.num_samples
    if size is None:
        raise ValueError(
            "The observation does not say how many samples there are: give batch_size, "
            "or estimate it with invjax.attacks.labels.estimate_batch_size."
        )
    if size < 1:
        raise ValueError(f"batch_size must be positive, got {size}.")
    if method == "idlg" and size != 1:
        raise ValueError(f"idlg recovers the label of one sample, the batch has {size}.")
    if method == "idlg" or (method == "auto" and size == 1):
        return idlg(model, observation, head)
    if method == "row_minimum":
        return row_minimum(model, observation, size, head)
    return counts(model, observation, size, head)


def estimate_batch_size(
    model: Model,
    observation: Observation,
    max_batch_size: int = 64,
    head: Head | None = None,
    tolerance: float = 0.15,
) -> int:
    """The smallest batch size at which all class counts are near whole numbers. Runs on the host.

    The bias gradient is `p - counts / B`, so `B (p - gradient)` is whole at the true `B`. Limits:
    `p` is estimated (see `estimate_counts`), so the model must be nearly untrained or the auxiliary
    data like the private, and its error times `B` must stay below the tolerance, which leaves small
    batches; only the shares of the classes show, so counts with a common divisor look like a
    smaller batch (two samples of one class like one); few classes fit by chance.

    Args:
      model: the model, with a dense head with a bias under softmax cross-entropy.
      observation: what the adversary was granted; not traced.
      max_batch_size: largest size to consider.
      head: `tree -> (weight [in, C], bias [C] or None)`; `find_head` where `None`.
      tolerance: how far any count may be from a whole number that is not negative.

    Returns:
      The batch size.

    Raises:
      ValueError: a head without bias, no size fits, or what `estimate_counts` refuses.
    """
    if _head_gradient(model, observation, head)[1] is None:
        raise ValueError(
            f"estimate_batch_size needs a last layer with a bias; that of {model.name} has none."
        )
    shares = np.asarray(estimate_counts(model, observation, 1, head), np.float64)
    for size in range(1, max_batch_size + 1):
        whole = np.maximum(np.round(size * shares), 0)
        if whole.sum() == size and np.abs(size * shares - whole).max() < tolerance:
            return size
    raise ValueError(
        f"No batch size up to max_batch_size={max_batch_size} gives class counts within "
        f"tolerance={tolerance} of whole numbers."
    )


class _DummyHead(NamedTuple):
    """The head on dummy inputs.

    Attributes:
      probabilities: `[C]` mean probabilities.
      feature: `[in]` mean input of the head.
      nonnegative: whether no feature of any dummy is negative.
    """

    probabilities: Array
    feature: Array
    nonnegative: Array


def _no_head(problem: str, classes: int) -> ValueError:
    return ValueError(
        f"Cannot tell the head, a dense layer of shape [in, {classes}]: {problem}. "
        "Give head=, a function of a tree that returns its (weight [in, C], bias [C] or None)."
    )


def _location(path: tuple) -> tuple:
    """A leaf's path without the `.value` that nnx state ends it with."""
    return path[:-1] if path and getattr(path[-1], "name", None) == "value" else path


def _head_gradient(
    model: Model, observation: Observation, head: Head | None
) -> tuple[Array, Array | None]:
    check_observation(model, observation)
    tree = per_step_gradient(observation)
    weight, bias = find_head(model, tree) if head is None else head(tree)
    if weight.shape[1] > 1:
        return weight, bias
    both = jnp.array([-1.0, 1.0], weight.dtype)
    return jnp.outer(weight[:, 0], both), None if bias is None else bias[0] * both


def _estimate(weight: Array, bias: Array | None, dummy: _DummyHead, batch_size: int) -> Array:
    if bias is None:
        # The sum of the features, or their projection on the mean, stands in for the bias.
        direction = jnp.where(dummy.nonnegative, 1.0, dummy.feature)
        scale = direction @ dummy.feature
        bias = (direction @ weight) / jnp.where(scale == 0, 1.0, scale)
    return batch_size * (dummy.probabilities - bias)


def _certainly_present(weight: Array, bias: Array | None, nonnegative: Array) -> Array:
    lowest = jnp.where(nonnegative, weight.min(axis=0), 0.0)
    rows = weight
    if bias is not None:
        lowest, rows = jnp.minimum(lowest, bias), jnp.concatenate([weight, bias[None]])
    noise = jnp.sqrt(jnp.mean(jnp.square(rows.sum(axis=1))) / rows.shape[1])
    # The lowest of n normal deviates is near -sqrt(2 log n); one more is the margin.
    return lowest < -noise * (1 + np.sqrt(2 * np.log(rows.size)))


def _dummy_head(model: Model, observation: Observation, head: Head | None) -> _DummyHead:
    local = observation.facts.local
    if local is not None and local.optimizer != "sgd":
        raise ValueError(
            f"Class counts are read off updates of local SGD, facts.local.optimizer is "
            f"{local.optimizer!r}; use method='row_minimum'."
        )
    inputs = _dummy_inputs(observation)
    points = 1 if local is None else min(local.num_steps, _MAX_POINTS)

    def at(fraction: Array | float) -> _DummyHead:
        params = jax.tree.map(
            lambda start, update: start - fraction * update,
            observation.params,
            observation.gradient,
        )
        logits = model.apply(params, inputs)
        if logits.shape[1] == 1:
            logits = jnp.concatenate([jnp.zeros_like(logits), logits], axis=1)
        features = _features(model, params, inputs, head)
        return _DummyHead(
            probabilities=jax.nn.softmax(logits).mean(axis=0),
            feature=features.mean(axis=0),
            nonnegative=(features >= 0).all(),
        )

    if points == 1:
        return at(0.0)
    # Not by vmap: convolutions with a kernel for each point are slow on CPU.
    along = jax.lax.map(at, jnp.arange(points) / points)
    return _DummyHead(
        probabilities=along.probabilities.mean(axis=0),
        feature=along.feature.mean(axis=0),
        nonnegative=along.nonnegative.all(),
    )


def _features(model: Model, params: Params, inputs: Array, head: Head | None) -> Array:
    """`[N, in]` inputs of the head: derivatives of the first logit in the weight's first column."""

    def weight_of(tree):
        return (find_head(model, tree) if head is None else head(tree))[0]

    weight, embed = jax.vjp(weight_of, params)

    def first_logit(column: Array, one: Array) -> Array:
        (step,) = embed(jnp.zeros_like(weight).at[:, 0].set(column))
        return model.apply(jax.tree.map(jnp.add, params, step), one[None])[0, 0]

    zero = jnp.zeros(weight.shape[0], weight.dtype)
    return jax.vmap(jax.grad(first_logit), in_axes=(None, 0))(zero, inputs)


def _dummy_inputs(observation: Observation) -> Array:
    facts = observation.facts
    if observation.auxiliary is not None:
        inputs = observation.auxiliary.inputs
        return inputs[:: -(-inputs.shape[0] // _MAX_AUXILIARY)]
    low, high = (
        jnp.broadcast_to(jnp.asarray(bound, jnp.float32), facts.input_shape)[None]
        for bound in facts.input_range
    )
    # Drawn on the host: a constant of the compiled code, which XLA would fold slowly from a key.
    noise = np.random.default_rng(0).random((_NUM_NOISE, *facts.input_shape), np.float32)
    return low + (high - low) * noise
