"""A sweep's record: whole blocks only, whatever stops the machine, and nothing taken on trust."""

import errno
import hashlib
import json
import math
import os
import pathlib
import subprocess
import sys
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest

from invjax import files
from invjax.evaluation import checkpoint, journal, store

SETTINGS = {
    "sweep": {"attack": "matching", "seeds": [0, 1], "defense": {"noise": 0.1, "clip": math.nan}},
    "plan": {"jobs_per_block": 8},
}


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def record(folder, block, number=0, process=0, **options):
    """A block of which rows and arrays all say `number`."""
    rows = [{"block": block, "row": row, "loss": number + row / 3} for row in range(2)]
    arrays = {"image": np.full((2, 3), number, np.float32), "label": np.full(2, number)}
    journal.record_block(folder, process, block, rows, arrays, **options)


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def lines(folder, process=0):
    return folder / "journal" / f"process-{process:03d}.jsonl"


def flip(path: pathlib.Path, position: int, bits: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= bits
    path.write_bytes(content)


# Writing


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    for path in (closed / "file", closed / "deep" / "file"):
        with pytest.raises(OSError, match="denied"):
            files.write_atomic(path, b"content")
    with pytest.raises(OSError, match="denied"):
        journal.append(closed, 0, {})
    with pytest.raises(store.FolderError, match="cannot be written to"):
        journal.open_sweep(closed, SETTINGS, resume=False)
    assert not contents(closed)


# Settings


def test_a_sweep_is_begun_once_and_resumed(tmp_path):
    folder = tmp_path / "deep" / "run"
    begun = journal.open_sweep(folder, SETTINGS, resume=False)
    assert begun["plan"] == {"jobs_per_block": 8}
    assert json.loads((folder / "sweep.json").read_text())["plan"] == {"jobs_per_block": 8}
    before = contents(folder)
    # The plan on record wins; tuples and the order of keys make no difference, nor does NaN.
    sweep = dict(reversed(SETTINGS["sweep"].items())) | {"seeds": (0, np.int64(1))}
    again = journal.open_sweep(folder, {"sweep": sweep, "plan": 1}, resume=True)
    assert repr(again) == repr(dict(sorted(again.items()))) and again["plan"] == begun["plan"]
    assert contents(folder) == before
    with pytest.raises(store.FolderError, match=r"--resume.*--overwrite"):
        journal.open_sweep(folder, SETTINGS, resume=False)
    with pytest.raises(store.FolderError, match="--overwrite as well"):
        journal.open_sweep(folder, SETTINGS, resume=True, overwrite=True)
    assert contents(folder) == before


def test_other_settings_are_shown_line_by_line(tmp_path):
    journal.open_sweep(tmp_path, SETTINGS, resume=False)
    sweep = {"attack": "labels", "seeds": [0, 1], "defense": {"noise": 0.2}, "more": None}
    with pytest.raises(store.FolderError) as caught:
        journal.open_sweep(tmp_path, {"sweep": sweep, "plan": {}}, resume=True)
    assert str(caught.value).splitlines()[1:] == [
        'attack: recorded "matching", now "labels"',
        "defense.clip: recorded NaN, now none",
        "defense.noise: recorded 0.1, now 0.2",
        "more: recorded none, now null",
    ]


def test_folders_that_do_not_suit(tmp_path):
    for folder in (tmp_path, tmp_path / "new"):
        with pytest.raises(store.FolderError, match=r"no sweep\.json"):
            journal.open_sweep(folder, SETTINGS, resume=True)
    (tmp_path / "mine.txt").write_bytes(b"mine")
    with pytest.raises(store.FolderError, match="not empty"):
        journal.open_sweep(tmp_path, SETTINGS, resume=False)
    with pytest.raises(store.FolderError, match="is a file"):
        journal.open_sweep(tmp_path / "mine.txt", SETTINGS, resume=False)
    assert contents(tmp_path) == {"mine.txt": b"mine"}


def test_a_start_that_was_killed_can_be_repeated(tmp_path):
    (tmp_path / ".sweep.json.partial-1").write_bytes(b"{")
    journal.open_sweep(tmp_path, SETTINGS, resume=False)
    assert (tmp_path / "sweep.json").exists()


def test_overwriting_forgets_the_earlier_sweep_only(tmp_path):
    journal.open_sweep(tmp_path, SETTINGS, resume=False)
    record(tmp_path, "a")
    record(tmp_path, "b", status="failed")
    checkpoint.save(tmp_path, "c", 1, jnp.ones(2), "f")
    journal.compact(tmp_path, {"a": "cell"}, ["a"])
    (tmp_path / "blocks" / "mine.txt").write_bytes(b"mine")
    journal.open_sweep(tmp_path, {"sweep": {}}, resume=False, overwrite=True)
    assert set(contents(tmp_path)) == {"sweep.json", "blocks/mine.txt"}
    assert journal.open_sweep(tmp_path, {"sweep": {}}, resume=True) == {"sweep": {}}


def test_a_damaged_sweep_json_is_never_believed(tmp_path):
    begun = journal.open_sweep(tmp_path, SETTINGS, resume=False)
    path = tmp_path / "sweep.json"
    whole = path.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"[]", b"{}", b"\xff" + whole):
        path.write_bytes(content)
        with pytest.raises(store.FolderError, match=r"sweep\.json: damaged"):
            journal.open_sweep(tmp_path, SETTINGS, resume=True)
    for position in range(0, len(whole), 3):
        path.write_bytes(whole)
        flip(path, position)
        try:
            assert repr(journal.open_sweep(tmp_path, SETTINGS, resume=True)) == repr(begun)
        except store.FolderError as error:
            assert "sweep.json: damaged" in str(error)


# The journal


def test_a_line(tmp_path):
    journal.append(tmp_path, 7, {"kind": "note", "text": "é\n"})
    crc, text = lines(tmp_path, 7).read_bytes().removesuffix(b"\n").split(b" ", 1)
    assert crc == b"%08x" % zlib.crc32(text)
    assert json.loads(text) == {"kind": "note", "text": "é\n"}
    assert journal.read(tmp_path) == journal.Journal({}, [], "")


def test_an_append_is_one_write_then_a_sync(tmp_path, monkeypatch):
    journal.append(tmp_path, 0, {})
    events, write, sync = [], os.write, os.fsync
    monkeypatch.setattr(journal.os, "write", lambda *a: (events.append("write"), write(*a))[1])
    monkeypatch.setattr(journal.os, "fsync", lambda fd: (events.append("sync"), sync(fd)))
    journal.append(tmp_path, 0, {})
    assert events == ["write", "sync"]


def test_a_block_comes_back_as_it_was_recorded(tmp_path):
    rows = [{"psnr": np.float32(1.1), "n": np.int64(2), "ok": np.bool_(True), "x": jnp.ones(2)}]
    rows.append({"psnr": math.nan, "n": None, "worst": -math.inf, "name": "é\n", "l": [math.inf]})
    arrays = {"image": jnp.arange(6.0).reshape(2, 3), "h": np.ones(2, np.float16)}
    arrays["nan"] = np.array([math.nan, -0.0])
    checkpoint.save(tmp_path, "a", 1, jnp.ones(2), "f")
    journal.record_block(tmp_path, 0, "a", rows, arrays)
    assert not (tmp_path / "checkpoints" / "a.npz").exists()
    blocks, damaged, _ = journal.read(tmp_path)
    entry = blocks["a"]
    assert damaged == [] and entry["status"] == "done" and entry["reason"] == ""
    first, second = entry["rows"]
    assert first == {"psnr": float(np.float32(1.1)), "n": 2, "ok": True, "x": [1.0, 1.0]}
    assert first["ok"] is True and math.isnan(second["psnr"]) and second["n"] is None
    assert second["worst"] == -math.inf and second["l"] == [math.inf] and second["name"] == "é\n"
    assert repr(list(journal.rows(tmp_path))) == repr([first, second])
    loaded = journal.load_arrays(tmp_path, entry)
    assert loaded.keys() == arrays.keys()
    for name, array in loaded.items():
        assert array.dtype == arrays[name].dtype
        assert array.tobytes() == np.asarray(arrays[name]).tobytes()


def test_a_block_without_arrays(tmp_path):
    journal.record_block(tmp_path, 0, "a", [{"x": 1}], None, status="failed", reason="NaN")
    entry = journal.read(tmp_path).blocks["a"]
    assert (entry["file"], entry["reason"]) == (None, "NaN")
    assert journal.load_arrays(tmp_path, entry) == {}


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"status": "other"}, ValueError),
        ({"block": "../a"}, ValueError),
        ({"block": ""}, ValueError),
        ({"rows": [{"x": object()}]}, TypeError),
        ({"arrays": {"x": np.array([None])}}, ValueError),
        ({"arrays": {"x": jnp.ones(2, jnp.bfloat16)}}, ValueError),
    ],
)
def test_what_cannot_be_recorded_changes_nothing(tmp_path, change, error):
    record(tmp_path, "a", 1)
    before = contents(tmp_path)
    given = {"block": "a", "rows": [], "arrays": {"x": np.ones(3)}} | change
    with pytest.raises(error):
        journal.record_block(tmp_path, 0, **given)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_full_disk_spoils_no_recorded_block(tmp_path, monkeypatch, call):
    record(tmp_path, "a", 1)
    before = contents(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(journal.os, call, full)
        with pytest.raises(OSError, match="No space"):
            record(tmp_path, "b", 2)
    after = contents(tmp_path)
    assert after.items() >= before.items() and not any("partial" in name for name in after)
    assert set(journal.read(tmp_path).blocks) == {"a"}
    record(tmp_path, "b", 2)
    assert set(journal.read(tmp_path).blocks) == {"a", "b"}


def test_a_line_written_in_part_is_an_error_and_spoils_nothing(tmp_path, monkeypatch):
    record(tmp_path, "a")
    write = os.write
    with monkeypatch.context() as patched:
        patched.setattr(journal.os, "write", lambda fd, data: write(fd, data[:50]))
        with pytest.raises(OSError, match="in part only"):
            record(tmp_path, "b")
    assert "torn last line" in journal.read(tmp_path).damaged[0]
    record(tmp_path, "c")
    blocks, damaged, _ = journal.read(tmp_path)
    assert list(blocks) == ["a", "c"]
    assert damaged == ["journal/process-000.jsonl line 2: damaged line"]


def test_a_journal_torn_anywhere_loses_its_last_block_only(tmp_path):
    record(tmp_path, "a")
    first = lines(tmp_path).stat().st_size
    record(tmp_path, "b")
    whole = lines(tmp_path).read_bytes()
    for size in [first, first + 1, first + 8, first + 9, first + 10, len(whole) - 2]:
        lines(tmp_path).write_bytes(whole[:size])
        blocks, damaged, _ = journal.read(tmp_path)
        assert list(blocks) == ["a"]
        torn = ["journal/process-000.jsonl line 2: torn last line, as a kill leaves it"]
        assert damaged == (torn if size > first else [])
        record(tmp_path, "c")
        assert list(journal.read(tmp_path).blocks) == ["a", "c"]
    # Torn of its newline only, a line is whole, and stays so.
    lines(tmp_path).write_bytes(whole[:-1])
    assert list(journal.read(tmp_path).blocks) == ["a", "b"]
    record(tmp_path, "c")
    assert list(journal.read(tmp_path).blocks) == ["a", "b", "c"]


def test_a_byte_flipped_anywhere_in_a_line_spoils_that_line_only(tmp_path):
    for block in "abc":
        record(tmp_path, block)
    first, second, _ = lines(tmp_path).read_bytes().splitlines(keepends=True)
    whole = lines(tmp_path).read_bytes()
    for position in range(0, len(second) - 1, 7):
        flip(lines(tmp_path), len(first) + position)
        blocks, damaged, _ = journal.read(tmp_path, verify=False)
        assert list(blocks) == ["a", "c"]
        assert damaged == ["journal/process-000.jsonl line 2: damaged line"]
        lines(tmp_path).write_bytes(whole)


def test_a_line_of_no_json_is_damaged(tmp_path):
    record(tmp_path, "a")
    with open(lines(tmp_path), "ab") as file:
        file.write(b"%08x {]\n\n" % zlib.crc32(b"{]"))
    blocks, damaged, _ = journal.read(tmp_path)
    assert list(blocks) == ["a"]
    assert [text.split(": ")[0][-6:] for text in damaged] == ["line 2", "line 3"]


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_a_block_whose_file_is_damaged_does_not_count(tmp_path, damage):
    record(tmp_path, "a", 1)
    record(tmp_path, "b", 2)
    entry = journal.read(tmp_path).blocks["a"]
    path = tmp_path / "blocks" / "a.npz"
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        flip(path, 60)
    blocks, damaged, _ = journal.read(tmp_path)
    assert list(blocks) == ["b"] and len(damaged) == 1 and "blocks/a.npz" in damaged[0]
    assert ("a" in journal.read(tmp_path, verify=False).blocks) == (damage == "flipped")
    with pytest.raises(ValueError, match=r"blocks/a\.npz"):
        journal.load_arrays(tmp_path, entry)
    with pytest.raises(ValueError, match="not on record whole: a"):
        journal.compact(tmp_path, str, ["b", "a"])
    record(tmp_path, "a", 1)
    assert journal.read(tmp_path).damaged == []


def test_the_later_of_two_counts(tmp_path):
    record(tmp_path, "a", 1)
    record(tmp_path, "b", 1)
    record(tmp_path, "a", 2)
    blocks, damaged, _ = journal.read(tmp_path)
    assert list(blocks) == ["b", "a"] and damaged == []
    assert blocks["a"]["rows"][0]["loss"] == 2
    assert journal.load_arrays(tmp_path, blocks["a"])["image"][0, 0] == 2
    assert [row["block"] for row in journal.rows(tmp_path)] == ["b", "b", "a", "a"]
    # As if the second recording of `b` was killed before its line: the first is no longer whole.
    files.write_atomic(tmp_path / "blocks" / "b.npz", store.npz(x=np.ones(3)))
    assert list(journal.read(tmp_path).blocks) == ["a"]


@pytest.mark.parametrize("order", [("done", "failed"), ("failed", "done"), ("failed", "failed")])
def test_done_beats_failed(tmp_path, order):
    for number, status in enumerate(order):
        record(tmp_path, "a", number, status=status)
    blocks, damaged, _ = journal.read(tmp_path)
    expected = order.index("done") if "done" in order else 1
    assert damaged == [] and blocks["a"]["rows"][0]["loss"] == expected
    assert journal.load_arrays(tmp_path, blocks["a"])["label"][0] == expected
    if "done" in order:
        (tmp_path / "blocks" / "a.npz").unlink()
        assert journal.read(tmp_path).blocks == {}  # Runs again, and does not count as failed.


def test_two_processes(tmp_path):
    record(tmp_path, "a", 1, process=1)
    record(tmp_path, "b", 2, process=0)
    record(tmp_path, "c", 3, process=1000)
    record(tmp_path, "b", 4, process=999)
    with open(lines(tmp_path, 0), "ab") as file:
        file.write(b"torn")
    blocks, damaged, _ = journal.read(tmp_path)
    assert list(blocks) == ["a", "b", "c"] and blocks["b"]["rows"][0]["loss"] == 4
    assert len(damaged) == 1 and "process-000.jsonl line 2: torn last line" in damaged[0]


# Kills

KILLED = """
import os, pathlib, random, signal, sys, time
import numpy as np
from invjax import files
from invjax.evaluation import checkpoint, journal

folder = pathlib.Path(sys.argv[1])

def record(block, number):
    rows = [{"number": number, "pad": "x" * 3000}] * 3
    journal.record_block(folder, 0, block, rows, {"x": np.full((3, 2000), number)})

def fork(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid

def at(count):
    # Dies in the place of its count-th call, so that every gap between two calls is tried.
    left = [count]
    def dying(call):
        def wrapped(*args):
            left[0] -= 1
            if left[0] < 0:
                if call is write:
                    write(args[0], args[1][:500])
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args)
        return wrapped
    write = os.write
    for name in ("write", "fsync", "replace"):
        setattr(os, name, dying(getattr(os, name)))
    record("again", count)
    record(f"at-{count}", count)

def loop(start):
    for number in range(start, start + 10_000):
        record(f"{number % 50}", number)

for count in range(12):
    os.waitpid(fork(lambda: at(count)), 0)
for start in range(0, 40_000, 10_000):
    pid = fork(lambda: loop(start))
    time.sleep(random.uniform(0.02, 0.2))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
"""


def test_what_is_killed_at_any_moment_leaves_whole_blocks_only(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path)]
    subprocess.run(command, check=True, timeout=60)
    temporaries = [path for path in tmp_path.rglob("*") if ".partial-" in path.name]
    assert temporaries  # Or no kill came while a file was written.
    assert files.clean(tmp_path) == sorted(temporaries)
    assert not [path for path in tmp_path.rglob("*") if ".partial-" in path.name]
    blocks, damaged, _ = journal.read(tmp_path)
    assert blocks.keys() >= {"again", "at-10", "at-11"} and "at-4" not in blocks
    assert any("damaged line" in text for text in damaged)
    for block, entry in blocks.items():
        numbers = {row["number"] for row in entry["rows"]}
        numbers |= set(journal.load_arrays(tmp_path, entry)["x"].ravel().tolist())
        assert len(numbers) == 1 and len(entry["rows"]) == 3
        assert block == "again" or numbers.pop() % 50 == int(block.removeprefix("at-"))


# Checkpoints


class State(NamedTuple):
    x: jax.Array
    rest: dict


def state(seed=0):
    key = jax.random.key(seed)
    rest = {
        "keys": jax.random.split(key, 3),
        "rbg": jax.random.key(seed, impl="rbg"),
        "bfloat16": jax.random.normal(key, (3, 5), jnp.bfloat16),
        "int": jnp.arange(3, dtype=jnp.int8) + seed,
        "bool": jnp.array([True, False]),
        "scalar": jnp.asarray(2, jnp.uint32),
        "weak": jnp.full(3, jnp.nan),
        "empty": jnp.zeros((0, 4)),
        "odd": jnp.array([-0.0, jnp.inf, 1e-45]),
        "none": None,
        "pair": (None, [jnp.ones(2, jnp.float8_e4m3fn)]),
    }
    return State(jax.random.normal(key, (4, 6)), rest)


def bits(tree):
    def one(leaf):
        key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        data = np.asarray(jax.random.key_data(leaf) if key else leaf)
        weak = not key and leaf.weak_type
        return str(leaf.dtype), leaf.shape, weak, data.tobytes()

    return jax.tree.map(one, tree)


def test_a_checkpoint_comes_back_bit_by_bit(tmp_path):
    for step, seed in enumerate((1, 2)):
        checkpoint.save(tmp_path, "a", step, state(seed), "f")
        like = [state(), jax.eval_shape(state)][step]
        found = checkpoint.load(tmp_path, "a", like, "f")
        assert (found.step, found.problem) == (step, "")
        assert bits(found.state) == bits(state(seed))
    assert set(contents(tmp_path)) == {"checkpoints/a.npz"}
    draw = jax.random.normal(found.state.rest["rbg"], (3,))
    assert jnp.array_equal(draw, jax.random.normal(state(2).rest["rbg"], (3,)))


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    checkpoint.save(tmp_path, "a", 3, state(), "f")
    whole = state()

    def with_(**rest):
        return whole._replace(rest=whole.rest | rest)

    for like in (
        whole._replace(x=jnp.ones((6, 4))),
        whole._replace(x=jnp.ones((4, 6), jnp.int32)),
        with_(bfloat16=jnp.ones((3, 5), jnp.float16)),
        with_(none=jnp.ones(2)),
        with_(scalar=None),
        with_(rbg=jax.random.key(0)),
        with_(keys=jax.random.key_data(whole.rest["keys"])),
        tuple(jax.tree.leaves(whole)),
        (),
    ):
        found = checkpoint.load(tmp_path, "a", like, "f")
        assert found[:2] == (0, None) and "a.npz: another leaves" in found.problem
    found = checkpoint.load(tmp_path, "a", whole, "g")
    assert found == (0, None, "a.npz: another fingerprint: recorded f, now g")
    os.rename(tmp_path / "checkpoints" / "a.npz", tmp_path / "checkpoints" / "b.npz")
    assert checkpoint.load(tmp_path, "a", whole, "f") == (0, None, "none")
    assert "another block" in checkpoint.load(tmp_path, "b", whole, "f").problem


def test_a_damaged_checkpoint_never_gives_a_wrong_state(tmp_path):
    like = {"key": jax.random.key(3), "x": jnp.arange(20.0), "step": jnp.asarray(4)}
    checkpoint.save(tmp_path, "a", 7, like, "f")
    path = tmp_path / "checkpoints" / "a.npz"
    whole, expected, used = path.read_bytes(), bits(like), 0
    positions = {int(at) for at in np.linspace(0, len(whole) - 1, 50)}
    for position in sorted(positions):
        for content in (
            whole[:position],
            whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :],
        ):
            path.write_bytes(content)
            found = checkpoint.load(tmp_path, "a", like, "f")
            if found.problem:  # Else a byte that says nothing: a date, padding.
                used += 1
                assert found[:2] == (0, None) and found.problem.startswith("a.npz: ")
            else:
                assert found.step == 7 and bits(found.state) == expected
    assert used > len(positions) * 3 / 2
    for content in (b"", b"garbage", b"PK\x03\x04", bytes(1000), store.npz(x=np.ones(2))):
        path.write_bytes(content)
        assert "damaged" in checkpoint.load(tmp_path, "a", like, "f").problem


def test_leaves_changed_within_a_sound_zip_are_noticed(tmp_path):
    like = {"x": jnp.arange(4.0)}
    checkpoint.save(tmp_path, "a", 7, like, "f")
    path = tmp_path / "checkpoints" / "a.npz"
    with np.load(path) as file:
        arrays = dict(file)
    for name in ("leaf0", "header"):
        changed = arrays[name].copy()
        changed[1] ^= 1
        path.write_bytes(store.npz(**arrays | {name: changed}))
        problem = checkpoint.load(tmp_path, "a", like, "f").problem
        assert "its checksum does not match" in problem
    path.write_bytes(store.npz(**arrays))
    assert checkpoint.load(tmp_path, "a", like, "f").problem == ""


def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_one(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, "a", 1, jnp.ones(3), "f")
    before = contents(tmp_path)
    for call in ("fsync", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(journal.os, call, full)
            with pytest.raises(OSError, match="No space"):
                checkpoint.save(tmp_path, "a", 2, jnp.ones(3), "f")
        assert contents(tmp_path) == before


# Compaction


def test_compaction_is_the_union_of_what_is_on_record(tmp_path):
    given = {
        "c1": ([{"a": 1, "b": math.nan}, {"a": 2}], np.arange(4.0).reshape(2, 2)),
        "d1": ([{"a": 0.5, "c": "x"}], np.ones((1, 3))),
        "c2": ([{"b": None, "flag": True}], np.full((1, 2), math.nan)),
        "failed": ([{"error": "why"}], None),
        "none": ([], None),
    }
    for process, (block, (rows, x)) in enumerate(reversed(given.items())):
        arrays = None if x is None else {"x": x, "n": np.arange(len(x))}
        status = "failed" if block == "failed" else "done"
        journal.record_block(tmp_path, process % 2, block, rows, arrays, status)
    files.write_atomic(tmp_path / "reconstructions" / "f.npz", b"of an earlier compaction")
    before = contents(tmp_path / "blocks")
    sha256 = journal.compact(tmp_path, lambda block: block[0], list(given))
    assert contents(tmp_path / "blocks") == before
    digest = hashlib.sha256((tmp_path / "results.parquet").read_bytes()).hexdigest()
    assert journal.read(tmp_path).compacted == sha256 == digest
    table = pq.read_table(tmp_path / "results.parquet")
    names = ["a", "b", "c", "flag", "error"]
    assert table.column_names == names
    rows = [row for block_rows, _ in given.values() for row in block_rows]
    expected = [{name: row.get(name) for name in names} for row in rows]
    assert repr([{**row, "a": row["a"] and float(row["a"])} for row in expected]) == repr(
        table.to_pylist()
    )
    found = contents(tmp_path / "reconstructions")
    assert set(found) == {"c.npz", "d.npz"}
    with np.load(tmp_path / "reconstructions" / "c.npz") as arrays:
        whole = np.concatenate([given["c1"][1], given["c2"][1]])
        assert arrays["x"].tobytes() == whole.tobytes() and arrays["n"].tolist() == [0, 1, 0]
    # Again, in another order and with a mapping; some blocks only.
    assert journal.compact(tmp_path, {"c1": "c", "c2": "c"}, ["c2", "c1"]) != sha256
    with np.load(tmp_path / "reconstructions" / "c.npz") as arrays:
        assert arrays["n"].tolist() == [0, 0, 1]
    assert [row["a"] for row in pq.read_table(tmp_path / "results.parquet").to_pylist()] == [
        None,
        1,
        2,
    ]


def test_compaction_of_nothing(tmp_path):
    journal.compact(tmp_path, str, [])
    assert pq.read_table(tmp_path / "results.parquet").num_rows == 0


def test_compaction_that_cannot_be_leaves_the_earlier_one(tmp_path, monkeypatch):
    record(tmp_path, "a", 1)
    journal.compact(tmp_path, str, ["a"])
    before = contents(tmp_path)
    for call in ("fsync", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(journal.os, call, full)
            with pytest.raises(OSError, match="No space"):
                journal.compact(tmp_path, str, ["a"])
        assert contents(tmp_path) == before
    journal.record_block(tmp_path, 0, "b", [{"loss": "text"}], {"image": np.ones((1, 3))})
    journal.record_block(tmp_path, 0, "c", [], {"image": np.ones((1, 9)), "label": np.ones(1)})
    with pytest.raises(ValueError, match=r"rows of block b: .*loss"):
        journal.compact(tmp_path, str, ["a", "b"])
    with pytest.raises(ValueError, match=r"cell x: .*names"):
        journal.compact(tmp_path, lambda _: "x", ["a", "b"])
    with pytest.raises(ValueError, match=r"cell x: .*dimension"):
        journal.compact(tmp_path, lambda _: "x", ["a", "c"])
    assert contents(tmp_path)["results.parquet"] == before["results.parquet"]
