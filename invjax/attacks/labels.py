"""Label recovery: the classes of a batch, read off the gradient of the last dense layer.

With softmax cross-entropy the gradient of the last bias is `mean_b (p_b - y_b)` and that of the
last weight `mean_b f_b (p_b - y_b)^T`: probabilities minus labels, weighted by features.
"""

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from invjax.base import Array, Model, Observation, PyTree
from invjax.observe import per_step_gradient

Head = Callable[[PyTree], tuple[Array, Array | None]]
Method = Literal["auto", "idlg", "row_minimum", "counts"]


def find_head(model: Model, tree: PyTree) -> tuple[Array, Array | None]:
    """The last dense layer's part of a parameter or gradient tree.

    Args:
      model: the model; its layer view is used where it has one.
      tree: parameters or a gradient.

    Returns:
      Weight `[in, C]` and bias `[C]` or `None`.

    Raises:
      ValueError: no leaf looks like the head, or several do.
    """
    if model.layers is not None:
        dense = [layer for layer in model.layers(tree) if layer.weight is not None][-1]
        assert dense.weight is not None
        return dense.weight, dense.bias
    leaves = jax.tree.leaves_with_path(tree)
    classes = model.num_classes
    weights = [(path, leaf) for path, leaf in leaves if leaf.ndim == 2 and leaf.shape[1] == classes]
    if len(weights) != 1:
        raise ValueError(
            f"Found {len(weights)} weights of shape [in, {classes}] in the gradient, and the head "
            "is one: give head=, a function of a tree that returns its (weight, bias)."
        )
    path, weight = weights[0]
    biases = [
        leaf
        for other, leaf in leaves
        if leaf.shape == (classes,) and other[: len(path) - 1] == path[:-1]
    ]
    return weight, biases[0] if biases else None


def idlg(model: Model, observation: Observation, head: Head | None = None) -> Array:
    """Label of a single sample (Zhao et al. 2020): the one class whose gradient is negative.

    Without a bias the sign of `f (p_c - y_c)` summed over features decides, which needs features
    that are positive on the whole (sigmoid, ReLU).

    Args:
      model: the model.
      observation: what the adversary was granted.
      head: where the head is; searched for where `None`.

    Returns:
      `[1]` labels.
    """
    weight, bias = _head_gradient(model, observation, head)
    return jnp.argmin(weight.sum(axis=0) if bias is None else bias)[None]


def row_minimum(
    model: Model, observation: Observation, batch_size: int, head: Head | None = None
) -> Array:
    """Labels of a batch without repeats (Yin et al. 2021, equation 9).

    The classes with the lowest minimum over features of the head's weight gradient.

    Args:
      model: the model.
      observation: what the adversary was granted.
      batch_size: samples, at most the number of classes.
      head: where the head is; searched for where `None`.

    Returns:
      `[B]` labels in rising order.

    Raises:
      ValueError: more samples than classes.
    """
    if batch_size > model.num_classes:
        raise ValueError(
            f"row_minimum knows no repeats: batch_size must be at most {model.num_classes}, "
            f"got {batch_size}; use counts."
        )
    weight, _ = _head_gradient(model, observation, head)
    return jnp.sort(jnp.argsort(weight.min(axis=0))[:batch_size])


def estimate_counts(
    model: Model, observation: Observation, batch_size: int, head: Head | None = None
) -> Array:
    """How often every class occurs, as real numbers: `B (p_c - gradient_c)`.

    The mean probabilities `p` are those of the model on random inputs of the public range (or on
    the auxiliary data, where the adversary has some). A head without bias uses its weight
    gradient over the summed mean feature, which random inputs give as well
    (Dimitrov et al. 2022; Geng et al. 2021).

    Args:
      model: the model.
      observation: what the adversary was granted.
      batch_size: samples.
      head: where the head is; searched for where `None`.

    Returns:
      `[C]` estimated counts; their sum is near `B`, and some may be below zero.
    """
    weight, bias = _head_gradient(model, observation, head)
    probabilities = _mean_probabilities(model, observation)
    if bias is None:
        # Rows sum over features to (p - y) times the summed feature; its scale is unknown, but the
        # counts must add up with no class below zero, and absent classes show p alone.
        rows = weight.sum(axis=0)
        scale = jnp.maximum(jnp.abs(rows).sum() / 2, 1e-30)
        spread = jnp.maximum(_absent_mass(probabilities, rows), 1e-6)
        return batch_size * (probabilities - rows / scale * spread)
    return batch_size * (probabilities - bias)


def counts(
    model: Model, observation: Observation, batch_size: int, head: Head | None = None
) -> Array:
    """Labels of a batch with repeats.

    Classes whose gradient is negative occur for certain (`p >= 0`), so each is given one sample
    first, most negative first; the rest goes to the largest remainders of `estimate_counts`.
    A batch without repeats at most as large as the number of classes is so recovered exactly as
    long as its classes are those with the most negative gradients.

    Args:
      model: the model.
      observation: what the adversary was granted.
      batch_size: samples.
      head: where the head is; searched for where `None`.

    Returns:
      `[B]` labels in rising order.
    """
    weight, bias = _head_gradient(model, observation, head)
    evidence = weight.sum(axis=0) if bias is None else bias
    estimate = estimate_counts(model, observation, batch_size, head)
    rank = jnp.argsort(jnp.argsort(evidence))
    present = (evidence < 0) & (rank < batch_size)
    assigned = present.astype(jnp.int32)

    def give(_, assigned):
        remainder = estimate - assigned
        return assigned.at[jnp.argmax(remainder)].add(1)

    # A class may have earned several samples: hand out one at a time, to the largest remainder.
    remaining = batch_size - assigned.sum()
    assigned = jax.lax.fori_loop(0, remaining, give, assigned)
    return jnp.repeat(jnp.arange(model.num_classes), assigned, total_repeat_length=batch_size)


def recover(
    model: Model,
    observation: Observation,
    batch_size: int | None = None,
    method: Method = "auto",
    head: Head | None = None,
) -> Array:
    """Labels of a batch from its gradient.

    Args:
      model: the model.
      observation: what the adversary was granted.
      batch_size: samples; the observation's own where `None`.
      method: `idlg` (one sample), `row_minimum` (no repeats), `counts` (repeats), or `auto`:
        `idlg` for one sample, else `counts`.
      head: where the head is; searched for where `None`.

    Returns:
      `[B]` labels in rising order. A gradient does not tell the order of its samples.

    Raises:
      ValueError: an unknown method, an unknown batch size, a binary model, several samples for `idlg`.
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}.")
    size = observation.facts.batch_size if batch_size is None else batch_size
    if size is None:
        raise ValueError(
            "The observation does not say how many samples there are: give batch_size, "
            "or estimate it with estimate_batch_size."
        )
    if model.num_classes < 2:
        raise ValueError("Label recovery needs a model with at least two logits.")
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
    tolerance: float = 0.1,
) -> int:
    """The smallest batch size at which the class counts are whole numbers. Runs on the host.

    The bias gradient is `p - counts / B`; with `p` estimated, `B (p - gradient)` is whole at the true
    `B`. It needs probabilities that vary little between inputs (an untrained model), and a multiple
    of the truth fits as well: the smallest that fits is returned.

    Args:
      model: the model.
      observation: what the adversary was granted.
      max_batch_size: largest size to consider.
      head: where the head is; searched for where `None`.
      tolerance: how far a count may be from a whole number.

    Returns:
      The batch size.

    Raises:
      ValueError: a head without bias, or no size fits.
    """
    _, bias = _head_gradient(model, observation, head)
    if bias is None:
        raise ValueError("estimate_batch_size needs a last layer with a bias.")
    shares = np.asarray(_mean_probabilities(model, observation) - bias, np.float64)
    for size in range(1, max_batch_size + 1):
        count = size * shares
        if np.abs(count - np.round(count)).max() < tolerance and np.round(count).min() >= 0:
            return size
    raise ValueError(
        f"No batch size up to {max_batch_size} gives whole class counts within {tolerance}."
    )


def _head_gradient(model: Model, observation: Observation, head: Head | None):
    tree = per_step_gradient(observation)
    return find_head(model, tree) if head is None else head(tree)


def _mean_probabilities(model: Model, observation: Observation) -> Array:
    facts = observation.facts
    if observation.auxiliary is not None:
        inputs = observation.auxiliary.inputs
    else:
        low, high = (jnp.asarray(bound, jnp.float32) for bound in facts.input_range)
        noise = jax.random.uniform(jax.random.key(0), (64, *facts.input_shape))
        pad = (1,) * (len(facts.input_shape) + 1 - low.ndim)
        low, high = low.reshape(pad + low.shape), high.reshape(pad + high.shape)
        inputs = noise * (high - low) + low
    logits = model.apply(observation.params, inputs)
    return jax.nn.softmax(logits).mean(axis=0)


def _absent_mass(probabilities: Array, rows: Array) -> Array:
    """Total variation between mean probabilities and labels: `1 - p(present classes)` without repeats."""
    return 1.0 - jnp.where(rows < 0, probabilities, 0.0).sum()
