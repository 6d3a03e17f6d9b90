"""The command line: its folder, its report, and what it says to bad input."""

import json
import os
import runpy
import shlex
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

import invjax
from invjax import cli
from invjax.evaluation import store

# A shell's background jobs ignore SIGINT, and hand that down.
HEARING = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from invjax import cli; cli.entry()"
)

QUICK = ["attack", "--model", "mlp(8)", "--num-victims", "2", "--restarts", "1", "--steps", "5"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "first"
    # Another test's folder must not become the cache of the whole session.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.abspath(".cache/jax")
    assert (
        cli.main([*QUICK, "--batch-size", "2", "--defense", "gaussian(0.01)", "--out", str(out)])
        == 0
    )
    return out


def test_a_closed_form_has_no_objective_to_draw(tmp_path):
    options = "attack --attack bias_trick --model mlp(8) --num-victims 1 --out"
    assert cli.main([*options.split(), str(tmp_path / "run")]) == 0
    assert [path.name for path in (tmp_path / "run" / "figures").iterdir()] == ["comparison.png"]
    assert "<h2>Objective" not in (tmp_path / "run" / "report.html").read_text()


def test_folder(run):
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert files == {
        "results.parquet",
        "reconstructions.npz",
        "settings.json",
        "report.html",
        "figures/comparison.png",
        "figures/objective.png",
    }
    assert [path.name for path in run.parent.iterdir()] == ["first"]
    rows = pq.read_table(run / "results.parquet").to_pylist()
    assert len(rows) == 4
    assert rows[3]["victim"] == 1 and rows[3]["sample"] == 1
    assert rows[0]["defense"] == "gaussian_noise(0.01)" and rows[0]["invjax"] == invjax.__version__
    assert rows[0]["num_victims"] == 2 and rows[0]["weights"] is None
    assert not any(row["interrupted"] for row in rows)
    with np.load(run / "reconstructions.npz") as arrays:
        assert arrays["truth"].shape == arrays["reconstruction"].shape == (2, 2, 8, 8, 1)
        error = np.mean((arrays["truth"] - arrays["reconstruction"]) ** 2, axis=(2, 3, 4))
    np.testing.assert_allclose(error.ravel(), [row["mse"] for row in rows], rtol=1e-4)
    assert json.loads((run / "settings.json").read_text())["settings"]["model"] == "mlp(8)"


def test_report_is_self_contained(run):
    page = (run / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "http" not in page.replace("http-equiv", "")
    assert "--defense &#x27;gaussian(0.01)&#x27;" in page
    assert "grey" in page and "mean image" in page


def test_the_reported_command_repeats_the_run(run, tmp_path):
    config = cli.AttackConfig(
        model="mlp(8)",
        num_victims=2,
        restarts=1,
        steps=5,
        batch_size=2,
        defense=("gaussian(0.01)",),
    )

    argv = shlex.split(cli.command(config))[1:]
    assert cli.main([*argv, "--out", str(tmp_path / "again")]) == 0
    with (
        np.load(run / "reconstructions.npz") as first,
        np.load(tmp_path / "again" / "reconstructions.npz") as second,
    ):
        np.testing.assert_allclose(first["reconstruction"], second["reconstruction"], atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dataset", "digit"], "Did you mean 'digits'"),
        (["--dataset", "mnist"], "data_dir"),
        (["--model", "lenett"], "Did you mean 'lenet'"),
        (["--defense", "gausian(1)"], "Did you mean 'gaussian_noise'"),
        (["--defense", "gaussian(-1)"], "std"),
        (["--defense", "clp(1.0)"], "Did you mean 'clip_per_sample'"),
        (["--defense", "clip(norm=1.0)"], "takes clip_norm, not 'norm'. Did you mean 'clip_norm'"),
        (["--attack", "dgl"], "Did you mean 'dlg'"),
        (["--attack", "dlg(speed=3)"], "speed"),
        (["--attack", "row_scan"], "must be fully connected, got a layer conv"),
        (["--batch-size", "0"], "--batch-size"),
        (["--num-victims", "5000"], "1797"),
        (["--restarts", "0"], "--restarts"),
        (["--steps", "0"], "--steps"),
        (["--seed", "-1"], "--seed"),
        (["--weights", "nowhere.npz"], "nowhere.npz"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(options, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["attack", *options]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_what_an_attack_refuses_late_is_one_line_too(tmp_path, capsys, monkeypatch):
    def refuse(*_):
        raise ValueError("observation.gradient must be finite")

    monkeypatch.setattr(cli.attack.run, "attack_victims", refuse)
    assert cli.main([*QUICK, "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "invjax attack: observation.gradient must be finite\n"


def test_vectors_need_an_mlp(tmp_path, capsys):
    path = tmp_path / "vectors.npz"
    np.savez(path, x=np.random.default_rng(0).random((9, 5), np.float32), y=np.arange(9) % 3)
    assert cli.main(["attack", "--dataset", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "vectors" in capsys.readouterr().err
    assert cli.main([*QUICK, "--dataset", str(path), "--out", str(tmp_path / "out")]) == 0


def test_existing_folder(run, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    assert cli.main([*QUICK, "--out", str(out)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert cli.main([*QUICK, "--out", str(out), "--overwrite"]) == 0
    assert (out / "mine.txt").read_text() == "keep" and (out / "report.html").exists()
    assert cli.main([*QUICK, "--out", str(out / "mine.txt")]) == 2
    assert "not a folder" in capsys.readouterr().err


def test_full_disk_leaves_nothing(tmp_path, capsys, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", full)
    assert cli.main([*QUICK, "--out", str(tmp_path / "out")]) == 1
    assert "No space left" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_default_folder_is_new(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = cli.AttackConfig()
    first = cli.default_folder(config)
    assert str(first) == "invjax-runs/attack-digits-lenet-dlg-seed0"
    first.mkdir(parents=True)
    (first / "x").write_text("")
    assert cli.default_folder(config).name == "attack-digits-lenet-dlg-seed0-2"


def test_weights_are_used(tmp_path):
    model = invjax.models.mlp((8,))
    params = model.init(jax.random.key(9), (8, 8, 1))
    path = tmp_path / "weights.npz"
    invjax.models.save_params(path, params)
    config = cli.AttackConfig(model="mlp(8)", weights=path, out=tmp_path / "out")
    experiment, _ = cli.prepare(config)
    jax.tree.map(np.testing.assert_array_equal, experiment.params, params)


def test_the_package_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["invjax"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("invjax", run_name="__main__")
    assert "usage: invjax COMMAND" in capsys.readouterr().out


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"invjax {invjax.__version__}, jax {jax.__version__}\n"


def test_help(capsys):
    assert cli.main([]) == 0
    assert "invjax attack" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["attack", "--help"])
    assert exit_info.value.code == 0
    assert "--num-victims" in capsys.readouterr().out
    assert cli.main(["atack"]) == 2
    assert "Did you mean 'attack'" in capsys.readouterr().err


def test_interruption_writes_what_was_finished(tmp_path):
    out = tmp_path / "out"
    command = [*QUICK[:-1], "3000000", "--attack", "inverting_gradients", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", HEARING, *command],
        stdout=subprocess.PIPE,
        env={**os.environ, "XLA_FLAGS": ""},
        text=True,
    )
    # Plain lines tell of every tenth; with so many steps only the first call's compilation shows.
    deadline = time.time() + 120
    while time.time() < deadline and "attacking" not in (process.stdout.readline() or "attacking"):
        pass
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    started = time.time()
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130, output
    assert time.time() - started < 15
    rows = pq.read_table(out / "results.parquet").to_pylist()
    assert len(rows) == 2 and all(row["interrupted"] for row in rows)
    assert "Interrupted" in output
