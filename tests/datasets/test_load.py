"""`load`: which file is found under which name, and what is said when none is."""

import gzip
import pickle

import numpy as np
import pytest
from PIL import Image
from written import idx_bytes

from invjax import datasets


def write_idx(folder, mark, split="test", separator="-", zipped=False):
    """A split of as many images as `mark`, so that a test sees which one was read."""
    folder.mkdir(parents=True, exist_ok=True)
    prefix = {"train": "train", "test": "t10k"}[split]
    arrays = {
        f"images{separator}idx3": np.zeros((mark, 2, 2), np.uint8),
        f"labels{separator}idx1": np.zeros(mark, np.uint8),
    }
    for kind, array in arrays.items():
        content = idx_bytes(array)
        path = folder / f"{prefix}-{kind}{separator}ubyte{'.gz' if zipped else ''}"
        path.write_bytes(gzip.compress(content) if zipped else content)


def write_npz(path, mark):
    np.savez(path, x=np.zeros((mark, 2, 2), np.uint8), y=np.zeros(mark, int))


def write_binary(folder, mark, name="test_batch.bin"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(bytes(3073 * mark))


def write_python(folder, mark, name="test_batch"):
    folder.mkdir(parents=True, exist_ok=True)
    batch = {"data": np.zeros((mark, 3072), np.uint8), "labels": [0] * mark}
    (folder / name).write_bytes(pickle.dumps(batch))


def test_digits_need_nothing():
    for split in ("train", "test"):
        assert len(datasets.load("digits", split=split)) == 1797


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("mnist", "."),
        ("mnist", "raw"),
        ("mnist", "mnist"),
        ("mnist", "MNIST/raw"),
        ("fashion_mnist", "FashionMNIST/raw"),
        ("fashion_mnist", "fashion_mnist"),
    ],
)
@pytest.mark.parametrize("separator", "-.")
@pytest.mark.parametrize("zipped", [False, True])
def test_idx_layouts_are_found(tmp_path, name, folder, separator, zipped):
    write_idx(tmp_path / folder, 3, "test", separator, zipped)
    write_idx(tmp_path / folder, 4, "train", separator, zipped)
    for split, mark in (("test", 3), ("train", 4)):
        dataset = datasets.load(name, tmp_path, split)
        assert (len(dataset), dataset.name, dataset.input_shape) == (mark, name, (2, 2, 1))


@pytest.mark.parametrize("folder", [".", "cifar10", "cifar-10-batches-bin"])
def test_cifar_binary_is_found(tmp_path, folder):
    write_binary(tmp_path / folder, 3)
    for batch in range(1, 6):
        write_binary(tmp_path / folder, 1, f"data_batch_{batch}.bin")
    assert len(datasets.load("cifar10", str(tmp_path))) == 3
    assert len(datasets.load("cifar10", tmp_path, "train")) == 5


@pytest.mark.parametrize("folder", [".", "cifar10", "cifar-10-batches-py"])
def test_cifar_python_is_found(tmp_path, folder):
    write_python(tmp_path / folder, 3)
    for batch in range(1, 6):
        write_python(tmp_path / folder, 1, f"data_batch_{batch}")
    assert len(datasets.load("cifar10", tmp_path)) == 3
    assert len(datasets.load("cifar10", tmp_path, "train")) == 5


def test_npz_comes_first_and_names_do_not_mix(tmp_path):
    write_idx(tmp_path / "MNIST" / "raw", 3)
    write_npz(tmp_path / "mnist.npz", 5)
    write_idx(tmp_path / "FashionMNIST" / "raw", 4)
    assert len(datasets.load("mnist", tmp_path)) == 5
    assert len(datasets.load("fashion_mnist", tmp_path)) == 4


def test_the_binary_version_comes_before_the_python_version(tmp_path):
    write_binary(tmp_path, 3)
    write_python(tmp_path, 4)
    assert len(datasets.load("cifar10", tmp_path)) == 3


def test_paths_are_read(tmp_path):
    write_npz(tmp_path / "own.npz", 4)
    dataset = datasets.load(str(tmp_path / "own.npz"))
    assert (len(dataset), dataset.name) == (4, "own")
    assert len(datasets.load(tmp_path / "own.npz", split="train")) == 4


def test_folders_are_read_in_their_layout(tmp_path):
    write_idx(tmp_path / "letters", 3)
    write_binary(tmp_path / "binary", 4)
    write_python(tmp_path / "python", 5)
    dataset = datasets.load(tmp_path / "letters")
    assert (len(dataset), dataset.name) == (3, "letters")
    assert len(datasets.load(tmp_path / "binary")) == 4
    assert len(datasets.load(tmp_path / "python")) == 5


def test_image_folders_are_read_by_split_where_they_have_one(tmp_path):
    for folder, count in (("train/cat", 2), ("train/dog", 1), ("test/cat", 1), ("test/dog", 1)):
        (tmp_path / folder).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (4, 4)).save(tmp_path / folder / f"{index}.png")
    for split, size in (("train", 3), ("test", 2)):
        dataset = datasets.load(str(tmp_path), split=split)
        assert (len(dataset), dataset.class_names) == (size, ("cat", "dog"))
        assert dataset.name == tmp_path.name
    assert datasets.load(tmp_path / "test").class_names == ("cat", "dog")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("mnst", "mnist"),
        ("FashionMNIST", "fashion_mnist"),
        ("CIFAR-10", "cifar10"),
        ("digit", "digits"),
    ],
)
def test_unknown_names_get_the_nearest(name, near):
    with pytest.raises(
        ValueError,
        match=rf"Unknown data set '{name}': known are digits, mnist, fashion_mnist, cifar10, .*"
        rf"Did you mean '{near}'\?",
    ):
        datasets.load(name)


def test_names_like_no_other_get_no_hint(tmp_path):
    with pytest.raises(ValueError, match=r"Unknown data set .*and there is none\.$"):
        datasets.load(str(tmp_path / "qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqq"))


def test_missing_files_say_what_was_looked_for(tmp_path):
    with pytest.raises(ValueError, match="'mnist' is read from files: give data_dir"):
        datasets.load("mnist")
    with pytest.raises(datasets.DatasetError, match=r"nowhere: expected the folder of mnist"):
        datasets.load("mnist", tmp_path / "nowhere")
    with pytest.raises(
        datasets.DatasetError, match=r"expected mnist.npz or idx files of the train split .*MNIST"
    ):
        datasets.load("mnist", tmp_path, "train")
    with pytest.raises(datasets.DatasetError, match=r"expected cifar10.npz or CIFAR-10 batches"):
        datasets.load("cifar10", tmp_path)
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'all'"):
        datasets.load("digits", split="all")


def test_images_without_their_labels_are_not_found(tmp_path):
    write_idx(tmp_path, 3)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(datasets.DatasetError, match="idx files of the test split"):
        datasets.load("mnist", tmp_path)


def test_real_folders(data_dir):
    assert len(datasets.load("mnist", data_dir)) == 10000
    assert len(datasets.load("mnist", data_dir / "raw")) == 10000
    assert len(datasets.load("fashion_mnist", data_dir)) == 500
    assert datasets.load("fashion_mnist", data_dir).class_names[9] == "Ankle boot"
    assert len(datasets.load("cifar10", data_dir)) == 1000
    assert len(datasets.load("cifar10", data_dir / "raw")) == 500
