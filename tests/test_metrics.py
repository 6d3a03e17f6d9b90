"""Metrics: closed forms, identities, invariances, and errors."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.signal
from hypothesis import strategies as st

from invjax import metrics
from invjax.base import Batch, Reconstruction

SEEDS = st.integers(0, 2**32 - 1)
SHAPES = st.sampled_from([(1, 3), (5, 7), (4, 8, 8, 1), (3, 12, 13, 3)])
# Shapes come from short lists, so that examples share compilations.
examples = hypothesis.settings(max_examples=20, deadline=None, derandomize=True, database=None)


def samples(seed, *shape):
    return np.random.default_rng(seed).uniform(size=shape).astype(np.float32)


# Assignment and matching.


@examples
@hypothesis.given(SEEDS, st.sampled_from([1, 2, 5, 16]), st.sampled_from([1e-6, 1.0, 1e6]))
def test_assignment_equals_scipy(seed, size, unit):
    cost = (np.random.default_rng(seed).normal(size=(size, size)) * unit).astype(np.float32)
    columns = jax.jit(metrics.assignment)(cost)
    np.testing.assert_array_equal(columns, scipy.optimize.linear_sum_assignment(cost)[1])


def test_assignment_of_integers_has_the_least_total_cost():
    cost = np.random.default_rng(0).integers(-5, 5, size=(12, 12))
    columns = np.asarray(metrics.assignment(cost))
    rows, best = scipy.optimize.linear_sum_assignment(cost)
    assert sorted(columns) == list(range(12))
    assert cost[rows, columns].sum() == cost[rows, best].sum()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_assignment_avoids_what_is_not_finite(bad):
    cost = np.array([[bad, 100.0, 0.0], [0.0, bad, 1e-3], [0.0, 0.0, bad]], np.float32)
    # The least total without the diagonal: 0 + 0 + 0.
    np.testing.assert_array_equal(metrics.assignment(cost), [2, 0, 1])
    np.testing.assert_array_equal(np.sort(metrics.assignment(np.full((4, 4), bad))), range(4))


def test_one_forbidden_pair_outweighs_all_admissible_ones():
    # Row by row the forbidden pair would save 1 in every other row.
    size = 6
    cost = np.where(np.eye(size, k=1) + np.eye(size, k=1 - size) > 0, 1.0, 2.0)
    cost[np.arange(size), np.arange(size)] = 0.0
    cost[0, 0] = np.inf
    columns = np.asarray(metrics.assignment(cost.astype(np.float32)))
    assert np.isfinite(cost[np.arange(size), columns]).all()


def test_assignment_of_equal_costs_is_a_permutation():
    np.testing.assert_array_equal(np.sort(metrics.assignment(np.ones((5, 5)))), range(5))
    # Nor do equal costs hide the forbidden ones.
    allowed = np.random.default_rng(0).permutation(6)
    cost = np.where(allowed[:, None] == np.arange(6), 2.0, np.inf)
    np.testing.assert_array_equal(metrics.assignment(cost), allowed)


@pytest.mark.parametrize("shape", [(2, 3), (4,), (0, 0), (2, 2, 2)])
def test_assignment_refuses_what_is_not_square(shape):
    with pytest.raises(ValueError, match=r"cost must be \[B, B\]"):
        metrics.assignment(np.zeros(shape))


@examples
@hypothesis.given(SEEDS, SHAPES, st.sampled_from(["mse", "mae"]))
def test_match_undoes_any_permutation(seed, shape, cost):
    truth = samples(seed, *shape)
    order = np.random.default_rng(seed + 1).permutation(shape[0])
    found = metrics.match(truth[order], truth, cost)
    np.testing.assert_array_equal(order[np.asarray(found)], range(shape[0]))


def test_match_takes_a_function_and_tells_its_arguments_apart():
    truth = jnp.array([[0.0], [10.0]])
    reconstruction = jnp.array([[10.0], [0.0]])

    def cost(reconstructed, true):
        return jnp.sum(jnp.square(reconstructed + 1.0 - true))

    np.testing.assert_array_equal(metrics.match(reconstruction, truth, cost), [1, 0])


def test_mse_and_mae_can_disagree():
    # Summed over pairs: 7 or 9 squared, 5 or 3 in absolute value.
    truth = np.array([[0, 0], [1, 1]], np.float32)
    reconstruction = np.array([[1, 1], [0, 3]], np.float32)
    np.testing.assert_array_equal(metrics.match(reconstruction, truth, "mse"), [0, 1])
    np.testing.assert_array_equal(metrics.match(reconstruction, truth, "mae"), [1, 0])


def test_a_sample_that_is_not_finite_leaves_the_others_matched():
    truth = samples(0, 5, 6)
    order = np.array([3, 1, 4, 0, 2])
    reconstruction = truth[order]
    reconstruction[2] = np.nan
    found = np.asarray(metrics.match(reconstruction, truth))
    expected = np.argsort(order)
    np.testing.assert_array_equal(found, expected)


@examples
@hypothesis.given(SEEDS, SHAPES)
def test_matched_metrics_do_not_see_the_order(seed, shape):
    rng = np.random.default_rng(seed)
    truth = Batch(samples(seed, *shape), rng.integers(0, 3, shape[0]))
    guess = Batch(samples(seed + 1, *shape), rng.integers(0, 3, shape[0]))
    order = rng.permutation(shape[0])
    shuffled = Batch(guess.inputs[order], guess.labels[order])
    results = []
    for batch in (guess, shuffled):
        batch = metrics.matched(batch, truth)
        psnr = metrics.psnr(batch.inputs, truth.inputs, data_range=1.0)
        results.append((psnr, metrics.label_accuracy(batch.labels, truth.labels)))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-5)
    assert results[0][1] == results[1][1]


def test_matched_moves_inputs_labels_and_found_alike():
    truth = Batch(samples(0, 4, 3), jnp.arange(4))
    order = np.array([2, 0, 3, 1])
    reconstruction = Reconstruction(
        inputs=truth.inputs[order],
        labels=truth.labels[order],
        found=truth.labels[order] == 3,
        objective=jnp.float32(7.0),
        diagnostics={"trace": jnp.arange(9)},
    )
    result = jax.jit(metrics.matched)(reconstruction, truth)
    assert isinstance(result, Reconstruction)
    np.testing.assert_array_equal(result.inputs, truth.inputs)
    np.testing.assert_array_equal(result.labels, truth.labels)
    np.testing.assert_array_equal(result.found, [False, False, False, True])
    np.testing.assert_array_equal(result.diagnostics["trace"], np.arange(9))
    assert result.objective == 7.0


def test_match_refuses_an_unknown_cost():
    with pytest.raises(ValueError, match=r"cost must be one of \['mae', 'mse'\].*'ssim'"):
        metrics.match(samples(0, 2, 2), samples(1, 2, 2), "ssim")


# Distances.


@examples
@hypothesis.given(SEEDS, SHAPES, st.sampled_from([0.5, 1.0, 255.0]))
def test_psnr_is_a_function_of_mse(seed, shape, data_range):
    truth, guess = samples(seed, *shape) * data_range, samples(seed + 1, *shape) * data_range
    error = metrics.mse(guess, truth)
    expected = np.square(guess.astype(np.float64) - truth).reshape(shape[0], -1).mean(axis=1)
    np.testing.assert_allclose(error, expected, rtol=1e-5)
    psnr = metrics.psnr(guess, truth, data_range=data_range)
    np.testing.assert_allclose(psnr, 10 * np.log10(data_range**2 / expected), rtol=1e-4)
    assert error.shape == psnr.shape == (shape[0],)


def test_psnr_of_a_tenth_is_twenty_decibels_and_of_nothing_infinite():
    truth = jnp.full((2, 5), 0.5)
    guess = truth.at[0].add(0.1)
    np.testing.assert_allclose(
        metrics.psnr(guess, truth, data_range=1.0), [20.0, np.inf], rtol=1e-5
    )


@jax.jit
def per_sample_metrics(guess, truth):
    return (
        metrics.mse(guess, truth),
        metrics.psnr(guess, truth, data_range=1.0),
        metrics.ssim(guess, truth, data_range=1.0),
        metrics.feature_distance(lambda x: x.mean(axis=3), guess, truth),
        metrics.nearest_neighbor(guess, truth)[1],
    )


@examples
@hypothesis.given(SEEDS)
def test_a_sample_that_is_not_finite_spoils_no_other(seed):
    rng = np.random.default_rng(seed)
    truth, guess = samples(seed, 4, 8, 8, 2), samples(seed + 1, 4, 8, 8, 2)
    victim = rng.integers(4)
    guess[victim, rng.integers(8), rng.integers(8), rng.integers(2)] = rng.choice([np.nan, np.inf])
    others = np.arange(4) != victim
    for values in per_sample_metrics(guess, truth):
        assert np.isfinite(values[others]).all()
        assert not np.isfinite(values[victim])
    for values in per_sample_metrics(truth + np.float32(0.1), truth):
        assert np.isfinite(values).all()


def reference_ssim(a, b, data_range, window):
    """SSIM as in the paper, one channel, in float64."""
    coordinate = np.arange(window) - window // 2
    kernel = np.exp(-0.5 * (coordinate / 1.5) ** 2)
    kernel = np.outer(kernel, kernel) / kernel.sum() ** 2

    def blur(x):
        return scipy.signal.convolve2d(x, kernel, mode="valid")

    a, b = a.astype(np.float64), b.astype(np.float64)
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return np.mean(luminance * (2 * covariance + c2) / (var_a + var_b + c2))


@pytest.mark.parametrize(
    ("side", "window"), [((8, 8), 7), ((3, 9), 3), ((11, 12), 11), ((16, 13), 11), ((10, 10), 9)]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_is_that_of_the_paper(side, window, channels):
    truth, guess = (4 * samples(seed, 3, *side, channels) for seed in (0, 1))
    expected = [
        np.mean(
            [
                reference_ssim(guess[i, ..., c], truth[i, ..., c], 4.0, window)
                for c in range(channels)
            ]
        )
        for i in range(3)
    ]
    values = metrics.ssim(guess, truth, data_range=4.0)
    np.testing.assert_allclose(values, expected, atol=1e-4)
    np.testing.assert_allclose(metrics.ssim(truth, truth, data_range=4.0), np.ones(3), atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 2, 8, 1), (2, 8, 2, 1), (2, 8, 8), (2, 8)])
def test_ssim_refuses_what_is_no_image(shape):
    with pytest.raises(ValueError, match=r"ssim needs images \[B, H, W, C\]"):
        metrics.ssim(samples(0, *shape), samples(1, *shape), data_range=1.0)


def test_feature_distance_is_the_distance_of_features():
    truth, guess = samples(0, 3, 4, 4, 1), samples(1, 3, 4, 4, 1)
    np.testing.assert_allclose(
        metrics.feature_distance(lambda x: x, guess, truth), metrics.mse(guess, truth)
    )
    doubled = metrics.feature_distance(lambda x: 2 * x.reshape(3, -1), guess, truth)
    np.testing.assert_allclose(doubled, 4 * metrics.mse(guess, truth), rtol=1e-6)
    # Features that do not see a difference report none.
    blind = metrics.feature_distance(lambda x: jnp.zeros((3, 2)), guess, truth)
    np.testing.assert_array_equal(blind, np.zeros(3))


def test_exact_match_rate_counts_whole_samples():
    truth = jnp.zeros((4, 3))
    guess = truth.at[0, 1].set(0.5).at[1, 0].set(-0.25).at[2, 2].set(jnp.nan)
    assert metrics.exact_match_rate(guess, truth, 0.25) == 0.5
    assert metrics.exact_match_rate(guess, truth, 0.1) == 0.25
    assert metrics.exact_match_rate(guess, truth, 1.0) == 0.75


@examples
@hypothesis.given(SEEDS, st.sampled_from([(1, 4), (6, 4), (6, 2, 2, 1)]))
def test_nearest_neighbor_is_the_least_distance(seed, shape):
    guess, pool = samples(seed, *shape), samples(seed + 1, 9, *shape[1:])
    index, distance = jax.jit(metrics.nearest_neighbor)(guess, pool)
    pairs = guess.reshape(len(guess), 1, -1).astype(np.float64) - pool.reshape(1, 9, -1)
    expected = np.square(pairs).mean(axis=-1)
    np.testing.assert_array_equal(index, expected.argmin(axis=1))
    np.testing.assert_allclose(distance, expected.min(axis=1), rtol=1e-5)


def test_nearest_neighbor_finds_the_very_sample_and_passes_over_damage():
    pool = samples(0, 5, 3)
    index, distance = metrics.nearest_neighbor(pool[[4, 2]], pool)
    np.testing.assert_array_equal(index, [4, 2])
    np.testing.assert_array_equal(distance, [0, 0])
    damaged = pool.copy()
    damaged[0] = np.nan
    np.testing.assert_array_equal(metrics.nearest_neighbor(pool[[4]], damaged)[0], [4])


# Labels.


LABELS = st.sampled_from([1, 4, 7]).flatmap(
    lambda size: st.tuples(
        *(st.lists(st.integers(-1, 4), min_size=size, max_size=size) for _ in range(2))
    )
)


@examples
@hypothesis.given(LABELS)
def test_label_accuracies_are_counts(pair):
    labels, truth = map(np.array, pair)
    np.testing.assert_allclose(metrics.label_accuracy(labels, truth), np.mean(labels == truth))
    overlap = sum(min((labels == c).sum(), (truth == c).sum()) for c in range(-1, 5))
    np.testing.assert_allclose(metrics.label_set_accuracy(labels, truth), overlap / len(truth))


def test_label_set_accuracy_does_not_see_the_order():
    truth = jnp.array([3, 1, 1, 2])
    assert metrics.label_set_accuracy(truth[::-1], truth) == 1
    assert metrics.label_accuracy(truth[::-1], truth) == 0.5
    assert metrics.label_set_accuracy(jnp.array([1, 1, 1, 1]), truth) == 0.5


@pytest.mark.parametrize("metric", [metrics.label_accuracy, metrics.label_set_accuracy])
def test_labels_of_other_shapes_are_refused(metric):
    for labels, truth in [((3,), (4,)), ((3, 1), (3, 1)), ((0,), (0,)), ((), ())]:
        with pytest.raises(ValueError, match=r"labels and truth must have one shape \[B\]"):
            metric(np.zeros(labels, int), np.zeros(truth, int))


# Baselines.


def test_baselines_are_the_metrics_of_the_guesses():
    truth = 3 * samples(0, 4, 8, 8, 1) - 1
    mean_image = samples(1, 8, 8, 1)
    decibels = metrics.baselines(truth, mean_image, input_range=(-1.0, 2.0))
    errors = metrics.baselines(truth, mean_image, input_range=(-1.0, 2.0), metric="mse")
    np.testing.assert_allclose(
        errors["grey"], np.square(truth - 0.5).mean(axis=(1, 2, 3)), rtol=1e-5
    )
    np.testing.assert_allclose(
        errors["mean"], np.square(truth - mean_image).mean(axis=(1, 2, 3)), rtol=1e-5
    )
    assert set(decibels) == set(errors) == {"grey", "mean"}
    for name, error in errors.items():
        np.testing.assert_allclose(decibels[name], 10 * np.log10(9 / error), rtol=1e-5)


def test_the_mean_image_is_the_best_constant_guess():
    truth = samples(0, 50, 6)
    errors = metrics.baselines(truth, truth.mean(axis=0), input_range=(0.0, 1.0), metric="mse")
    assert errors["mean"].mean() < errors["grey"].mean()


def test_baselines_refuse_what_does_not_fit():
    truth = samples(0, 2, 8, 8, 3)
    with pytest.raises(
        ValueError, match=r"mean_image must have the shape \(8, 8, 3\).*\(8, 8, 1\)"
    ):
        metrics.baselines(truth, truth[0, ..., :1], input_range=(0.0, 1.0))
    with pytest.raises(ValueError, match="metric must be 'psnr' or 'mse', got 'ssim'"):
        metrics.baselines(truth, truth[0], input_range=(0.0, 1.0), metric="ssim")
    with pytest.raises(ValueError, match="width of input_range must be one positive number"):
        metrics.baselines(truth, truth[0], input_range=(1.0, 1.0))
    with pytest.raises(ValueError, match="input_range must be two numbers"):
        metrics.baselines(truth, truth[0], input_range=(0.0, (1.0, 2.0, 3.0)))


# Transformations and errors.


BATCHED = {
    "match": metrics.match,
    "mse": metrics.mse,
    "psnr": lambda a, b: metrics.psnr(a, b, data_range=1.0),
    "ssim": lambda a, b: metrics.ssim(a, b, data_range=1.0),
    "exact_match_rate": lambda a, b: metrics.exact_match_rate(a, b, 0.5),
    "nearest_neighbor": metrics.nearest_neighbor,
    "feature_distance": lambda a, b: metrics.feature_distance(jnp.sin, a, b),
    "baselines": lambda a, b: metrics.baselines(a, b[0], input_range=(0.0, 1.0)),
}


@pytest.mark.parametrize("name", BATCHED)
def test_metrics_of_many_victims_are_those_of_each(name):
    guesses, truths = samples(0, 3, 4, 8, 8, 1), samples(1, 3, 4, 8, 8, 1)
    metric = BATCHED[name]
    together = jax.jit(jax.vmap(metric))(guesses, truths)
    each = [metric(guess, truth) for guess, truth in zip(guesses, truths, strict=True)]
    jax.tree.map(
        lambda all_, *one: np.testing.assert_allclose(all_, np.stack(one), rtol=1e-5, atol=1e-6),
        together,
        *each,
    )


def test_label_metrics_of_many_victims_are_those_of_each():
    labels, truths = np.random.default_rng(0).integers(0, 3, (2, 5, 6))
    for metric in (metrics.label_accuracy, metrics.label_set_accuracy):
        together = jax.jit(jax.vmap(metric))(labels, truths)
        np.testing.assert_allclose(together, [metric(*p) for p in zip(labels, truths, strict=True)])


def test_the_range_may_be_traced():
    truth, guess = samples(0, 2, 5), samples(1, 2, 5)
    traced = jax.jit(lambda r: metrics.psnr(guess, truth, data_range=r))(2.0)
    np.testing.assert_allclose(traced, metrics.psnr(guess, truth, data_range=2.0), rtol=1e-6)


@pytest.mark.parametrize("name", sorted(set(BATCHED) - {"nearest_neighbor", "baselines"}))
@pytest.mark.parametrize(
    "shapes", [((2, 3), (3, 3)), ((2, 3), (2, 4)), ((3,), (3,)), ((0, 3),) * 2]
)
def test_shapes_that_do_not_fit_are_refused(name, shapes):
    with pytest.raises(
        ValueError, match=r"reconstruction and truth must have one shape \[B, ...\]"
    ):
        BATCHED[name](*(np.zeros(shape, np.float32) for shape in shapes))


@pytest.mark.parametrize("name", BATCHED)
def test_integers_are_refused(name):
    with pytest.raises(TypeError, match=r"must be floats, got uint8"):
        BATCHED[name](np.zeros((2, 8, 8, 1), np.uint8), samples(0, 2, 8, 8, 1))


@pytest.mark.parametrize("shapes", [((2, 3), (5, 4)), ((2, 3), (0, 3)), ((0, 3), (5, 3))])
def test_a_pool_that_does_not_fit_is_refused(shapes):
    with pytest.raises(ValueError, match=r"samples of one shape"):
        metrics.nearest_neighbor(*(np.zeros(shape, np.float32) for shape in shapes))


@pytest.mark.parametrize("data_range", [0.0, -1, np.float32(0), np.nan, np.inf, np.ones(2)])
@pytest.mark.parametrize("metric", [metrics.psnr, metrics.ssim])
def test_a_range_that_is_not_positive_is_refused(metric, data_range):
    with pytest.raises(ValueError, match="data_range must be one positive number"):
        metric(samples(0, 2, 8, 8, 1), samples(1, 2, 8, 8, 1), data_range=data_range)
