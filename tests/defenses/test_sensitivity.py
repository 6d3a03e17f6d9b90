"""Sensitivities of gradient coordinates against the dense Jacobian."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from invjax import models
from invjax.base import Batch
from invjax.defenses import sensitivity as sensitivities
from invjax.defenses.sensitivity import (
    Sensitivity,
    gradient_sensitivity,
    keep_telling_least,
    pool_tensors,
    population_sensitivity,
    ratio,
    scaled_to,
)

MODEL = models.mlp((5,), 3, "tanh")
SHAPE = (13,)


@functools.cache
def case(number=1, size=2, dtype="float64"):
    """Parameters and batches `[V, B, ...]`, as NumPy."""
    rng = np.random.default_rng(0)
    params = jax.eval_shape(lambda: MODEL.init(jax.random.key(0), SHAPE))
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(dtype) / 2, params)
    inputs = rng.uniform(size=(number, size, *SHAPE))
    return params, Batch(inputs.astype(dtype), rng.integers(0, 3, (number, size)))


@functools.cache
def exact():
    return jax.jit(functools.partial(gradient_sensitivity, MODEL))


def first(batches):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), batches)


def dense(params, batch):
    """`J` and the gradient, flat, by reverse mode."""

    def gradient(inputs):
        inputs = inputs.reshape(batch.inputs.shape)
        return ravel_pytree(jax.grad(MODEL.loss)(params, batch._replace(inputs=inputs)))[0]

    flat = jnp.asarray(batch.inputs).ravel()
    return np.asarray(jax.jit(jax.jacrev(gradient))(flat)), np.asarray(gradient(flat))


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


def test_exact_sensitivities_are_the_squared_rows_of_the_jacobian():
    with jax.enable_x64(True):
        params, batches = case()
        batch = first(batches)
        # More directions than a chunk, and no multiple of it.
        assert batch.inputs.size % 20 and batch.inputs.size > 20
        jacobian, gradient = dense(params, batch)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sensitivities, "CHUNK", 20)
            found = jax.jit(functools.partial(gradient_sensitivity, MODEL))(params, batch)
        assert jacobian.any(axis=1).all()
        np.testing.assert_allclose(flat(found.leakage), (jacobian**2).sum(axis=1), rtol=1e-10)
        np.testing.assert_allclose(flat(found.energy), gradient**2, rtol=1e-10)


def test_gaussian_probes_have_no_bias_and_the_stated_spread():
    params, batches = case(dtype="float32")
    batch, probes = first(batches), 1000

    @jax.jit
    def estimates(keys):
        def one(key):
            return gradient_sensitivity(MODEL, params, batch, num_probes=probes, key=key).leakage

        return jax.lax.map(one, keys)

    truth = flat(exact()(params, batch).leakage)
    drawn = estimates(jax.random.split(jax.random.key(1), 40))
    ratios = np.stack([flat(jax.tree.map(lambda x, i=i: x[i], drawn)) for i in range(40)]) / truth
    assert ratios.shape == (40, truth.size)
    np.testing.assert_allclose(ratios.mean(), 1, atol=0.02)
    np.testing.assert_allclose(ratios.mean(axis=1), 1, atol=0.05)
    np.testing.assert_allclose(ratios.std(axis=0).mean(), np.sqrt(2 / probes), rtol=0.15)


def test_the_population_is_the_mean_over_its_batches():
    params, batches = case(number=3, dtype="float32")
    found = jax.jit(functools.partial(population_sensitivity, MODEL))(params, batches)
    each = [exact()(params, jax.tree.map(lambda leaf, i=i: leaf[i], batches)) for i in range(3)]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 3, *each)
    chex.assert_trees_all_close(found, mean, rtol=1e-5, atol=1e-9)
    # Of probes, every batch draws its own: twice the same batch gives two estimates.
    twice = jax.tree.map(lambda leaf: leaf[jnp.zeros(2, int)], batches)
    keys = jax.random.split(jax.random.key(3))
    probed = functools.partial(gradient_sensitivity, MODEL, num_probes=4)
    drawn = [jax.jit(probed)(params, first(batches), key=key) for key in keys]
    expected = jax.tree.map(lambda *leaves: sum(leaves) / 2, *drawn)
    run = jax.jit(functools.partial(population_sensitivity, MODEL, num_probes=4))
    found = run(params, twice, key=jax.random.key(3))
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-9)
    assert not np.allclose(flat(drawn[0].leakage), flat(drawn[1].leakage), rtol=1e-2)


@pytest.mark.slow
def test_many_batches_under_vmap_are_each_on_their_own():
    params, batches = case(number=3, dtype="float32")
    keys = jax.random.split(jax.random.key(2), 3)

    def one(batch, key):
        return gradient_sensitivity(MODEL, params, batch, num_probes=5, key=key)

    many = jax.jit(jax.vmap(one))(batches, keys)
    for index in range(3):
        alone = jax.jit(one)(jax.tree.map(lambda leaf, i=index: leaf[i], batches), keys[index])
        mine = jax.tree.map(lambda leaf, i=index: leaf[i], many)
        chex.assert_trees_all_close(mine, alone, rtol=1e-4, atol=1e-9)


TREE = Sensitivity(
    {"a": jnp.array([[4.0, 0.0], [1.0, 9.0]]), "b": jnp.array([8.0])},
    {"a": jnp.array([[1.0, 0.0], [0.0, 9.0]]), "b": jnp.array([2.0])},
)


def test_ratios_have_a_floor_and_a_cap():
    found = ratio(TREE, floor=0.1, cap=5.0)
    np.testing.assert_allclose(found["a"], [[2.0, 0.0], [5.0, 1.0]])
    np.testing.assert_allclose(found["b"], [2.0])
    np.testing.assert_allclose(ratio(TREE, floor=0.1)["a"][1, 0], 10.0)


def test_pooling_gives_the_ratio_of_frobenius_norms():
    found = ratio(pool_tensors(TREE))
    np.testing.assert_allclose(found["a"], np.full((2, 2), np.sqrt(14 / 10)), rtol=1e-6)
    np.testing.assert_allclose(found["b"], [2.0], rtol=1e-6)


def test_scales_have_the_root_mean_square_asked_for():
    found = flat(scaled_to(TREE, 0.3, floor=0.1))
    np.testing.assert_allclose(np.sqrt((found**2).mean()), 0.3, rtol=1e-6)
    np.testing.assert_allclose(found**2 / found[0] ** 2, [1, 0, 5, 0.5, 1], rtol=1e-6)
    silent = TREE._replace(leakage=jax.tree.map(jnp.zeros_like, TREE.leakage))
    np.testing.assert_allclose(flat(scaled_to(silent, 0.3)), 0.3, rtol=1e-6)


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.39, 0.4, 0.6, 0.99])
def test_what_is_kept_tells_least(fraction):
    kept = flat(keep_telling_least(TREE, fraction))
    # Infinite (of no energy), then 4 twice, the later first, then 1 and 0.
    order = [2, 4, 0, 3, 1]
    gone = int(np.floor(fraction * 5 + 1e-9))
    assert set(np.flatnonzero(~kept)) == set(order[:gone])


def test_settings_out_of_range_are_refused():
    params, batches = case(dtype="float32")
    with pytest.raises(ValueError, match=r"num_probes must be a whole number of at least 1"):
        gradient_sensitivity(MODEL, params, first(batches), num_probes=0)
