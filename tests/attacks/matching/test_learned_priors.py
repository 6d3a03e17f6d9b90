"""Fitted priors: densities against SciPy, the evidence lower bound against quadrature, digits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import trapezoid
from scipy.special import expit, logsumexp, ndtri
from scipy.stats import multivariate_normal, norm
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.mixture import GaussianMixture

import invjax
from invjax import attacks, datasets, defenses, metrics, models
from invjax.attacks.matching import learned_priors as learned
from invjax.attacks.matching import priors
from invjax.attacks.matching.priors import Context
from invjax.base import Facts, Observation

SHAPE = (2, 2, 1)
SIZE, CLASSES = 4, 3
RNG = np.random.default_rng(0)
ROOTS = RNG.normal(size=(CLASSES, SIZE, SIZE))
COVARIANCES = ROOTS @ ROOTS.transpose(0, 2, 1) + 0.1 * np.eye(SIZE)
MEANS = 2 * RNG.normal(size=(CLASSES, SIZE))
PROPORTIONS = np.array([0.2, 0.5, 0.3])
SAMPLES = RNG.normal(size=(60, *SHAPE)) + RNG.normal(size=SHAPE)
LABELS = np.arange(60) % CLASSES
INPUTS = RNG.normal(size=(3, *SHAPE))
SOFT = RNG.dirichlet(np.ones(CLASSES), size=3)


def context(labels=None, num_classes=CLASSES):
    facts = Facts(input_shape=SHAPE, num_classes=num_classes)
    return Context(Observation(None, None, facts), group=jnp.zeros(SHAPE), labels=labels)


@functools.cache
def small_vae():
    inputs = jax.random.uniform(jax.random.key(3), (50, *SHAPE))
    return learned.train_vae(
        jax.random.key(0), inputs, latent=2, hidden=9, num_steps=20, batch_size=10
    )


# Every density at a weight; the other fits return these, and are compared with SciPy below.
ROWS = {
    "fit_gaussian": lambda weight: learned.fit_gaussian(SAMPLES, weight),
    "gaussian_mixture": lambda weight: learned.gaussian_mixture(
        PROPORTIONS, MEANS, COVARIANCES, weight
    ),
    "class_conditional": lambda weight: learned.class_conditional(MEANS, COVARIANCES, weight),
    "vae": lambda weight: learned.vae(small_vae(), weight),
}
EVERY = pytest.mark.parametrize("name", ROWS)
KNOWN = context(jnp.array([2, 0, 1]))


@EVERY
def test_scalars_under_jit_and_vmap(name):
    prior = ROWS[name](0.3)
    victims = jax.random.uniform(jax.random.key(1), (2, 3, *SHAPE))
    run = jax.jit(jax.vmap(jax.value_and_grad(prior), in_axes=(0, None)))
    for value, slope, inputs in zip(*run(victims, KNOWN), victims, strict=True):
        plain, plain_slope = jax.value_and_grad(prior)(inputs, KNOWN)
        assert plain.shape == () and plain.dtype == plain_slope.dtype == jnp.float32
        np.testing.assert_allclose(value, plain, rtol=1e-5)
        np.testing.assert_allclose(slope, plain_slope, rtol=1e-4, atol=1e-5)


@EVERY
def test_the_weight_is_a_factor(name):
    inputs = jnp.asarray(INPUTS, jnp.float32)
    one, three = (ROWS[name](weight)(inputs, KNOWN) for weight in (1.0, 3.0))
    np.testing.assert_allclose(three, 3 * one, rtol=1e-5)
    assert one != 0 and ROWS[name](0.0)(inputs, KNOWN) == 0
    traced = jax.jit(lambda weight: ROWS[name](weight)(inputs, KNOWN))(3.0)
    np.testing.assert_allclose(traced, three, rtol=1e-5)


@EVERY
def test_a_batch_is_the_sum_of_its_samples_in_any_order(name):
    prior, inputs = ROWS[name](1.0), jnp.asarray(INPUTS, jnp.float32)
    whole = prior(inputs, KNOWN)
    each = [prior(inputs[i, None], context(KNOWN.labels[i, None])) for i in range(3)]
    np.testing.assert_allclose(whole, sum(each), rtol=1e-5)
    back = prior(inputs[::-1], context(KNOWN.labels[::-1]))
    np.testing.assert_allclose(whole, back, rtol=1e-5)


@EVERY
def test_slopes_are_finite_far_from_all_data(name):
    prior = ROWS[name](1.0)
    with jax.debug_nans(True):
        for level in (0.0, -7.0, 1e4):
            inputs = jnp.full((3, *SHAPE), level)
            value, slope = jax.jit(jax.value_and_grad(prior))(inputs, KNOWN)
            assert np.isfinite(value) and np.isfinite(slope).all()


@EVERY
def test_inputs_of_another_size(name):
    with pytest.raises(ValueError, match=r"over 4 values an input, got inputs \(3, 5\)"):
        ROWS[name](1.0)(jnp.zeros((3, 5)), KNOWN)


@EVERY
def test_a_negative_weight_is_no_density(name):
    with pytest.raises(ValueError, match="weight must lie in"):
        ROWS[name](-1.0)


# Densities against SciPy, in float64.


def shrunk(samples, shrinkage):
    empirical = np.cov(samples.reshape(len(samples), -1), rowvar=False, bias=True)
    return (1 - shrinkage) * empirical + shrinkage * np.trace(empirical) / SIZE * np.eye(SIZE)


def fitted_normal(samples, shrinkage):
    mean = samples.reshape(len(samples), -1).mean(axis=0)
    return multivariate_normal(mean, shrunk(samples, shrinkage)).logpdf


def mixture(flat):
    parts = [
        np.log(share) + multivariate_normal(mean, covariance).logpdf(flat)
        for share, mean, covariance in zip(PROPORTIONS, MEANS, COVARIANCES, strict=True)
    ]
    return logsumexp(parts, axis=0)


def classes(densities, labels):
    """The expected log-density of every sample under hard or soft labels."""
    soft = np.eye(CLASSES)[labels] if np.ndim(labels) == 1 else labels
    return lambda flat: (soft * np.stack([density(flat) for density in densities], axis=1)).sum(1)


def fitted_mixture(num_components, ridge):
    flat = SAMPLES.reshape(len(SAMPLES), -1)
    ridge *= np.trace(np.cov(flat, rowvar=False, bias=True)) / SIZE
    fit = GaussianMixture(num_components, reg_covar=ridge, random_state=0)
    return fit.fit(flat).score_samples


HARD = np.array([2, 0, 1])
NORMALS = [multivariate_normal(*pair).logpdf for pair in zip(MEANS, COVARIANCES, strict=True)]
FITTED = [fitted_normal(SAMPLES[LABELS == label], 0.1) for label in range(CLASSES)]
DENSITIES = {
    "gaussian": (
        lambda: learned.fit_gaussian(SAMPLES, shrinkage=0.2),
        None,
        fitted_normal(SAMPLES, 0.2),
    ),
    "gaussian, no shrinkage": (
        lambda: learned.fit_gaussian(SAMPLES, shrinkage=0.0),
        None,
        fitted_normal(SAMPLES, 0.0),
    ),
    "mixture": (lambda: learned.gaussian_mixture(PROPORTIONS, MEANS, COVARIANCES), None, mixture),
    "mixture, proportions unscaled": (
        lambda: learned.gaussian_mixture(7 * PROPORTIONS, MEANS, COVARIANCES),
        None,
        mixture,
    ),
    "fitted mixture": (
        lambda: learned.fit_gaussian_mixture(SAMPLES, 2, ridge=0.05),
        None,
        fitted_mixture(2, 0.05),
    ),
    "classes": (
        lambda: learned.class_conditional(MEANS, COVARIANCES),
        HARD,
        classes(NORMALS, HARD),
    ),
    "soft classes": (
        lambda: learned.class_conditional(MEANS, COVARIANCES),
        SOFT,
        classes(NORMALS, SOFT),
    ),
    "fitted classes": (
        lambda: learned.fit_class_conditional(SAMPLES, LABELS, CLASSES, shrinkage=0.1),
        HARD,
        classes(FITTED, HARD),
    ),
}


@pytest.mark.parametrize("name", DENSITIES)
def test_values_and_slopes_against_scipy(name):
    make, labels, log_density = DENSITIES[name]

    def reference(inputs):
        return -log_density(inputs.reshape(3, -1)).sum()

    with jax.enable_x64(True):
        prior = jax.jit(make())
        where = context(None if labels is None else jnp.asarray(labels))
        others = RNG.normal(size=(4, *INPUTS.shape))
        values = [float(prior(jnp.asarray(inputs), where)) for inputs in (INPUTS, *others)]
        expected = [reference(inputs) for inputs in (INPUTS, *others)]
        np.testing.assert_allclose(np.diff(values), np.diff(expected), rtol=1e-9)
        slope = np.asarray(jax.grad(prior)(jnp.asarray(INPUTS), where))
    for direction in np.eye(INPUTS.size).reshape(-1, *INPUTS.shape):
        up, down = (reference(INPUTS + step * direction) for step in (1e-6, -1e-6))
        np.testing.assert_allclose((slope * direction).sum(), (up - down) / 2e-6, rtol=2e-6)


def test_classes_differ_by_their_normalizers():
    """Between labels, too, the values are log-densities up to one constant."""
    with jax.enable_x64(True):
        prior = learned.class_conditional(MEANS, COVARIANCES)
        inputs = jnp.asarray(INPUTS)
        values = [prior(inputs, context(jnp.full(3, label))) for label in range(CLASSES)]
    expected = [-density(INPUTS.reshape(3, -1)).sum() for density in NORMALS]
    np.testing.assert_allclose(np.diff(values), np.diff(expected), rtol=1e-9)


def test_single_precision_of_an_ill_conditioned_mixture():
    variances = np.logspace(-5, 0, SIZE)
    axes = np.linalg.qr(RNG.normal(size=(CLASSES, SIZE, SIZE)))[0]
    covariances = (axes * variances) @ axes.transpose(0, 2, 1)
    prior = learned.gaussian_mixture(PROPORTIONS, MEANS, covariances)
    labelled = learned.class_conditional(MEANS, covariances)
    step = (axes * np.sqrt(variances)) @ RNG.normal(size=(CLASSES, SIZE, 1))
    inputs = np.float32(MEANS + step[..., 0])
    energies = [
        -multivariate_normal(mean, covariance).logpdf(inputs[k, None].astype(float))
        for k, (mean, covariance) in enumerate(zip(MEANS, covariances, strict=True))
    ]
    # The determinants are equal: at its highest a density of these is this constant.
    constant = 0.5 * (SIZE * np.log(2 * np.pi) + np.log(variances).sum())
    where = context(jnp.arange(CLASSES))
    np.testing.assert_allclose(
        labelled(jnp.asarray(inputs), where), sum(energies) - CLASSES * constant, rtol=2e-4
    )
    # The components are far apart, so the mixture adds its proportions only, the largest at zero.
    extra = -np.log(PROPORTIONS / PROPORTIONS.max()).sum()
    np.testing.assert_allclose(
        prior(jnp.asarray(inputs), where), sum(energies) - CLASSES * constant + extra, rtol=2e-4
    )


def test_one_component_is_the_gaussian():
    mean, covariance = MEANS[0], COVARIANCES[0]
    inputs = jnp.asarray(INPUTS, jnp.float32)
    precision = jnp.asarray(np.linalg.inv(covariance), jnp.float32)
    expected = priors.gaussian(jnp.asarray(mean, jnp.float32), precision)(inputs, KNOWN)
    one = learned.gaussian_mixture([1.0], mean[None], covariance[None])
    np.testing.assert_allclose(one(inputs, KNOWN), expected, rtol=1e-5)


@pytest.mark.parametrize("weight", [0.1, 7.0])
def test_the_mode_is_at_the_mean(weight):
    means = jnp.asarray(MEANS, jnp.float32)
    average = jnp.asarray(SAMPLES.mean(axis=0), jnp.float32)[None]
    rows = [
        (learned.class_conditional(MEANS, COVARIANCES, weight), means.reshape(3, *SHAPE)),
        (learned.fit_gaussian(SAMPLES, weight, shrinkage=0.5), average),
        (learned.fit_gaussian(SAMPLES, weight), average),
    ]
    for prior, mode in rows:
        where = context(jnp.arange(len(mode)))
        np.testing.assert_allclose(jax.grad(prior)(mode, where), 0.0, atol=1e-4)
        others = mode[None] + RNG.normal(size=(20, *mode.shape)).astype(np.float32)
        around = jax.vmap(prior, in_axes=(0, None))(others, where)
        assert (around > prior(mode, where)).all()


def test_the_weight_of_a_fit_is_a_factor():
    inputs = jnp.asarray(INPUTS, jnp.float32)
    for fit in (
        functools.partial(learned.fit_gaussian_mixture, SAMPLES, 2),
        functools.partial(learned.fit_class_conditional, SAMPLES, LABELS, CLASSES),
    ):
        one, three = (fit(**weight)(inputs, KNOWN) for weight in ({}, {"weight": 3.0}))
        np.testing.assert_allclose(three, 3 * one, rtol=1e-5)


def test_a_fit_moves_with_its_data():
    """An affine map of data and candidate alike changes nothing, without shrinkage."""
    matrix, offset = RNG.normal(size=(SIZE, SIZE)), RNG.normal(size=SIZE)

    def moved(inputs):
        return inputs.reshape(len(inputs), -1) @ matrix + offset

    with jax.enable_x64(True):
        for shrinkage, same in ((0.0, True), (0.3, False)):
            here, there = (
                learned.fit_gaussian(map_(SAMPLES), shrinkage=shrinkage)(
                    jnp.asarray(map_(INPUTS)), KNOWN
                )
                for map_ in (lambda inputs: inputs, moved)
            )
            assert np.isclose(here, there, rtol=1e-8) == same


def test_constant_pixels_and_few_samples_have_a_gaussian():
    digits = datasets.digits().inputs
    flat = digits.reshape(len(digits), -1)
    assert (flat.std(axis=0) == 0).any()
    for samples in (digits, digits[:20]):
        prior = learned.fit_gaussian(samples)
        values = jax.vmap(lambda x, prior=prior: prior(x[None], KNOWN))(jnp.asarray(digits[20:500]))
        assert np.isfinite(values).all() and (values > 0).all()
        # Of its own data twice the mean value is the dimension, up to the shrinkage.
    values = jax.vmap(lambda x: learned.fit_gaussian(digits)(x[None], KNOWN))(jnp.asarray(digits))
    assert 0.75 * 64 < 2 * values.mean() < 64
    with pytest.raises(ValueError, match=r"covariances\[0\] must be symmetric and positive"):
        learned.fit_gaussian(digits, shrinkage=0.0)


# Classes.


def split_digits():
    """Auxiliary and held-out digits: inputs and labels of each."""
    dataset = datasets.digits()
    order = np.random.default_rng(0).permutation(len(dataset))
    return [(dataset.inputs[part], dataset.labels[part]) for part in (order[:1500], order[1500:])]


def test_the_right_class_is_the_likeliest():
    (inputs, labels), (held, truth) = split_digits()
    prior = learned.fit_class_conditional(inputs, labels, 10)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    @functools.partial(jax.vmap, in_axes=(None, 0))
    def values(x, label):
        return prior(x[None], context(label[None], 10))

    accuracy = (values(jnp.asarray(held), jnp.arange(10)).argmin(axis=1) == truth).mean()
    flat = inputs.reshape(len(inputs), -1)
    linear = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(flat, labels)
    assert accuracy > max(0.97, linear.score(held.reshape(len(held), -1), truth))


def test_soft_labels_average_and_have_a_slope():
    prior = learned.class_conditional(MEANS, COVARIANCES)
    inputs, soft = jnp.asarray(INPUTS, jnp.float32), jnp.asarray(SOFT, jnp.float32)
    hard = [
        [prior(inputs[i, None], context(jnp.array([label]))) for label in range(CLASSES)]
        for i in range(3)
    ]
    np.testing.assert_allclose(prior(inputs, context(soft)), np.sum(SOFT * hard), rtol=1e-5)
    one_hot = jax.nn.one_hot(KNOWN.labels, CLASSES)
    np.testing.assert_allclose(prior(inputs, context(one_hot)), prior(inputs, KNOWN), rtol=1e-6)
    slope = jax.grad(lambda labels: prior(inputs, context(labels)))(soft)
    np.testing.assert_allclose(slope, hard, rtol=1e-5)


# The variational autoencoder.


def perceptron(params, inputs):
    first, second = (params[name] for name in ("layer01", "layer02"))
    hidden = np.maximum(inputs @ np.float64(first["kernel"]) + np.float64(first["bias"]), 0)
    return hidden @ np.float64(second["kernel"]) + np.float64(second["bias"])


def joint(vae, flat, latents):
    """`log p(x, z)` of every input `[B, d]` and latent `[B, S, L]`, in NumPy."""
    mean = expit(perceptron(vae.decoder, latents))
    std = np.exp(float(vae.log_std))
    likelihood = norm.logpdf(flat[:, None], mean, std).sum(axis=-1)
    return likelihood + norm.logpdf(latents).sum(axis=-1)


def encoded(vae, flat):
    mean, log_variance = np.split(perceptron(vae.encoder, flat), 2, axis=-1)
    return mean, np.exp(0.5 * log_variance)


def test_the_bound_and_its_gap_against_quadrature():
    """`log p(x) - ELBO` is the divergence of the encoder's posterior from the true one."""
    inputs = RNG.uniform(size=(20, *SHAPE))
    vae = learned.train_vae(
        jax.random.key(2), inputs, latent=1, hidden=6, num_steps=50, batch_size=8,
        observation_std=0.4,
    )  # fmt: skip
    flat = inputs.reshape(len(inputs), -1)
    grid = np.linspace(-9, 9, 4001)
    logs = joint(vae, flat, np.broadcast_to(grid[None, :, None], (len(flat), len(grid), 1)))
    evidence = np.log(trapezoid(np.exp(logs), grid, axis=1))
    mean, std = encoded(vae, flat)
    posterior = norm.logpdf(grid[None], mean, std)
    gap = trapezoid(np.exp(posterior) * (posterior - logs + evidence[:, None]), grid, axis=1)
    with jax.enable_x64(True):
        # The middles of equally likely intervals stand for all draws.
        noise = ndtri((np.arange(5000) + 0.5) / 5000)[:, None, None]
        bound = np.asarray(learned.elbo(vae, jnp.asarray(inputs), jnp.asarray(noise)))
    np.testing.assert_allclose(evidence - bound, gap, atol=2e-3)
    assert (gap > -1e-6).all() and gap.max() > 0.02


@functools.cache
def digits_vae(num_steps=600):
    (inputs, _), _ = split_digits()
    settings = {"hidden": 128, "batch_size": 64, "learning_rate": 5e-3}
    return learned.train_vae(jax.random.key(0), inputs, num_steps=num_steps, **settings)


def test_the_bound_lies_below_the_importance_sampled_likelihood():
    held = split_digits()[1][0][:12]
    vae, draws = digits_vae(), 2000
    flat = held.reshape(len(held), -1).astype(float)
    mean, std = encoded(vae, flat)
    noise = np.random.default_rng(1).normal(size=(draws, len(flat), 20))
    latents = mean[:, None] + std[:, None] * noise.transpose(1, 0, 2)
    ratios = joint(vae, flat, latents)
    ratios -= norm.logpdf(latents, mean[:, None], std[:, None]).sum(axis=-1)
    sampled = logsumexp(ratios, axis=1) - np.log(draws)
    bound = np.asarray(learned.elbo(vae, jnp.asarray(held), jnp.asarray(noise, jnp.float32)))
    # The same bound with the divergence sampled as well.
    np.testing.assert_allclose(bound, ratios.mean(axis=1), atol=0.5)
    assert (bound < sampled).all() and (sampled - bound).mean() < 10


def test_training_raises_the_bound_of_held_out_digits():
    (inputs, _), (held, _) = split_digits()
    noise = jax.random.normal(jax.random.key(4), (16, 1, 20))
    untrained, trained = (
        float(learned.elbo(digits_vae(steps), jnp.asarray(held), noise).mean())
        for steps in (1, 600)
    )
    # Above the best Gaussian without correlations around the mean, too.
    mean = inputs.reshape(len(inputs), -1).mean(axis=0)
    std = np.sqrt(inputs.reshape(len(inputs), -1).var(axis=0).mean())
    isotropic = norm.logpdf(held.reshape(len(held), -1), mean, std).sum(axis=1).mean()
    assert trained > isotropic + 30 and trained > untrained + 200


def test_the_deviation_is_given_or_learned():
    inputs = split_digits()[0][0]
    settings = {"hidden": 32, "num_steps": 200, "learning_rate": 1e-2}
    given = learned.train_vae(jax.random.key(0), inputs, observation_std=0.25, **settings)
    np.testing.assert_allclose(jnp.exp(given.log_std), 0.25, rtol=1e-6)
    free = learned.train_vae(jax.random.key(0), inputs, observation_std=None, **settings)
    # The maximum likelihood of a deviation is the root mean squared error of reconstruction.
    flat = inputs.reshape(len(inputs), -1)
    mean, std = encoded(free, flat)
    latents = mean + std * np.random.default_rng(0).normal(size=mean.shape)
    error = np.sqrt(np.square(flat - expit(perceptron(free.decoder, latents))).mean())
    np.testing.assert_allclose(jnp.exp(free.log_std), error, rtol=0.1)


def test_slopes_of_the_vae_against_finite_differences():
    with jax.enable_x64(True):
        prior = jax.jit(learned.vae(jax.tree.map(lambda leaf: leaf.astype(float), digits_vae())))
        inputs = jax.random.uniform(jax.random.key(3), (2, 8, 8, 1), jnp.float64)
        slope = jax.grad(prior)(inputs, KNOWN)
        for key in jax.random.split(jax.random.key(4), 5):
            direction = jax.random.normal(key, inputs.shape, jnp.float64)
            up, down = (prior(inputs + step * direction, KNOWN) for step in (1e-6, -1e-6))
            np.testing.assert_allclose((up - down) / 2e-6, (slope * direction).sum(), rtol=1e-5)


def test_draws_are_fixed_and_follow_the_key():
    inputs, vae = jnp.asarray(INPUTS, jnp.float32), small_vae()
    priors_ = [learned.vae(vae, key=jax.random.key(seed)) for seed in (0, 0, 1)]
    first, again, other = (float(prior(inputs, KNOWN)) for prior in priors_)
    assert first == again == float(learned.vae(vae)(inputs, KNOWN)) != other
    many = [learned.vae(vae, 1.0, 4000, jax.random.key(seed))(inputs, KNOWN) for seed in (0, 1)]
    assert abs(many[0] - many[1]) < abs(first - other)


# The ladder.


def reconstruct(model, prior, constraint, keys, observations):
    attack = attacks.bayes(
        model, defenses.gaussian_noise(0.3), prior=prior, constraint=constraint, num_steps=150
    )
    return jax.jit(jax.vmap(attack))(keys, observations).inputs[:, 0]


@pytest.mark.slow
def test_the_more_a_prior_knows_the_better_the_reconstruction():
    """Uniform, box, Gaussian, class-conditional Gaussian: on digits behind Gaussian noise."""
    (inputs, labels), (held, truth) = split_digits()
    held, truth, model = jnp.asarray(held[:16]), jnp.asarray(truth[:16]), models.mlp(init="he")
    keys = jax.random.split(jax.random.key(1), len(held))

    def observe(key, x, y):
        params, batch = model.init(key, (8, 8, 1)), invjax.Batch(x[None], y[None])
        defense = defenses.gaussian_noise(0.3)
        return invjax.observe(key, model, params, batch, defense, grant_labels=True)

    observations = jax.vmap(observe)(keys, held, truth)
    box = priors.project_to_box
    ladder = {
        "uniform": (None, None),
        "box": (None, box),
        "vae": (learned.vae(digits_vae()), box),
        "gaussian": (learned.fit_gaussian(inputs), box),
        "classes": (learned.fit_class_conditional(inputs, labels, 10), box),
    }
    found = {
        name: reconstruct(model, *row, keys, observations).clip(0, 1)
        for name, row in ladder.items()
    }
    means = np.stack([inputs[labels == label].mean(axis=0) for label in range(10)])
    found["class mean"] = jnp.asarray(means)[truth]
    decibels = {
        name: np.asarray(metrics.psnr(guess, held, data_range=1.0)) for name, guess in found.items()
    }
    for worse, better, margin in (
        ("uniform", "box", 0.1),
        ("box", "gaussian", 3.0),
        ("box", "vae", 2.0),
        ("gaussian", "classes", 1.0),
        ("class mean", "classes", 1.5),
    ):
        gain = decibels[better] - decibels[worse]
        assert gain.mean() > max(margin, 2 * gain.std() / len(gain) ** 0.5), (worse, better)


@pytest.mark.parametrize("labels", ["known", "joint"])
def test_a_batch_is_attacked_with_classes(labels):
    model = models.mlp((8,), num_classes=CLASSES)
    params = model.init(jax.random.key(0), SHAPE)
    batch = invjax.Batch(jnp.asarray(INPUTS, jnp.float32), jnp.array([2, 0, 1]))
    observation = invjax.observe(
        jax.random.key(1), model, params, batch, grant_labels=labels == "known"
    )
    prior = learned.class_conditional(MEANS, COVARIANCES)
    attack = attacks.bayes(
        model, defenses.gaussian_noise(0.1), prior, num_steps=5, labels=labels, restarts=2
    )
    result = attack(jax.random.key(2), observation)
    assert result.found.all() and result.inputs.shape == batch.inputs.shape


# Errors.

EYES = np.stack([np.eye(SIZE)] * CLASSES)
SKEW = EYES + np.triu(np.ones((SIZE, SIZE)), 1)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: learned.fit_gaussian(np.zeros(4)), r"inputs must be \[N, \.\.\.\]"),
        (lambda: learned.fit_gaussian(np.zeros((0, 4))), r"inputs must be \[N, \.\.\.\] and not"),
        (lambda: learned.fit_gaussian(np.ones((5, 4))), "inputs must be finite and not all"),
        (lambda: learned.fit_gaussian(np.full((5, 4), np.nan)), "inputs must be finite"),
        (lambda: learned.fit_gaussian(SAMPLES[:1]), "inputs must be finite and not all the same"),
        (lambda: learned.fit_gaussian(SAMPLES, shrinkage=1.5), "'shrinkage' parameter"),
        (lambda: learned.fit_gaussian(SAMPLES, shrinkage=-0.1), "'shrinkage' parameter"),
        (lambda: learned.fit_gaussian(SAMPLES[:3], shrinkage=0.0), "more shrinkage"),
        (lambda: learned.gaussian_mixture([1.0], MEANS, EYES), r"proportions must be \[3\]"),
        (lambda: learned.gaussian_mixture([1, 1, 0], MEANS, EYES), "positive numbers"),
        (lambda: learned.gaussian_mixture(PROPORTIONS, MEANS, EYES[:2]), r"got \(3, 4\) and"),
        (lambda: learned.gaussian_mixture(PROPORTIONS, MEANS[0], EYES), r"means must be \[K, d\]"),
        (lambda: learned.class_conditional(MEANS, EYES[:, :2]), r"covariances \[K, d, d\]"),
        (lambda: learned.class_conditional(MEANS, -EYES), r"covariances\[0\] must be symmetric"),
        (lambda: learned.class_conditional(MEANS, SKEW), r"covariances\[0\] must be symmetric"),
        (lambda: learned.class_conditional(MEANS, EYES * [[[1.0]], [[1]], [[0]]]), r"s\[2\] must"),
        (lambda: learned.fit_gaussian_mixture(SAMPLES, 0), r"whole number in \[1, 60\]"),
        (lambda: learned.fit_gaussian_mixture(SAMPLES, 2.5), "num_components must be a whole"),
        (lambda: learned.fit_gaussian_mixture(SAMPLES, 2, ridge=0.0), "ridge must lie in"),
        (
            lambda: learned.fit_class_conditional(SAMPLES, LABELS[:-1], 3),
            r"labels must be \[60\] integers in \[0, 2\]",
        ),
        (lambda: learned.fit_class_conditional(SAMPLES, LABELS, 2), "got int64 of shape"),
        (lambda: learned.fit_class_conditional(SAMPLES, 1.0 * LABELS, 3), "got float64"),
        (lambda: learned.fit_class_conditional(SAMPLES, LABELS, 4), "inputs of class 3 must be"),
        (lambda: learned.train_vae(jax.random.key(0), 2 * np.eye(4)), r"inputs must lie in \[0, 1"),
        (
            lambda: learned.train_vae(jax.random.key(0), np.eye(4), latent=0),
            "latent must be a whole number",
        ),
        (lambda: learned.train_vae(jax.random.key(0), np.eye(4), num_steps=0), "num_steps must"),
        (
            lambda: learned.train_vae(jax.random.key(0), np.eye(4), observation_std=0.0),
            "observation_std must lie in",
        ),
        (
            lambda: learned.train_vae(jax.random.key(0), np.eye(4), learning_rate=-1.0),
            "learning_rate must lie in",
        ),
        (lambda: learned.vae(small_vae(), num_samples=0), "num_samples must be a whole number"),
        (
            lambda: learned.elbo(small_vae(), jnp.zeros((3, 4)), jnp.zeros((5, 2, 2))),
            r"noise must be \[S, 3 or 1, 2\]",
        ),
    ],
)
def test_errors_name_the_argument(call, match):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize(
    ("labels", "num_classes", "match"),
    [
        (None, 3, "needs context.labels, got None"),
        (jnp.zeros(2, int), 3, r"needs context.labels \[3\] or \[3, 3\], got shape \(2,\)"),
        (jnp.zeros((3, 4)), 3, r"got shape \(3, 4\)"),
        (jnp.zeros(3), 3, r"got shape \(3,\)"),
        (jnp.zeros(3, int), 7, "in a problem of 7 classes"),
    ],
)
def test_labels_that_do_not_fit(labels, num_classes, match):
    prior = learned.class_conditional(MEANS, COVARIANCES)
    with pytest.raises(ValueError, match=match):
        prior(jnp.zeros((3, *SHAPE)), context(labels, num_classes))


def test_a_binary_problem_with_one_logit_has_two_classes():
    prior = learned.class_conditional(MEANS[:2], COVARIANCES[:2])
    assert np.isfinite(prior(jnp.zeros((2, *SHAPE)), context(jnp.array([0, 1]), num_classes=1)))
