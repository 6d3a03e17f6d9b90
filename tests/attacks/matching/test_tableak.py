"""Reconstruction of tables of mixed columns (TabLeak)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import invjax
from invjax import attacks, datasets, models
from invjax.attacks.matching.tabular import (
    accuracy,
    aligned,
    confidence,
    match,
    pooled,
    relaxed,
    softened,
    tableak,
)
from invjax.datasets import tabular
from invjax.datasets.tabular import Categorical, Continuous, Schema

SCHEMA = Schema(
    (
        Categorical("plain", 3),
        Continuous("number", mean=5.0, std=2.0, low=0.0, high=20.0),
        Categorical("rare", 2, (0.96, 0.04)),
    )
)


def rows(*probabilities_and_numbers):
    """Encoded rows of `[three probabilities, raw number, two probabilities]`."""
    mean, std = tabular.moments(SCHEMA)
    return jnp.asarray((np.array(probabilities_and_numbers) - mean) / std, jnp.float32)


def places(inputs):
    """Encoded rows with raw numbers and probabilities again."""
    mean, std = tabular.moments(SCHEMA)
    return np.asarray(inputs, np.float64) * std + mean


def test_relaxation_is_softmax_and_sigmoid():
    raw = jax.random.normal(jax.random.key(0), (4, 6)) * 3
    soft = places(relaxed(SCHEMA, raw))
    np.testing.assert_allclose(soft[:, :3], jax.nn.softmax(raw[:, :3]), atol=1e-5)
    np.testing.assert_allclose(soft[:, 3], 20 * jax.nn.sigmoid(raw[:, 3]), rtol=1e-5)
    np.testing.assert_allclose(soft[:, 4:], jax.nn.softmax(raw[:, 4:]), atol=1e-5)


def test_slope_of_the_relaxation():
    mean, std = tabular.moments(SCHEMA)

    def by_hand(raw):
        parts = [jax.nn.softmax(raw[:3]), 20 * jax.nn.sigmoid(raw[3:4]), jax.nn.softmax(raw[4:])]
        return (jnp.concatenate(parts) - mean) / std

    raw = jax.random.normal(jax.random.key(0), (6,))
    found = jax.jacobian(lambda raw: relaxed(SCHEMA, raw))(raw)
    np.testing.assert_allclose(found, jax.jacobian(by_hand)(raw), atol=1e-5)


def test_relaxation_of_extreme_logits():
    raw = jnp.array([[200.0, -200, 0, 500, -300, -301]])
    value, slope = jax.value_and_grad(lambda raw: relaxed(SCHEMA, raw).sum())(raw)
    assert jnp.isfinite(value) and jnp.isfinite(slope).all()
    # A slice is not rounded away by the height of another.
    soft = places(relaxed(SCHEMA, raw))[0]
    np.testing.assert_allclose(soft[:4], [1, 0, 0, 20], atol=1e-5)
    np.testing.assert_allclose(soft[4], jax.nn.sigmoid(1.0), atol=1e-5)


def test_softened_rows():
    inputs = rows([1, 0, 0, 25, 0.3, 0.9])
    soft = places(softened(SCHEMA, inputs))[0]
    np.testing.assert_allclose(soft[:3], jax.nn.softmax(jnp.array([1.0, 0, 0])), atol=1e-5)
    assert soft[3] == pytest.approx(25, rel=1e-5)
    np.testing.assert_allclose(soft[4:], jax.nn.softmax(jnp.array([0.3, 0.9])), atol=1e-5)


def test_restarts_are_aligned_to_the_best():
    best = jax.random.normal(jax.random.key(0), (5, 6))
    orders = [np.random.default_rng(seed).permutation(5) for seed in range(3)]
    members = jnp.stack([*(best[order] + 1e-3 for order in orders), best, best * jnp.nan])
    found = aligned(members, jnp.array([0.4, 0.3, 0.2, 0.1, jnp.nan]))
    np.testing.assert_allclose(found[:4], np.broadcast_to(best, (4, 5, 6)), atol=2e-3)
    np.testing.assert_array_equal(found[3], best)
    assert jnp.isnan(found[4]).all()


def test_pool_by_hand():
    members = jnp.stack(
        [
            rows([0.8, 0.1, 0.1, 6, 0.1, 0.9]),
            rows([0.6, 0.3, 0.1, 8, 0.2, 0.8]),
            # One that went astray moves the median a little, and would move the mean a lot.
            rows([0.0, 0.0, 1.0, 20, 1.0, 0.0]),
            rows([jnp.nan] * 6),
        ]
    )
    found = places(pooled(SCHEMA, members))[0]
    np.testing.assert_allclose(found[:3], np.array([0.6, 0.1, 0.1]) / 0.8, atol=1e-5)
    assert found[3] == pytest.approx(8, abs=1e-4)
    np.testing.assert_allclose(found[4:], [0.2, 0.8], atol=1e-5)


def test_pool_without_a_majority_is_the_mean():
    members = jnp.stack([rows([*one, 5, 1, 0]) for one in np.eye(3)])
    found = places(pooled(SCHEMA, members))[0]
    np.testing.assert_allclose(found, [1 / 3, 1 / 3, 1 / 3, 5, 1, 0], atol=1e-5)


def test_confidence_in_closed_form():
    numbers = np.array([4.0, 7.0, 8.0, 9.0])
    members = jnp.stack(
        [
            jnp.concatenate(
                [rows([1 / 3, 1 / 3, 1 / 3, number, 1, 0]), rows([0.5, 0.5, 0, 6, 0.5, 0.5])]
            )
            for number in numbers
        ]
    )
    variance = np.var(numbers / 2)
    expected = [
        [1, 0.5 + 0.5 * np.log(2 * np.pi * variance), 0],
        [np.log(2) / np.log(3), 0.5 + 0.5 * np.log(2 * np.pi * 1e-12), 1],
    ]
    np.testing.assert_allclose(confidence(SCHEMA, members), expected, atol=2e-5)
    astray = jnp.concatenate([members, members[:1] * jnp.nan])
    np.testing.assert_allclose(confidence(SCHEMA, astray), expected, atol=2e-5)


def test_accuracy_by_hand():
    truth = rows([1, 0, 0, 10, 1, 0], [0, 1, 0, 20, 0, 1])
    # 0.319 deviations of 2 are 0.638; the second number is clipped to its range before.
    near = rows([0, 0.7, 0.2, 90, 0.2, 0.5], [0.5, 0.3, 0.2, 10.63, 0.9, 0.1])
    np.testing.assert_array_equal(accuracy(SCHEMA, near, truth), [[True] * 3, [True] * 3])
    np.testing.assert_array_equal(match(SCHEMA, near, truth), [1, 0])
    far = rows([1, 0, 0, 10.65, 0.4, 0.6], [0, 1, 0, 19, 0, 1])
    expected = [[True, False, False], [True, False, True]]
    np.testing.assert_array_equal(accuracy(SCHEMA, far, truth), expected)
    lost = far.at[0, 3].set(jnp.nan)
    np.testing.assert_array_equal(accuracy(SCHEMA, lost, truth), [[False] * 3, expected[1]])


def test_accuracy_is_that_of_the_best_order():
    table = np.random.default_rng(0).uniform([0, 0, 0], [3, 20, 2], (2, 5, 3))
    table[..., [0, 2]] = np.floor(table[..., [0, 2]])
    truth, guess = (jnp.asarray(tabular.encode(SCHEMA, one)) for one in table)
    tolerance = np.array([0.5, 0.638, 0.5])
    every = [
        (np.abs(table[0] - table[1][list(order)]) < tolerance).mean()
        for order in itertools.permutations(range(5))
    ]
    assert accuracy(SCHEMA, guess, truth).mean() == pytest.approx(max(every))
    ordered = guess[match(SCHEMA, guess, truth)]
    decoded = np.asarray(tabular.decode(SCHEMA, ordered))
    assert (np.abs(table[0] - decoded) < tolerance).mean() == pytest.approx(max(every))
    np.testing.assert_array_equal(match(SCHEMA, ordered, truth), range(5))


def make_table(number=400):
    """Five categorical and three continuous columns, independent."""
    rng = np.random.default_rng(0)
    counts = [3, 4, 5, 2, 6]
    codes = [rng.integers(count, size=number) for count in counts]
    numbers = rng.normal(size=(3, number)) * [[10], [1], [100]] + [[40], [0], [500]]
    table = np.concatenate([np.stack(codes), numbers]).T
    labels = rng.integers(2, size=number)
    schema = tabular.fit_schema(table, [*counts, None, None, None])
    return tabular.from_table("mixed", schema, table, labels), schema


def observe(dataset, model, index, size):
    key = jax.random.key(index)
    batch = datasets.draw(key, dataset, size)
    params = model.init(jax.random.fold_in(key, 1), dataset.input_shape)
    observation = invjax.observe(
        jax.random.fold_in(key, 2),
        model,
        params,
        batch,
        input_range=dataset.input_range,
        grant_labels=True,
    )
    return observation, batch


def attacked(attack, dataset, model, number, size):
    """What the attack says of `number` victims at once, and their batches."""
    victims = [observe(dataset, model, index, size) for index in range(number)]
    observations, batches = jax.tree.map(lambda *leaves: jnp.stack(leaves), *victims)
    keys = jax.vmap(jax.random.key)(100 + jnp.arange(number))
    return jax.jit(jax.vmap(attack))(keys, observations), batches


def hits(schema, found, batches):
    return np.asarray(jax.vmap(lambda a, b: accuracy(schema, a, b))(found.inputs, batches.inputs))


def some_fail(key, shape, observation):
    """The usual start, or none with probability a half."""
    start = jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)
    return jnp.where(jax.random.bernoulli(jax.random.fold_in(key, 1)), jnp.nan, start)


PLAIN = {"restarts": 1, "relaxation": False, "pooling": False}


@pytest.fixture(scope="module")
def mixed():
    """Four victims, reconstructed although half of the restarts fail."""
    dataset, schema = make_table()
    model = models.mlp((64, 64), 2)
    attack = tableak(model, schema, num_steps=500, restarts=8, initializer=some_fail)
    return dataset, schema, model, *attacked(attack, dataset, model, 4, 8)


def test_mixed_rows_come_back(mixed):
    dataset, schema, model, found, batches = mixed
    right = hits(schema, found, batches).mean()
    assert right >= 0.95
    plain, _ = attacked(tableak(model, schema, num_steps=500, **PLAIN), dataset, model, 4, 8)
    assert hits(schema, plain, batches).mean() <= right - 0.05
    # The published pool of members that are no soft rows.
    members = plain.diagnostics["members"]
    expected = softened(schema, plain.inputs)
    np.testing.assert_allclose(members[:, 0], expected, atol=1e-4)


def test_rows_are_soft(mixed):
    _, schema, _, found, _ = mixed
    low, high = (np.array(bound) for bound in tabular.input_range(schema))
    inputs = np.asarray(found.inputs)
    assert (inputs >= low - 1e-4).all() and (inputs <= high + 1e-4).all()
    mean, std = tabular.moments(schema)
    for column, part in zip(schema.columns, schema.slices, strict=True):
        if isinstance(column, Categorical):
            total = (inputs * std + mean)[..., part].sum(axis=-1)
            np.testing.assert_allclose(total, 1, atol=1e-4)


def test_failed_restarts_do_not_spoil_the_pool(mixed):
    _, schema, _, found, _ = mixed
    failed = np.asarray(found.diagnostics["status"]) == 2
    assert failed.any(axis=1).all() and not failed.all(axis=1).any()
    members = np.asarray(found.diagnostics["members"])
    assert members.shape == (4, 8, 8, schema.width)
    np.testing.assert_array_equal(np.isnan(members).all(axis=(2, 3)), failed)
    assert found.found.all() and jnp.isfinite(found.inputs).all()
    for victim in range(2):
        kept = jnp.asarray(members[victim][~failed[victim]])
        assert jnp.isfinite(kept).all()
        np.testing.assert_allclose(found.inputs[victim], pooled(schema, kept), atol=1e-4)
        entropy = found.diagnostics["entropy"][victim]
        np.testing.assert_allclose(entropy, confidence(schema, kept), rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def victim(mixed):
    dataset, schema, model, *_ = mixed
    return model, schema, observe(dataset, model, 0, 8)[0]


def test_without_its_parts_it_is_plain_matching(victim):
    """The same program, step for step."""
    model, schema, observation = victim
    settings = {"num_steps": 20, "restarts": 2}
    attack = tableak(model, schema, relaxation=False, pooling=False, **settings)
    plain = attacks.gradient_matching(
        model,
        objective=attacks.objectives.cosine(),
        optimizer=optax.chain(optax.scale_by_sign(), optax.adam(0.06)),
        initializer=lambda key, shape, _: jax.random.uniform(key, shape, minval=-1.0, maxval=1.0),
        **settings,
    )
    key = jax.random.key(0)
    state = jax.eval_shape(plain.init, key, observation)
    for name, *given in (("init", key, observation), ("step", observation, state)):
        one, other = (jax.make_jaxpr(getattr(made, name))(*given) for made in (attack, plain))
        assert str(one) == str(other)
    relaxed_step = jax.make_jaxpr(tableak(model, schema, **settings).step)(observation, state)
    assert str(relaxed_step) != str(other)


@pytest.mark.parametrize("labels", ["recovered", "joint"])
def test_labels_need_not_be_known(victim, labels):
    model, schema, observation = victim
    attack = tableak(model, schema, num_steps=5, restarts=2, labels=labels)
    unknown = observation._replace(labels=None)
    found = jax.eval_shape(attack, jax.random.key(0), unknown)
    assert (found.labels.shape, found.inputs.shape) == ((8,), (8, schema.width))


def test_errors(victim):
    model, schema, observation = victim
    with pytest.raises(ValueError, match=r"\(23,\), .* 3 columns encode to \(6,\)"):
        tableak(model, SCHEMA, num_steps=1)(jax.random.key(0), observation)
    with pytest.raises(ValueError, match="learning_rate must lie in"):
        tableak(model, schema, learning_rate=0.0)
    with pytest.raises(ValueError, match="restarts must be a whole number of at least 1"):
        tableak(model, schema, restarts=0)
    with pytest.raises(ValueError, match="grants none"):
        tableak(model, schema)(jax.random.key(0), observation._replace(labels=None))
    with pytest.raises(TypeError, match="pool"):
        tableak(model, schema, pool=lambda inputs, values, observation: inputs[0])
    with pytest.raises(ValueError, match="raw must have 6 entries"):
        relaxed(SCHEMA, jnp.zeros((2, 5)))
    with pytest.raises(ValueError, match="members must have 6 entries"):
        confidence(SCHEMA, jnp.zeros((3, 2, 5)))
    with pytest.raises(ValueError, match="reconstruction must have 6 entries"):
        accuracy(SCHEMA, jnp.zeros((2, 5)), jnp.zeros((2, 5)))
    with pytest.raises(ValueError, match=r"both be \[B, 6\], got \(2, 6\) and \(3, 6\)"):
        match(SCHEMA, jnp.zeros((2, 6)), jnp.zeros((3, 6)))


def entropy_tells(schema, found, batches):
    """By kind of column: share of right entries among the surer half, and among the other."""
    right = hits(schema, found, batches)
    order = jax.vmap(lambda a, b: match(schema, a, b))(found.inputs, batches.inputs)
    entropy = np.take_along_axis(
        np.asarray(found.diagnostics["entropy"]), np.asarray(order)[:, :, None], axis=1
    )
    shares = {}
    for kind in (Categorical, Continuous):
        chosen = [isinstance(column, kind) for column in schema.columns]
        values, correct = entropy[..., chosen].ravel(), right[..., chosen].ravel()
        sure = values <= np.median(values)
        shares[kind.__name__] = correct[sure].mean(), correct[~sure].mean()
    return shares


def on_adult(data_dir, number, size, **settings):
    """TabLeak's reconstruction, the batches, and accuracies with and without its parts."""
    dataset, schema = tabular.adult(data_dir)
    model = models.mlp((100, 100), 2)
    found, batches = attacked(tableak(model, schema, **settings), dataset, model, number, size)
    plain = tableak(model, schema, **{**settings, **PLAIN})
    alone, _ = attacked(plain, dataset, model, number, size)
    accuracies = [hits(schema, one, batches).mean() for one in (found, alone)]
    return schema, found, batches, *accuracies


@pytest.mark.slow
def test_adult_small(data_dir):
    *_, full, plain = on_adult(data_dir, 2, 16, num_steps=400, restarts=6)
    assert full >= max(0.95, plain + 0.1)


@pytest.mark.slow
def test_adult(data_dir):
    """Vero et al. 2023: at batch 32 on Adult ten points over gradient matching without its parts.

    And the entries that the ensemble is surer of are more often right.
    """
    schema, found, batches, full, plain = on_adult(data_dir, 3, 32)
    shares = entropy_tells(schema, found, batches)
    assert full >= plain + 0.1
    for sure, unsure in shares.values():
        assert sure > unsure + 0.02
