"""Attacks on dense networks carried through a convolutional front, to pixels."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from invjax.attacks.analytic.feature_inversion import (
    check_finite_range,
    check_search,
    invert_features,
    is_flattening,
    is_linear,
)
from invjax.base import (
    Array,
    Attack,
    Batch,
    Layer,
    Model,
    Observation,
    PyTree,
    Reconstruction,
    closed_form,
)
from invjax.checks import check_number
from invjax.models.layers import Layers, apply_layers, preactivations, split_at_head
from invjax.models.losses import cross_entropy
from invjax.observe import check_observation


def head_model(model: Model) -> Model:
    """The dense head of a model, as a model of the features.

    Args:
      model: a chain that ends in dense layers with ReLU between them; that it does is checked by
        `head_observation`.

    Returns:
      A model on inputs `[B, d_0]` with the cross-entropy as its loss. Its parameters are one
      `(weight, bias)` a layer, as `head_observation` gives them; its `init` raises `ValueError`.
    """

    def layers(tree: PyTree) -> Layers:
        last = len(tree) - 1
        return tuple(
            Layer("dense", weight, bias, "identity" if index == last else "relu")
            for index, (weight, bias) in enumerate(tree)
        )

    def init(key: Array, input_shape: Any) -> PyTree:
        raise ValueError(
            f"The head of {model.name} has no init: its parameters are a part of the model's; "
            "head_observation takes them out."
        )

    def apply(params: PyTree, inputs: Array) -> Array:
        return preactivations(layers(params), inputs)[-1]

    return Model(
        init, apply, cross_entropy(apply), model.num_classes, f"{model.name}_head", layers=layers
    )


def head_observation(model: Model, observation: Observation) -> Observation:
    """What an observation says of the head: an observation of `head_model` on features.

    Args:
      model: a chain that ends in dense layers with ReLU between them.
      observation: of that model.

    Returns:
      The observation: the head's part of parameters and gradient, features `[A, d_0]` in place of
      auxiliary inputs, and the range that the last convolution's activation leaves: from 0 behind a
      ReLU, else unbounded. The defence's public randomness, which speaks of the whole model, is
      left out.

    Raises:
      ValueError: no such model.
    """

    def of(tree: PyTree) -> PyTree:
        if tree is None:
            return None
        return tuple((layer.weight, layer.bias) for layer in split_at_head(model, tree)[1])

    front, head = split_at_head(model, observation.params)
    assert head[0].weight is not None
    rectified = [layer.activation for layer in front if layer.kind == "conv"][-1:] == ["relu"]
    facts = observation.facts
    if not is_flattening(front):
        low = 0.0 if rectified else -math.inf
        facts = dataclasses.replace(facts, input_range=(low, math.inf))
    auxiliary = observation.auxiliary
    if auxiliary is not None:
        auxiliary = Batch(apply_layers(front, auxiliary.inputs), auxiliary.labels)
    return observation._replace(
        params=of(observation.params),
        gradient=of(observation.gradient),
        facts=dataclasses.replace(facts, input_shape=(head[0].weight.shape[0],)),
        statistics=None,
        public=None,
        auxiliary=auxiliary,
        initial_params=of(observation.initial_params),
    )


def through_features(
    model: Model,
    make_attack: Callable[[Model], Attack],
    *,
    restarts: int = 8,
    num_steps: int = 60,
    total_variation: float = 0.0,
    tolerance: float | None = None,
) -> Attack:
    """An exact attack on the dense head of a convolutional network, carried on to pixels.

    The head's inputs are the features that the front computes; an attack on dense networks gives
    them exactly, and `invert_features` finds the pixels that have them. (Pan et al. 2022 show
    reconstructions from a VGG; how they come from features to pixels is not known to us. Feature
    inversion is the composition that the literature names.)

    Args:
      model: a chain that ends in dense layers with ReLU between them.
      make_attack: `make_attack(head) -> Attack`, on the head as a model of its own, for example
        `lambda head: exclusivity(head)`.
      restarts: of the search for pixels, where the front is not one convolution.
      num_steps: of that search.
      total_variation: weight of the squared total variation in the search's first half.
      tolerance: relative error of features that pass as equal; by default 1e-6 in float64 and 1e-3
        in float32.

    Returns:
      The attack; a closed form to the driver. Inputs are `[S, *input_shape]`, S as the head's attack
      has it. `found` is true where that found the features, the pixels have these features, and no
      pixels nearby have them too. The objective is the larger of the head's and, among what that
      found, the largest relative error of features. `diagnostics`: `head` (that attack's),
      `features` `[S, d_0]`, `residual` and `determined` (`[S]`, of `Inverted`).

    Raises:
      ValueError: a setting out of range; and at its use, no such model, an infinite input range
        where pixels must be searched for, whatever the head's attack refuses.
    """
    check_search(restarts, num_steps, total_variation)
    if tolerance is not None:
        check_number("tolerance", tolerance, 0.0, 1.0, open_low=True)
    attack = make_attack(head_model(model))

    def check(observation: Observation) -> None:
        check_observation(model, observation)
        front, _ = split_at_head(model, observation.params)
        if not is_linear(front):
            check_finite_range(observation.facts.input_range)
        if attack.check is not None:
            attack.check(head_observation(model, observation))

    def init(key: Array, observation: Observation) -> Reconstruction:
        head_key, search_key = jax.random.split(key)
        seen = head_observation(model, observation)
        known = attack(head_key, seen)
        front, _ = split_at_head(model, observation.params)
        result = invert_features(
            search_key,
            front,
            known.inputs,
            observation.facts.input_shape,
            observation.facts.input_range,
            restarts=restarts,
            num_steps=num_steps,
            total_variation=total_variation,
        )
        exact = 1e-6 if result.inputs.dtype == jnp.float64 else 1e-3
        limit = exact if tolerance is None else tolerance
        found = known.found & (result.residual < limit) & result.determined
        worst = jnp.where(known.found, result.residual, 0.0).max()
        return Reconstruction(
            inputs=result.inputs,
            labels=known.labels,
            found=found,
            objective=jnp.maximum(known.objective, worst),
            diagnostics={
                "head": known.diagnostics,
                "features": known.inputs,
                "residual": result.residual,
                "determined": result.determined,
            },
        )

    return closed_form(init, check)
