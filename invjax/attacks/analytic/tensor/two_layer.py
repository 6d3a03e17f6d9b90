"""The two-layer network of the provable attack, and the query point of its server."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from invjax.attacks.analytic.tensor.hermite import ACTIVATIONS
from invjax.base import Array, Batch, Layer, Model, Params, PyTree
from invjax.checks import check_choice, check_count


def two_layer(width: int, activation: str = "tanh", *, bias: bool = True) -> Model:
    """`f(x) = sum_j a_j s(w_j x) + b` with the loss `(f - y)^2 / 2`, the mean over the samples.

    Labels are the real numbers `y`, `[B]`; integers 0 and 1 stand for -1 and 1. The hidden layer has no
    bias. (Wang, Lee and Lei 2023; they write `(y - f)^2`, which doubles the gradient.)

    Args:
      width: hidden units `m`.
      activation: a name of `hermite.ACTIVATIONS`: those of chain models, `square` or `square_cube`.
      bias: whether there is an output bias `b`.

    Returns:
      The model, with a layer view. It starts as `query` plants it, with an output bias of zero.

    Raises:
      ValueError: no units, or an unknown activation.
    """
    check_count("width", width, 1)
    check_choice("activation", activation, tuple(ACTIVATIONS))

    def init(key: Array, input_shape: Sequence[int]) -> Params:
        shape = (math.prod(input_shape), width)
        params = {
            "hidden": {"kernel": jnp.zeros(shape)},
            "output": {"kernel": jnp.zeros((width, 1))},
        }
        if bias:
            params["output"]["bias"] = jnp.zeros(1)
        return query(key, params, bias=0.0)

    def apply(params: Params, inputs: Array) -> Array:
        flat = inputs.reshape(inputs.shape[0], -1)
        hidden = ACTIVATIONS[activation](flat @ params["hidden"]["kernel"])
        output = hidden @ params["output"]["kernel"]
        return output + params["output"]["bias"][None] if bias else output

    def loss(params: Params, batch: Batch) -> Array:
        return 0.5 * jnp.mean((apply(params, batch.inputs)[:, 0] - targets(batch.labels)) ** 2)

    def layers(tree: PyTree) -> tuple[Layer, ...]:
        output = tree["output"]
        return (
            Layer("flatten"),
            Layer("dense", tree["hidden"]["kernel"], activation=activation),
            Layer("dense", output["kernel"], output.get("bias")),
        )

    return Model(init, apply, loss, 1, f"two_layer({width}, {activation})", layers)


def targets(labels: Array) -> Array:
    """Real labels: what is given, or -1 and 1 for integers 0 and 1."""
    if jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        return 2.0 * labels - 1
    return labels


def query(
    key: Array, params: Params, auxiliary: Batch | None = None, *, bias: float = 3.0
) -> Params:
    """The server's query point: `a_j = 1/m`, standard normal `w_j`, and an output bias.

    A bias of 2 to 5 makes all residuals positive for labels of -1 and 1, so that signs are known and
    no sample is invisible: the bias trick (Wang, Lee and Lei 2023, remark 1 and appendix C). The authors
    take 30 in the text and 5 in their code; a large one adds noise to what the outer gradient tells.

    Args:
      key: PRNG key of the weights.
      params: of `two_layer`, for their shapes.
      auxiliary: not used; `plant` functions take one.
      bias: the output bias, where the model has one.

    Returns:
      The planted parameters.
    """
    del auxiliary
    hidden, output = params["hidden"]["kernel"], params["output"]
    planted = {"kernel": jnp.full_like(output["kernel"], 1 / hidden.shape[1])}
    if "bias" in output:
        planted["bias"] = jnp.full_like(output["bias"], bias)
    weights = jax.random.normal(key, hidden.shape, hidden.dtype)
    return {"hidden": {"kernel": weights}, "output": planted}


def planted_query(bias: float = 3.0):
    """`query` at a bias, as a `plant(key, params, auxiliary=None) -> params`.

    Args:
      bias: the output bias.

    Returns:
      The function.
    """
    return functools.partial(query, bias=bias)
