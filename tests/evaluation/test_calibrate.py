"""Calibration against utilities with a known inverse, families of defences, the strongest of attacks."""

import importlib

import numpy as np
import pytest

from invjax import defenses, models
from invjax.evaluation import calibrate, families, strongest
from invjax.evaluation.families import FAMILIES, Family

NOISE = Family("gaussian_noise(*)", 1e-3, 10.0)
REST = Family("magnitude_prune(*)", 0.1, 0.999, "rest")
BITS = Family("quantize(*)", 8, 2, "linear")
CLIP = Family("clip_per_sample(*)", 10.0, 0.01)
MODEL = models.by_name("mlp(4)", 10)


def search(cost, family, levels, share=0.1, count=6, rounds=4):
    """Calibrate against a function, and how many strengths were asked for a round."""
    asked = []

    def measure(strengths):
        asked.append(len(strengths))
        return {one: cost(one) for one in strengths}

    def tolerance(level):
        return share * level

    found = calibrate.calibrate(measure, family, levels, tolerance, count=count, rounds=rounds)
    return {one: calibrate.match(family, found, one, tolerance(one)) for one in levels}, asked


@pytest.mark.parametrize(
    ("family", "cost", "inverse"),
    [
        (NOISE, lambda s: s / (1 + s), lambda u: u / (1 - u)),
        (CLIP, lambda s: 0.01 / s, lambda u: 0.01 / u),
        (REST, lambda s: 0.01 / (1 - s), lambda u: 1 - 0.01 / u),
    ],
    ids=["growing", "falling", "shares"],
)
def test_the_strength_of_a_level_is_the_inverse(family, cost, inverse):
    levels = (0.02, 0.1, 0.4)
    found, asked = search(cost, family, levels)
    assert asked[0] == 6 and max(asked) <= 6 and len(asked) <= 5
    for level, one in found.items():
        assert one.status == "matched"
        assert abs(cost(one.strength) - level) <= 0.1 * level
        places = [families.position(family, value) for value in (one.strength, inverse(level))]
        assert abs(places[0] - places[1]) < 0.02


def test_a_utility_that_jumps_over_a_level_has_a_nearest_strength():
    found, asked = search(lambda s: 0.015 if s < 0.3 else 0.9, NOISE, (0.2, 0.7), rounds=2)
    assert found[0.2].status == found[0.7].status == "nearest" and len(asked) == 3
    assert found[0.2].strength < 0.3 < found[0.7].strength


def test_a_tight_tolerance_takes_more_rounds_and_gets_there():
    found, asked = search(lambda s: s / (1 + s), NOISE, (0.1,), share=0.001, count=4, rounds=8)
    assert found[0.1].status == "matched" and len(asked) > 3
    assert abs(found[0.1].strength - 1 / 9) < 2e-4


def test_levels_out_of_reach_are_said_to_be():
    found, asked = search(lambda s: 0.05 + 0.01 * s, NOISE, (0.01, 0.5))
    assert found[0.01] == calibrate.Match(1e-3, "already above")
    assert found[0.5] == calibrate.Match(10.0, "not reached")
    assert asked == [6]


def test_whole_strengths_are_the_nearest():
    cost = {8: 0.0, 7: 0.01, 6: 0.02, 5: 0.04, 4: 0.1, 3: 0.3, 2: 0.8}
    found, asked = search(cost.__getitem__, BITS, (0.02, 0.06, 0.3), count=4)
    assert found[0.02] == calibrate.Match(6, "matched")
    assert found[0.06] == calibrate.Match(5, "nearest")
    assert found[0.3] == calibrate.Match(3, "matched")
    assert all(type(one.strength) is int for one in found.values()) and sum(asked) <= 7


def test_a_single_point_is_matched_only_where_it_stands():
    single = Family("sign_compress")
    found, asked = search(lambda s: 0.1, single, (0.05, 0.1, 0.2))
    assert [one.status for one in found.values()] == ["already above", "matched", "not reached"]
    assert all(one.strength is None for one in found.values()) and asked == [1]


def test_a_lucky_measurement_is_not_taken():
    # 0.01 happens to cost 0.1 although all around it cost nothing; the crossing is at 1.
    measured = {
        0.001: 0.0,
        0.01: 0.1,
        0.03: 0.0,
        0.1: 0.0,
        0.3: 0.0,
        0.9: 0.09,
        3.0: 0.3,
        10.0: 0.6,
    }
    assert calibrate.match(NOISE, measured, 0.1, 0.02) == calibrate.Match(0.9, "matched")


def test_noise_does_not_lead_astray():
    rng = np.random.default_rng(0)
    memory = {}

    def cost(s):
        return memory.setdefault(s, s / (1 + s) + 0.005 * rng.normal())

    found, _ = search(cost, NOISE, (0.05, 0.2), share=0.2)
    for level, one in found.items():
        assert one.status == "matched" and abs(one.strength / (1 + one.strength) - level) < 0.02


def test_a_training_that_diverged_costs_very_much():
    found, _ = search(lambda s: s if s < 1 else np.nan, NOISE, (0.2,))
    assert found[0.2].status == "matched" and abs(found[0.2].strength - 0.2) <= 0.02


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_families_can_be_read_at_both_ends(family):
    known = importlib.import_module("invjax.defenses.parse")
    names = set(known._KNOWN)
    assert names <= set(FAMILIES), "a defence without a default family"
    if family.defense.split("(")[0] not in names:
        pytest.skip("a defence that cannot be named yet")
    for strength in (family.weak, family.strong):
        defenses.parse(families.at(family, strength), MODEL)
    for place in (0.0, 0.3, 0.77, 1.0) if family.weak is not None else ():
        strength = families.strength(family, place)
        slack = 0.5 / (family.weak - family.strong) if families.is_whole(family) else 1e-3
        assert abs(families.position(family, strength) - place) <= abs(slack) + 1e-9
        assert families.strength(family, families.position(family, strength)) == strength


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("gausian_noise", "Did you mean 'gaussian_noise'"),
        ("gaussian_noise(*)", "weak and strong"),
        ({"defense": "gaussian_noise(0.1)", "weak": 1.0, "strong": 2.0}, "one '*'"),
        ({"defense": "gaussian_noise(*)", "weak": 1.0, "strong": 1.0}, "two finite numbers"),
        ({"defense": "gaussian_noise(*)", "weak": 0.1, "strong": np.inf}, "two finite numbers"),
        ({"defense": "gaussian_noise(*)", "weak": 0.0, "strong": 1.0}, "positive"),
        ({"defense": "gaussian_noise(*)", "weak": 0.1, "strong": 1.0, "scale": "rest"}, "rest"),
        ({"defense": "gaussian_noise(*)", "weak": 0.1, "strong": 1.0, "scale": "cubic"}, "cubic"),
        ({"defense": "gaussian_noise(*)", "low": 0.1}, "Unknown setting 'low'"),
        ({"weak": 0.1}, "A defense must be"),
        (3, "A defense must be"),
    ],
)
def test_what_is_no_family_is_refused(entry, message):
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        families.read(entry)


def test_the_strongest_attack_is_the_one_that_errs_least():
    errors = {"a": np.array([0.3, 0.5, 0.4]), "b": np.array([0.1, 0.2, 0.3])}
    name, mean, bar = strongest.strongest(errors)
    assert name == "b" and np.isclose(mean, 0.2)
    # Where one attack always wins the jackknife is the standard error of its mean.
    assert np.isclose(bar, np.std(errors["b"], ddof=1) / np.sqrt(3))
    assert strongest.strongest(errors, "max")[:2] == ("a", pytest.approx(0.4))
    assert strongest.strongest({"a": np.array([0.3])}) == ("a", 0.3, None)


def test_the_bar_holds_the_noise_of_the_choice():
    # b wins by one seed; without it a does.
    errors = {"a": np.array([0.2, 0.2, 0.2]), "b": np.array([0.0, 0.25, 0.25])}
    name, mean, bar = strongest.strongest(errors)
    assert name == "b" and np.isclose(mean, 1 / 6)
    without = np.array([0.2, 0.125, 0.125])
    assert np.isclose(bar, np.sqrt(2 / 3 * np.square(without - without.mean()).sum()))


def row(attack, seed, victim, status="ok", mse=0.01, psnr=20.0, guess=10.0):
    return {
        "defense": "d", "attack": attack, "seed": seed, "victim": victim, "status": status,
        "reason": "because", "mse": mse, "psnr": psnr, "baseline_mean_psnr": guess,
    }  # fmt: skip


def test_what_an_attack_left_out_is_not_to_its_credit():
    rows = [row("a", seed, victim) for seed in (0, 1) for victim in (0, 1)]
    rows += [row("b", 0, 0, mse=0.0, psnr=np.inf), row("b", 0, 1, "not finite", np.nan, np.nan)]
    rows += [row("b", 1, 0, mse=0.0, psnr=np.inf), row("b", 1, 1, "not finite", np.nan, np.nan)]
    found = strongest.errors(rows, 1.0)
    np.testing.assert_allclose(found.by_defense["d"]["a"]["mse"], [0.01, 0.01])
    # Half exact, half the mean image's 0.1.
    np.testing.assert_allclose(found.by_defense["d"]["b"]["mse"], [0.05, 0.05])
    np.testing.assert_allclose(found.by_defense["d"]["b"]["psnr"], [55.0, 55.0])
    assert found.guess["mse"] == pytest.approx(0.1) and found.guess["psnr"] == pytest.approx(10.0)
    assert found.failed == [] and found.failed_jobs == 0


def test_an_attack_that_raised_has_no_error():
    failed = row("b", 1, 0, "failed")
    del failed["mse"], failed["psnr"], failed["baseline_mean_psnr"]
    found = strongest.errors([row("a", 0, 0), row("b", 0, 0), failed], 1.0)
    assert list(found.by_defense["d"]) == ["a"]
    assert found.failed == [{"defense": "d", "attack": "b", "reason": "because"}]
    assert found.failed_jobs == 1
    said = strongest.summary(found.by_defense["d"], ("a", "b"), "min")
    assert said["attack"] == "a" and said["mse of b"] is None and said["mse of a"] == 0.01
    assert strongest.errors([failed], 1.0).guess == {}
