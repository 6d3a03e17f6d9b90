"""The tensor attack on two-layer networks: exact without a defence, and under which defences still."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import invjax
from invjax import Batch, Facts, LocalTraining, Observation, models
from invjax.attacks.analytic import tensor as lib
from invjax.defenses.pruning import prune


def drawn(seed, model, size, width, bias, norms=1.0):
    """Random directions at the server's query point, labels -1 and 1 in turn."""
    keys = jax.random.split(jax.random.key(seed), 2)
    inputs = jax.random.normal(keys[0], (size, width))
    inputs *= norms / jnp.linalg.norm(inputs, axis=1, keepdims=True)
    params = jax.tree.map(lambda leaf: leaf.astype(inputs.dtype), model.init(keys[1], (width,)))
    labels = jnp.where(jnp.arange(size) % 2 == 0, 1.0, -1.0)
    return lib.query(keys[1], params, bias=bias), Batch(inputs, labels)


def seen(params, gradient, size, width, local=None):
    facts = Facts(input_shape=(width,), num_classes=1, batch_size=size, local=local)
    return Observation(params, gradient, facts)


@functools.partial(jax.jit, static_argnums=(0, 1))
def attacked(model, attacks, key, observation):
    return [attack.init(key, observation) for attack in attacks]


def outcome(activation, size, width, units, bias, seed=0, norm=1.0, **options):
    """Unpolished and polished reconstructions in one program, with the truth and its residuals."""
    model = lib.two_layer(units, activation)
    attacks = tuple(
        lib.tensor(model, norm=norm, polish=polish, restarts=0, **options)
        for polish in (False, True)
    )
    params, batch = drawn(seed, model, size, width, bias)
    gradient = jax.grad(model.loss)(params, batch)
    observation = seen(params, gradient, size, width)
    residuals = model.apply(params, batch.inputs)[:, 0] - batch.labels
    return batch, *attacked(model, attacks, jax.random.key(9), observation), residuals


def check_labels(found, batch):
    matched = invjax.metrics.match(found.inputs, batch.inputs)
    np.testing.assert_array_equal(found.labels[matched], batch.labels > 0)


def check_exact(batch, rough, fine, residuals, limit):
    error = lib.rmse(rough.inputs, batch.inputs)
    assert error < limit
    # The polish is what makes it exact.
    assert lib.rmse(fine.inputs, batch.inputs) < min(1e-8, float(error))
    assert fine.found.all() and fine.objective < 1e-12
    matched = invjax.metrics.match(fine.inputs, batch.inputs)
    np.testing.assert_allclose(fine.diagnostics["targets"][matched], batch.labels, atol=1e-8)
    signals = len(matched) * fine.diagnostics["signals"][matched, 0]
    np.testing.assert_allclose(signals, residuals, atol=1e-8)
    check_labels(fine, batch)
    check_labels(rough, batch)


def test_a_batch_of_eight_comes_back_exactly():
    with jax.enable_x64(True):
        batch, rough, fine, residuals = outcome("tanh", 8, 64, 4000, 3.0)
        check_exact(batch, rough, fine, residuals, 0.05)
        assert rough.diagnostics["gap"] < 1e-12
        assert 0.01 < rough.objective < 0.1
    batch, rough, fine, _ = outcome("tanh", 8, 64, 4000, 3.0)
    check_labels(rough, batch)
    check_labels(fine, batch)
    assert rough.inputs.dtype == jnp.float32
    assert rough.diagnostics["gap"] < 1e-5
    assert lib.rmse(rough.inputs, batch.inputs) < 0.05
    assert lib.rmse(fine.inputs, batch.inputs) < 1e-4
    assert fine.found.all()


@pytest.mark.parametrize(
    ("activation", "bias"), [("sigmoid", 3.0), ("softplus", 3.0), ("square_cube", 5.0)]
)
def test_other_activations(activation, bias):
    with jax.enable_x64(True):
        check_exact(*outcome(activation, 3, 12, 2000, bias), 0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("activation", "bias"), [("sigmoid", 3.0), ("softplus", 3.0)])
def test_other_activations_at_full_size(activation, bias):
    with jax.enable_x64(True):
        check_exact(*outcome(activation, 8, 64, 4000, bias), 0.05)
    batch, rough, fine, _ = outcome(activation, 8, 64, 4000, bias)
    check_labels(rough, batch)
    check_labels(fine, batch)
    assert lib.rmse(rough.inputs, batch.inputs) < 0.05
    assert lib.rmse(fine.inputs, batch.inputs) < 1e-4


@pytest.mark.slow
def test_the_published_activation_at_full_size():
    with jax.enable_x64(True):
        check_exact(*outcome("square_cube", 8, 64, 4000, 5.0), 0.3)


@pytest.mark.slow
def test_relu_and_sixteen_samples():
    with jax.enable_x64(True):
        errors = []
        for seed in range(5):
            batch, rough, fine, _ = outcome("relu", 4, 32, 4000, 2.0, seed=seed)
            errors.append(float(lib.rmse(rough.inputs, batch.inputs)))
            # Away from its kink the gradient is bilinear: exact after all.
            assert lib.rmse(fine.inputs, batch.inputs) < 1e-8 and fine.found.all()
        assert np.median(errors) < 0.06
        batch, rough, _, _ = outcome("tanh", 16, 64, 8000, 3.0)
        assert lib.rmse(rough.inputs, batch.inputs) < 0.06
        check_labels(rough, batch)


def test_odd_activations_hide_the_sign():
    with jax.enable_x64(True):
        model = lib.two_layer(50)
        params, batch = drawn(0, model, 3, 5, 0.0)
        turned = Batch(-batch.inputs, -batch.labels)
        gradients = [jax.grad(model.loss)(params, each) for each in (batch, turned)]
        for layer in ("hidden", "output"):
            one, other = (gradient[layer]["kernel"] for gradient in gradients)
            np.testing.assert_allclose(one, other, atol=1e-12)


def test_a_linear_network_reveals_only_the_sum_and_a_quadratic_one_only_the_span():
    """Other samples of the same residuals, far from the first ones, have the same gradient."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        inputs, residuals = rng.normal(size=(3, 6)), rng.uniform(1.0, 3.0, 3)
        moved = rng.normal(size=(3, 6))
        moved -= residuals[:, None] * (residuals @ moved)[None] / (residuals @ residuals)
        turned, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        roots = np.sqrt(residuals)[:, None]
        for activation, others in (
            ("identity", inputs + moved),
            ("square", turned @ (roots * inputs) / roots),
        ):
            model = lib.two_layer(50, activation)
            params, _ = drawn(0, model, 3, 6, 3.0)

            def gradient(samples, model=model, params=params):
                samples = jnp.asarray(samples)
                labels = model.apply(params, samples)[:, 0] - jnp.asarray(residuals)
                return jax.grad(model.loss)(params, Batch(samples, labels))

            jax.tree.map(
                functools.partial(np.testing.assert_allclose, atol=1e-12),
                gradient(others),
                gradient(inputs),
            )
            assert lib.rmse(jnp.asarray(others), jnp.asarray(inputs), sign_invariant=True) > 0.5
            generic = gradient(rng.normal(size=(3, 6)))["hidden"]["kernel"]
            assert abs(generic - gradient(inputs)["hidden"]["kernel"]).max() > 1e-3
        # What is told: the sum by any row, the span by all.
        rows = gradient(inputs)["hidden"]["kernel"].T
        assert np.linalg.matrix_rank(np.concatenate([rows, inputs]), tol=1e-10) == 3


SIZE, WIDTH, UNITS = 2, 16, 1000


@functools.cache
def small():
    """One program for all defences: two samples, a thousand units."""
    model = lib.two_layer(UNITS)
    adaptive = lib.tensor(model, restarts=8)
    published = lib.tensor(model, method="paper", estimator="outer")
    return model, functools.partial(attacked, model, (adaptive, published))


def dropped(gradient, rate):
    """Units that were not trained this time."""
    kept = jax.random.bernoulli(jax.random.key(5), 1 - rate, (UNITS,))
    return {
        "hidden": {"kernel": gradient["hidden"]["kernel"] * kept[None]},
        "output": gradient["output"] | {"kernel": gradient["output"]["kernel"] * kept[:, None]},
    }


def noisy(gradient, deviation):
    keys = jax.random.split(jax.random.key(6), 3)
    leaves, tree = jax.tree.flatten(gradient)
    added = [
        leaf + deviation * jax.random.normal(key, leaf.shape, leaf.dtype)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, added)


DEFENSES = {
    "none": lambda gradient: gradient,
    "clipped": lambda gradient: jax.tree.map(lambda leaf: 0.01 * leaf, gradient),
    "dropout of units": lambda gradient: dropped(gradient, 0.75),
    "dropout of entries": lambda gradient: dropout_of_entries(gradient),
    "pruned": lambda gradient: prune(gradient, 0.9, "tensor"),
}


def dropout_of_entries(gradient):
    defense = invjax.defenses.gradient_dropout(0.5)
    return defense.update(gradient, defense.init_with_key(jax.random.key(3), gradient))[0]


@pytest.mark.parametrize("defense", DEFENSES)
def test_defenses_that_do_not_help(defense):
    with jax.enable_x64(True):
        model, run = small()
        params, batch = drawn(1, model, SIZE, WIDTH, 3.0)
        gradient = DEFENSES[defense](jax.grad(model.loss)(params, batch))
        adaptive, published = run(jax.random.key(0), seen(params, gradient, SIZE, WIDTH))
        assert lib.rmse(adaptive.inputs, batch.inputs) < 1e-6
        assert adaptive.found.all()
        assert lib.rmse(published.inputs, batch.inputs) > 0.05
        # Pruning looks strong to moments, for which what is missing is zero.
        if defense == "pruned":
            assert lib.rmse(published.inputs, batch.inputs) > 0.5
            assert not published.found.any()


def test_what_noise_hides_is_not_claimed():
    with jax.enable_x64(True):
        model, run = small()
        params, batch = drawn(1, model, SIZE, WIDTH, 3.0)
        gradient = noisy(jax.grad(model.loss)(params, batch), 0.1)
        adaptive, published = run(jax.random.key(0), seen(params, gradient, SIZE, WIDTH))
        assert not adaptive.found.any() and not published.found.any()
        # Told the level, the fit is one of maximum likelihood and says that nothing is left but noise.
        attack = lib.tensor(model, method="paper", estimator="outer", polish=True, noise_std=0.1)
        fitted = attack(jax.random.key(0), seen(params, gradient, SIZE, WIDTH))
        assert 0.95 < fitted.objective < 1.05 and fitted.found.all()
        error = lib.rmse(fitted.inputs, batch.inputs)
        assert error < 0.5 * lib.rmse(published.inputs, batch.inputs)
        # Of the order of the bound, sigma sqrt(d / m) over the root mean square residual of 3.
        assert error < 3 * 0.1 * SIZE * np.sqrt(WIDTH / UNITS)


def test_noise_that_buries_the_samples_finds_nothing():
    """The fit is as good as any, for there is nothing to fit but noise."""
    with jax.enable_x64(True):
        model, _ = small()
        params, batch = drawn(1, model, SIZE, WIDTH, 3.0)
        gradient = jax.grad(model.loss)(params, batch)
        attack = lib.tensor(
            model,
            method="paper",
            estimator="outer",
            polish=True,
            noise_std=0.1,
            norm=1.0,
            restarts=2,
        )
        run = jax.jit(attack)
        for shrunk in (1.0, 0.3, 0.1, 0.01):
            part = noisy(jax.tree.map(lambda leaf, by=shrunk: by * leaf, gradient), 0.1)
            fitted = run(jax.random.key(0), seen(params, part, SIZE, WIDTH))
            assert 0.9 < fitted.objective < 1.1
            errors = jnp.linalg.norm(
                fitted.inputs[invjax.metrics.match(fitted.inputs, batch.inputs)] - batch.inputs,
                axis=1,
            )
            clear = shrunk == 1.0
            assert fitted.found.all() == clear and fitted.found.any() == clear
            assert (errors < 0.1).all() == clear and (errors > 0.4).all() != clear
            # To first order the error is a third of what is told.
            if clear:
                assert 0.5 < 3 * errors.mean() / fitted.diagnostics["residual"].mean() < 2


def test_signs_are_told_by_an_output_bias_or_not_at_all():
    with jax.enable_x64(True):
        model, run = small()
        for bias, told in ((3.0, True), (0.0, False)):
            params, batch = drawn(1, model, SIZE, WIDTH, bias)
            gradient = jax.grad(model.loss)(params, batch)
            adaptive, _ = run(jax.random.key(0), seen(params, gradient, SIZE, WIDTH))
            assert lib.rmse(adaptive.inputs, batch.inputs, sign_invariant=True) < 1e-6
            assert (lib.rmse(adaptive.inputs, batch.inputs) < 1e-6) == told
            assert adaptive.found.all() == told and adaptive.found.any() == told


def test_local_steps_count_as_so_many_gradients():
    with jax.enable_x64(True):
        model = lib.two_layer(4000)
        attacks = (lib.tensor(model, method="paper"),)
        params, batch = drawn(0, model, 4, 16, 3.0)
        errors = []
        for steps in (1, 10):
            local = LocalTraining(
                epochs=steps, batch_size=4, learning_rate=0.05 / 4000, num_samples=4
            )
            update = invjax.gradients.federated_update(
                jax.random.key(0), model, params, batch, local
            )
            observation = seen(params, update, 4, 16, local)
            (found,) = attacked(model, attacks, jax.random.key(1), observation)
            errors.append(float(lib.rmse(found.inputs, batch.inputs)))
            matched = invjax.metrics.match(found.inputs, batch.inputs)
            np.testing.assert_array_equal(found.labels[matched], batch.labels > 0)
        assert errors[1] < 1.3 * errors[0] < 0.3


def test_a_wrong_batch_size_is_not_believed():
    with jax.enable_x64(True):
        model, _ = small()
        params, batch = drawn(2, model, 2, 5, 3.0)
        gradient = jax.grad(model.loss)(params, batch)
        run = jax.jit(lib.tensor(model, restarts=0))
        less = run(jax.random.key(0), seen(params, gradient, 1, 5))
        assert not less.found.any() and less.diagnostics["gap"] > 1e-3
        more = run(jax.random.key(0), seen(params, gradient, 3, 5))
        for inputs in more.inputs[more.found]:
            assert jnp.linalg.norm(batch.inputs - inputs[None], axis=1).min() < 1e-6
        alone = Batch(batch.inputs[:1], batch.labels[:1])
        one = run(jax.random.key(0), seen(params, jax.grad(model.loss)(params, alone), 1, 5))
        assert one.found.all() and lib.rmse(one.inputs, alone.inputs) < 1e-8


def test_victims_side_by_side_through_observe():
    model = lib.two_layer(600)
    attack = lib.tensor(model, restarts=0)
    params = model.init(jax.random.key(0), (2, 3, 1))
    plant = lib.planted_query(4.0)
    params = plant(jax.random.key(1), params)
    inputs = jax.random.normal(jax.random.key(2), (3, 2, 2, 3, 1))
    labels = jnp.asarray([[0, 1], [1, 1], [0, 0]])

    def observe(inputs, labels):
        return invjax.observe(jax.random.key(0), model, params, Batch(inputs, labels))

    observations = jax.vmap(observe)(inputs, labels)
    keys = jax.random.split(jax.random.key(3), 3)
    found = jax.vmap(attack)(keys, observations)
    assert found.inputs.shape == inputs.shape and found.found.all()
    for index in range(3):
        # Norms were not granted.
        assert lib.rmse(found.inputs[index], inputs[index]) < 1e-3
        matched = invjax.metrics.match(found.inputs[index], inputs[index])
        np.testing.assert_array_equal(found.labels[index][matched], labels[index])


def test_errors():
    model = lib.two_layer(20)
    with pytest.raises(ValueError, match="method must be one of"):
        lib.tensor(model, method="moments")
    with pytest.raises(ValueError, match="estimator must be one of"):
        lib.tensor(model, estimator="inner")
    with pytest.raises(ValueError, match="noise_std"):
        lib.tensor(model, noise_std=0.0)
    with pytest.raises(ValueError, match="one output"):
        lib.tensor(models.mlp((20,), activation="tanh"), method="paper")
    with pytest.raises(ValueError, match="loss is for models of one output"):
        lib.tensor(models.mlp((20,), activation="tanh"), loss="squared")
    with pytest.raises(ValueError, match="activation must be one of"):
        lib.two_layer(20, "sine")
    with pytest.raises(ValueError, match="width"):
        lib.two_layer(0)
    params, batch = drawn(0, model, 3, 5, 3.0)
    observation = seen(params, jax.grad(model.loss)(params, batch), 3, 5)
    attack, key = lib.tensor(model), jax.random.key(0)
    for size, message in ((None, "does not say the batch size"), (6, r"must lie in \[1, 5\]")):
        facts = dataclasses.replace(observation.facts, batch_size=size)
        with pytest.raises(ValueError, match=message):
            attack(key, observation._replace(facts=facts))
    facts = dataclasses.replace(observation.facts, batch_size=4)
    with pytest.raises(ValueError, match=r"35 coefficients .* degree 3\), more than the 20 hidden"):
        attack(key, observation._replace(facts=facts))
    deep = models.mlp((20, 20), 3, activation="tanh")
    params = deep.init(key, (5,))
    observation = invjax.observe(key, deep, params, Batch(batch.inputs, jnp.zeros(3, int)))
    with pytest.raises(ValueError, match="head_features"):
        lib.tensor(deep)(key, observation)
