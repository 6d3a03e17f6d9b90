"""idx: what is written comes back, real files, and damage of every kind."""

import gzip

import numpy as np
import pytest
from written import check, idx_bytes, pixels

from invjax import datasets
from invjax.datasets import DatasetError


@pytest.fixture
def idx_files(tmp_path):
    raw, labels = pixels(5, 4, 3), np.array([1, 0, 2, 2, 1], np.uint8)
    images = tmp_path / "images"
    images.write_bytes(idx_bytes(raw))
    (tmp_path / "labels.gz").write_bytes(gzip.compress(idx_bytes(labels)))
    return images, tmp_path / "labels.gz", raw, labels


def test_idx_reads_plain_and_gzipped_files(idx_files):
    images, labels, raw, classes = idx_files
    dataset = datasets.idx(images, str(labels), name="mine")
    check(dataset, raw[..., None], classes)
    assert dataset.name == "mine"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "begins with 00000803, found an empty file"),
        (b"\x00\x00\x08", "begins with 00000803, found 000008"),
        (b"PNG and so on", "begins with 00000803, found 504e4720"),
        (idx_bytes(np.zeros(4, np.uint8)), "begins with 00000803, found 00000801"),
        (b"\x00\x00\x0d\x03" + bytes(12), "begins with 00000803, found 00000d03"),
        (b"\x00\x00\x08\x03\x00", "its header needs 16 bytes, found 5"),
        (idx_bytes(pixels(2, 2, 2))[:-1], r"shape \(2, 2, 2\) needs 8 bytes, found 7"),
        (idx_bytes(pixels(2, 2, 2)) + b"x", r"needs 8 bytes, found 9"),
        (b"\x00\x00\x08\x03" + b"\xff" * 12, r"needs 79228162458924105385300197375 bytes, found 0"),
        (gzip.compress(idx_bytes(pixels(2, 2, 2)), mtime=0)[:-9], "cannot be read"),
        (b"\x1f\x8bnonsense", "cannot be read"),
        (idx_bytes(np.zeros((0, 2, 2), np.uint8)), "but .* holds 0 images"),
        (idx_bytes(pixels(2, 2, 2)), "5 labels, but .*images holds 2 images"),
    ],
)
def test_damaged_idx_files_are_refused(idx_files, content, message):
    images, labels, _, _ = idx_files
    images.write_bytes(content)
    with pytest.raises(DatasetError, match=message) as caught:
        datasets.idx(images, labels)
    assert str(images) in str(caught.value)


def test_empty_and_missing_idx_files_are_refused(idx_files, tmp_path):
    images, labels, _, _ = idx_files
    with pytest.raises(DatasetError, match="nowhere: cannot be read"):
        datasets.idx(tmp_path / "nowhere", labels)
    images.write_bytes(idx_bytes(np.zeros((0, 2, 2), np.uint8)))
    labels.write_bytes(idx_bytes(np.zeros(0, np.uint8)))
    with pytest.raises(DatasetError, match=r"images: inputs must be .* not empty"):
        datasets.idx(images, labels)


def test_real_idx_equals_real_npz(data_dir):
    folder = data_dir / "raw" / "MNIST" / "raw"
    files = [folder / f"t10k-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    from_idx, from_npz = datasets.idx(*files), datasets.npz(data_dir / "mnist.npz")
    assert from_npz.inputs.shape == (10000, 28, 28, 1)
    np.testing.assert_array_equal(from_idx.inputs, from_npz.inputs)
    np.testing.assert_array_equal(from_idx.labels, from_npz.labels)
    assert from_npz.labels[:5].tolist() == [7, 2, 1, 0, 4]
