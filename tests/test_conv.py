"""The fast convolution equals the plain one, in value and in both derivatives."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import invjax
from invjax import conv

NHWC = ("NHWC", "HWIO", "NHWC")


def problem(kernel):
    keys = jax.random.split(jax.random.key(0), 2)
    return jax.random.normal(keys[0], (2, 9, 8, 3)), jax.random.normal(keys[1], (*kernel, 3, 4))


@pytest.mark.parametrize("kernel", [(3, 3), (5, 2), (1, 1)])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("padding", ["SAME", "VALID", ((1, 2), (0, 1))])
def test_equals_lax(kernel, strides, padding):
    x, w = problem(kernel)
    expected = lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=NHWC)
    found = conv.im2col_conv(x, w, strides, padding, dimension_numbers=NHWC)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"rhs_dilation": (2, 2)},
        {"lhs_dilation": (2, 1)},
        {"dimension_numbers": ("NHWC", "OHWI", "NHWC"), "transpose": True},
    ],
)
def test_hands_over_what_it_does_not_cover(options):
    x, w = problem((3, 3))
    options = {"dimension_numbers": NHWC, **options}
    if options.pop("transpose", False):
        w = w.transpose(3, 0, 1, 2)
    padding = ((1, 1), (1, 2))
    expected = lax.conv_general_dilated(x, w, (1, 1), padding, **options)
    found = conv.im2col_conv(x, w, (1, 1), padding, **options)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_gradient_of_gradient_matching_equals_lax_reverse_over_reverse():
    model = invjax.models.lenet(width=3)
    params = model.init(jax.random.key(0), (8, 8, 1))
    fast = conv.for_matching(model, "cpu")
    image = jax.random.uniform(jax.random.key(1), (2, 8, 8, 1))
    labels = jnp.array([1, 7])
    target = jax.grad(model.loss)(params, invjax.Batch(image * 0.5, labels))

    def distance(gradient):
        return sum(
            jnp.sum((a - b) ** 2)
            for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(target), strict=True)
        )

    def plain(x):
        return distance(jax.grad(model.loss)(params, invjax.Batch(x, labels)))

    def ours(x):
        return distance(invjax.gradients.gradient(fast, params, invjax.Batch(x, labels)))

    expected_value, expected = jax.jit(jax.value_and_grad(plain))(image)
    value, found = jax.jit(jax.value_and_grad(ours))(image)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_chosen_by_backend():
    model = invjax.models.lenet(width=2)
    params = model.init(jax.random.key(0), (8, 8, 1))
    x = jnp.ones((1, 8, 8, 1))
    for backend, keeps in (("cpu", False), ("gpu", True), ("tpu", True)):
        chosen = conv.for_matching(model, backend)
        assert conv.keeps_lax_conv(chosen.apply, params, x) == keeps
    fixed = model._replace(with_convolution=None)
    assert conv.for_matching(fixed, "cpu") is fixed


def step_like(x):
    """A matrix product over 120 kB, so that six of these make one group of 750 kB."""
    patches = jnp.broadcast_to(x[:, None], (x.size, 25_000 // x.size)).T
    return {"y": jnp.tanh(patches @ x[:, None]).sum(), "x": 2 * x}


@pytest.mark.parametrize("size", [1, 7, 12, 40])
def test_groups_are_vmap(size, monkeypatch):
    monkeypatch.setattr(conv, "GROUP_BYTES", 750_000)
    x = jax.random.normal(jax.random.key(0), (size, 5))
    expected = jax.vmap(step_like)(x)
    for function in (conv.grouped_vmap(step_like), jax.jit(conv.grouped_vmap(step_like))):
        chex.assert_trees_all_close(function(x), expected, rtol=1e-5)
    over_victims = jax.vmap(conv.grouped_vmap(step_like))(jnp.stack([x, -x]))
    chex.assert_trees_all_close(jax.tree.map(lambda y: y[0], over_victims), expected, rtol=1e-5)


def test_groups_are_of_the_cpu_and_of_its_cache(monkeypatch):
    monkeypatch.setattr(conv, "GROUP_BYTES", 750_000)

    def loops(function, size, backend="cpu"):
        x = jax.ShapeDtypeStruct((size, 5), jnp.float32)
        return "scan" in str(jax.make_jaxpr(conv.grouped_vmap(function, backend))(x))

    assert [loops(step_like, size) for size in (1, 6, 12, 40)] == [False, False, True, True]
    assert not loops(step_like, 40, "gpu") and not loops(step_like, 40, "tpu")

    def keeps_conv(x):
        kernel = jnp.ones((1, 1, 1, 1))
        image = lax.conv_general_dilated(
            x[None, :, None, None], kernel, (1, 1), "SAME", dimension_numbers=NHWC
        )
        return step_like(image.ravel())

    # A loop is what a convolution's derivatives must not stand in.
    assert not loops(keeps_conv, 40)
