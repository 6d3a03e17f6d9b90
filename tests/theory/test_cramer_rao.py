"""Computable lower bounds against dense linear algebra, closed forms and real attacks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from invjax import chain, defenses, models
from invjax.base import Batch, Model
from invjax.defenses.optimal import optimal_clipped_noise, optimal_noise
from invjax.defenses.sensitivity import gradient_sensitivity
from invjax.theory.cramer_rao import (
    cramer_rao,
    gaussian_prior_information,
    score_prior_information,
    van_trees,
)
from invjax.theory.two_layer import kept_information, lower_constant

STD = 0.02
MLP = models.mlp((7,), 3, "tanh")


def linear(matrix):
    """A model whose gradient is the mean of `matrix @ x` over the samples."""
    rows = matrix.shape[0]

    def loss(params, batch):
        return jnp.mean(batch.inputs @ jnp.asarray(matrix, params.dtype).T, axis=0) @ params

    def apply(params, inputs):
        return jnp.sum(params) * jnp.sum(inputs, axis=1, keepdims=True)

    return Model(lambda key, shape: jnp.zeros(rows), apply, loss, num_classes=1)


def two_layer(weights, bias=3.0):
    """The network of the theory with `a` as its parameters, and the sum of the squared errors / 2."""

    def apply(params, inputs):
        units = jnp.tanh(inputs @ jnp.asarray(weights, inputs.dtype).T)
        return units @ params[:, None] + bias

    def loss(params, batch):
        return 0.5 * jnp.sum(jnp.square(apply(params, batch.inputs)[:, 0] - batch.labels))

    return Model(lambda key, shape: jnp.ones(len(weights)) / len(weights), apply, loss, 1)


def query(dimension, width, labels=(1.0, 1.0), seed=0, dtype=np.float32):
    """A two-layer model at the query point, and unit vectors."""
    rng = np.random.default_rng([seed, dimension])
    inputs = rng.normal(size=(len(labels), dimension))
    inputs /= np.linalg.norm(inputs, axis=1, keepdims=True)
    weights = rng.normal(size=(width, dimension))
    batch = Batch(jnp.asarray(inputs, dtype), jnp.asarray(labels, dtype))
    return two_layer(weights), jnp.full(width, 1 / width, dtype), batch


@functools.cache
def mlp_case(size=2):
    rng = np.random.default_rng(0)
    params = jax.eval_shape(lambda: MLP.init(jax.random.key(0), (6,)))
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 2, jnp.float32), params
    )
    inputs = jnp.asarray(rng.uniform(size=(size, 6)), jnp.float32)
    return params, Batch(inputs, jnp.asarray(rng.integers(0, 3, size)))


def bound(model, params, batch, defense, **settings):
    """`cramer_rao`, compiled."""
    run = functools.partial(cramer_rao, model, defense=defense, **settings)
    return jax.jit(run)(params, batch)


def wide(tree):
    floats = (jnp.float32, jnp.float64)
    return jax.tree.map(lambda x: jnp.asarray(x, float) if x.dtype in floats else x, tree)


def jacobians(params, batch):
    """`[B, p, n]`: of every sample's own gradient in all inputs, and the gradients `[B, p]`."""

    def one(inputs, index):
        sample = Batch(inputs.reshape(batch.inputs.shape)[index][None], batch.labels[index][None])
        return ravel_pytree(jax.grad(MLP.loss)(params, sample))[0]

    flat = batch.inputs.ravel()
    indices = jnp.arange(len(batch.labels))
    rows = jax.jit(jax.vmap(jax.jacrev(one), in_axes=(None, 0)))(flat, indices)
    return np.asarray(rows), np.asarray(jax.vmap(one, in_axes=(None, 0))(flat, indices))


def inverse_trace(jacobian, variance):
    return np.trace(np.linalg.inv(jacobian.T @ (jacobian / np.asarray(variance)[:, None])))


@functools.cache
def reference():
    with jax.enable_x64(True):
        params, batch = wide(mlp_case())
        rows, samples = jacobians(params, batch)
        leakage = (rows.mean(axis=0) ** 2).sum(axis=1)
        return rows, samples, leakage


def expected(name):
    rows, samples, leakage = reference()
    jacobian, gradient = rows.mean(axis=0), samples.mean(axis=0)
    ones = np.ones(len(gradient))
    if name == "gaussian":
        return inverse_trace(jacobian, STD**2 * ones)
    if name == "laplace":
        return inverse_trace(jacobian, STD**2 * ones)
    if name == "both":
        return inverse_trace(jacobian, (STD**2 + 9 * STD**2) * ones)
    if name == "per sample":
        return inverse_trace(jacobian, STD**2 / 2 * ones)
    if name == "dp-sgd":
        norms = np.linalg.norm(samples, axis=1)
        parts = []
        for row, sample, norm in zip(rows, samples, norms, strict=True):
            unit = sample / norm
            clipped = 0.8 * (row - np.outer(unit, unit @ row)) / norm
            parts.append(clipped if norm > 0.8 else row)
        assert (norms > 0.8).any()
        return inverse_trace(np.mean(parts, axis=0), STD**2 * ones)
    if name == "dropout":
        return inverse_trace(jacobian, STD**2 * 0.6**2 / 0.6 * ones)
    if name == "pruned":
        kept = np.argsort(np.abs(gradient))[int(0.3 * len(gradient)) :]
        return inverse_trace(jacobian[kept], STD**2 * ones[kept])
    if name == "clamped":
        free = np.abs(gradient) < 0.2
        assert 3 < (~free).sum() < 30
        ratios = np.sqrt(leakage) / np.abs(gradient)
        variance = (STD**2 * ratios / ratios.mean())[free]
        return inverse_trace(jacobian[free], variance)
    raise AssertionError(name)


def clamped():
    with jax.enable_x64(True):
        params, batch = wide(mlp_case())
        found = jax.jit(functools.partial(gradient_sensitivity, MLP))(params, batch)
        found = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), found)
    return optimal_clipped_noise(found, 0.2, STD)


NOISE = defenses.gaussian_noise(STD)
DEFENSES = {
    "gaussian": lambda: NOISE,
    "laplace": lambda: defenses.laplace_noise(STD),
    "both": lambda: chain(defenses.gaussian_noise(3 * STD), defenses.laplace_noise(STD)),
    "per sample": lambda: defenses.gaussian_noise(STD, per_sample=True),
    "dp-sgd": lambda: defenses.dp_sgd(0.8, STD / 0.8, "mean"),
    "dropout": lambda: chain(defenses.gradient_dropout(0.4), NOISE),
    "pruned": lambda: chain(defenses.magnitude_prune(0.3, "global"), NOISE),
    "clamped": clamped,
}


SLOW = ("both", "laplace", "per sample", "pruned")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in DEFENSES],
)
def test_the_dense_bound_is_that_of_the_defense(name):
    params, batch = mlp_case()
    found = bound(MLP, params, batch, DEFENSES[name]())
    assert found.total.dtype == jnp.float32 and found.total.shape == ()
    np.testing.assert_allclose(
        found.total, expected(name), rtol=1e-3 if name == "clamped" else 2e-5
    )
    np.testing.assert_allclose(found.distance, np.sqrt(found.total / 2), rtol=1e-6)


def test_a_known_mask_counts():
    params, batch = mlp_case()
    masked = chain(defenses.random_mask(0.3), NOISE)
    found = bound(MLP, params, batch, masked, key=jax.random.key(4)).total
    _, defense_key = jax.random.split(jax.random.key(4))
    state = masked.init_with_key(defense_key, params)
    kept = np.asarray(ravel_pytree(masked.public(state)[0])[0]) > 0
    jacobian = reference()[0].mean(axis=0)[kept]
    assert kept.sum() >= jacobian.shape[1]
    exact = inverse_trace(jacobian, np.full(kept.sum(), STD**2))
    np.testing.assert_allclose(found, exact, rtol=2e-5)


@pytest.mark.slow
def test_rounding_behind_the_noise_is_passed_over():
    found = bound(MLP, *mlp_case(), chain(NOISE, defenses.quantize(6))).total
    np.testing.assert_allclose(found, expected("gaussian"), rtol=2e-5)


def test_it_runs_compiled_and_over_many_victims():
    params, batch = mlp_case()
    run = functools.partial(cramer_rao, MLP, params, defense=NOISE)
    stacked = Batch(jnp.stack([batch.inputs, 0.5 * batch.inputs]), jnp.stack([batch.labels] * 2))
    many = jax.jit(jax.vmap(run))(stacked)
    np.testing.assert_allclose(many.total[0], expected("gaussian"), rtol=2e-5)
    assert many.total[1] != many.total[0]


# Weaker and cheaper forms.


def test_the_traces_are_below_the_dense_bound():
    params, batch = mlp_case()
    run = functools.partial(bound, MLP, params, batch, NOISE, method="trace")
    jacobian = reference()[0].mean(axis=0)
    exact = 12**2 * STD**2 / (jacobian**2).sum()
    found = run(num_probes=None)
    np.testing.assert_allclose(found.total, exact, rtol=1e-4)
    assert found.standard_error == 0 and found.total < expected("gaussian")
    probed = run(num_probes=400)
    assert 0 < probed.standard_error < 0.1 * exact
    assert abs(probed.total - exact) < 4 * probed.standard_error


def test_hutchinson_finds_the_trace_of_the_inverse():
    params, batch = mlp_case()
    defense, dense = DEFENSES["dp-sgd"](), expected("dp-sgd")
    found = bound(MLP, params, batch, defense, method="hutchinson", num_probes=300, num_steps=60)
    assert abs(found.total - dense) < 4 * found.standard_error + 0.02 * dense
    assert found.standard_error < 0.2 * dense and found.residual < 0.1


# What has no finite, or no positive, bound.


def test_what_the_observation_does_not_determine_has_an_infinite_error():
    rng = np.random.default_rng(0)
    params, noise = jnp.zeros(9), NOISE
    # The mean of two samples, and fewer observations than values.
    two = Batch(jnp.asarray(rng.normal(size=(2, 5))), jnp.zeros(2))
    assert bound(linear(rng.normal(size=(9, 5))), params, two, noise).total == jnp.inf
    one = Batch(jnp.asarray(rng.normal(size=(1, 12))), jnp.zeros(1))
    few = bound(linear(rng.normal(size=(9, 12))), params, one, noise)
    assert few.total == jnp.inf and few.distance == jnp.inf
    nothing = bound(linear(np.zeros((9, 12))), params, one, noise, method="trace")
    assert nothing.total == jnp.inf and nothing.standard_error == 0


@pytest.mark.parametrize(
    "method", ["dense", "trace", pytest.param("hutchinson", marks=pytest.mark.slow)]
)
def test_what_shows_without_noise_bounds_nothing(method):
    params, batch = mlp_case()
    sensitivity = jax.jit(functools.partial(gradient_sensitivity, MLP))(params, batch)
    # One coordinate is said to tell nothing, and gets no noise.
    sensitivity.leakage["layer01"]["bias"] = sensitivity.leakage["layer01"]["bias"].at[0].set(0.0)
    found = bound(MLP, params, batch, optimal_noise(sensitivity, STD), method=method)
    assert found.total == 0 and found.distance == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"defense": chain()}, "adds no noise"),
        ({"defense": chain(NOISE, defenses.sign_compress())}, "sends signs"),
        ({"method": "guess"}, "method must be one of"),
        ({"unknown_labels": True}, "labels that are floats"),
        ({"unknown_labels": True, "method": "trace"}, "needs the method 'dense'"),
        ({"method": "hutchinson", "num_probes": None}, "num_probes must be a whole number"),
        ({"method": "trace", "num_probes": 1}, "num_probes must be a whole number"),
        ({"tolerance": 0.0}, "tolerance must lie in"),
        ({"num_steps": 0}, "num_steps must lie in"),
    ],
)
def test_what_it_cannot_bound_is_refused(change, message):
    params, batch = mlp_case()
    with pytest.raises(ValueError, match=message):
        bound(MLP, params, batch, **{"defense": NOISE, **change})


# Labels as nuisance parameters.


def test_unknown_labels_are_a_block_of_the_information():
    params, batch = mlp_case()
    soft = Batch(batch.inputs, jnp.eye(3)[batch.labels])
    found = bound(MLP, params, soft, NOISE, unknown_labels=True).total
    with jax.enable_x64(True):
        params, soft = wide((params, soft))

        def gradient(flat):
            inputs, labels = flat[:12].reshape(2, 6), flat[12:].reshape(2, 3)
            return ravel_pytree(jax.grad(MLP.loss)(params, Batch(inputs, labels)))[0]

        flat = jnp.concatenate([soft.inputs.ravel(), soft.labels.ravel()])
        jacobian = np.asarray(jax.jit(jax.jacfwd(gradient))(flat))
    information = jacobian.T @ jacobian / STD**2
    # Of the three labels of a sample, the gradient knows two.
    assert np.linalg.matrix_rank(jacobian[:, 12:]) == 4
    block = np.linalg.pinv(information, rcond=1e-11, hermitian=True)[:12, :12]
    np.testing.assert_allclose(found, np.trace(block), rtol=1e-4)
    assert found > 1.001 * expected("gaussian")


# The prior.


def test_van_trees_is_the_error_of_the_posterior_mean_where_all_is_isotropic():
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    batches = Batch(jnp.asarray(rng.normal(size=(4, 1, 5)), jnp.float32), jnp.zeros((4, 1)))
    information = gaussian_prior_information(0.3 * jnp.eye(5), 1)
    np.testing.assert_allclose(information, 5 / 0.3, rtol=1e-5)
    noise = defenses.gaussian_noise(0.5)
    found = van_trees(
        linear(2 * rotation), jnp.zeros(5), batches, noise, information, num_probes=None
    )
    exact = 5 / (4 / 0.25 + 1 / 0.3)
    np.testing.assert_allclose(found.total, exact, rtol=1e-5)
    np.testing.assert_allclose(found.distance, np.sqrt(exact), rtol=1e-5)
    np.testing.assert_allclose(found.standard_error, 0, atol=1e-6)
    # Any other prior or matrix: below the posterior's error.
    root = rng.normal(size=(5, 5))
    covariance, matrix = root @ root.T, rng.normal(size=(7, 5))
    inverse = np.linalg.inv(covariance)
    exact = np.trace(np.linalg.inv(matrix.T @ matrix / 0.25 + inverse))
    information = gaussian_prior_information(jnp.asarray(covariance), 1)
    np.testing.assert_allclose(information, np.trace(inverse), rtol=1e-3)
    below = van_trees(linear(matrix), jnp.zeros(7), batches, noise, information).total
    assert 0.01 * exact < below < exact


def test_prior_information_of_a_score_is_that_of_the_covariance():
    rng = np.random.default_rng(1)
    root = rng.normal(size=(4, 4)) + 2 * np.eye(4)
    covariance = root @ root.T
    inverse = jnp.asarray(np.linalg.inv(covariance), jnp.float32)
    draws = jnp.asarray(rng.normal(size=(4000, 2, 4)) @ root.T, jnp.float32)
    exact = gaussian_prior_information(jnp.asarray(covariance), 2)
    found, error = score_prior_information(lambda inputs: -inputs @ inverse, draws)
    assert abs(found - exact) < 4 * error and error < 0.05 * exact
    singular = gaussian_prior_information(jnp.ones((3, 3)), 2)
    assert singular == jnp.inf
    with pytest.raises(ValueError, match="square"):
        gaussian_prior_information(jnp.ones((3, 2)), 1)
    with pytest.raises(ValueError, match="symmetric without negative"):
        gaussian_prior_information(jnp.diag(jnp.array([1.0, -1.0])), 1)


@pytest.mark.slow
def test_van_trees_averages_over_the_prior():
    params, batch = mlp_case()
    batches = Batch(jnp.stack([batch.inputs, 0.5 * batch.inputs]), jnp.stack([batch.labels] * 2))
    run = jax.jit(
        functools.partial(cramer_rao, MLP, params, defense=NOISE, method="trace", num_probes=None)
    )
    traces = [144 / run(batch=jax.tree.map(lambda x, i=i: x[i], batches)).total for i in range(2)]
    found = van_trees(MLP, params, batches, NOISE, 30.0, num_probes=None)
    np.testing.assert_allclose(found.total, 144 / (np.mean(traces) + 30), rtol=1e-5)
    spread = np.std(traces, ddof=1) / np.sqrt(2)
    np.testing.assert_allclose(
        found.standard_error, 144 * spread / (np.mean(traces) + 30) ** 2, rtol=1e-4
    )
    assert van_trees(MLP, params, batches, NOISE, jnp.inf).total == 0


# No attack beats them.


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 8))]
)
def test_no_attack_on_a_linear_gradient_beats_the_bounds(seed):
    rng = np.random.default_rng(seed)
    rows, columns, std = int(rng.integers(6, 15)), int(rng.integers(2, 7)), rng.uniform(0.1, 2)
    matrix = rng.normal(size=(rows, columns))
    model, params = linear(matrix), jnp.zeros(rows)
    defense = (
        defenses.gaussian_noise(std),
        chain(defenses.gradient_dropout(0.3), defenses.gaussian_noise(std)),
    )[seed % 2]
    truths = rng.normal(size=(2000, columns))
    batch = Batch(jnp.asarray(truths[:1], jnp.float32), jnp.zeros(1))
    sent = truths @ matrix.T
    if seed % 2:
        sent = sent * (rng.uniform(size=sent.shape) > 0.3) / 0.7
    seen = sent + std * rng.normal(size=sent.shape)
    ridge = np.linalg.solve(matrix.T @ matrix + std**2 * np.eye(columns), matrix.T)
    squares = ((seen @ ridge.T - truths) ** 2).sum(axis=1)
    information = gaussian_prior_information(jnp.eye(columns), 1)
    batches = jax.tree.map(lambda leaf: leaf[None], batch)
    bayes = van_trees(model, params, batches, defense, information, num_probes=None).total
    slack = 4 * squares.std() / np.sqrt(len(squares))
    assert 0 < bayes < squares.mean() + slack
    least = np.linalg.pinv(matrix)
    squares = ((seen @ least.T - truths) ** 2).sum(axis=1)
    unbiased = bound(model, params, batch, defense).total
    assert bayes < unbiased < squares.mean() + 4 * squares.std() / np.sqrt(len(squares))
    if not seed % 2:
        np.testing.assert_allclose(squares.mean(), unbiased, rtol=0.15)


def maximum_likelihood(model, params, batch, std, trials, num_steps=12):
    """Squared errors of Gauss-Newton from the truth on noisy gradients: the noise's only trace."""

    def gradient(flat):
        inputs = flat.reshape(batch.inputs.shape)
        return jax.grad(model.loss)(params, batch._replace(inputs=inputs))

    truth = batch.inputs.ravel()
    clean = gradient(truth)

    @jax.jit
    @jax.vmap
    def attack(key):
        seen = clean + std * jax.random.normal(key, clean.shape, clean.dtype)

        def step(_, flat):
            jacobian = jax.jacfwd(gradient)(flat)
            # A little damping, against the steps of a bad draw.
            gram = jacobian.T @ jacobian
            gram = gram + 1e-6 * jnp.trace(gram) * jnp.eye(flat.size)
            return flat + jnp.linalg.solve(gram, jacobian.T @ (seen - gradient(flat)))

        found = jax.lax.fori_loop(0, num_steps, step, truth)
        return jnp.sum(jnp.square(found - truth))

    return np.asarray(attack(jax.random.split(jax.random.key(5), trials)))


def ratio_to_bound(dimension, width, labels, std, trials, seed=0):
    model, params, batch = query(dimension, width, labels, seed)
    least = bound(model, params, batch, defenses.gaussian_noise(std))
    squares = maximum_likelihood(model, params, batch, std, trials)
    assert np.isfinite(squares).all()
    return squares / least.total, np.sqrt(squares.mean() / len(labels))


def test_maximum_likelihood_attains_the_bound():
    ratios, _ = ratio_to_bound(16, 1000, (1.0, -1.0), 0.2, 120)
    assert 0.9 < ratios.mean() < 1.1


@pytest.mark.slow
def test_the_least_squares_error_follows_the_law():
    def error(dimension=16, width=2000, size=2, std=0.1):
        labels = (1.0, -1.0, 1.0, -1.0)[:size]
        found = [ratio_to_bound(dimension, width, labels, std, 60, seed) for seed in range(2)]
        assert 0.85 < np.mean([ratios for ratios, _ in found]) < 1.15
        return np.sqrt(np.mean(np.square([distance for _, distance in found])))

    base = error()
    np.testing.assert_allclose(np.log2(error(width=8000) / base) / 2, -0.5, atol=0.06)
    np.testing.assert_allclose(np.log2(error(dimension=64) / base) / 2, 0.5, atol=0.06)
    np.testing.assert_allclose(np.log2(error(std=0.025) / base) / -2, 1.0, atol=0.05)
    # No power of the batch size: only what samples of one common part cost each other.
    limit = [lower_constant("tanh", jnp.array([2.0, 4.0] * n)) for n in (1, 2)]
    np.testing.assert_allclose(error(size=4) / base, limit[1] / limit[0], rtol=0.15)


# The two-layer network.

TWO, FOUR = (1.0, 1.0), (1.0, 1.0, -1.0, 1.0)


@pytest.mark.parametrize(
    ("dimension", "labels"),
    [(16, TWO)]
    + [
        pytest.param(dimension, labels, marks=pytest.mark.slow)
        for dimension, labels in [(16, FOUR), (32, TWO), (32, FOUR), (64, TWO), (64, FOUR)]
    ],
)
def test_the_constant_of_a_two_layer_network_is_about_one(dimension, labels):
    def constant(width):
        model, params, batch = query(dimension, width, labels)
        found = bound(model, params, batch, defenses.gaussian_noise(0.1))
        return found.distance / (0.1 * np.sqrt(dimension / width))

    narrow, wide = constant(2000), constant(8000)
    assert 1.0 <= narrow <= 1.5 and 1.0 <= wide <= 1.5
    # The bounds themselves: twice the error at a quarter of the width.
    np.testing.assert_allclose(2 * narrow / wide, 2, rtol=0.1)


@pytest.mark.slow
def test_the_constant_tends_to_its_closed_form():
    labels = np.array([1.0, -1.0, 1.0])
    model, params, batch = query(32, 16_000, labels)
    found = bound(model, params, batch, defenses.gaussian_noise(0.1)).distance
    limit = lower_constant("tanh", 3 - labels)
    np.testing.assert_allclose(found / (0.1 * np.sqrt(32 / 16_000)), limit, rtol=0.08)


def test_residuals_unknown_to_the_attacker_cost_it_little():
    model, params, batch = query(16, 2000, (1.0, -1.0))
    known, unknown = (
        bound(model, params, batch, NOISE, unknown_labels=flag).distance for flag in (False, True)
    )
    assert 1.005 < unknown / known < 1.25


def test_pruning_keeps_less_information_than_its_share():
    shares, noise = (0.5, 0.7, 0.9), defenses.gaussian_noise(0.1)
    pruned = chain(defenses.magnitude_prune(0.5), noise)

    @jax.jit
    @jax.vmap
    def run(weights, inputs, labels):
        model, params, batch = two_layer(weights), jnp.full(1000, 1e-3), Batch(inputs, labels)
        gradient = jnp.abs(jax.grad(model.loss)(params, batch))
        lost = [
            1 - kept_information(model, params, batch, gradient > jnp.quantile(gradient, share))
            for share in shares
        ]
        plain, weak = (
            cramer_rao(model, params, batch, defense, method="trace", num_probes=None).total
            for defense in (noise, pruned)
        )
        return jnp.stack(lost), plain, weak

    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(16, 2, 16))
    inputs /= np.linalg.norm(inputs, axis=2, keepdims=True)
    lost, plain, weak = run(
        jnp.asarray(rng.normal(size=(16, 1000, 16)), jnp.float32),
        jnp.asarray(inputs, jnp.float32),
        jnp.asarray(rng.choice([-1.0, 1.0], (16, 2)), jnp.float32),
    )
    found = np.mean(lost, axis=0)
    np.testing.assert_allclose(found, [0.589, 0.793, 0.967], atol=0.05)
    assert (found > np.array(shares)).all()
    # The inequality of the means holds, and is what the method `trace` computes.
    np.testing.assert_allclose(plain / weak, 1 - lost[:, 0], rtol=1e-3)


def test_a_mask_of_other_shapes_is_refused():
    params, batch = mlp_case()
    with pytest.raises(ValueError, match="kept must be a tree of booleans"):
        kept_information(MLP, params, batch, jnp.ones(3, bool))
