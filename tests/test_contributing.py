"""What CONTRIBUTING.md says of additions from outside works as written there."""

import importlib
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import invjax

PAGE = (pathlib.Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outside")
    (folder / "mylab.py").write_text("\n\n".join(BLOCKS))
    return folder


@pytest.fixture
def mylab(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    yield importlib.import_module("mylab")
    sys.modules.pop("mylab")


@pytest.fixture(scope="module")
def digits():
    return invjax.datasets.digits()


@pytest.fixture(scope="module")
def model():
    return invjax.models.mlp((16,))


@pytest.fixture(scope="module")
def params(model, digits):
    return model.init(jax.random.key(0), digits.input_shape)


def test_every_addition_is_short():
    assert len(BLOCKS) == 5
    assert max(len(block.splitlines()) for block in BLOCKS) <= 40
    assert all(len(one.splitlines()) < 30 for block in BLOCKS for one in block.split("\n\n\n"))


class TestDefense:
    def test_the_adversary_knows_its_law(self, mylab):
        defense = mylab.relative_noise(0.1)
        gradient = {"a": jnp.arange(1.0, 5.0), "b": jnp.full((2, 3), 1e-3)}
        keys = jax.random.split(jax.random.key(0), 4000)
        seen = jax.vmap(
            lambda key: defense.update(gradient, defense.init_with_key(key, gradient))[0]
        )(keys)
        law = defense.law(gradient, gradient, ())
        for name in gradient:
            spread = jnp.var(seen[name], axis=0)
            np.testing.assert_allclose(spread, law.variance[name], rtol=0.15)

    def test_it_composes(self, mylab, model, params, digits):
        batch = invjax.datasets.draw(jax.random.key(1), digits, 4)
        defense = invjax.chain(invjax.defenses.clip_per_sample(1.0), mylab.relative_noise(0.1))
        samples = invjax.gradients.per_sample_gradients(model, params, batch)
        optimizer = optax.chain(defense, optax.sgd(0.1))
        updates, _ = optimizer.update(samples, optimizer.init(params), params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)


class TestAttack:
    def test_it_comes_nearer(self, mylab, model, params, digits):
        batch = invjax.datasets.draw(jax.random.key(1), digits, 1)
        key = jax.random.key(2)
        observation = invjax.observe(key, model, params, batch, grant_labels=True)
        attack = mylab.random_search(model, 0.05)
        start = attack.init(key, observation)
        result = jax.jit(attack)(key, observation)
        assert result.objective < 0.5 * start.distance
        error, guess = (
            float(jnp.square(inputs - batch.inputs).mean())
            for inputs in (result.inputs, start.inputs)
        )
        assert error < guess

    def test_a_sweep_finds_it_by_name(self, mylab, tmp_path):
        settings = {
            "models": ["mlp(8)"],
            "defenses": ["none", "mylab.relative_noise(0.5)"],
            "attacks": ["mylab.random_search(0.1, num_steps=20)", "bayes(num_steps=20)"],
            "labels": "known",
            "num_victims": 2,
        }
        table = invjax.sweep(settings, tmp_path / "run")
        assert table.num_rows == 8
        assert set(table["defense"].to_pylist()) == set(settings["defenses"])
        errors = np.asarray(table["mse"])
        assert np.isfinite(errors).all()


def test_the_prior_pulls(mylab, model, params, digits):
    batch = invjax.datasets.draw(jax.random.key(1), digits, 1)
    defense = invjax.defenses.gaussian_noise(10.0)
    observation = invjax.observe(
        jax.random.key(2), model, params, batch, defense, grant_labels=True
    )
    means = [
        invjax.attacks.bayes(model, defense, prior=mylab.brightness(mean, 0.01), num_steps=200)(
            jax.random.key(3), observation
        ).inputs.mean()
        for mean in (0.3, 0.7)
    ]
    np.testing.assert_allclose(means, [0.3, 0.7], atol=0.05)


def test_the_bound_tends_to_cramer_rao(mylab):
    """With a single unknown both are one number as the other batch comes near."""
    with jax.enable_x64(True):
        model = invjax.models.mlp((8,), num_classes=3, activation="tanh")
        params = model.init(jax.random.key(0), (1, 1, 1))
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
        batch = invjax.Batch(jnp.full((1, 1, 1, 1), 0.4, jnp.float64), jnp.array([1]))
        defense = invjax.defenses.gaussian_noise(0.1)
        limit = invjax.theory.cramer_rao(model, params, batch, defense).total
        bounds = [
            mylab.chapman_robbins(
                model, params, batch, batch._replace(inputs=batch.inputs + change), 0.1
            )
            for change in (1e-4, 1.0)
        ]
    np.testing.assert_allclose(bounds[0], limit, rtol=1e-3)
    assert not np.isclose(bounds[1], limit, rtol=1e-2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mylab.missing(0.1)", "Unknown defense 'mylab.missing'.*no attribute"),
        ("nolab.noise(0.1)", "Unknown defense 'nolab.noise': No module named 'nolab'"),
        ("mylab.PRIVATE", "must be a function, got 3"),
    ],
)
def test_what_cannot_be_found_is_said(mylab, monkeypatch, text, message):
    monkeypatch.setattr(mylab, "PRIVATE", 3, raising=False)
    with pytest.raises(ValueError, match=message):
        invjax.defenses.parse(text)


def test_a_defense_of_a_model_asks_for_it():
    with pytest.raises(ValueError, match="'soteria' needs a model"):
        invjax.defenses.parse("soteria(0.5)")
