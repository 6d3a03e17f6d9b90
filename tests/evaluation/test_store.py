"""Folders of results: whole or not at all, refused early, and read back as written."""

import errno
import io
import json
import os
import pathlib

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

import invjax
from invjax.evaluation import store

OLD = {"settings.json": b"old", "figures/a.png": b"old picture", "mine.txt": b"keep"}
NEW = {"settings.json": b"new", "figures/a.png": b"new picture", "results.parquet": b"\x00\xff"}


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture
def old(tmp_path):
    """The folder of an earlier run, with a file that is none of ours."""
    for name, content in OLD.items():
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "run"


def test_a_new_folder(tmp_path):
    target = tmp_path / "deep" / "run"
    store.write_folder(target, NEW)
    assert contents(target) == NEW
    assert [path.name for path in target.parent.iterdir()] == ["run"]


def test_an_existing_folder_keeps_its_other_files(old):
    store.write_folder(old, NEW)
    assert contents(old) == {**OLD, **NEW}
    assert [path.name for path in old.parent.iterdir()] == ["run"]


def test_an_empty_folder(tmp_path):
    (tmp_path / "run").mkdir()
    store.write_folder(tmp_path / "run", NEW)
    assert contents(tmp_path) == {f"run/{name}": content for name, content in NEW.items()}


class FullDisk:
    """A call that fails from its `number`-th time on."""

    def __init__(self, call, number):
        self.call, self.left = call, number

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.call(*args, **kwargs)


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("written", [0, 1, 2])
def test_a_write_that_fails_leaves_all_as_it_was(old, monkeypatch, exists, written):
    target = old if exists else old.with_name("new")
    monkeypatch.setattr(store.os, "fsync", FullDisk(os.fsync, written))
    with pytest.raises(OSError, match="No space left"):
        store.write_folder(target, NEW)
    assert contents(old) == OLD
    assert [path.name for path in old.parent.iterdir()] == ["run"]


def test_a_first_rename_that_fails_leaves_all_as_it_was(old, monkeypatch):
    for target in (old, old.with_name("new")):
        monkeypatch.setattr(store.os, "replace", FullDisk(os.replace, 0))
        with pytest.raises(OSError, match="No space left"):
            store.write_folder(target, NEW)
        assert contents(old) == OLD
        assert [path.name for path in old.parent.iterdir()] == ["run"]


def test_every_file_is_synced_before_any_is_in_place(old, monkeypatch):
    events = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(store.os, "fsync", lambda fd: (events.append("sync"), sync(fd)))
    monkeypatch.setattr(store.os, "replace", lambda *a: (events.append("rename"), replace(*a)))
    store.write_folder(old, NEW)
    assert events == ["sync"] * 3 + ["rename"] * 3


def test_check_folder_passes_what_can_be_written(old, tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "new", tmp_path / "very" / "new"):
        store.check_folder(path, overwrite=False)
    store.check_folder(old, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "run"]


@pytest.mark.parametrize("overwrite", [True, False])
def test_check_folder_refuses_a_file(old, overwrite):
    with pytest.raises(store.FolderError, match=r"mine\.txt: is a file"):
        store.check_folder(old / "mine.txt", overwrite)
    with pytest.raises(store.FolderError, match=r"mine\.txt is a file, not a folder"):
        store.check_folder(old / "mine.txt" / "below", overwrite)


def test_check_folder_refuses_what_is_not_empty(old):
    with pytest.raises(store.FolderError, match=r"not empty.*--overwrite"):
        store.check_folder(old, overwrite=False)
    assert issubclass(store.FolderError, ValueError)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_check_folder_refuses_a_read_only_parent(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with pytest.raises(store.FolderError, match="cannot be written to"):
        store.check_folder(closed / "run", overwrite=False)


def test_check_folder_asks_the_nearest_folder_that_exists(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(store.os, "access", lambda *args: asked.append(args))
    with pytest.raises(store.FolderError, match="cannot be written to"):
        store.check_folder(tmp_path / "very" / "new", overwrite=False)
    assert asked == [(tmp_path, os.W_OK)]


def test_parquet_round_trip():
    rows = [
        {"victim": 0, "psnr": 31.25, "found": True, "model": "lenet", "labels": None},
        {"victim": 1, "psnr": float("inf"), "found": False, "model": "mlp(8)", "labels": None},
    ]
    table = pq.read_table(io.BytesIO(store.parquet(rows)))
    assert table.to_pylist() == rows
    kinds = {name: str(table.schema.field(name).type) for name in ("victim", "psnr", "found")}
    assert kinds == {"victim": "int64", "psnr": "double", "found": "bool"}


def test_npz_round_trip_without_pickles():
    arrays = {
        "truth": np.linspace(0, 1, 24, dtype=np.float32).reshape(2, 3, 4),
        "labels": np.arange(3, dtype=np.int32),
        "trace": np.array([[1.0, np.nan]]),
    }
    with np.load(io.BytesIO(store.npz(**arrays)), allow_pickle=False) as found:
        assert set(found) == set(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)
            assert found[name].dtype == array.dtype
    with pytest.raises(ValueError, match=r"[Oo]bject"):
        store.npz(bad=np.array([object()]))


def test_json_round_trip_and_what_json_does_not_know():
    value = {"seed": 7, "restarts": None, "model": "lenet", "defense": ["none"]}
    text = store.json_file(value, indent=2)
    assert json.loads(text) == value and text.endswith(b"\n")
    assert json.loads(store.json_file({"out": pathlib.PurePosixPath("a/b")})) == {"out": "a/b"}


def test_versions_name_the_package_and_the_device():
    found = store.versions()
    assert found["invjax"] == invjax.__version__ and found["jax"] == jax.__version__
    assert set(found) == {*store.PACKAGES, "python", "device"}
    assert all(isinstance(value, str) and value for value in found.values())
