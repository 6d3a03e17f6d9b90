"""Models from a user's own code: flax.nnx modules, flax.linen modules, plain functions."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import linen, nnx

from invjax.base import Array, Batch, Head, Model, Params
from invjax.models.losses import cross_entropy
from invjax.models.modules import (
    batch_dependence,
    input_statistics,
    pure_functions,
    set_convolution,
    submodules,
)

_BATCH_STATISTICS = (
    "normalises by the statistics of the batch: a sample's gradient then depends on the other "
    "samples and per-sample gradients are undefined. Put batch norm in evaluation mode "
    "(use_running_average=True), with statistics frozen at what training left"
)


def _refuse_batch_statistics(apply, input_shape, name: str) -> None:
    if batch_dependence(apply, input_shape) > 1e-2:
        raise ValueError(f"The module {name} {_BATCH_STATISTICS}.")


def _evaluation_mode(module: Any) -> dict[str, Any]:
    """Of the usual mode arguments, those that a module's call takes, set for evaluation."""
    taken = inspect.signature(type(module).__call__).parameters
    mode = {"train": False, "training": False, "is_training": False}
    mode |= {"deterministic": True, "use_running_average": True}
    return {name: value for name, value in mode.items() if name in taken}


def from_apply(
    apply: Callable[[Params, Array], Array],
    init: Callable[[Array, Sequence[int]], Params],
    num_classes: int,
    name: str = "custom",
) -> Model:
    """A model from plain functions.

    Args:
      apply: `apply(params, inputs [B, ...]) -> logits [B, C]`, pure.
      init: `init(key, input_shape) -> params`.
      num_classes: number of classes; 1 for a binary model with one logit.
      name: for tables.

    Returns:
      The model, with cross-entropy as its loss.
    """
    return Model(init, apply, cross_entropy(apply), num_classes, name)


def from_nnx(module: nnx.Module, input_shape: Sequence[int]) -> tuple[Model, Params]:
    """A model from any `flax.nnx` module, which is cloned and never changed.

    The clone is put in evaluation mode: dropout is off, batch norm uses its running statistics,
    which ride along with all state that is not a parameter. Of the arguments `train`, `training`,
    `is_training`, `deterministic` and `use_running_average`, those that the module's call takes
    are set for evaluation.

    Args:
      module: a module of images or vectors to logits.
      input_shape: shape of one input.

    Returns:
      The model, and the module's parameters as nested dicts. The model's `init` returns these
      same parameters whatever its key: a module that is already built cannot draw new ones.

    Raises:
      ValueError: a sample's logits depend on the rest of its batch (train-mode batch norm), or
        the module does not return logits `[B, C]`.
    """
    return _from_nnx(nnx.clone(module), tuple(input_shape))


def _from_nnx(module: nnx.Module, input_shape: tuple[int, ...]) -> tuple[Model, Params]:
    module.eval()
    name = type(module).__name__
    params, apply, statistics, running = pure_functions(module, _evaluation_mode(module))
    num_classes = _count_classes(apply, params, input_shape, name)
    _refuse_batch_statistics(lambda x: apply(params, x), input_shape, name)
    normalizes = bool(submodules(module, nnx.BatchNorm))

    def with_convolution(conv: Callable[..., Array]) -> Model:
        return _from_nnx(set_convolution(module, conv), input_shape)[0]

    model = Model(
        init=lambda key, shape: params,
        apply=apply,
        loss=cross_entropy(apply),
        num_classes=num_classes,
        name=name,
        statistics=statistics if normalizes else None,
        running_statistics=running(input_shape) if normalizes else None,
        with_convolution=with_convolution,
    )
    return model, params


def _count_classes(apply, params: Params, input_shape: tuple[int, ...], name: str) -> int:
    probe = jax.ShapeDtypeStruct((2, *input_shape), jnp.float32)
    shape = getattr(jax.eval_shape(apply, params, probe), "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != 2:
        raise ValueError(
            f"The module {name} must return logits [B, C]; for inputs {probe.shape} it returned "
            f"{'a tree' if shape is None else f'shape {shape}'}."
        )
    return shape[1]


def from_linen(
    module: linen.Module,
    input_shape: Sequence[int],
    variables: Any = None,
    key: Array | None = None,
) -> tuple[Model, Params]:
    """A model from any `flax.linen` module, in evaluation mode.

    Of the arguments `train`, `training`, `is_training`, `deterministic` and `use_running_average`,
    those that the module's call takes are set for evaluation.

    Args:
      module: a module of images or vectors to logits.
      input_shape: shape of one input.
      variables: its variables, `{"params": ..., "batch_stats": ...}`; initialised where `None`.
      key: for the initialisation; `jax.random.key(0)` where `None`.

    Returns:
      The model, and the parameters. Other collections ride along in the model.

    Raises:
      ValueError: train-mode batch norm, variables without parameters, or a module that does not
        return logits `[B, C]`.
    """
    input_shape, name = tuple(input_shape), type(module).__name__
    mode = _evaluation_mode(module)

    def init(key: Array, shape: Sequence[int]) -> dict[str, Any]:
        return flax.core.unfreeze(module.init(key, jnp.zeros((1, *shape)), **mode))

    if variables is None:
        variables = init(jax.random.key(0) if key is None else key, input_shape)
    rest = dict(flax.core.unfreeze(variables))
    if "params" not in rest:
        raise ValueError(f"variables must hold 'params', found {sorted(variables)}.")
    params = rest.pop("params")

    def model_on(conv: Callable[..., Array] | None) -> Model:
        apply, statistics, order = _linen_functions(module, rest, mode, conv)
        paths = order(params, input_shape)
        return Model(
            init=lambda key, shape: init(key, shape)["params"],
            apply=apply,
            loss=cross_entropy(apply),
            num_classes=_count_classes(apply, params, input_shape, name),
            name=name,
            statistics=statistics if paths else None,
            running_statistics=[_stored(rest["batch_stats"], path) for path in paths] or None,
            with_convolution=model_on,
        )

    model = model_on(None)
    _refuse_batch_statistics(lambda x: model.apply(params, x), input_shape, name)
    return model, params


def _stored(batch_stats: Any, path: tuple[str, ...]) -> tuple[Array, Array]:
    for part in path:
        batch_stats = batch_stats[part]
    return batch_stats["mean"], batch_stats["var"]


def _linen_functions(module: linen.Module, rest: dict, mode: dict, conv) -> tuple:
    """`apply`, `statistics`, and the paths of batch-norm layers in the order in which they run."""

    def noted_apply(params: Params, inputs: Array):
        notes: list[tuple[tuple[str, ...], tuple[Array, Array]]] = []

        def interceptor(next_function, args, kwargs, context):
            layer = context.module
            if context.method_name != "__call__":
                return next_function(*args, **kwargs)
            if isinstance(layer, linen.BatchNorm):
                given = inspect.signature(linen.BatchNorm.__call__).bind(layer, *args, **kwargs)
                average = given.arguments.get("use_running_average")
                average = layer.use_running_average if average is None else average
                if not average:
                    raise ValueError(f"The module {type(module).__name__} {_BATCH_STATISTICS}.")
                notes.append((layer.path, input_statistics(args[0], layer.axis)))
            if isinstance(layer, linen.Conv) and conv is not None:
                # A frozen dataclass, and perhaps the user's own instance: put back what was there.
                before = layer.conv_general_dilated
                object.__setattr__(layer, "conv_general_dilated", conv)
                try:
                    return next_function(*args, **kwargs)
                finally:
                    object.__setattr__(layer, "conv_general_dilated", before)
            return next_function(*args, **kwargs)

        with linen.intercept_methods(interceptor):
            logits: Any = module.apply({"params": params, **rest}, inputs, **mode)
        return logits, notes

    def apply(params: Params, inputs: Array) -> Array:
        return noted_apply(params, inputs)[0]

    def statistics(params: Params, inputs: Array) -> list[tuple[Array, Array]]:
        return [note for _, note in noted_apply(params, inputs)[1]]

    def order(params: Params, input_shape: tuple[int, ...]) -> list[tuple[str, ...]]:
        paths: list[tuple[str, ...]] = []

        def trace(params, inputs):
            paths.extend(path for path, _ in noted_apply(params, inputs)[1])

        jax.eval_shape(trace, params, jax.ShapeDtypeStruct((1, *input_shape), jnp.float32))
        return paths

    return apply, statistics, order


def normalized(model: Model, mean: Any, std: Any) -> Model:
    """The same model on raw inputs: it normalises them itself, channel by channel.

    Args:
      model: a model of normalised inputs.
      mean: channel means `[C]`, or one number.
      std: channel standard deviations `[C]`, or one number; positive.

    Returns:
      A model of raw inputs, with the same parameters, and the same dense head, but no layer view.

    Raises:
      ValueError: a mean that is not finite, a standard deviation that is not positive and finite, or
        more than one axis; and, when it meets them, inputs of another number of channels.
    """
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    if mean.ndim > 1 or not bool(jnp.isfinite(mean).all()):
        raise ValueError(f"mean must be finite, a number or one a channel, got {mean}.")
    if std.ndim > 1 or not bool(((std > 0) & jnp.isfinite(std)).all()):
        raise ValueError(f"std must be positive, a number or one a channel, got {std}.")

    def scaled(inputs: Array) -> Array:
        for name, values in (("mean", mean), ("std", std)):
            if values.size not in (1, inputs.shape[-1]):
                raise ValueError(
                    f"{name} has {values.size} channels, but inputs of shape {inputs.shape} have "
                    f"{inputs.shape[-1]}."
                )
        shape = (1,) * (inputs.ndim - 1) + (-1,)
        return (inputs - mean.reshape(shape)) / std.reshape(shape)

    def loss(params: Params, batch: Batch) -> Array:
        return model.loss(params, batch._replace(inputs=scaled(batch.inputs)))

    measure, swap, head = model.statistics, model.with_convolution, model.head
    return model._replace(
        apply=lambda params, inputs: model.apply(params, scaled(inputs)),
        loss=loss,
        layers=None,
        head=head
        and Head(lambda params, inputs: head.features(params, scaled(inputs)), head.layers),
        statistics=measure and (lambda params, inputs: measure(params, scaled(inputs))),
        with_convolution=swap and (lambda conv: normalized(swap(conv), mean, std)),
    )
