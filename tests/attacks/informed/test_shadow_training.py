"""Training of victims and shadows: the plain loop's result, what is fixed and what is drawn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from invjax import conv, defenses, gradients, models
from invjax.attacks.informed.training import deterministic, join, training
from invjax.base import Batch, Model

MODEL = models.mlp((), 3)
SHAPE = (6,)
KEY = jax.random.key(1)
OPTIMIZER = optax.sgd(0.3, momentum=0.9)


def batch(seed, size, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return Batch(
        jnp.asarray(rng.uniform(size=(size, *SHAPE)), dtype), jnp.asarray(rng.integers(0, 3, size))
    )


def close(first, second, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), first, second)


@functools.cache
def start():
    return jax.jit(MODEL.init, static_argnums=1)(jax.random.key(0), SHAPE)


def in_float64(tree):
    return jax.tree.map(lambda leaf: leaf.astype(float), tree)


def test_full_batches_are_the_plain_loop():
    params = start()
    with jax.enable_x64(True):
        data, params = batch(0, 9, float), in_float64(params)
        run = training(MODEL, OPTIMIZER, 4, params=params)

        @jax.jit
        def several(params, data):
            known, target = (
                jax.tree.map(lambda x, p=p: x[p], data) for p in (slice(8), slice(8, 9))
            )
            # A target apart is trained on as one of the batch.
            found = run(KEY, data), run(KEY, known, target)
            state = OPTIMIZER.init(params)
            for _ in range(4):
                updates, state = OPTIMIZER.update(gradients.gradient(MODEL, params, data), state)
                params = optax.apply_updates(params, updates)
            return found, params

        (whole, apart), expected = several(params, data)
        close(whole, expected, rtol=1e-12)
        close(apart, expected, rtol=1e-11)


def test_one_step_of_dp_sgd():
    data, radius, rate = batch(0, 9), 1.0, 0.5
    quiet, loud = (defenses.dp_sgd(radius, noise) for noise in (0.0, 0.7))

    @jax.jit
    def several(params, data):
        found = [
            training(MODEL, optax.sgd(rate), 1, params=params, defense=defense)(KEY, data)
            for defense in (quiet, loud)
        ]
        per_sample = gradients.per_sample_gradients(MODEL, params, data)
        state = loud.init_with_key(jax.random.fold_in(KEY, 2), params)
        clipped = jax.tree.map(
            lambda leaf: leaf / 9, gradients.clipped_sum(MODEL, params, data, radius)
        )
        sent = clipped, loud.update(per_sample, state, params)[0]
        return found, sent, gradients.gradient(MODEL, params, data)

    found, sent, plain = several(start(), data)
    for params, gradient in zip(found, sent, strict=True):
        expected = jax.tree.map(lambda leaf, change: leaf - rate * change, start(), gradient)
        close(params, expected, rtol=1e-5, atol=1e-6)
        difference = optax.tree.norm(optax.tree.sub(plain, gradient))
        assert difference > 0.05 * optax.tree.norm(plain)


@pytest.mark.parametrize(
    "settings",
    [
        {"params": True},
        {"batch_size": 4, "defense": defenses.dp_sgd(1.0, 0.3)},
        {"params": True, "defense": defenses.gaussian_noise(0.1), "batch_size": 3, "order": KEY},
    ],
    ids=["full", "mini", "noise"],
)
def test_many_at_once_are_one_by_one(settings):
    settings = {**settings, "params": start() if "params" in settings else None}
    run = training(MODEL, OPTIMIZER, 5, **settings)
    known, pool = batch(0, 8), batch(1, 3)
    targets = jax.tree.map(lambda leaf: leaf[:, None], pool)

    @jax.jit
    def both(keys, known, targets):
        together = jax.vmap(run, in_axes=(0, None, 0))(keys, known, targets)
        alone = jax.lax.map(lambda one: run(one[0], join(known, one[1])), (keys, targets))
        return together, alone

    together, alone = both(jax.random.split(KEY, 3), known, targets)
    close(together, alone, rtol=1e-4, atol=1e-5)
    assert np.ptp(jax.tree.leaves(together)[0], axis=0).max() > 1e-3


def counter(size):
    """A model whose loss is the mean of the parameters that the labels point at."""
    return Model(
        lambda key, shape: jnp.zeros(size),
        lambda params, inputs: inputs,
        lambda params, batch: params[batch.labels].mean(),
        size,
    )


def test_every_pass_sees_every_sample_once():
    data = Batch(jnp.zeros((7, 1)), jnp.arange(7))
    run = training(counter(7), optax.sgd(1.0), 7, batch_size=3)
    np.testing.assert_allclose(run(jax.random.key(0), data), -np.ones(7), rtol=1e-6)
    fewer = training(counter(7), optax.sgd(3.0), 5, batch_size=3)
    assert sorted(-np.round(fewer(jax.random.key(0), data))) == [2] * 6 + [3]


def test_what_is_fixed_and_what_is_drawn():
    data = Batch(jnp.zeros((7, 1)), jnp.arange(7))
    # Steps of different sizes tell orders apart.
    optimizer = optax.sgd(lambda count: 2.0**-count)

    def runs(**settings):
        run = jax.jit(training(counter(7), optimizer, 4, **settings))
        first, second = (np.asarray(run(jax.random.key(seed), data)) for seed in (0, 1))
        return (first == second).all()

    assert runs()
    assert not runs(batch_size=3)
    assert runs(batch_size=3, order=jax.random.key(3))
    assert not runs(defense=defenses.gaussian_noise(0.1))
    for params in (start(), None):
        run = jax.jit(training(MODEL, OPTIMIZER, 1, params=params))
        first, second = (run(jax.random.key(seed), batch(0, 9)) for seed in (0, 1))
        distance = np.abs(first["layer01"]["kernel"] - second["layer01"]["kernel"]).max()
        assert (distance == 0) == (params is not None)


def test_a_known_seed_makes_it_deterministic():
    data = Batch(jnp.zeros((7, 1)), jnp.arange(7))
    noise = defenses.gaussian_noise(0.1)
    run = training(counter(7), optax.sgd(1.0), 2, batch_size=4, defense=noise)
    found, expected, other = jax.jit(
        lambda data: (deterministic(run, KEY)(data), run(KEY, data), deterministic(run)(data))
    )(data)
    np.testing.assert_array_equal(found, expected)
    assert (found != other).any()


@pytest.mark.parametrize("defense", [None, defenses.clip_per_sample(0.5)], ids=["none", "clip"])
def test_it_can_be_differentiated_forward(defense):
    params = start()
    with jax.enable_x64(True):
        known, target = batch(0, 4, float), batch(1, 1, float)
        run = training(MODEL, OPTIMIZER, 3, params=in_float64(params), defense=defense)
        train = deterministic(run)

        @jax.jit
        def weights(inputs):
            found = train(join(known, target._replace(inputs=inputs)))
            return jax.flatten_util.ravel_pytree(found)[0]

        direction = jax.random.normal(jax.random.key(5), target.inputs.shape, float)
        slope = jax.jit(lambda *args: jax.jvp(weights, *args)[1])((target.inputs,), (direction,))
        ends = [weights(target.inputs + sign * 1e-5 * direction) for sign in (1, -1)]
        np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=1e-8)
        assert np.abs(slope).max() > 1e-3


def test_convolutions_of_the_loop_are_the_fast_ones():
    model = models.lenet(width=2)
    data = Batch(jnp.zeros((2, 8, 8, 1)), jnp.zeros(2, int))
    run = training(model, OPTIMIZER, 2)
    assert not conv.keeps_lax_conv(run, jax.random.key(0), data)


def test_errors():
    with pytest.raises(ValueError, match=r"steps must be a whole number of at least 1, got 0"):
        training(MODEL, OPTIMIZER, 0)
    with pytest.raises(ValueError, match="batch_size must be a whole number"):
        training(MODEL, OPTIMIZER, 1, batch_size=0)
    with pytest.raises(ValueError, match="order is that of mini-batches"):
        training(MODEL, OPTIMIZER, 1, order=KEY)
    with pytest.raises(ValueError, match="batch_size must be at most the 9 samples, got 10"):
        training(MODEL, OPTIMIZER, 1, batch_size=10)(jax.random.key(0), batch(0, 9))
