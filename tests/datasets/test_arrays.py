"""npz: what is written comes back, real files, and damage of every kind."""

import io
import pickle
import zipfile

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from written import check, fuzz, pixels

from invjax import datasets
from invjax.datasets import DatasetError


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_reads_the_split_and_adds_the_channel(tmp_path, save):
    path = tmp_path / "things.npz"
    train, test = pixels(4, 3, 2), pixels(2, 3, 2, seed=1)
    names = np.array(["a", "b", "c"])
    labels = np.array([2, 0, 1, 1], np.uint8)
    save(path, x_train=train, y_train=labels, x_test=test, y_test=[0, 1], label_names=names)
    dataset = datasets.npz(path, "train")
    check(dataset, train[..., None], labels)
    assert dataset.name == "things"
    assert dataset.class_names == ("a", "b", "c")
    check(datasets.npz(str(path)), test[..., None], [0, 1])


@pytest.mark.parametrize("keys", [("x", "y"), ("inputs", "labels")])
def test_npz_without_a_split_serves_either(tmp_path, keys):
    path = tmp_path / "vectors.npz"
    values = np.asfortranarray(np.random.default_rng(0).normal(size=(5, 3)))
    np.savez(path, **dict(zip(keys, (values, np.array([0, 1, 0, 1, 1])), strict=True)))
    for split in ("train", "test"):
        np.testing.assert_allclose(datasets.npz(path, split).inputs, values, rtol=1e-6)


def test_names_may_be_bytes(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, x=pixels(2, 2), y=[0, 1], label_names=np.array([b"cat", b"dog"]))
    assert datasets.npz(path).class_names == ("cat", "dog")


def npz_with(path, **members):
    """An archive whose members are given as raw bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        for key, content in members.items():
            archive.writestr(f"{key}.npy", content)


def npy_bytes(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def lying_header(shape):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    return buffer.getvalue() + bytes(4)


LABELS = npy_bytes(np.array([0, 1]))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, "needs arrays x_test and y_test .*found none"),
        ({"x_train": LABELS, "y_train": LABELS}, "found x_train, y_train"),
        ({"x": lying_header((1 << 60,)), "y": LABELS}, "array x .* needs 1152921504606846976 "),
        ({"x": lying_header((2,)), "y": LABELS}, "array x .* needs 2 bytes, found 4"),
        ({"x": npy_bytes(pixels(2, 2))[:-1], "y": LABELS}, "array x .* needs 4 bytes, found 3"),
        ({"x": b"", "y": LABELS}, "cannot be read as npz"),
        ({"x": b"\x93NUMPY\x09\x00" + bytes(80), "y": LABELS}, r"npy version \(9, 0\)"),
        ({"x": npy_bytes(np.array([{}, {}], object)), "y": LABELS}, "holds pickled objects"),
        ({"x": npy_bytes(pixels(3, 2)), "y": LABELS}, "3 inputs, but labels of shape"),
        (
            {"x": npy_bytes(pixels(2, 2)), "y": LABELS, "label_names": npy_bytes(np.array(["a"]))},
            "label 1 is out of range for 1 classes",
        ),
        (
            {"x": LABELS, "y": LABELS, "label_names": npy_bytes(np.array([b"\xff"]))},
            "cannot be read as npz",
        ),
    ],
)  # fmt: skip
def test_damaged_npz_files_are_refused(tmp_path, members, message):
    path = tmp_path / "some.npz"
    npz_with(path, **members)
    with pytest.raises(DatasetError, match=rf"some.npz: .*{message}"):
        datasets.npz(path)


@pytest.mark.parametrize("content", [b"", b"text", LABELS, pickle.dumps([1])])
def test_what_is_no_archive_is_refused(tmp_path, content):
    path = tmp_path / "some.npz"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"some.npz: cannot be read as npz: File is not a zip"):
        datasets.npz(path)
    with pytest.raises(DatasetError, match=r"nowhere.npz: cannot be read"):
        datasets.npz(tmp_path / "nowhere.npz")


@fuzz
@hypothesis.given(st.data())
def test_damaged_archives_are_read_or_refused(tmp_path, data):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, x=pixels(2, 3), y=np.array([0, 1]))
    content = bytearray(buffer.getvalue())
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "some.npz"
    path.write_bytes(content[: data.draw(st.sampled_from([None, -1, 100]))])
    try:
        assert len(datasets.npz(path)) == 2
    except DatasetError as error:
        assert "some.npz" in str(error)


def test_unknown_splits_are_refused(tmp_path):
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'validation'"):
        datasets.npz(tmp_path, "validation")


def test_mnist_has_its_published_moments(data_dir):
    dataset = datasets.npz(data_dir / "mnist.npz", "train")
    np.testing.assert_allclose((dataset.mean, dataset.std), ([0.1307], [0.3081]), atol=1e-4)


def test_real_vectors_normalize_by_feature(data_dir):
    dataset = datasets.normalized(datasets.npz(data_dir / "adult.npz"))
    assert dataset.class_names == ("<=50K", ">50K")
    np.testing.assert_allclose(dataset.inputs.std(axis=0), np.ones(14), atol=1e-3)
