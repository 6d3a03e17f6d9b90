"""Every defence against its own channel: what `update` does must follow what `law` says."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from invjax import defenses
from invjax.defenses.densities import Noise, log_density

GRADIENT = {"a": np.linspace(-1.0, 1.4, 12).reshape(3, 4), "b": np.array([0.3, -0.7, 0.05])}

AGGREGATE = {
    "gaussian": "gaussian_noise(0.3)",
    "laplace": "laplace_noise(0.3)",
    "gaussian_laplace": "gaussian_noise(0.2),laplace_noise(0.3)",
    "global_clip": "global_clip(1.0)",
    "global_clip_gaussian": "global_clip(1.0),gaussian_noise(0.2)",
    "prune_tensor": "magnitude_prune(0.5)",
    "prune_global": "magnitude_prune(0.5, 'global')",
    "prune_gaussian": "magnitude_prune(0.5),gaussian_noise(0.2)",
    "gaussian_prune": "gaussian_noise(0.2),magnitude_prune(0.5)",
    "known_mask": "random_mask(0.4)",
    "known_mask_gaussian": "random_mask(0.4),gaussian_noise(0.2)",
    "unknown_mask": "random_mask(0.4, known=False)",
    "unknown_mask_gaussian": "random_mask(0.4, known=False),gaussian_noise(0.2)",
    "dropout": "gradient_dropout(0.4)",
    "dropout_gaussian": "gradient_dropout(0.4),gaussian_noise(0.2)",
    "gaussian_dropout": "gaussian_noise(0.2),gradient_dropout(0.4)",
    "sign": "sign_compress()",
    "sign_mean": "sign_compress('mean')",
    "gaussian_sign": "gaussian_noise(0.3),sign_compress()",
    "sign_gaussian": "sign_compress(),gaussian_noise(0.3)",
    "quantize": "quantize(4)",
    "quantize_stochastic": "quantize(4, stochastic=True)",
    "gaussian_quantize": "gaussian_noise(0.2),quantize(4)",
    "gaussian_quantize_stochastic": "gaussian_noise(0.2),quantize(4, stochastic=True)",
    "quantize_gaussian": "quantize(4),gaussian_noise(0.2)",
    "quantize_stochastic_gaussian": "quantize(4, stochastic=True),gaussian_noise(0.2)",
    "laplace_sign": "laplace_noise(0.3),sign_compress()",
    "laplace_quantize": "laplace_noise(0.2),quantize(5)",
    "mask_gaussian_sign": "random_mask(0.4, known=False),gaussian_noise(0.3),sign_compress()",
    "gaussian_sign_gaussian": "gaussian_noise(0.3),sign_compress(),gaussian_noise(0.3)",
    "gaussian_quantize_gaussian": "gaussian_noise(0.2),quantize(4),gaussian_noise(0.2)",
    "prune_laplace": "magnitude_prune(0.5),laplace_noise(0.2)",
}
PER_SAMPLE = {
    "clip": "clip_per_sample(0.8)",
    "clip_gaussian": "clip_per_sample(0.8),gaussian_noise(0.2)",
    "per_sample_gaussian": "gaussian_noise(0.3, per_sample=True)",
    "per_sample_gaussian_clip": "gaussian_noise(0.1, per_sample=True),clip_per_sample(0.8)",
    "dp_sgd": "dp_sgd(0.8, 0.5)",
    "dp_sgd_mean": "dp_sgd(0.8, 0.5, 'mean')",
}
ALL = {**AGGREGATE, **PER_SAMPLE}


def private(name):
    """A gradient of the stage that the defence wants."""
    tree = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), GRADIENT)
    if name in AGGREGATE:
        return tree
    return jax.tree.map(lambda leaf: jnp.stack([leaf, 0.3 * leaf[::-1], -0.5 * leaf]), tree)


def sample(defense, gradient, key):
    """`(observation, public randomness)` of one fresh draw."""
    params = gradient
    if defense.stage == "per_sample":
        params = jax.tree.map(lambda leaf: leaf[0], gradient)
    state = defense.init_with_key(key, params)
    observed, _ = defense.update(gradient, state)
    return observed, defense.public(state)


def draws(text, name, number=4000):
    """Many independent observations, as `{leaf: [number, ...]}`."""
    defense = defenses.parse(text)
    keys = jax.random.split(jax.random.key(1), number)
    gradient = private(name)
    return jax.jit(jax.vmap(lambda key: sample(defense, gradient, key)[0]))(keys)


@pytest.mark.parametrize("name", ALL)
def test_true_gradient_maximises_expected_log_likelihood(name):
    defense, gradient = defenses.parse(ALL[name]), private(name)
    keys = jax.random.split(jax.random.key(2), 500)
    bumps = jax.random.split(jax.random.key(3), 12)

    def score(key, candidate):
        observed, public = sample(defense, gradient, key)
        return defense.log_likelihood(observed, candidate, public, slack=0.05)

    def perturbed(bump):
        noise = jax.random.normal(bump, (100,)) * 0.4
        return jax.tree.map(lambda leaf: leaf + noise[: leaf.size].reshape(leaf.shape), gradient)

    candidates = jax.tree.map(lambda *leaves: jnp.stack(leaves), gradient, *map(perturbed, bumps))
    scores = jax.jit(jax.vmap(jax.vmap(score, in_axes=(0, None)), in_axes=(None, 0)))(
        keys, candidates
    )
    means = np.asarray(scores, np.float64).mean(axis=1)
    assert np.isfinite(means).all()
    assert (means[0] >= means[1:] - 1e-4 * abs(means[0])).all(), means
    assert means[0] > means[1:].mean()


@pytest.mark.parametrize(
    "name",
    [
        "gaussian",
        "gaussian_laplace",
        "prune_gaussian",
        "gaussian_prune",
        "known_mask_gaussian",
        "unknown_mask_gaussian",
        "dropout_gaussian",
        "gaussian_dropout",
        "gaussian_sign",
        "laplace_sign",
        "mask_gaussian_sign",
        "gaussian_sign_gaussian",
        "gaussian_quantize",
        "gaussian_quantize_stochastic",
        "laplace_quantize",
        "per_sample_gaussian",
    ],
)
def test_the_likelihood_tells_the_scale(name):
    """A channel whose law had the wrong scale or noise would prefer a longer or shorter gradient."""
    defense, gradient = defenses.parse(ALL[name]), private(name)
    scales = jnp.asarray([1.0, 0.8, 1.25])

    def score(key):
        observed, public = sample(defense, gradient, key)

        def one(scale):
            candidate = jax.tree.map(lambda leaf: leaf * scale, gradient)
            return defense.log_likelihood(observed, candidate, public)

        return jax.vmap(one)(scales)

    scores = np.asarray(jax.jit(jax.vmap(score))(jax.random.split(jax.random.key(6), 10_000)))
    for column in (1, 2):
        gain = np.asarray(scores[:, 0] - scores[:, column], np.float64)
        assert gain.mean() > 3 * gain.std() / gain.size**0.5


@pytest.mark.parametrize("name", ALL)
def test_log_likelihood_has_a_finite_gradient(name):
    defense, gradient = defenses.parse(ALL[name]), private(name)

    def slopes(key):
        observed, public = sample(defense, gradient, key)
        points = jax.tree.map(
            lambda leaf: jnp.stack([leaf, 0.8 * leaf + 0.03, 0 * leaf, 1e4 * leaf]), gradient
        )
        return jax.vmap(jax.grad(lambda c: defense.log_likelihood(observed, c, public)))(points)

    chex.assert_tree_all_finite(jax.jit(slopes)(jax.random.key(4)))


@pytest.mark.parametrize(
    "name",
    [
        "gaussian",
        "laplace",
        "gaussian_laplace",
        "gaussian_prune",
        "unknown_mask_gaussian",
        "gaussian_sign",
        "gaussian_quantize",
        "clip_gaussian",
        "dp_sgd",
    ],
)
def test_gradient_of_log_likelihood_against_finite_differences(name):
    with jax.enable_x64(True):
        defense = defenses.parse(ALL[name])
        gradient = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), private(name))
        observed, public = sample(defense, gradient, jax.random.key(5))
        candidate = jax.tree.map(lambda leaf: 0.9 * leaf + 0.021, gradient)

        @jax.jit
        def value(candidate):
            return defense.log_likelihood(observed, candidate, public, slack=0.05)

        slope = jax.jit(jax.grad(value))(candidate)
        direction = jax.tree.map(
            lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape),
            gradient,
        )
        step = 1e-6
        up, down = (
            value(jax.tree.map(lambda c, d, s=s: c + s * step * d, candidate, direction))
            for s in (1, -1)
        )
        expected = sum(
            jnp.vdot(a, b)
            for a, b in zip(jax.tree.leaves(slope), jax.tree.leaves(direction), strict=True)
        )
        np.testing.assert_allclose((up - down) / (2 * step), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "law"),
    [
        ("gaussian", stats.norm(scale=0.3)),
        ("laplace", stats.laplace(scale=0.3)),
        ("per_sample_gaussian", stats.norm(scale=0.3 / 3**0.5)),
        ("dp_sgd", stats.norm(scale=0.8 * 0.5 / 3)),
        ("dp_sgd_mean", stats.norm(scale=0.8 * 0.5)),
        ("clip_gaussian", stats.norm(scale=0.2)),
    ],
)
def test_noise_follows_its_law(name, law):
    samples = draws(ALL[name], name)
    defense, gradient = defenses.parse(ALL[name]), private(name)
    location = defense.law(jax.tree.map(lambda leaf: leaf[0], samples), gradient).location
    residuals = np.concatenate(
        [
            np.ravel(np.asarray(s) - np.asarray(m))
            for s, m in zip(jax.tree.leaves(samples), jax.tree.leaves(location), strict=True)
        ]
    )
    assert abs(residuals.mean()) < 5 * law.std() / residuals.size**0.5
    np.testing.assert_allclose(residuals.std(), law.std(), rtol=0.02)
    assert stats.kstest(residuals[:20000], law.cdf).pvalue > 1e-3


def test_mixed_noise_follows_the_normal_laplace_density():
    samples = draws(ALL["gaussian_laplace"], "gaussian_laplace")
    residuals = np.ravel(np.asarray(samples["a"]) - GRADIENT["a"])
    grid = np.linspace(-6, 6, 4001)
    density = np.exp(np.asarray(log_density(Noise(0.2, 0.3), jnp.asarray(grid))))
    np.testing.assert_allclose(np.trapezoid(density, grid), 1.0, atol=1e-4)
    cdf = integrate.cumulative_trapezoid(density, grid, initial=0)
    assert stats.kstest(residuals[:20000], lambda x: np.interp(x, grid, cdf)).pvalue > 1e-3


def test_gaussian_then_sign_has_the_probability_of_its_sign():
    samples = draws(ALL["gaussian_sign"], "gaussian_sign")
    up = np.asarray(samples["a"] > 0).mean(axis=0)
    np.testing.assert_allclose(up, stats.norm.cdf(GRADIENT["a"] / 0.3), atol=5 * 0.5 / 4000**0.5)


def test_stochastic_rounding_is_unbiased_and_on_the_grid():
    samples = draws(ALL["quantize_stochastic"], "quantize_stochastic")
    step = np.abs(GRADIENT["a"]).max() / 7
    np.testing.assert_allclose(samples["a"].mean(axis=0), GRADIENT["a"], atol=5 * step / 4000**0.5)
    ratio = np.asarray(samples["a"]) / step
    np.testing.assert_allclose(ratio, np.round(ratio), atol=1e-4)


@pytest.mark.parametrize("name", ["dropout", "known_mask", "unknown_mask"])
def test_masks_keep_their_share(name):
    samples = draws(ALL[name], name)
    kept = np.asarray(samples["a"] != 0).mean()
    assert abs(kept - 0.6) < 5 * 0.5 / (4000 * 12) ** 0.5
    scale = 1 / 0.6 if name == "dropout" else 1.0
    survivors = np.where(samples["a"] != 0, samples["a"], np.nan)
    np.testing.assert_allclose(np.nanmean(survivors, axis=0), GRADIENT["a"] * scale, rtol=1e-4)


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_pruning_keeps_the_largest(scope):
    observed, _ = sample(
        defenses.magnitude_prune(0.5, scope), private("gaussian"), jax.random.key(0)
    )
    if scope == "tensor":
        assert [int((leaf != 0).sum()) for leaf in jax.tree.leaves(observed)] == [6, 2]
    else:
        everything = np.concatenate([np.ravel(leaf) for leaf in GRADIENT.values()])
        threshold = np.sort(np.abs(everything))[7]
        kept = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(observed)]) != 0
        np.testing.assert_array_equal(kept, np.abs(everything) >= threshold - 1e-7)


@pytest.mark.parametrize(
    "text",
    [
        "gaussian_noise(1.0)",
        "laplace_noise(1.0)",
        "gradient_dropout(0.5)",
        "gaussian_noise(1.0, per_sample=True)",
    ],
)
def test_noise_of_leaves_samples_steps_and_stages_is_uncorrelated(text):
    size = 20_000
    tree = {"a": jnp.ones(size), "b": jnp.ones(size)}
    defense = defenses.parse(text)
    twice = defenses.chain(defense, defense)
    if defense.stage == "per_sample":
        # The two samples' own noise, told apart by their difference and their sum.
        tree = jax.tree.map(lambda leaf: leaf[None], tree)
    state = defense.init(tree)
    first, state = defense.update(tree, state)
    second, _ = defense.update(tree, state)
    stages = [
        stage.init(jax.random.fold_in(jax.random.key(0), i), tree)
        for i, stage in enumerate(twice.stages)
    ]
    alone = [
        stage.update(tree, part, 1)[0] for stage, part in zip(twice.stages, stages, strict=True)
    ]
    columns = [first["a"], first["b"], second["a"], second["b"], alone[0]["a"], alone[1]["a"]]
    columns = np.stack([np.ravel(column) for column in columns])
    correlation = np.corrcoef(columns)
    assert np.abs(correlation - np.eye(6)).max() < 5 / size**0.5


def test_samples_get_their_own_noise():
    size = 20_000
    stage = defenses.gaussian_noise(1.0, per_sample=True).stages[0]
    tree = {"a": jnp.zeros((2, size))}
    noise, _ = stage.update(tree, stage.init(jax.random.key(0), tree), 2)
    assert abs(np.corrcoef(np.asarray(noise["a"]))[0, 1]) < 5 / size**0.5
