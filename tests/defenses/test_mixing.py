"""MixUp and InstaHide: what is mixed with what, in inputs, labels and gradients."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import invjax
from invjax import Batch, gradients
from invjax.defenses import gaussian_noise
from invjax.defenses.mixing import coefficients, instahide, mixup
from invjax.observe import prepared_batch

SIZE = 6
SHAPE = (5, 5, 1)
# As many classes as samples: a mixed label is the row of coefficients itself.
BATCH = Batch(
    jax.random.uniform(jax.random.key(0), (SIZE, *SHAPE), minval=-1.0, maxval=3.0),
    jnp.arange(SIZE),
)
RANGE = (-1.0, 3.0)
PUBLIC = jax.random.uniform(jax.random.key(1), (9, *SHAPE), minval=-1.0, maxval=3.0)
MODEL = invjax.models.mlp((7,), num_classes=SIZE, activation="tanh")
ROWS = {
    "mixup": lambda: mixup(num_classes=SIZE),
    "instahide": lambda: instahide(num_classes=SIZE, input_range=RANGE),
    "public": lambda: instahide(num_classes=SIZE, input_range=RANGE, public=PUBLIC),
}
EVERY = pytest.mark.parametrize("kind", ROWS)


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(2), SHAPE)


PREPARED = jax.jit(prepared_batch, static_argnums=3)
GRADIENT = jax.jit(gradients.gradient, static_argnums=0)
LOSS = jax.jit(MODEL.loss)


def prepared(defense, seed, params, batch=BATCH):
    """What the gradient is taken of, as NumPy arrays."""
    return jax.tree.map(np.asarray, PREPARED(jax.random.key(seed), params, batch, defense))


def combined(weights, images):
    return np.einsum("ij,jhwc->ihwc", weights, np.asarray(images))


def test_mixup_is_one_combination_of_pairs(params):
    weights, defense = set(), mixup(num_classes=SIZE)
    for seed in range(8):
        inputs, labels = prepared(defense, seed, params)
        np.testing.assert_allclose(inputs, combined(labels, BATCH.inputs), atol=1e-5)
        np.testing.assert_allclose(labels.sum(axis=1), 1.0, atol=1e-6)
        # Every sample is once the first and once the second of a pair.
        np.testing.assert_allclose(labels.sum(axis=0), 1.0, atol=1e-6)
        own = np.diag(labels)
        moved = np.abs(own - 1) > 1e-6
        assert moved.any() and np.ptp(own[moved]) < 1e-6
        weights.add(round(float(own[moved][0]), 4))
    assert len(weights) == 8 and min(weights) < 0.5 < max(weights)


def test_mixups_weight_is_a_beta(params):
    defense = mixup(4.0, num_classes=2)
    pair = Batch(jnp.array([[0.0], [1.0]]), jnp.array([0, 1]))

    def first(key):
        return prepared_batch(key, params, pair, defense).inputs[0, 0]

    drawn = jax.jit(jax.vmap(first))(jax.random.split(jax.random.key(0), 4000))
    drawn = np.asarray(drawn)
    moved = drawn[drawn > 0]
    assert 0.45 < moved.size / 4000 < 0.55
    np.testing.assert_allclose(moved.mean(), 0.5, atol=0.02)
    np.testing.assert_allclose(moved.var(), 1 / 36, rtol=0.1)


def test_mixups_loss_is_the_mixed_loss(params):
    mixed = prepared(mixup(num_classes=SIZE), 1, params)
    one_by_one = [
        [LOSS(params, Batch(mixed.inputs[i : i + 1], jnp.array([label]))) for label in range(SIZE)]
        for i in range(SIZE)
    ]
    expected = np.sum(mixed.labels * np.array(one_by_one)) / SIZE
    np.testing.assert_allclose(LOSS(params, mixed), expected, rtol=1e-5)


def test_strength_zero_and_a_batch_of_one_are_left_alone(params):
    nothing = prepared(mixup(0.0, num_classes=SIZE), 0, params)
    chex.assert_trees_all_equal(nothing, BATCH)
    one = jax.tree.map(lambda leaf: leaf[:1], BATCH)
    alone = prepared(mixup(num_classes=SIZE), 0, params, one)
    np.testing.assert_allclose(alone.inputs, one.inputs, atol=1e-6)
    np.testing.assert_allclose(alone.labels, jnp.eye(SIZE)[:1], atol=1e-6)


def test_instahide_is_a_combination_under_signs_about_the_middle_of_every_channel(params):
    low, high = (-1.0, 0.0, 2.0), (1.0, 4.0, 3.0)
    start, end = np.array(low, np.float32), np.array(high, np.float32)
    images = start + (end - start) * np.random.default_rng(0).random((SIZE, 4, 4, 3), np.float32)
    defense = instahide(num_classes=SIZE, input_range=(low, high))
    batch = BATCH._replace(inputs=jnp.asarray(images))
    inputs, labels = prepared(defense, 0, params, batch)
    np.testing.assert_allclose(labels.sum(axis=1), 1.0, atol=1e-6)
    assert ((labels > 0).sum(axis=1) <= 4).all() and (np.diag(labels) > 0).all()
    # The signs hide less than it seems: distances from the middle are free of them.
    middle = (start + end) / 2
    plain = combined(labels, images - middle)
    np.testing.assert_allclose(np.abs(inputs - middle), np.abs(plain), atol=1e-5)
    signs = np.sign((inputs - middle) * plain)
    assert 0.35 < (signs > 0).mean() < 0.65
    assert len(np.unique(signs.reshape(SIZE, -1), axis=0)) == SIZE
    assert (inputs >= start).all() and (inputs <= end).all()


def test_public_images_carry_no_label(params):
    # Private images lie above the middle and public ones at it: the distance is private.
    public = jnp.full((3, *SHAPE), 1.0)
    private = BATCH._replace(inputs=jnp.full((SIZE, *SHAPE), 2.0))
    defense = instahide(6, num_classes=SIZE, public=public, num_private=2, input_range=RANGE)
    inputs, labels = prepared(defense, 0, params, private)
    share = labels.sum(axis=1)
    assert ((share >= 0.3) & (share < 1)).all()
    distances = np.abs(inputs - 1.0).reshape(SIZE, -1)
    np.testing.assert_allclose(distances, share[:, None] + np.zeros((1, 25)), atol=1e-5)
    assert ((labels > 0).sum(axis=1) <= 2).all()


def test_public_images_are_all_drawn(params):
    marked = jnp.asarray(np.eye(5).reshape(5, 5, 1, 1))
    private = Batch(jnp.zeros((64, 5, 1, 1)), jnp.zeros(64, int))
    defense = instahide(2, num_classes=2, public=marked, input_range=(-1.0, 1.0))
    inputs, _ = prepared(defense, 0, params, private)
    which = np.abs(inputs).reshape(64, 5)
    assert ((which > 0).sum(axis=1) == 1).all() and (which.sum(axis=0) > 0).all()


@pytest.mark.parametrize(("num_mixed", "num_private", "max_weight"), [(2, 2, 0.55), (6, 2, 0.65)])
def test_coefficients_are_the_published_law(key, num_mixed, num_private, max_weight):
    draw = jax.jit(coefficients, static_argnums=(1, 2, 3, 4, 5))
    drawn = np.asarray(draw(key, 4000, num_mixed, max_weight, num_private, 0.3))
    np.testing.assert_allclose(drawn.sum(axis=1), 1.0, atol=1e-6)
    assert drawn.min() > 0 and drawn.max() <= max_weight
    assert drawn[:, :num_private].sum(axis=1).min() >= 0.3 - 1e-5
    # By rejection, in NumPy.
    plain = np.abs(np.random.default_rng(0).normal(size=(200_000, num_mixed)))
    plain /= plain.sum(axis=1, keepdims=True)
    kept = (plain.max(axis=1) <= max_weight) & (plain[:, :num_private].sum(axis=1) >= 0.3)
    plain = plain[kept]
    for moment in (1, 2):
        expected, spread = (plain**moment).mean(axis=0), (plain**moment).std(axis=0)
        assert (np.abs((drawn**moment).mean(axis=0) - expected) < 5 * spread / 4000**0.5).all()


def test_coefficients_that_nothing_meets_are_equal(key):
    drawn = coefficients(key, 5, 4, 0.25 + 1e-6, 4, 0.3)
    np.testing.assert_array_equal(drawn, 0.25)


@EVERY
def test_the_gradient_is_of_the_mixed_batch(kind, params, key):
    defense = invjax.chain(ROWS[kind](), gaussian_noise(1e-3))
    seen = invjax.observe(key, MODEL, params, BATCH, defense, grant_labels=True)
    mixed = PREPARED(key, params, BATCH, defense)
    noise = optax.tree.sub(seen.gradient, GRADIENT(MODEL, params, mixed))
    assert 0 < optax.tree.norm(noise, ord="inf") < 6e-3
    np.testing.assert_array_equal(seen.labels, BATCH.labels)


@EVERY
def test_keys_differ_by_step_and_client(kind, params, key):
    defense = ROWS[kind]()
    state = defense.init_with_key(key, params)
    with jax.debug_key_reuse(True):
        first, state = defense.prepare(BATCH, state, params)
        second, _ = defense.prepare(BATCH, state, params)
    assert (first.inputs != second.inputs).any() and (first.labels != second.labels).any()

    def client(key):
        return prepared_batch(key, params, BATCH, defense)

    keys = jax.random.split(key, 3)
    many = jax.jit(jax.vmap(client))(keys)
    for index, one in enumerate(keys):
        alone = jax.tree.map(lambda leaf, index=index: leaf[index], many)
        chex.assert_trees_all_close(alone, PREPARED(one, params, BATCH, defense), atol=1e-6)
    assert (many.inputs[0] != many.inputs[1]).any()


def test_what_is_mixed_can_be_mixed_again(params):
    defense = invjax.chain(mixup(num_classes=SIZE), mixup(num_classes=SIZE))
    inputs, labels = prepared(defense, 0, params)
    np.testing.assert_allclose(inputs, combined(labels, BATCH.inputs), atol=1e-5)
    assert ((labels > 0).sum(axis=1) > 2).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mixup(-1.0, num_classes=3), "alpha must lie in"),
        (lambda: mixup(num_classes=1), "num_classes must be a whole number of at least 2, got 1"),
        (lambda: instahide(1, num_classes=3), "num_mixed must be a whole number"),
        (lambda: instahide(num_classes=0), "num_classes must be a whole number"),
        (lambda: instahide(num_classes=3, max_weight=0.25), "max_weight must lie in"),
        (lambda: instahide(num_classes=3, max_weight=1.5), "max_weight must lie in"),
        (lambda: instahide(num_classes=3, num_private=2), "leaves a rest for public images"),
        (lambda: instahide(num_classes=3, public=PUBLIC, num_private=5), "one of 1 to 4, got 5"),
        (lambda: instahide(num_classes=3, public=PUBLIC, min_private=0.6), "min_private must lie"),
        (lambda: instahide(num_classes=3, public=PUBLIC[:0]), "public holds no images"),
        (lambda: instahide(num_classes=3, input_range=(1.0, 0.0)), "input_range must be"),
    ],
)
def test_settings_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_public_images_of_another_shape_are_refused(params):
    with pytest.raises(ValueError, match=r"batch's shape \(5, 5, 1\), got \(4, 5, 1\)"):
        prepared(instahide(num_classes=SIZE, public=PUBLIC[:, 1:]), 0, params)
