"""What the README shows works as written there. (CI runs its two commands.)"""

import pathlib
import re
import tomllib

import jax
import optax
import pytest

import invjax
from invjax.cli import main
from invjax.evaluation import grid

PAGE = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
SHORT, WHOLE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
(SETTINGS,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)


def test_links_lead_somewhere():
    root = pathlib.Path(__file__).parents[1]
    links = re.findall(r"\]\(([^)#]+)\)", PAGE)
    assert links
    for link in links:
        assert link.startswith("http") or (root / link).exists(), link


def test_every_attack_and_defense_is_named():
    for name in invjax.defenses.__all__:
        if name[0].islower() and hasattr(getattr(invjax.defenses, name), "__code__"):
            parameters = getattr(invjax.defenses, name).__annotations__
            if parameters.get("return") is invjax.Defense and name not in ("chain", "parse"):
                assert f"`{name}`" in PAGE, name
    for name in (
        "tensor.tensor",
        "layerwise",
        "hybrid",
        "strong",
        "spear",
        "row_scan",
        "exclusivity",
    ):
        assert f"`{name}`" in PAGE


def test_the_settings_of_a_sweep_are_some(capsys, tmp_path):
    assert len(grid.cells(grid.from_mapping(tomllib.loads(SETTINGS)))) == 64


def test_what_the_parameters_of_dp_sgd_guarantee(capsys):
    (line,) = re.findall(r"^invjax (privacy .*)$", PAGE, re.MULTILINE)
    assert main(line.split()) == 0
    assert "epsilon" in capsys.readouterr().out


@pytest.mark.slow
def test_python():
    scope = {}
    exec(WHOLE, scope)
    seen = scope["reconstruction"]
    assert seen.inputs.shape == (1, 8, 8, 1)
    scope |= {"defenses": invjax.defenses, "jax": jax, "optax": optax}
    exec(SHORT, scope)
    assert scope["result"].inputs.shape == (1, 8, 8, 1)
    samples = invjax.gradients.per_sample_gradients(scope["model"], scope["params"], scope["batch"])
    state = scope["optimizer"].init(scope["params"])
    updates, _ = scope["optimizer"].update(samples, state, scope["params"])
    assert jax.tree.structure(updates) == jax.tree.structure(scope["params"])
