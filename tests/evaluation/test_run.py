"""Attacks on many victims: who they are, what is measured of them, and against which guesses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import invjax
from invjax import attacks, datasets, metrics
from invjax.base import Attack, Reconstruction
from invjax.evaluation import Experiment, attack_victims, run

SHAPE = (4, 4, 1)
CLASSES = 3
MODEL = invjax.models.mlp((4,), num_classes=CLASSES)
PARAMS = MODEL.init(jax.random.key(0), SHAPE)


def images(number=30):
    """Images whose mean tells their index, so that victims can be told apart."""
    rng = np.random.default_rng(0)
    pattern = rng.uniform(-0.2, 0.2, (number, *SHAPE))
    pattern -= pattern.mean(axis=(1, 2, 3), keepdims=True)
    level = np.linspace(0.2, 0.8, number)[:, None, None, None]
    return datasets.from_arrays(
        "levels", (level + pattern).astype(np.float32), np.arange(number) % 3
    )


def experiment(attack=None, dataset=None, **changes):
    settings = {"batch_size": 2, "num_victims": 3, "grant_labels": True, "seed": 0, **changes}
    dataset = images() if dataset is None else dataset
    return Experiment(dataset, MODEL, PARAMS, invjax.chain(), attack, **settings)


def indices(batch, number=30):
    levels = np.asarray(batch.inputs).mean(axis=(2, 3, 4))
    return np.round((levels - 0.2) / 0.6 * (number - 1)).astype(int)


# Victims.


def draw(wanted):
    return run.draw_victims(wanted.dataset, wanted.seed, wanted.num_victims, wanted.batch_size)


def test_victims_do_not_overlap_and_are_of_the_data_set():
    data = images()
    batch = draw(experiment(num_victims=6, batch_size=5))
    assert batch.inputs.shape == (6, 5, *SHAPE) and batch.labels.shape == (6, 5)
    drawn = indices(batch)
    # All thirty, each of them once.
    np.testing.assert_array_equal(np.sort(drawn.ravel()), np.arange(30))
    np.testing.assert_array_equal(batch.inputs, data.inputs[drawn])
    np.testing.assert_array_equal(batch.labels, data.labels[drawn])


def test_victims_depend_on_the_seed_and_on_nothing_else():
    first, again, other = (indices(draw(experiment(seed=seed))) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    defended = experiment(seed=1, grant_labels=False)._replace(
        defense=invjax.defenses.gaussian_noise(1.0)
    )
    np.testing.assert_array_equal(indices(draw(defended)), first)


def test_more_victims_than_samples_are_refused():
    with pytest.raises(ValueError, match=r"size must lie in \[1, 30\]"):
        draw(experiment(num_victims=16))


# Measurements.


def oracle():
    """An attack that is told the class of every sample, and returns them backwards and dimmed."""

    def init(key, observation):
        del key
        labels = observation.labels[::-1]
        level = 0.1 + 0.3 * labels.astype(jnp.float32)
        inputs = jnp.broadcast_to(level[:, None, None, None], (labels.size, *SHAPE))
        return Reconstruction(inputs, labels, labels != 2, jnp.sum(labels, dtype=jnp.float32), {})

    return Attack(init, lambda observation, state: state, lambda observation, state: state)


def test_samples_are_matched_with_their_labels():
    labels = np.arange(12) % 3
    level = np.broadcast_to((0.15 + 0.3 * labels)[:, None, None, None], (12, *SHAPE))
    flat = datasets.from_arrays("flat", level.astype(np.float32), labels)
    outcome = attack_victims(experiment(oracle(), flat, num_victims=4, batch_size=3))
    # Every sample comes back 0.05 too dark, however the batch was turned.
    np.testing.assert_allclose(outcome.truth - outcome.reconstruction, 0.05, atol=1e-6)
    np.testing.assert_array_equal(outcome.recovered_labels, outcome.labels)
    for row, label in zip(outcome.rows, outcome.labels.ravel(), strict=True):
        assert row["psnr"] == pytest.approx(20 * np.log10(1 / 0.05), abs=1e-3)
        assert row["label"] == row["recovered_label"] == label and row["label_right"]
        assert row["found"] == (label != 2)
        assert row["objective"] == outcome.labels[row["victim"]].sum()
    assert outcome.trace.shape == (4, 0) and not outcome.interrupted


ATTACK = attacks.inverting_gradients(MODEL, num_steps=8, restarts=2)


@pytest.fixture(scope="module")
def outcome():
    return attack_victims(experiment(ATTACK))


def test_rows_are_the_metrics_of_the_matched_reconstruction(outcome):
    assert [(row["victim"], row["sample"]) for row in outcome.rows] == [
        (victim, sample) for victim in range(3) for sample in range(2)
    ]
    low, high = images().input_range
    assert (low, high) != (0.0, 1.0)
    for row in outcome.rows:
        victim, sample = row["victim"], row["sample"]
        guess, truth = outcome.reconstruction[victim], outcome.truth[victim]
        # Matched already: no order is closer.
        np.testing.assert_array_equal(metrics.match(guess, truth), [0, 1])
        expected = {
            "mse": metrics.mse(guess, truth),
            "psnr": metrics.psnr(guess, truth, data_range=high - low),
            "ssim": metrics.ssim(guess, truth, data_range=high - low),
        }
        for name, values in expected.items():
            assert row[name] == pytest.approx(float(values[sample]), rel=1e-4)
        assert row["label"] == outcome.labels[victim, sample]
        assert row["label_right"] == (row["recovered_label"] == row["label"])
    assert len({tuple(row) for row in outcome.rows}) == 1


def test_victims_are_those_drawn(outcome):
    batch = draw(experiment())
    np.testing.assert_array_equal(outcome.truth, batch.inputs)
    np.testing.assert_array_equal(outcome.labels, batch.labels)


def test_a_normalized_data_set_is_measured_in_raw_units(outcome):
    normalized = datasets.normalized(images())
    scaled = attack_victims(experiment(ATTACK, normalized))
    np.testing.assert_allclose(scaled.truth, outcome.truth, atol=1e-5)
    low, high = images().input_range
    assert run.raw_range(normalized) == pytest.approx((low, high), abs=1e-5)
    for row, raw in zip(scaled.rows, outcome.rows, strict=True):
        # The starts differ, the guesses that look at no gradient do not.
        for name in ("baseline_grey_psnr", "baseline_mean_psnr"):
            assert row[name] == pytest.approx(raw[name], abs=1e-3)
    error = np.square(scaled.reconstruction - scaled.truth).mean(axis=(2, 3, 4)).ravel()
    psnr = [row["psnr"] for row in scaled.rows]
    np.testing.assert_allclose(psnr, 10 * np.log10((high - low) ** 2 / error), rtol=1e-4)


def test_victims_get_keys_of_their_own():
    def init(key, observation):
        del observation
        noise = jax.random.uniform(key, (2, *SHAPE))
        return Reconstruction(noise, jnp.zeros(2, int), jnp.ones(2, bool), jnp.zeros(()), {})

    guess = Attack(init, lambda observation, state: state, lambda observation, state: state)
    outcome = attack_victims(experiment(guess))
    # The same key would bring back the same noise.
    assert np.unique(outcome.reconstruction).size == outcome.reconstruction.size


def test_traces_are_the_best_objective_so_far(outcome):
    assert outcome.trace.shape == (3, 9)
    assert (np.diff(outcome.trace, axis=1) <= 0).all()
    objectives = [row["objective"] for row in outcome.rows[::2]]
    np.testing.assert_allclose(outcome.trace[:, -1], objectives, rtol=1e-6)


def test_best_so_far_by_hand():
    nan, inf = np.nan, np.inf
    trace = [
        [[5.0, 3.0, 4.0, nan, nan], [4.0, 6.0, nan, nan, nan]],
        [[nan, nan, nan, nan, nan], [2.0, inf, -1.0, nan, nan]],
    ]
    expected = [[4.0, 3.0, 3.0], [2.0, 2.0, -1.0]]
    np.testing.assert_array_equal(run.best_so_far(trace), expected)
    # Nothing finite at all: one column remains.
    np.testing.assert_array_equal(run.best_so_far(np.full((1, 2, 4), nan)), [[inf]])


def test_the_same_seed_gives_the_same_outcome(outcome):
    again = attack_victims(experiment(ATTACK))
    np.testing.assert_array_equal(again.reconstruction, outcome.reconstruction)
    assert again.rows == outcome.rows


# Baselines.


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 2.0)])
def test_baselines_by_hand(low, high):
    # Two samples of the range's ends: mid-grey misses both by half of the range everywhere; the
    # mean image, a quarter up since three of four samples are low, by a quarter and three.
    span = high - low
    inputs = np.full((4, *SHAPE), low, np.float32)
    inputs[3] = high
    dataset = datasets.from_arrays("ends", inputs, np.zeros(4, int))
    assert dataset.input_range == (low, high)
    truth = inputs[[0, 3]][None]
    rows = run.measure(dataset, truth, truth + np.float32(0.1 * span))
    assert len(rows) == 2
    for row, distance in zip(rows, (0.25, 0.75), strict=True):
        assert row["psnr"] == pytest.approx(20.0, abs=1e-3)
        assert row["mse"] == pytest.approx(0.01 * span**2, rel=1e-4)
        assert row["baseline_grey_psnr"] == pytest.approx(20 * np.log10(2), abs=1e-3)
        assert row["baseline_mean_psnr"] == pytest.approx(-20 * np.log10(distance), abs=1e-3)


def test_vectors_have_no_ssim():
    vectors = datasets.from_arrays("vectors", np.eye(5, dtype=np.float32), np.zeros(5, int))
    truth = vectors.inputs.reshape(5, 1, 5)
    rows = run.measure(vectors, truth, 1 - truth)
    assert set(rows[0]) == {"psnr", "mse", "baseline_grey_psnr", "baseline_mean_psnr"}
    assert all(row["psnr"] == pytest.approx(0.0, abs=1e-5) for row in rows)
    # The mean of the unit vectors is 1/5: one coordinate is off by 4/5, four by 1/5.
    error = ((4 / 5) ** 2 + 4 * (1 / 5) ** 2) / 5
    assert rows[0]["baseline_mean_psnr"] == pytest.approx(-10 * np.log10(error), abs=1e-3)
