"""A comparison at equal utility: trainings, the table, resumption, refusals before any work."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import optax
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from invjax import calls, datasets, defenses, files, models
from invjax.evaluation import (
    calibrate,
    families,
    grid,
    store,
    tradeoff,
    tradeoff_settings,
    tradeoff_training,
    utility,
)
from invjax.evaluation.families import Family
from invjax.evaluation.tradeoff_settings import Tradeoff

DIGITS = datasets.digits()
MODEL = models.by_name("mlp(8)", 10)
SMALL = Tradeoff(
    model="mlp(8)",
    defenses=(Family("gaussian_noise(*)", 0.001, 3.0), Family("sign_compress")),
    attacks=("bias_trick", "bayes(num_steps=2)", "hybrid"),
    seeds=(0, 1),
    levels=(0.2,),
    tolerance=0.3,
    grid=3,
    rounds=2,
    steps=60,
    clients=8,
    batch_size=1,
    optimizer="adam(0.02)",
    num_victims=2,
)
PRICE = {"none": 0.0, "gaussian_noise": 0.3, "sign_compress": 0.25}


def stand_ins(patch):
    """Trainings and attacks of known results: the loss of accuracy is `0.3 std / (1 + std)`."""

    def trainer(model, data, defense, **options):
        def train(numbers):
            made = defense(np.ones(numbers.shape[1])).name.split("(")[0]
            lost = PRICE[made] * np.ones(len(numbers))
            if numbers.shape[1]:
                lost = PRICE[made] * numbers[:, 0] / (1 + numbers[:, 0])
            seeds = 0.01 * np.arange(len(options["seeds"]))
            # Twins lose as much, but for a little.
            accuracy = 0.9 - lost[:, None] * (1 + seeds) - seeds
            return utility.Trained(accuracy, 3 - 3 * accuracy)

        return train

    def sweep(settings, folder, **options):
        assert options["resume"] == (folder / "sweep.json").exists()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "sweep.json").write_text(json.dumps(grid.as_mapping(settings)))
        rows = []
        for cell in grid.cells(settings):
            std = sum(calls.numbers(calls.parse(cell.defense, "defense")))
            mse = 1e-9 + 0.01 * std * (2 if cell.attack == "bias_trick" else 1)
            for seed, victim in itertools.product(settings.seeds, range(settings.num_victims)):
                rows.append(
                    cell._asdict()
                    | {"seed": seed, "victim": victim, "status": "ok", "mse": mse * (1 + seed)}
                    | {"psnr": -10 * np.log10(mse), "baseline_mean_psnr": 11.0}
                )
        return pa.Table.from_pylist(rows)

    patch.setattr(utility, "trainer", trainer)
    patch.setattr(tradeoff.engine, "sweep", sweep)


def noise(numbers):
    return defenses.gaussian_noise(numbers[0])


def test_one_client_without_a_defense_is_plain_training():
    data = utility.samples(DIGITS, None, (3,))
    optimizer = optax.adam(1e-2)
    train = utility.trainer(
        MODEL,
        data,
        lambda numbers: defenses.parse("none"),
        seeds=(3,),
        steps=30,
        clients=1,
        batch_size=16,
        optimizer=optimizer,
    )
    found = train(np.zeros((1, 0), np.float32))
    training, held_out = utility.split(DIGITS, seed=3)
    alone = utility.train(
        MODEL, training, held_out, steps=(30,), batch_size=16, optimizer=optimizer, seed=3
    )[0]
    assert found.accuracy.shape == found.loss.shape == (1, 1)
    assert abs(found.accuracy[0, 0] - alone.accuracy) < 0.006
    everything = datasets.take(training, np.arange(len(training)))
    np.testing.assert_allclose(found.loss[0, 0], MODEL.loss(alone.params, everything), rtol=1e-3)


def test_strengths_and_seeds_are_trained_as_if_alone():
    options = {"steps": 10, "clients": 2, "batch_size": 2, "evaluated": 300}
    both = (4, 7)
    data = utility.samples(DIGITS, None, both)
    together = utility.trainer(MODEL, data, noise, seeds=both, **options)(
        np.array([[0.01], [1.0]], np.float32)
    )
    one = utility.trainer(MODEL, utility.samples(DIGITS, None, (7,)), noise, seeds=(7,), **options)
    alone = one(np.array([[1.0]], np.float32))
    np.testing.assert_allclose(together.loss[1, 1], alone.loss[0, 0], rtol=1e-4)
    assert len(np.unique(together.loss)) == 4


@pytest.mark.slow
def test_clients_defend_their_own_gradients():
    # Noise of a fixed deviation averages out over clients: 64 of them learn where one does not.
    data = utility.samples(DIGITS, None, (0,))
    losses = [
        utility.trainer(
            MODEL,
            data,
            noise,
            seeds=(0,),
            steps=40,
            clients=clients,
            batch_size=1,
            optimizer=optax.adam(0.02),
        )(np.array([[0.3]], np.float32)).loss[0, 0]
        for clients in (1, 64)
    ]
    assert losses[1] < losses[0] - 0.3


def test_own_parts_of_a_data_set_are_kept():
    first, second = utility.split(DIGITS, 0.25)
    data = utility.samples(first, second, (0, 1))
    assert data.training.shape == (2, len(first)) and data.held_out.shape == (2, len(second))
    np.testing.assert_array_equal(data.inputs[data.held_out[1]], second.inputs)
    np.testing.assert_array_equal(data.labels[data.training[0]], first.labels)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "tradeoff"
    with pytest.MonkeyPatch.context() as patch:
        stand_ins(patch)
        return folder, tradeoff.tradeoff(SMALL, folder)


def test_the_table_has_a_row_a_family_and_level(whole):
    folder, result = whole
    assert [(row["family"], row["level"]) for row in result.table] == [
        ("gaussian_noise(*)", 0.2),
        ("sign_compress", 0.2),
    ]
    first = result.table[0]
    assert first["status"] == "matched" and abs(first["utility_loss"] - 0.2) <= 0.06
    assert first["defense"] == families.at(SMALL.defenses[0], first["strength"])
    assert abs(first["strength"] / (1 + first["strength"]) - 0.2 / 0.3) < 0.2
    assert 0 < first["utility_loss_error"] < 0.01 and 0.6 < first["accuracy"] < 0.75
    assert result.table[1]["status"] == "matched" and result.table[1]["strength"] is None
    errors = {text: first[f"mse of {text}"] for text in SMALL.attacks}
    assert errors.pop("hybrid") is None
    assert first["mse"] == min(errors.values()) == errors[first["attack"]]
    assert first["mse_error"] > 0 and first["reduce"] == "min"
    assert pq.read_table(folder / "results.parquet").to_pylist() == result.table


def test_the_curve_goes_from_nothing_to_the_strongest(whole):
    result = whole[1]
    points = [point for point in result.curves if point["family"] == "gaussian_noise(*)"]
    strengths = [point["strength"] for point in points]
    assert strengths == sorted(strengths) and {0.001, 3.0} <= set(strengths)
    assert {row["strength"] for row in result.table[:1]} <= set(strengths)
    assert points[0]["utility_loss"] < 0.1 < points[-1]["utility_loss"]
    assert points[0]["mse"] < points[-1]["mse"]
    bare = result.curves[0]
    assert bare["family"] == "none" and bare["utility_loss"] == 0 and bare["mse"] < 1e-6
    np.testing.assert_allclose(result.guess["mse"], 10**-1.1)


def test_what_does_not_apply_is_listed_with_the_reason(whole):
    refused = whole[1].refused
    assert {one["defense"] for one in refused} == {"none", "gaussian_noise(*)", "sign_compress"}
    assert {one["attack"] for one in refused} == {"hybrid"}
    assert all(one["reason"] for one in refused)
    assert whole[1].failed == [] and whole[1].failed_jobs == 0


def kill(event):
    if event.index == 2:
        raise KeyboardInterrupt


def test_a_killed_comparison_resumes_to_the_same_table(whole, tmp_path, monkeypatch):
    stand_ins(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        tradeoff.tradeoff(SMALL, tmp_path / "again", on_event=kill)
    assert tradeoff.read(tmp_path / "again")[2] is None
    trained, real = [], tradeoff.train_family

    def counted(settings, family, undefended):
        trained.append(family.defense)
        return real(settings, family, undefended)

    monkeypatch.setattr(tradeoff, "train_family", counted)
    result = tradeoff.tradeoff(SMALL, tmp_path / "again", resume=True)
    assert trained == ["sign_compress"]
    assert result == whole[1]
    assert tradeoff.read(tmp_path / "again")[2] == result
    # Nothing is left to do; other settings are another comparison.
    assert tradeoff.tradeoff(SMALL, tmp_path / "again", resume=True) == result
    other = dataclasses.replace(SMALL, levels=(0.3,))
    with pytest.raises(store.FolderError, match="levels"):
        tradeoff.tradeoff(other, tmp_path / "again", resume=True)
    with pytest.raises(store.FolderError, match="overwrite"):
        tradeoff.tradeoff(SMALL, tmp_path / "again")
    assert trained == ["sign_compress"]


def test_a_comparison_killed_within_its_attacks_resumes_to_the_same_table(
    whole, tmp_path, monkeypatch
):
    stand_ins(monkeypatch)
    attacked, sweep = [], tradeoff.engine.sweep

    def killed(settings, folder, **options):
        attacked.append(folder.name)
        result = sweep(settings, folder, **options)
        if len(attacked) == 2:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(tradeoff.engine, "sweep", killed)
    with pytest.raises(KeyboardInterrupt):
        tradeoff.tradeoff(SMALL, tmp_path / "again")
    result = tradeoff.tradeoff(SMALL, tmp_path / "again", resume=True)
    assert result == whole[1]
    assert len(attacked) == 5 and attacked[1] == attacked[3]


def test_a_defense_that_no_attack_applies_to_keeps_its_price(tmp_path, monkeypatch):
    stand_ins(monkeypatch)
    result = tradeoff.tradeoff(dataclasses.replace(SMALL, attacks=("hybrid",)), tmp_path / "none")
    assert [row["family"] for row in result.table] == ["gaussian_noise(*)", "sign_compress"]
    assert all(row["mse"] is None and row["attack"] is None for row in result.table)
    assert result.table[0]["status"] == "matched" and result.guess == {}
    assert len(result.refused) == 3


@pytest.mark.slow
def test_trainings_and_attacks_in_earnest(tmp_path):
    first = tradeoff.tradeoff(SMALL, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        tradeoff.tradeoff(SMALL, tmp_path / "again", on_event=kill)
    assert tradeoff.tradeoff(SMALL, tmp_path / "again", resume=True) == first
    row = first.table[0]
    assert row["status"] == "matched" and abs(row["utility_loss"] - 0.2) <= 0.06
    assert 0 < row["utility_loss_error"] < 0.2 and row["mse_error"] > 0
    points = [point for point in first.curves if point["family"] == "gaussian_noise(*)"]
    assert points[0]["mse"] < 1e-3 and points[-1]["mse"] > 0.05
    assert first.curves[0]["mse"] < 1e-6 and 0.05 < first.guess["mse"] < 0.1
    assert first.failed == []


def test_a_training_that_raises_is_listed_and_the_rest_goes_on(whole, tmp_path, monkeypatch):
    stand_ins(monkeypatch)
    # Another family was begun in this folder; overwriting takes its attacks away too.
    settings = dataclasses.replace(SMALL, defenses=SMALL.defenses[::-1])
    real = tradeoff.train_family

    def broken(settings, family, undefended):
        if family.defense == "sign_compress":
            raise RuntimeError("no signs today")
        return real(settings, family, undefended)

    monkeypatch.setattr(tradeoff, "train_family", broken)
    stale = tmp_path / "attacks" / "01-sign_compress" / "sweep.json"
    stale.parent.mkdir(parents=True)
    stale.write_text("{}")
    (tmp_path / "sweep.json").write_text("{}")
    result = tradeoff.tradeoff(settings, tmp_path, overwrite=True)
    assert not stale.exists() and not (tmp_path / "attacks" / "01-sign_compress").exists()
    assert [one["reason"] for one in result.failed] == ["RuntimeError: no signs today"]
    assert [row["family"] for row in result.table] == ["gaussian_noise(*)"]
    assert result.table == whole[1].table[:1]


def diverging(patch, name):
    """Training under one defence ends in a loss that is no number."""
    trainer = utility.trainer

    def broken(model, data, defense, **options):
        train = trainer(model, data, defense, **options)

        def diverge(numbers):
            found = train(numbers)
            bad = name in defense(np.ones(numbers.shape[1])).name
            return found._replace(loss=found.loss * np.nan) if bad else found

        return diverge

    patch.setattr(utility, "trainer", broken)


def test_json_holds_a_training_that_diverged(tmp_path, monkeypatch):
    stand_ins(monkeypatch)
    diverging(monkeypatch, "sign_compress")
    settings = dataclasses.replace(SMALL, utility="loss")
    result = tradeoff.tradeoff(settings, tmp_path / "t")
    row = result.table[1]
    assert row["status"] == "already above"
    assert row["loss"] is row["utility_loss"] is row["utility_loss_error"] is None
    text = (tmp_path / "t" / "results.json").read_text()
    json.loads(text, parse_constant=pytest.fail)
    assert tradeoff.read(tmp_path / "t")[2] == result


def test_a_comparison_with_nothing_is_refused(tmp_path, monkeypatch):
    stand_ins(monkeypatch)
    diverging(monkeypatch, "none")
    with pytest.raises(ValueError, match=r"a lower rate than adam\(0.02\)"):
        tradeoff.tradeoff(SMALL, tmp_path / "t")


def test_the_printed_definition_takes_the_attack_that_errs_most(whole, monkeypatch):
    stand_ins(monkeypatch)
    least = whole[1].table[0]
    most = tradeoff.tradeoff(dataclasses.replace(SMALL, reduce="max")).table[0]
    assert (least["attack"], most["attack"]) == ("bayes(num_steps=2)", "bias_trick")
    assert most["mse"] == most["mse of bias_trick"] == least["mse of bias_trick"] > least["mse"]
    assert most["utility_loss"] == least["utility_loss"]


def test_reconstructions_are_those_of_the_point(whole):
    folder, result = whole
    point = result.table[0]
    assert tradeoff.reconstructions(folder, point) is None
    (cell,) = grid.cells(
        tradeoff_settings.attack_sweep(SMALL, [point["defense"]], [point["attack"]])
    )
    inner = tradeoff.attack_folder(folder, 1, SMALL.defenses[0])
    arrays = dict(zip("xy", np.random.default_rng(0).random((2, 4, 1, 8, 8, 1)), strict=True))
    content = store.npz(truth=arrays["x"], reconstruction=arrays["y"], labels=np.zeros(4))
    files.write_atomic(inner / "reconstructions" / f"{cell.name}.npz", content)
    found = tradeoff.reconstructions(folder, point)
    assert set(found) == {"truth", "reconstruction"}
    np.testing.assert_array_equal(found["truth"], arrays["x"][:, 0])
    np.testing.assert_array_equal(found["reconstruction"], arrays["y"][:, 0])
    assert tradeoff.reconstructions(folder, point | {"attack": "bias_trick"}) is None
    assert tradeoff.reconstructions(folder, point | {"attack": None}) is None
    with pytest.raises(ValueError, match=r"family must be one of none, gaussian_noise\(\*\)"):
        tradeoff.reconstructions(folder, point | {"family": "clip"})


def test_settings_survive_json_and_toml(tmp_path):
    for settings in (SMALL, *tradeoff_settings.PRESETS.values()):
        stored = json.loads(json.dumps(tradeoff_settings.as_mapping(settings)))
        assert tradeoff_settings.from_mapping(stored) == settings
    path = tmp_path / "mine.toml"
    path.write_text(
        'defenses = ["soteria", "sign_compress", {defense = "quantize(*)", weak = 6, strong = 3}]\n'
        'levels = 0.05\nseeds = [1, 2]\nutility = "loss"\n'
    )
    read = tradeoff_settings.from_toml(path)
    assert [family.defense for family in read.defenses] == [
        "soteria(*)", "sign_compress", "quantize(*)",
    ]  # fmt: skip
    assert read.levels == (0.05,) and read.utility == "loss" and families.is_whole(read.defenses[2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"defenses": ["none"]}, "without 'none'"),
        ({"defenses": ["sign_compress", "sign_compress"]}, "different"),
        ({"levels": [0.0]}, "positive"),
        ({"levels": [float("nan")]}, "positive"),
        ({"levels": [1.5]}, "below 1"),
        ({"attacks": ["bayes(num_stepz=2)"]}, "num_stepz"),
        ({"levels": []}, "one at least"),
        ({"seeds": ["a"]}, "ints"),
        ({"grid": 1}, "grid must be at least 2"),
        ({"utility": "f1"}, "utility"),
        ({"reduce": "mean"}, "reduce"),
        ({"optimizer": "adma(0.1)"}, "Did you mean 'adam'"),
        ({"attacks": ["bays"]}, "Did you mean 'bayes'"),
        ({"level": 0.1}, "Did you mean 'levels'"),
        ({"defenses": [{"defense": "dp_sgd(*, 1.0)", "weak": 1.0, "strong": -1.0}]}, "positive"),
        ({"defenses": [{"defense": "random_mask(*)", "weak": 0.5, "strong": 2.0}]}, "random_mask"),
        ({"model": "mpl"}, "mlp"),
        ({"num_victims": 5000}, "5000"),
    ],
)
def test_bad_settings_are_refused_before_any_work(tmp_path, changes, message):
    folder = tmp_path / "none"
    with pytest.raises(ValueError, match=message):
        tradeoff.tradeoff(tradeoff_settings.as_mapping(SMALL) | changes, folder)
    assert not folder.exists()


def test_matches_are_read_off_the_rows():
    rows = [
        {"strength": strength, "seed": seed, "utility_loss": cost + 0.01 * seed}
        for strength, cost in ((0.01, 0.0), (0.1, 0.195), (1.0, 0.6))
        for seed in (0, 1)
    ]
    settings = dataclasses.replace(SMALL, levels=(0.2, 0.7))
    found = tradeoff_training.matches(settings, SMALL.defenses[0], rows)
    assert found == {0.2: calibrate.Match(0.1, "matched"), 0.7: calibrate.Match(1.0, "matched")}
    chosen = tradeoff_training.attacked_strengths(settings, SMALL.defenses[0], rows)
    assert chosen == [0.001, 0.05477, 0.1, 1.0, 3.0]


def test_the_attacked_gradient_is_the_one_that_is_trained_with():
    swept = tradeoff_settings.attack_sweep(SMALL, ["gaussian_noise(0.1)"], SMALL.attacks[:1])
    (cell,) = grid.cells(swept)
    assert cell.batch_size == SMALL.batch_size and cell.train_steps == 0
    assert swept.seeds == SMALL.seeds and jax.process_count() == 1
