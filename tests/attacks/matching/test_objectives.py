"""Data terms and priors against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import invjax
from invjax import priors
from invjax.attacks import likelihoods, objectives
from invjax.attacks.matching.priors import Context, project_to_box
from invjax.base import Facts, Observation

A = {"w": jnp.array([[1.0, -2.0], [0.5, 0.0]]), "b": jnp.array([3.0, 1.0])}
B = {"w": jnp.array([[0.0, 1.0], [0.5, 2.0]]), "b": jnp.array([1.0, -1.0])}
FACTS = Facts(input_shape=(6, 6, 1), num_classes=2, batch_size=1)
OBSERVED = Observation(params=B, gradient=B, facts=FACTS)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def test_distances():
    a, b = flat(A), flat(B)
    cosine = 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    expected = {
        objectives.squared_l2(): ((a - b) ** 2).sum(),
        objectives.l1(): abs(a - b).sum(),
        objectives.squared_l2_and_l1(0.5): ((a - b) ** 2).sum() + 0.5 * abs(a - b).sum(),
        objectives.cosine(): cosine,
        likelihoods.gaussian(0.5): ((a - b) ** 2).sum() / 0.5,
        likelihoods.laplace(0.5): abs(a - b).sum() / 0.5,
    }
    for objective, value in expected.items():
        np.testing.assert_allclose(objective.value(A, OBSERVED), value, rtol=1e-6)
    each = sum(
        1 - flat(x) @ flat(y) / np.linalg.norm(x) / np.linalg.norm(y)
        for x, y in ((A["w"].ravel(), B["w"].ravel()), (A["b"], B["b"]))
    )
    np.testing.assert_allclose(objectives.cosine_per_layer().value(A, OBSERVED), each, rtol=1e-6)


def test_layer_weights():
    weights = {"w": 0.0, "b": 2.0}
    np.testing.assert_allclose(objectives.squared_l2(weights).value(A, OBSERVED), 2 * 8.0)
    np.testing.assert_allclose(objectives.l1(weights).value(A, OBSERVED), 2 * 4.0)
    only = 1 - 2.0 / np.linalg.norm(A["b"]) / np.linalg.norm(B["b"])
    np.testing.assert_allclose(objectives.cosine(weights).value(A, OBSERVED), only, rtol=1e-6)


def test_matched_likelihood_of_gaussian_noise_is_squared_l2():
    matched = objectives.matched(invjax.defenses.gaussian_noise(0.3))
    plain = likelihoods.gaussian(0.3)
    slopes = [jax.grad(lambda a, o=o: o.value(a, OBSERVED))(A) for o in (matched, plain)]
    np.testing.assert_allclose(flat(slopes[0]), flat(slopes[1]), rtol=1e-5)
    assert matched.stage == "aggregate"
    assert objectives.matched(invjax.defenses.clip_per_sample(1.0)).stage == "per_sample"


def test_matched_likelihood_of_laplace_noise_is_l1():
    matched = objectives.matched(invjax.defenses.laplace_noise(0.3))
    plain = likelihoods.laplace(0.3)
    values = [o.value(A, OBSERVED) - o.value(B, OBSERVED) for o in (matched, plain)]
    np.testing.assert_allclose(values[0], values[1], rtol=1e-5)


@pytest.mark.parametrize("objective", [objectives.cosine(), objectives.cosine_per_layer()])
def test_cosine_of_a_zero_gradient_is_finite(objective):
    zero = jax.tree.map(jnp.zeros_like, A)
    value, slope = jax.value_and_grad(objective.value)(zero, OBSERVED)
    assert np.isfinite(value) and np.isfinite(flat(slope)).all()


@pytest.mark.parametrize("objective", [objectives.cosine(), objectives.cosine_per_layer()])
def test_cosine_does_not_see_lengths(objective):
    """A trained network's gradients are small; so are federated updates."""
    small = OBSERVED._replace(gradient=jax.tree.map(lambda leaf: 1e-9 * leaf, B))
    expected = objective.value(A, OBSERVED)
    for factor in (1.0, 1e-9):
        candidate = jax.tree.map(lambda leaf, factor=factor: factor * leaf, A)
        np.testing.assert_allclose(objective.value(candidate, small), expected, rtol=1e-5)


IMAGE = jnp.arange(36.0).reshape(1, 6, 6, 1) ** 1.5 / 100
CONTEXT = Context(OBSERVED, group=jnp.zeros((1, 6, 6, 1)))


def test_total_variation():
    x = np.asarray(IMAGE)[0, :, :, 0]
    down, right = np.diff(x, axis=0), np.diff(x, axis=1)
    value = priors.total_variation(2.0)(IMAGE, CONTEXT)
    np.testing.assert_allclose(value, 2 * (abs(down).mean() + abs(right).mean()), rtol=1e-5)
    value = priors.total_variation(1.0, "squared")(IMAGE, CONTEXT)
    np.testing.assert_allclose(value, (down**2).sum() + (right**2).sum(), rtol=1e-5)
    length = np.sqrt(down[:, :5] ** 2 + right[:5] ** 2)
    value = priors.total_variation(1.0, "isotropic")(IMAGE, CONTEXT)
    np.testing.assert_allclose(value, length.mean(), rtol=1e-4)
    wrapped = (x - np.roll(x, 1, 0)) ** 2 + (x - np.roll(x, 1, 1)) ** 2
    value = priors.total_variation(1.0, "squared", periodic=True)(IMAGE, CONTEXT)
    np.testing.assert_allclose(value, wrapped.sum(), rtol=1e-5)


def test_total_variation_of_any_channels_and_of_constants():
    for channels in (1, 2, 3):
        constant = jnp.full((2, 6, 6, channels), 0.3)
        assert priors.total_variation(1.0)(constant, CONTEXT) == 0
        slope = jax.grad(lambda x: priors.total_variation(1.0, "isotropic")(x, CONTEXT))(constant)
        assert np.isfinite(slope).all()


def test_other_priors():
    assert priors.uniform()(IMAGE, CONTEXT) == 0
    np.testing.assert_allclose(
        priors.l2(3.0)(IMAGE, CONTEXT), 3 * np.mean(np.asarray(IMAGE) ** 2), rtol=1e-6
    )
    outside = np.maximum(np.asarray(IMAGE) - 1, 0)
    np.testing.assert_allclose(priors.box(2.0)(IMAGE, CONTEXT), 2 * (outside**2).sum(), rtol=1e-5)
    np.testing.assert_allclose(
        priors.group_consistency(2.0)(IMAGE, CONTEXT),
        2 * np.mean(np.asarray(IMAGE) ** 2),
        rtol=1e-5,
    )
    both = priors.combine(priors.l2(1.0), priors.l2(2.0))
    np.testing.assert_allclose(both(IMAGE, CONTEXT), priors.l2(3.0)(IMAGE, CONTEXT), rtol=1e-6)


def test_gaussian_prior():
    mean = jnp.linspace(0, 1, 36)
    factor = jax.random.normal(jax.random.key(0), (36, 36))
    precision = factor @ factor.T
    centered = np.ravel(IMAGE) - np.asarray(mean)
    expected = 0.5 * centered @ np.asarray(precision) @ centered
    np.testing.assert_allclose(
        priors.gaussian(mean, precision)(IMAGE, CONTEXT), expected, rtol=1e-4
    )


def test_patch_border():
    blocks = jnp.kron(jnp.array([[1.0, 2.0], [3.0, 5.0]]), jnp.ones((3, 3)))[None, :, :, None]
    assert priors.patch_border(1.0, 3)(blocks, CONTEXT) > 1
    np.testing.assert_allclose(priors.patch_border(1.0, 6)(blocks, CONTEXT), 0, atol=1e-5)


def test_batch_norm_statistics():
    model = invjax.models.resnet18(width=8, norm="batch")
    params = model.init(jax.random.key(0), (8, 8, 1))
    images = jax.random.uniform(jax.random.key(1), (3, 8, 8, 1))
    prior = priors.batch_norm_statistics(model, 1.0, first_weight=10.0)
    observation = Observation(params, params, FACTS, statistics=model.statistics(params, images))
    right = prior(images, Context(observation, images))
    wrong = prior(images[::-1] * 0.5, Context(observation, images))
    assert right < 1e-3 < wrong
    with pytest.raises(ValueError, match="no batch norm"):
        priors.batch_norm_statistics(invjax.models.mlp(), 1.0)


def test_box_per_channel():
    facts = Facts(input_shape=(2, 2, 2), num_classes=2, input_range=((0.0, -1.0), (1.0, 3.0)))
    inputs = jnp.stack([jnp.full((1, 2, 2), -5.0), jnp.full((1, 2, 2), 5.0)], axis=-1)
    projected = project_to_box(inputs, Observation(None, None, facts))
    np.testing.assert_array_equal(projected[0, 0, 0], [0.0, 3.0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: priors.total_variation(1.0, "smooth"),
        lambda: priors.total_variation(1.0)(jnp.ones((2, 5)), CONTEXT),
        lambda: priors.total_variation(1.0)(jnp.ones((2, 1, 5, 3)), CONTEXT),
        lambda: priors.l2(-1.0),
        lambda: objectives.squared_l2_and_l1(-1.0),
        lambda: objectives.matched(invjax.chain(), slack=0.0),
        lambda: priors.gaussian(jnp.ones(4), jnp.eye(4))(jnp.ones((2, 5)), CONTEXT),
        lambda: priors.gaussian(jnp.ones(1), jnp.eye(1))(jnp.ones((2, 5)), CONTEXT),
        lambda: priors.gaussian(jnp.ones(3), jnp.ones((2, 2))),
        lambda: priors.patch_border(1.0, 0),
    ],
)
def test_errors(make):
    with pytest.raises(ValueError, match=r"got"):
        make()
