"""A sweep as data: what it spans, what it refuses, and how it is read."""

import collections

import pytest

from invjax.evaluation import grid

SMALL = grid.Sweep(
    models=("mlp((8,))", "lenet"),
    defenses=("none", "gaussian_noise(0.1)"),
    batch_sizes=(1, 4),
    seeds=(0, 3),
    num_victims=13,
)


def test_cells_are_every_combination_once():
    cells = grid.cells(SMALL)
    assert len(cells) == len(set(cells)) == 8
    assert {(cell.model, cell.defense, cell.batch_size) for cell in cells} == {
        (model, defense, size)
        for model in SMALL.models
        for defense in SMALL.defenses
        for size in SMALL.batch_sizes
    }
    names = [cell.name for cell in cells]
    assert len(set(names)) == 8 and all(name.replace("-", "_").isidentifier() for name in names)


@pytest.mark.parametrize("size", [1, 5, 13, 100])
def test_blocks_hold_every_job_once(size):
    jobs = collections.Counter(
        (block.cell, block.seed, victim)
        for block in grid.blocks(SMALL, size)
        for victim in range(block.first, block.first + block.count)
    )
    assert len(jobs) == 8 * 2 * 13 and set(jobs.values()) == {1}
    assert all(1 <= block.count <= size for block in grid.blocks(SMALL, size))
    names = [block.name for block in grid.blocks(SMALL, size)]
    assert len(set(names)) == len(names)


def test_a_cell_is_the_same_in_every_sweep():
    other = grid.Sweep(models=("lenet",), defenses=("gaussian_noise(0.1)",), num_victims=2)
    (cell,) = grid.cells(other)
    assert cell in grid.cells(SMALL)
    identities = [cell.identity for cell in grid.cells(SMALL)]
    assert cell.identity in identities and len(set(identities)) == 8


def test_toml_and_mappings_say_the_same(tmp_path):
    path = tmp_path / "sweep.toml"
    path.write_text(
        """
        models = ["mlp((8,))", "lenet"]
        defenses = ["none", "gaussian_noise(0.1)"]
        batch_sizes = [1, 4]
        seeds = [0, 3]
        num_victims = 13
        datasets = "digits"
        """
    )
    assert grid.from_toml(path) == SMALL
    assert grid.from_mapping(grid.as_mapping(SMALL)) == SMALL
    for preset in grid.PRESETS.values():
        assert grid.from_mapping(grid.as_mapping(preset)) == preset


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"defences": ["none"]}, "Did you mean 'defenses'"),
        ({"seeds": []}, "seeds must name at least one value"),
        ({"seeds": [1, 1]}, "must not repeat"),
        ({"seeds": ["1"]}, "seeds must hold ints"),
        ({"seeds": [True]}, "seeds must hold ints"),
        ({"seeds": [-1]}, "seeds must be at least 0"),
        ({"batch_sizes": [0]}, "batch_sizes must be at least 1"),
        ({"train_steps": [-1]}, "train_steps must be at least 0"),
        ({"num_victims": 0}, "num_victims must be at least 1"),
        ({"num_victims": 2.5}, "num_victims must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"labels": "all"}, "labels must be"),
        ({"attacks": ["dlg("]}, "Cannot read the attack"),
        ({"defenses": [1.0]}, "defenses must hold strs"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        grid.from_mapping(settings)


def test_bad_files_are_named(tmp_path):
    path = tmp_path / "sweep.toml"
    for content in (None, "seeds = [", "sed = 1", b"\xff\xfe"):
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            path.write_text(content)
        with pytest.raises(ValueError, match=r"sweep\.toml"):
            grid.from_toml(path)
