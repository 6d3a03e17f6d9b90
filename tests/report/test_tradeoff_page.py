"""The page of a comparison at equal utility: what it says, and what it must not say."""

import numpy as np
import pytest

from invjax.evaluation.families import FAMILIES, Family
from invjax.evaluation.tradeoff import Result
from invjax.evaluation.tradeoff_settings import Tradeoff
from invjax.report import tradeoff_figures
from invjax.report.tradeoff_page import tradeoff_page

SETTINGS = Tradeoff(
    defenses=(FAMILIES["gaussian_noise"], FAMILIES["magnitude_prune"], Family("sign_compress")),
    attacks=("bayes", "bias_trick"),
    levels=(0.05,),
)


def point(family, defense, lost, mse, **other):
    return {
        "family": family, "defense": defense, "strength": 0.1, "utility_loss": lost,
        "utility_loss_error": 0.004, "accuracy": 0.95 - lost, "accuracy_error": 0.01, "loss": 0.2,
        "loss_error": 0.01, "attack": "bayes", "mse": mse, "mse_error": 0.002, "psnr": 13.1,
        "psnr_error": 0.2, "reduce": "min", "mse of bayes": mse, "mse of bias_trick": None,
    } | other  # fmt: skip


def table_row(*args, status="matched", **other):
    return {"level": 0.05, "status": status} | point(*args, **other)


RESULT = Result(
    table=[
        table_row("gaussian_noise(*)", "gaussian_noise(0.1)", 0.051, 0.03),
        table_row("magnitude_prune(*)", "magnitude_prune(0.9)", 0.049, 0.01),
        table_row("sign_compress", "sign_compress", 0.01, 0.02, status="not reached"),
    ],
    curves=[
        point("none", "none", 0.0, 1e-13, strength=None),
        point("gaussian_noise(*)", "gaussian_noise(0.01)", -0.002, 0.003),
        point("gaussian_noise(*)", "gaussian_noise(0.1)", 0.051, 0.03),
        point("magnitude_prune(*)", "magnitude_prune(0.9)", 0.049, 0.01),
        point("sign_compress", "sign_compress", 0.01, 0.02),
    ],
    guess={"mse": 0.05, "psnr": 13.0},
    refused=[{"defense": "sign_compress", "attack": "bias_trick", "reason": "no <bias> at all"}],
    failed=[],
    failed_jobs=0,
)


def samples(row):
    assert row["attack"] == "bayes" and row["defense"].startswith(row["family"].split("(")[0])
    rng = np.random.default_rng(0)
    return {"truth": rng.random((3, 8, 8, 1)), "reconstruction": rng.random((3, 8, 8, 1))}


def page(result=RESULT, settings=SETTINGS, samples=samples):
    return tradeoff_page(
        settings=settings,
        result=result,
        samples=samples,
        versions={"invjax": "1.2.3"},
        command="invjax tradeoff --resume --out 'a b'",
    )


def ranking(text):
    return text[text.index("<h2>Ranking") : text.index("<h2>What this")]


def test_the_page_says_what_it_must():
    text = page()
    for part in (
        "At a price of 5 points of accuracy",
        "magnitude_prune(0.9)",
        "A guess that saw no gradient reaches 13.0 dB",
        "Attacks that were not run",
        "no &lt;bias&gt; at all",
        "invjax tradeoff --resume --out &#x27;a b&#x27;",
        "1.2.3",
        "jackknife over seeds",
    ):
        assert part in text, part
    assert text.count("<img ") == 2 and 'src="http' not in text


def test_the_ranking_begins_with_the_best_protection():
    text = ranking(page())
    assert text.index("gaussian_noise(0.1)") < text.index("magnitude_prune(0.9)")
    ordered = text[text.index("<ol") : text.index("</ol>")]
    assert ordered.count("<li>") == 2 and "sign_compress" not in ordered
    assert "costs less than this even at its strongest" in text
    assert "not told apart" not in text and "no better than a guess" not in text
    assert "5.1 ± 0.4" not in ordered


def test_what_cannot_be_told_apart_is_said():
    near = RESULT.table[1] | {"mse": 0.0295}
    text = ranking(page(RESULT._replace(table=[RESULT.table[0], near])))
    assert "not told apart from the one above" in text
    hopeless = [row | {"mse": 0.06} for row in RESULT.table[:1]]
    assert "no better than a guess" in ranking(page(RESULT._replace(table=hopeless)))


def test_what_only_comes_near_the_price_is_not_in_the_order():
    near = RESULT.table[1] | {"status": "nearest", "utility_loss": 0.9, "utility_loss_error": 0.12}
    text = ranking(page(RESULT._replace(table=[RESULT.table[0], near])))
    ordered = text[text.index("<ol") : text.index("</ol>")]
    assert ordered.count("<li>") == 1 and "magnitude_prune" not in ordered
    assert "comes no nearer to this price than 90 ± 12 points" in text


def test_what_does_not_apply_to_any_defense_is_one_row():
    everywhere = [
        {"defense": name, "attack": "hybrid", "reason": "no convolution"}
        for name in ("none", *(family.defense for family in SETTINGS.defenses))
    ]
    text = page(RESULT._replace(refused=RESULT.refused + everywhere))
    assert text.count("no convolution") == 1 and text.count("no &lt;bias&gt; at all") == 1
    assert "<td>hybrid</td><td>all</td>" in text and "<td>sign_compress</td><td>no" in text


def test_a_defense_without_a_measured_attack_is_not_ranked():
    silent = RESULT.table[1] | {"mse": None, "attack": None, "psnr": None, "psnr_error": None}
    text = page(RESULT._replace(table=[RESULT.table[0], silent | {"mse of bayes": None}]))
    assert "No attack was measured behind magnitude_prune(0.9)" in ranking(text)


def test_a_training_that_diverged_has_no_price():
    none = dict.fromkeys(("utility_loss", "utility_loss_error", "loss", "loss_error"))
    row = RESULT.table[1] | none | {"status": "already above"}
    text = page(RESULT._replace(table=[RESULT.table[0], row], curves=[*RESULT.curves, row]))
    assert "even at its weakest: a training that diverges; it lets" in ranking(text)
    assert "None" not in text[text.index("<h2>Table") : text.index("<h2>Lost")]


def test_one_seed_has_no_error_bars():
    bars = dict.fromkeys(("utility_loss_error", "accuracy_error", "loss_error", "mse_error"))
    rows = [row | bars | {"psnr_error": None} for row in RESULT.table]
    points = [row | bars | {"psnr_error": None} for row in RESULT.curves]
    text = page(RESULT._replace(table=rows, curves=points))
    assert "not told apart" not in text and "nan" not in ranking(text)


def test_other_units_and_definitions_are_named():
    settings = Tradeoff(defenses=SETTINGS.defenses, attacks=SETTINGS.attacks, utility="loss",
                        levels=(0.05,), reduce="max", attack_step=7)  # fmt: skip
    text = page(settings=settings, samples=lambda *_: None)
    assert "At a price of 0.05 of training loss" in text and "the weakest attack" in text
    assert "What the weakest attack gives back" in text
    assert "as the definition is printed" in text and "after 7 undefended steps" in text
    assert text.count("<img ") == 1


def test_nothing_was_measured():
    empty = Result([], [], {}, [], [{"defense": "a", "attack": "training", "reason": "x"}], 0)
    text = page(empty)
    assert "None is at this price" in text and text.count("<img ") == 0


@pytest.mark.parametrize("count", [1, 4])
def test_errors_of_any_size_are_drawn_without_warnings(count):
    curves = {
        f"family {index} with $ and a long name, longer than its panel": [
            {"utility_loss": lost, "mse": mse, "utility_loss_error": 0.01, "mse_error": bar}
            for lost, mse, bar in (
                (-0.01, 1e-14, 1e-14),
                (0.02, 0.01, 0.5),
                (0.9, 3.0, None),
                (np.inf, 1.0, 0.1),
                (0.5, None, None),
            )
        ]
        for index in range(count)
    }
    png = tradeoff_figures.pareto(
        curves, {"utility_loss": 0.0, "mse": 0.0}, 0.1, (0.02, 0.1), "accuracy lost", True
    )
    assert png.startswith(b"\x89PNG") and len(png) > 5000


def test_a_line_ends_where_nothing_is_known():
    line = tradeoff_figures._line(
        [point("f", "f", 0.1, 1e-9), point("f", "f", 0.2, None), point("f", "f", np.inf, 0.1)], 1e-5
    )
    np.testing.assert_allclose(line, [[0.1], [1e-5], [0.004], [0.002]])


def test_vectors_are_drawn_too():
    png = tradeoff_figures.reconstructions(
        np.zeros((2, 5)), {"a\n3 dB": np.full((2, 5), np.nan)}, (0.0, 1.0)
    )
    assert png.startswith(b"\x89PNG")
