"""`invjax sweep` and `invjax report`: as a user runs them."""

import errno
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

import invjax
from invjax import cli
from invjax.cli.sweep import _input_range
from invjax.evaluation import grid
from invjax.evaluation import sweep as engine

# A shell's background jobs ignore SIGINT, and hand that down.
HEARING = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from invjax import cli; cli.entry()"
)


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


TOML = """
models = "mlp((8,))"
defenses = ["none", "gaussian_noise(0.1)"]
attacks = "inverting_gradients(num_steps=5)"
num_victims = 3
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.toml"
    path.write_text(TOML)
    return path


def test_a_sweep_and_its_report(file, tmp_path, capsys):
    assert cli.main(["sweep", str(file)]) == 0
    folder = tmp_path / "invjax-runs" / "sweep-mine"
    output = capsys.readouterr().out
    assert "6 rows" in output and "report.html" in output
    assert pq.read_table(folder / "results.parquet").num_rows == 6
    page = (folder / "report.html").read_text()
    assert "6 of 6 samples" in page and "invjax sweep --resume --out" in page
    assert "6 of 6 jobs" in (folder / "sweep-000.log").read_text()
    # Again without --resume is refused; with it nothing is left to do.
    assert cli.main(["sweep", str(file)]) == 2
    assert "--resume, or replace it with --overwrite" in capsys.readouterr().err
    assert cli.main(["sweep", "--resume", "--out", str(folder)]) == 0
    (folder / "report.html").unlink()
    assert cli.main(["report", str(folder)]) == 0
    assert (folder / "report.html").exists()


def test_quiet_prints_nothing(file, capsys):
    assert cli.main(["sweep", str(file), "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == ""


def test_failures_are_the_exit_code(file, tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("no <client> today")

    monkeypatch.setattr(engine.jobs, "client", lambda setting: broken)
    assert cli.main(["sweep", str(file)]) == 16
    assert "6 jobs failed" in capsys.readouterr().err
    page = (tmp_path / "invjax-runs" / "sweep-mine" / "report.html").read_text()
    assert "no &lt;client&gt; today" in page


def test_a_sample_that_is_not_found_is_no_failed_job(file, tmp_path):
    file.write_text(
        'models = "mlp((8,))"\ndefenses = "random_mask(0.9999999)"\nattacks = "bias_trick"\n'
    )
    assert cli.main(["sweep", str(file)]) == 0
    folder = tmp_path / "invjax-runs" / "sweep-mine"
    rows = pq.read_table(folder / "results.parquet").to_pylist()
    assert {(row["status"], row["reason"]) for row in rows} == {
        ("not found", "the defence left a gradient of zeros")
    }


def test_pictures_are_drawn_in_the_range_of_the_data(tmp_path):
    wide = tmp_path / "wide.npz"
    np.savez(wide, x=np.linspace(-1, 2, 64, dtype=np.float32).reshape(4, 4, 4, 1), y=np.arange(4))
    assert _input_range(grid.Sweep(datasets=("digits", str(wide)))) == (-1.0, 2.0)
    assert _input_range(grid.Sweep(datasets=("nowhere.npz",))) == (0.0, 1.0)


def test_plan_writes_nothing(file, tmp_path, capsys):
    assert cli.main(["sweep", str(file), "--plan"]) == 0
    assert "2 cells, 6 jobs, 6 samples" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["mine.toml"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--preset"),
        (["mine.toml", "--preset", "digits"], "either|or --preset"),
        (["--preset", "digit"], "Did you mean 'digits'"),
        (["none.toml"], "none.toml"),
        (["mine.toml", "--block-size", "0"], "--block-size"),
        (["mine.toml", "--num-processes", "2"], "need --coordinator"),
        (["--resume", "--out", "nowhere"], "holds no sweep"),
        (["mine.toml", "--resume"], "resume"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(file, tmp_path, options, message, capsys):
    assert cli.main(["sweep", *options]) == 2
    error = capsys.readouterr().err.strip()
    assert any(part in error for part in message.split("|")) and len(error.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine.toml"]


@pytest.mark.parametrize("call", [*map(slow, (0, 12)), 5])
def test_a_disk_that_fills_up_loses_nothing_recorded(file, tmp_path, monkeypatch, capsys, call):
    left, sync = [call], os.fsync

    def full(descriptor):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert cli.main(["sweep", str(file), "--block-size", "2"]) == 1
    error = capsys.readouterr().err.strip()
    assert "No space left" in error and "--resume" in error and len(error.splitlines()) == 1
    folder = tmp_path / "invjax-runs" / "sweep-mine"
    assert not [path for path in folder.rglob("*") if "partial" in path.name]
    monkeypatch.setattr(os, "fsync", sync)
    # Where not even the beginning was on the disk, there is nothing to resume.
    how = ["--resume"] if (folder / "sweep.json").exists() else []
    assert how or call == 0
    assert cli.main(["sweep", str(file), "--block-size", "2", *how]) == 0
    assert pq.read_table(folder / "results.parquet").num_rows == 6


# Root may write everywhere, but without this capability (PR_CAPBSET_DROP, CAP_DAC_OVERRIDE).
UNPRIVILEGED = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(24, 1, 0, 0, 0); "
    "os.execv(sys.executable, [sys.executable, '-c', *sys.argv[1:]])"
)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
def test_a_folder_that_becomes_read_only(file, tmp_path):
    assert cli.main(["sweep", str(file)]) == 0
    folder = tmp_path / "invjax-runs" / "sweep-mine"
    for block in (folder / "blocks").iterdir():
        block.unlink()
    places = [folder, *(path for path in folder.iterdir() if path.is_dir())]
    for place in places:
        place.chmod(0o500)
    try:
        again = subprocess.run(
            [sys.executable, "-c", UNPRIVILEGED, HEARING, "sweep", str(file), "--resume"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert again.returncode == 2
        assert "cannot be written to" in again.stderr
        assert len(again.stderr.strip().splitlines()) == 1
    finally:
        for place in places:
            place.chmod(0o700)
    assert cli.main(["sweep", str(file), "--resume"]) == 0
    assert pq.read_table(folder / "results.parquet").num_rows == 6


def test_report_of_no_sweep(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "holds no sweep" in capsys.readouterr().err


def test_help(capsys):
    assert cli.main([]) == 0
    overview = capsys.readouterr().out
    assert all(command in overview for command in ("attack", "sweep", "report"))
    with pytest.raises(SystemExit):
        cli.main(["sweep", "--help"])
    assert "--resume" in capsys.readouterr().out


def test_python_returns_the_table():
    settings = {"models": "mlp((8,))", "attacks": "bayes(num_steps=2)", "num_victims": 2}
    table = invjax.sweep(settings)
    assert table.num_rows == 2 and set(table["status"].to_pylist()) == {"ok"}


def test_interruption_keeps_what_was_recorded(file, tmp_path):
    file.write_text(TOML.replace("num_steps=5", "num_steps=3000000"))
    process = subprocess.Popen(
        [sys.executable, "-c", HEARING, "sweep", str(file)],
        env={**os.environ, "XLA_FLAGS": ""},
        stderr=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "invjax-runs" / "sweep-mine" / "sweep-000.log"
    deadline = time.time() + 120
    while not log.exists() and time.time() < deadline:
        time.sleep(0.1)
    time.sleep(15)
    process.send_signal(signal.SIGINT)
    try:
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "--resume" in error
