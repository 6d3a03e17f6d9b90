"""The certified row scan: exact where it speaks, silent where it cannot know."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import nearest

import invjax
from invjax import models, theory
from invjax.attacks.analytic import exclusivity, row_scan

SHAPE = (8, 8, 1)


def observed(widths, classes, size, *, victims=1, double=True, defense=None, **granted):
    """Random digits batches and what a server sees of them, `victims` of each."""
    dtype = jnp.float64 if double else jnp.float32
    digits, rng = invjax.datasets.digits(), np.random.default_rng(0)
    rows = np.stack([rng.permutation(len(digits))[:size] for _ in range(victims)])
    inputs, labels = invjax.datasets.take(digits, rows)
    batches = invjax.Batch(jnp.asarray(inputs, dtype), jnp.asarray(labels) % classes)
    model = network(widths, classes)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), model.init(jax.random.key(0), SHAPE))
    keys = jax.random.split(jax.random.key(1), victims)
    observe = jax.vmap(
        lambda key, batch: invjax.observe(key, model, params, batch, defense, **granted)
    )
    seen = jax.jit(observe)(keys, batches)
    return model, batches, seen, keys


@functools.cache
def network(widths, classes):
    return models.mlp(widths, classes, init="he")


@functools.partial(jax.jit, static_argnums=(0, 1))
def scan(model, settings, keys, seen):
    return jax.vmap(row_scan(model, **dict(settings)))(keys, seen)


def scanned(model, seen, keys, **settings):
    """All victims at once; one program for all of the same shapes."""
    return scan(model, tuple(settings.items()), keys, seen)


def recovered(batches, found):
    """Share of samples that came back, and how many of those said to be found are wrong."""
    share, wrong = [], 0
    results = (np.asarray(leaf) for leaf in (found.inputs, found.labels, found.found))
    for inputs, labels, mine, guesses, said in zip(*batches, *results, strict=True):
        truth = np.asarray(inputs).reshape(len(inputs), -1)
        certified = mine[said].reshape(said.sum(), truth.shape[1])
        share.append((nearest(truth, certified)[0] < 1e-4).mean())
        error, owner = nearest(certified, truth)
        wrong += (error >= 1e-4).sum() + (np.asarray(labels)[owner] != guesses[said]).sum()
    return np.array(share), wrong


def largest_error(batches, found):
    """Largest mean squared error of a sample, its reconstruction being the nearest one."""
    truth = np.asarray(batches.inputs).reshape(*batches.labels.shape, -1)
    mine = np.asarray(found.inputs).reshape(*found.inputs.shape[:2], -1)
    return nearest(truth, mine)[0].max()


def test_a_batch_of_32_comes_back():
    """Five batches, batch size told or not; the paper's condition holds on none of them."""
    with jax.enable_x64(True):
        model, batches, seen, keys = observed((512,), 10, 32, victims=5)
        found = scanned(model, seen, keys)
        assert found.found.all() and largest_error(batches, found) < 1e-20
        assert recovered(batches, found)[1] == 0 and found.objective.max() < 1e-12
        assert found.diagnostics["rounds"].min() > 1
        params = jax.tree.map(lambda leaf: leaf[0], seen.params)
        states = jax.vmap(lambda x: theory.exclusivity_state(model, params, x))(batches.inputs)
        assert not any(map(theory.is_sufficient, states))
        blind = seen._replace(facts=observed((512,), 10, 32, grant_batch_size=False)[2].facts)
        guessed = scanned(model, blind, keys, max_samples=40)
        np.testing.assert_array_equal(guessed.diagnostics["batch_size"], 32)
        np.testing.assert_array_equal(guessed.found.sum(axis=1), 32)
        assert recovered(batches, guessed)[1] == 0
        # Without peeling only the samples with a unit of their own, and none but those.
        alone = scanned(model, seen, keys, cascade=False)
        own = own_units(params, batches)
        np.testing.assert_array_equal(alone.found.sum(axis=1), own.sum(axis=1))
        assert 0 < own.mean() < 1 and recovered(batches, alone)[1] == 0


def own_units(params, batches):
    """Whether a sample activates a unit of the first layer alone."""
    weight, bias = (np.asarray(params["layer01"][name]) for name in ("kernel", "bias"))
    inputs = np.asarray(batches.inputs).reshape(*batches.labels.shape, -1)
    active = inputs @ weight + bias > 0
    return (active & (active.sum(axis=1, keepdims=True) == 1)).any(axis=2)


@pytest.mark.parametrize(
    ("widths", "classes", "size"), [((2048,), 10, 64), ((256, 256, 256), 10, 32), ((512,), 2, 8)]
)
def test_depth_width_and_two_classes(widths, classes, size):
    with jax.enable_x64(True):
        model, batches, seen, keys = observed(widths, classes, size)
        found = scanned(model, seen, keys)
        assert found.found.all() and largest_error(batches, found) < 1e-20
        assert recovered(batches, found)[1] == 0


def test_single_precision():
    model, batches, seen, keys = observed((512,), 10, 32, victims=5, double=False)
    found = scanned(model, seen, keys)
    assert found.found.all() and largest_error(batches, found) < 1e-10
    assert recovered(batches, found)[1] == 0


@pytest.mark.parametrize("double", [True, False])
def test_a_batch_beyond_its_reach_is_left_unfound(double):
    """96 samples in 512 units: the cascade stops, and says so."""
    with jax.enable_x64(double):
        model, batches, seen, keys = observed((512,), 10, 96, victims=8, double=double)
        found = scanned(model, seen, keys)
        share, wrong = recovered(batches, found)
        assert wrong == 0 and 0 < share.mean() < 0.9
        assert (np.asarray(found.found).mean(axis=1) <= share + 1e-9).all()
        assert found.objective.max() > 0.1


@pytest.mark.parametrize(
    "defense",
    [
        invjax.defenses.gaussian_noise(1e-4),
        invjax.defenses.random_mask(0.5),
        invjax.defenses.global_clip(1e-3),
    ],
    ids=lambda defense: defense.name,
)
def test_a_changed_gradient_gives_nothing_rather_than_something_wrong(defense):
    model, batches, seen, keys = observed((512,), 10, 8, victims=2, double=False, defense=defense)
    found = scanned(model, seen, keys)
    assert recovered(batches, found)[1] == 0
    assert not found.found.any()


def test_a_reduction_of_exclusivity_stops_it_only_when_it_is_complete():
    """With no exclusive unit left nothing is certified; with a twentieth undone all comes back."""
    with jax.enable_x64(True):
        model, batches, seen, keys = observed((512,), 10, 16)
        params = jax.tree.map(lambda leaf: leaf[0], seen.params)
        batch = jax.tree.map(lambda leaf: leaf[0], batches)
        after = invjax.defenses.remove_exclusive(model, params, batch.inputs)
        assert after.remaining == 0
        attack = jax.jit(row_scan(model))
        for share, count in ((1.0, 0), (0.95, 16)):
            inputs = share * after.inputs + (1 - share) * batch.inputs
            sent = batch._replace(inputs=inputs)
            seen = invjax.observe(keys[0], model, params, sent)
            found = attack(keys[0], seen)
            assert found.found.sum() == count
            if share == 1.0:
                assert exclusivity(model)(keys[0], seen).diagnostics["groups"] == 0
        assert largest_error(jax.tree.map(lambda leaf: leaf[None], sent), found_of(found)) < 1e-20


def found_of(found):
    """One result as a batch of one victim."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], found)


def test_the_same_image_twice_is_not_certified():
    """Its units carry twice the signal: half the batch size would fit, which the certificate knows."""
    with jax.enable_x64(True):
        model, batches, seen, keys = observed((512,), 10, 4)
        inputs, labels = jax.tree.map(lambda leaf: leaf[0], batches)
        twice = invjax.Batch(inputs.at[1].set(inputs[0]), labels.at[1].set(labels[0]))
        params = jax.tree.map(lambda leaf: leaf[0], seen.params)
        seen = invjax.observe(keys[0], model, params, twice)
        found = row_scan(model)(keys[0], seen)
        np.testing.assert_array_equal(found.found, [True, True, False, False])
        assert found.objective > 1e-3


def test_one_local_step_is_a_gradient():
    model, batches, _, keys = observed((256,), 10, 4, double=False)
    batch = jax.tree.map(lambda leaf: leaf[0], batches)
    params = model.init(jax.random.key(0), SHAPE)
    local = functools.partial(invjax.LocalTraining, learning_rate=0.1, num_samples=4)
    one = invjax.observe(keys[0], model, params, batch, local=local(epochs=1, batch_size=4))
    assert row_scan(model)(keys[0], one).found.all()
    two = invjax.observe(keys[0], model, params, batch, local=local(epochs=1, batch_size=2))
    with pytest.raises(ValueError, match="an update of 2 local steps"):
        row_scan(model)(keys[0], two)


def test_errors():
    with pytest.raises(ValueError, match="max_samples must be a whole number of at least 1, got 0"):
        row_scan(models.mlp(), max_samples=0)
    for tolerance in (0.0, np.inf):
        with pytest.raises(
            ValueError, match=rf"tolerance must lie in \(0.0, 1.0\], got {tolerance}"
        ):
            row_scan(models.mlp(), tolerance=tolerance)
    model = models.mlp((8,), bias=False)
    params = model.init(jax.random.key(0), SHAPE)
    batch = invjax.Batch(jnp.ones((1, *SHAPE)), jnp.zeros(1, int))
    seen = invjax.observe(jax.random.key(0), model, params, batch)
    with pytest.raises(ValueError, match="row_scan needs a bias in the first layer"):
        row_scan(model)(jax.random.key(0), seen)
