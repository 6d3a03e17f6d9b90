"""A chain model seen layer by layer: what the algebraic attacks and their theory stand on."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from invjax.base import Array, Layer, Model, Params, PyTree, check_model
from invjax.conv import im2col_conv
from invjax.models.chain import Spec, activations, head_start, reshape_or_pool

Layers = tuple[Layer, ...]


def check_layer_view(model: Model) -> None:
    """Refuse a model that is no chain of layers.

    Args:
      model: any model.

    Raises:
      ValueError: it has no layer view.
      TypeError: it is no model.
    """
    check_model(model)
    if model.layers is None:
        raise ValueError(
            f"The model {model.name} has no layer view: if it is a chain of layers, "
            "invjax.models.with_layers gives it one."
        )


def with_layers(
    model: Model, layers: Callable[[PyTree], Layers], params: Params, input_shape: Sequence[int]
) -> Model:
    """The same model with a layer view, which exact attacks and some defences and bounds need.

    Args:
      model: a model that is a chain of layers, from any of the adapters.
      layers: `layers(tree) -> tuple[Layer, ...]`, of parameters or a gradient, from the input to the
        logits; a flattening is a layer, `Layer("flatten")`.
      params: its parameters, near which the view is compared with the model.
      input_shape: shape of one input.

    Returns:
      The model with the view.

    Raises:
      ValueError: the layers cannot be applied, or compute other logits than the model.
      TypeError: what is no model.

    Example:
      >>> import jax, invjax
      >>> from flax import linen
      >>> from invjax import Layer
      >>> net = linen.Sequential([linen.Dense(16), linen.relu, linen.Dense(10)])
      >>> model, params = invjax.models.from_linen(net, (64,))
      >>> def layers(tree):
      ...     first, last = tree["layers_0"], tree["layers_2"]
      ...     return (
      ...         Layer("dense", first["kernel"], first["bias"], "relu"),
      ...         Layer("dense", last["kernel"], last["bias"]),
      ...     )
      >>> model = invjax.models.with_layers(model, layers, params, (64,))
      >>> attack = invjax.attacks.exclusivity(model)
    """
    check_model(model)
    input_key, params_key = jax.random.split(jax.random.key(0))
    # Fresh biases are zero, and fresh heads too sometimes: their part would not be seen.
    moved = optax.tree.add_scale(params, 0.1, optax.tree.random_like(params_key, params))
    dtype = jnp.result_type(*jax.tree.leaves(params))
    inputs = jax.random.normal(input_key, (16, *input_shape), dtype)
    expected = np.asarray(model.apply(moved, inputs), float)
    try:
        found = np.asarray(apply_layers(layers(moved), inputs), float)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"layers cannot be applied to inputs of {input_shape}: {type(error).__name__}: {error}"
        ) from error
    rounding = 100 * float(jnp.finfo(dtype).eps) * np.abs(expected).max()
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=0, atol=rounding):
        raise ValueError(f"layers must compute the logits of {model.name}, and do not.")
    swap = model.with_convolution
    return model._replace(
        layers=layers,
        with_convolution=swap and (lambda conv: swap(conv)._replace(layers=layers)),
    )


def layers_of(model: Model, tree: PyTree) -> Layers:
    """The layer view of a tree.

    Args:
      model: a model that is a chain of layers.
      tree: parameters or a gradient.

    Returns:
      The layers, from the input to the logits.

    Raises:
      ValueError: the model has no layer view.
    """
    check_layer_view(model)
    assert model.layers is not None
    return model.layers(tree)


def split_at_head(model: Model, tree: PyTree) -> tuple[Layers, Layers]:
    """What comes before the dense head, and the head: the ReLU network at the end of a chain.

    Args:
      model: a model whose chain ends in dense layers with ReLU between them, and softmax logits.
      tree: parameters or a gradient.

    Returns:
      The front, which ends with a flattening (alone, or nothing, for a fully connected model), and
      the dense layers.

    Raises:
      ValueError: no layer view, no dense layer at the end, a hidden activation other than ReLU, an
        activation on the logits, or a single logit.
    """
    layers = layers_of(model, tree)
    start = head_start(layers)
    front, head = layers[:start], layers[start:]
    if not head:
        raise ValueError(f"The model {model.name} does not end in a dense layer.")
    found = [layer.activation for layer in head]
    allowed = ["relu"] * (len(head) - 1) + ["identity"]
    if found != allowed:
        raise ValueError(
            f"The dense head of {model.name} must have the activations {allowed}, got {found}."
        )
    if model.num_classes < 2:
        raise ValueError(f"The model {model.name} must have softmax logits, got a single logit.")
    return front, head


def dense_layers(model: Model, tree: PyTree) -> Layers:
    """The layers of a fully connected ReLU network with softmax logits.

    Args:
      model: the model; only a flattening may come before the first dense layer.
      tree: parameters or a gradient.

    Returns:
      The dense layers, from the input to the logits.

    Raises:
      ValueError: any other model, with the reason.
    """
    front, head = split_at_head(model, tree)
    for layer in front:
        if layer.kind != "flatten" or layer.activation != "identity":
            raise ValueError(
                f"The model {model.name} must be fully connected, got a layer {layer.kind}."
            )
    return head


def apply_layer(layer: Layer, values: Array) -> Array:
    """One layer of a chain on a batch.

    Args:
      layer: the layer, of parameters.
      values: `[B, ...]`, its input.

    Returns:
      `[B, ...]`, after the activation.
    """
    if layer.weight is None:
        window = 1 if layer.window is None else layer.window[0]
        values = reshape_or_pool(Spec(layer.kind, window=window), values)
    elif layer.kind == "dense":
        values = values @ layer.weight
    else:
        values = im2col_conv(
            values,
            layer.weight,
            layer.strides,
            layer.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
    if layer.bias is not None:
        values = values + layer.bias.reshape((1,) * (values.ndim - 1) + (-1,))
    return activations[layer.activation](values)


def apply_layers(layers: Layers, values: Array) -> Array:
    """Several layers of a chain on a batch, one after another.

    Args:
      layers: the layers, of parameters.
      values: `[B, ...]`, the input of the first.

    Returns:
      `[B, ...]`, the output of the last.
    """
    for layer in layers:
        values = apply_layer(layer, values)
    return values


def preactivations(layers: Layers, inputs: Array) -> list[Array]:
    """What every dense layer computes, before its activation.

    Args:
      layers: of `dense_layers`, or a head.
      inputs: `[B, d_0]`.

    Returns:
      `[B, d_l]` for every layer; the last are the logits.
    """
    values, found = inputs, []
    for layer in layers:
        assert layer.weight is not None
        values = values @ layer.weight
        if layer.bias is not None:
            values = values + layer.bias[None]
        found.append(values)
        values = activations[layer.activation](values)
    return found


def loss_vectors(logits: Array, labels: Array) -> Array:
    """Derivative of a sample's cross-entropy by its logits, `softmax(logits) - onehot(label)`.

    Args:
      logits: `[B, K]`.
      labels: `[B]` classes.

    Returns:
      `[B, K]`; each sums to zero and has one negative entry, at the label.
    """
    return jax.nn.softmax(logits) - jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)


def backpropagate(layers: Layers, values: list[Array], signal: Array) -> list[Array]:
    """Derivative of every sample's loss by what every dense layer computes.

    The gradient of the mean loss is then `a^T delta / B` for a weight with input `a`, and the
    mean of `delta` for a bias.

    Args:
      layers: of `dense_layers`, or a head.
      values: their `preactivations`, `[B, d_l]` each.
      signal: `[B, K]`, the derivative by the logits (`loss_vectors`).

    Returns:
      `[B, d_l]` for every layer, from the input to the logits.
    """
    deltas = [signal]
    for layer, before in zip(layers[:0:-1], values[-2::-1], strict=True):
        assert layer.weight is not None
        deltas.append(jnp.where(before > 0, deltas[-1] @ layer.weight.T, 0.0))
    return deltas[::-1]
