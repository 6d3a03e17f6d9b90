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
    ACTIVATIONS,
    features,
    is_odd,
    leading_order,
    tensor_of,
)
from invjax.attacks.analytic.tensor.moments import Problem, gap_after
from invjax.attacks.analytic.tensor.polish import Candidate, balanced, implied, standard_errors
from invjax.attacks.analytic.tensor.readout import choose_signs, tells_sign

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
    if name == "relu":
        np.testing.assert_allclose(hermite_coefficients(name)[4], TABLE[name][4], atol=1e-5)


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


def hermite_tensor(w, order):
    """`H_p(w)`, `[d, ..., d]`, as its definition says."""
    eye = jnp.eye(w.size, dtype=w.dtype)
    if order == 1:
        return w
    square = jnp.outer(w, w)
    if order == 2:
        return square - eye
    if order == 3:
        mixed = [jnp.einsum(f"{a},{b}->abc", w, eye) for a, b in splits("abc", 1)]
        return jnp.einsum("ab,c->abc", square, w) - sum(mixed)
    mixed = [jnp.einsum(f"{a},{b}->abcd", square, eye) for a, b in splits("abcd", 2)]
    plain = [jnp.einsum(f"{a},{b}->abcd", eye, eye) for a, b in splits("abcd", 2)]
    # Every pairing appears twice among the six splits.
    return jnp.einsum("ab,cd->abcd", square, square) - sum(mixed) + sum(plain) / 2


def splits(axes, size):
    """Of axes, into a first group of a size and the rest."""
    for chosen in itertools.combinations(axes, size):
        yield "".join(chosen), "".join(axis for axis in axes if axis not in chosen)


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
    # Nothing tells nothing.
    assert batch_size_by_gap(jnp.zeros((4, 9)), 3)[1] == 1
    with pytest.raises(ValueError, match="max_samples"):
        batch_size_by_gap(jnp.zeros((4, 9)), 4)


@pytest.mark.parametrize(
    ("values", "size", "gap"),
    [([2.0, 1.0, 0.5], 2, 0.5), ([2.0, 1.0], 2, 0.0), ([2.0, 0.0], 2, 1.0), ([0.0, 0.0], 1, 1.0)],
)
def test_no_singular_values_leave_no_gap(values, size, gap):
    assert gap_after(jnp.asarray(values), size) == gap


def test_signs_of_two_outputs_are_not_told_by_their_signals():
    two = jnp.asarray([[0.3, -0.3], [-0.3, 0.3]])
    three = jnp.asarray([[0.3, -0.4, 0.1], [-0.3, 0.4, -0.1]])
    sure = jnp.asarray([[0.3, -0.3, 1e-9]])
    assert not tells_sign(two, 1e-6).any() and not tells_sign(two[:, :1], 1e-6).any()
    assert tells_sign(three, 1e-6).all() and not tells_sign(sure, 1e-6).any()
    both, misfits = jnp.stack([two, -two]), jnp.asarray([[0.1, 0.2], [0.2, 0.1]])
    # The constant input is what tells, and without one the parities.
    signs, signals = choose_signs(both, misfits, jnp.asarray([-1.0, 1.0]), odd=True)
    np.testing.assert_array_equal(signs, [-1, 1])
    np.testing.assert_array_equal(signals, jnp.stack([-two[0], two[1]]))
    np.testing.assert_array_equal(choose_signs(both, misfits, None, odd=False)[0], [1, -1])
    of_three = choose_signs(jnp.stack([three, -three]), misfits, jnp.asarray([-1.0, 1.0]), odd=True)
    np.testing.assert_array_equal(of_three[0], [1, -1])
    assert is_odd("tanh") and not is_odd("sigmoid") and not is_odd("relu")


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_standard_errors_are_those_of_the_least_squares(activation):
    """By the Jacobian; ReLU hides norms, so there only directions count."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        shapes = ((40, 5), (40, 2), (40, 5), (40, 2))
        weight, outer, *gradient = (jnp.asarray(rng.normal(size=shape)) for shape in shapes)
        seen = [jnp.asarray(rng.random(shape) < 0.7).astype(float) for shape in shapes[2:]]
        problem = Problem(weight, outer, *gradient, *seen)
        truth = Candidate(
            jnp.asarray(rng.normal(size=(2, 5))), jnp.asarray(rng.normal(size=(2, 2)))
        )
        scales, kind = balanced(problem), ACTIVATIONS[activation]
        found = standard_errors(problem, kind, scales, truth, homogeneous=activation == "relu")
        flat, unravel = jax.flatten_util.ravel_pytree(truth)

        def model(point):
            one, two = implied(problem, kind, unravel(point))
            return jnp.concatenate(
                [(one * seen[0] / scales.weight).ravel(), (two * seen[1] / scales.outer).ravel()]
            )

        jacobian = np.asarray(jax.jacfwd(model)(flat))
        if activation == "relu":
            # Norms known: a basis of what is left.
            norms = np.zeros((2, flat.size))
            norms[0, :5], norms[1, 5:10] = truth.inputs
            free = np.linalg.svd(norms)[2][2:].T
            covariance = free @ np.linalg.inv(free.T @ jacobian.T @ jacobian @ free) @ free.T
        else:
            covariance = np.linalg.inv(jacobian.T @ jacobian)
        traces = np.diag(covariance)[:10].reshape(2, 5).sum(axis=1)
        wanted = np.sqrt(traces) / np.linalg.norm(truth.inputs, axis=1)
        np.testing.assert_allclose(found, wanted, rtol=1e-6 if activation == "tanh" else 0.01)
        blind = problem._replace(weight_seen=0 * seen[0], outer_seen=0 * seen[1])
        nothing = standard_errors(blind, kind, scales, truth)
        assert not (nothing < 1e3).any()
