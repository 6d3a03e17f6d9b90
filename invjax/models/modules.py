"""From flax modules to pure functions: what the zoo and the adapters share."""

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from invjax.base import Array, Head, Model, Params, PyTree
from invjax.models.losses import cross_entropy

Statistics = list[tuple[Array, Array]]


def submodules(module: nnx.Module, kind: type) -> list[tuple[tuple, Any]]:
    """`(path, submodule)` of every submodule of a kind, by path."""
    return [(path, sub) for path, sub in nnx.iter_modules(module) if isinstance(sub, kind)]


def check_image_shape(input_shape: Sequence[int]) -> None:
    """Refuse an input shape that is not `(height, width, channels)`."""
    if len(input_shape) != 3:
        raise ValueError(
            "input_shape must be (height, width, channels) for this model, "
            f"got {tuple(input_shape)}."
        )


def set_convolution(module: nnx.Module, conv: Callable[..., Array]) -> nnx.Module:
    """A copy of a module whose convolutions go through `conv`."""
    module = nnx.clone(module)
    for _, sub in submodules(module, nnx.Conv):
        sub.conv_general_dilated = conv
    return module


def input_statistics(x: Array, axis: int | Sequence[int] = -1) -> tuple[Array, Array]:
    """Mean and (biased) variance over all axes but those of the features."""
    features = {i % x.ndim for i in ((axis,) if isinstance(axis, int) else axis)}
    axes = tuple(i for i in range(x.ndim) if i not in features)
    return x.mean(axis=axes), x.var(axis=axes)


class Pure(NamedTuple):
    """A module in evaluation mode as pure functions.

    Attributes:
      params: the parameters, nested dicts.
      apply: `apply(params, inputs) -> logits`.
      statistics: `statistics(params, inputs)`, of the input of every batch norm, in the order in
        which they run.
      running: `running(input_shape)`, what those layers have stored, in the same order.
    """

    params: Params
    apply: Callable[[Params, Array], Array]
    statistics: Callable[[Params, Array], Statistics]
    running: Callable[[Sequence[int]], Statistics]


def pure_functions(module: nnx.Module, mode: Mapping[str, Any] = MappingProxyType({})) -> Pure:
    """Split a module in evaluation mode into parameters and pure functions of them.

    Args:
      module: a module; its state besides parameters rides along.
      mode: keywords of its call.

    Returns:
      The functions.
    """
    graph, template, rest = nnx.split(module, nnx.Param, ...)

    def merged(params: Params) -> nnx.Module:
        state = jax.tree.map(lambda leaf: leaf, template)
        nnx.replace_by_pure_dict(state, params)
        # Copies, because a layer may write to its state, and this state is every call's.
        return nnx.merge(graph, state, rest, copy=True)

    def apply(params: Params, inputs: Array) -> Array:
        return merged(params)(inputs, **mode)

    def noted(params: Params, inputs: Array) -> list[tuple[int, tuple[Array, Array]]]:
        copy, notes = merged(params), []
        for index, (_, norm) in enumerate(submodules(copy, nnx.BatchNorm)):
            # This hook of batch norm is the one place where all calls pass, shared layers' too.
            def promote(arrays, *, dtype, index=index, norm=norm, then=norm.promote_dtype):
                notes.append((index, input_statistics(arrays[0], norm.axis)))
                return then(arrays, dtype=dtype)

            norm.promote_dtype = promote
        copy(inputs, **mode)
        return notes

    def statistics(params: Params, inputs: Array) -> Statistics:
        return [note for _, note in noted(params, inputs)]

    def running(input_shape: Sequence[int]) -> Statistics:
        order: list[int] = []

        def trace(params, inputs):
            order.extend(index for index, _ in noted(params, inputs))

        jax.eval_shape(trace, params, jax.ShapeDtypeStruct((1, *input_shape), jnp.float32))
        norms = [norm for _, norm in submodules(module, nnx.BatchNorm)]
        return [(norms[index].mean[...], norms[index].var[...]) for index in order]

    params = nnx.to_pure_dict(template)
    return Pure(params, apply, statistics, running)


def zoo_model(
    build: Callable[..., nnx.Module],
    num_classes: int,
    name: str,
    *,
    layers: Callable[[PyTree], tuple] | None = None,
    head: Callable[[PyTree], tuple] | None = None,
    batch_norm: bool = False,
    conv: Callable[..., Array] = jax.lax.conv_general_dilated,
) -> Model:
    """A model whose module is built for the shape of its inputs.

    Args:
      build: `build(input_shape, rngs, conv) -> module`.
      num_classes: number of classes.
      name: for tables.
      layers: the layer view, where the model is a chain.
      head: the layer view of the dense layers at its end, where the module's call takes
        `features=True`, to return what goes into them.
      batch_norm: whether it has batch norm (at its initial statistics: mean 0, variance 1).
      conv: the convolution.

    Returns:
      The model. Its parameters are nested dicts.
    """

    @functools.cache
    def functions(input_shape: tuple[int, ...], **mode: bool) -> Pure:
        # NumPy, because a cache that is filled inside a trace may hold no tracers.
        module = nnx.eval_shape(lambda: build(input_shape, nnx.Rngs(0), conv))
        module.eval()
        for _, norm in submodules(module, nnx.BatchNorm):
            norm.mean = nnx.BatchStat(np.zeros(norm.mean.shape, np.float32))
            norm.var = nnx.BatchStat(np.ones(norm.var.shape, np.float32))
        return pure_functions(module, mode)

    def init(key: Array, input_shape: Sequence[int]) -> Params:
        module = build(tuple(input_shape), nnx.Rngs(key), conv)
        return nnx.to_pure_dict(nnx.state(module, nnx.Param))

    def apply(params: Params, inputs: Array) -> Array:
        return functions(tuple(inputs.shape[1:])).apply(params, inputs)

    def statistics(params: Params, inputs: Array) -> Statistics:
        return functions(tuple(inputs.shape[1:])).statistics(params, inputs)

    def features(params: Params, inputs: Array) -> Array:
        return functions(tuple(inputs.shape[1:]), features=True).apply(params, inputs)

    def with_convolution(conv: Callable[..., Array]) -> Model:
        views = {"layers": layers, "head": head}
        return zoo_model(build, num_classes, name, **views, batch_norm=batch_norm, conv=conv)

    return Model(
        init,
        apply,
        cross_entropy(apply),
        num_classes,
        name,
        layers=layers,
        statistics=statistics if batch_norm else None,
        # Their number and sizes do not depend on the inputs, so any shape that fits will do.
        running_statistics=functions((32, 32, 3)).running((32, 32, 3)) if batch_norm else None,
        with_convolution=with_convolution,
        head=None if head is None else Head(features, head),
    )


def batch_dependence(apply: Callable[[Array], Array], input_shape: Sequence[int]) -> float:
    """How much a sample's logits depend on the other samples of its batch; 0 where they do not.

    Args:
      apply: `apply(inputs) -> logits`.
      input_shape: shape of one input.

    Returns:
      Largest difference between batched and single logits over the largest logit.
    """
    # Samples of different scale and offset, so that no batch statistic is that of its samples.
    scale = jnp.array([0.5, 1.0, 2.0, 4.0]).reshape((4,) + (1,) * len(input_shape))
    probe = scale * (1.0 + jax.random.normal(jax.random.key(0), (4, *input_shape)))
    with jax.default_matmul_precision("highest"):
        together = jax.jit(apply)(probe)
        alone = jax.jit(jax.vmap(lambda x: apply(x[None])[0]))(probe)
    return float(jnp.abs(together - alone).max() / (jnp.abs(together).max() + 1e-12))
