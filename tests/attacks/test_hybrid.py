"""The hybrid attack: better than linear systems where those are deficient, and never worse elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

import invjax
from invjax import linalg, models
from invjax.attacks.analytic.layerwise import layerwise
from invjax.attacks.analytic.layerwise.chains import blocks_of, convolve
from invjax.attacks.analytic.layerwise.recursion import System
from invjax.attacks.analytic.layerwise.solvers import Report
from invjax.attacks.hybrid import Correction, hybrid, schedule_of, system_error
from invjax.base import Facts, Observation
from invjax.models.chain import Spec, average_pool, chain_model

DEFICIENT = [(6, 4, 2, 0)]


def network(shapes):
    body = [Spec("conv", *shape, activation="tanh", bias=False) for shape in shapes]
    return chain_model([*body, Spec("flatten"), Spec("dense", 10)], 10, "small")


def images(size, count):
    noise = np.random.default_rng(0).normal(size=(count, size, size, 3))
    smooth = scipy.ndimage.gaussian_filter(noise, (0, 2.5, 2.5, 0), mode="nearest")
    low, high = smooth.min(axis=(1, 2, 3)), smooth.max(axis=(1, 2, 3))
    return (smooth - low[:, None, None, None]) / (high - low)[:, None, None, None] - 0.5


def victims(model, size, count=3):
    """Images, each with its own parameters, and what is seen of them, in single precision."""
    inputs = jnp.asarray(images(size, count), jnp.float32)[:, None]
    batches = invjax.Batch(inputs, jnp.full((count, 1), 3))
    keys = jax.random.split(jax.random.key(0), count)

    def see(key, batch):
        params = model.init(key, (size, size, 3))
        return invjax.observe(key, model, params, batch, input_range=(-0.5, 0.5))

    return batches, jax.jit(jax.vmap(see))(keys, batches), keys


def errors(attack, batches, seen, keys):
    found = jax.jit(jax.vmap(attack))(keys, seen)
    return jnp.mean((found.inputs - batches.inputs) ** 2, axis=(1, 2, 3, 4)), found


@pytest.mark.slow
def test_a_deficient_layer_gains_by_the_prior_alone():
    """6/4/2/0 at 16x16, three victims: halved by either weights; without the prior nothing moves."""
    model = network(DEFICIENT)
    batches, seen, keys = victims(model, 16)
    before, found = errors(layerwise(model), batches, seen, keys)
    assert not found.found.any() and before.min() > 2e-3, before
    published = Correction(2000, 1.0, 1.0, 0.05)
    after, _ = errors(hybrid(model, schedule=[published]), batches, seen, keys)
    assert (after < before / 2).all(), (before, after)
    ours, found = errors(hybrid(model), batches, seen, keys)
    assert (ours < before / 2).all() and (ours < after).all() and not found.found.any()
    bare = published._replace(steps=500, variation=0.0)
    still, _ = errors(hybrid(model, schedule=[bare]), batches, seen, keys)
    np.testing.assert_allclose(still, before, rtol=0.01)


def test_a_solved_layer_is_left_alone_unless_as_published():
    model = network([(6, 3, 1, 0)])
    batches, seen, keys = victims(model, 12, 1)
    before, plain = errors(layerwise(model), batches, seen, keys)
    _, found = errors(hybrid(model), batches, seen, keys)
    np.testing.assert_array_equal(found.inputs, plain.inputs)
    assert found.found.all() and before.max() < 1e-9
    correction = Correction(300, 1.0, 1.0, 0.05)
    published, found = errors(hybrid(model, schedule=[correction]), batches, seen, keys)
    assert published.max() > 1e-6 and not found.found.any()
    _, found = errors(hybrid(model, schedule=[correction._replace(steps=0)]), batches, seen, keys)
    np.testing.assert_array_equal(found.inputs, plain.inputs)
    assert found.found.all()


@pytest.mark.slow
@pytest.mark.parametrize("shapes", [[(6, 3, 1, 0), (3, 4, 2, 0)], [(6, 4, 2, 0), (3, 3, 2, 0)]])
def test_two_layers_of_which_the_second_is_deficient(shapes):
    model = network(shapes)
    batches, seen, keys = victims(model, 16, 4)
    before, _ = errors(layerwise(model), batches, seen, keys)
    ours, _ = errors(hybrid(model), batches, seen, keys)
    assert (ours < before / 2).all(), (before, ours)


def test_the_linear_term_is_that_of_the_matrices():
    """With a bias, a pool and unknown outputs; no matrix is formed."""
    with jax.enable_x64(True):
        specs = [Spec("conv", 4, 3, 2, 1), Spec("average_pool", window=2, activation="tanh")]
        model = chain_model([*specs, Spec("flatten"), Spec("dense", 3)], 3, "pooled")
        params = model.init(jax.random.key(0), (9, 9, 2))
        layers = model.layers(params)
        (block, _) = blocks_of(model, layers, (9, 9, 2))
        rng = np.random.default_rng(0)
        weight = jnp.asarray(layers[0].weight, jnp.float64)
        gradient, inputs = rng.normal(size=weight.shape), rng.normal(size=(9, 9, 2))
        signal = rng.normal(size=(*block.shape.output, 4))
        before = rng.normal(size=block.output_shape)
        known = rng.random(block.output_shape) < 0.7
        report = Report(*(jnp.zeros(()) for _ in range(4)))
        parts = [jnp.asarray(part) for part in (before, known, signal)]
        system = System(block, *parts, jnp.zeros((), int), report, jnp.asarray(True))
        found = system_error(
            system, {"weight": weight}, {"weight": jnp.asarray(gradient)}, jnp.asarray(inputs)
        )
        rows = linalg.gradient_matrix(signal.reshape(-1, 4), block.shape)
        wrong = rows @ inputs.ravel() - gradient.ravel()
        pooled = average_pool(convolve(block, weight, jnp.asarray(inputs))[None], 2)[0]
        expected = np.sum(wrong**2) + np.sum((pooled - before)[known] ** 2)
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_the_published_schedule():
    table = [correction[:4] for correction in schedule_of("paper", 4)]
    assert table == [
        (10_000, 1.0, 1.0, 0.05),
        (8000, 1.0, 1.0, 0.1),
        (1000, 10.0, 0.1, 1.0),
        (1000, 10.0, 0.1, 1.0),
    ]
    assert not any(correction.adaptive for correction in schedule_of("paper", 4))
    assert all(correction.adaptive for correction in schedule_of("ours", 2))
    assert {len(schedule_of(name, 1)) for name in ("paper", "ours")} == {1}


def test_errors_name_the_argument():
    model = network(DEFICIENT)
    with pytest.raises(ValueError, match="schedule must be one of 'ours', 'paper', got 'theirs'"):
        hybrid(model, schedule="theirs")
    with pytest.raises(ValueError, match="schedule: variation must lie in"):
        hybrid(model, schedule=[Correction(10, 1.0, -1.0, 0.0)])
    with pytest.raises(ValueError, match="schedule: steps must be a whole number"):
        hybrid(model, schedule=[Correction(10.5, 1.0, 1.0, 0.0)])
    with pytest.raises(ValueError, match="solver must be one of"):
        hybrid(model, solver="qr")
    batches, seen, keys = victims(model, 8, 1)
    with pytest.raises(ValueError, match="each of the 1 convolutions of small, got 2"):
        errors(hybrid(model, schedule=[Correction(1, 1.0, 1.0, 1.0)] * 2), batches, seen, keys)
    dense = models.mlp((8,), 1, activation="leaky_relu")
    params = dense.init(jax.random.key(0), (4,))
    seen = Observation(params, params, Facts(input_shape=(4,), num_classes=1, batch_size=1))
    with pytest.raises(ValueError, match="convolutions, of which mlp has none: use layerwise"):
        hybrid(dense)(jax.random.key(0), seen)
