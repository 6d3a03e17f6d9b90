"""Clipping: the bound, the clipped mean three ways, and what it tells an adversary."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from invjax import gradients
from invjax.base import Batch
from invjax.defenses import (
    chain,
    clip_per_sample,
    gaussian_noise,
    global_clip,
    magnitude_prune,
    random_mask,
)
from invjax.models.adapters import from_apply

per_sample_gradients = jax.jit(gradients.per_sample_gradients, static_argnums=0)
mean_gradient = jax.jit(gradients.gradient, static_argnums=0)
clipped_sum = jax.jit(gradients.clipped_sum, static_argnums=(0, 3, 4))


def mlp():
    def init(key, input_shape):
        first, second = jax.random.split(key)
        return {
            "hidden": jax.random.normal(first, (*input_shape, 7)) / 2,
            "out": jax.random.normal(second, (7, 3)) / 2,
            "bias": jnp.zeros(3),
        }

    def apply(params, inputs):
        return jnp.tanh(inputs @ params["hidden"]) @ params["out"] + params["bias"][None]

    return from_apply(apply, init, 3)


@pytest.fixture
def problem(key):
    model = mlp()
    params = model.init(key, (5,))
    inputs = np.random.default_rng(0).normal(size=(6, 5)) * np.arange(1.0, 7.0)[:, None]
    return model, params, Batch(jnp.asarray(inputs, jnp.float32), jnp.arange(6) % 3)


def run(defense, updates, params=None):
    @jax.jit
    def update(updates, params):
        return defense.update(updates, defense.init(updates), params)[0]

    return update(updates, params)


@jax.jit
def every_clip(tree, radius):
    """Norm of the clipped mean; which samples need no clipping; every sample clipped."""

    def one(tree):
        return global_clip(radius).update(tree, ((),))[0]

    mean = clip_per_sample(radius).update(tree, ((),))[0]
    small = jax.vmap(optax.tree.norm)(tree) < radius * (1 - 1e-5)
    return optax.tree.norm(mean), small, jax.vmap(one)(tree)


tensors = hnp.arrays(
    np.float32, (3, 4), elements=st.floats(-1e3, 1e3, width=32, allow_subnormal=False)
)


@settings(max_examples=40, deadline=None)
@given(tensors, tensors, st.floats(1e-3, 1e3))
def test_norm_never_exceeds_the_radius(a, b, radius):
    tree = {"a": jnp.asarray(a), "b": jnp.asarray(b)}
    norm, small, clipped = every_clip(tree, radius)
    assert norm <= radius * (1 + 1e-5)
    assert (jax.vmap(optax.tree.norm)(clipped) <= radius * (1 + 1e-5)).all()
    for before, after in zip(jax.tree.leaves(tree), jax.tree.leaves(clipped), strict=True):
        np.testing.assert_array_equal(before[small], after[small])


@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_clipped_mean_three_ways(problem, microbatch_size):
    model, params, batch = problem
    per_sample = per_sample_gradients(model, params, batch)
    norms = jax.vmap(optax.tree.norm)(per_sample)
    radius = float(jnp.median(norms))
    clipped = run(clip_per_sample(radius), per_sample, params)

    oracle = clipped_sum(model, params, batch, radius, microbatch_size)
    naive = jax.tree.map(lambda leaf: np.zeros(leaf.shape), params)
    for index in range(6):
        sample = jax.tree.map(lambda leaf, i=index: np.asarray(leaf[i], np.float64), per_sample)
        norm = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(sample)))
        factor = min(1.0, radius / norm)
        naive = jax.tree.map(lambda total, leaf, f=factor: total + f * leaf, naive, sample)
    for name in params:
        np.testing.assert_allclose(clipped[name], oracle[name] / 6, atol=1e-6)
        np.testing.assert_allclose(clipped[name], naive[name] / 6, atol=1e-6)


def test_global_clip_is_optax(problem):
    model, params, batch = problem
    gradient = mean_gradient(model, params, batch)
    reference = optax.clip_by_global_norm(0.1)
    expected, _ = reference.update(gradient, reference.init(params))
    for name in params:
        np.testing.assert_allclose(run(global_clip(0.1), gradient)[name], expected[name], rtol=1e-5)


def test_law_replays_the_clipping(problem):
    model, params, batch = problem
    per_sample = per_sample_gradients(model, params, batch)
    defense = chain(clip_per_sample(0.5), gaussian_noise(0.3))
    law = defense.law(jax.tree.map(jnp.zeros_like, params), per_sample)
    expected = run(clip_per_sample(0.5), per_sample)
    for name in params:
        np.testing.assert_allclose(law.location[name], expected[name], atol=1e-7)
        np.testing.assert_allclose(law.variance[name], 0.09, rtol=1e-6)


@pytest.mark.parametrize("clip", [clip_per_sample, global_clip])
def test_noise_before_clipping_shrinks_with_it(clip):
    per_sample = clip is clip_per_sample
    tree = {"a": jnp.full((1, 4), 2.0)} if per_sample else {"a": jnp.full(4, 2.0)}
    law = chain(gaussian_noise(0.1, per_sample=per_sample), clip(1.0)).law({"a": jnp.ones(4)}, tree)
    np.testing.assert_allclose(law.location["a"], 0.5)
    np.testing.assert_allclose(law.variance["a"], 0.01 / 16, rtol=1e-6)


def test_clipping_what_was_pruned_uses_what_was_left():
    gradient = {"a": jnp.asarray([4.0, 3.0, -0.1, 0.2, 2.9, 0.3])}
    defense = chain(magnitude_prune(0.5), global_clip(1.0))
    observed = run(defense, gradient)
    assert float(optax.tree.norm(observed)) == pytest.approx(1.0)
    law = defense.law(observed, gradient)
    kept = observed["a"] != 0
    np.testing.assert_allclose(law.location["a"][kept], observed["a"][kept], rtol=1e-6)
    assert law.pruned["a"] == jnp.abs(observed["a"][kept]).min()


def test_clipping_behind_a_mask_that_cannot_be_told_uses_what_it_leaves_on_average():
    gradient = {"a": jnp.cos(jnp.arange(4000.0))}
    masked = chain(random_mask(0.4, known=False), global_clip(1.0))
    observed = run(masked, gradient)["a"]
    law = chain(masked, gaussian_noise(0.1)).law({"a": observed}, gradient)
    kept = observed != 0
    ratio = observed[kept] / law.location["a"][kept]
    # The norm of four thousand coordinates lies within two percent of its mean.
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)
    assert float(ratio[0]) == pytest.approx(1.0, abs=0.02)


def test_zero_gradients_clip_without_nan():
    tree = {"a": jnp.zeros((2, 3))}
    for defense in (clip_per_sample(1.0), global_clip(1.0)):
        gradient = jax.grad(lambda t, d=defense: jnp.sum(run(d, t)["a"]))(tree)
        assert jnp.isfinite(gradient["a"]).all()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_clips_to_the_radius(dtype):
    # The squares of these overflow in half precision.
    samples = {"a": jnp.full((1, 200), 300.0, dtype)}
    sent = run(clip_per_sample(1.0), samples)["a"]
    assert sent.dtype == dtype
    np.testing.assert_allclose(np.linalg.norm(np.float64(sent)), 1.0, rtol=1e-2)


@pytest.mark.parametrize("radius", [0.0, -1.0, float("nan"), "1", None, [1.0]])
@pytest.mark.parametrize("clip", [clip_per_sample, global_clip])
def test_radius_is_validated(clip, radius):
    with pytest.raises(ValueError, match="clip_norm must"):
        clip(radius)


def test_refuses_what_is_not_per_sample(problem):
    model, params, batch = problem
    defense = clip_per_sample(1.0)
    gradient = mean_gradient(model, params, batch)
    with pytest.raises(ValueError, match="per-sample gradients"):
        run(defense, gradient)
    with pytest.raises(ValueError, match="per-sample gradients"):
        run(defense, {"a": jnp.zeros((3, 3)), "b": jnp.zeros(())})
    # One leaf hides it from the leading sizes, but not from the parameters.
    square = {"a": jnp.zeros((3, 3))}
    with pytest.raises(ValueError, match=r"needs a gradient of shape \[B"):
        run(defense, square, square)


def test_refuses_per_sample_gradients_where_the_mean_is_meant():
    samples, params = {"a": jnp.zeros((4, 3))}, {"a": jnp.zeros(3)}
    for defense in (global_clip(1.0), gaussian_noise(0.1)):
        with pytest.raises(ValueError, match="gradient of the parameters' shapes"):
            run(defense, samples, params)


def test_per_sample_stages_come_first():
    with pytest.raises(ValueError, match=r"clip_per_sample\(1.0\).*cannot follow gaussian"):
        chain(gaussian_noise(0.1), clip_per_sample(1.0))
