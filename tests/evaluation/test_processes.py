"""Two processes of two devices each on one machine: the table of one process, and no job twice."""

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

from invjax.evaluation import grid, journal, sweep

SMALL = grid.Sweep(
    models=("mlp((8,))",),
    defenses=("gaussian_noise(0.001)", "gaussian_noise(0.1)"),
    attacks=("bayes(num_steps=30)",),
    num_victims=5,
)
TOML = """
models = "mlp((8,))"
defenses = ["gaussian_noise(0.001)", "gaussian_noise(0.1)"]
attacks = "bayes(num_steps=30)"
num_victims = 5
"""


def launch(file, folder, *options):
    """Two processes; each has two devices, and finds the other by a free port."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_COMPILATION_CACHE_DIR": str(pathlib.Path(".cache/jax").absolute()),
    }
    command = [sys.executable, "-c", "from invjax import cli; cli.entry()", "sweep", str(file)]
    command += ["--out", str(folder), "--block-size", "2", *options]
    command += ["--coordinator", f"localhost:{port}", "--num-processes", "2"]
    return [
        subprocess.Popen(
            [*command, "--process-id", str(index)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]


def finish(processes):
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs


def same_tables(rows, expected):
    found, wanted = (
        {(row["cell"], row["seed"], row["victim"]): row for row in table.to_pylist()}
        for table in (rows, expected)
    )
    assert set(found) == set(wanted) and len(found) == rows.num_rows == expected.num_rows
    for name, row in found.items():
        # Two devices hold one job each, eight hold one too: rounding is all that may differ.
        np.testing.assert_allclose(
            row["initial_objective"], wanted[name]["initial_objective"], rtol=1e-6
        )
        np.testing.assert_allclose(row["psnr"], wanted[name]["psnr"], atol=0.01)
        assert row["recovered_label"] == wanted[name]["recovered_label"]


@pytest.mark.slow
def test_two_processes_give_the_table_of_one(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(TOML)
    expected = sweep.sweep(SMALL, block_size=2)
    folder = tmp_path / "two"
    finish(launch(file, folder))
    same_tables(pq.read_table(folder / "results.parquet"), expected)
    files = sorted(path.name for path in (folder / "journal").iterdir())
    assert files == ["process-000.jsonl", "process-001.jsonl"]
    assert (folder / "report.html").exists()

    # One of two is killed, once something is on record; one process goes on alone.
    folder = tmp_path / "killed"
    processes = launch(file, folder)
    deadline = time.monotonic() + 200
    while not list(folder.glob("journal/*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGKILL)
    # Without its fellow the other one waits at the end, or is ended by the runtime.
    try:
        processes[0].wait(timeout=5)
    except subprocess.TimeoutExpired:
        processes[0].kill()
    for process in processes:
        process.communicate()
    assert 0 < len(journal.read(folder).blocks) <= len(grid.blocks(SMALL, 2))
    shutil.copytree(folder, tmp_path / "again")
    same_tables(sweep.sweep(SMALL, folder, resume=True), expected)
    # And two go on with it as well.
    finish(launch(file, tmp_path / "again", "--resume"))
    same_tables(pq.read_table(tmp_path / "again" / "results.parquet"), expected)
