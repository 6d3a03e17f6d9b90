"""The HTML page: everything in it, nothing outside it, and no text that becomes markup."""

import base64

import pytest
from parsed import Parsed

from invjax import report
from invjax.report import page

LINKS = {"src", "href", "action", "data", "poster", "srcset", "background"}
EVIL = '<script>alert(\'"&amp;")</script>'
PICTURE = b"\x89PNG\r\n\x1a\n and so on"


def make(**changes):
    arguments = {
        "headline": "dlg on lenet",
        "lead": "2 of 2 samples came back.",
        "rows": [{"victim": 0, "PSNR": 31.41592, "found": True}],
        "figures": {"Truth": PICTURE, "Objective": PICTURE[::-1]},
        "settings": {"attack": "dlg", "seed": 7, "labels": None},
        "versions": {"jax": "0.10.2", "device": "cpu"},
        "command": "invjax attack --seed 7",
    }
    return report.attack_page(**{**arguments, **changes})


def test_it_is_balanced_and_holds_everything():
    text = make()
    parsed = Parsed(text)
    assert text.startswith("<!doctype html>") and parsed.tags[0] == "html"
    assert parsed.tags.count("h1") == parsed.tags.count("title") == 1
    cells = parsed.rows()
    for row in (
        ["victim", "PSNR", "found"],
        ["0", "31.42", "yes"],
        ["attack", "dlg"],
        ["seed", "7"],
        ["labels", "None"],
        ["jax", "0.10.2"],
        ["device", "cpu"],
    ):
        assert row in cells
    for words in ("dlg on lenet", "2 of 2 samples came back.", "invjax attack --seed 7"):
        assert words in parsed.text


def test_it_needs_no_other_file():
    text = make()
    parsed = Parsed(text)
    links = [value for name, value in parsed.attributes if name in LINKS]
    prefix = "data:image/png;base64,"
    assert all(link.startswith(prefix) for link in links)
    pictures = [base64.b64decode(link.removeprefix(prefix), validate=True) for link in links]
    assert pictures == [PICTURE, PICTURE[::-1]]
    assert not {"script", "link", "iframe", "object", "base"} & set(parsed.tags)
    assert "url(" not in text and "@import" not in text and "://" not in text


@pytest.mark.parametrize(
    "changes",
    [
        {"headline": EVIL},
        {"lead": EVIL},
        {"command": EVIL},
        {"rows": [{EVIL: 1}]},
        {"rows": [{"label": EVIL}]},
        {"figures": {EVIL: PICTURE}},
        {"settings": {EVIL: 1}},
        {"settings": {"weights": EVIL}},
        {"versions": {EVIL: "1"}},
        {"versions": {"jax": EVIL}},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_every_text_is_escaped(changes):
    parsed = Parsed(make(**changes))
    assert "script" not in parsed.tags
    # A quotation mark that ended an attribute would leave its rest as another attribute.
    assert {name for name, _ in parsed.attributes} <= {
        *("lang", "charset", "name", "content", "class", "alt", "src")
    }
    assert EVIL in parsed.text
    if "figures" in changes:
        assert ("alt", EVIL) in parsed.attributes


@pytest.mark.parametrize(
    ("value", "text", "style"),
    [
        (3, "3", "n"),
        (0.000123456, "0.0001235", "n"),
        (float("nan"), "nan", "n"),
        (float("inf"), "inf", "n"),
        (True, "yes", None),
        (False, "no", None),
        (None, "None", None),
        ("a & b", "a & b", None),
        ("", "", None),
    ],
)
def test_cells(value, text, style):
    parsed = Parsed(page.table([{"x": value}]))
    ((_, ((attributes, shown),)),) = parsed.tables
    assert (attributes.get("class"), shown) == (style, text)
    assert parsed.tags.count("td") == 1


def test_no_rows():
    assert Parsed(make(rows=[], figures={}, settings={}, versions={})).text.count("none") == 3
