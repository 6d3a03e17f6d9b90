"""The page of a sweep: figures by hand, omissions counted, one cell's arrays at a time, no link out."""

import gc
import re
import weakref

import numpy as np
import pytest
from parsed import Parsed

from invjax import report
from invjax.report import sweep_figures
from invjax.report.sweep_page import omission

EVIL = '<script>alert(\'"&amp;")</script>'
PICTURE = b"\x89PNG\r\n\x1a\n and so on"
KEYS = ("dataset", "model", "train_steps", "defense", "attack", "batch_size")


def row(psnr, **changes):
    good = {
        "cell": "c0",
        "dataset": "digits",
        "model": "lenet",
        "train_steps": 0,
        "defense": "none",
        "attack": "dlg",
        "batch_size": 1,
        "psnr": psnr,
        "ssim": 0.5,
        "label_right": True,
        "baseline_grey_psnr": 6.0,
        "baseline_mean_psnr": 11.0,
        "status": "ok",
        "reason": "",
        "seconds": 0.25,
    }
    return {**good, **changes}


def failed(psnr=None, **changes):
    return row(psnr, **{"status": "failed", "reason": "out of memory", **changes})


def none(cell):
    return None


def make(rows=None, **changes):
    rows = [row(20.0), row(30.0)] if rows is None else rows
    arguments = {
        "headline": "Digits under noise",
        "rows": rows,
        "samples": none,
        "planned": len(rows),
        "settings": {"restarts": 2},
        "versions": {"jax": "0.10.2"},
        "command": "invjax sweep --resume",
    }
    return report.sweep_page(**{**arguments, **changes})


@pytest.fixture
def drawn(monkeypatch):
    """What was to be drawn, instead of drawing it."""
    calls = []
    monkeypatch.setattr(
        sweep_figures, "curves", lambda *arguments: calls.append(arguments) or PICTURE
    )
    return calls


def sides(number=5, seed=0):
    truth, noise = np.random.default_rng(seed).uniform(size=(2, number, 6, 6, 1))
    reconstruction = truth + 0.1 * noise
    psnr = -10 * np.log10(((truth - reconstruction) ** 2).mean(axis=(1, 2, 3)))
    return {"truth": truth, "reconstruction": reconstruction, "psnr": psnr}


@pytest.mark.parametrize("number", [1, 4])
def test_the_table_by_hand(drawn, number):
    psnr = np.asarray([12.0, 31.0, 45.5, 30.0])[:number]
    right = [True, False, True, True][:number]
    rows = [
        row(p, label_right=r, ssim=s, seconds=2.0 * p)
        for p, r, s in zip(psnr, right, (0.1, 0.2, None, 0.9), strict=False)
    ]
    (found,) = Parsed(make([*rows, failed(seconds=9.0), failed(seconds=None)])).records()
    error = psnr.std(ddof=1) / np.sqrt(number) if number > 1 else 0
    assert found == {
        "cell": "c0",
        "n": str(number),
        "median PSNR": f"{np.median(psnr):.1f}",
        "mean PSNR": f"{psnr.mean():.1f} ± {error:.1f}" if number > 1 else "12.0",
        "median SSIM": "0.20" if number > 1 else "0.10",
        "above 30 dB": "50%" if number > 1 else "0%",
        "labels right": "75%" if number > 1 else "100%",
        "grey guess": "6.0",
        "mean guess": "11.0",
        "left out": "2",
        "s / sample": f"{(2 * psnr.sum() + 9) / (number + 1):.3g}",
    }


def test_statistics_against_numpy():
    values = np.random.default_rng(1).normal(size=7)
    mean, error = sweep_figures.mean_error(values)
    assert mean == pytest.approx(values.sum() / 7)
    assert error == pytest.approx(np.sqrt(((values - mean) ** 2).sum() / 6 / 7))
    np.testing.assert_equal(sweep_figures.mean_error(values[:0]), (np.nan, np.nan))
    np.testing.assert_equal(sweep_figures.mean_error(values[:1]), (values[0], np.nan))
    np.testing.assert_equal(sweep_figures.mean_error(np.array([1, np.inf])), (np.inf, np.nan))
    rows = [{"x": 1}, {"x": None}, {}, {"x": np.nan}, {"x": True}, {"x": np.inf}]
    np.testing.assert_array_equal(sweep_figures.column(rows, "x"), [1, 1, np.inf])


def test_vectors_have_no_ssim_and_exact_copies_count(drawn):
    rows = [row(np.inf), row(10.0), row(np.inf)]
    for each in rows:
        del each["ssim"]
    parsed = Parsed(make(rows))
    (found,) = parsed.records()
    assert found["median SSIM"] == "–" and found["n"] == "3" and found["above 30 dB"] == "67%"
    assert found["median PSNR"] == found["mean PSNR"] == "inf"
    values = {attributes["data-value"] for attributes, _ in parsed.tables[0][1]}
    assert {"Infinity", ""} <= values


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (failed(), "out of memory"),
        (failed(50.0), "out of memory"),
        (failed(reason=""), "failed"),
        (failed(status="not finite", reason="it diverged"), "it diverged"),
        (row(np.nan), "the PSNR is not finite"),
        (row(-np.inf), "the PSNR is not finite"),
        (row(None), "no PSNR recorded"),
        ({"cell": "c0", "status": "failed", "reason": "x < y"}, "x < y"),
    ],
)
def test_what_is_left_out_is_counted_and_averaged_nowhere(drawn, bad, reason):
    assert omission(row(20.0)) == omission(row(np.inf)) == ""
    bad = {**{key: row(1.0)[key] for key in KEYS}, **bad}
    parsed = Parsed(make([row(20.0), bad, row(24.0), bad, failed(reason="another", cell="c1")]))
    first, second = parsed.records()
    assert (first["n"], first["left out"], first["mean PSNR"]) == ("2", "2", "22.0 ± 2.0")
    assert (second["n"], second["left out"], second["median PSNR"]) == ("0", "1", "–")
    texts = [[text for _, text in line] for line in parsed.tables[1]]
    assert texts[0] == ["reason", "samples", "cells"]
    assert texts[1] == [reason, "2", "c0 (2)"] and texts[2] == ["another", "1", "c1 (1)"]
    assert f"3 left out: {reason} (2); another (1)." in parsed.text
    assert "Nothing came back in 1 cell, not ranked." in parsed.text


def test_the_lead_names_the_ends_and_what_is_missing(drawn):
    rows = [row(p, cell=d, defense=d) for d, p in (("a", 20.0), ("b", 8.04), ("c", 40.0))]
    text = Parsed(make(rows, planned=9)).text
    assert "3 of 9 samples so far, over 3 cells. None left out." in text
    assert "Best defended: b (median PSNR 8.0 dB); most exposed: c (median PSNR 40.0 dB)." in text
    # An attack that fails where another succeeds says nothing good of a defence.
    weak = row(1.0, cell="weak", defense="c", attack="weak")
    text = Parsed(make([*rows, weak])).text
    assert "Best defended: b, dlg (median PSNR 8.0 dB); most exposed: c, dlg (median" in text
    other = row(50.0, cell="other", defense="c", model="other")
    text = Parsed(make([rows[2], weak, other])).text
    assert "Best defended: lenet, dlg (median PSNR 40.0 dB); most exposed: other, dlg" in text
    text = Parsed(make([rows[2], weak])).text
    assert "over 2 cells. None left out. Strongest attack: dlg (median PSNR 40.0 dB)." in text
    text = Parsed(make(rows, problems=["block 3: truncated"])).text
    assert "3 of 3 samples, over 3 cells" in text and "so far" not in text
    assert "1 file could not be read" in text and "block 3: truncated" in text
    assert "ranked" not in text
    many = [failed(reason=f"r{i}") for i in range(5)]
    assert "5 left out: r0 (1); r1 (1); r2 (1); 2 other reasons." in Parsed(make(many)).text


def test_constants_stand_in_a_line_and_not_in_the_table(drawn):
    rows = [row(1.0, batch_size=b, cell=f"b{b}") for b in (16, 2)]
    parsed = Parsed(make(rows))
    line = "The same in every cell: dataset digits, model lenet, train steps 0, "
    assert f"{line}defense none, attack dlg." in parsed.text
    assert list(parsed.records()[0])[:2] == ["batch size", "n"]
    assert [found["batch size"] for found in parsed.records()] == ["2", "16"]


def test_cells_that_the_axes_do_not_tell_apart_are_named(drawn):
    rows = [row(1.0, cell=cell, attack=a) for cell, a in (("x", "p"), ("y", "p"), ("z", "q"))]
    assert [found["cell"] for found in Parsed(make(rows)).records()] == ["x", "y", "z"]


def test_every_head_sorts_by_numbers(drawn):
    defenses = ("noise(0.01)", "noise(0.0001)", "none", "noise(1)")
    rows = [row(5.0 + i, cell=d, defense=d) for i, d in enumerate(defenses)]
    text = make([*rows, failed(cell="none", defense="none"), failed(cell="z", defense="z")])
    assert '<table class="sortable"><thead><tr><th scope="col"' in text and "<tbody>" in text
    head, *body = Parsed(text).tables[0]
    assert all(attributes["aria-sort"] == "none" for attributes, _ in head)
    assert [attributes.get("class") for attributes, _ in head] == [None] + ["n"] * (len(head) - 1)
    for place, (_, name) in enumerate(head):
        keys = [line[place][0]["data-value"] for line in body]
        numbers = [float(key) for key in keys if key]
        if name == "defense":
            # Already in order, and the order is that of the numbers in the texts.
            assert numbers == [0, 1, 2, 3, 4]
            texts = [line[place][1] for line in body]
            assert texts == ["none", "noise(0.0001)", "noise(0.01)", "noise(1)", "z"]
        if name == "median PSNR":
            assert keys == ["7", "6", "5", "8", ""]
    script = re.findall(r"<script>(.*?)</script>", text, re.S)
    assert len(script) == 1 and "table.sortable" in script[0] and "ariaSort" in script[0]


@pytest.mark.parametrize(
    ("values", "numbers", "kind"),
    [
        ([1, 2, 8], [1, 2, 8], "linear"),
        ([1, 4, 16], [1, 4, 16], "log"),
        ([0, 100, 1000], [0, 100, 1000], "symlog"),
        ([-1, 100], [-1, 100], "linear"),
        ([0, 100], [0, 100], "linear"),
        (["gaussian_noise(0.01)", "gaussian_noise(1e-1)"], [0.01, 0.1], "log"),
        (["clip(1.0),noise(0.2)", "clip(1.0),noise(.3)"], [0.2, 0.3], "linear"),
        (["bayes(num_steps=5)", "bayes(num_steps=6)"], [5, 6], "linear"),
        (["clip(1.0),noise(0.2)", "clip(2.0),noise(0.3)"], None, None),
        (["noise(0.1)", "noise(0.10)"], None, None),
        (["none", "noise(0.1)"], None, None),
        (["noise(0.1)", "prune(0.2)"], None, None),
        (["lenet5", "lenet6"], None, None),
        (["conv2d(3)", "conv3d(3)"], None, None),
        ([True, False], None, None),
        ([None, 1], None, None),
        ([1.0, float("nan")], None, None),
    ],
)
def test_numeric_axes_are_told_from_categories(values, numbers, kind):
    found = sweep_figures.positions(values)
    if numbers is None:
        assert found is None
    else:
        np.testing.assert_array_equal(found, numbers)
        assert sweep_figures.scale(found) == kind


def test_curves_hold_the_means_of_every_line(drawn):
    rng = np.random.default_rng(2)
    rows = [
        row(rng.uniform(5, 40), cell=f"{d}{a}", defense=d, attack=a, baseline_mean_psnr=10.0 + i)
        for d in ("noise(0.1)", "noise(0.01)")
        for a in ("dlg", "bayes")
        for i in range(3)
    ]
    lost = failed(99.0, cell="noise(0.1)dlg", defense="noise(0.1)")
    text = Parsed(make([*rows, lost], planned=99)).text
    assert [call[0] for call in drawn] == ["defense", "attack"]
    assert list(drawn[0][1]) == ["noise(0.01)", "noise(0.1)"] and list(drawn[0][2]) == [
        "bayes",
        "dlg",
    ]
    for _, values, lines, baseline in drawn:
        for name, line in lines.items():
            for place, value in enumerate(values):
                psnr = [r["psnr"] for r in rows if {name, value} == {r["defense"], r["attack"]}]
                assert len(psnr) == 3
                np.testing.assert_allclose(line[0, place], np.mean(psnr))
                np.testing.assert_allclose(line[1, place], np.std(psnr, ddof=1) / 3**0.5)
        np.testing.assert_allclose(baseline, [11.0, 11.0])
    assert "a line per attack." in text and "a line per defense." in text and "pooled" not in text


def test_curves_pool_the_other_axes_and_say_so(drawn):
    rows = [
        row(float(b), cell=f"{b}{d}{m}", batch_size=b, defense=d, model=m)
        for b in (1, 2)
        for d in ("none", "noise(1)")
        for m in ("lenet", "mlp")
    ]
    assert "a line per defense; pooled over model. The sweep" in Parsed(make(rows, planned=50)).text
    assert [call[0] for call in drawn] == ["model", "defense", "batch size"]
    assert list(drawn[-1][2]) == ["none", "noise(1)"]
    assert list(drawn[1][2]) == ["dlg"]


def test_lines_past_the_tenth_are_left_out_and_counted(drawn):
    rows = [
        row(float(i), cell=f"{i}{b}", attack=f"a{i:02d}", batch_size=b)
        for i in range(12)
        for b in (1, 2)
    ]
    text = Parsed(make(rows)).text
    (lines,) = [call[2] for call in drawn if call[0] == "batch size"]
    assert list(lines) == [f"a{i:02d}" for i in range(2, 12)]
    assert "2 more were left out." in text


@pytest.mark.parametrize("fill", [np.nan, np.inf, 3.0])
@pytest.mark.parametrize("values", [["a$b$", "_c"], ["x(0.01)", "x(1)"], [0, 1, 50], [*range(20)]])
def test_curves_of_any_numbers_are_drawn(fill, values):
    line = np.full((2, len(values)), fill)
    line[:, 0] = 20.0, np.nan
    lines = {f"_a$x$ {index}": line + index for index in range(11)}
    png = sweep_figures.curves("axis", values, lines, np.full(len(values), fill))
    assert png.startswith(b"\x89PNG") and len(png) > 5000


@pytest.mark.parametrize("values", [("none", "noise"), (1, 2)])
def test_an_infinite_mean_is_an_arrow(values):
    def curves(mean):
        lines = {"dlg": np.array([[mean, 20.0], [np.nan, 1.0]])}
        return sweep_figures.curves("axis", values, lines, np.full(2, np.nan))

    assert curves(np.nan) == curves(np.nan) != curves(np.inf)


@pytest.mark.parametrize(
    ("psnr", "found"),
    [
        ([3.0, 1.0, 9.0, 5.0, 4.0], {"best": 2, "median": 4, "worst": 1}),
        ([3.0, np.nan, np.inf, -np.inf, 4.0], {"best": 2, "median": 4, "worst": 0}),
        ([1.0, 2.0, 3.0, 4.0], {"best": 3, "median": 1, "worst": 0}),
        ([1.0, 2.0], {"best": 1, "worst": 0}),
        ([np.nan, 2.0], {"only": 1}),
        ([np.nan, -np.inf], {}),
        ([], {}),
    ],
)
def test_best_median_and_worst(psnr, found):
    assert list(sweep_figures.extremes(np.asarray(psnr)).items()) == list(found.items())


def test_the_pictures_are_those_of_the_chosen_samples(monkeypatch):
    seen = []
    monkeypatch.setattr(
        sweep_figures.figures, "comparison", lambda *arguments: seen.append(arguments) or PICTURE
    )
    arrays = sides()
    text = Parsed(make(samples=lambda cell: arrays, input_range=(-1.0, 2.0))).text
    order = np.argsort(arrays["psnr"])[[4, 2, 0]]
    ((truth, reconstruction, captions, input_range),) = seen
    np.testing.assert_array_equal(truth, arrays["truth"][order])
    np.testing.assert_array_equal(reconstruction, arrays["reconstruction"][order])
    names = zip(("best", "median", "worst"), order, strict=True)
    assert captions == [f"{name} {arrays['psnr'][index]:.1f} dB" for name, index in names]
    assert input_range == (-1.0, 2.0)
    assert "chosen by looking at the truth" in text


def test_one_cell_is_held_at_a_time_and_asked_for_once(drawn):
    asked, alive = [], []

    def samples(cell):
        assert [ref for ref in alive if ref() is not None] == [], f"{asked[-1]} is still held"
        arrays = sides(seed=len(asked))
        if len(asked) == 1:  # vectors are drawn as curves
            arrays |= {side: arrays[side].reshape(5, 36) for side in ("truth", "reconstruction")}
        asked.append(cell)
        alive[:] = [weakref.ref(array) for array in arrays.values()]
        return arrays

    gc.disable()
    try:
        make([row(1.0, cell=f"c{i}", batch_size=i) for i in range(1, 5)], samples=samples)
    finally:
        gc.enable()
    assert asked == ["c1", "c2", "c3", "c4"]
    assert [ref for ref in alive if ref() is not None] == []


def test_cells_past_the_twelfth_are_folded_and_those_without_arrays_say_so(drawn):
    rows = [row(1.0, cell=f"c{i}", batch_size=i) for i in range(1, 16)]
    empty = {**sides(1), "psnr": np.asarray([np.nan])}
    text = make(rows, planned=99, samples=lambda cell: empty if cell == "c15" else None)
    parsed = Parsed(text)
    assert (parsed.tags.count("figure"), parsed.tags.count("details")) == (12, 3)
    assert parsed.text.count("No arrays yet.") == 14
    assert parsed.text.count("No sample came back.") == 1
    assert "<details><summary>batch size 13</summary>" in text


def test_zero_rows(drawn):
    def never(cell):
        raise AssertionError(cell)

    parsed = Parsed(make([], planned=7, samples=never, settings={}, versions={}))
    assert "0 of 7 samples so far, over 0 cells." in parsed.text
    assert parsed.text.count("none") == 6 and parsed.tags.count("table") == 0 and not drawn


def test_it_needs_no_other_file():
    rows = [row(p, cell=d, defense=d) for d, p in (("none", 30.0), ("noise(0.1)", 10.0))]
    text = make(rows, samples=lambda cell: sides(3))
    parsed = Parsed(text)
    links = [v for k, v in parsed.attributes if k in ("src", "href", "action", "data", "srcset")]
    assert len(links) == 3
    assert all(link.startswith("data:image/png;base64,iVBOR") for link in links)
    assert not {"link", "iframe", "object", "base"} & set(parsed.tags)
    for outside in ("http://", "https://", "url(", "@import", "fetch(", "import("):
        assert outside not in text
    assert text.startswith("<!doctype html>") and "invjax sweep --resume" in parsed.text
    assert {"restarts", "0.10.2"} <= {cell for t in parsed.tables for r in t for _, cell in r}


@pytest.mark.parametrize(
    "changes",
    [
        {"headline": EVIL},
        {"command": EVIL},
        {"problems": [EVIL]},
        {"settings": {EVIL: EVIL}},
        {"versions": {EVIL: EVIL}},
        {"rows": [row(1.0, cell=EVIL)]},
        {"rows": [failed(reason=EVIL)]},
        {"rows": [row(1.0, dataset=EVIL)]},
        *({"rows": [row(1.0, **{key: EVIL}), row(2.0, cell="c1", **{key: "a"})]} for key in KEYS),
    ],
    ids=lambda changes: "-".join(changes),
)
def test_every_text_is_escaped(drawn, monkeypatch, changes):
    monkeypatch.setattr(sweep_figures.figures, "comparison", lambda *arguments: PICTURE)
    arrays = sides(1)
    parsed = Parsed(make(**changes, samples=lambda cell: arrays))
    # The page's own script and no other.
    assert parsed.tags.count("script") == 1
    assert {name for name, _ in parsed.attributes} <= {
        *("lang", "charset", "name", "content", "class", "alt", "src"),
        *("scope", "aria-sort", "data-value"),
    }
    assert EVIL in parsed.text
