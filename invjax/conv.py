"""Fast convolutions for attacks on CPU, and the one place that chooses an implementation.

A gradient-matching step differentiates convolutions twice. On CPU XLA lowers the derivatives of
`lax.conv` badly inside loops and under `vmap`; two passes of strided slices and one matrix product
(im2col) do not have that problem. GPUs and TPUs want `lax.conv`, and all instances at once; a CPU
wants as many as its cache holds.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from jax import lax

from invjax.base import Array, Model, check_model


def im2col_conv(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    **options: Any,
) -> Array:
    """`lax.conv_general_dilated` for NHWC images, as strided slices and one matrix product.

    It has the signature of flax's `conv_general_dilated` hook. What it does not cover (other
    layouts, ranks, dilations, groups) it hands to `lax.conv_general_dilated` unchanged.

    Args:
      lhs: images `[N, H, W, C]`.
      rhs: kernel `[height, width, C, out]`.
      window_strides: two strides.
      padding: `"SAME"`, `"VALID"` or `((low, high), (low, high))`.
      lhs_dilation: as in `lax`.
      rhs_dilation: as in `lax`.
      dimension_numbers: as in `lax`.
      feature_group_count: as in `lax`.
      batch_group_count: as in `lax`.
      precision: as in `lax`.
      preferred_element_type: as in `lax`.
      **options: whatever else `lax` takes (a sharding, say).

    Returns:
      `[N, H', W', out]`.
    """
    plain = (
        lhs.ndim == 4
        and feature_group_count == batch_group_count == 1
        and _all_ones(lhs_dilation)
        and _all_ones(rhs_dilation)
        and all(option is None for option in options.values())
        and lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
        == lax.conv_dimension_numbers(lhs.shape, rhs.shape, ("NHWC", "HWIO", "NHWC"))
    )
    if not plain:
        return lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=dimension_numbers,
            feature_group_count=feature_group_count,
            batch_group_count=batch_group_count,
            precision=precision,
            preferred_element_type=preferred_element_type,
            **options,
        )
    height, width, channels, out = rhs.shape
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:3], (height, width), window_strides, padding)
    if height == width == 1 and not any(low or high for low, high in padding):
        patches = lhs[:, :: window_strides[0], :: window_strides[1]]
    else:
        padded = jnp.pad(lhs, ((0, 0), *padding, (0, 0)))
        rows = _windows(padded, 1, height, window_strides[0])
        patches = _windows(rows, 2, width, window_strides[1])
    # Row slices are concatenated first, so the channel index runs (column, row, channel).
    kernel = rhs.transpose(1, 0, 2, 3).reshape(height * width * channels, out)
    return jnp.matmul(
        patches, kernel, precision=precision, preferred_element_type=preferred_element_type
    )


def _all_ones(dilation: Sequence[int] | None) -> bool:
    return dilation is None or all(value == 1 for value in dilation)


def _windows(x: Array, axis: int, size: int, stride: int) -> Array:
    """Join the `size` shifted, strided views of one axis along the channels."""
    length = (x.shape[axis] - size) // stride + 1
    # Stacked, because XLA would fuse a concatenation into its readers and compute it for each.
    views = jnp.stack(
        [
            lax.slice_in_dim(x, start, start + (length - 1) * stride + 1, stride, axis)
            for start in range(size)
        ],
        axis=-2,
    )
    return views.reshape(*views.shape[:-2], -1)


def for_matching(model: Model, backend: str | None = None) -> Model:
    """The model as an attack should differentiate it: im2col on CPU, `lax.conv` elsewhere.

    Args:
      model: any model. One that cannot swap its convolutions is returned as it is.
      backend: `cpu`, `gpu` or `tpu`; the default backend where `None`.

    Returns:
      A model of the same function and the same parameters.

    Raises:
      TypeError: what is no model.
    """
    check_model(model)
    backend = jax.default_backend() if backend is None else backend
    if backend == "cpu" and model.with_convolution is not None:
        return model.with_convolution(im2col_conv)
    return model


def keeps_lax_conv(function: Callable[..., Any], *args: Any) -> bool:
    """Whether a traced function still holds `lax.conv_general_dilated`.

    Inside a compiled loop on CPU such a function runs many times slower than outside (jax issue
    12868), so the driver then calls one compiled step at a time.

    Args:
      function: any traceable function.
      *args: arguments to trace it with.

    Returns:
      True if the primitive occurs anywhere in its jaxpr.
    """
    return "conv_general_dilated" in str(jax.make_jaxpr(function)(*args))


GROUP_BYTES = 100_000_000
"""Operands and results of the matrix products that a CPU computes together, measured on 32 MB of cache."""


def grouped_vmap(function: Callable[..., Any], backend: str | None = None) -> Callable[..., Any]:
    """`jax.vmap` over the leading axis of all arguments; on CPU one group after another.

    Vectorised over all instances, a large network's intermediates leave the cache: 8 instances of a
    ConvNet step are a fifth slower than four times 2. A function that keeps `lax.conv` is not put
    into a loop.

    Args:
      function: any traceable function.
      backend: `cpu`, `gpu` or `tpu`; the present one where `None`.

    Returns:
      The vectorised function; equal to `vmap` up to rounding.
    """

    def vectorized(*args):
        if (jax.default_backend() if backend is None else backend) != "cpu":
            return jax.vmap(function)(*args)
        (size,) = {leaf.shape[0] for leaf in jax.tree.leaves(args)}
        one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), args)
        jaxpr = jax.make_jaxpr(function)(*one).jaxpr
        fitting = max(1, GROUP_BYTES // max(1, sum(_intermediates(jaxpr))))
        group = max(count for count in range(1, size + 1) if size % count == 0 and count <= fitting)
        if group == size or "conv_general_dilated" in str(jaxpr):
            return jax.vmap(function)(*args)
        return jax.lax.map(lambda instance: function(*instance), args, batch_size=group)

    return vectorized


def _intermediates(jaxpr) -> Iterator[int]:
    """Bytes that every matrix product of a jaxpr reads and writes, inner jaxprs included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            for variable in (*equation.invars, *equation.outvars):
                yield math.prod(variable.aval.shape) * variable.aval.dtype.itemsize
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from _intermediates(inner)
