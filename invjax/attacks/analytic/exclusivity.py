"""Whole batches from the units that fire on one sample only: neuron exclusivity."""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from invjax.attacks.analytic.checks import check_one_step
from invjax.attacks.analytic.exclusivity_steps import (
    Groups,
    Read,
    Tolerances,
    allowance,
    certify,
    enumerate_patterns,
    first_signals,
    group_units,
    read_directions,
    read_rows,
    solve_inputs,
    support_patterns,
)
from invjax.attacks.analytic.feature_inversion import is_flattening
from invjax.base import Array, Attack, Layer, Model, Observation, Reconstruction, closed_form
from invjax.checks import check_choice, check_count, check_number
from invjax.models.layers import Layers, backpropagate, preactivations, split_at_head
from invjax.observe import check_observation, per_step_gradient

Scale = Literal["hidden_bias", "last_bias", "homogeneous", "paper"]
Final = Literal["bias", "least_squares"]
HeadPattern = Literal["forward", "binary"]

_MOST_BINARY = 16


def exclusivity(
    model: Model,
    *,
    scale: Scale = "hidden_bias",
    final: Final | None = None,
    head_pattern: HeadPattern = "forward",
    max_samples: int = 16,
    noise: float = 0.0,
    tolerance: float | None = None,
) -> Attack:
    """Reconstruct a batch from a ReLU network's exclusive units (Pan et al. 2022).

    A unit that is active on one sample alone has that sample's part of a gradient for itself. If in
    the last hidden layer every sample owns two such units and one in every other, then the whole
    batch follows by linear algebra: labels, loss vectors, activation patterns, inputs.

    1. Rows of the last weight's gradient that point the same way belong to one sample; their
       direction is its loss vector up to a scale, and gives the label.
    2. The scale `(1 - p_y) / B` follows from a bias gradient (`scale`).
    3. From the top down, an exclusive unit's column shows the pattern of the layer below by its
       support, and the patterns show the exclusive units there.
    4. An exclusive unit of the first layer gives the input: a quotient with its bias gradient, or
       without biases a direction, whose length the logits tell.
    5. With all patterns known, `G_0 = X^T Delta` is linear in all inputs: least squares.
    6. Certificates: the loss vectors sum to the last bias gradient (else a sample is missing); the
       input reproduces its own loss vector; `(1 - p_y) / scale` is the batch size.

    Only the algorithm for labels and loss vectors (their B.1, steps 1 and 2) is known as published,
    that for patterns (B.3, step 3) in substance; the exact scales, the finish and the certificates
    are worked out here. As published the scale is a guess of `p_y = 1/3` and all inputs come from
    least squares; `scale="paper"` does that, and images are then right up to a positive factor
    each. Precision decides: exact in float64, and in float32 up to its rounding (squared errors
    below 1e-10). With `noise` given, certificates allow for it to first order.

    Args:
      model: a chain that ends in dense layers with ReLU between them, at least one hidden. For one
        with a front before them (convolutions), inputs are the features `[d_0]` at the head; see
        `invjax.attacks.analytic.through_features`.
      scale: `hidden_bias` (from the last hidden layer's bias gradient), `last_bias` (from that of
        the logits; at most K-1 samples), `homogeneous` (for a network without any bias), `paper`.
      final: `bias` (the quotient of step 4, not harmed by a missing sample), `least_squares`, or
        `None`: `bias` for each sample where that meets its certificate, else `least_squares`, and
        this for `paper`.
      head_pattern: the last hidden layer's pattern, from a `forward` pass of step 4, or from the
        `binary` equation: of all subsets of samples the one that explains a unit's bias gradient.
        It needs no exclusive unit in the first layer, the exact scale, and at most 16 samples.
      max_samples: how many samples there is room for, where the batch size is not known.
      noise: standard deviation of the noise on an entry of the gradient. Zero by default.
      tolerance: distance of unit rows that belong together; by default 1e-8 in float64, and 1e-6 in
        float32.

    Returns:
      The attack; a closed form. Inputs are `[S, *input_shape]` (features `[S, d_0]` behind a front),
      strongest signals first, with S the batch size or `max_samples`. The batch size is read where
      the observation does not grant it; granted labels are not read. `found` is true for a sample
      that meets its own certificates; for `paper`, whose scale breaks them, where the gradient
      equation of step 5 holds, which says that images are right up to a factor. An empty slot is
      zero. The objective is the relative residual of the gradient equation. `diagnostics`: `groups`
      (samples seen), `batch_size` (read off the certificates; 0 where none holds), `complete` (no
      sample is missing), `missing` (norm of what the samples found leave of the last bias gradient,
      or weight gradient), `ratio` (`[S]`, should be the batch size), `mismatch` (`[S]`, relative
      error of the loss vectors), `loss_vectors` (`[S, K]`).

    Raises:
      ValueError: an unknown choice, a number out of range; and at its use, no such network, biases
        that do not go with `scale`, `final` or `head_pattern`, two classes (all rows are parallel
        then), several local steps, too many samples for `last_bias` or `binary`.
    """
    check_choice("scale", scale, get_args(Scale))
    if final is not None:
        check_choice("final", final, get_args(Final))
    check_choice("head_pattern", head_pattern, get_args(HeadPattern))
    check_number("noise", noise, 0.0)
    if tolerance is not None:
        check_number("tolerance", tolerance, 0.0, 1.0, open_low=True)
    check_count("max_samples", max_samples, 1)

    def check(observation: Observation) -> None:
        check_observation(model, observation)
        check_one_step(observation, "exclusivity")
        if model.num_classes == 2:
            raise ValueError(
                "exclusivity needs at least 3 classes, got 2: all loss vectors are then parallel, "
                "and no direction tells samples apart. The row scan does not need them: "
                "invjax.attacks.analytic.row_scan."
            )
        _, head = split_at_head(model, observation.params)
        _check_biases(head, scale, final, head_pattern)
        slots = observation.facts.batch_size or max_samples
        if scale == "last_bias" and slots > model.num_classes - 1:
            raise ValueError(
                f"scale='last_bias' solves for at most K - 1 = {model.num_classes - 1} samples, "
                f"got room for {slots}; use 'hidden_bias'."
            )
        if head_pattern == "binary" and slots > _MOST_BINARY:
            raise ValueError(
                f"head_pattern='binary' tries all subsets of at most {_MOST_BINARY} samples, "
                f"got room for {slots}; use 'forward'."
            )

    def init(key: Array, observation: Observation) -> Reconstruction:
        del key
        front, head = split_at_head(model, observation.params)
        gradient = split_at_head(model, per_step_gradient(observation))[1]
        slots = observation.facts.batch_size or max_samples
        with jax.default_matmul_precision("highest"):
            found = _attack(
                head,
                gradient,
                slots,
                observation.facts.batch_size,
                scale,
                final or ("least_squares" if scale == "paper" else None),
                head_pattern,
                _tolerances(gradient, noise, tolerance),
            )
        shape = observation.facts.input_shape if is_flattening(front) else found.inputs.shape[1:]
        return found._replace(inputs=found.inputs.reshape(slots, *shape))

    return closed_form(init, check)


def _attack(
    head: Layers,
    gradient: Layers,
    slots: int,
    batch_size: int | None,
    scale: Scale,
    final: Final | None,
    head_pattern: HeadPattern,
    tolerances: Tolerances,
) -> Reconstruction:
    weights: list[Any] = [layer.weight for layer in gradient]
    groups = group_units(weights[-1], slots, tolerances)
    supports, exclusive = support_patterns(weights[1:-1], groups, tolerances)
    if gradient[0].bias is not None:
        read = read_rows(weights[0], gradient[0].bias, exclusive)
    else:
        read = read_directions(head, weights[0], groups, exclusive)
    allowed = allowance(head, read, groups, tolerances)

    forward = preactivations(head, read.inputs)
    factor = _factors(head, gradient, groups, forward, read, scale, batch_size)
    groups = groups._replace(exists=groups.exists & (factor > 0) & jnp.isfinite(factor))
    factor = jnp.where(groups.exists, factor, 0.0)
    scaled = factor[:, None] * jnp.where(groups.exists[:, None], groups.signals, 0.0)

    if head_pattern == "binary":
        assert head[-1].weight is not None and gradient[-2].bias is not None
        top = enumerate_patterns(scaled @ head[-1].weight.T, gradient[-2].bias)
    else:
        top = forward[-2] > 0
    signals = first_signals(head, [*supports, top], scaled)
    inputs, mismatch, rest = _finish(head, read.inputs, signals, weights[0], groups, final, allowed)

    finite = jnp.isfinite(inputs).all(axis=1) & groups.exists
    inputs = jnp.where(finite[:, None], inputs, 0.0)
    norm = jnp.maximum(jnp.linalg.norm(weights[0]), 1e-30)
    residual = jnp.linalg.norm(weights[0] - inputs.T @ signals) / norm
    consistent = finite & (mismatch < allowed)
    ratio = rest / jnp.where(factor > 0, factor, jnp.inf)
    estimate = jnp.round(jnp.nanmedian(jnp.where(consistent, ratio, jnp.nan)))
    size = estimate if batch_size is None else batch_size
    if scale == "paper":
        noise = 2 * tolerances.noise * weights[0].size ** 0.5 / norm
        found = consistent | (finite & (residual < tolerances.certificate + noise))
    else:
        found = consistent & (jnp.abs(ratio - size) <= allowed * size)
    known = jnp.where(found[:, None], scaled, 0.0)
    missing, whole = _missing(head, gradient[-1], inputs, known)
    slack = tolerances.certificate * whole + (allowed * jnp.linalg.norm(known, axis=1)).sum()
    slack += 4 * tolerances.noise * known.shape[1] ** 0.5
    return Reconstruction(
        inputs=inputs,
        labels=groups.labels,
        found=found,
        objective=residual,
        diagnostics={
            "groups": groups.count,
            "batch_size": jnp.nan_to_num(estimate).astype(int),
            "complete": (missing <= slack) & (found.sum() == size),
            "missing": missing,
            "ratio": ratio,
            "mismatch": mismatch,
            "loss_vectors": scaled * jnp.nan_to_num(size),
        },
    )


def _factors(
    head: Layers,
    gradient: Layers,
    groups: Groups,
    forward: list[Array],
    read: Read,
    scale: Scale,
    batch_size: int | None,
) -> Array:
    """Step 2: `(1 - p_y) / B` of every sample, `[S]`."""
    if scale == "paper":
        size = groups.count if batch_size is None else batch_size
        return jnp.where(groups.exists, 2.0 / (3.0 * size), 0.0)
    if scale == "last_bias":
        signals = jnp.where(groups.exists[:, None], groups.signals, 0.0)
        assert gradient[-1].bias is not None
        return jnp.linalg.lstsq(signals.T, gradient[-1].bias)[0]
    if scale == "hidden_bias":
        assert head[-1].weight is not None and gradient[-2].bias is not None
        back = jnp.where(groups.members, groups.signals @ head[-1].weight.T, 0.0)
        return (back * gradient[-2].bias[None]).sum(axis=1) / jnp.square(back).sum(axis=1)
    assert gradient[0].weight is not None
    columns = gradient[0].weight.T[read.unit]
    back = backpropagate(head, forward, groups.signals)[0]
    chosen = jnp.take_along_axis(back, read.unit[:, None], axis=1)[:, 0]
    square = jnp.square(read.inputs).sum(axis=1)
    return (columns * read.inputs).sum(axis=1) / (square * chosen)


def _finish(
    head: Layers,
    read: Array,
    signals: Array,
    weight: Array,
    groups: Groups,
    final: Final | None,
    allowed: Array,
) -> tuple[Array, Array, Array]:
    """Inputs by the finish asked for, with what `certify` says of them."""
    first = (read, *certify(head, read, groups))
    if final == "bias":
        return first
    solved = solve_inputs(signals, weight)
    second = (solved, *certify(head, solved, groups))
    if final == "least_squares":
        return second
    better = (first[1] < allowed) | (first[1] <= second[1])
    inputs, mismatch, rest = jax.tree.map(
        lambda a, b: jnp.where(better.reshape((-1,) + (1,) * (a.ndim - 1)), a, b), first, second
    )
    return inputs, mismatch, rest


def _missing(head: Layers, last: Layer, inputs: Array, signals: Array) -> tuple[Array, Array]:
    """Norm of what known samples leave of the last layer's gradient, and what it is relative to."""
    if last.bias is not None:
        rest, parts = last.bias - signals.sum(axis=0), jnp.linalg.norm(signals, axis=1).sum()
        return jnp.linalg.norm(rest), jnp.maximum(parts, jnp.linalg.norm(last.bias))
    assert last.weight is not None
    features = jnp.maximum(preactivations(head, inputs)[-2], 0.0)
    return jnp.linalg.norm(last.weight - features.T @ signals), jnp.linalg.norm(last.weight)


def _tolerances(gradient: Layers, noise: float, tolerance: float | None) -> Tolerances:
    dtype = jnp.result_type(*[layer.weight for layer in gradient])
    direction, zero, certificate = (
        (1e-8, 1e-9, 1e-6) if dtype == jnp.float64 else (1e-6, 1e-7, 1e-3)
    )
    return Tolerances(direction if tolerance is None else tolerance, zero, certificate, noise)


def _check_biases(head: Layers, scale: str, final: str | None, head_pattern: str) -> None:
    if len(head) < 2:
        raise ValueError("exclusivity needs a hidden dense layer with ReLU, got none.")
    biased = [layer.bias is not None for layer in head]
    if any(biased) and not biased[0]:
        raise ValueError(
            "exclusivity needs a bias in the first dense layer, or none in any; "
            f"the layers have {biased}."
        )
    needs = {
        "scale='hidden_bias'": (scale == "hidden_bias", biased[-2], "the last hidden layer"),
        "scale='last_bias'": (scale == "last_bias", biased[-1], "the last layer"),
        "final='bias'": (final == "bias", biased[0], "the first dense layer"),
        "head_pattern='binary'": (head_pattern == "binary", biased[-2], "the last hidden layer"),
    }
    for name, (asked, there, where) in needs.items():
        if asked and not there:
            hint = "" if any(biased) else "; without any bias, use scale='homogeneous'"
            raise ValueError(f"{name} needs a bias in {where}{hint}.")
    if scale == "homogeneous" and any(biased):
        raise ValueError(
            "scale='homogeneous' needs a network without biases, but the layers have biases "
            f"{biased}; use 'hidden_bias'."
        )
