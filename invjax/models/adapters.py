"""Models from a user's own code: flax.nnx modules, flax.linen modules, plain functions."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from flax.errors import FlaxError

from invjax.base import Array, Model, Params
from invjax.models.losses import cross_entropy
from invjax.models.modules import (
    batch_dependence,
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
    if batch_dependence(apply, input_shape) > 1e-3:
        raise ValueError(f"The module {name} {_BATCH_STATISTICS}.")


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
    which ride along with all state that is not a parameter.

    Args:
      module: a module of images or vectors to logits.
      input_shape: shape of one input.

    Returns:
      The model, and the module's parameters as nested dicts.

    Raises:
      ValueError: a sample's logits depend on the rest of its batch (train-mode batch norm).
    """
    return _from_nnx(nnx.clone(module), tuple(input_shape))


def _from_nnx(module: nnx.Module, input_shape: tuple[int, ...]) -> tuple[Model, Params]:
    module.eval()
    name = type(module).__name__
    if any(not norm.use_running_average for _, norm in submodules(module, nnx.BatchNorm)):
        raise ValueError(f"The module {name} {_BATCH_STATISTICS}.")
    params, apply, statistics, running = pure_functions(module)
    _refuse_batch_statistics(lambda x: apply(params, x), input_shape, name)
    logits = jax.eval_shape(apply, params, jnp.zeros((1, *input_shape)))

    def with_convolution(conv: Callable[..., Array]) -> Model:
        return _from_nnx(set_convolution(module, conv), input_shape)[0]

    model = Model(
        init=lambda key, shape: params,
        apply=apply,
        loss=cross_entropy(apply),
        num_classes=logits.shape[-1],
        name=name,
        statistics=statistics if running else None,
        running_statistics=running or None,
        with_convolution=with_convolution,
    )
    return model, params


def from_linen(
    module: linen.Module,
    input_shape: Sequence[int],
    variables: dict[str, Any] | None = None,
    key: Array | None = None,
) -> tuple[Model, Params]:
    """A model from any `flax.linen` module, in evaluation mode.

    Of the arguments `train`, `training`, `deterministic` and `use_running_average`, those that the
    module's call takes are set for evaluation.

    Args:
      module: a module of images or vectors to logits.
      input_shape: shape of one input.
      variables: its variables, `{"params": ..., "batch_stats": ...}`; initialised where `None`.
      key: for the initialisation; `jax.random.key(0)` where `None`.

    Returns:
      The model, and the parameters. Other collections ride along in the model.

    Raises:
      ValueError: train-mode batch norm, or variables without parameters.
    """
    input_shape = tuple(input_shape)
    taken = inspect.signature(type(module).__call__).parameters
    evaluation = {"train": False, "training": False}
    evaluation |= {"deterministic": True, "use_running_average": True}
    mode = {name: value for name, value in evaluation.items() if name in taken}

    def init(key: Array, shape: Sequence[int]) -> dict[str, Any]:
        return module.init(key, jnp.zeros((1, *shape)), **mode)

    if variables is None:
        variables = init(jax.random.key(0) if key is None else key, input_shape)
    if "params" not in variables:
        raise ValueError(f"variables must hold 'params', found {sorted(variables)}.")
    rest = {name: value for name, value in variables.items() if name != "params"}
    model = _linen_model(module, input_shape, rest, mode, lambda k, s: init(k, s)["params"], None)
    params = variables["params"]
    try:
        _refuse_batch_statistics(
            lambda x: model.apply(params, x), input_shape, type(module).__name__
        )
    except FlaxError as error:
        raise ValueError(f"The module {type(module).__name__} {_BATCH_STATISTICS}.") from error
    logits = jax.eval_shape(model.apply, params, jnp.zeros((1, *input_shape)))
    return model._replace(num_classes=logits.shape[-1]), params


def _linen_model(module, input_shape, rest, mode, init, conv) -> Model:
    def intercept(notes: dict[tuple, tuple[Array, Array]]):
        def interceptor(next_function, args, kwargs, context):
            if context.method_name == "__call__":
                if isinstance(context.module, linen.Conv) and conv is not None:
                    # Modules are frozen dataclasses; this one is a copy bound to this call.
                    object.__setattr__(context.module, "conv_general_dilated", conv)
                if isinstance(context.module, linen.BatchNorm):
                    axes = tuple(range(args[0].ndim - 1))
                    note = args[0].mean(axis=axes), args[0].var(axis=axes)
                    notes[context.module.path] = note
            return next_function(*args, **kwargs)

        return interceptor

    def noted_apply(params, inputs):
        notes: dict[tuple, tuple[Array, Array]] = {}
        with linen.intercept_methods(intercept(notes)):
            logits = module.apply({"params": params, **rest}, inputs, **mode)
        return logits, notes

    def apply(params: Params, inputs: Array) -> Array:
        return noted_apply(params, inputs)[0]

    def statistics(params: Params, inputs: Array) -> list[tuple[Array, Array]]:
        notes = noted_apply(params, inputs)[1]
        return [notes[path] for path in sorted(notes)]

    running = sorted(_stored_statistics(rest.get("batch_stats", {})).items())
    return Model(
        init=init,
        apply=apply,
        loss=cross_entropy(apply),
        num_classes=0,
        name=type(module).__name__,
        statistics=statistics if running else None,
        running_statistics=[value for _, value in running] or None,
        with_convolution=lambda conv: _sized(
            _linen_model(module, input_shape, rest, mode, init, conv), input_shape
        ),
    )


def _sized(model: Model, input_shape: tuple[int, ...]) -> Model:
    def logits(key):
        return model.apply(model.init(key, input_shape), jnp.zeros((1, *input_shape)))

    return model._replace(num_classes=jax.eval_shape(logits, jax.random.key(0)).shape[-1])


def _stored_statistics(tree: Any, path: tuple = ()) -> dict[tuple, tuple[Array, Array]]:
    if "mean" in tree and "var" in tree:
        return {path: (tree["mean"], tree["var"])}
    found: dict[tuple, tuple[Array, Array]] = {}
    for name, part in tree.items():
        found |= _stored_statistics(part, (*path, name))
    return found


def normalized(model: Model, mean: Any, std: Any) -> Model:
    """The same model on raw inputs: it normalises them itself, channel by channel.

    Args:
      model: a model of normalised inputs.
      mean: `[C]` channel means.
      std: `[C]` channel standard deviations, positive.

    Returns:
      A model of raw inputs, with the same parameters and no layer view.

    Raises:
      ValueError: a standard deviation that is not positive.
    """
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    if not bool((std > 0).all()):
        raise ValueError(f"std must be positive, got {std}.")

    def scaled(inputs: Array) -> Array:
        shape = (1,) * (inputs.ndim - 1) + (-1,)
        return (inputs - mean.reshape(shape)) / std.reshape(shape)

    def apply(params: Params, inputs: Array) -> Array:
        return model.apply(params, scaled(inputs))

    measure, swap = model.statistics, model.with_convolution
    return model._replace(
        apply=apply,
        loss=cross_entropy(apply),
        layers=None,
        statistics=measure and (lambda params, inputs: measure(params, scaled(inputs))),
        with_convolution=swap and (lambda conv: normalized(swap(conv), mean, std)),
    )
