"""The loop: exact recovery, protocol, what it may see, and what it refuses."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import invjax
from invjax import Batch, attacks, driver, metrics, priors
from invjax.attacks.matching.loop import uniform_box

SHAPE = (8, 8, 1)


@pytest.fixture(scope="module")
def digits():
    return invjax.datasets.digits()


@pytest.fixture(scope="module")
def setting(digits):
    model = invjax.models.lenet(width=4)
    params = model.init(jax.random.key(0), SHAPE)
    batch = invjax.datasets.draw(jax.random.key(1), digits, 2, distinct_labels=True)
    observation = invjax.observe(jax.random.key(2), model, params, batch, grant_labels=True)
    return model, params, batch, observation


@pytest.fixture(scope="module")
def small(digits):
    model = invjax.models.mlp((8,), activation="tanh")
    params = model.init(jax.random.key(0), SHAPE)
    batch = invjax.datasets.draw(jax.random.key(1), digits, 2, distinct_labels=True)
    observation = invjax.observe(jax.random.key(2), model, params, batch, grant_labels=True)
    return model, params, batch, observation


PRESETS = {
    "dlg": lambda model, **s: attacks.dlg(model, **s),
    "idlg": lambda model, **s: attacks.idlg(model, **s),
    "tag": lambda model, **s: attacks.tag(model, **s),
    "inverting_gradients": lambda model, **s: attacks.inverting_gradients(model, **s),
    "gradinversion": lambda model, **s: attacks.gradinversion(model, **s),
    "bayes": lambda model, **s: attacks.bayes(
        model, invjax.defenses.parse("clip(1e3),gaussian(0.01)"), priors.l2(1e-3), **s
    ),
}


# The others share their optimizer with one of these.
FEW = ("inverting_gradients", "bayes")


@pytest.mark.parametrize(
    "name",
    [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in PRESETS],
)
def test_protocol(small, name):
    model, _, batch, observation = small
    attack = PRESETS[name](model, num_steps=4, restarts=2)
    key = jax.random.key(3)
    plain = attack(key, observation)
    assert plain.inputs.shape == batch.inputs.shape and plain.inputs.dtype == jnp.float32
    assert plain.labels.shape == (2,) and jnp.issubdtype(plain.labels.dtype, jnp.integer)
    assert plain.found.shape == (2,) and plain.found.dtype == bool and plain.found.all()
    assert plain.objective.shape == ()
    assert plain.diagnostics["trace"].shape == (2, 5)
    assert np.nanmin(plain.diagnostics["trace"]) == plain.objective

    twice = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), observation)
    keys = jnp.stack([key, jax.random.key(9)])
    many = jax.jit(jax.vmap(attack))(keys, twice)
    hosted = driver.run(attack, key, observation, chunk=3)
    for other in (
        jax.jit(attack)(key, observation),
        jax.tree.map(lambda leaf: leaf[0], many),
        hosted,
    ):
        np.testing.assert_allclose(other.inputs, plain.inputs, atol=2e-3)
        np.testing.assert_array_equal(other.labels, plain.labels)
        np.testing.assert_allclose(other.objective, plain.objective, rtol=2e-3)
    assert not np.allclose(many.inputs[0], many.inputs[1])


def test_one_compilation_serves_all_victims(small, digits):
    model, params, _, _ = small
    attack = attacks.inverting_gradients(model, num_steps=3)
    traced = jax.jit(chex.assert_max_traces(attack.__call__, n=1))
    for seed in range(3):
        batch = invjax.datasets.draw(jax.random.key(seed), digits, 2)
        observation = invjax.observe(jax.random.key(seed), model, params, batch, grant_labels=True)
        traced(jax.random.key(seed), observation)


def test_an_observation_may_be_closed_over(small):
    model, _, _, observation = small
    attack = attacks.inverting_gradients(model, num_steps=2)

    @jax.jit
    def weighted(key, weight):
        return attacks.inverting_gradients(model, num_steps=2, total_variation=weight)(
            key, observation
        ).inputs

    key = jax.random.key(3)
    np.testing.assert_allclose(weighted(key, 0.01), attack(key, observation).inputs, atol=1e-5)


def test_restarts_are_the_single_runs(small):
    model, _, _, observation = small
    attack = attacks.inverting_gradients(model, num_steps=5, restarts=3)
    result = attack(jax.random.key(0), observation)
    best = result.diagnostics["best"]
    assert best.shape == (3,) and result.objective == best.min()
    assert result.diagnostics["restart"] == best.argmin()
    assert len(np.unique(best)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 2])
def test_dlg_recovers_digits_and_their_labels(digits, batch_size):
    model = invjax.models.lenet()
    params = model.init(jax.random.key(0), SHAPE)
    attack = attacks.dlg(model, restarts=3, num_steps=600)
    batch = invjax.datasets.draw(jax.random.key(5), digits, batch_size, distinct_labels=True)
    observation = invjax.observe(jax.random.key(1), model, params, batch)
    result = driver.run(attack, jax.random.key(2), observation)
    order = metrics.match(result.inputs, batch.inputs)
    psnr = metrics.psnr(result.inputs[order], batch.inputs, data_range=1.0)
    assert (psnr > 30).all()
    np.testing.assert_array_equal(result.labels[order], batch.labels)


@pytest.mark.slow
def test_another_inputs_gradient_scores_like_a_guess(digits):
    model = invjax.models.lenet()
    params = model.init(jax.random.key(0), SHAPE)
    attack = attacks.idlg(model, restarts=2, num_steps=400)
    truth, other = (invjax.datasets.take(digits, [index]) for index in (3, 14))
    observation = invjax.observe(jax.random.key(1), model, params, other)
    result = driver.run(attack, jax.random.key(2), observation)
    assert metrics.psnr(result.inputs, other.inputs, data_range=1.0)[0] > 30
    mean = jnp.asarray(digits.inputs.mean(axis=0))
    guess = metrics.baselines(truth.inputs, mean, input_range=(0.0, 1.0))["mean"][0]
    assert metrics.psnr(result.inputs, truth.inputs, data_range=1.0)[0] < guess + 3


def test_no_attack_sees_the_private_batch(small):
    model, params, batch, observation = small
    # Another batch with the same observation: the samples in another order.
    swapped = Batch(batch.inputs[::-1], batch.labels[::-1])
    same = invjax.observe(jax.random.key(2), model, params, swapped)
    same = same._replace(gradient=observation.gradient, labels=observation.labels)
    attack = attacks.inverting_gradients(model, num_steps=5)
    results = [jax.jit(attack)(jax.random.key(0), o) for o in (observation, same)]
    chex.assert_trees_all_equal(*results)
    arrays = jax.tree.leaves(observation._replace(labels=None))
    assert not any(leaf.shape == batch.inputs.shape for leaf in arrays)


def test_plateau_ends_early(small):
    model, _, _, observation = small
    attack = attacks.inverting_gradients(model, num_steps=400, optimizer=optax.sgd(0.0), patience=3)
    result = driver.run(attack, jax.random.key(0), observation, chunk=1)
    trace = np.asarray(result.diagnostics["trace"])[0]
    assert np.isfinite(trace).sum() == 4
    assert result.diagnostics["status"].tolist() == [1]


def test_non_finite_objective_is_reported(small):
    model, _, _, observation = small
    attack = attacks.gradient_matching(
        model,
        objective=attacks.objectives.squared_l2(),
        prior=lambda inputs, context: jnp.log(-jnp.ones(())),
        optimizer=optax.adam(0.1),
        num_steps=3,
    )
    result = attack(jax.random.key(0), observation)
    assert not result.found.any()
    assert result.diagnostics["status"].tolist() == [2]


def test_diverging_restart_does_not_spoil_the_others(small):
    model, _, _, observation = small
    attack = attacks.gradient_matching(
        model,
        objective=attacks.objectives.squared_l2(),
        optimizer=optax.adam(0.05),
        num_steps=5,
        restarts=2,
    )
    state = attack.init(jax.random.key(0), observation)
    inputs = state.variables["inputs"].at[0].set(jnp.nan)
    state = state._replace(
        variables={"inputs": inputs},
        value=state.value.at[0].set(jnp.nan),
        best_value=state.best_value.at[0].set(jnp.nan),
        finished=jnp.array([True, False]),
    )
    for _ in range(5):
        state = attack.step(observation, state)
    result = attack.result(observation, state)
    assert result.found.all() and result.diagnostics["restart"] == 1


def test_uniform_starts_fill_the_range_of_every_channel():
    facts = invjax.base.Facts(
        input_shape=(4, 4, 2), num_classes=2, input_range=((0.0, -1.0), (1.0, 3.0))
    )
    observation = invjax.Observation(None, None, facts)
    inputs = uniform_box()(jax.random.key(0), (9, 4, 4, 2), observation)
    low, high = inputs.min(axis=(0, 1, 2)), inputs.max(axis=(0, 1, 2))
    np.testing.assert_allclose(low, [0, -1], atol=0.1)
    np.testing.assert_allclose(high, [1, 3], atol=0.1)


def test_unknown_batch_size(small):
    model, params, batch, _ = small
    hidden = invjax.observe(jax.random.key(2), model, params, batch, grant_batch_size=False)
    attack = attacks.idlg(model, num_steps=2)
    with pytest.raises(ValueError, match="batch_size"):
        attack(jax.random.key(0), hidden)
    result = attacks.idlg(model, num_steps=2, batch_size=2)(jax.random.key(0), hidden)
    assert result.inputs.shape == batch.inputs.shape


def test_more_samples_than_classes(digits):
    model = invjax.models.mlp((32,))
    params = model.init(jax.random.key(0), SHAPE)
    batch = invjax.datasets.draw(jax.random.key(1), digits, 13)
    observation = invjax.observe(jax.random.key(2), model, params, batch)
    for attack in (attacks.idlg(model, num_steps=2), attacks.dlg(model, num_steps=2)):
        result = attack(jax.random.key(0), observation)
        assert result.inputs.shape == (13, *SHAPE) and result.found.all()


def test_vectors():
    model = invjax.models.mlp((32,), num_classes=3)
    params = model.init(jax.random.key(0), (20,))
    batch = Batch(jax.random.uniform(jax.random.key(1), (1, 20)), jnp.array([2]))
    observation = invjax.observe(jax.random.key(2), model, params, batch)
    result = driver.run(
        attacks.dlg(model, restarts=3, num_steps=400), jax.random.key(3), observation
    )
    assert metrics.psnr(result.inputs, batch.inputs, data_range=1.0)[0] > 30
    assert result.labels.tolist() == [2]


def test_federated_update_of_one_step_is_a_gradient(digits):
    model = invjax.models.lenet()
    params = model.init(jax.random.key(0), SHAPE)
    batch = invjax.datasets.take(digits, [7])
    local = invjax.LocalTraining(epochs=1, batch_size=1, learning_rate=0.1, num_samples=1)
    observation = invjax.observe(jax.random.key(1), model, params, batch, local=local)
    attack = attacks.idlg(model, restarts=2, num_steps=300)
    result = driver.run(attack, jax.random.key(2), observation)
    assert metrics.psnr(result.inputs, batch.inputs, data_range=1.0)[0] > 30
    assert result.labels.tolist() == batch.labels.tolist()
    # A step of Adam is none.
    adam = dataclasses.replace(local, optimizer="adam")
    stepped = observation._replace(facts=dataclasses.replace(observation.facts, local=adam))
    with pytest.raises(ValueError, match="must be 'sgd', since this attack reads an update"):
        attack(jax.random.key(2), stepped)


def test_progress_and_interruption(small):
    model, _, _, observation = small
    attack = attacks.inverting_gradients(model, num_steps=20)
    seen = []

    def on_chunk(progress):
        seen.append(progress.step)
        if progress.step >= 10:
            raise KeyboardInterrupt

    result = driver.run(attack, jax.random.key(0), observation, chunk=5, on_chunk=on_chunk)
    assert seen == [5, 10] and result.diagnostics["interrupted"]
    assert np.isfinite(result.diagnostics["trace"]).sum() == 11
    with pytest.raises(ValueError, match="chunk"):
        driver.run(attack, jax.random.key(0), observation, chunk=0)


def test_closed_form_runs_without_steps(small):
    model, _, _, observation = small
    inner = attacks.inverting_gradients(model, num_steps=1)
    attack = invjax.Attack(inner.init, inner.step, inner.result)
    chex.assert_trees_all_close(
        driver.run(attack, jax.random.key(0), observation).inputs,
        attack(jax.random.key(0), observation).inputs,
        atol=1e-6,
    )


@pytest.mark.parametrize("keeps", [True, False])
def test_lax_conv_goes_step_by_step_on_cpu(setting, keeps):
    model, _, _, observation = setting
    model = model._replace(with_convolution=None) if keeps else model
    attack = attacks.inverting_gradients(model, num_steps=2)
    state = attack.init(jax.random.key(0), observation)
    assert driver.chunk_size(attack, observation, state, "cpu") == (1 if keeps else 256)
    assert driver.chunk_size(attack, observation, state, "gpu") == 256


def test_both_ways_of_stepping_agree(setting):
    model, _, _, observation = setting
    slow = model._replace(with_convolution=None)
    results = [
        driver.run(attacks.inverting_gradients(m, num_steps=6), jax.random.key(0), observation)
        for m in (model, slow)
    ]
    np.testing.assert_allclose(results[0].objective, results[1].objective, rtol=1e-2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_steps": 0}, "num_steps"),
        ({"restarts": 0}, "restarts"),
        ({"restarts": 1.5}, "restarts"),
        ({"patience": 0}, "patience"),
        ({"tolerance": -0.1}, "tolerance"),
        ({"labels": "guessed"}, "labels"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        attacks.dlg(invjax.models.mlp(), **settings)


def test_joint_labels_need_two_logits():
    with pytest.raises(ValueError, match="joint"):
        attacks.dlg(invjax.models.cnn6(), labels="joint")


def test_bad_observations(small):
    model, _, _, observation = small
    attack = attacks.inverting_gradients(model, num_steps=2)
    key = jax.random.key(0)
    bad = jax.tree.map(lambda leaf: leaf.at[..., 0].set(jnp.nan), observation.gradient)
    cases = {
        "finite": observation._replace(gradient=bad),
        "needs a gradient": observation._replace(gradient=None),
        "grants none": observation._replace(labels=None),
        "tree and shapes": observation._replace(gradient={"w": jnp.ones(3)}),
        "labels for": observation._replace(labels=jnp.zeros(3, jnp.int32)),
        "classes": observation._replace(
            facts=dataclasses.replace(observation.facts, num_classes=4)
        ),
    }
    for words, case in cases.items():
        with pytest.raises(ValueError, match=words):
            attack(key, case)


def test_attacks_by_name(small):
    model, _, _, _ = small
    none = invjax.chain()
    attack = attacks.by_name("inverting_gradients(total_variation=0.1)", model, none, num_steps=7)
    assert attack.num_steps == 7
    assert attacks.by_name("bayes", model, none).num_steps == 1000
    assert attacks.needs_labels("bayes") and not attacks.needs_labels("dlg")
    assert attacks.needs_labels("dlg(labels='known')")
    with pytest.raises(ValueError, match=r"Did you mean 'dlg'"):
        attacks.by_name("dlgg", model, none)
    with pytest.raises(ValueError, match="Name one"):
        attacks.by_name("dlg,idlg", model, none)
    with pytest.raises(ValueError, match="Name one"):
        attacks.needs_labels("dlg,idlg")
