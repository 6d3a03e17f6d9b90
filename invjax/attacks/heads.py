"""The last dense layer: where it is, its gradient, and what it does on stand-ins for private inputs.

A model with one logit is read as the softmax of `(0, logit)`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from invjax.base import Array, Model, Observation, Params, PyTree
from invjax.checks import check_count
from invjax.observe import check_observation, per_step_gradient
from invjax.ranges import bounds

FindHead = Callable[[PyTree], tuple[Array, Array | None]]

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


def head_of(model: Model, tree: PyTree, head: FindHead | None) -> tuple[Array, Array | None]:
    """The head's part of a tree, by the caller's function where there is one.

    Args:
      model: the model.
      tree: parameters or a gradient.
      head: `tree -> (weight [in, C], bias [C] or None)`; `find_head` where `None`.

    Returns:
      Weight `[in, C]` and bias `[C]` or `None`.

    Raises:
      ValueError: as `find_head`.
    """
    return find_head(model, tree) if head is None else head(tree)


def _no_head(problem: str, classes: int) -> ValueError:
    return ValueError(
        f"Cannot tell the head, a dense layer of shape [in, {classes}]: {problem}. "
        "Give head=, a function of a tree that returns its (weight [in, C], bias [C] or None)."
    )


def _location(path: tuple) -> tuple:
    """A leaf's path without the `.value` that nnx state ends it with."""
    return path[:-1] if path and getattr(path[-1], "name", None) == "value" else path


def head_gradient(
    model: Model, observation: Observation, head: FindHead | None
) -> tuple[Array, Array | None]:
    """The observed gradient of the head, on the scale of one gradient.

    Args:
      model: the model.
      observation: what the adversary was granted.
      head: as for `head_of`.

    Returns:
      Of the weight `[in, C]` and of the bias `[C]` or `None`; two columns for one logit.

    Raises:
      ValueError: no gradient, or no head found.
    """
    check_observation(model, observation)
    weight, bias = head_of(model, per_step_gradient(observation), head)
    if weight.shape[1] > 1:
        return weight, bias
    both = jnp.array([-1.0, 1.0], weight.dtype)
    return weight * both[None], None if bias is None else bias * both


def probabilities(logits: Array) -> Array:
    """Mean probabilities of a batch.

    Args:
      logits: `[N, C]`, or `[N, 1]`.

    Returns:
      `[C]`, 2 for one logit.
    """
    if logits.shape[1] == 1:
        logits = jnp.concatenate([jnp.zeros_like(logits), logits], axis=1)
    return jax.nn.softmax(logits).mean(axis=0)


def batch_size_of(observation: Observation, batch_size: int | None) -> int:
    """How many samples are behind a gradient.

    Args:
      observation: what the adversary was granted.
      batch_size: what the caller says; the observation's own, or the samples of the client of a
        federated round, where `None`.

    Returns:
      The number.

    Raises:
      ValueError: nobody says it, or it is not positive.
    """
    facts = observation.facts
    size = facts.batch_size if batch_size is None else batch_size
    if size is None and facts.local is not None:
        size = facts.local.num_samples
    if size is None:
        raise ValueError(
            "The observation does not say how many samples there are: give batch_size, "
            "or estimate it with invjax.attacks.labels.estimate_batch_size."
        )
    check_count("batch_size", size, 1)
    return size


def local_steps(observation: Observation) -> int:
    """Local steps that an update sums up; 1 for a plain gradient.

    Args:
      observation: what the adversary was granted.

    Returns:
      The number.

    Raises:
      ValueError: local training by another optimizer than SGD, whose updates are no sums of gradients.
    """
    local = observation.facts.local
    if local is None:
        return 1
    if local.optimizer != "sgd":
        raise ValueError(
            "Label counts are read off sums of gradients, so observation.facts.local.optimizer must "
            f"be 'sgd', got {local.optimizer!r}; labels.row_minimum reads signs alone."
        )
    return local.num_steps


class DummyHead(NamedTuple):
    """The head on dummy inputs.

    Attributes:
      probabilities: `[C]` mean probabilities.
      feature: `[in]` mean input of the head.
      nonnegative: whether no feature of any dummy is negative.
    """

    probabilities: Array
    feature: Array
    nonnegative: Array


def dummy_head(model: Model, observation: Observation, head: FindHead | None) -> DummyHead:
    """The head on dummy inputs; of a federated round the mean along the line that its weights moved.

    Args:
      model: the model.
      observation: what the adversary was granted.
      head: as for `head_of`.

    Returns:
      What it does on auxiliary data where there are any, else on uniform noise; 8 points of the line
      at most, evenly spaced.

    Raises:
      ValueError: local training by another optimizer than SGD, or no head found.
    """
    points = min(local_steps(observation), _MAX_POINTS)
    inputs = dummy_inputs(observation)

    def at(fraction: Array | float) -> DummyHead:
        params = jax.tree.map(
            lambda start, update: start - fraction * update,
            observation.params,
            observation.gradient,
        )
        logits = model.apply(params, inputs)
        features = _features(model, params, inputs, head)
        return DummyHead(
            probabilities=probabilities(logits),
            feature=features.mean(axis=0),
            nonnegative=(features >= 0).all(),
        )

    if points == 1:
        return at(0.0)
    # Not by vmap: convolutions with a kernel for each point are slow on CPU.
    along = jax.lax.map(at, jnp.arange(points) / points)
    return DummyHead(
        probabilities=along.probabilities.mean(axis=0),
        feature=along.feature.mean(axis=0),
        nonnegative=along.nonnegative.all(),
    )


def _features(model: Model, params: Params, inputs: Array, head: FindHead | None) -> Array:
    """`[N, in]` inputs of the head: derivatives of the first logit in the weight's first column."""

    def weight_of(tree):
        return head_of(model, tree, head)[0]

    weight, embed = jax.vjp(weight_of, params)

    def first_logit(column: Array, one: Array) -> Array:
        (step,) = embed(jnp.zeros_like(weight).at[:, 0].set(column))
        return model.apply(jax.tree.map(jnp.add, params, step), one[None])[0, 0]

    zero = jnp.zeros(weight.shape[0], weight.dtype)
    return jax.vmap(jax.grad(first_logit), in_axes=(None, 0))(zero, inputs)


def dummy_inputs(observation: Observation) -> Array:
    """Inputs that stand in for the private ones.

    Args:
      observation: what the adversary was granted.

    Returns:
      `[N, ...]`: auxiliary data where there are any, 512 at most, evenly spaced; else 64 of uniform
      noise in the public input range, always the same.
    """
    facts = observation.facts
    if observation.auxiliary is not None:
        inputs = observation.auxiliary.inputs
        return inputs[:: -(-inputs.shape[0] // _MAX_AUXILIARY)]
    # Drawn on the host: a constant of the compiled code, which XLA would fold slowly from a key.
    noise = np.random.default_rng(0).random((_NUM_NOISE, *facts.input_shape), np.float32)
    low, high = bounds(facts.input_range, facts.input_shape, jnp.float32)
    return low[None] + (high - low)[None] * noise
