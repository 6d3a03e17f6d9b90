"""The exclusivity attack: exact where the condition holds, and it says what it could not read."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import nearest

import invjax
from invjax import models
from invjax.attacks.analytic.exclusivity import exclusivity
from invjax.attacks.analytic.exclusivity_steps import Tolerances, enumerate_patterns, group_units
from invjax.base import Facts, LocalTraining, Observation
from invjax.models.chain import Spec, chain_model
from invjax.models.layers import dense_layers, preactivations

SHAPE = (8, 8, 1)


@functools.cache
def network(widths, classes=10, bias=True, double=True):
    model = models.mlp(widths, classes, bias=bias, init="he")
    params = model.init(jax.random.key(0), SHAPE)
    return model, jax.tree.map(lambda leaf: leaf.astype(float if double else "float32"), params)


def sufficient(counts):
    """Two exclusive units in the last hidden layer, one in every other, of every sample."""
    return (counts[-1] >= 2).all() and (counts[:-1] >= 1).all()


def drawn(widths, size, victims=1, classes=10, bias=True, double=True, where=sufficient):
    """Random digits batches that meet a condition on `[H, B]` counts of exclusive units."""
    model, params = network(widths, classes, bias, double)
    digits, rng = invjax.datasets.digits(), np.random.default_rng(0)
    inputs = jnp.asarray(digits.inputs, float if double else "float32").reshape(len(digits), -1)
    values = preactivations(dense_layers(model, params), inputs)[:-1]
    active, rows = [np.asarray(value) > 0 for value in values], []
    while len(rows) < victims:
        chosen = rng.permutation(len(digits))[:size]
        own = [on[chosen] & (on[chosen].sum(axis=0) == 1) for on in active]
        if where(np.array([layer.sum(axis=1) for layer in own])):
            rows.append(chosen)
    inputs, labels = invjax.datasets.take(digits, np.stack(rows))
    return invjax.Batch(
        jnp.asarray(inputs, float if double else "float32"), jnp.asarray(labels) % classes
    )


@functools.partial(jax.jit, static_argnums=0, static_argnames=("grant", "defense"))
def observed(model, params, batches, grant=True, defense=None):
    keys = jax.random.split(jax.random.key(1), len(batches.labels))

    def one(key, batch):
        return invjax.observe(key, model, params, batch, defense, grant_batch_size=grant)

    return jax.vmap(one)(keys, batches)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(model, settings, seen):
    keys = jax.random.split(jax.random.key(2), len(jax.tree.leaves(seen.gradient)[0]))
    return jax.vmap(exclusivity(model, **dict(settings)))(keys, seen)


def attacked(model, params, batches, grant=True, defense=None, **settings):
    """All victims at once."""
    seen = observed(model, params, batches, grant=grant, defense=defense)
    return run(model, tuple(settings.items()), seen)


def errors(batches, result, transform=lambda x: x):
    """`[V, S]`: mean squared error of every slot to the nearest sample, and whose sample that is."""
    truth = transform(np.asarray(batches.inputs).reshape(*batches.labels.shape, -1))
    mine = transform(np.asarray(result.inputs).reshape(*result.found.shape, -1))
    return nearest(mine, truth)


def assert_exact(batches, result, below=1e-20, transform=lambda x: x):
    """Every sample came back, once, with its label."""
    for error, who, found, mine, labels in zip(
        *errors(batches, result, transform),
        np.asarray(result.found),
        np.asarray(result.labels),
        np.asarray(batches.labels),
        strict=True,
    ):
        assert sorted(who[found]) == list(range(len(labels)))
        assert error[found].max() < below
        np.testing.assert_array_equal(mine[found], labels[who[found]])


@pytest.mark.parametrize(
    "widths", [(512,), (256, 256, 256), pytest.param((256, 256), marks=pytest.mark.slow)]
)
def test_sufficient_batches_come_back(widths):
    """Specified: below 1e-20 with all labels; the batch size is not told, and read correctly."""
    with jax.enable_x64(True):
        model, params = network(widths)
        for size in (2, 4, 6, 8) if len(widths) == 1 else (2, 8):
            batches = drawn(widths, size, victims=2)
            result = attacked(model, params, batches, grant=False, max_samples=9)
            assert_exact(batches, result)
            said = result.diagnostics
            assert (said["groups"] == size).all() and (said["batch_size"] == size).all()
            assert said["complete"].all() and said["missing"].max() < 1e-12
            assert result.objective.max() < 1e-12 and result.inputs.shape[1:] == (9, *SHAPE)
            assert (np.asarray(result.inputs)[~np.asarray(result.found)] == 0).all()
        logits = jax.jit(model.apply)(params, result.inputs[0])
        expected = jax.nn.softmax(logits) - jax.nn.one_hot(result.labels[0], 10)
        mine = np.asarray(result.found)[0]
        np.testing.assert_allclose(said["loss_vectors"][0][mine], expected[mine], atol=1e-12)


@pytest.mark.parametrize(
    "settings",
    [
        {"scale": "last_bias", "final": "least_squares"},
        pytest.param({"scale": "last_bias"}, marks=pytest.mark.slow),
        pytest.param({"final": "bias"}, marks=pytest.mark.slow),
        pytest.param({"final": "least_squares"}, marks=pytest.mark.slow),
        {"final": "least_squares", "head_pattern": "binary"},
    ],
)
def test_scales_and_finishes_agree(settings):
    with jax.enable_x64(True):
        batches = drawn((512,), 6, victims=2)
        result = attacked(*network((512,)), batches, **settings)
        assert_exact(batches, result)
        assert result.diagnostics["complete"].all()


def test_one_step_of_training_is_a_gradient_on_another_scale():
    with jax.enable_x64(True):
        (model, params), batches = network((256, 256)), drawn((256, 256), 4)
        seen = jax.tree.map(lambda leaf: leaf[0], observed(model, params, batches))
        local = LocalTraining(epochs=1, batch_size=4, learning_rate=0.1, num_samples=4)
        update = seen._replace(
            params=params,
            gradient=jax.tree.map(lambda leaf: 0.1 * leaf, seen.gradient),
            facts=dataclasses.replace(seen.facts, local=local),
        )
        result = exclusivity(model)(jax.random.key(0), update)
        assert_exact(batches, jax.tree.map(lambda leaf: leaf[None], result))


@pytest.mark.parametrize(
    ("widths", "classes"),
    [
        ((512,), 3),
        ((256, 256), 10),
        pytest.param((512,), 10, marks=pytest.mark.slow),
        pytest.param((512,), 5, marks=pytest.mark.slow),
    ],
)
def test_without_biases_the_logits_give_the_length(widths, classes):
    with jax.enable_x64(True):
        (model, params) = network(widths, classes, bias=False)
        batches = drawn(widths, 4, 3, classes, bias=False)
        result = attacked(model, params, batches, scale="homogeneous")
        assert_exact(batches, result)
        assert (result.diagnostics["batch_size"] == 4).all()
        assert result.diagnostics["complete"].all()


def test_the_published_scale_is_right_up_to_a_factor():
    def normalized(x):
        return x / np.maximum(x.max(axis=-1, keepdims=True), 1e-30)

    with jax.enable_x64(True):
        for bias in (True, False):
            batches = drawn((512,), 4, 3, bias=bias)
            result = attacked(*network((512,), bias=bias), batches, scale="paper")
            assert_exact(batches, result, transform=normalized)
            error, _ = errors(batches, result)
            assert error.max() > 1e-3 and result.diagnostics["mismatch"].max() > 1e-2
            assert result.objective.max() < 1e-12
        # With a scale that is only guessed the binary equation has no solution.
        batches = drawn((512,), 4, 3)
        published = {"scale": "paper", "head_pattern": "binary"}
        result = attacked(*network((512,)), batches, **published)
        assert not result.found.any() and result.objective.min() > 1e-2


def test_a_sample_without_units_is_missing_and_that_shows():
    """Specified: groups are those with two units; the rest is exact; the last bias tells."""
    with jax.enable_x64(True):
        batches = drawn((256,), 8, 3, where=lambda counts: (counts[-1] < 2).sum() == 1)
        result = attacked(*network((256,)), batches, grant=False, max_samples=8)
        error, who = errors(batches, result)
        said, found = result.diagnostics, np.asarray(result.found)
        assert (found.sum(axis=1) == 7).all() and (said["groups"] == 7).all()
        assert error[found].max() < 1e-20 and all(len(set(w)) >= 7 for w in who)
        assert not said["complete"].any() and said["missing"].min() > 1e-3
        np.testing.assert_allclose(np.asarray(said["ratio"])[found], 8, atol=1e-6)
        assert (said["batch_size"] == 8).all()
        # Least squares for all inputs has no room for a sample that is not there.
        result = attacked(*network((256,)), batches, final="least_squares")
        assert not result.found.any() and not result.diagnostics["complete"].any()


def test_a_hidden_layer_without_units_breaks_one_sample():
    """And the binary equation needs no unit in the first layer."""

    def one_without(counts):
        return (counts[1] >= 2).all() and (counts[0] == 0).sum() == 1

    with jax.enable_x64(True):
        (model, params), batches = network((256, 256)), drawn((256, 256), 6, 3, where=one_without)
        result = attacked(model, params, batches)
        error, _ = errors(batches, result)
        found = np.asarray(result.found)
        assert (found.sum(axis=1) == 5).all() and error[found].max() < 1e-20
        assert (result.diagnostics["groups"] == 6).all()
        assert not result.diagnostics["complete"].any()
        result = attacked(model, params, batches, head_pattern="binary")
        assert_exact(batches, result)
        assert result.diagnostics["complete"].all()


def test_what_is_found_is_right_on_any_batch():
    """Single precision, 100 batches, most without sufficient exclusivity."""
    for widths, size, least in (((512,), 6, 0.9), ((256, 256), 8, 0.2)):
        model, params = network(widths, double=False)
        batches = drawn(widths, size, 50, double=False, where=lambda counts: True)
        result = attacked(model, params, batches)
        error, who = errors(batches, result)
        found, complete = np.asarray(result.found), np.asarray(result.diagnostics["complete"])
        assert least < found.mean() < 1 and error[found].max() < 1e-10
        labels = np.take_along_axis(np.asarray(batches.labels), who, axis=1)
        np.testing.assert_array_equal(labels[found], np.asarray(result.labels)[found])
        np.testing.assert_array_equal(complete, found.all(axis=1))


def test_single_precision():
    """Specified: below 1e-10."""
    batches = drawn((512,), 6, 3, double=False)
    result = attacked(*network((512,), double=False), batches, final="least_squares")
    assert_exact(batches, result, below=1e-10)


def test_noise_that_is_allowed_for():
    """Relative to the root mean square of the gradient; specified: 1e-11 at 1e-5, 7e-5 at 1e-3."""
    with jax.enable_x64(True):
        (model, params), batches = network((512,)), drawn((512,), 2, 10)

        @jax.jit
        def noisy(std, allowed):
            keys = jax.random.split(jax.random.key(1), 10)

            def one(key, batch):
                defense = invjax.defenses.gaussian_noise(std)
                seen = invjax.observe(key, model, params, batch, defense)
                attack = exclusivity(model, noise=allowed, final="least_squares")
                return attack(key, seen), seen.gradient

            return jax.vmap(one)(keys, batches)

        leaves = jax.tree.leaves(noisy(0.0, 0.0)[1])
        squares = sum(float(jnp.square(leaf).sum()) for leaf in leaves)
        rms = (squares / sum(leaf.size for leaf in leaves)) ** 0.5
        for relative, below, least in ((1e-5, 1e-9, 0.7), (1e-3, 5e-5, 0.5)):
            result, _ = noisy(relative * rms, relative * rms)
            error, _ = errors(batches, result)
            found = np.asarray(result.found)
            assert found.mean() > least and error[found].max() < below
            assert np.median(error) < below / 30
        # Tolerances that expect no noise find nothing, and say nothing.
        assert not noisy(1e-5 * rms, 0.0)[0].found.any()


def test_a_batch_that_was_made_exclusive_comes_back_whole():
    """Pan et al.'s inverse of the mitigation: tiny changes of 12 digits, of which 10 came back before."""
    with jax.enable_x64(True):
        model, params = network((512,), 10, True, True)
        batch = jax.tree.map(
            lambda leaf: leaf[0], drawn((512,), 12, where=lambda counts: not sufficient(counts))
        )
        made = invjax.defenses.make_exclusive(model, params, batch)
        before, after = (
            attacked(model, params, jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], one))
            for one in (batch, made)
        )
        assert not before.found.all() and before.found.any()
        assert_exact(jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], made), after)


def test_two_copies_are_not_taken_for_one():
    with jax.enable_x64(True):
        (model, params), batches = network((512,)), drawn((512,), 4)
        twice = jax.tree.map(lambda leaf: leaf[:, jnp.array([0, 0, 1, 2])], batches)
        result = attacked(model, params, twice)
        found = np.asarray(result.found)
        np.testing.assert_allclose(np.sort(result.diagnostics["ratio"][0]), [0, 2, 4, 4], atol=1e-9)
        assert found.sum() == 2 and not result.diagnostics["complete"].any()


@functools.partial(jax.jit, static_argnums=1)
def grouped(rows, slots):
    return group_units(rows, slots, Tolerances(1e-6, 1e-7, 1e-3, 0.0))


def test_grouping_of_rows_by_hand():
    rows = np.array(
        [[-2, 1, 1], [0, 0, 0], [-4, 2, 2], [1, -3, 2], [-1, -1, 2], [2, -6, 4], [-1, 0.5, 0.5]]
        + [[-1, 0.3, 0.7], [-2, -2, 4]]
    )
    groups = grouped(rows.astype("float32"), 3)
    np.testing.assert_array_equal(groups.exists, [True, True, False])
    assert groups.count == 2 and groups.labels[:2].tolist() == [1, 0]
    np.testing.assert_array_equal(np.nonzero(groups.members[0])[0], [3, 5])
    np.testing.assert_array_equal(np.nonzero(groups.members[1])[0], [0, 2, 6])
    np.testing.assert_allclose(groups.signals[:2], [[1 / 3, -1, 2 / 3], [-1, 0.5, 0.5]], rtol=1e-6)
    # More groups than slots: the strongest stay. More slots than rows: the others are empty.
    assert grouped(rows.astype("float32"), 1).labels.tolist() == [1]
    assert grouped(rows.astype("float32"), 12).exists.tolist() == [True] * 2 + [False] * 10


def test_subsets_of_the_binary_equation():
    terms = np.random.default_rng(0).normal(size=(5, 40)).astype("float32")
    active = np.random.default_rng(1).random((5, 40)) < 0.5
    found = enumerate_patterns(jnp.asarray(terms), jnp.asarray((terms * active).sum(axis=0)))
    np.testing.assert_array_equal(found, active)


def blank(model, classes, size=4, local=None, gradient=True):
    """An observation of the right shapes."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), SHAPE))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    facts = Facts(input_shape=SHAPE, num_classes=classes, batch_size=size, local=local)
    return Observation(params, params if gradient else None, facts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": "half"}, "scale must be one of 'hidden_bias', 'last_bias', 'homogeneous', 'pap"),
        ({"final": "svd"}, "final must be one of"),
        ({"head_pattern": "guess"}, "head_pattern must be one of"),
        ({"noise": -1.0}, "noise must lie in"),
        ({"tolerance": 0.0}, "tolerance must lie in"),
        ({"max_samples": 2.5}, "max_samples must be a whole number of at least 1, got 2.5"),
    ],
)
def test_settings_that_it_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        exclusivity(models.mlp((16,)), **settings)


def test_observations_that_it_refuses():
    def refused(model, message, classes=10, seen=None, **settings):
        seen = blank(model, classes) if seen is None else seen
        with pytest.raises(ValueError, match=message):
            exclusivity(model, **settings)(jax.random.key(0), seen)

    model, bare = models.mlp((16,)), models.mlp((16,), bias=False)
    refused(models.mlp((16,), 2), "at least 3 classes, got 2.*row_scan", 2)
    refused(models.mlp((16,), 4), "at most K - 1 = 3 samples, got room for 4", 4, scale="last_bias")
    refused(bare, "scale='hidden_bias' needs a bias.*use scale='homogeneous'")
    refused(bare, "final='bias' needs a bias in the first", scale="homogeneous", final="bias")
    refused(bare, "'binary' needs a bias", scale="homogeneous", head_pattern="binary")
    refused(model, "'homogeneous' needs a network without biases", scale="homogeneous")
    dense = [Spec("dense", 8, activation="relu", bias=False), Spec("dense", 4)]
    refused(chain_model([Spec("flatten"), *dense], 4, "half"), "or none in any", 4)
    refused(models.mlp(()), "needs a hidden dense layer")
    refused(models.mlp((16,), activation="tanh"), "must have the activations")
    refused(model, "released weights", seen=blank(model, 10, gradient=False))
    unknown = blank(model, 10, size=None)
    refused(model, "at most 16", seen=unknown, max_samples=17, head_pattern="binary")
    local = LocalTraining(epochs=2, batch_size=4, learning_rate=0.1, num_samples=4)
    refused(model, "update of 2 local steps", seen=blank(model, 10, local=local))
