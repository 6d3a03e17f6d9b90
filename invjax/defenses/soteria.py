"""Soteria: zero what one dense layer's weight gradient says of chosen input features."""

import jax
import jax.numpy as jnp

from invjax.base import Array, Batch, Defense, Layer, Model, Params, PyTree
from invjax.checks import check_number, describe, equals
from invjax.defenses.base import from_stages, nothing
from invjax.defenses.masking import computed_mask_stage, view_mask
from invjax.models.layers import apply_layers, check_layer_view, layers_of


def soteria(
    model: Model,
    rate: float = 0.8,
    *,
    layer: int = -1,
    epsilon: float = 0.1,
    known: bool = False,
) -> Defense:
    """Zero the rows of a dense layer's weight gradient that belong to its telling features.

    Sun et al. 2021 (Soteria), as their code has it. With `r` the input features of the layer,
    `s_f = sum over the batch of |d r_f / d x|_2 / (r_f + epsilon)`; the rows of the features with
    `|s_f|` under the `rate` quantile of `s` are zeroed. Biases and other layers stay as they are.
    The mask is computed by `prepare`, of the batch and the parameters that it is given (in a
    federated round those of its beginning), which every update needs.

    The mask can be read off the zero rows. Where later stages hide them and it is not published, the
    law leaves that weight out, which is the break of Balunovic et al. 2022 (`drop_layer_weights`).
    What the mask itself says of the inputs is in no likelihood.

    Args:
      model: the client's model; it needs a layer view.
      rate: share of the features that is zeroed, in [0, 1]; of 1 the one with the largest `s` stays.
      layer: which dense layer, counted from 0, or from -1 backwards; the last one by default.
      epsilon: added to the features, in their units, positive; 0.1 in the released code.
      known: whether the mask, `[in]` booleans, is published.

    Returns:
      The defence.

    Raises:
      ValueError: a strength out of range, a model without a layer view; at the first use, a layer
        that the model does not have; and, when its law is asked for, a known mask that the
        observation does not hold.
      TypeError: `layer` is no integer.
    """
    check_number("rate", rate, 0.0, 1.0)
    # A dead ReLU unit would have 0 / 0.
    check_number("epsilon", epsilon, 0.0, open_low=True)
    if not isinstance(layer, int):
        raise TypeError(f"layer must be an integer, got {layer!r}.")
    check_layer_view(model)
    name = describe("soteria", rate, layer=layer, epsilon=epsilon, known=known)
    if equals(rate, 0):
        return from_stages(nothing(name, "aggregate"))

    def compute(params: Params, batch: Batch) -> Array:
        score = sensitivity(model, params, batch.inputs, layer, epsilon)
        return ~(jnp.abs(score) < jnp.quantile(score, rate))

    stage = computed_mask_stage(
        name,
        whole=lambda tree: _features(model, tree, layer, True),
        compute=compute,
        read=lambda gradient: read_mask(model, gradient, layer),
        spread=lambda tree, kept: _mask_rows(model, tree, layer, kept),
        known=known,
    )
    return from_stages(stage)


def sensitivity(
    model: Model, params: Params, inputs: Array, layer: int = -1, epsilon: float = 0.1
) -> Array:
    """How strongly every input feature of a dense layer depends on the input (Sun et al. 2021).

    Args:
      model: a model with a layer view.
      params: its parameters.
      inputs: `[B, ...]`.
      layer: which dense layer, counted from 0, or from -1 backwards.
      epsilon: added to the features.

    Returns:
      `[in]`, the sum over the batch of `|d r_f / d x|_2 / (r_f + epsilon)`.

    Raises:
      ValueError: no layer view, no such layer, or one whose input is not one vector a sample.
    """
    layers = layers_of(model, params)
    before = layers[: _position(model, layers, layer)]

    def features(sample: Array) -> Array:
        return apply_layers(before, sample[None])[0]

    shape = jax.eval_shape(features, inputs[0]).shape
    if len(shape) != 1:
        raise ValueError(f"Dense layer {layer} must have a vector a sample as input, got {shape}.")

    def one(sample: Array) -> Array:
        values, pull = jax.vjp(features, sample)
        (jacobian,) = jax.vmap(pull)(jnp.eye(values.size, dtype=values.dtype))
        norms = jnp.linalg.norm(jacobian.reshape(values.size, -1), axis=1)
        return norms / (values + epsilon)

    # One sample after another: its Jacobian alone may be large.
    return jax.lax.map(one, inputs).sum(axis=0)


def read_mask(model: Model, gradient: PyTree, layer: int = -1) -> Array:
    """The mask, as an adversary reads it off a gradient that nothing was added to since.

    A feature that is zero on the whole batch has a zero row whether it was masked or not.

    Args:
      model: the client's model.
      gradient: the defended gradient.
      layer: the defended dense layer, counted from 0, or from -1 backwards.

    Returns:
      `[in]` booleans, false where the row is zero.

    Raises:
      ValueError: no layer view, or no such layer.
    """
    return (_weight(model, gradient, layer) != 0).any(axis=1)


def drop_layer_weights(model: Model, params: Params, layer: int = -1) -> PyTree:
    """Weights of an objective that leave one dense layer's weight out (Balunovic et al. 2022).

    Args:
      model: the client's model.
      params: its parameters, or a gradient.
      layer: the defended dense layer, counted from 0, or from -1 backwards.

    Returns:
      A tree like the parameters of scalars: 0 at that weight (its bias stays in), 1 elsewhere.

    Raises:
      ValueError: no layer view, or no such layer.
    """
    mask = _mask_rows(model, params, layer, _features(model, params, layer, False))
    return jax.tree.map(lambda kept: kept.all().astype(jnp.float32), mask)


def _position(model: Model, layers: tuple[Layer, ...], layer: int) -> int:
    """Where in the chain a dense layer stands."""
    dense = [index for index, part in enumerate(layers) if part.kind == "dense"]
    if not -len(dense) <= layer < len(dense):
        raise ValueError(
            f"layer must lie in [{-len(dense)}, {len(dense) - 1}], the dense layers of "
            f"{model.name}, got {layer}."
        )
    return dense[layer]


def _weight(model: Model, tree: PyTree, layer: int) -> Array:
    layers = layers_of(model, tree)
    weight = layers[_position(model, layers, layer)].weight
    assert weight is not None
    return weight


def _features(model: Model, tree: PyTree, layer: int, value: bool) -> Array:
    """`[in]`, one value for every input feature of a layer."""
    return jnp.full(_weight(model, tree, layer).shape[0], value)


def _mask_rows(model: Model, tree: PyTree, layer: int, kept: Array) -> PyTree:
    """Booleans like the tree: false in the rows of a layer's weight whose feature is not kept."""
    rows = jnp.broadcast_to(kept[:, None], _weight(model, tree, layer).shape)
    return view_mask(lambda tree: _weight(model, tree, layer), tree, rows)
