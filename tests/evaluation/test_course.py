"""Training under a defence, and attacks on its way."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import invjax
from invjax import attacks, datasets, defenses, models
from invjax.defenses.base import from_stages, on_inputs
from invjax.evaluation import course, utility
from invjax.report.course import course_figure

DIGITS = datasets.digits()
MODEL = models.mlp((32,), activation="tanh")


def test_split_is_a_partition():
    first, second = utility.split(DIGITS, 0.25, seed=1)
    assert len(second) == round(0.25 * len(DIGITS)) and len(first) + len(second) == len(DIGITS)
    everything = np.concatenate([first.inputs, second.inputs]).reshape(len(DIGITS), -1)
    original = np.asarray(DIGITS.inputs).reshape(len(DIGITS), -1)
    order = np.lexsort(everything.T), np.lexsort(original.T)
    np.testing.assert_array_equal(everything[order[0]], original[order[1]])
    for fraction in (0.0, 1.0):
        with pytest.raises(ValueError, match="fraction"):
            utility.split(DIGITS, fraction)


def test_training_without_a_defense_is_plain_optax():
    training, held_out = utility.split(DIGITS)
    found = utility.train(MODEL, training, held_out, steps=(0, 3), optimizer=optax.sgd(0.1), seed=2)
    params = MODEL.init(jax.random.fold_in(jax.random.key(2), 3), (8, 8, 1))
    rng = np.random.default_rng([2, 4])
    for _ in range(3):
        batch = datasets.take(training, rng.integers(0, len(training), 32))
        slope = jax.grad(MODEL.loss)(params, batch)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, slope)
    for left, right in zip(jax.tree.leaves(found[1].params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-6)


@pytest.mark.parametrize(
    "defense",
    [
        defenses.dp_sgd(1.0, 0.1),
        invjax.chain(defenses.mixup(1.0, num_classes=10), defenses.gaussian_noise(0.001)),
        defenses.soteria(MODEL, 0.5),
    ],
    ids=lambda defense: defense.name,
)
def test_a_model_learns_under_a_defense(defense):
    training, held_out = utility.split(DIGITS)
    optimizer = optax.adam(1e-2)
    found = utility.train(MODEL, training, held_out, defense, steps=(0, 150), optimizer=optimizer)
    assert [one.step for one in found] == [0, 150]
    assert found[0].accuracy < 0.3 and found[1].accuracy > 0.75


def test_a_model_learns_under_augmentation():
    """A crop of 4 of 8 pixels, the default, would leave nothing to learn."""
    training, held_out = utility.split(DIGITS)
    optimizer, policy = optax.adam(1e-2), "21-13-3+7-4-15"
    gentle = defenses.ats(policy, crop_padding=0, flip=False)
    found = utility.train(MODEL, training, held_out, gentle, steps=(0, 300), optimizer=optimizer)
    assert found[1].accuracy > 0.5 > 0.3 > found[0].accuracy


def test_a_bottleneck_learns():
    training, held_out = utility.split(DIGITS)
    protected = defenses.precode(models.mlp((32,), num_classes=16), 10, bottleneck=8)
    found = utility.train(protected, training, held_out, steps=(0, 200), optimizer=optax.adam(1e-2))
    assert found[1].accuracy > 0.75


@pytest.mark.parametrize("steps", [(), (1, 1), (3, 2), (-1, 2)])
def test_steps_must_increase(steps):
    with pytest.raises(ValueError, match="steps must increase"):
        utility.train(MODEL, DIGITS, DIGITS, steps=steps)


@pytest.fixture(scope="module")
def rows():
    turn = from_stages(
        on_inputs("turn", lambda key, batch: batch._replace(inputs=1 - batch.inputs))
    )
    made = {
        "matched": attacks.bayes(MODEL, turn, num_steps=200),
        "bias trick": attacks.bias_trick(MODEL),
    }
    return course.attack_over_training(
        MODEL, DIGITS, turn, made, steps=(0, 1, 30), num_victims=3, optimizer=optax.adam(1e-2)
    )


def test_every_step_attack_and_sample_has_a_row(rows):
    found = {(row["step"], row["attack"], row["victim"]) for row in rows}
    assert len(rows) == len(found) == 3 * 2 * 3
    accuracy = {(row["step"], row["accuracy"]) for row in rows}
    assert len(accuracy) == 3 and all(0 <= share <= 1 for _, share in accuracy)


def test_the_gradient_knows_the_transformed_batch(rows):
    for row in rows:
        if row["attack"] == "bias trick":
            assert row["prepared_psnr"] > 60 > 20 > row["psnr"]
        elif row["step"] == 0:
            assert row["prepared_psnr"] > 25 and row["psnr"] < 20
    # The same victims at every step.
    labels = {(row["victim"], row["label"]) for row in rows}
    assert len(labels) == 3


def test_an_attack_that_cannot_be_is_refused_before_training():
    attack = {"bias trick": attacks.bias_trick(MODEL)}
    with pytest.raises(ValueError, match="batch_size must be 1, got 2"):
        course.attack_over_training(MODEL, DIGITS, None, attack, steps=(0,), batch_size=2)


def test_the_figure(rows):
    assert course_figure(rows).startswith(b"\x89PNG")
    assert course_figure(rows, "prepared_psnr") != course_figure(rows)
    failed = [rows[0] | {"psnr": value} for value in (np.nan, np.inf, -np.inf)]
    for some in (failed, failed[:1], failed[1:2]):
        assert course_figure(some).startswith(b"\x89PNG")


def test_accuracy_counts():
    model = MODEL._replace(apply=lambda params, inputs: jnp.eye(10)[jnp.zeros(len(inputs), int)])
    share = utility.accuracy(model, {}, DIGITS)
    assert share == pytest.approx(np.mean(np.asarray(DIGITS.labels) == 0))
