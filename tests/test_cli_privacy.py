"""`invjax privacy`: its table, what it says of it, and what it says to bad input."""

import numpy as np
import pytest

from invjax.cli import privacy as command
from invjax.cli.privacy import ORDERS, privacy
from invjax.defenses import privacy_spent
from invjax.theory import accounting, fisher
from invjax.theory.baselines import kappa_ball, kappa_sphere
from invjax.theory.blowup import blowup
from invjax.theory.rero import gamma_dp, gamma_rdp, gamma_zcdp

BASE = {"num-samples": 500, "batch-size": 50, "steps": 20, "noise-multiplier": 1.5}


def options(**changes):
    chosen = {**BASE, **{name.replace("_", "-"): value for name, value in changes.items()}}
    return [part for name, value in chosen.items() for part in (f"--{name}", str(value))]


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "240")

    def go(code=0, **changes):
        assert privacy(options(**changes)) == code
        return capsys.readouterr()

    return go


def rows(text):
    """Both numbers of every row."""
    found = {}
    for line in text.splitlines():
        cells = line.rsplit(maxsplit=2)
        if len(cells) == 3 and all(cell == "-" or cell[0].isdigit() for cell in cells[1:]):
            found[cells[0].strip()] = [None if cell == "-" else float(cell) for cell in cells[1:]]
    return found


def test_uniform_prior(run):
    text = run(records=4).out
    found = rows(text)
    epsilon = privacy_spent(1.5, 500, 50, 20, 1e-5)
    assert found["epsilon at delta = 1e-05"] == [pytest.approx(epsilon, rel=1e-3), None]
    assert found["success of a blind guess (kappa)"] == [0.25, 0.25]
    exact = [float(blowup(0.25, 1.5, 0.1, 20, inclusion=kind)) for kind in ("hidden", "revealed")]
    assert found["success of any reconstruction, at most"] == pytest.approx(exact, rel=1e-3)
    naive = min(gamma_dp(0.25, epsilon, 1e-5), 1)
    assert found["looser, kappa e^epsilon + delta"][0] == pytest.approx(naive, rel=1e-3)
    zcdp = gamma_zcdp(0.25, 20 / 4.5)
    assert found["looser, by zCDP"] == pytest.approx([zcdp, zcdp], rel=1e-3)
    assert exact[0] < found["looser, by Renyi divergences"][0] < 1
    worst, unbiased = (
        found["mean square error, at least (worst record)"],
        found["of unbiased attacks, at least (any record)"],
    )
    assert 0.25 > worst[0] > worst[1] and unbiased[0] > unbiased[1]
    for words in (
        "500 samples, noise multiplier 1.5",
        "the right one of 4 records",
        "The prior is the population's",
        "Hidden: nobody learns which steps took the record",
        "shuffled or fixed batches are not covered",
        "(add or remove)",
        "(replace)",
    ):
        assert words in text
    assert "dFIL" not in text


def test_other_priors(run):
    full = {"batch_size": 500, "noise_multiplier": 5}
    for prior, kappa in (("sphere", kappa_sphere(0.5, 30)), ("ball", kappa_ball(0.5, 30))):
        text = run(prior=prior, dimension=30, eta=0.5, **full).out
        found = rows(text)
        assert found["success of a blind guess (kappa)"][0] == pytest.approx(kappa, rel=1e-3)
        bound = float(blowup(kappa, 5, 1.0, 20))
        assert found["success of any reconstruction, at most"] == pytest.approx([bound] * 2, 1e-3)
        assert f"uniform prior on a {prior}" in text
    text = run(kappa=0.01, **full).out
    assert rows(text)["success of a blind guess (kappa)"] == [0.01, 0.01]
    assert "blind probability was given" in text


def test_looser_bounds(run):
    """At much noise, where none of them is 1, and by delta's share."""
    found = rows(run(noise_multiplier=20, delta=0.01, records=10).out)
    assert found["looser, by zCDP"][0] == pytest.approx(gamma_zcdp(0.1, 20 / 800), rel=1e-3)
    epsilon = privacy_spent(20.0, 500, 50, 20, 0.01)
    naive = 0.1 * np.exp(epsilon) + 0.01
    assert found["looser, kappa e^epsilon + delta"][0] == pytest.approx(naive, rel=1e-3)
    unbiased = found["of unbiased attacks, at least (any record)"]
    kinds = "hidden", "revealed"
    spent = [accounting.renyi_two_replacement(20.0, 0.1, 20, kind) for kind in kinds]
    exact = [float(fisher.rdp_mse(value, np.ones(1))) for value in spent]
    assert unbiased == pytest.approx(exact, rel=1e-3)


def test_success_is_the_least_of_the_bounds(run, monkeypatch):
    success = "success of any reconstruction, at most"
    found = rows(run(kappa=1e-15, noise_multiplier=3).out)
    renyi = gamma_rdp(1e-15, accounting.renyi_divergences(3.0, 0.1, 20, ORDERS), ORDERS)
    assert renyi < blowup(1e-15, 3.0, 0.1, 20)
    assert found[success][0] == found["looser, by Renyi divergences"][0]
    assert found[success][0] == pytest.approx(renyi, rel=1e-3)
    monkeypatch.setattr(command, "blowup", lambda *args, inclusion="hidden": 1.0)
    monkeypatch.setattr(command.rero, "gamma_rdp", lambda *args: 1.0)
    found = rows(run(noise_multiplier=20).out)
    assert found[success][0] == found["looser, kappa e^epsilon + delta"][0] < 0.2


def test_radius_and_dimension(run):
    setting = {"batch_size": 500, "noise_multiplier": 5, "eta": 0.5}
    blind = "success of a blind guess (kappa)"
    found = rows(run(prior="ball", dimension=3, radius=2, **setting).out)
    assert found[blind][0] == pytest.approx(1 / 64, rel=1e-3)
    images = {"dataset": "digits", "model": "mlp(4)", "num_victims": 1}
    config = command.PrivacyConfig(9, 3, 2, 1.0, prior="ball", dimension=3, eta=0.5, **images)
    assert command.prepare(config)[0] == pytest.approx(1 / 8)


def test_fisher_information(run):
    changes = {"dataset": "digits", "model": "mlp(4)", "num_victims": 2, "clip_norm": 0.5}
    text = run(prior="ball", eta=0.1, **changes).out
    found = rows(text)
    assert found["success of a blind guess (kappa)"][0] == pytest.approx(0.1**64, rel=1e-3)
    hidden, revealed = found["dFIL at initialisation, median"]
    config = command.PrivacyConfig(
        500, 50, 20, 1.5, dataset="digits", model="mlp(4)", num_victims=2
    )
    information = command._information(config)
    step = fisher.dp_sgd_step(*information, clip_norm=0.5, noise_multiplier=1.5)
    assert revealed == pytest.approx(20 * 0.1 * np.median(step.dfil), rel=1e-3)
    assert 0 < hidden <= revealed <= found["largest"][1]
    least = found["mean square error of unbiased attacks on it, at least"]
    assert least == pytest.approx([1 / value for value in found["largest"]], rel=2e-3)
    assert "smooth clipping" in text


def test_hardly_any_noise_is_accounted_for_quickly(run):
    text = run(noise_multiplier=0.1).out
    assert "by Renyi divergences" in text.splitlines()[4]
    found = rows(text)
    assert found["success of any reconstruction, at most"][0] <= 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 501}, "--batch-size must be at most --num-samples, got 501 and 500"),
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"noise_multiplier": 0}, "--noise-multiplier must be positive, got 0.0"),
        ({"noise_multiplier": 1e200}, "--noise-multiplier must lie between 0.0001 and 1e+08"),
        ({"noise_multiplier": 1e-200}, "--noise-multiplier must lie between 0.0001 and 1e+08"),
        ({"noise_multiplier": "nan"}, "--noise-multiplier must be positive"),
        ({"clip_norm": -1}, "--clip-norm must be positive"),
        ({"delta": 0}, "--delta must lie between 0 and 1, got 0.0"),
        ({"kappa": 1.5}, "--kappa must lie between 0 and 1"),
        ({"kappa": 0.1, "prior": "uniform"}, "--kappa stands in place of --prior"),
        ({"kappa": 0.1, "records": 3}, "--kappa stands in place of --prior, got --records"),
        ({"kappa": 0.1, "eta": 0.1}, "--kappa stands in place of --prior, got --eta"),
        ({"kappa": 0.1, "radius": 1}, "--kappa stands in place of --prior, got --radius"),
        ({"dimension": 3}, "--dimension needs --prior sphere or ball"),
        ({"prior": "uniform", "radius": 3}, "--radius needs --prior sphere or ball"),
        (
            {"prior": "sphere", "dimension": 3, "eta": 0.1, "records": 7},
            "--records is of the uniform prior, got --prior sphere",
        ),
        ({"records": 0}, "--records must be at least 1"),
        ({"eta": 0.1}, "--eta needs --prior sphere or ball"),
        ({"prior": "ball", "eta": 0.1}, "--prior ball needs --dimension and --eta"),
        ({"prior": "sphere", "dimension": 3}, "--prior sphere needs --dimension and --eta"),
        ({"prior": "ball", "dimension": 3, "eta": 0}, "--eta must be positive"),
        ({"prior": "ball", "dimension": 0, "eta": 1}, "--dimension must be at least 1"),
        ({"dataset": "digits"}, "--dataset and --model go together"),
        ({"dataset": "digitz", "model": "mlp"}, "digitz"),
        ({"dataset": "digits", "model": "mlq"}, "Did you mean 'mlp'"),
        ({"dataset": "digits", "model": "mlp", "num_victims": 9999}, "--num-victims must be at"),
        ({"seed": -1}, "--seed must be at least 0"),
    ],
)
def test_bad_input_is_one_line(changes, words, run):
    error = run(code=2, **changes).err
    assert words in error and error.count("\n") == 1 and error.startswith("invjax privacy: ")


@pytest.mark.parametrize("extra", [[], [*options(), "--speed", "3"], [*options(), "--prior", "x"]])
def test_unknown_options(extra):
    with pytest.raises(SystemExit) as info:
        privacy(extra)
    assert info.value.code == 2
