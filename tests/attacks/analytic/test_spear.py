"""SPEAR: whole batches, exactly, from a first layer's gradient and the zeros behind its ReLU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import invjax
from invjax import LocalTraining, models
from invjax.attacks.analytic import spear_steps
from invjax.attacks.analytic.spear import batch_size_by_rank, spear
from invjax.defenses.exclusivity_inputs import remove_exclusive
from invjax.theory.exclusivity import exclusivity_state

SHAPE = (8, 8, 1)
DOUBLE, SINGLE = jnp.float64, jnp.float32


@functools.cache
def digits():
    return invjax.datasets.digits()


def cast(tree, dtype):
    return jax.tree.map(
        lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree
    )


MODEL = models.mlp((200,), init="he")


@functools.cache
def params_of(seed=0):
    return MODEL.init(jax.random.key(seed), SHAPE)


def batch_of(size, seed=0):
    chosen = np.random.default_rng(seed).choice(1797, size, replace=False)
    return invjax.datasets.take(digits(), chosen)


@functools.partial(jax.jit, static_argnums=0)
def observed(model, params, batch):
    with jax.default_matmul_precision("highest"):
        return invjax.observe(jax.random.key(1), model, params, batch)


attack_of = functools.cache(functools.partial(spear, MODEL))


def assert_exact(found, batch, below):
    assert found.found.all() and found.objective == 0
    ordered = invjax.metrics.matched(found, batch)
    assert invjax.metrics.mse(ordered.inputs, batch.inputs).max() < below
    np.testing.assert_array_equal(ordered.labels, batch.labels)


@pytest.mark.parametrize(
    "size",
    [8, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 2, 4, 6, 10, 12))],
)
def test_batches_come_back_exactly_with_their_labels(size):
    """Specified: MSE under 1e-15 and a certificate of 1."""
    with jax.enable_x64(True):
        batch = cast(batch_of(size), DOUBLE)
        seen = observed(MODEL, cast(params_of(), DOUBLE), batch)
        attack = attack_of()
        found = attack(jax.random.key(2), seen)
        assert_exact(found, batch, 1e-25)
        assert found.inputs.dtype == DOUBLE


@pytest.mark.slow
def test_a_batch_without_exclusive_units_is_no_safer():
    """Specified: exact on a perturbed batch of six without an exclusive unit."""
    with jax.enable_x64(True):
        params, batch = cast(params_of(), DOUBLE), cast(batch_of(6), DOUBLE)
        moved = batch._replace(inputs=remove_exclusive(MODEL, params, batch.inputs).inputs)
        assert exclusivity_state(MODEL, params, moved.inputs).sum() == 0
        found = attack_of()(jax.random.key(2), observed(MODEL, params, moved))
        assert_exact(found, moved, 1e-25)
        # Nor does it help to zero the rows of units that one sample owns.
        state = batch.inputs.reshape(6, -1) @ params["layer01"]["kernel"] > 0
        owned = state.sum(axis=0) == 1
        assert owned.sum() > 5
        seen = observed(MODEL, params, batch)
        first = jax.tree.map(lambda leaf: jnp.where(owned, 0, leaf), seen.gradient["layer01"])
        masked = seen._replace(gradient={**seen.gradient, "layer01": first})
        assert_exact(attack_of()(jax.random.key(2), masked), batch, 1e-25)


@pytest.mark.slow
def test_reductions_of_exclusivity_after_the_fact_do_not_stop_it():
    """Masked rows are certified; behind a dropout inputs are exact, and the certificate is silent."""
    with jax.enable_x64(True):
        params, batch = cast(params_of(), DOUBLE), cast(batch_of(4), DOUBLE)
        masked = invjax.defenses.mask_exclusive_rows(MODEL)
        seen = invjax.observe(jax.random.key(1), MODEL, params, batch, masked)
        assert_exact(attack_of()(jax.random.key(2), seen), batch, 1e-25)
        dropping = invjax.defenses.exclusivity_dropout(MODEL)
        seen = invjax.observe(jax.random.key(1), dropping, params, batch)
        found = attack_of()(jax.random.key(2), seen)
        ordered = invjax.metrics.matched(found, batch)
        assert invjax.metrics.mse(ordered.inputs, batch.inputs).max() < 1e-25
        assert not found.found.any()


@pytest.mark.slow
def test_single_precision_and_many_victims_at_once():
    """Measured: MSE of 1e-14 to 1e-11 up to ten samples."""
    victims = [batch_of(6, seed) for seed in range(4)]
    seen = [observed(MODEL, params_of(), victim) for victim in victims]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *seen)
    keys = jax.random.split(jax.random.key(2), 4)
    many = jax.jit(jax.vmap(spear(MODEL, draws=1024)))(keys, stacked)
    for index, victim in enumerate(victims):
        found = jax.tree.map(lambda leaf, index=index: leaf[index], many)
        assert_exact(found, victim, 1e-9)
    assert many.inputs.dtype == SINGLE


def test_it_knows_when_it_fails():
    batch = batch_of(6)
    attack = spear(MODEL, num_steps=4, draws=256)
    seen = observed(MODEL, params_of(), batch)
    noisy = jax.tree.map(
        lambda leaf: leaf + 1e-3 * jax.random.normal(jax.random.key(3), leaf.shape), seen.gradient
    )
    twice = batch._replace(inputs=batch.inputs.at[0].set(batch.inputs[1]))
    for bad in (seen._replace(gradient=noisy), observed(MODEL, params_of(), twice)):
        found = attack(jax.random.key(2), bad)
        assert not found.found.any() and found.objective > 0
    # Before the first step there is no choice of six.
    nothing = jax.jit(lambda seen: attack.result(seen, attack.init(jax.random.key(2), seen)))(seen)
    assert not nothing.found.any() and nothing.objective == 1


refine = jax.jit(spear_steps.refine, static_argnums=(2, 3))
choose = jax.jit(spear_steps.choose)
draw = jax.jit(spear_steps.draw, static_argnums=(3, 4, 5))


@functools.cache
def problem_of():
    """Of five samples: the batch, a factorised gradient and its true directions, one a row."""
    batch, params = cast(batch_of(5), DOUBLE), cast(params_of(), DOUBLE)
    seen = observed(MODEL, params, batch)
    return batch, *factorized(params, batch, seen)


@jax.jit
def factorized(params, batch, seen):
    problem = spear_steps.factorize(MODEL, seen, 5)
    logits = MODEL.apply(params, batch.inputs)
    signal = jax.nn.softmax(logits) - jax.nn.one_hot(batch.labels, 10)
    active = batch.inputs.reshape(5, -1) @ params["layer01"]["kernel"] > 0
    delta = jnp.where(active, signal @ params["layer02"]["kernel"].T, 0) / 5
    columns = delta @ problem.left
    return problem, columns, columns / jnp.linalg.norm(columns, axis=1, keepdims=True)


def test_the_factors_and_the_certificate_are_those_of_the_paper():
    with jax.enable_x64(True):
        batch, problem, columns, unit = problem_of()
        inputs = np.asarray(batch.inputs).reshape(5, -1)
        # G = L R, dL/dZ = L Q, X = inv(Q) R.
        np.testing.assert_allclose(np.linalg.solve(columns.T, problem.right), inputs, atol=1e-10)
        scaled = spear_steps.unmixed(problem, unit, problem.right)
        np.testing.assert_allclose(scaled, inputs, atol=1e-10)
        assert not spear_steps.disagreements(problem, unit, 1e-9).any()
        wrong = spear_steps.disagreements(problem, unit.at[0].add(0.1 * unit[1]), 1e-9)
        assert wrong[0].sum() > 5
        # A perturbed vector is brought back to the precision of the gradient, its zeros counted.
        near = unit + 1e-8 * jax.random.normal(jax.random.key(0), unit.shape)
        fitted, zeros = refine(problem, near, 0.05, 1e-9)
        np.testing.assert_allclose(jnp.abs((fitted * unit).sum(axis=1)), 1.0, atol=1e-13)
        np.testing.assert_array_equal(
            zeros, ((columns @ problem.left.T).round(12) == 0)[:, problem.active].sum(axis=1)
        )
        # Any other direction has only the zeros that it was made for.
        other = jax.random.normal(jax.random.key(1), (5, 5))
        assert (refine(problem, other, 0.05, 1e-9)[1] == -1).all()


def test_a_wrong_sparse_direction_is_swapped_out():
    """The second greedy stage: one that looks sparser than it is keeps a true one out at first."""
    with jax.enable_x64(True):
        _, problem, _, unit = problem_of()
        false = jax.random.normal(jax.random.key(1), (1, 5))
        false = false / jnp.linalg.norm(false)
        search = spear_steps.Search(
            problem,
            jax.random.key(0),
            directions=jnp.concatenate([false, unit]),
            zeros=jnp.asarray([150, 60, 60, 60, 60, 60]),
            chosen=jnp.eye(5),
            wrong=jnp.asarray(problem.left.size + 1),
            step=jnp.asarray(0),
        )
        first = choose(search, 1e-9)
        assert first.wrong > 0 and jnp.allclose(first.chosen[0], false[0])
        # The step decides which direction is tried: the one that was left out is the last.
        second = choose(first._replace(step=jnp.asarray(5)), 1e-9)
        assert second.wrong == 0
        # A duplicate and a weaker direction do not take the place of others.
        kept = spear_steps.keep(second, -unit[:2], jnp.asarray([60, 59]))
        np.testing.assert_array_equal(kept.zeros, search.zeros)


def test_every_drawn_vector_is_orthogonal_to_enough_rows():
    with jax.enable_x64(True):
        _, problem, _, unit = problem_of()
        vectors = draw(jax.random.key(3), problem, jnp.zeros((4, 5)), 64, 0.05, 1e-9)
        exist = np.asarray((vectors != 0).any(axis=1))
        assert exist.sum() > 10
        at_zero = np.abs(vectors @ problem.left.T) < 1e-7 * problem.size[None]
        assert (at_zero[:, problem.active].sum(axis=1)[exist] >= 4 + 2).all()
        # Those known are not drawn again.
        others = draw(jax.random.key(3), problem, unit, 64, 0.05, 1e-9)
        lengths = jnp.maximum(jnp.linalg.norm(others, axis=1, keepdims=True), 1e-30)
        assert (jnp.abs(others / lengths @ unit.T) < 1 - 1e-9).all()


def test_the_batch_size_is_read_off_the_rank():
    with jax.enable_x64(True):
        batch = cast(batch_of(8), DOUBLE)
        seen = observed(MODEL, cast(params_of(), DOUBLE), batch)
        hidden = seen._replace(facts=dataclasses.replace(seen.facts, batch_size=None))
        assert batch_size_by_rank(MODEL, hidden) == 8
        assert batch_size_by_rank(MODEL, hidden, tolerance=0.5) < 8
        with pytest.raises(ValueError, match="give spear batch_size="):
            attack_of()(jax.random.key(2), hidden)
        with pytest.raises(ValueError, match="batch_size is 8, spear's is 7"):
            spear(MODEL, batch_size=7)(jax.random.key(2), seen)
        told = spear(MODEL, batch_size=8)
        assert told.check is not None
        told.check(hidden)
        assert jax.eval_shape(told.init, jax.random.key(2), hidden).chosen.shape == (8, 8)


def test_it_refuses_what_it_cannot_use():
    for settings, message in (
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"num_steps": 0}, "num_steps must be a whole number of at least 1"),
        ({"draws": 0.5}, "draws must be a whole number of at least 1"),
        ({"sparsity": 0.0}, r"sparsity must lie in \(0.0, 1.0\), got 0.0"),
        ({"tolerance": 0.0}, r"tolerance must lie in \(0.0, 1.0\], got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            spear(MODEL, **settings)
    key, batch = jax.random.key(0), batch_of(3)
    for model, message in (
        (models.mlp((2,)), r"as many samples as .* \(64, 2\); got a batch of 3"),
        (models.mlp(()), "spear needs a hidden layer with ReLU, mlp has none"),
        (models.mlp((8,), bias=False), "spear needs a bias in the first layer of mlp"),
        (models.mlp((8,), activation="tanh"), "must have the activations"),
    ):
        seen = observed(model, model.init(key, SHAPE), batch)
        with pytest.raises(ValueError, match=message):
            spear(model)(key, seen)
    seen = observed(MODEL, params_of(), batch)
    local = LocalTraining(epochs=2, batch_size=3, learning_rate=0.1, num_samples=3)
    adam = dataclasses.replace(local, epochs=1, optimizer="adam")
    for steps, message in ((local, "update of 2 local steps"), (adam, "must be 'sgd'")):
        stepped = seen._replace(facts=dataclasses.replace(seen.facts, local=steps))
        for refuse in (attack_of().check, lambda seen: batch_size_by_rank(MODEL, seen)):
            with pytest.raises(ValueError, match=message):
                refuse(stepped)
    with pytest.raises(ValueError, match=r"tolerance must lie in \[0.0, 1.0\), got 2.0"):
        batch_size_by_rank(MODEL, seen, tolerance=2.0)
