"""`invjax tradeoff`: as a user runs it."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from invjax import cli
from invjax.evaluation import tradeoff as engine
from invjax.evaluation import utility

TOML = """
model = "mlp(8)"
defenses = [{defense = "gaussian_noise(*)", weak = 0.01, strong = 1.0}]
attacks = "bias_trick"
seeds = 0
levels = 0.2
grid = 2
rounds = 1
steps = 20
clients = 2
batch_size = 1
num_victims = 2
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.toml"
    path.write_text(TOML)
    return path


def trainer(*_, seeds, **__):
    """Training that loses 20 points under any strength, and none without a defence."""

    def train(numbers):
        accuracy = 0.9 - 0.2 * numbers.shape[1] * np.ones((len(numbers), len(seeds)))
        return utility.Trained(accuracy, 1 - accuracy)

    return train


def test_a_comparison_and_its_report(file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(utility, "trainer", trainer)
    assert cli.main(["tradeoff", str(file)]) == 0
    folder = tmp_path / "invjax-runs" / "tradeoff-mine"
    output = capsys.readouterr().out
    assert "1 rows" in output and "report.html" in output
    assert pq.read_table(folder / "results.parquet").num_rows == 1
    assert len(json.loads((folder / "results.json").read_text())["table"]) == 1
    page = (folder / "report.html").read_text()
    assert "invjax tradeoff --resume --out" in page and page.count("<img ") == 2
    assert "2 of 2: gaussian_noise(*)" in (folder / "tradeoff.log").read_text()
    # Again without --resume is refused; with it nothing is left to do.
    assert cli.main(["tradeoff", str(file)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    (folder / "report.html").unlink()
    assert cli.main(["tradeoff", "--resume", "--out", str(folder), "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == ""
    assert (folder / "report.html").exists()


def test_an_interruption_and_a_full_disk(file, monkeypatch, capsys):
    def stop(error):
        def tradeoff(*_, **__):
            raise error

        return tradeoff

    monkeypatch.setattr(engine, "tradeoff", stop(KeyboardInterrupt()))
    assert cli.main(["tradeoff", str(file)]) == 130
    assert "--resume" in capsys.readouterr().err
    monkeypatch.setattr(engine, "tradeoff", stop(OSError(28, "No space left on device")))
    assert cli.main(["tradeoff", str(file)]) == 1
    assert "No space left" in capsys.readouterr().err


def test_failures_are_the_exit_code(file, monkeypatch, capsys):
    failed = [{"defense": "a", "attack": "training", "reason": "no <client> today"}]
    result = engine.Result([], [], {}, [], failed, 3)
    monkeypatch.setattr(engine, "tradeoff", lambda *_, **__: result)
    monkeypatch.setattr("invjax.cli.tradeoff.write_report", lambda folder: folder / "report.html")
    assert cli.main(["tradeoff", str(file)]) == 14
    assert "4 jobs failed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--preset"),
        (["mine.toml", "--preset", "digits"], "--preset"),
        (["--preset", "digit"], "Did you mean 'digits'"),
        (["none.toml"], "none.toml"),
        (["--resume", "--out", "nowhere"], "holds no comparison"),
        (["mine.toml", "--resume"], "resume"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(file, tmp_path, options, message, capsys):
    assert cli.main(["tradeoff", *options]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine.toml"]
