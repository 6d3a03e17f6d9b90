"""The scores of ATS in closed form, and the search over policies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import invjax
from invjax import datasets
from invjax.base import Model
from invjax.defenses.augmentation import POOL, ats, augment, policy_text
from invjax.defenses.policy_search import accuracy_score, privacy_score, search_policies
from invjax.models.adapters import from_apply

RIDGE = 1e-5


PRIVACY = jax.jit(privacy_score, static_argnames=("model", "transform", "num_bins", "input_range"))
ACCURACY = jax.jit(accuracy_score, static_argnames=("model", "transform"))


def unchanged(key, inputs):
    return inputs


def eigen_score(eigenvalues):
    eigenvalues = np.asarray(eigenvalues, float) + RIDGE
    return -np.sum(np.log(eigenvalues) + 1 / eigenvalues)


def gradient_is_the_input():
    """Two tensors whose gradients are the input, and the input's square."""

    def loss(params, batch):
        flat = batch.inputs.reshape(batch.inputs.shape[0], -1)
        return jnp.mean(flat @ params["a"] + jnp.square(flat) @ params["b"])

    return Model(lambda key, shape: None, lambda params, inputs: inputs, loss, num_classes=2)


@pytest.mark.parametrize("num_bins", [1, 20])
def test_privacy_is_the_area_under_the_cosine(key, num_bins):
    model = gradient_is_the_input()
    params = {"a": jnp.zeros(12), "b": jnp.zeros(12)}
    inputs = jax.random.uniform(key, (3, 2, 2, 3), minval=-2.0, maxval=4.0)
    score = PRIVACY(
        model,
        params,
        inputs,
        jnp.zeros(3, int),
        lambda key, x: -x,
        key,
        num_bins=num_bins,
        input_range=(-2.0, (4.0, 5.0, 6.0)),
    )
    low, high = np.full(3, -2.0), np.array([4.0, 5.0, 6.0])
    uniform = jax.random.uniform(jax.random.split(key)[1], inputs.shape)
    noise = (low + (high - low) * np.asarray(uniform, float)).reshape(3, -1)
    target = -np.asarray(inputs, float).reshape(3, -1)
    areas = []
    for start, end in zip(noise, target, strict=True):
        path = [share * end + (1 - share) * start for share in np.linspace(0, 1, num_bins + 1)]
        cosines = [
            np.mean(
                [
                    np.sum(x**power * end**power)
                    / np.linalg.norm(x**power)
                    / np.linalg.norm(end**power)
                    for power in (1, 2)
                ]
            )
            for x in path
        ]
        areas.append(np.trapezoid(cosines, dx=1 / num_bins))
    np.testing.assert_allclose(score, np.mean(areas), atol=1e-5)


def test_privacy_of_a_gradient_that_never_turns_is_one_and_of_none_is_zero(key):
    inputs = jnp.ones((2, 4))
    for slope, expected in ((1.0, 1.0), (0.0, 0.0)):
        model = Model(
            lambda key, shape: None,
            lambda params, inputs: inputs,
            lambda params, batch, slope=slope: slope * jnp.sum(params["a"]) * jnp.sum(batch.labels),
            num_classes=2,
        )
        score = PRIVACY(model, {"a": jnp.ones(3)}, inputs, jnp.ones(2), unchanged, key)
        np.testing.assert_allclose(score, expected, atol=1e-6)


def quadratic():
    """Whose input Jacobian, summed over the logits, is the input itself."""
    return from_apply(
        lambda params, x: jnp.stack([jnp.sum(jnp.square(x), axis=-1)] * 2, axis=-1) / 4,
        lambda key, shape: None,
        2,
    )


def images_of_correlation(correlation):
    """Centred rows with these correlations."""
    root = np.linalg.cholesky(correlation)
    basis = np.linalg.qr(np.eye(8) - 1 / 8)[0][:, : len(correlation)]
    return jnp.asarray(3.0 + 2.0 * root @ basis.T, jnp.float32)


@pytest.mark.parametrize("rho", [0.0, 0.6, -0.9])
def test_accuracy_of_known_correlations(key, rho):
    inputs = images_of_correlation(np.array([[1, rho], [rho, 1]]))
    score = ACCURACY(quadratic(), None, inputs, jnp.arange(2), unchanged, key)
    np.testing.assert_allclose(score, eigen_score([1 + rho, 1 - rho]), rtol=1e-4)


def test_accuracy_sees_the_transformed_images(key):
    inputs = images_of_correlation(np.array([[1, 0.5], [0.5, 1]]))

    def transform(key, x):
        return x.at[1].set(2 * x[1] - x[0])

    # Of unit rows with correlation a half, 2b - a is orthogonal to a.
    score = ACCURACY(quadratic(), None, inputs, None, transform, key)
    np.testing.assert_allclose(score, eigen_score([1, 1]), rtol=1e-4)


def test_accuracy_of_a_linear_model_is_the_least_there_is(key):
    """Every image has the same Jacobian: one eigenvalue is N and the others are zero."""
    model = invjax.models.mlp((), num_classes=3)
    params = model.init(key, (10,))
    inputs = jax.random.normal(key, (5, 10))
    score = ACCURACY(model, params, inputs, None, unchanged, key)
    # Rounding moves a zero eigenvalue by a few 1e-7, a few hundredths of the ridge.
    np.testing.assert_allclose(score, eigen_score([5, 0, 0, 0, 0]), rtol=0.1)


def test_only_the_first_image_of_every_class_counts(key):
    correlation = np.array([[1, 0.3, 0.8, 0.2], [0.3, 1, 0.1, 0.4], [0.8, 0.1, 1, 0.5]])
    correlation = np.vstack([correlation, [0.2, 0.4, 0.5, 1]])
    inputs = images_of_correlation(correlation)
    model = quadratic()
    score = ACCURACY(model, None, inputs, jnp.array([7, 7, 2, 7]), unchanged, key)
    np.testing.assert_allclose(score, eigen_score([1.8, 0.2]), rtol=1e-4)
    every = ACCURACY(model, None, inputs, None, unchanged, key)
    np.testing.assert_allclose(every, eigen_score(np.linalg.eigvalsh(correlation)), rtol=1e-4)


DATA = datasets.digits()
INPUTS, LABELS = jnp.asarray(DATA.inputs[:60]), jnp.asarray(DATA.labels[:60])
MODEL = invjax.models.mlp((64,))
SETTINGS = {"num_candidates": 24, "num_images": 2, "num_accuracy_images": 20, "num_runs": 2}


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0), (8, 8, 1))


@pytest.fixture(scope="module")
def found(params):
    key = jax.random.key(0)
    return search_policies(key, MODEL, params, INPUTS, LABELS, threshold=-45.0, **SETTINGS)


def test_privacy_ranks_a_strong_transform_by_what_it_brings_in(params, key):
    """Into black it is safer than none, as published; into the grey of the noise's mean it is not."""

    @jax.jit
    def score(policy, fill):
        def transform(key, x):
            return augment(key, x, policy, crop_padding=0, flip=False, fill=fill)

        return privacy_score(MODEL, params, INPUTS, LABELS, transform, key)

    none, strong = jnp.array([-1, -1, -1]), jnp.array([21, 13, 3])
    identity, into_black, into_grey = score(none, 0.0), score(strong, 0.0), score(strong, 0.5)
    plain = PRIVACY(MODEL, params, INPUTS, LABELS, unchanged, key)
    np.testing.assert_allclose(identity, plain, atol=2e-3)
    assert into_black < identity - 0.05 < identity + 0.02 < into_grey


def test_search_scores_and_sorts(found):
    assert found.policies.shape == (24, 3) and found.privacy.shape == (24,)
    assert found.policies.min() == -1 and 40 < found.policies.max() < len(POOL)
    np.testing.assert_array_equal(found.accepted, found.accuracy >= -45.0)
    accepted = int(found.accepted.sum())
    assert 0 < accepted < 24 and found.accepted[:accepted].all()
    for part in (found.privacy[:accepted], found.privacy[accepted:]):
        assert (jnp.diff(part) >= 0).all()
    # Ten classes, some of them absent: no score is above minus the number of images that count.
    assert found.accuracy.max() <= -7
    best = ats(policy_text(found.policies[0]))
    assert repr(best).startswith("ats('")


def test_a_candidates_scores_are_the_two_functions(found, params):
    """Recomputed from the documented draws, for the candidate at the top."""
    draw, privacy, accuracy, scores = jax.random.split(jax.random.key(0), 4)
    candidates = jax.random.randint(draw, (24, 3), -1, len(POOL))
    assert sorted(map(tuple, candidates.tolist())) == sorted(map(tuple, found.policies.tolist()))
    transform = jax.jit(functools.partial(augment, policy=found.policies[0]))
    victims = jax.random.choice(privacy, 60, (2,), replace=False)
    expected = PRIVACY(MODEL, params, INPUTS[victims], LABELS[victims], transform, scores)
    np.testing.assert_allclose(found.privacy[0], expected, atol=1e-5)
    runs = []
    for draw, key in zip(jax.random.split(accuracy, 2), jax.random.split(scores, 2), strict=True):
        chosen = jax.random.choice(draw, 60, (20,), replace=False)
        images, classes = INPUTS[chosen], LABELS[chosen]
        runs.append(ACCURACY(MODEL, params, images, classes, transform, key))
    np.testing.assert_allclose(found.accuracy[0], np.mean(runs), rtol=1e-3)


def test_search_takes_the_accuracy_of_other_parameters(found, params):
    other = MODEL.init(jax.random.key(9), (8, 8, 1))
    key = jax.random.key(0)
    moved = search_policies(
        key, MODEL, params, INPUTS, LABELS, initial_params=other, threshold=-1e9, **SETTINGS
    )
    assert moved.accepted.all()
    np.testing.assert_array_equal(moved.privacy, jnp.sort(found.privacy))
    assert (jnp.sort(moved.accuracy) != jnp.sort(found.accuracy)).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_candidates": 0}, "num_candidates must be a whole number of at least 1, got 0"),
        ({"num_transforms": 1.5}, "num_transforms must be a whole number"),
        ({"num_images": 31}, "num_images is 31, but there are 30 images"),
        ({"num_accuracy_images": 100}, "num_accuracy_images is 100, but there are 30"),
        ({"input_range": (0.0,)}, "input_range must be"),
    ],
)
def test_settings_are_checked(params, key, settings, message):
    with pytest.raises(ValueError, match=message):
        search_policies(key, MODEL, params, INPUTS[:30], LABELS[:30], **settings)


def test_bins_are_checked(params, key):
    with pytest.raises(ValueError, match="num_bins must be a whole number of at least 1, got 0"):
        privacy_score(MODEL, params, INPUTS, LABELS, unchanged, key, num_bins=0)
