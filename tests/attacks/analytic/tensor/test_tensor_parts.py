"""Hermite coefficients and tensors, symmetric decompositions, the error, spans and batch sizes."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from invjax.attacks.analytic.tensor import batch_size_by_gap, hermite_coefficients, rmse
from invjax.attacks.analytic.tensor.decompose import decompose
from invjax.attacks.analytic.tensor.hermite import (
    features,
    hermite_tensor,
    leading_order,
    tensor_of,
)

TABLE = {
    "square_cube": (1, 3, 2, 6, 0),
    "tanh": (0, 0.6057, 0, -0.3636, 0),
    "sigmoid": (0.5, 0.2066, 0, -0.0624, 0),
    "relu": (0.3989, 0.5, 0.3989, 0, -1 / math.sqrt(2 * math.pi)),
    "leaky_relu": (0.395, 0.505, 0.395, 0, -0.395),
    "gelu": (0.2821, 0.5, 0.4231, 0, -0.3526),
    "silu": (0.2066, 0.5, 0.3508, 0, -0.1852),
    "softplus": (0.8061, 0.5, 0.2066, 0, -0.0624),
}


@pytest.mark.parametrize("name", TABLE)
def test_coefficients_are_those_of_the_table(name):
    # The library's gelu is the tanh approximation.
    np.testing.assert_allclose(hermite_coefficients(name), TABLE[name], atol=1e-3)


def test_coefficients_are_expected_derivatives():
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    weights = weights / weights.sum()
    scale = 0.7
    found = hermite_coefficients("tanh", scale)
    t = np.tanh(scale * nodes)
    first, third = 1 - t**2, (1 - t**2) * (6 * t**2 - 2)
    np.testing.assert_allclose(found[1], scale * weights @ first, rtol=1e-6)
    np.testing.assert_allclose(found[3], scale**3 * weights @ third, rtol=1e-6)


def test_what_reveals_only_sums_is_refused():
    assert leading_order("tanh") == leading_order("square_cube") == 3
    assert leading_order("relu") == leading_order("softplus") == 4
    for name in ("identity", "square"):
        with pytest.raises(ValueError, match="only sums"):
            leading_order(name)
    with pytest.raises(ValueError, match="activation must be one of"):
        hermite_coefficients("sine")


def test_tensors_project_and_contract():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        w = jnp.asarray(rng.normal(size=7))
        basis = jnp.asarray(np.linalg.qr(rng.normal(size=(7, 3)))[0])
        letters = "abcd"
        for order in (1, 2, 3, 4):
            spec = letters[:order] + "," + ",".join(f"{a}{a.upper()}" for a in letters[:order])
            projected = jnp.einsum(
                f"{spec}->{letters[:order].upper()}", hermite_tensor(w, order), *[basis] * order
            )
            inside = hermite_tensor(basis.T @ w, order)
            np.testing.assert_allclose(projected, inside, atol=1e-10)
            # The features are the same numbers, each entry once.
            point = basis.T @ w
            listed = tensor_of(features(point[None], 4)[0], 3, order)
            np.testing.assert_allclose(listed, inside, atol=1e-10)
        alpha = jnp.asarray(rng.normal(size=7))
        closed = (w @ alpha) * (jnp.outer(w, w) - jnp.eye(7))
        closed -= jnp.outer(w, alpha) + jnp.outer(alpha, w)
        found = hermite_tensor(w, 3) @ alpha
        np.testing.assert_allclose(found, closed, atol=1e-10)
    with pytest.raises(ValueError, match="order must be"):
        hermite_tensor(jnp.ones(2), 5)


def test_features_are_orthonormal():
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    grid = np.array(list(itertools.product(nodes, repeat=2)))
    law = np.array([a * b for a, b in itertools.product(weights / weights.sum(), repeat=2)])
    with jax.enable_x64(True):
        table = np.asarray(features(jnp.asarray(grid), 4))
    np.testing.assert_allclose(table.T @ (law[:, None] * table), np.eye(15), atol=1e-10)


@pytest.mark.parametrize(("order", "rows"), [(3, 1), (4, 1), (3, 5)])
def test_decomposition_is_exact_and_stable(order, rows):
    with jax.enable_x64(True):
        rng = np.random.default_rng(order + rows)
        truth = np.eye(4) + 0.4 * rng.normal(size=(4, 4))
        truth /= np.linalg.norm(truth, axis=1, keepdims=True)
        weights = rng.uniform(0.5, 1.5, (4, rows)) * rng.choice([-1, 1], (4, rows))
        letters = "abcd"[:order]
        spec = ",".join(f"i{a}" for a in letters)
        exact = np.einsum(f"{spec},iz->{letters}z", *[truth] * order, weights)
        noise = sum(
            np.moveaxis(rng.normal(size=exact.shape), range(order), turn)
            for turn in itertools.permutations(range(order))
        )
        noisy = exact + 1e-3 * noise
        run = jax.jit(functools.partial(decompose, trials=20))
        for tensor, limit in ((exact, 1e-9), (noisy, 5e-2)):
            found = run(jax.random.key(0), jnp.asarray(tensor))
            cosines = np.asarray(found.directions) @ truth.T
            order_of = np.abs(cosines).argmax(axis=1)
            assert sorted(order_of) == [0, 1, 2, 3]
            assert (1 - np.abs(cosines).max(axis=1)).max() < limit
            signs = np.sign(cosines[range(4), order_of])[:, None] ** order
            np.testing.assert_allclose(found.weights, signs * weights[order_of], atol=10 * limit)
        assert found.residual > 1e-4


def test_error_is_up_to_order_and_sign():
    truth = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2, 3)), jnp.float32)
    turned = truth[::-1] * jnp.asarray([1, -1, 1, 1, -1.0]).reshape(5, 1, 1)
    assert rmse(truth[::-1], truth) == 0
    assert rmse(turned, truth) > 0.1
    assert rmse(turned, truth, sign_invariant=True) == 0
    np.testing.assert_allclose(rmse(truth + 0.1, truth), 0.1 * math.sqrt(6), rtol=1e-5)
    with pytest.raises(ValueError, match="one shape"):
        rmse(truth[:2], truth)


@pytest.mark.parametrize(("x64", "limit"), [(True, 1e-12), (False, 1e-5)])
def test_singular_values_tell_the_batch_size(x64, limit):
    with jax.enable_x64(x64):
        rng = np.random.default_rng(1)
        product = rng.normal(size=(1000, 8)) @ rng.normal(size=(8, 32))
        size, gap = batch_size_by_gap(jnp.asarray(product, jnp.float64 if x64 else jnp.float32), 16)
        assert size == 8 and gap < limit
        size, gap = batch_size_by_gap(jnp.asarray(product + rng.normal(size=product.shape)), 16)
        assert gap > 0.01
    with pytest.raises(ValueError, match="max_samples"):
        batch_size_by_gap(jnp.zeros((4, 9)), 4)
