"""The Bayes-optimal adversary against closed forms: linear-Gaussian posteriors, mass in a ball, risk."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

import invjax
from invjax import attacks, priors
from invjax.attacks.matching.ball import Ball, over_ball, sample_ball
from invjax.base import Facts, LocalTraining, Observation

D, P, STD = 8, 20, 0.5
RNG = np.random.default_rng(0)
A = RNG.normal(size=(P, D)) / np.sqrt(D)
ROOT = RNG.normal(size=(D, D))
COVARIANCE = ROOT @ ROOT.T / D + 0.1 * np.eye(D)
MEAN = RNG.normal(size=D)


def linear_model(matrix=A, shift=None):
    """A model whose gradient is `A x`, as its loss is the parameters times that."""

    def loss(params, batch):
        return jnp.mean(batch.inputs @ jnp.asarray(matrix.T, batch.inputs.dtype) @ params)

    def apply(params, inputs):
        return (inputs @ jnp.asarray(matrix.T, inputs.dtype) @ params)[:, None]

    return invjax.Model(lambda key, shape: jnp.zeros(len(matrix)), apply, loss, 1, "linear")


def posterior(gradient, scale=1.0):
    matrix = scale * A
    precision = np.linalg.inv(COVARIANCE) + matrix.T @ matrix / STD**2
    covariance = np.linalg.inv(precision)
    prior = (np.linalg.inv(COVARIANCE) @ MEAN)[:, None]
    right = prior + matrix.T @ np.atleast_2d(gradient).T / STD**2
    return (covariance @ right).T, covariance


def gaussian_prior(dtype):
    return priors.gaussian(
        jnp.asarray(MEAN, dtype), jnp.asarray(np.linalg.inv(COVARIANCE), dtype), 1.0
    )


def bayes(dtype, **settings):
    settings = {"num_steps": 2000, "learning_rate": 0.1, "constraint": None, **settings}
    defense = invjax.defenses.gaussian_noise(STD)
    return attacks.bayes(linear_model(), defense, gaussian_prior(dtype), **settings)


def draw(key, dtype=jnp.float32):
    """A victim of the prior, and its defended gradient."""
    inputs_key, noise_key = jax.random.split(key)
    root = jnp.asarray(np.linalg.cholesky(COVARIANCE), dtype)
    x = jnp.asarray(MEAN, dtype) + root @ jax.random.normal(inputs_key, (D,), dtype)
    clean = jnp.asarray(A, dtype) @ x
    noise = STD * jax.random.normal(noise_key, (P,), dtype)
    return x[None], observed(clean + noise)


def observed(gradient):
    return Observation(
        jnp.zeros(P, gradient.dtype),
        gradient,
        Facts(input_shape=(D,), num_classes=1, batch_size=1, input_range=(-9.0, 9.0)),
        labels=jnp.zeros(1, jnp.int32),
        public=(None,),
    )


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"mode": "map"}, 1e-6),
        ({"mode": "jensen", "delta": 0.5}, 1e-6),
        ({"mode": "jensen", "delta": 2.0, "num_samples": 2}, 1e-6),
        ({"mode": "jensen", "delta": 0.5, "antithetic": False}, 5e-2),
    ],
)
def test_the_posterior_mean_in_closed_form(settings, tolerance):
    with jax.enable_x64(True):
        _, observation = draw(jax.random.key(1), jnp.float64)

        def start(key, shape, observation):
            return jax.random.normal(key, shape, jnp.float64)

        attack = bayes(jnp.float64, initializer=start, **settings)
        found = attack(jax.random.key(2), observation).inputs
        mean, _ = posterior(observation.gradient)
        error = np.linalg.norm(found - mean)
        assert error < tolerance
        # Without pairs the noise of the points is there, and small.
        assert settings.get("antithetic", True) or error > 1e-6


def test_in_single_precision():
    _, observation = draw(jax.random.key(1))
    found = bayes(jnp.float32)(jax.random.key(2), observation).inputs
    np.testing.assert_allclose(found, posterior(observation.gradient)[0], atol=1e-3)


def test_the_noise_of_a_federated_update_is_on_its_own_scale():
    """Two local steps at rate 0.1 move the weights of a linear loss by a fifth of its gradient."""
    local = LocalTraining(epochs=2, batch_size=1, learning_rate=0.1, num_samples=1)
    _, seen = draw(jax.random.key(1))
    seen = seen._replace(facts=dataclasses.replace(seen.facts, local=local))
    state = bayes(jnp.float32).init(jax.random.key(2), seen)
    mean, covariance = posterior(seen.gradient, scale=0.2)
    expected = np.linalg.solve(covariance, state.variables["inputs"][0, 0] - mean[0])
    np.testing.assert_allclose(state.gradient["inputs"][0, 0], expected, rtol=1e-3, atol=1e-3)
    # No defence at all may be said by `None`.
    bare = attacks.bayes(linear_model(), None, num_steps=3)
    plain = attacks.bayes(linear_model(), invjax.chain(), num_steps=3)
    both = (attack(jax.random.key(2), seen).inputs for attack in (bare, plain))
    np.testing.assert_array_equal(*both)
    adam = dataclasses.replace(local, optimizer="adam")
    with pytest.raises(ValueError, match="must be 'sgd', since this attack reads an update"):
        bayes(jnp.float32)(
            jax.random.key(2), seen._replace(facts=dataclasses.replace(seen.facts, local=adam))
        )


def closed_form(estimate):
    """An attack that needs no steps: `estimate(gradient) -> [D]`."""

    def result(observation, state):
        inputs = estimate(observation.gradient)[None]
        one = jnp.ones(1, bool)
        return invjax.Reconstruction(inputs, jnp.zeros(1, int), one, jnp.zeros(()), {})

    return invjax.Attack(lambda key, observation: (), lambda observation, state: state, result)


def linear_estimate(precision, mean):
    """Posterior mean under a Gaussian prior, which may be the wrong one."""
    inverse = np.linalg.inv(precision + A.T @ A / STD**2)
    gain, offset = inverse @ A.T / STD**2, inverse @ precision @ mean
    return lambda gradient: (
        jnp.asarray(offset, jnp.float32) + jnp.asarray(gain, jnp.float32) @ gradient
    )


ESTIMATES = {
    "bayes": linear_estimate(np.linalg.inv(COVARIANCE), MEAN),
    "likelihood": linear_estimate(np.zeros((D, D)), MEAN),
    "wrong prior": linear_estimate(25 * np.eye(D), np.zeros(D)),
}
DELTAS = np.array([0.5, 1.0, 1.5, 2.0], np.float32)
DRAWS = 200_000


@pytest.fixture(scope="module")
def risks():
    run = jax.jit(
        lambda key, name: attacks.risk(closed_form(ESTIMATES[name]), draw, key, DELTAS, DRAWS),
        static_argnums=1,
    )
    return {name: run(jax.random.key(3), name) for name in ESTIMATES}


def test_risk_is_that_of_the_posterior(risks):
    _, covariance = posterior(np.zeros(P))
    # Tail of a generalised chi-square, by draws of its own.
    eigenvalues = np.linalg.eigvalsh(covariance)
    squares = RNG.normal(size=(2_000_000, D)) ** 2 @ eigenvalues
    analytic = [(squares > delta**2).mean() for delta in DELTAS]
    np.testing.assert_allclose(risks["bayes"].value, analytic, atol=0.004)
    np.testing.assert_allclose(
        jnp.mean(jnp.square(risks["bayes"].distances)), np.trace(covariance), rtol=0.01
    )
    likelihood = STD**2 * np.trace(np.linalg.inv(A.T @ A))
    np.testing.assert_allclose(
        jnp.mean(jnp.square(risks["likelihood"].distances)), likelihood, rtol=0.01
    )


def test_nothing_beats_the_bayes_adversary(risks):
    for name in ("likelihood", "wrong prior"):
        worse = risks[name].value - risks["bayes"].value
        assert (worse >= -2 * risks[name].standard_error).all() and worse.max() > 0.1
    # Beyond the smallest radius all three are apart.
    for better, worse in (("bayes", "likelihood"), ("likelihood", "wrong prior")):
        assert (risks[better].value < risks[worse].value)[1:].all()


def test_risk_is_one_less_the_mass_in_the_ball():
    """`R = 1 - E_g int_B(f(g), delta) p(x | g) dx`, for an adversary that is not optimal."""
    delta, number = 1.5, 9000
    _, covariance = posterior(np.zeros(P))
    keys = jax.random.split(jax.random.key(5), number)
    gradients = jax.vmap(lambda key: draw(key)[1].gradient)(keys)
    guesses = np.asarray(jax.vmap(ESTIMATES["likelihood"])(gradients))
    means, _ = posterior(gradients)
    points = RNG.normal(size=(1000, D)) @ np.linalg.cholesky(covariance).T
    inside = [
        (np.linalg.norm(points + mean - guess, axis=1) <= delta).mean()
        for mean, guess in zip(means, guesses, strict=True)
    ]
    found = attacks.risk(
        closed_form(ESTIMATES["likelihood"]), draw, jax.random.key(6), delta, 50_000
    )
    np.testing.assert_allclose(found.value, 1 - np.mean(inside), atol=0.005)


def test_risk_of_the_attack_itself():
    attack = bayes(jnp.float32, num_steps=1500)
    found = attacks.risk(attack, draw, jax.random.key(3), 1.5, 300)
    exact = attacks.risk(closed_form(ESTIMATES["bayes"]), draw, jax.random.key(3), 1.5, 300)
    np.testing.assert_allclose(found.distances, exact.distances, atol=2e-2)
    assert found.value.shape == () and 0 < found.standard_error < 0.05


def test_points_are_uniform_in_the_ball():
    ball = Ball(2.0, 40_000, antithetic=True)
    points = np.asarray(sample_ball(jax.random.key(0), ball, (2, 3)))
    assert points.shape == (40_000, 2, 3)
    np.testing.assert_array_equal(points[:20_000], -points[20_000:])
    squared = (points**2).sum(axis=(1, 2))
    np.testing.assert_allclose(squared.mean(), 4 * 6 / 8, rtol=0.01)
    uniform = (np.sqrt(squared[:20_000]) / 2) ** 6
    assert scipy.stats.kstest(uniform, "uniform").pvalue > 1e-3


class TestTwoPeaks:
    """0.6 N(0, 0.05^2) + 0.4 N(3, 0.5^2): narrow and heavy, broad and light."""

    @staticmethod
    def value(x):
        log_weights = jnp.log(jnp.array([0.6 / 0.05, 0.4 / 0.5]))
        squares = jnp.square((x - jnp.array([0.0, 3.0])) / jnp.array([0.05, 0.5]))
        return -jax.nn.logsumexp(log_weights - squares / 2)

    @staticmethod
    def mass(x, delta):
        found = 0.0
        for weight, mean, std in ((0.6, 0.0, 0.05), (0.4, 3.0, 0.5)):
            law = scipy.stats.norm(mean, std)
            found += weight * (law.cdf(x + delta) - law.cdf(x - delta))
        return found

    def best(self, mode, delta=0.5):
        grid = jnp.linspace(-1, 5, 601)
        ball = None if mode == "map" else Ball(delta, 4000, mode)
        values = jax.lax.map(
            lambda x: over_ball(lambda y: self.value(y[0]), ball, jax.random.key(0))(x[None]), grid
        )
        return float(grid[jnp.argmin(values)])

    def test_the_surrogate_prefers_the_broad_one(self):
        assert abs(self.best("jensen") - 3.0) < 0.1
        assert self.mass(self.best("jensen"), 0.5) < 0.3

    def test_the_mass_prefers_the_heavy_one(self):
        grid = np.linspace(-1, 5, 601)
        exact = max(self.mass(x, 0.5) for x in grid)
        assert self.mass(self.best("exact_mc"), 0.5) > exact - 0.005
        assert abs(self.best("exact_mc")) < 0.5 and abs(self.best("map")) < 0.02

    def test_the_attack_finds_it(self):
        """Through the loop: the data say nothing, the prior has two peaks."""
        matrix = np.zeros((2, 1))
        observation = observed(jnp.zeros(2))._replace(params=jnp.zeros(2))
        observation = observation._replace(
            facts=Facts(input_shape=(1,), num_classes=1, batch_size=1, input_range=(-9.0, 9.0))
        )

        def run(mode):
            attack = attacks.bayes(
                linear_model(matrix),
                invjax.defenses.gaussian_noise(1.0),
                lambda inputs, context: self.value(inputs[0, 0]),
                mode=mode,
                delta=0.5,
                num_samples=400,
                num_steps=300,
                restarts=8,
                learning_rate=0.05,
                initializer=lambda key, shape, _: jax.random.uniform(
                    key, shape, minval=-1, maxval=4
                ),
            )
            return attack(jax.random.key(0), observation).inputs[0, 0]

        assert abs(run("jensen") - 3.0) < 0.2
        # The mass is flat to 0.004 between -0.35 and 0.35.
        assert abs(run("exact_mc")) < 0.45


def test_annealing_ends_at_weight_one():
    schedule = attacks.annealed(200, start=0.25)
    found = [float(schedule(jnp.array(step))) for step in (0, 50, 100, 150, 200)]
    np.testing.assert_allclose(found, [0.25, 0.5, 1, 1, 1], rtol=1e-5)
    _, observation = draw(jax.random.key(1))
    found = bayes(jnp.float32, schedule="paper")(jax.random.key(2), observation).inputs
    np.testing.assert_allclose(found, posterior(observation.gradient)[0], atol=2e-3)
    # A weight that stays below one leaves the prior too much to say.
    half = bayes(jnp.float32, schedule=optax.constant_schedule(0.1))(jax.random.key(2), observation)
    assert np.linalg.norm(half.inputs - found) > 0.05


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "mean"}, "mode must be"),
        ({"mode": "jensen"}, "delta"),
        ({"mode": "jensen", "delta": 1.0, "num_samples": 3}, "even"),
        ({"mode": "exact_mc", "delta": 1.0, "num_samples": 0}, "num_samples"),
        ({"schedule": "papers"}, "schedule"),
        ({"learning_rate": -0.1}, "learning_rate must lie in"),
        ({"num_steps": 0}, "num_steps must be a whole number"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        attacks.bayes(linear_model(), invjax.chain(), **settings)


def test_risk_needs_victims():
    with pytest.raises(ValueError, match="num_samples"):
        attacks.risk(closed_form(lambda g: g[:D]), draw, jax.random.key(0), 1.0, 0)


class TestTheWrongNorm:
    """With many more equations than unknowns, L1 under Gaussian noise loses a factor of pi / 2 in the
    squared error, squared L2 under Laplace noise a factor of 2 (asymptotic relative efficiencies).
    """

    EQUATIONS, VICTIMS = 4000, 100

    def loss_in_decibels(self, noise):
        matrix = RNG.normal(size=(self.EQUATIONS, D)).astype(np.float32)
        truth = RNG.normal(size=(self.VICTIMS, 1, D)).astype(np.float32)
        noisy = truth[:, 0] @ matrix.T + noise.astype(np.float32)
        squared = np.linalg.lstsq(matrix, noisy.T, rcond=None)[0].T
        model = linear_model(matrix)

        def one(key, gradient, start):
            seen = observed(gradient)._replace(params=jnp.zeros(self.EQUATIONS))
            attack = attacks.gradient_matching(
                model,
                objective=attacks.objectives.l1(),
                optimizer=optax.adam(optax.cosine_decay_schedule(0.01, 300)),
                num_steps=300,
                initializer=lambda key, shape, observation: start,
            )
            return attack(key, seen).inputs

        keys = jax.random.split(jax.random.key(0), self.VICTIMS)
        # From the least squares, which are near.
        absolute = jax.jit(jax.vmap(one))(keys, noisy, squared[:, None])
        errors = [np.mean((found - truth[:, 0]) ** 2) for found in (absolute[:, 0], squared)]
        return 10 * np.log10(errors[0] / errors[1])

    def test_l1_under_gaussian_noise(self):
        noise = RNG.normal(size=(self.VICTIMS, self.EQUATIONS))
        assert abs(self.loss_in_decibels(noise) - 10 * np.log10(np.pi / 2)) < 0.35

    def test_squared_l2_under_laplace_noise(self):
        noise = RNG.laplace(size=(self.VICTIMS, self.EQUATIONS))
        assert abs(-self.loss_in_decibels(noise) - 10 * np.log10(2)) < 0.35
