"""One sample from the gradient of a first dense layer with a bias: a quotient."""

import functools
import math
from collections.abc import Callable

import jax.numpy as jnp

from invjax.attacks import labels as label_recovery
from invjax.base import Array, Attack, Model, Observation, PyTree, Reconstruction, closed_form
from invjax.models.layers import check_layer_view, layers_of
from invjax.observe import check_observation, check_sgd

First = Callable[[PyTree], tuple[Array, Array]]


def bias_trick(model: Model | None = None, *, first: First | None = None) -> Attack:
    """Read a single input off the first dense layer (Phong et al. 2017).

    With `y = x W + b` the gradients are `dL/dW = x^T dL/dy` and `dL/db = dL/dy`, so the input is
    column `i` of the former over entry `i` of the latter, whatever comes behind: dropout, or the
    noise of a variational bottleneck (Balunovic et al. 2022 on PRECODE). The unit with the largest
    bias gradient is taken. Several local steps of SGD on the one sample change nothing; an optimizer
    that rescales each entry (Adam) leaves no quotient to read, and is refused.

    Args:
      model: the client's model. It is used to check the observation, to find the layer where
        `first` is not given, and for labels that were not granted.
      first: `tree -> (weight [in, out], bias [out])`, that layer's part of a gradient;
        `first_dense(model, tree)` by default.

    Returns:
      The attack; a closed form. Inputs are `[1, *input_shape]`, in the data's units. Labels are those
      granted, else recovered if there is a model, else -1. `found` is false where no unit has a
      finite gradient other than zero; the input is then zero. It certifies nothing more: that is
      for the objective, the share of the weight gradient's norm that the input leaves unexplained,
      zero up to rounding for one sample without a defence. `diagnostics` holds `unit`.

    Raises:
      ValueError: neither a model nor `first`, a model without a layer view and no `first`; and at
        its use, an observation without a gradient, an update of another optimizer than SGD, not
        exactly one sample (a larger batch gives a mixture), no dense layer with a bias at the input,
        shapes that do not fit.

    Example:
      >>> import jax, invjax
      >>> key = jax.random.key(0)
      >>> batch = invjax.datasets.draw(key, invjax.datasets.digits(), 1)
      >>> model = invjax.models.mlp((16,))
      >>> params = model.init(key, (8, 8, 1))
      >>> observation = invjax.observe(key, model, params, batch)
      >>> found = invjax.attacks.bias_trick(model)(key, observation)
      >>> bool(abs(found.inputs - batch.inputs).max() < 1e-5)
      True
    """
    if first is not None:
        find = first
    elif model is None:
        raise ValueError("Give bias_trick a model or first=, to find the first layer with.")
    else:
        check_layer_view(model)
        find = functools.partial(first_dense, model)

    def check(observation: Observation) -> None:
        if model is not None:
            check_observation(model, observation)
        if observation.gradient is None:
            raise ValueError(
                "The observation holds released weights; this attack needs a gradient."
            )
        check_sgd(observation)
        facts = observation.facts
        if facts.batch_size != 1:
            raise ValueError(
                "bias_trick reads one sample: a larger batch gives a mixture. The observation's "
                f"batch_size must be 1, got {facts.batch_size}."
            )
        weight, bias = find(observation.gradient)
        if weight.shape != (math.prod(facts.input_shape), *bias.shape):
            raise ValueError(
                f"The first layer of inputs {facts.input_shape} must have a weight [in, out] and a "
                f"bias [out], got {weight.shape} and {bias.shape}."
            )

    def init(key: Array, observation: Observation) -> Reconstruction:
        del key
        weight, bias = find(observation.gradient)
        unit = jnp.argmax(jnp.abs(bias))
        divisor = bias[unit]
        inputs = weight[:, unit] / jnp.where(divisor == 0, 1.0, divisor)
        found = (divisor != 0) & jnp.isfinite(inputs).all()
        inputs = jnp.where(found, inputs, 0.0)
        rest = jnp.linalg.norm(weight - inputs[:, None] * bias[None])
        return Reconstruction(
            inputs=inputs.reshape((1, *observation.facts.input_shape)),
            labels=labels(observation),
            found=found[None],
            objective=rest / jnp.maximum(jnp.linalg.norm(weight), 1e-30),
            diagnostics={"unit": unit},
        )

    def labels(observation: Observation) -> Array:
        if observation.labels is not None:
            return observation.labels
        if model is None:
            return jnp.full(1, -1)
        return label_recovery.recover(model, observation, 1)

    return closed_form(init, check)


def first_dense(model: Model, tree: PyTree) -> tuple[Array, Array]:
    """The first dense layer's part of a tree, if nothing but a flattening comes before it.

    Args:
      model: a model with a layer view.
      tree: parameters or a gradient.

    Returns:
      Weight `[in, out]` and bias `[out]`.

    Raises:
      ValueError: no layer view, another layer comes first, the layer has no bias, or there is none.
    """
    for layer in layers_of(model, tree):
        if layer.kind == "flatten" and layer.activation == "identity":
            continue
        if layer.kind != "dense" or layer.weight is None or layer.bias is None:
            bare = " without a bias" if layer.kind == "dense" else ""
            raise ValueError(
                f"The first layer of {model.name} must be dense with a bias, got {layer.kind}{bare}."
            )
        return layer.weight, layer.bias
    raise ValueError(f"The model {model.name} has no dense layer.")
