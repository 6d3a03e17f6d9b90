"""Label recovery: the classes of a batch, read off the gradient of the last dense layer.

With softmax cross-entropy the gradient of the last bias is `mean_b (p_b - y_b)` and that of the
last weight `mean_b f_b (p_b - y_b)^T`: probabilities minus labels, weighted by features. A model
with one logit is read as the softmax of `(0, logit)`. All but `estimate_batch_size` is `jit`- and
`vmap`-able over observations; labels come in rising order, since a gradient does not tell the order
of its samples.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from invjax.attacks.heads import DummyHead, FindHead, batch_size_of, dummy_head, head_gradient
from invjax.attacks.heads import find_head as find_head
from invjax.attacks.label_counts import labels_of
from invjax.base import Array, Model, Observation
from invjax.checks import check_choice, check_count

Method = Literal["auto", "idlg", "row_minimum", "counts"]


def idlg(model: Model, observation: Observation, head: FindHead | None = None) -> Array:
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
    weight, bias = head_gradient(model, observation, head)
    if bias is not None:
        return jnp.argmin(bias)[None]
    classes = weight.shape[1]
    if classes == 2:
        return jnp.argmin(weight.sum(axis=0))[None]
    products = jnp.where(jnp.eye(classes, dtype=bool), -jnp.inf, weight.T @ weight)
    return jnp.argmin(products.max(axis=0))[None]


def row_minimum(
    model: Model, observation: Observation, batch_size: int, head: FindHead | None = None
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
      ValueError: no samples or more than classes, no gradient, or no head found.
    """
    check_count("batch_size", batch_size, 1)
    weight, _ = head_gradient(model, observation, head)
    if batch_size > weight.shape[1]:
        raise ValueError(
            f"row_minimum knows no repeats: batch_size must be at most {weight.shape[1]}, "
            f"got {batch_size}; use counts."
        )
    return jnp.sort(jnp.argsort(weight.min(axis=0))[:batch_size])


def estimate_counts(
    model: Model, observation: Observation, batch_size: int, head: FindHead | None = None
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
      ValueError: no samples, local training by another optimizer than SGD, no gradient, or no head
        found.
    """
    check_count("batch_size", batch_size, 1)
    weight, bias = head_gradient(model, observation, head)
    return _estimate(weight, bias, dummy_head(model, observation, head), batch_size)


def counts(
    model: Model, observation: Observation, batch_size: int, head: FindHead | None = None
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
      ValueError: no samples, local training by another optimizer than SGD, no gradient, or no head
        found.
    """
    check_count("batch_size", batch_size, 1)
    weight, bias = head_gradient(model, observation, head)
    dummy = dummy_head(model, observation, head)
    estimate = _estimate(weight, bias, dummy, batch_size)
    present = _certainly_present(weight, bias, dummy.nonnegative)

    def give(_, assigned):
        first = present & (assigned == 0)
        # A certain class comes before any other, so its remainder is lifted above all others.
        lift = jnp.where(first, jnp.abs(estimate).max() + batch_size, 0.0)
        return assigned.at[jnp.argmax(estimate - assigned + lift)].add(1)

    assigned = jax.lax.fori_loop(0, batch_size, give, jnp.zeros(estimate.shape, jnp.int32))
    return labels_of(assigned, batch_size)


def recover(
    model: Model,
    observation: Observation,
    batch_size: int | None = None,
    method: Method = "auto",
    head: FindHead | None = None,
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
    check_choice("method", method, get_args(Method))
    size = batch_size_of(observation, batch_size)
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
    head: FindHead | None = None,
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
    if head_gradient(model, observation, head)[1] is None:
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


def _estimate(weight: Array, bias: Array | None, dummy: DummyHead, batch_size: int) -> Array:
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
