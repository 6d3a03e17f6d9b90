"""`invjax audit`: its table, its verdict, and what it says to bad input."""

import pytest

from invjax import cli, models
from invjax.cli.audit import verdict
from invjax.theory.security_index import security_index


@pytest.fixture
def audit(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "240")

    def run(*options, code=0):
        assert cli.main(["audit", *options]) == code
        return capsys.readouterr()

    return run


def rows(text):
    """Cells of the table's rows, without the reason."""
    lines = (line.split() for line in text.splitlines())
    return [cells[:7] for cells in lines if len(cells) >= 7 and cells[0].isdigit()]


def test_a_network_that_leaks(audit):
    text = audit("cnn2_c1").out
    assert rows(text) == [["0", "3072", "3072", "0", "1.00", "0", "3072"]]
    assert "Exact recovery is possible (c(M) = 0)" in text
    assert "it is where the sample leaks" in text
    assert "3 filters and stride 1 (300 short), or 6 filters and stride 2 (1596 short)" in text
    assert "more than one sample" in text and "no proof of privacy" in text


def test_a_deep_gap(audit):
    text = audit("cnn3_c1").out
    assert rows(text) == [
        ["0", "3072", "3072", "0", "1.00", "0", "3072"],
        ["1", "5400", "867", "-4533", "0.50", "-2266", "867"],
    ]
    assert "c(M) = -2266: no exact recovery" in text and "layer 1: 4533 of 5400" in text
    assert "closed by the gradients of earlier layers" in text
    assert "once their output is known: 0." in text


def test_a_gap_too_small_for_the_rounded_index():
    """One equation short in the last of three layers: a third, which rounds to nothing."""
    found = security_index(models.by_name("lenet2", 10), (16, 16, 3))
    *front, last = found.layers
    layers = (*front, last._replace(rank=last.unknowns - 1, deficit=-1, term=0))
    text = "\n".join(verdict(found._replace(layers=layers, exact=False), ()))
    assert "c(M) = 0: no exact recovery" in text
    assert f"layer 2: 1 of {last.unknowns} unknowns" in text


def test_a_gap_in_the_first_layer(audit):
    text = audit("cnn2_c2").out
    assert "a space of 1470 dimensions of inputs shares the very same gradient" in text
    assert "Least changes" not in text and "Exact" not in text


def test_relu_and_pools_are_said_plainly(audit):
    text = audit("cnn", "--input-shape", "28", "28", "1").out
    assert "the pool behind its relu hides outputs and slopes" in text
    assert "not reached: the recursion ends at layer 2" in text
    assert "c(M) is not defined. This is no protection" in text
    assert rows(text)[0][2:4] == ["-", "-"]
    text = audit("lenet2(activation='relu')", "--input-shape", "16", "16", "3").out
    assert "Behind ReLU only gradient equations were counted" in text
    assert "may have equations enough" in text


def test_dense_layers_alone(audit):
    text = audit("mlp(16)", "--input-shape", "8", "8", "1").out
    assert "dense layers alone" in text and not rows(text)


def test_numeric_agrees_with_closed(audit):
    options = ("cnn3_c4", "--input-shape", "12", "12", "3")
    closed = rows(audit(*options).out)
    numeric = audit(*options, "--mode", "numeric", "--seed", "3").out
    assert rows(numeric) == closed and len(closed) == 2 and "numeric ranks" in numeric


def test_two_roots_of_a_single_logit(audit):
    text = audit("cnn6", "--num-classes", "1").out
    assert "c(M) = 0" in text and "only a prior decides" in text
    assert "only a prior decides" not in audit("cnn6").out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["lenett"], "Did you mean 'lenet'"),
        (["cnn5_c1"], "Did you mean 'cnn"),
        (["resnet18"], "MODEL resnet18 is no plain chain"),
        (["convnet"], "jacobian_rank takes any model"),
        (["cnn2_c1", "--input-shape", "2", "2", "3"], "too small"),
        (["cnn2_c1", "--input-shape", "0", "2", "3"], "--input-shape"),
        (["cnn2_c1", "--num-classes", "0"], "--num-classes"),
        (["cnn2_c1", "--seed", "-1"], "--seed"),
        (["cnn2_c1", "--input-shape", "80", "80", "3", "--mode", "numeric"], "at most 4096 pixels"),
    ],
)
def test_bad_input_is_one_line(options, words, audit):
    error = audit(*options, code=2).err
    assert words in error and error.count("\n") == 1 and error.startswith("invjax audit: ")


@pytest.mark.parametrize("options", [[], ["lenet", "--mode", "fast"], ["lenet", "--speed", "3"]])
def test_unknown_options(options, capsys):
    with pytest.raises(SystemExit) as info:
        cli.main(["audit", *options])
    assert info.value.code == 2


def test_help(capsys):
    assert cli.main([]) == 0
    assert "audit" in capsys.readouterr().out
    with pytest.raises(SystemExit) as info:
        cli.main(["audit", "--help"])
    assert info.value.code == 0 and "--input-shape" in capsys.readouterr().out
