"""Federated updates: exact simulation, derivatives through it, what it recovers, what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import invjax
from invjax import Batch, attacks, metrics
from invjax.attacks import objectives
from invjax.attacks.matching import federated, simulation
from invjax.attacks.matching.priors import Context
from invjax.base import LocalTraining, Model

SHAPE = (8, 8, 1)


@pytest.fixture(scope="module")
def digits():
    return invjax.datasets.digits()


def round_of(epochs=2, batch_size=2, num_samples=4, learning_rate=0.2):
    return LocalTraining(
        epochs=epochs,
        batch_size=batch_size,
        num_samples=num_samples,
        learning_rate=learning_rate,
    )


def client(digits, model, local, seed=0):
    """A client's samples, the observation of its update, and its orders."""
    params_key, data_key, key = jax.random.split(jax.random.key(seed), 3)
    params = model.init(params_key, SHAPE)
    batch = invjax.datasets.draw(data_key, digits, local.num_samples, distinct_labels=True)
    observation = invjax.observe(key, model, params, batch, local=local, grant_labels=True)
    order_key = jax.random.split(key)[0]
    keys = [jax.random.fold_in(order_key, epoch) for epoch in range(local.epochs)]
    orders = jnp.stack([jax.random.permutation(key, local.num_samples) for key in keys])
    return batch, observation, orders


def clients(digits, model, local, number):
    rows = [client(digits, model, local, seed) for seed in range(number)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)


def order_logits(orders, local):
    """Shares that put every sample where its order has it."""
    batches = jnp.argsort(orders, axis=1) // local.batch_size
    count = local.num_steps // local.epochs
    return 60 * jax.nn.one_hot(batches, count, axis=1).reshape(local.num_steps, -1)


def close(a, b, tolerance=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance), a, b)


@pytest.fixture(scope="module")
def small(digits):
    model = invjax.models.mlp((8,), activation="tanh")
    local = round_of()
    return (model, local, *client(digits, model, local))


# Epochs, mini-batches that divide the samples or do not, or hold them all; a loop of 18 steps.
@pytest.mark.parametrize(
    ("epochs", "batch_size", "num_samples"),
    [
        (3, 2, 5),
        pytest.param(2, 9, 3, marks=pytest.mark.slow),
        pytest.param(6, 1, 3, marks=pytest.mark.slow),
    ],
)
def test_the_simulation_is_the_client(digits, epochs, batch_size, num_samples):
    model = invjax.models.mlp((8,))
    local = round_of(epochs, batch_size, num_samples)
    batch, observation, orders = client(digits, model, local)

    @jax.jit
    def simulations(params, inputs, labels):
        def simulate(inputs, labels, *orders):
            return federated.simulate(model, params, Batch(inputs, labels), local, *orders)

        same = jnp.full_like(labels, 3)
        return {
            "granted": simulate(inputs, labels, orders),
            "soft labels": simulate(inputs, jax.nn.one_hot(labels, 10), orders),
            "shares": simulation.simulate_shares(
                model, params, Batch(inputs, labels), local, order_logits(orders, local)
            ),
            "same label": simulate(inputs, same, orders),
            # A copy for every epoch, in the order of its visits.
            "copies": simulate(inputs[orders].reshape(-1, *SHAPE), same),
        }

    found = simulations(observation.params, *batch)
    for name in ("granted", "soft labels", "shares"):
        close(found[name], observation.gradient)
    close(found["copies"], found["same label"])


def test_shares_fill_the_mini_batches():
    """Whatever the logits, an epoch sees every sample once, and a step's loss is a mean."""
    local = round_of(epochs=2, batch_size=3, num_samples=4, learning_rate=1.0)

    # The loss is linear and every sample has a parameter: the update counts mean losses.
    def loss(params, batch):
        return jnp.mean(batch.inputs @ params)

    linear = Model(lambda key, shape: jnp.zeros(4), lambda params, x: x, loss, 4)
    batch = Batch(jnp.eye(4), jnp.zeros(4, jnp.int32))
    logits = jax.random.normal(jax.random.key(0), (4, 4))
    seen = simulation.simulate_shares(linear, jnp.zeros(4), batch, local, logits)
    # Four steps, in each of which the weights sum to one.
    np.testing.assert_allclose(seen.sum(), 4, rtol=0.02)
    assert np.ptp(seen) > 0.1
    # Alone in the second mini-batch of both epochs, a sample weighs 1; in the first, 1/3.
    certain = 60 * jnp.array([[1, 0, 1, 1], [0, 1, 0, 0]] * 2, jnp.float32)
    seen = simulation.simulate_shares(linear, jnp.zeros(4), batch, local, certain)
    np.testing.assert_allclose(seen, [2 / 3, 2, 2 / 3, 2 / 3], atol=1e-6)


@pytest.mark.slow
def test_derivatives_through_the_simulation(digits):
    """Against plain `jax.grad` throughout and against differences, in float64."""
    model = invjax.models.mlp((8,), activation="tanh")
    local = round_of(epochs=2, batch_size=2, num_samples=3, learning_rate=0.5)
    batch, observation, orders = client(digits, model, local)

    def plain(params, inputs):
        end = params
        for order in np.asarray(orders):
            for chosen in (order[:2], order[2:]):
                samples = Batch(inputs[chosen], batch.labels[chosen])
                gradient = jax.grad(model.loss)(end, samples)
                end = jax.tree.map(lambda p, g: p - local.learning_rate * g, end, gradient)
        return optax.tree.sub(params, end)

    with jax.enable_x64(True):
        params, update = jax.tree.map(
            lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64),
            (observation.params, observation.gradient),
        )
        seen = observation._replace(gradient=update)
        rng = np.random.default_rng(0)
        inputs, direction = (jnp.asarray(rng.random(batch.inputs.shape)) for _ in range(2))
        logits = 0.01 * order_logits(orders, local)
        turn = jnp.asarray(rng.normal(size=logits.shape))

        def distance(simulated):
            return objectives.squared_l2().value(simulated, seen)

        def granted(inputs):
            samples = Batch(inputs, batch.labels)
            return distance(federated.simulate(model, params, samples, local, orders))

        def learned(step):
            samples = Batch(inputs + step * direction, batch.labels)
            shares = logits + step * turn
            return distance(simulation.simulate_shares(model, params, samples, local, shares))

        @jax.jit
        def slopes(inputs):
            ends = jnp.array([1e-5, -1e-5])
            differences = (
                jax.lax.map(lambda step: granted(inputs + step * direction), ends),
                jax.lax.map(learned, ends),
            )
            return (
                jax.grad(granted)(inputs),
                jax.grad(lambda x: distance(plain(params, x)))(inputs),
                jax.grad(learned)(0.0),
                [(up - down) / 2e-5 for up, down in differences],
            )

        simulated, expected, learned_slope, differences = slopes(inputs)
        assert simulated.dtype == jnp.float64
        np.testing.assert_allclose(simulated, expected, rtol=1e-9, atol=1e-14)
        along = jnp.sum(simulated * direction)
        assert min(abs(along), abs(learned_slope)) > 1e-4
        np.testing.assert_allclose([along, learned_slope], differences, rtol=1e-6)


def started(attack, observation, seed=3):
    return jax.jit(attack.init)(jax.random.key(seed), observation)


def test_one_step_is_a_single_gradient(digits):
    """One epoch of one mini-batch: every attack has the slopes of the single-gradient approximation."""
    model = invjax.models.mlp((8,), activation="tanh")
    local = round_of(epochs=1, batch_size=3, num_samples=3)
    _, observation, _ = client(digits, model, local)

    def compare(single, *others):
        expected = started(single, observation)
        scale = np.abs(expected.gradient["inputs"]).max()
        for attack in others:
            state = started(attack, observation)
            np.testing.assert_array_equal(state.variables["inputs"], expected.variables["inputs"])
            np.testing.assert_allclose(state.value, expected.value, rtol=1e-5)
            close(state.gradient["inputs"], expected.gradient["inputs"], 1e-5 * scale)
        return expected.gradient["inputs"], scale

    none = {"total_variation": 0}
    cosine = {**none, "objective": objectives.cosine()}
    slopes, scale = compare(
        attacks.inverting_gradients(model, **none),
        federated.fedavg(model, **cosine),
        federated.fedavg(model, orders="learned", **cosine),
        federated.surrogate(model, alpha=0, **none),
    )
    moved = started(federated.surrogate(model, **none), observation)
    assert np.abs(moved.gradient["inputs"] - slopes).max() > 1e-3 * scale
    compare(
        attacks.inverting_gradients(model, objective=objectives.squared_l2(), **none),
        federated.fedavg(model, orders=jnp.array([[2, 0, 1]]), **none),
    )


@pytest.mark.slow
def test_alpha_moves_along_the_path(small):
    """Its slope is that of the loss at `w(alpha)` along `end - start`, and it stays in [0, 1]."""
    model, _, batch, observation, _ = small
    given = {"total_variation": 0, "restarts": 2}
    state = started(federated.surrogate(model, **given), observation)
    inputs = state.variables["inputs"][0]

    @jax.jit
    def slope(alpha):
        def value(params):
            single = jax.grad(model.loss)(params, Batch(inputs, batch.labels))
            return objectives.cosine().value(single, observation)

        start, move = observation.params, optax.tree.scale(-1.0, observation.gradient)
        return jax.jvp(value, (optax.tree.add_scale(start, alpha, move),), (move,))[1]

    assert abs(slope(0.5)) > 1e-4
    np.testing.assert_allclose(state.gradient["alpha"][0], slope(0.5), rtol=1e-3)

    @jax.jit
    def after(rate, num_steps, alpha):
        attack = federated.surrogate(model, alpha=alpha, alpha_rate=rate, num_steps=30, **given)
        state = attack.init(jax.random.key(3), observation)
        advance = functools.partial(attack.step, observation)
        return jax.lax.fori_loop(0, num_steps, lambda _, s: advance(s), state).variables["alpha"]

    # Adam's first step is of the size of its rate, against the slope, in every restart.
    expected = 0.5 - 1e-3 * np.sign(state.gradient["alpha"])
    np.testing.assert_allclose(after(1e-3, 1, 0.5), expected, atol=1e-6)
    far = after(10.0, 3, 0.5)
    assert ((far >= 0) & (far <= 1)).all() and np.abs(far - 0.5).max() > 0.4


@pytest.mark.parametrize("alpha", [0, 1.0])
def test_alpha_is_held_at_the_ends(small, alpha):
    model, _, _, observation, _ = small
    attack = federated.surrogate(model, alpha=alpha, alpha_rate=0.1, num_steps=30)

    @jax.jit
    def once(key):
        start = attack.init(key, observation)
        return start, attack.step(observation, start)

    start, after = once(jax.random.key(0))
    assert start.gradient["alpha"] != 0 and after.variables["alpha"] == alpha
    assert (start.variables["inputs"] != after.variables["inputs"]).any()


@pytest.mark.parametrize("aggregate", ["mean", "max"])
@pytest.mark.parametrize("distance", ["l2", "l1"])
def test_order_invariant_prior(small, aggregate, distance):
    _, _, _, observation, _ = small
    rng = np.random.default_rng(0)
    copies = rng.random((2, 4, *SHAPE)).astype(np.float32)
    prior = federated.order_invariant(3.0, aggregate, distance)

    def value(copies):
        return float(prior(jnp.asarray(copies.reshape(-1, *SHAPE)), Context(observation, copies)))

    sets = getattr(copies, aggregate)(axis=1)
    gap = np.square(sets[0] - sets[1]) if distance == "l2" else np.abs(sets[0] - sets[1])
    # Of the four ordered pairs of two epochs, two are an epoch and itself.
    np.testing.assert_allclose(value(copies), 3.0 * gap.mean() / 2, rtol=1e-5)
    permuted = np.stack([rng.permutation(epoch) for epoch in copies])
    np.testing.assert_allclose(value(permuted), value(copies), rtol=1e-5)
    across = rng.permutation(copies.reshape(-1, *SHAPE)).reshape(copies.shape)
    assert abs(value(across) - value(copies)) > 1e-4
    same = np.stack([copies[0], rng.permutation(copies[0])])
    assert value(same) < 1e-6 * value(copies)
    features = federated.order_invariant(3.0, aggregate, distance, lambda inputs: 0 * inputs)
    assert features(jnp.asarray(copies.reshape(-1, *SHAPE)), Context(observation, copies)) == 0


def test_copies_are_paired_and_averaged(small):
    _, _, batch, observation, _ = small
    shuffled = batch.inputs[jnp.array([2, 0, 3, 1])]
    best = jnp.concatenate([batch.inputs, shuffled + 0.1])
    inputs = jnp.stack([jnp.zeros_like(best), best, jnp.full_like(best, jnp.nan)])
    values = jnp.array([2.0, 1.0, jnp.nan])
    found = jax.jit(federated._align_best)(inputs, values, observation)
    np.testing.assert_allclose(found, batch.inputs + 0.05, atol=1e-6)


ATTACKS = {
    "fedavg": federated.fedavg,
    "learned": lambda model, **given: federated.fedavg(model, orders="learned", **given),
    "surrogate": federated.surrogate,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "labels"), [("fedavg", "joint"), ("learned", "recovered"), ("surrogate", "joint")]
)
def test_protocol(small, name, labels):
    model, _, batch, observation, _ = small
    attack = ATTACKS[name](model, num_steps=3, restarts=2, labels=labels)
    twice = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), observation)
    found = jax.jit(jax.vmap(attack))(jax.random.split(jax.random.key(3)), twice)
    assert found.inputs.shape == (2, *batch.inputs.shape) and found.inputs.dtype == jnp.float32
    assert found.labels.shape == found.found.shape == (2, 4) and found.found.all()
    trace = np.asarray(found.diagnostics["trace"])
    assert trace.shape == (2, 2, 4) and np.isfinite(trace).all()
    assert ((0 <= found.inputs) & (found.inputs <= 1)).all()
    assert not np.allclose(found.inputs[0], found.inputs[1])


def decibels(attack_of, data, seed=9):
    """`[V]` mean PSNR of clients attacked at once; `attack_of(orders)`."""
    batch, observation, orders = data

    def one(key, batch, observation, orders):
        inputs = attack_of(orders)(key, observation).inputs
        order = metrics.match(inputs, batch.inputs)
        return metrics.psnr(inputs[order], batch.inputs, data_range=1.0).mean()

    keys = jax.random.split(jax.random.key(seed), orders.shape[0])
    return np.asarray(jax.jit(jax.vmap(one))(keys, batch, observation, orders))


@pytest.mark.slow
def test_simulation_beats_a_single_gradient(digits):
    """In small: two epochs of two mini-batches of two. The next test is the whole check, its 10 dB."""
    model = invjax.models.mlp((64,))
    data = clients(digits, model, round_of(learning_rate=0.5), 3)
    single = decibels(lambda orders: attacks.inverting_gradients(model, num_steps=400), data)
    learned = decibels(lambda orders: federated.fedavg(model, orders="learned"), data)
    assert learned.mean() > single.mean() + 7


@pytest.mark.slow
def test_what_local_training_hides(digits):
    """Check 13: five epochs of two mini-batches of two; the weights move by about a quarter."""
    model = invjax.models.mlp((128,))
    data = clients(digits, model, round_of(epochs=5), 6)
    norm = jax.vmap(optax.tree.norm)
    moved = norm(data[1].gradient) / norm(data[1].params)
    assert ((moved > 0.12) & (moved < 0.3)).all()
    single = decibels(lambda orders: attacks.inverting_gradients(model, num_steps=1000), data)
    surrogate = decibels(lambda orders: federated.surrogate(model), data)
    granted = decibels(lambda orders: federated.fedavg(model, orders=orders), data)
    learned = decibels(lambda orders: federated.fedavg(model, orders="learned"), data)
    fixed = decibels(lambda orders: federated.fedavg(model), data)
    assert granted.mean() > single.mean() + 15
    assert learned.mean() > single.mean() + 10
    assert fixed.mean() > single.mean() + 5
    assert surrogate.mean() > single.mean() + 0.5


def test_what_the_factories_refuse(small):
    model = small[0]
    per_sample = objectives.matched(invjax.defenses.dp_sgd(1.0, 0.1))
    for arguments, message in (
        ({"copies": "both"}, "copies must be one of"),
        ({"orders": "random"}, "orders must be one of"),
        ({"orders": "learned", "copies": "per_epoch"}, "needs copies='shared'"),
        ({"order_prior": -1.0}, "weight must lie in"),
        ({"order_rate": -1.0}, "order_rate must lie in"),
        ({"learning_rate": 0.0}, "learning_rate must lie in"),
        ({"objective": per_sample}, "objective must compare updates"),
    ):
        with pytest.raises(ValueError, match=message):
            federated.fedavg(model, **arguments)
    for arguments, message in (
        ({"alpha": 1.5}, "alpha must lie in"),
        ({"alpha_rate": -1.0}, "alpha_rate must lie in"),
    ):
        with pytest.raises(ValueError, match=message):
            federated.surrogate(model, **arguments)
    for arguments, message in (
        ({"aggregate": "sum"}, "aggregate must be one of"),
        ({"distance": "l3"}, "distance must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            federated.order_invariant(1.0, **arguments)


@pytest.mark.parametrize("name", ATTACKS)
def test_which_rounds_are_refused(small, name):
    model, local, _, observation, _ = small
    key = jax.random.key(0)

    def facts(**changes):
        return observation._replace(facts=dataclasses.replace(observation.facts, **changes))

    adam = dataclasses.replace(local, optimizer="adam")
    for seen, given, message in (
        (facts(local=None), {}, "observation.facts.local is None"),
        (facts(local=adam), {}, "must be 'sgd'.*sum of gradients.*'adam'"),
        (facts(batch_size=3), {}, "local.num_samples = 4, got 3"),
        (observation, {"batch_size": 2}, "local.num_samples = 4, got 2"),
        (facts(batch_size=None), {}, "give batch_size"),
        (observation._replace(gradient=None), {}, "needs a gradient"),
    ):
        with pytest.raises(ValueError, match=message):
            ATTACKS[name](model, **given)(key, seen)


def test_orders_and_copies_of_another_size(small):
    model, local, batch, observation, orders = small
    for wrong, message in ((orders[:1], "orders must be"), (orders + 1, "permutations of 0 to 3")):
        with pytest.raises(ValueError, match=message):
            federated.simulate(model, observation.params, batch, local, wrong)
    with pytest.raises(ValueError, match=r"batch.inputs must hold local.num_samples = 4"):
        federated.simulate(model, observation.params, Batch(*(a[:3] for a in batch)), local)
