"""CIFAR-10: both versions come back, malicious pickles do nothing, and damage of every kind."""

import os
import pickle
import struct

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from written import check, fuzz, pixels

from invjax import datasets
from invjax.datasets import DatasetError

# Binary version.


def cifar_records(count, seed=0):
    raw = pixels(count, 32, 32, 3, seed=seed)
    labels = np.random.default_rng(seed).integers(0, 10, count, dtype=np.uint8)
    return raw, labels, np.ascontiguousarray(raw.transpose(0, 3, 1, 2)).reshape(count, 3072)


def write_binary(path, count=3, seed=0):
    raw, labels, planes = cifar_records(count, seed)
    path.write_bytes(np.concatenate([labels[:, None], planes], axis=1).tobytes())
    return raw, labels


def test_cifar_binary_reads_a_file_and_folders(tmp_path):
    raw, labels = write_binary(tmp_path / "test_batch.bin")
    for path in (tmp_path, tmp_path / "test_batch.bin"):
        dataset = datasets.cifar10_binary(path)
        check(dataset, raw, labels)
        assert dataset.class_names[3] == "cat"
    parts = [write_binary(tmp_path / f"data_batch_{i}.bin", seed=i) for i in range(1, 6)]
    train = datasets.cifar10_binary(tmp_path, "train")
    check(train, *(np.concatenate(side) for side in zip(*parts, strict=True)))


def test_a_training_split_is_whole_or_refused(tmp_path):
    for batch in (1, 2, 4):
        write_binary(tmp_path / f"data_batch_{batch}.bin")
    with pytest.raises(DatasetError, match=r"data_batch_3.bin, data_batch_5.bin not found"):
        datasets.cifar10_binary(tmp_path, "train")
    with pytest.raises(DatasetError, match="holds no CIFAR-10 batches of the test split"):
        datasets.cifar10_binary(tmp_path, "test")
    with pytest.raises(DatasetError, match="holds no CIFAR-10 batches of the train split"):
        datasets.cifar10_python(tmp_path, "train")


@pytest.mark.parametrize("size", [0, 1, 3072, 3 * 3073 - 1])
def test_broken_records_are_refused(tmp_path, size):
    path = tmp_path / "test_batch.bin"
    path.write_bytes(bytes(size))
    with pytest.raises(DatasetError, match=rf"test_batch.bin: .*3073.* {size} bytes are not whole"):
        datasets.cifar10_binary(path)


def test_labels_over_nine_are_refused(tmp_path):
    path = tmp_path / "test_batch.bin"
    path.write_bytes(b"\x0a" + bytes(3072))
    with pytest.raises(DatasetError, match=r"test_batch.bin: labels .* 0 to 9, found 10 to 10"):
        datasets.cifar10_binary(path)


def test_missing_batches_are_refused(tmp_path):
    for read in (datasets.cifar10_binary, datasets.cifar10_python):
        with pytest.raises(DatasetError, match="nowhere: cannot be read"):
            read(tmp_path / "nowhere")


# Python version.


PLANES = pixels(2, 3072)


def python2_pickle(planes, labels):
    """The bytes that Python 2 and NumPy 1 wrote: strings without a type, the old module names."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    def long_text(value):
        return b"T" + struct.pack("<i", len(value)) + value

    rows = struct.pack("<i", len(planes))
    dtype = (
        b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )  # fmt: skip
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + text(b"b")
        + b"tR(K\x01J" + rows + b"M\x00\x0c\x86" + dtype + b"\x89" + long_text(planes.tobytes())
        + b"tb"
    )  # fmt: skip
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + numbers + b"u."


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("keys", [str, str.encode])
@pytest.mark.parametrize("old_numpy", [False, True])
def test_cifar_python_reads_every_protocol(tmp_path, protocol, keys, old_numpy):
    raw, labels, planes = cifar_records(3)
    batch = {keys("data"): planes, keys("labels"): labels.tolist(), keys("batch_label"): b"testing"}
    content = pickle.dumps(batch, protocol=protocol)
    if old_numpy and protocol < 4:
        # Protocols from 4 on write the length of names, which a substitution would break.
        content = content.replace(b"numpy._core", b"numpy.core")
    (tmp_path / "test_batch").write_bytes(content)
    check(datasets.cifar10_python(tmp_path), raw, labels)


def test_cifar_python_reads_what_python_2_wrote(tmp_path):
    raw, labels, planes = cifar_records(3)
    path = tmp_path / "test_batch"
    path.write_bytes(python2_pickle(planes, labels))
    check(datasets.cifar10_python(path), raw, labels)


class Malicious:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("function", [os.system, eval])
def test_a_malicious_pickle_is_refused_and_nothing_runs(tmp_path, protocol, function):
    canary = tmp_path / "canary"
    command = {os.system: f"touch {canary}", eval: f"open({str(canary)!r}, 'w').close()"}[function]
    batch = {"data": Malicious(function, command), "labels": [0]}
    content = pickle.dumps(batch, protocol=protocol)
    # It works where nothing is refused.
    pickle.loads(content)
    assert canary.exists()
    canary.unlink()
    path = tmp_path / "test_batch"
    path.write_bytes(content)
    module = "(posix|nt)" if function is os.system else "(builtins|__builtin__)"
    expected = rf"test_batch: the pickle asks for {module}\.{function.__name__}, which is refused"
    with pytest.raises(DatasetError, match=expected):
        datasets.cifar10_python(path)
    assert not canary.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cnumpy\nndarray.tofile\n.",
        b"\x80\x04\x8c\x05numpy\x94\x8c\x0endarray.tofile\x94\x93.",
        b"cnumpy.core.multiarray\nscalar\n.",
        b"cnumpy.testing\nrundocs\n.",
        b"cposix\nsystem\n.",
        b"c_codecs\ndecode\n.",
        b"cbuiltins\ngetattr\n.",
        b"c__builtin__\ngetattr\n.",
        b"cnumpy\nfromfile\n.",
        b"cnumpy\nload\n.",
    ],
)
def test_only_the_named_globals_are_admitted(tmp_path, content):
    path = tmp_path / "test_batch"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match="which is refused"):
        datasets.cifar10_python(path)


def test_no_codec_but_latin1_is_reachable(tmp_path):
    path = tmp_path / "test_batch"
    path.write_bytes(b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.")
    with pytest.raises(DatasetError, match=r"test_batch: .*codec 'rot13', which is refused"):
        datasets.cifar10_python(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # A memo of four billion entries, and a bytearray of a petabyte.
        (b"\x80\x04]r\xff\xff\xff\xff.", "numbers 4294967295 objects, and has 2 so far"),
        (b"\x80\x05\x96" + struct.pack("<Q", 2**50) + b"abc.", "expected 1125899906842624 bytes"),
    ],
)
def test_sizes_are_held_against_the_length(tmp_path, content, message):
    path = tmp_path / "test_batch"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=f"test_batch: .*{message}"):
        datasets.cifar10_python(path)


@pytest.mark.parametrize(
    "dtype", [b"O", b"u1,u1", b"V8", b"S4", b"c8", b"M8", b"m8", b"u3", b"(2,)u1", b"f16"]
)
def test_arrays_of_anything_but_numbers_are_refused(tmp_path, dtype):
    content = python2_pickle(PLANES, [0, 1])
    assert content.count(b"U\x02u1") == 1
    path = tmp_path / "test_batch"
    path.write_bytes(content.replace(b"U\x02u1", b"U" + bytes([len(dtype)]) + dtype))
    with pytest.raises(DatasetError, match=r"test_batch: the pickle holds an array of .* refused"):
        datasets.cifar10_python(path)


def test_a_pickle_cannot_reach_numpy(tmp_path):
    # States that NumPy's own dtype would take over, for all arrays of the process.
    hostile = python2_pickle(PLANES, [0, 1]).replace(b"u1K\x00K\x01", b"u1K\x00K\x00")
    hostile = hostile.replace(b"\xff\xff\xff\xffK\x00tb", b"\xff\xff\xff\xffK\x3ftb")
    path = tmp_path / "test_batch"
    path.write_bytes(hostile)
    assert len(datasets.cifar10_python(path)) == 2
    assert np.dtype("u1").flags == 0


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([1, 2], "a CIFAR-10 batch is a dict, found a list"),
        ({"labels": [0, 1]}, "data must be an array of bytes"),
        ({"data": PLANES.astype(float), "labels": [0, 1]}, "data must be an array of bytes"),
        ({"data": PLANES.tolist(), "labels": [0, 1]}, "data must be an array of bytes"),
        ({"data": PLANES.astype(object), "labels": [0, 1]}, "the pickle holds an array of '|O8'"),
        ({"data": PLANES.astype("S1"), "labels": [0, 1]}, "the pickle holds an array of"),
        ({"data": PLANES[0], "labels": [0]}, r"data must be .* found \(3072,\)"),
        ({"data": PLANES[:, 1:], "labels": [0, 1]}, r"data must be .* found \(2, 3071\)"),
        ({"data": PLANES[:0], "labels": []}, r"data must be .* found \(0, 3072\)"),
        ({"data": PLANES}, "labels must be a list of 2 integers"),
        ({"data": PLANES, "labels": [0]}, "labels must be a list of 2 integers"),
        ({"data": PLANES, "labels": [0, 1.5]}, "labels must be integers, found other values"),
        ({"data": PLANES, "labels": [0, 10]}, "labels must be integers from 0 to 9, found 0 to 10"),
        ({"data": PLANES, "labels": [0, -1]}, "labels must be integers from 0 to 9, found -1 to 0"),
        ({"data": PLANES, "labels": [0, 2**70]}, "labels must be integers from 0 to 9"),
    ],
)
def test_pickles_that_are_no_batch_are_refused(tmp_path, batch, message):
    path = tmp_path / "test_batch"
    path.write_bytes(pickle.dumps(batch))
    with pytest.raises(DatasetError, match=f"test_batch: {message}"):
        datasets.cifar10_python(path)


@fuzz
@hypothesis.given(st.data())
def test_damaged_pickles_are_read_or_refused(tmp_path, data):
    _, labels, planes = cifar_records(1)
    content = bytearray(pickle.dumps({"data": planes, "labels": labels.tolist()}, protocol=2))
    # The opcodes are at the ends, the pixels between them.
    place = data.draw(st.integers(-60, 250))
    content[place] = data.draw(st.integers(0, 255))
    path = tmp_path / "test_batch"
    path.write_bytes(content[: data.draw(st.sampled_from([None, -1, 300]))])
    try:
        assert len(datasets.cifar10_python(path)) == 1
    except DatasetError as error:
        assert "test_batch" in str(error)


def test_unknown_splits_are_refused(tmp_path):
    for read in (datasets.cifar10_binary, datasets.cifar10_python):
        with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'validation'"):
            read(tmp_path, "validation")


def test_real_cifar_binary_equals_real_npz(data_dir):
    binary = datasets.cifar10_binary(data_dir / "raw" / "cifar-10-batches-bin")
    whole = datasets.npz(data_dir / "cifar10.npz")
    assert len(binary) == 500
    np.testing.assert_array_equal(binary.inputs, whole.inputs[:500])
    np.testing.assert_array_equal(binary.labels, whole.labels[:500])
    assert binary.class_names == whole.class_names
