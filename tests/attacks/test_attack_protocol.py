"""What every attack must keep: pure, under `jit` and `vmap` the same, and honest about failure."""

import dataclasses
import importlib
import inspect
import pkgutil
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import invjax
from invjax import Attack, attacks, models
from invjax.attacks import analytic, federated
from invjax.datasets import tabular

SHAPE, CLASSES = (4, 4, 1), 5
SCHEMA = tabular.Schema(
    (tabular.Categorical("kind", 3), tabular.Continuous("size", 0.2, 0.1, 0.0, 1.0))
)


class Row(NamedTuple):
    """An attack, and the victims that it is for."""

    make: object
    batch_size: int = 2
    local: bool = False
    table: bool = False


ROWS = {
    "bayes": Row(lambda model: attacks.bayes(model, invjax.chain(), num_steps=3)),
    "bias_trick": Row(attacks.bias_trick, batch_size=1),
    "dlg": Row(lambda model: attacks.dlg(model, num_steps=3)),
    "fedavg": Row(lambda model: federated.fedavg(model, num_steps=3), local=True),
    "gradient_matching": Row(
        lambda model: attacks.gradient_matching(
            model,
            objective=attacks.objectives.squared_l2(),
            optimizer=optax.adam(0.1),
            num_steps=3,
        )
    ),
    "gradinversion": Row(
        lambda model: attacks.gradinversion(model, num_steps=3, batch_norm=0.0, restarts=2)
    ),
    "idlg": Row(lambda model: attacks.idlg(model, num_steps=3), batch_size=1),
    "inverting_gradients": Row(lambda model: attacks.inverting_gradients(model, num_steps=3)),
    "exclusivity": Row(attacks.exclusivity),
    "hybrid": Row(lambda model: attacks.hybrid(model, schedule=[]), batch_size=1),
    "layerwise": Row(attacks.layerwise, batch_size=1),
    "row_scan": Row(attacks.row_scan),
    "spear": Row(lambda model: attacks.spear(model, num_steps=2, draws=8)),
    "strong": Row(lambda model: attacks.strong(model, num_steps=2, generator=None)),
    "surrogate": Row(lambda model: federated.surrogate(model, num_steps=3), local=True),
    "tableak": Row(
        lambda model: attacks.tableak(model, SCHEMA, num_steps=3, restarts=2), table=True
    ),
    "tag": Row(lambda model: attacks.tag(model, num_steps=3)),
    "tensor": Row(lambda model: attacks.tensor.tensor(model, max_steps=2, restarts=0)),
}
EVERY = pytest.mark.parametrize("name", ROWS)


def victims(row, seed, number=2):
    """A model and what the server sees of some clients."""
    model = models.mlp((32,), CLASSES, init="he")
    rng = np.random.default_rng(seed)
    shape = (SCHEMA.width,) if row.table else SHAPE
    batches = invjax.Batch(
        jnp.asarray(rng.uniform(size=(number, row.batch_size, *shape)), jnp.float32),
        jnp.asarray(rng.integers(0, CLASSES, (number, row.batch_size))),
    )
    params = model.init(jax.random.key(0), shape)
    local = None
    if row.local:
        local = invjax.LocalTraining(epochs=2, batch_size=1, learning_rate=0.1, num_samples=2)
    keys = jax.random.split(jax.random.key(seed), number)
    seen = jax.vmap(
        lambda key, batch: invjax.observe(key, model, params, batch, local=local, grant_labels=True)
    )(keys, batches)
    return model, keys, seen


def modules(package):
    """Every module of a package, at any depth."""
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        yield importlib.import_module(info.name)


def test_every_public_attack_has_a_row():
    found = {
        name
        for module in modules(attacks)
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if inspect.signature(function).return_annotation is Attack and name[0] != "_"
    }
    # These make an attack of another, or a part of one.
    found -= {"by_name", "closed_form", "row_attack", "through_features"}
    # It reads weights, where the others read a gradient.
    found -= {"kkt"}
    assert found == set(ROWS)
    public = {*attacks.__all__, *analytic.__all__, *dir(federated)}
    assert set(ROWS) <= public


@EVERY
def test_many_victims_are_each_on_their_own(name):
    row = ROWS[name]
    model, keys, seen = victims(row, 1)
    attack = row.make(model)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def many(keys, seen):
        return jax.vmap(attack)(keys, seen)

    found = many(keys, seen)
    chex.assert_trees_all_equal(found, many(keys, seen))
    other = many(*victims(row, 2)[1:])
    assert np.abs(other.inputs - found.inputs).max() > 1e-3
    swapped = many(keys[::-1], jax.tree.map(lambda leaf: leaf[::-1], seen))
    chex.assert_trees_all_close(
        jax.tree.map(lambda leaf: leaf[::-1], swapped), found, rtol=1e-4, atol=1e-5
    )

    size = (2, row.batch_size)
    assert found.inputs.shape == (*size, *seen.facts.input_shape)
    assert found.inputs.dtype == jnp.float32 and np.isfinite(found.inputs).all()
    assert found.labels.shape == size and jnp.issubdtype(found.labels.dtype, jnp.integer)
    assert found.found.shape == size and found.found.dtype == bool
    assert found.objective.shape == (2,) and np.isfinite(found.objective).all()
    alone = jax.eval_shape(attack, keys[0], jax.tree.map(lambda leaf: leaf[0], seen))
    assert jax.tree.map(lambda leaf: leaf.shape[1:], found) == jax.tree.map(jnp.shape, alone)

    # One victim's gradient that is not finite is that one's failure; by itself it is refused.
    poisoned = seen._replace(
        gradient=jax.tree.map(lambda leaf: leaf.at[1].set(jnp.nan), seen.gradient)
    )
    failed = many(keys, poisoned)
    assert not failed.found[1].any()
    np.testing.assert_allclose(failed.inputs[0], found.inputs[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="must be finite"):
        attack(keys[1], jax.tree.map(lambda leaf: leaf[1], poisoned))


@EVERY
def test_released_weights_are_refused(name):
    row = ROWS[name]
    model, keys, seen = victims(row, 1)
    one = jax.tree.map(lambda leaf: leaf[0], seen)._replace(gradient=None)
    with pytest.raises(ValueError, match="gradient"):
        row.make(model)(keys[0], one)


@EVERY
def test_an_update_of_adam_is_no_gradient(name):
    row = ROWS[name]
    model, keys, seen = victims(row, 1)
    one = jax.tree.map(lambda leaf: leaf[0], seen)
    local = invjax.LocalTraining(
        epochs=1,
        batch_size=row.batch_size,
        learning_rate=0.1,
        num_samples=row.batch_size,
        optimizer="adam",
    )
    one = one._replace(facts=dataclasses.replace(one.facts, local=local))
    with pytest.raises(ValueError, match="must be 'sgd'"):
        jax.eval_shape(row.make(model), keys[0], one)
