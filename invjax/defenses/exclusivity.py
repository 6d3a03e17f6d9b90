"""Exclusivity reduction: no neuron of the dense head may be active on one sample alone.

A ReLU neuron that is active on exactly one sample of the batch (an exclusively activated neuron,
ExAN; Pan et al. 2022) has a row of that sample alone in the mean gradient. Enough such rows, and
the batch is read off; a few, and it is peeled off one sample after another. Pan et al. propose to
reduce exclusivity as a mitigation; their procedure is not public in full, and the three here are
ours: they change the inputs (`invjax.defenses.exclusivity_inputs`), the forward pass, or the gradient.

What none of them stops:

* Partial reduction is useless: one sample read from one exclusive row can be subtracted, which
  makes others exclusive. The number of exclusive neurons must be zero.
* Neurons that are nearly exclusive remain. Their rows show one sample blurred by little of others:
  on digits and 512 neurons the best row has a median squared error of 1e-5 to 3e-4 in batches of 4,
  and of 2e-4 to 4e-3 in batches of 8.
* SPEAR (Dimitrov et al. 2024) needs no exclusive neuron, and recovers small batches exactly behind
  each of them. Protection is where first-layer signals are linearly dependent
  (`invjax.theory.exclusivity.secure_boundary`), in noise, or in batches beyond SPEAR's reach.
"""

import jax
import jax.numpy as jnp

from invjax.base import Array, Batch, Defense, Model, Params, PyTree
from invjax.checks import check_number, describe
from invjax.defenses.base import from_stages
from invjax.defenses.masking import computed_mask_stage, view_mask
from invjax.models.layers import (
    Layers,
    apply_layers,
    backpropagate,
    check_layer_view,
    preactivations,
    split_at_head,
)
from invjax.models.losses import cross_entropy


def exclusive(values: Array) -> Array:
    """Which neurons are active on one sample alone (ExANs; Pan et al. 2022).

    Args:
      values: `[B, d]`, what a ReLU layer computes before its activation.

    Returns:
      `[B, d]` booleans, true at a neuron and the only sample that it is active on.
    """
    active = values > 0
    return active & (active.sum(axis=0, keepdims=True) == 1)


def hidden_values(model: Model, params: Params, inputs: Array) -> list[Array]:
    """What the hidden ReLU layers of the dense head compute, before their activation.

    Args:
      model: a model that ends in dense ReLU layers.
      params: its parameters.
      inputs: `[B, ...]`.

    Returns:
      `[B, d_l]` for every hidden layer of the head.

    Raises:
      ValueError: no dense head, or one without a hidden layer.
    """
    front, head = _head(model, params)
    return preactivations(head, apply_layers(front, inputs))[:-1]


def exclusivity_dropout(model: Model) -> Model:
    """The model with a loss that drops exclusive activations.

    Layer by layer the activations of exclusive neurons are multiplied by zero, and what follows is
    computed of the rest, so that no layer has an exclusive neuron in the end. Gradients go through
    the masks, which are constants. Evaluation (`apply`) is unchanged.

    It needs the gradient of a batch: whoever takes gradients sample by sample makes every active
    neuron exclusive. Such a batch of one is refused.

    What it does not stop: see the head of this module. SPEAR's linear algebra recovers the private
    inputs, although its certificate, which expects the plain forward pass, then fails; an adversary
    who matches gradients does so with this very model.

    Args:
      model: a model that ends in dense ReLU layers with at least one hidden.

    Returns:
      The model; its loss is the cross-entropy.

    Raises:
      ValueError: a model without such a head; and, when its loss meets it, a batch of one sample.
    """
    check_layer_view(model)

    def logits(params: Params, inputs: Array) -> Array:
        if inputs.shape[0] < 2:
            raise ValueError(
                "exclusivity_dropout needs the gradient of a batch of at least 2 samples, not "
                f"per-sample gradients: got inputs of shape {inputs.shape}."
            )
        front, head = _head(model, params)
        values = apply_layers(front, inputs)
        for layer in head[:-1]:
            (before,) = preactivations((layer,), values)
            # Booleans carry no derivative: the mask is a constant.
            values = jnp.where(exclusive(before), 0.0, jax.nn.relu(before))
        return preactivations(head[-1:], values)[0]

    swap = model.with_convolution
    return model._replace(
        loss=cross_entropy(logits),
        name=f"exclusivity_dropout({model.name})",
        with_convolution=swap and (lambda conv: exclusivity_dropout(swap(conv))),
    )


def mask_exclusive_rows(model: Model, dominance: float = 1.0, *, known: bool = False) -> Defense:
    """Zero what the gradient says of neurons that one sample dominates.

    With `delta_j^m` the derivative of sample `m`'s loss by what hidden neuron `j` computes, its
    dominance is `max_m |delta_j^m| / sum_m |delta_j^m|`. Where this reaches the threshold, and
    where the neuron is exclusive, all gradients of weights into and out of it and of its bias are
    zeroed. A threshold of 1 is the plain rule: exclusive neurons only. The mask is computed by
    `prepare`, of the batch and the parameters that it is given, which every update needs.

    What it does not stop: see the head of this module. SPEAR recovers the private inputs exactly,
    from the rows that stay; and nearly exclusive rows show single samples, in digits of batches of 4
    with a median squared error of 1e-5 to 3e-4 at a threshold of 1, 2e-3 at 0.9 and 1e-2 at 0.6;
    low thresholds distort the gradients of small batches (to a cosine of 0.5 for two samples at
    0.6). Layers before the dense head are sent as they are.

    The mask can be read off the zeros; where later stages hide them and it is not published, the
    law leaves out all of the head but the last bias. What the mask itself says of the inputs, and
    the zeros of a neuron that no sample activates, are in no likelihood.

    Args:
      model: the client's model, which ends in dense ReLU layers with at least one hidden.
      dominance: threshold, in (0, 1].
      known: whether the mask, a tuple of `[d_l]` booleans, is published.

    Returns:
      The defence.

    Raises:
      ValueError: a threshold out of range, a model without such a head; and, when its law is asked
        for, a known mask that the observation does not hold.
    """
    check_number("dominance", dominance, 0.0, 1.0, open_low=True)
    check_layer_view(model)
    name = describe("mask_exclusive_rows", dominance, known=known)

    stage = computed_mask_stage(
        name,
        whole=lambda tree: _all_neurons(model, tree),
        compute=lambda params, batch: _undominated(model, params, batch, dominance),
        read=lambda gradient: read_neurons(model, gradient),
        spread=lambda tree, kept: _mask_neurons(model, tree, kept),
        known=known,
    )
    return from_stages(stage)


def dominances(model: Model, params: Params, batch: Batch) -> list[Array]:
    """How far one sample dominates what the gradient says of every hidden neuron.

    Args:
      model: a model that ends in dense ReLU layers with at least one hidden.
      params: its parameters.
      batch: inputs `[B, ...]`, labels `[B]` or `[B, C]`.

    Returns:
      `[d_l]` for every hidden layer of the head: `max_m |delta_j^m| / sum_m |delta_j^m|`, between
      `1 / B` and 1; 0 for a neuron that no sample has a signal at.

    Raises:
      ValueError: no dense head, or one without a hidden layer.
    """
    front, head = _head(model, params)
    values = preactivations(head, apply_layers(front, batch.inputs))
    signal = jax.grad(lambda logits: cross_entropy(lambda *_: logits)(None, batch))(values[-1])
    deltas = [jnp.abs(delta) for delta in backpropagate(head, values, signal)[:-1]]
    totals = [delta.sum(axis=0) for delta in deltas]
    return [
        delta.max(axis=0) / jnp.where(total > 0, total, 1.0)
        for delta, total in zip(deltas, totals, strict=True)
    ]


def read_neurons(model: Model, gradient: PyTree) -> tuple[Array, ...]:
    """The mask of `mask_exclusive_rows`, as an adversary reads it off a gradient.

    A neuron that no sample activates has zero rows whether it was masked or not.

    Args:
      model: the client's model.
      gradient: the defended gradient; nothing may have been added to it since.

    Returns:
      `[d_l]` booleans for every hidden layer of the head, false where all entries are zero.

    Raises:
      ValueError: no dense head, or one without a hidden layer.
    """
    return tuple(
        (weight != 0).any(axis=0) | (False if bias is None else bias != 0)
        for weight, bias in _weights(model, gradient)[:-1]
    )


def _undominated(model, params, batch: Batch, dominance) -> tuple[Array, ...]:
    values = hidden_values(model, params, batch.inputs)
    # A neuron without a signal is exclusive too where the weights behind it are zero.
    return tuple(
        (share < dominance) & ~exclusive(value).any(axis=0)
        for share, value in zip(dominances(model, params, batch), values, strict=True)
    )


def _mask_neurons(model: Model, tree: PyTree, kept: tuple[Array, ...]) -> PyTree:
    """Booleans like the tree: false in the head where a neuron is not kept, at either end."""
    weights = _weights(model, tree)
    coordinates = []
    for index, (weight, bias) in enumerate(weights):
        rows = kept[index - 1] if index else jnp.ones(weight.shape[0], bool)
        columns = kept[index] if index < len(kept) else jnp.ones(weight.shape[1], bool)
        coordinates.append((rows[:, None] & columns[None], None if bias is None else columns))
    return view_mask(lambda tree: _weights(model, tree), tree, coordinates)


def _all_neurons(model: Model, tree: PyTree) -> tuple[Array, ...]:
    return tuple(jnp.ones(weight.shape[1], bool) for weight, _ in _weights(model, tree)[:-1])


def _weights(model: Model, tree: PyTree) -> list[tuple[Array, Array | None]]:
    """Weight and bias of every dense layer of the head."""
    found = []
    for layer in _head(model, tree)[1]:
        assert layer.weight is not None
        found.append((layer.weight, layer.bias))
    return found


def _head(model: Model, tree: PyTree) -> tuple[Layers, Layers]:
    front, head = split_at_head(model, tree)
    if len(head) < 2:
        raise ValueError(
            f"Exclusivity is of hidden ReLU layers, and the dense head of {model.name} has none."
        )
    return front, head
