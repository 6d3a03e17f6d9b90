"""Tables of mixed columns."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from invjax import datasets
from invjax.datasets import tabular
from invjax.datasets.tabular import Categorical, Continuous, Schema

AGE = Continuous("age", mean=40.0, std=10.0, low=20.0, high=70.0)
SMOKER = Categorical("smoker", 2)
BLOOD = Categorical("blood", 4, (0.5, 0.2, 0.3, 0.0))
SCHEMA = Schema((AGE, SMOKER, BLOOD))
TABLE = [[55.0, 1, 2], [20.0, 0, 3], [70.0, 0, 0]]


def random_table(number=500):
    rng = np.random.default_rng(0)
    categories = [
        rng.choice(len(shares), number, p=shares) for shares in ([0.9, 0.1], [0.3] * 3 + [0.1])
    ]
    numbers = rng.normal(size=(2, number)) * [[1e-3], [1e5]] + [[7.0], [2e5]]
    return np.stack([categories[0], numbers[0], categories[1], numbers[1]], axis=1)


COUNTS = [2, None, 4, None]


def test_encoding_by_hand():
    expected = [
        # A number is standardised; a column without frequencies stays one-hot; with them the entry
        # is (indicator - f) / sqrt(f (1 - f)), or only centered where that is 0.
        [1.5, 0, 1, -0.5 / 0.5, -0.2 / 0.4, 0.7 / np.sqrt(0.21), 0],
        [-2.0, 1, 0, -0.5 / 0.5, -0.2 / 0.4, -0.3 / np.sqrt(0.21), 1],
        [3.0, 1, 0, 0.5 / 0.5, -0.2 / 0.4, -0.3 / np.sqrt(0.21), 0],
    ]
    inputs = tabular.encode(SCHEMA, TABLE)
    assert inputs.dtype == np.float32
    np.testing.assert_allclose(inputs, expected, rtol=1e-6)
    assert SCHEMA.width == 7
    assert SCHEMA.slices == (slice(0, 1), slice(1, 3), slice(3, 7))


def test_fitted_schema_standardizes_everything():
    table = random_table()
    schema = tabular.fit_schema(table, COUNTS, ["a", "b", "c", "d"])
    inputs = tabular.encode(schema, table)
    np.testing.assert_allclose(inputs.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(inputs.std(axis=0), 1, rtol=1e-5)
    assert [column.name for column in schema.columns] == ["a", "b", "c", "d"]
    numbers = schema.columns[3]
    assert numbers.mean == pytest.approx(table[:, 3].mean())
    assert (numbers.low, numbers.high) == (table[:, 3].min(), table[:, 3].max())


def test_what_does_not_vary_is_centered_only():
    schema = tabular.fit_schema([[5.0, 1], [5.0, 1]], [None, 3])
    assert schema.columns[0] == Continuous("0", 5.0, 1.0, 5.0, 6.0)
    np.testing.assert_array_equal(tabular.encode(schema, [[5.0, 1]]), [[0, 0, 0, 0]])
    low, high = tabular.input_range(schema)
    assert (np.array(low) < np.array(high)).all()


def test_decode_undoes_encode():
    table = random_table()
    schema = tabular.fit_schema(table, COUNTS)
    back = tabular.decode(schema, jnp.asarray(tabular.encode(schema, table)))
    np.testing.assert_array_equal(back[:, [0, 2]], table[:, [0, 2]])
    # A float32 error of a standardised value is of the size of a deviation.
    errors = np.abs(np.asarray(back)[:, [1, 3]] - table[:, [1, 3]])
    assert (
        errors <= np.maximum(2e-6 * table[:, [1, 3]].std(axis=0), 1e-6 * np.abs(table[:, [1, 3]]))
    ).all()


def test_decode_reads_the_largest_probability_not_the_largest_entry():
    # The rare category's entry is the largest of its slice long before its probability is.
    schema = Schema((Categorical("rare", 2, (0.99, 0.01)),))
    mean, std = tabular.moments(schema)
    inputs = (np.array([[0.6, 0.4]]) - mean) / std
    assert inputs[0, 1] > inputs[0, 0]
    assert tabular.decode(schema, jnp.asarray(inputs)) == 0


def test_decode_under_transformations():
    inputs = jnp.asarray(tabular.encode(SCHEMA, TABLE))
    expected = tabular.decode(SCHEMA, inputs)
    np.testing.assert_allclose(expected, TABLE, rtol=1e-6)
    compiled = jax.jit(chex.assert_max_traces(tabular.decode, n=1))
    for schema in (SCHEMA, Schema(list(SCHEMA.columns))):
        # Static, and equal where its columns are: no second trace.
        np.testing.assert_allclose(compiled(schema, inputs), expected, rtol=1e-6)
    mapped = jax.vmap(lambda row: tabular.decode(SCHEMA, row))(inputs)
    np.testing.assert_allclose(mapped, expected, rtol=1e-6)
    stacked = tabular.decode(SCHEMA, jnp.stack([inputs, inputs]))
    np.testing.assert_allclose(stacked, [expected, expected], rtol=1e-6)


def test_range_is_what_rows_attain():
    table = random_table()
    schema = tabular.fit_schema(table, COUNTS)
    inputs = tabular.encode(schema, table)
    low, high = tabular.input_range(schema)
    np.testing.assert_allclose(inputs.min(axis=0), low, rtol=1e-5)
    np.testing.assert_allclose(inputs.max(axis=0), high, rtol=1e-5)


def test_dataset_of_a_table():
    dataset = tabular.from_table("people", SCHEMA, TABLE, [0, 1, 1], ("no", "yes"))
    assert (dataset.name, dataset.input_shape, dataset.num_classes) == ("people", (7,), 2)
    assert dataset.input_range == tabular.input_range(SCHEMA)
    expected = [[55, 0, 1, 0, 0, 1, 0], [20, 1, 0, 0, 0, 0, 1], [70, 1, 0, 1, 0, 0, 0]]
    np.testing.assert_allclose(datasets.denormalize(dataset, dataset.inputs), expected, atol=1e-5)
    # It is in model units already.
    assert datasets.normalized(dataset) is dataset


SCHEMA_ERRORS = {
    "empty": ((), "must not be empty"),
    "one category": ((Categorical("sex", 1),), "num_categories of 'sex'"),
    "half a category": ((Categorical("sex", 2.5),), "num_categories of 'sex'"),
    "too few frequencies": ((Categorical("sex", 2, (1.0,)),), "frequencies of 'sex' must be 2"),
    "negative frequency": ((Categorical("sex", 2, (1.5, -0.5)),), "frequencies of 'sex'"),
    "frequencies no law": ((Categorical("sex", 2, (0.5, 0.4)),), "sum to 1, got 0.9"),
    "no deviation": ((AGE._replace(std=0.0),), "std of 'age' must be positive"),
    "empty range": ((AGE._replace(low=70.0),), "low of 'age' must be below high"),
    "not finite": ((AGE._replace(mean=np.nan),), "must be finite"),
    "no column": ((("age", 3),), "Categorical or Continuous"),
}


@pytest.mark.parametrize("columns, message", SCHEMA_ERRORS.values(), ids=SCHEMA_ERRORS)
def test_schema_errors(columns, message):
    with pytest.raises(ValueError, match=message):
        Schema(columns)


TABLE_ERRORS = {
    "too few columns": ([[1.0, 2]], r"\[N, 3\] .* got shape \(1, 2\)"),
    "one row": ([1.0, 0, 0], r"got shape \(3,\)"),
    "no rows": (np.zeros((0, 3)), r"got shape \(0, 3\)"),
    "not finite": ([[np.nan, 0, 0]], "finite"),
    "text": ([["a", "b", "c"]], "must hold finite numbers"),
    "code too high": ([[30.0, 2, 0]], r"'smoker' must hold integers in \[0, 1\], got 2"),
    "negative code": ([[30.0, 0, -1]], r"'blood' must hold integers in \[0, 3\], got -1"),
    "half a code": ([[30.0, 0, 1.5]], "'blood' .* got 1.5"),
}


@pytest.mark.parametrize("table, message", TABLE_ERRORS.values(), ids=TABLE_ERRORS)
def test_table_errors(table, message):
    with pytest.raises(ValueError, match=message):
        tabular.encode(SCHEMA, table)
    with pytest.raises(ValueError, match=message):
        tabular.fit_schema(table, [None, 2, 4], ["age", "smoker", "blood"])


def test_other_errors():
    with pytest.raises(ValueError, match=r"7 entries last, .* got shape \(2, 6\)"):
        tabular.decode(SCHEMA, jnp.zeros((2, 6)))
    with pytest.raises(ValueError, match="names must be 2"):
        tabular.fit_schema([[1.0, 1]], [None, 2], ["a"])
    with pytest.raises(ValueError, match="3 inputs, but labels"):
        tabular.from_table("people", SCHEMA, TABLE, [0, 1])


def test_adult(data_dir):
    dataset, schema = tabular.adult(data_dir)
    train, same = tabular.adult(data_dir / "adult.npz", "train")
    assert same == schema
    assert (len(train), len(dataset)) == (30162, 15060)
    assert dataset.input_shape == (schema.width,) == (105,)
    assert dataset.class_names == ("<=50K", ">50K")
    sizes = [getattr(column, "num_categories", 0) for column in schema.columns]
    assert sizes == [0, 8, 0, 16, 0, 7, 14, 6, 5, 2, 0, 0, 0, 41]
    both = np.concatenate([train.inputs, dataset.inputs])
    # Only the category that no complete row has ("Never-worked") does not vary.
    np.testing.assert_allclose(np.sort(both.std(axis=0))[:2], [0, 1], atol=1e-3)
    low, high = (np.array(bound) for bound in dataset.input_range)
    assert (both >= low - 1e-4).all() and (both <= high + 1e-4).all()
    # The first complete row of the published test file.
    row = tabular.decode(schema, jnp.asarray(dataset.inputs[0]))
    expected = [25, 3, 226802, 1, 7, 4, 6, 3, 2, 1, 0, 0, 40, 38]
    np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-2)
    assert np.mean(train.labels) == pytest.approx(7508 / 30162)


@pytest.fixture
def small(tmp_path):
    """Writes `adult.npz` with two columns and some missing categories."""
    arrays = {
        "x_train": np.array([[30.0, 0], [40.0, -1], [50.0, 1]], np.float32),
        "y_train": np.array([0, 1, 1], np.uint8),
        "x_test": np.array([[70.0, 2], [60.0, -1]], np.float32),
        "y_test": np.array([1, 0], np.uint8),
        "feature_names": np.array(["age", "sex"]),
        "is_categorical": np.array([False, True]),
        "categories_sex": np.array(["f", "m", "x"]),
    }

    def write(**changes):
        kept = {name: array for name, array in {**arrays, **changes}.items() if array is not None}
        np.savez(tmp_path / "adult.npz", **kept)
        return tmp_path

    return write


def test_rows_with_a_missing_category_are_dropped(small):
    dataset, schema = tabular.adult(small(), "train")
    table = tabular.decode(schema, jnp.asarray(dataset.inputs))
    np.testing.assert_allclose(table, [[30, 0], [50, 1]], rtol=1e-6)
    np.testing.assert_array_equal(dataset.labels, [0, 1])
    # Of the complete rows of both splits: 30, 50 and 70.
    assert schema.columns[0] == Continuous("age", 50.0, np.std([30, 50, 70]), 30.0, 70.0)
    assert schema.columns[1].frequencies == pytest.approx((1 / 3, 1 / 3, 1 / 3))


ADULT_ERRORS = {
    "no names": ({"feature_names": None}, "feature_names"),
    "no categories": ({"categories_sex": None}, "categories_sex"),
    "unequal": ({"is_categorical": np.array([True])}, "cannot read what its columns are"),
    "other columns": (
        {"feature_names": np.array(["age"]), "is_categorical": np.array([False])},
        "adult.npz: .*[12]",
    ),
    "unknown code": ({"categories_sex": np.array(["f", "m"])}, "adult.npz: column 'sex' .* got 2"),
    "pickled": ({"feature_names": np.array(["age", "sex"], object)}, "adult.npz"),
    "all missing": ({"x_train": np.full((3, 2), -1.0), "x_test": np.full((2, 2), -1.0)}, "N >= 1"),
}


@pytest.mark.parametrize("changes, message", ADULT_ERRORS.values(), ids=ADULT_ERRORS)
def test_adult_errors(small, changes, message):
    with pytest.raises(datasets.DatasetError, match=message):
        tabular.adult(small(**changes))


def test_adult_that_is_not_there(tmp_path):
    with pytest.raises(datasets.DatasetError, match=r"adult\.npz"):
        tabular.adult(tmp_path)
    with pytest.raises(ValueError, match="split must be"):
        tabular.adult(tmp_path, "validation")
