"""Files are the old one or the new one, and nothing is left behind."""

import errno
import os
import pathlib
import resource

import pytest

from invjax import files


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_write_atomic_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    for content in (b"old", b"", b"new"):
        files.write_atomic(path, content)
        assert contents(tmp_path) == {"a/b/file": content}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, call):
    files.write_atomic(tmp_path / "file", b"old")
    monkeypatch.setattr(files.os, call, full)
    for name in ("file", "new"):
        with pytest.raises(OSError, match="No space"):
            files.write_atomic(tmp_path / name, b"content")
    assert contents(tmp_path) == {"file": b"old"}


def test_a_disk_that_fills_up_while_it_is_written(tmp_path):
    files.write_atomic(tmp_path / "file", b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            files.write_atomic(tmp_path / "file", bytes(200_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path) == {"file": b"old"}


def test_content_and_folder_are_synced_around_the_rename(tmp_path, monkeypatch):
    events, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda fd: (events.append("sync"), sync(fd)))
    monkeypatch.setattr(files.os, "replace", lambda *a: (events.append("rename"), replace(*a)))
    files.write_atomic(tmp_path / "file", b"new")
    assert events == ["sync", "rename", "sync"]


def test_clean_removes_temporaries_only(tmp_path):
    keep = {"a.npz": b"", "blocks/.hidden": b"", "b/x.partial-1": b""}
    stale = {".a.npz.partial-1": b"", "blocks/.b.npz.partial-22": b"", "blocks/.c.partial-1": b""}
    for name in keep | stale:
        files.write_atomic(tmp_path / name, b"")
    assert files.clean(tmp_path, pid=22) == [tmp_path / "blocks/.b.npz.partial-22"]
    assert len(files.clean(tmp_path)) == 2
    assert contents(tmp_path) == keep
    assert files.clean(tmp_path / "none") == []
