"""An untrained generator in place of pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import invjax
from invjax import datasets
from invjax.attacks.matching import generator as generators
from invjax.attacks.matching import objectives
from invjax.attacks.matching.loop import gradient_matching

MODEL = invjax.models.mlp((32,), num_classes=10)
FACTS = invjax.base.Facts(
    input_shape=(8, 4, 3), num_classes=10, input_range=((-1.0, 0.0, 0.0), 2.0)
)


@pytest.mark.parametrize(
    ("shape", "levels"), [((8, 4, 3), None), ((7, 7, 1), None), ((8, 8, 1), 3)]
)
def test_images_of_the_shape_between_nought_and_one(shape, levels, key):
    made = generators.unet(shape, width=4, channels=2, levels=levels)
    weights = jax.jit(made.init)(key)
    images = jax.jit(made.apply)(weights, jax.random.normal(key, (3, *made.noise_shape)))
    assert images.shape == (3, *shape)
    assert (images > 0).all() and (images < 1).all() and images.std() > 1e-3


def test_both_convolutions_draw_the_same(key):
    shape, options = (8, 8, 1), {"width": 4, "channels": 2}
    fast, plain = (generators.unet(shape, **options, backend=kind) for kind in ("cpu", "gpu"))
    weights, noise = jax.jit(fast.init)(key), jax.random.normal(key, (2, *fast.noise_shape))
    images = [jax.jit(made.apply)(weights, noise) for made in (fast, plain)]
    np.testing.assert_allclose(*images, atol=1e-5)


def test_the_range_is_filled_and_the_noise_is_no_variable(key):
    initializer, decode = generators.generated(generators.unet((8, 4, 3), width=4, channels=2))
    observation = invjax.Observation(None, None, FACTS)
    variables = jax.jit(lambda key: initializer(key, (2, 8, 4, 3), observation))(key)
    large = {**variables, "weights": jax.tree.map(lambda leaf: 50 * leaf, variables["weights"])}
    images = jax.jit(lambda all: decode(all, observation))(large)
    low = jnp.array([-1.0, 0.0, 0.0]).reshape((1, 1, 1, 3))
    assert (images >= low).all() and (images <= 2).all() and images.min() < -0.5
    slopes = jax.jit(jax.grad(lambda all: decode(all, observation)[0].sum()))(variables)
    assert not slopes["inputs"].any()
    assert all(leaf.any() for leaf in jax.tree.leaves(slopes["weights"]))


@pytest.mark.slow
def test_its_weights_are_optimised_in_place_of_pixels(key):
    batch = datasets.take(datasets.digits(), np.arange(2))
    params = MODEL.init(key, batch.inputs.shape[1:])
    seen = jax.jit(lambda: invjax.observe(key, MODEL, params, batch, grant_labels=True))()
    initializer, decode = generators.generated(generators.unet((8, 8, 1), width=8, channels=4))
    attack = gradient_matching(
        MODEL,
        objective=objectives.cosine(),
        optimizer=optax.adam(5e-3),
        initializer=initializer,
        decode=decode,
        num_steps=150,
    )
    found = jax.jit(attack)(key, seen)
    error = invjax.metrics.mse(found.inputs, batch.inputs)
    assert error.max() < 0.3 * invjax.metrics.mse(0 * batch.inputs + 0.5, batch.inputs).min()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input_shape": (64,)}, r"input_shape must be \(height, width, channels\)"),
        ({"levels": 3}, "levels must be between 0 and 2 for 8x4, got 3"),
        ({"width": 0}, "width must be a whole number of at least 1, got 0"),
        ({"channels": 0}, "channels must be a whole number of at least 1, got 0"),
    ],
)
def test_errors_name_what_is_wrong(settings, message):
    with pytest.raises(ValueError, match=message):
        generators.unet(**{"input_shape": (8, 4, 3), **settings})
