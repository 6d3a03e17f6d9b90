"""ATS: operations against Pillow, policies, and what the defence does to a batch and to an attack."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_image

import invjax
from invjax import Batch, gradients, metrics
from invjax.defenses import gaussian_noise
from invjax.defenses.augmentation import POOL, ats, augment, parse_policy, policy_text
from invjax.defenses.operations import GREY, SIGNS, from_levels, operations, to_levels
from invjax.observe import prepared_batch
from invjax.ranges import bounds

NAMES = tuple(operations())
WHOLE = ("invert", "autocontrast", "equalize")
PLAIN = {"crop_padding": 0, "flip": False}
PHOTOGRAPH = load_sample_image("china.jpg")
AUGMENT = jax.jit(augment, static_argnames=("policy", "input_range", "crop_padding", "flip"))
AFFINE = Image.Transform.AFFINE


def natural(side=16, start=(150, 200)):
    """A part of a photograph, `[side, side, 3]`, 0 to 255."""
    rows, columns = (slice(first, first + 160, 160 // side) for first in start)
    return PHOTOGRAPH[rows, columns]


def photographs(*starts):
    return (
        jnp.asarray(np.stack([natural(start=(150, start)) for start in starts]), jnp.float32) / 255
    )


def by_pillow(name, image, index, sign):
    """The operation as AutoAugment writes it with Pillow, with the published ranges."""
    width, height = image.size
    grey = (GREY,) * len(image.getbands()) if len(image.getbands()) > 1 else GREY

    def value(largest):
        return sign * largest * index / 9

    def affine(*matrix):
        return image.transform(image.size, AFFINE, matrix, fillcolor=grey)

    return {
        "shearX": lambda: affine(1, value(0.3), 0, 0, 1, 0),
        "shearY": lambda: affine(1, 0, 0, value(0.3), 1, 0),
        "translateX": lambda: affine(1, 0, value(150 / 331) * width, 0, 1, 0),
        "translateY": lambda: affine(1, 0, 0, 0, 1, value(150 / 331) * height),
        "rotate": lambda: image.rotate(abs(value(30)), fillcolor=grey),
        "color": lambda: ImageEnhance.Color(image).enhance(1 + value(0.5)),
        "contrast": lambda: ImageEnhance.Contrast(image).enhance(1 + value(0.5)),
        "sharpness": lambda: ImageEnhance.Sharpness(image).enhance(1 + value(0.5)),
        "brightness": lambda: ImageEnhance.Brightness(image).enhance(1 + value(0.5)),
        "posterize": lambda: ImageOps.posterize(image, [8, 8, 7, 7, 6, 6, 5, 5, 4, 4][index]),
        "solarize": lambda: ImageOps.solarize(image, 256 * (9 - index) / 9),
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
        "invert": lambda: ImageOps.invert(image),
    }[name]()


def some_images():
    generator = np.random.default_rng(0)
    return {
        "photograph": natural(32),
        "noise, wide": generator.integers(0, 256, (17, 24, 3)),
        "pale": 60 + natural(20) // 3,
        "grey, tall": generator.integers(20, 200, (31, 28, 1)),
        "digit": generator.integers(0, 17, (8, 8, 1)) * 255 // 16,
        "constant": np.full((16, 16, 3), 77),
        "sliver": generator.integers(0, 256, (2, 9, 3)),
    }


IMAGES = some_images()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", IMAGES)
def test_an_operation_is_pillows(name, kind):
    levels = IMAGES[kind].astype(np.uint8)
    image = Image.fromarray(levels if levels.shape[-1] == 3 else levels[..., 0])
    over_magnitudes = jax.vmap(operations()[name], in_axes=(None, None, 0))
    over_both = jax.jit(jax.vmap(over_magnitudes, in_axes=(0, None, None)))
    every = over_both(jnp.arange(2), jnp.asarray(levels, jnp.int32), jnp.arange(10))
    for row, sign in enumerate(SIGNS):
        for index in range(10):
            expected = np.asarray(by_pillow(name, image, index, sign), int)
            difference = np.asarray(every[row, index]) - expected.reshape(levels.shape)
            if name == "autocontrast":
                # Pillow's double-precision product may fall just short of an integer.
                assert difference.min() >= 0 and difference.max() <= 1
                assert (difference != 0).mean() < 0.05
            else:
                np.testing.assert_array_equal(difference, 0)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WHOLE])
def test_magnitude_zero_is_the_identity(name):
    levels = jnp.asarray(natural(), jnp.int32)
    for sign in range(2):
        same = jax.jit(operations()[name])(sign, levels, 0)
        np.testing.assert_array_equal(same, levels)


def test_twice():
    levels = jnp.asarray(natural(), jnp.int32)
    invert, stretch, equalize = (
        jax.jit(lambda image, name=name: operations()[name](0, image, 9)) for name in WHOLE
    )
    np.testing.assert_array_equal(invert(invert(levels)), levels)
    stretched = stretch(levels // 2 + 40)
    np.testing.assert_array_equal(stretch(stretched), stretched)
    assert stretched.min() == 0 and stretched.max() == 255
    # A step of equalisation is 256 pixels over 255 levels; an image of fewer has none.
    assert (equalize(levels) != levels).any()
    np.testing.assert_array_equal(equalize(levels[:, :15]), levels[:, :15])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("fill", [GREY, 0])
def test_a_translation_moves_by_what_it_says(axis, fill):
    levels = jnp.asarray(natural(32), jnp.int32)
    name, shift = ("translateY", "translateX")[axis], 8
    assert round(150 / 331 * 5 / 9 * 32) == shift
    for index, sign in enumerate(SIGNS):
        moved = np.moveaxis(np.asarray(operations(fill)[name](index, levels, 5)), axis, 0)
        still = np.moveaxis(np.asarray(levels), axis, 0)
        if sign < 0:
            moved, still = moved[::-1], still[::-1]
        np.testing.assert_array_equal(moved[:-shift], still[shift:])
        np.testing.assert_array_equal(moved[-shift:], fill)


def test_the_pool_is_in_the_published_order():
    named = {21: ("translateX", 5), 13: ("brightness", 5), 3: ("translateX", 9)}
    named |= {7: ("translateY", 2), 4: ("sharpness", 1), 15: ("brightness", 9)}
    named |= {1: ("contrast", 6), 43: ("translateY", 3), 18: ("contrast", 7)}
    assert {index: POOL[index] for index in named} == named
    assert len(POOL) == 50 and {name for name, _ in POOL} == set(NAMES) - {"shearX"}
    assert all(0 <= magnitude < 10 for _, magnitude in POOL)


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("21-13-3+7-4-15", ((21, 13, 3), (7, 4, 15))),
        ("3-1-7", ((3, 1, 7),)),
        (" 49 ", ((49,),)),
        ("0+0-0", ((0,), (0, 0))),
        ("", ((),)),
    ],
)
def test_policies_parse(text, policy):
    assert parse_policy(text) == policy
    assert "+".join(map(policy_text, policy)) == text.strip()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3-50", r"'3-50' names transformation 50; there are 0 to 49"),
        ("3--7", r"'3--7' must be indices .*'' is none"),
        ("3-1+", "'' is none"),
        ("3-x", "'x' is none"),
        ("3.0", "'3.0' is none"),
        ("²", "'²' is none"),
        (None, "must be text .* got None"),
        ((3, 1), r"must be text .* got \(3, 1\)"),
    ],
)
def test_what_is_no_policy_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_policy(text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "50"}, "transformation 50"),
        ({"crop_padding": -1}, "crop_padding must be a whole number of at least 0, got -1"),
        ({"crop_padding": 1.5}, "crop_padding must be a whole number"),
        ({"fill": 1.5}, "fill must lie in"),
        ({"input_range": (1.0, 1.0)}, "input_range must be"),
        ({"input_range": 1.0}, "input_range must be"),
        ({"input_range": ((0.0, 0.0), (1.0, -1.0))}, "input_range must be"),
    ],
)
def test_settings_are_checked(settings, message):
    arguments: Any = {"policy": "3-1-7", **settings}
    with pytest.raises(ValueError, match=message):
        ats(**arguments)


@pytest.mark.parametrize("shape", [(2, 8, 8, 2), (2, 64), (8, 8, 3)])
def test_refuses_what_is_no_image(shape, key):
    with pytest.raises(ValueError, match="1 or 3 channels, got shape"):
        augment(key, jnp.zeros(shape), ((3,),))


def test_a_known_policy_and_a_traced_one_are_the_same(key):
    images = photographs(200, 200, 200)
    traced = jax.jit(lambda indices: augment(key, images, indices, **PLAIN))
    expected = AUGMENT(key, images, policy=((21, 37, 3),), **PLAIN)
    np.testing.assert_array_equal(traced(jnp.array([21, 37, 3])), expected)
    np.testing.assert_array_equal(traced(jnp.array([-1, -1, -1])), images)
    inverted = jnp.round(255 * (1 - images)) / 255
    np.testing.assert_array_equal(traced(jnp.array([-1, 0, -1])), inverted)


def test_a_range_is_scaled_away(key):
    images = photographs(200)
    mean, std = jnp.array([0.5, 0.4, 0.3]), jnp.array([0.2, 0.25, 0.3])
    broadcast = (mean[None, None, None], std[None, None, None])
    low, high = tuple(map(float, -mean / std)), tuple(map(float, (1 - mean) / std))
    normalized = (images - broadcast[0]) / broadcast[1]
    direct = AUGMENT(key, images, ((21, 13, 3),))
    scaled = AUGMENT(key, normalized, ((21, 13, 3),), input_range=(low, high))
    np.testing.assert_allclose(scaled * broadcast[1] + broadcast[0], direct, atol=1e-6)
    levels = to_levels(normalized, (low, high))
    np.testing.assert_array_equal(levels, natural()[None])
    np.testing.assert_allclose(from_levels(levels, (low, high), "float32"), normalized, atol=1e-6)
    assert [bound.shape for bound in bounds((low, high), images.shape, images.dtype)] == [
        images.shape
    ] * 2


def test_crop_and_flip_come_first_and_can_be_left_out(key):
    images = jnp.broadcast_to(photographs(200), (64, 16, 16, 3))
    np.testing.assert_array_equal(AUGMENT(key, images, ((),), **PLAIN), images)
    flipped = np.asarray(AUGMENT(key, images, ((),), crop_padding=0))
    turned = (flipped == np.asarray(images)[:, :, ::-1]).all(axis=(1, 2, 3))
    still = (flipped == np.asarray(images)).all(axis=(1, 2, 3))
    assert (turned | still).all() and 16 < turned.sum() < 48

    cropped = np.asarray(AUGMENT(key, images, ((),), flip=False))
    padded = np.pad(np.asarray(images[0]), ((4, 4), (4, 4), (0, 0)))
    places = [
        [
            (row, column)
            for row in range(9)
            for column in range(9)
            if (padded[row : row + 16, column : column + 16] == image).all()
        ]
        for image in cropped
    ]
    assert all(len(found) == 1 for found in places)
    rows, columns = np.array(places)[:, 0].T
    # Every offset from 0 to 8 has a chance of 1 - (8/9)^64 = 0.9995 to turn up.
    assert set(rows) == set(columns) == set(range(9))


def test_a_hybrid_uses_each_sub_policy_on_some_images(key):
    images = jnp.broadcast_to(photographs(200), (40, 16, 16, 3))
    single = [AUGMENT(key, images[:1], ((index,),), **PLAIN)[0] for index in (0, 11)]
    both = AUGMENT(key, images, ((0,), (11,)), **PLAIN)
    which = np.array([[(image == one).all() for one in single] for image in both])
    assert (which.sum(axis=1) == 1).all()
    assert (which.sum(axis=0) > 8).all()


BATCH = Batch(photographs(200, 240, 280, 320), jnp.array([0, 1, 2, 1]))
MODEL = invjax.models.mlp((6,), num_classes=3, activation="tanh")
PREPARED = jax.jit(prepared_batch, static_argnums=3)
GRADIENT = jax.jit(gradients.gradient, static_argnums=0)
DEFENSE = ats("21-13-3+7-4-15")


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(1), (16, 16, 3))


def test_keys_differ_by_image_and_by_step(params, key):
    alike = BATCH._replace(inputs=jnp.broadcast_to(BATCH.inputs[:1], (12, 16, 16, 3)))
    state = DEFENSE.init_with_key(key, params)
    with jax.debug_key_reuse(True):
        first, state = DEFENSE.prepare(alike, state, params)
        second, _ = DEFENSE.prepare(alike, state, params)
    again, _ = DEFENSE.prepare(alike, DEFENSE.init_with_key(key, params), params)
    chex.assert_trees_all_equal(first, again)
    assert len(np.unique(first.inputs.reshape(12, -1), axis=0)) > 10
    assert (first.inputs != second.inputs).any(axis=(1, 2, 3)).sum() > 10
    assert first.labels is alike.labels


def test_it_composes_with_a_defense_of_gradients(params, key):
    defense = invjax.chain(DEFENSE, gaussian_noise(1e-3))
    seen = invjax.observe(key, MODEL, params, BATCH, defense)
    transformed = PREPARED(key, params, BATCH, defense)
    assert (transformed.inputs != BATCH.inputs).any(axis=(1, 2, 3)).all()
    expected, private = (GRADIENT(MODEL, params, batch) for batch in (transformed, BATCH))
    noise, _ = ravel_pytree(optax.tree.sub(seen.gradient, expected))
    np.testing.assert_allclose(jnp.std(noise), 1e-3, rtol=0.05)
    # The law is of the transformed batch: the private one is not likely.
    likely, unlikely = (
        defense.log_likelihood(seen.gradient, candidate) for candidate in (expected, private)
    )
    assert likely > unlikely + 100
    with pytest.raises(ValueError, match="acts on inputs and cannot follow"):
        invjax.chain(gaussian_noise(0.1), DEFENSE)


def test_many_clients_under_jit_and_vmap_are_each_on_their_own(params):
    def client(key):
        return prepared_batch(key, params, BATCH, DEFENSE).inputs

    keys = jax.random.split(jax.random.key(3), 3)
    many = jax.jit(jax.vmap(client))(keys)
    for key, images in zip(keys, many, strict=True):
        np.testing.assert_array_equal(images, PREPARED(key, params, BATCH, DEFENSE).inputs)
    assert (many[0] != many[1]).any()


def test_names_tell_defenses_apart():
    assert repr(ats("3-1-7")) == "ats('3-1-7')"
    assert repr(ats("3", crop_padding=0, flip=False)) == "ats('3', crop_padding=0, flip=False)"


@pytest.mark.parametrize("kind", ["mlp", pytest.param("lenet", marks=pytest.mark.slow)])
def test_an_attack_recovers_the_transformed_image_and_not_the_private_one(kind, key):
    """Check 11: the defence leaves T(x) in the open; what it hides is what T itself destroyed."""
    models = {
        "mlp": lambda: invjax.models.mlp((64,), activation="tanh"),
        "lenet": lambda: invjax.models.lenet(),
    }
    model = models[kind]()
    params = model.init(key, (16, 16, 3))
    batch = Batch(photographs(200), jnp.array([3]))
    defense = ats("21-13", **PLAIN)
    seen = invjax.observe(key, model, params, batch, defense, grant_labels=True)
    attack = invjax.attacks.inverting_gradients(model, total_variation=1e-4, num_steps=300)
    found = attack(key, seen)
    transformed = PREPARED(key, params, batch, defense)
    of_transformed, of_private, between = (
        float(metrics.psnr(a, b, data_range=1.0)[0])
        for a, b in (
            (found.inputs, transformed.inputs),
            (found.inputs, batch.inputs),
            (transformed.inputs, batch.inputs),
        )
    )
    assert of_transformed - of_private >= 15
    assert of_transformed > 25 and abs(of_private - between) < 1
