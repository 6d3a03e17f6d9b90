"""A sweep: the same table however it was interrupted, isolated failures, refusals before any work."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

import invjax
from invjax.evaluation import grid, jobs, journal, plan, sweep, utility

SMALL = grid.Sweep(
    models=("mlp((8,))",),
    defenses=("gaussian_noise(0.001)", "gaussian_noise(0.1)"),
    attacks=("bayes(num_steps=30)",),
    num_victims=5,
    seeds=(0, 1),
)
VOLATILE = ("seconds", "commit")


def table(rows):
    """Rows by what they are of, without what differs from run to run."""
    keyed = {}
    for row in rows.to_pylist():
        name = (row["cell"], row["seed"], row["victim"], row["sample"])
        assert name not in keyed, "a row is there twice"
        keyed[name] = {key: value for key, value in row.items() if key not in VOLATILE}
    return keyed


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "sweep"
    return folder, sweep.sweep(SMALL, folder, block_size=2)


def test_every_job_has_a_row(whole):
    folder, rows = whole
    keyed = table(rows)
    assert set(keyed) == {
        (cell.name, seed, victim, 0)
        for cell in grid.cells(SMALL)
        for seed in SMALL.seeds
        for victim in range(5)
    }
    assert all(row["status"] == "ok" and row["steps"] == 30 for row in keyed.values())
    assert pq.read_table(folder / "results.parquet").equals(rows)
    assert not list((folder / "checkpoints").glob("*"))
    for cell in grid.cells(SMALL):
        with np.load(folder / "reconstructions" / f"{cell.name}.npz") as arrays:
            assert arrays["truth"].shape == arrays["reconstruction"].shape == (10, 1, 8, 8, 1)


def test_less_noise_gives_more_away(whole):
    medians = {
        defense: np.median(
            [row["psnr"] for row in whole[1].to_pylist() if row["defense"] == defense]
        )
        for defense in SMALL.defenses
    }
    assert medians["gaussian_noise(0.001)"] > medians["gaussian_noise(0.1)"] + 10


def test_victims_are_the_same_for_every_defense(whole):
    labels = {}
    for row in whole[1].to_pylist():
        labels.setdefault((row["seed"], row["victim"]), set()).add(row["label"])
    assert all(len(seen) == 1 for seen in labels.values()) and len(labels) == 10


def test_a_job_depends_on_itself_alone(whole):
    # Fewer defences, other blocks: the jobs that are left are what they were.
    fewer = grid.from_mapping({**grid.as_mapping(SMALL), "defenses": SMALL.defenses[1:]})
    again = table(sweep.sweep(fewer, block_size=5))
    before = table(whole[1])
    assert len(again) == 10
    for name, row in again.items():
        assert row["label"] == before[name]["label"]
        np.testing.assert_allclose(
            row["initial_objective"], before[name]["initial_objective"], rtol=1e-6
        )
        np.testing.assert_allclose(row["psnr"], before[name]["psnr"], atol=0.01)


def test_cells_that_differ_in_numbers_share_a_program():
    cells = grid.Sweep(
        models=("mlp((8,))",),
        defenses=("gaussian_noise(0.1)", "gaussian_noise(0.2)", "laplace_noise(0.1)", "none"),
        attacks=("bayes(learning_rate=0.1)", "bayes(learning_rate=0.2)", "bayes(num_steps=5)"),
    )
    found = sweep.check(cells)
    assert len({one.key for one in found}) == 3 * 2
    assert found[0].numbers.tolist() == pytest.approx([0.1, 0.1])


class Stop(KeyboardInterrupt):
    pass


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("events", [1, 4, 9])
def test_an_interrupted_sweep_resumes_to_the_same_table(whole, tmp_path, events):
    left = [events]

    def stop(event):
        left[0] -= 1
        if left[0] <= 0:
            raise Stop

    with pytest.raises(Stop):
        sweep.sweep(SMALL, tmp_path / "s", block_size=2, on_event=stop, checkpoint_seconds=0)
    before = len(journal.read(tmp_path / "s").blocks)
    resumed = sweep.sweep(SMALL, tmp_path / "s", resume=True)
    assert table(resumed) == table(whole[1])
    assert before < len(grid.blocks(SMALL, 2))


def test_resuming_a_finished_sweep_runs_nothing(whole, monkeypatch):
    folder, rows = whole
    monkeypatch.setattr(sweep.parallel, "run", None)
    assert table(sweep.sweep(SMALL, folder, resume=True)) == table(rows)


def test_another_sweep_is_refused_with_the_difference(whole):
    other = grid.from_mapping({**grid.as_mapping(SMALL), "num_victims": 6})
    with pytest.raises(ValueError, match="num_victims: recorded 5, now 6"):
        sweep.sweep(other, whole[0], resume=True)
    with pytest.raises(ValueError, match="--resume"):
        sweep.sweep(SMALL, whole[0])


def test_a_damaged_block_is_named_and_runs_again(whole, tmp_path):
    folder = tmp_path / "s"
    sweep.sweep(SMALL, folder, block_size=2)
    victim = sorted((folder / "blocks").glob("*.npz"))[3]
    victim.write_bytes(victim.read_bytes()[:-20])
    (folder / "results.parquet").write_bytes(b"PAR1")
    messages = []
    resumed = sweep.sweep(
        SMALL, folder, resume=True, on_event=lambda event: messages.append(event.message)
    )
    assert any(victim.name in message for message in messages)
    assert table(resumed) == table(whole[1])


@pytest.mark.parametrize("number", [1, 2, 4, 8])
def test_any_number_of_devices_gives_the_same_table(number, monkeypatch, tmp_path_factory):
    """13 jobs, which no number of devices divides; rounding is all that may differ."""
    cells = grid.Sweep(
        models=("mlp((8,))",),
        defenses=("gaussian_noise(0.01)",),
        attacks=("bayes(num_steps=30)",),
        num_victims=13,
    )
    devices = jax.local_devices()[:number]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    rows = sweep.sweep(cells, tmp_path_factory.mktemp("devices") / "s").to_pylist()
    first = ON_ONE_DEVICE.setdefault("rows", rows)
    assert len(rows) == 13
    for row, expected in zip(rows, first, strict=True):
        assert row["victim"] == expected["victim"] and row["label"] == expected["label"]
        np.testing.assert_allclose(
            row["initial_objective"], expected["initial_objective"], rtol=1e-6
        )
        np.testing.assert_allclose(row["psnr"], expected["psnr"], atol=0.01)
        np.testing.assert_allclose(row["ssim"], expected["ssim"], atol=1e-3)


ON_ONE_DEVICE = {}


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(path.read_bytes()[:-100]), flip])
def test_a_damaged_checkpoint_is_named_and_its_block_begins_anew(whole, tmp_path, damage):
    folder, events = tmp_path / "s", [0]

    def stop(event):
        events[0] += event.progress is not None
        if events[0] == 2:
            raise Stop

    with pytest.raises(Stop):
        sweep.sweep(SMALL, folder, block_size=2, on_event=stop, checkpoint_seconds=0)
    (saved,) = (folder / "checkpoints").iterdir()
    damage(saved)
    messages = []
    resumed = sweep.sweep(
        SMALL, folder, resume=True, on_event=lambda event: messages.append(event.message)
    )
    assert any("checkpoint" in message and "damaged" in message for message in messages)
    assert table(resumed) == table(whole[1])


def test_a_checkpoint_is_gone_on_from(whole, tmp_path):
    folder, seen = tmp_path / "s", []

    def stop(event):
        if event.progress is not None:
            seen.append(event.progress.step)
        if len(seen) == 3:
            raise Stop

    with pytest.raises(Stop):
        sweep.sweep(SMALL, folder, block_size=2, on_event=stop)
    before, seen[:] = seen[-1], []
    steps = []
    resumed = sweep.sweep(
        SMALL,
        folder,
        resume=True,
        on_event=lambda event: steps.append(event.progress and event.progress.step),
    )
    assert next(step for step in steps if step) > before
    assert table(resumed) == table(whole[1])


def test_failures_stay_where_they_are(monkeypatch, tmp_path):
    cells = grid.Sweep(
        models=("mlp((8,))",),
        defenses=("none", "gaussian_noise(0.1)", "random_mask(0.9999999)"),
        attacks=("inverting_gradients(num_steps=3)",),
        num_victims=2,
    )
    plain = jobs.client

    def client(setting):
        if "gaussian" in setting.key:
            raise_it = lambda *args: (_ for _ in ()).throw(RuntimeError("the client broke"))  # noqa: E731
            return raise_it
        return plain(setting)

    monkeypatch.setattr(jobs, "client", client)
    rows = sweep.sweep(cells, tmp_path / "s").to_pylist()
    by_defense = {
        defense: [row for row in rows if row["defense"] == defense] for defense in cells.defenses
    }
    assert [row["status"] for row in by_defense["none"]] == ["ok", "ok"]
    broken = by_defense["gaussian_noise(0.1)"]
    assert [row["status"] for row in broken] == ["failed", "failed"]
    assert all("the client broke" in row["reason"] and row["psnr"] is None for row in broken)
    for row in by_defense["random_mask(0.9999999)"]:
        assert row["status"] == "ok" and "zeros" in row["reason"]
    assert sweep._status({"found": False, "mse": 0.1, "objective": 0.0})[0] == "not found"
    assert sweep._status({"found": False, "mse": 0.1, "objective": np.inf})[0] == "not finite"
    assert sweep._status({"found": True, "mse": np.nan, "objective": 0.0})[0] == "not finite"
    # A failed block is tried again.
    monkeypatch.setattr(jobs, "client", plain)
    again = sweep.sweep(cells, tmp_path / "s", resume=True).to_pylist()
    assert len(again) == 6
    assert {row["status"] for row in again if row["defense"] == "gaussian_noise(0.1)"} == {"ok"}


def test_options_without_a_meaning_are_refused(tmp_path):
    with pytest.raises(ValueError, match="block_size must be at least 1, got -1"):
        sweep.sweep(SMALL, tmp_path / "s", block_size=-1)
    with pytest.raises(ValueError, match="out must name a folder to resume in"):
        sweep.sweep(SMALL, resume=True)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"defenses": ["gausian_noise(0.1)"]}, "Did you mean 'gaussian_noise'"),
        ({"defenses": ["gaussian_noise(-0.1)"]}, "defense=gaussian_noise"),
        ({"models": ["lenett"]}, "lenet"),
        ({"attacks": ["dlg(steps=3)"]}, "dlg"),
        ({"num_victims": 10_000}, "need 10000 samples"),
        ({"datasets": ["no.npz"]}, "no.npz"),
    ],
)
def test_bad_cells_are_refused_before_anything_is_written(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        sweep.sweep(settings, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_plan_counts_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = plan.plan(SMALL, block_size=2)
    assert (found.cells, found.jobs, found.samples) == (2, 20, 20)
    assert (found.blocks, found.block_size, found.compilations) == (12, 2, 1)
    assert found.run_seconds > 0 and found.compile_seconds > 0
    assert not list(tmp_path.iterdir())


def test_trained_weights_classify_better():
    dataset = invjax.datasets.digits()
    model = jobs.build("mlp((64,))", 10)
    fresh, later = (
        utility.accuracy(model, jobs.trained(model, dataset, steps, 0), dataset)
        for steps in (0, 100)
    )
    assert fresh < 0.3 and later > 0.6


KILLED = """
import sys
from invjax.evaluation import grid, sweep
import tests_sweep
if __name__ == "__main__":
    sweep.sweep(tests_sweep.SMALL, sys.argv[1], resume=sys.argv[2] == "resume", block_size=2,
                checkpoint_seconds=0.0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kills", [20])
def test_a_killed_sweep_resumes_to_the_same_table(whole, tmp_path, kills):
    """SIGKILL at random moments, again and again, until it is done."""
    script = tmp_path / "run.py"
    script.write_text(KILLED)
    (tmp_path / "tests_sweep.py").write_text(
        "from invjax.evaluation import grid\n"
        f"SMALL = grid.from_mapping({grid.as_mapping(SMALL)!r})\n"
    )
    folder, rng = tmp_path / "s", random.Random(0)
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(pathlib.Path(".cache/jax").absolute()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    for _ in range(kills):
        how = "resume" if (folder / "sweep.json").exists() else "begin"
        process = subprocess.Popen([sys.executable, str(script), str(folder), how], env=environment)
        deadline = time.monotonic() + 120
        while not (folder / "journal").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
            if process.poll() is not None:
                break
        time.sleep(rng.uniform(0.0, 3.0) if how == "begin" else rng.uniform(3.0, 9.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
        for entry in journal.read(folder).blocks.values():
            assert entry["status"] == "done"
    resumed = sweep.sweep(SMALL, folder, resume=True)
    assert table(resumed) == table(whole[1])
    assert not [path for path in folder.rglob("*") if "partial" in path.name]
    assert jax.process_count() == 1


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/statm").exists(), reason="reads Linux's accounts")
def test_memory_does_not_grow_with_the_cells(tmp_path):
    cells = grid.Sweep(
        models=tuple(f"mlp(({width},))" for width in range(8, 18)),
        attacks=("bayes(num_steps=5)",),
        num_victims=2,
    )
    megabytes = []

    def measure(event):
        if event.progress is None:
            pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
            megabytes.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)

    sweep.sweep(cells, tmp_path / "s", on_event=measure)
    # A program is about 60 MB, and seven more of them are not kept.
    assert megabytes[-1] - megabytes[3] < 120
