"""From flax modules to pure functions: what the zoo and the adapters share."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from invjax.base import Array, Model, Params, PyTree
from invjax.models.losses import cross_entropy

Build = Callable[[tuple[int, ...], nnx.Rngs], nnx.Module]
Statistics = list[tuple[Array, Array]]


class _Recorder(nnx.Module):
    """A batch norm that notes the statistics of its input on the way."""

    def __init__(self, norm: nnx.BatchNorm, notes: dict[Any, tuple[Array, Array]], path: Any):
        self.norm = norm
        # A list hides the dict from the module graph.
        self.note = functools.partial(notes.__setitem__, path)

    def __call__(self, x, *args, **kwargs):
        axes = tuple(range(x.ndim - 1))
        self.note((x.mean(axis=axes), x.var(axis=axes)))
        return self.norm(x, *args, **kwargs)


def submodules(module: nnx.Module, kind: type) -> list[tuple[tuple, Any]]:
    """`(path, submodule)` of every submodule of a kind, by path."""
    return [(path, sub) for path, sub in nnx.iter_modules(module) if isinstance(sub, kind)]


def _replace(module: nnx.Module, path: tuple, new: nnx.Module) -> None:
    parent: Any = module
    for part in path[:-1]:
        parent = parent[part] if isinstance(part, int) else getattr(parent, part)
    if isinstance(path[-1], int):
        parent[path[-1]] = new
    else:
        setattr(parent, path[-1], new)


def set_convolution(module: nnx.Module, conv: Callable[..., Array]) -> nnx.Module:
    """A copy of a module whose convolutions go through `conv`."""
    module = nnx.clone(module)
    for _, sub in submodules(module, nnx.Conv):
        sub.conv_general_dilated = conv
    return module


def pure_functions(module: nnx.Module) -> tuple[Params, Callable, Callable, Statistics]:
    """Split a module in evaluation mode into parameters and pure functions of them.

    Args:
      module: a module; its concrete state besides parameters rides along.

    Returns:
      `(params, apply(params, inputs), statistics(params, inputs), running statistics)`.
    """
    graph, template, rest = nnx.split(module, nnx.Param, ...)
    norms = submodules(module, nnx.BatchNorm)

    def merged(params: Params) -> nnx.Module:
        state = jax.tree.map(lambda leaf: leaf, template)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state, rest)

    def apply(params: Params, inputs: Array) -> Array:
        return merged(params)(inputs)

    def statistics(params: Params, inputs: Array) -> Statistics:
        model, notes = merged(params), {}
        for path, norm in submodules(model, nnx.BatchNorm):
            _replace(model, path, _Recorder(norm, notes, path))
        model(inputs)
        return [notes[path] for path, _ in norms]

    running = [(norm.mean[...], norm.var[...]) for _, norm in norms]
    return nnx.to_pure_dict(template), apply, statistics, running


def zoo_model(
    build: Callable[..., nnx.Module],
    num_classes: int,
    name: str,
    *,
    layers: Callable[[PyTree], tuple] | None = None,
    batch_norm: bool = False,
    conv: Callable[..., Array] = jax.lax.conv_general_dilated,
) -> Model:
    """A model whose module is built for the shape of its inputs.

    Args:
      build: `build(input_shape, rngs, conv) -> module`.
      num_classes: number of classes.
      name: for tables.
      layers: the layer view, where the model is a chain.
      batch_norm: whether it has batch norm (at its initial statistics: mean 0, variance 1).
      conv: the convolution.

    Returns:
      The model. Its parameters are nested dicts.
    """

    @functools.cache
    def functions(input_shape: tuple[int, ...]):
        # Statistics must be concrete: a cache filled inside a trace may hold no tracers.
        with jax.ensure_compile_time_eval():
            module = nnx.eval_shape(lambda: build(input_shape, nnx.Rngs(0), conv))
            module.eval()
            for _, norm in submodules(module, nnx.BatchNorm):
                norm.mean = nnx.BatchStat(jnp.zeros(norm.mean.shape))
                norm.var = nnx.BatchStat(jnp.ones(norm.var.shape))
            return pure_functions(module)

    def init(key: Array, input_shape: Sequence[int]) -> Params:
        module = build(tuple(input_shape), nnx.Rngs(key), conv)
        return nnx.to_pure_dict(nnx.state(module, nnx.Param))

    def apply(params: Params, inputs: Array) -> Array:
        return functions(tuple(inputs.shape[1:]))[1](params, inputs)

    def statistics(params: Params, inputs: Array) -> Statistics:
        return functions(tuple(inputs.shape[1:]))[2](params, inputs)

    def with_convolution(conv: Callable[..., Array]) -> Model:
        return zoo_model(build, num_classes, name, layers=layers, batch_norm=batch_norm, conv=conv)

    return Model(
        init,
        apply,
        cross_entropy(apply),
        num_classes,
        name,
        layers=layers,
        statistics=statistics if batch_norm else None,
        running_statistics=None,
        with_convolution=with_convolution,
    )


def batch_dependence(apply: Callable[[Array], Array], input_shape: Sequence[int]) -> float:
    """How much a sample's logits depend on the other samples of its batch; 0 where they do not.

    Args:
      apply: `apply(inputs) -> logits`.
      input_shape: shape of one input.

    Returns:
      Largest difference between batched and single logits over the largest logit.
    """
    probe = jax.random.normal(jax.random.key(0), (4, *input_shape))
    together = apply(probe)
    alone = jnp.concatenate([apply(probe[i : i + 1]) for i in range(4)])
    return float(jnp.abs(together - alone).max() / (jnp.abs(together).max() + 1e-12))
