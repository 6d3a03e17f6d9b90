"""Every benchmark is in `run_all.py`, and the commands beside figures name what is there."""

import importlib.util
import pathlib
import re
import shlex
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"
HELPERS = {"timing.py", "torch_peer.py", "run_all.py", "figure.py"}
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "benchmarks/RESULTS.md")}
SHARED = (FOLDER / "timing.py").read_text()


def commands():
    """Commands in backticks that run something of this repository."""
    for page, text in PAGES.items():
        for found in re.findall(r"`((?:python|pytest|invjax tradeoff) [^`]*)`", text):
            yield pytest.param(found.replace("\n", " "), id=f"{page}: {found[:60]}")


@pytest.fixture
def run_all(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    spec = importlib.util.spec_from_file_location("run_all", FOLDER / "run_all.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("timing", None)


def unknown_options(script, words):
    """Options that neither the script nor what all scripts share adds."""
    text = script.read_text() + SHARED
    given = [word for word in words if re.match(r"--[a-z]", word)]
    return [word for word in given if f'"{word}"' not in text]


def test_every_script_is_in_the_list(run_all):
    scripts = {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.py")}
    listed = {run.script for run in run_all.RUNS.values()} - {"invjax"}
    assert listed == scripts - HELPERS


def test_the_list_has_options_that_there_are(run_all):
    for name, run in run_all.RUNS.items():
        for full in (False, True):
            if (run.full if full else run.quick) is None:
                continue
            words = run_all.command(name, run, full, pathlib.Path("out"), "DATA")
            if run.script == "invjax":
                assert all(pathlib.Path(word).exists() for word in words if word.endswith(".toml"))
            else:
                assert unknown_options(FOLDER / run.script, words) == [], name


@pytest.mark.parametrize("command", list(commands()))
def test_commands_beside_figures_can_be_given(command):
    program, *words = shlex.split(command)
    places = [word for word in words if word.endswith((".py", ".toml")) or "tests/" in word]
    for place in places:
        if not word_is_written(words, place):
            assert (ROOT / place).exists() or (FOLDER / place).exists(), place
    if program == "python":
        (script,) = (FOLDER / place for place in places)
        script = script if script.exists() else ROOT / places[0]
        assert unknown_options(script, words) == []


def word_is_written(words, place):
    """Whether a command writes that file."""
    return words[words.index(place) - 1] in ("--json", "--figure", "--out")
