"""The data set value: construction, normalisation, draws."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from invjax import datasets
from invjax.base import Batch

examples = hypothesis.settings(max_examples=25, deadline=None, derandomize=True, database=None)
SHAPES = st.sampled_from([(6, 4), (5, 3, 2), (5, 3, 2, 1), (7, 4, 4, 3)])


def images(seed=0, shape=(6, 4, 4, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def build(inputs, labels=None, **kwargs):
    labels = np.arange(len(inputs)) % 3 if labels is None else labels
    return datasets.from_arrays("some", inputs, labels, **kwargs)


# Construction.


@examples
@hypothesis.given(st.integers(0, 2**32 - 1), SHAPES, st.sampled_from(["uint8", "float64"]))
def test_moments_are_those_of_the_raw_data(seed, shape, dtype):
    raw = images(seed, shape)
    raw = raw if dtype == "uint8" else raw / 255
    dataset = build(raw)
    values = raw / 255 if dtype == "uint8" else raw
    values = values[..., None] if values.ndim == 3 else values
    np.testing.assert_allclose(dataset.inputs, values, atol=1e-6)
    axes = tuple(range(values.ndim - 1))
    np.testing.assert_allclose(dataset.mean, values.mean(axis=axes), atol=1e-6)
    np.testing.assert_allclose(dataset.std, values.std(axis=axes), atol=1e-6)
    assert dataset.input_shape == values.shape[1:]
    assert (dataset.inputs.dtype, dataset.labels.dtype) == (np.float32, np.int32)
    assert dataset.input_range == (0.0, 1.0)
    assert dataset.num_classes == 3
    assert dataset.class_names == ("0", "1", "2")
    assert len(dataset) == len(raw)


def test_large_means_do_not_swamp_the_deviation():
    column = 1e5 + np.random.default_rng(0).normal(size=(1000, 1))
    np.testing.assert_allclose(
        build(column).std, column.astype(np.float32).std(dtype=np.float64), rtol=1e-3
    )


def test_the_range_covers_the_data():
    assert build(images() / 127.5 - 1).input_range[0] < 0
    assert build(np.float32([[[[-1.0]]], [[[0.5]]]])).input_range == (-1.0, 1.0)
    assert build(np.float32([[[[0.0]]], [[[255.0]]]])).input_range == (0.0, 255.0)
    assert build(np.float32([[0.2], [0.5]])).input_range == (0.0, 1.0)


def test_vectors_with_units_have_a_range_a_feature():
    dataset = build(np.float32([[-1, 300, 7], [2, 100, 7]]))
    # A constant feature gets an interval of length one.
    assert dataset.input_range == ((-1.0, 100.0, 7.0), (2.0, 300.0, 8.0))


def test_class_names_and_column_labels():
    dataset = build(images(), np.full((6, 1), 1), class_names=("cat", "dog"))
    assert dataset.class_names == ("cat", "dog")
    assert dataset.labels.shape == (6,)


@pytest.mark.parametrize(
    ("inputs", "labels", "message"),
    [
        (np.zeros(3), np.zeros(3, int), r"inputs must be \[N, d\].*got shape \(3,\)"),
        (np.zeros((0, 3)), np.zeros(0, int), r"inputs must be .*not empty"),
        (
            np.zeros((2, 3), complex),
            np.zeros(2, int),
            "inputs must be real numbers, got complex128",
        ),
        (np.array([["a"], ["b"]]), np.zeros(2, int), "inputs must be real numbers, got <U1"),
        (np.zeros((2, 3, 8, 8)), np.zeros(2, int), r"images have their channels last, .*3, 8, 8"),
        (np.zeros((2, 1, 8, 8)), np.zeros(2, int), r"images have their channels last, .*1, 8, 8"),
        (np.zeros((2, 3)), np.zeros(3, int), r"2 inputs, but labels of shape \(3,\)"),
        (np.zeros((2, 3)), np.zeros((2, 2), int), r"2 inputs, but labels of shape \(2, 2\)"),
        (np.zeros((2, 3)), np.zeros(2), "labels must be integers from 0, got float64"),
        (np.zeros((2, 3)), np.array([0, -1]), "labels must be integers from 0, got -1"),
        (np.zeros((2, 3)), np.array([0, 2**40]), "label 1099511627776 is above 65535"),
        (np.array([[0.0], [np.nan]]), np.zeros(2, int), "inputs must be finite"),
        (np.array([[0.0], [1e300]]), np.zeros(2, int), "inputs must be finite"),
    ],
)
def test_arrays_that_make_no_data_set_are_refused(inputs, labels, message):
    with pytest.raises(datasets.DatasetError, match=f"the/file: {message}"):
        build(inputs, labels, source="the/file")
    with pytest.raises(datasets.DatasetError, match=f"some: {message}"):
        build(inputs, labels)


def test_labels_beyond_the_names_are_refused():
    with pytest.raises(datasets.DatasetError, match="label 2 is out of range for 2 classes"):
        build(images(), class_names=("cat", "dog"))
    with pytest.raises(datasets.DatasetError, match="label 2 is out of range for 0 classes"):
        build(images(), class_names=())


# Normalisation.


@examples
@hypothesis.given(st.integers(0, 2**32 - 1), SHAPES)
def test_normalized_has_zero_mean_and_unit_variance_and_an_inverse(seed, shape):
    raw = build(images(seed, shape))
    dataset = datasets.normalized(raw)
    axes = tuple(range(dataset.inputs.ndim - 1))
    np.testing.assert_allclose(dataset.inputs.mean(axis=axes), 0, atol=1e-5)
    np.testing.assert_allclose(dataset.inputs.std(axis=axes), 1, atol=1e-5)
    np.testing.assert_allclose(datasets.denormalize(dataset, dataset.inputs), raw.inputs, atol=1e-6)
    # The same map takes the range: black and white come back as 0 and 1.
    low, high = (np.float32(bound) for bound in dataset.input_range)
    assert (dataset.inputs >= low - 1e-5).all()
    assert (dataset.inputs <= high + 1e-5).all()
    np.testing.assert_allclose(datasets.denormalize(dataset, low), 0, atol=1e-6)
    np.testing.assert_allclose(datasets.denormalize(dataset, high), 1, atol=1e-6)
    np.testing.assert_array_equal(dataset.mean, raw.mean)


def test_normalizing_twice_is_normalizing_once_and_raw_units_stay():
    raw = build(images())
    dataset = datasets.normalized(raw)
    assert datasets.normalized(dataset) is dataset
    assert datasets.denormalize(raw, raw.inputs) is raw.inputs
    assert raw.inputs.min() >= 0


def test_a_constant_channel_becomes_zero():
    inputs = images() / 255
    inputs[..., 1] = 0.3
    dataset = datasets.normalized(build(inputs))
    np.testing.assert_allclose(dataset.inputs[..., 1], 0, atol=1e-6)
    np.testing.assert_allclose(datasets.denormalize(dataset, dataset.inputs), inputs, atol=1e-6)
    assert np.abs(dataset.input_range).max() < 100


def test_denormalize_takes_jax_arrays_under_jit_and_any_leading_axes():
    raw = build(images())
    dataset = datasets.normalized(raw)
    stacked = jnp.asarray(dataset.inputs).reshape(2, 3, 4, 4, 3)
    result = jax.jit(lambda x: datasets.denormalize(dataset, x))(stacked)
    np.testing.assert_allclose(result, raw.inputs.reshape(stacked.shape), atol=1e-6)
    assert result.dtype == jnp.float32


@pytest.mark.parametrize("shape", [(), (3, 4, 4), (5, 1)])
def test_denormalize_refuses_other_channels(shape):
    with pytest.raises(
        ValueError, match="inputs must have 3 channels last, as some has, got shape"
    ):
        datasets.denormalize(datasets.normalized(build(images())), np.zeros(shape))


# Batches.


def test_take_returns_the_samples_on_the_device():
    dataset = build(images())
    batch = datasets.take(dataset, [4, 1])
    assert isinstance(batch, Batch)
    assert all(isinstance(leaf, jax.Array) for leaf in batch)
    assert (batch.inputs.dtype, batch.labels.dtype) == (jnp.float32, jnp.int32)
    np.testing.assert_array_equal(batch.inputs, dataset.inputs[[4, 1]])
    np.testing.assert_array_equal(batch.labels, dataset.labels[[4, 1]])
    assert datasets.take(dataset, jnp.arange(6).reshape(2, 3)).inputs.shape == (2, 3, 4, 4, 3)


@pytest.mark.parametrize("indices", [3, [6], [-1]])
def test_take_refuses_indices_out_of_range(indices):
    with pytest.raises(ValueError, match=r"indices must be \[B\] in \[0, 6\) of some"):
        datasets.take(build(images()), indices)


@pytest.mark.parametrize("indices", [[0.0], [True] * 6])
def test_take_refuses_what_is_no_index(indices):
    with pytest.raises(TypeError, match="indices must be integers, got"):
        datasets.take(build(images()), indices)


def numbered(labels):
    """Every sample's input is its index."""
    return build(np.arange(len(labels), dtype=np.float32)[:, None], np.asarray(labels))


def test_draw_is_reproducible_and_without_replacement(key):
    dataset = numbered([0, 1] * 20)
    first, again = (datasets.draw(key, dataset, 30) for _ in range(2))
    other = datasets.draw(jax.random.key(1), dataset, 30)
    np.testing.assert_array_equal(first.inputs, again.inputs)
    assert not np.array_equal(first.inputs, other.inputs)
    assert len(np.unique(first.inputs)) == 30
    np.testing.assert_array_equal(first.labels, first.inputs[:, 0].astype(int) % 2)
    everything = datasets.draw(key, dataset, 40)
    np.testing.assert_array_equal(np.sort(everything.inputs[:, 0]), np.arange(40))


@examples
@hypothesis.given(st.integers(0, 2**31 - 1), st.integers(1, 4))
def test_draw_with_distinct_labels_repeats_no_class(seed, size):
    dataset = numbered([0, 0, 0, 2, 2, 5, 5, 1])
    batch = datasets.draw(jax.random.key(seed), dataset, size, distinct_labels=True)
    assert len(np.unique(batch.labels)) == size
    np.testing.assert_array_equal(
        batch.labels, dataset.labels[np.asarray(batch.inputs)[:, 0].astype(int)]
    )


def test_draws_reach_every_sample():
    dataset = numbered([0, 0, 1, 1])
    drawn = {
        float(datasets.draw(jax.random.key(seed), dataset, 1, distinct_labels=True).inputs[0, 0])
        for seed in range(40)
    }
    assert drawn == {0.0, 1.0, 2.0, 3.0}


def test_draw_refuses_more_than_there_is(key):
    dataset = numbered([0, 0, 3])
    with pytest.raises(ValueError, match=r"size must lie in \[1, 3\] \(samples of some\), got 4"):
        datasets.draw(key, dataset, 4)
    with pytest.raises(ValueError, match=r"\[1, 2\] \(distinct classes of some\), got 3"):
        datasets.draw(key, dataset, 3, distinct_labels=True)
    with pytest.raises(ValueError, match="got 0"):
        datasets.draw(key, dataset, 0)


def test_data_sets_are_values_by_identity():
    dataset = build(images())
    same = dataset
    assert dataset == same
    assert hash(dataset) == hash(same)
    assert dataset != build(images())
