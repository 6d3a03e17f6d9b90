"""PRECODE: a variational bottleneck inside the model, whose noise makes the gradient random."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from invjax.base import Array, Batch, Model, Params, PyTree
from invjax.checks import check_choice, check_count, check_number
from invjax.models.chain import activations, initializers
from invjax.models.losses import cross_entropy


class Precode(NamedTuple):
    """A stochastic model as a family of deterministic ones, one a noise key.

    Attributes:
      init: `init(key, input_shape) -> params`, a dict of `body`, `encoder`, `decoder` and `head`.
      at: `at(key) -> Model`, the model with its noise drawn from that key, which may be traced. In
        training every step takes a fresh key.
      mean: `mean() -> Model`, without noise, for evaluation.
    """

    init: Callable[[Array, Sequence[int]], Params]
    at: Callable[[Array], Model]
    mean: Callable[[], Model]


def precode(
    body: Model,
    num_classes: int,
    *,
    bottleneck: int = 256,
    kl_weight: float = 1e-3,
    activation: str = "relu",
) -> Precode:
    """A model with a variational bottleneck before its last layer (Scheliga et al. 2022, PRECODE).

    Of the body's features a dense encoder makes means and, by a softplus, standard deviations; a
    dense decoder maps the sample `mean + deviation * noise` back to as many features, and a dense
    head to the logits. The loss adds `kl_weight / ln 2` times the divergence of the sample's law
    from the standard normal one, the mean over the batch.

    The gradient is random and the same model does not give it twice; yet the layers before the
    bottleneck leak as ever: by `invjax.attacks.analytic.bias_trick` for one sample, and by gradient
    matching with `omit_stochastic_weights`.

    Noise belongs to the key and to the position in the batch, never to what a sample holds, so that
    the loss stays differentiable in the inputs. Gradients that are taken sample by sample, as
    batches of one, therefore all have the noise of the first position.

    Args:
      body: any model; its `num_classes` outputs are the features.
      num_classes: number of classes.
      bottleneck: dimensions of the sample.
      kl_weight: of the divergence, not negative.
      activation: of the features, a name of `invjax.models.activations`; `identity` where the body
        ends in one itself.

    Returns:
      The family of models; they have no layer view.

    Raises:
      ValueError: a number out of range, an unknown activation.
    """
    check_number("kl_weight", kl_weight, 0.0)
    check_count("num_classes", num_classes, 1)
    check_count("bottleneck", bottleneck, 1)
    check_choice("activation", activation, tuple(activations))
    features = body.num_classes
    shapes = {
        "encoder": (features, 2 * bottleneck),
        "decoder": (bottleneck, features),
        "head": (features, num_classes),
    }

    def init(key: Array, input_shape: Sequence[int]) -> Params:
        body_key, *keys = jax.random.split(key, 1 + len(shapes))
        layers = {
            name: _init_dense(key, shape)
            for key, (name, shape) in zip(keys, shapes.items(), strict=True)
        }
        return {"body": body.init(body_key, input_shape), **layers}

    def forward(params: Params, inputs: Array, key: Array | None, body: Model):
        """Logits, and the divergence in bits."""
        values = activations[activation](body.apply(params["body"], inputs))
        mean, spread = jnp.split(_dense(params["encoder"], values), 2, axis=1)
        std = jax.nn.softplus(spread)
        sample = mean if key is None else mean + std * _noise(key, mean)
        logits = _dense(params["head"], _dense(params["decoder"], sample))
        nats = 0.5 * (jnp.square(mean) + jnp.square(std) - 1) - jnp.log(std)
        return logits, nats.sum(axis=1).mean() / jnp.log(2.0)

    def model_at(key: Array | None, body: Model) -> Model:
        def loss(params: Params, batch: Batch) -> Array:
            logits, bits = forward(params, batch.inputs, key, body)
            return cross_entropy(lambda params, inputs: logits)(params, batch) + kl_weight * bits

        measure, swap = body.statistics, body.with_convolution
        return Model(
            init=init,
            apply=lambda params, inputs: forward(params, inputs, key, body)[0],
            loss=loss,
            num_classes=num_classes,
            name=f"precode({body.name})",
            statistics=measure and (lambda params, inputs: measure(params["body"], inputs)),
            running_statistics=body.running_statistics,
            with_convolution=swap and (lambda conv: model_at(key, swap(conv))),
        )

    return Precode(init, at=lambda key: model_at(key, body), mean=lambda: model_at(None, body))


def omit_stochastic_weights(params: Params) -> PyTree:
    """Weights of an objective that leave the bottleneck and all behind it out (Scheliga et al. 2022b).

    The gradients of those layers depend on noise that the adversary does not know.

    Args:
      params: parameters of a `Precode` model, or a gradient.

    Returns:
      A tree like the parameters of scalars: 1 in the body, 0 elsewhere.

    Raises:
      ValueError: parameters without a body.
    """
    if not isinstance(params, dict) or "body" not in params:
        raise ValueError("params must be those of a Precode model, a dict with 'body' in it.")
    return {
        name: jax.tree.map(lambda leaf, weight=float(name == "body"): weight, part)
        for name, part in params.items()
    }


def _init_dense(key: Array, shape: tuple[int, int]) -> dict[str, Array]:
    weight_key, bias_key = jax.random.split(key)
    draw = initializers("torch", shape[0])
    return {
        "kernel": draw["kernel_init"](weight_key, shape),
        "bias": draw["bias_init"](bias_key, shape[1:]),
    }


def _dense(params: Params, values: Array) -> Array:
    return values @ params["kernel"] + params["bias"][None]


def _noise(key: Array, like: Array) -> Array:
    """Standard normal, a key a position: the size of the batch changes no sample's noise."""
    keys = jax.vmap(lambda position: jax.random.fold_in(key, position))(jnp.arange(like.shape[0]))
    return jax.vmap(lambda key: jax.random.normal(key, like.shape[1:], like.dtype))(keys)
