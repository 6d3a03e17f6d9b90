"""Inversion through training: exact without noise, and at the Cramér-Rao bound with it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import invjax
from invjax import models
from invjax.attacks.informed.unrolled import unrolled
from invjax.base import Batch
from invjax.theory import fisher


@pytest.fixture(autouse=True)
def _in_float64():
    with jax.enable_x64(True):
        yield


class Setting:
    """A victim's training on digits."""

    def __init__(self, width, number, steps, classes, *, coarse):
        digits = invjax.datasets.digits()
        order = np.random.default_rng(0).permutation(len(digits))
        inputs, labels = np.asarray(digits.inputs, float)[order], np.asarray(digits.labels)[order]
        inputs, labels = inputs[labels < classes], labels[labels < classes]
        if coarse:
            inputs = inputs.reshape(-1, 4, 2, 4, 2, 1).mean(axis=(2, 4))
        self.model = models.mlp((width,), classes, "elu")
        start = self.model.init(jax.random.key(0), inputs.shape[1:])
        self.start = jax.tree.map(lambda leaf: leaf.astype(float), start)
        self.known, self.pool, self.targets = (
            Batch(jnp.asarray(inputs[part]), jnp.asarray(labels[part]))
            for part in (slice(number), slice(number, 400), slice(400, 403))
        )
        self.steps, self.classes = steps, classes

    def train(self, batch):
        """Full-batch gradient descent with momentum."""
        optimizer = optax.sgd(0.1, momentum=0.9)

        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(self.model.loss)(params, batch), state)
            return (optax.apply_updates(params, updates), state), None

        carry = (self.start, optimizer.init(self.start))
        return jax.lax.scan(step, carry, None, self.steps)[0][0]

    def release(self, record, label):
        return self.train(
            Batch(
                jnp.concatenate([self.known.inputs, record[None]]),
                jnp.concatenate([self.known.labels, label[None]]),
            )
        )

    def attack(self, released, *, pool=None, **settings):
        return unrolled(
            self.train,
            released,
            self.known,
            self.pool if pool is None else pool,
            num_classes=self.classes,
            at_once=self.classes,
            **settings,
        )


DRAWS, STD = 3, 1e-3


@pytest.fixture(scope="module")
def small():
    with jax.enable_x64(True):
        return Setting(6, 12, 10, 3, coarse=True)


@pytest.fixture(scope="module")
def released(small):
    with jax.enable_x64(True):
        return jax.jit(jax.vmap(small.release))(*small.targets)


@pytest.fixture(scope="module")
def found(small, released):
    """Every victim as it is, with noise, with a lot of noise, and the first without a number."""
    rng = np.random.default_rng(1)

    def noisy(std):
        return jax.tree.map(
            lambda leaf: np.asarray(leaf) + std * rng.normal(size=leaf.shape), released
        )

    broken = jax.tree.map(lambda leaf: np.asarray(leaf)[:1] * np.nan, released)
    victims = [released, *(noisy(STD) for _ in range(DRAWS)), noisy(0.3), broken]
    with jax.enable_x64(True):
        stacked = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *victims)
        attack = jax.jit(jax.vmap(functools.partial(small.attack, num_steps=10)))
        return jax.tree.map(np.asarray, attack(stacked))


def part(found, start, stop):
    return jax.tree.map(lambda leaf: leaf[start:stop], found)


def exact(found, targets):
    """Checks what is specified of a smooth victim."""
    assert np.abs(found.inputs[:, 0] - targets.inputs).max() < 1e-8
    np.testing.assert_array_equal(found.labels[:, 0], targets.labels)
    assert found.found.all()
    residuals = np.sort(found.diagnostics["residuals"], axis=1)
    assert (residuals[:, 1] > 1e6 * residuals[:, 0]).all()


def test_a_smooth_victim_gives_the_record_away(small, found):
    clean = part(found, 0, 3)
    exact(clean, small.targets)
    assert clean.diagnostics["candidates"].shape == (3, 3, 4, 4, 1)
    np.testing.assert_array_equal(clean.objective, clean.diagnostics["residuals"].min(axis=1))


def test_noise_on_the_weights_costs_what_cramer_and_rao_say(small, found):
    """Within 30 %, at noise of 1e-3; the label is found all the same."""
    information = found.diagnostics["information"][:3]
    bounds = STD**2 * np.linalg.inv(information).trace(axis1=1, axis2=2) / 16
    noisy = part(found, 3, 3 + 3 * DRAWS)
    errors = noisy.inputs[:, 0] - np.tile(small.targets.inputs, (DRAWS, 1, 1, 1))
    assert np.mean(errors**2) == pytest.approx(bounds.mean(), rel=0.3)
    np.testing.assert_array_equal(noisy.labels[:, 0], np.tile(small.targets.labels, DRAWS))
    assert noisy.found.all()
    # The same bound, from the truth.
    record, label = small.targets.inputs[1], small.targets.labels[1]
    bound = jax.jit(lambda x: fisher.unbiased_mse(lambda x: small.release(x, label), x, STD))
    assert float(bound(record)) == pytest.approx(bounds[1], rel=1e-6)


def test_what_no_record_explains_is_not_found(found):
    assert not part(found, 3 + 3 * DRAWS, None).found.any()


def test_a_known_label_a_box_and_a_pool_without_the_class(small, released):
    one = jax.tree.map(lambda leaf: leaf[0], released)
    label, record = small.targets.labels[0], small.targets.inputs[0]
    other = jnp.where(small.pool.labels == label, (label + 1) % 3, small.pool.labels)
    attack = functools.partial(
        small.attack,
        pool=Batch(small.pool.inputs, other),
        num_steps=10,
        input_range=(0.0, 1.0),
    )
    found = jax.jit(lambda released, label: attack(released, label=label))(one, label)
    assert np.abs(found.inputs[0] - record).max() < 1e-8
    assert found.diagnostics["residuals"].shape == (1,) and found.labels[0] == label
    assert found.inputs.min() >= 0 and found.inputs.max() <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "num_steps"),
        ({"num_classes": 0}, "num_classes"),
        ({"at_once": 0}, "at_once"),
        ({"label": 10}, "label"),
        ({"tolerance": -1.0}, "tolerance"),
        ({"released": {"other": jnp.zeros(3)}}, "released must be weights"),
        ({"pool": Batch(jnp.zeros((3, 8, 8, 1)), jnp.zeros(3, int))}, "pool must hold"),
        ({"input_range": (1.0, 0.0)}, "input_range must be"),
        ({"known": Batch(jnp.zeros((3, 4, 4, 1), int), jnp.zeros(3, int))}, "floating point"),
    ],
)
def test_what_cannot_be_attacked_is_refused(small, changes, message):
    arguments = {
        "released": small.start,
        "known": small.known,
        "pool": small.pool,
        "num_classes": 10,
    }
    with pytest.raises((ValueError, TypeError), match=message):
        unrolled(small.train, **(arguments | changes))


@pytest.mark.slow
def test_a_victim_of_the_published_kind():
    """64-16-10, ELU, 100 known records, 100 full-batch steps with momentum."""
    setting = Setting(16, 100, 100, 10, coarse=False)
    released = jax.jit(setting.release)(*jax.tree.map(lambda leaf: leaf[0], setting.targets))
    found = jax.jit(functools.partial(setting.attack, num_steps=10))(released)
    exact(jax.tree.map(lambda leaf: leaf[None], found), part(setting.targets, 0, 1))
