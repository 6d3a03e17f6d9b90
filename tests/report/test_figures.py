"""Figures: PNG files of a sane size whatever comes in, with the samples where they belong."""

import io

import numpy as np
import PIL.Image
import pytest

from invjax import report
from invjax.report.figures import LIMIT


def pixels(png):
    """Grey values `[height, width]` of a PNG file, which must be whole and of a sane size."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    with PIL.Image.open(io.BytesIO(png)) as image:
        grey = np.asarray(image.convert("L"))
    assert 150 <= grey.shape[0] <= 2000 and 150 <= grey.shape[1] <= 2000
    return grey


def compare(shape, truth=0.9, reconstruction=0.4, input_range=(0.0, 1.0)):
    sides = (np.full(shape, value, np.float32) for value in (truth, reconstruction))
    captions = [f"{index} dB" for index in range(shape[0])]
    return pixels(report.comparison(*sides, captions, input_range))


@pytest.mark.parametrize("sample", [(8, 8, 1), (8, 8, 3), (5, 9, 2), (1, 1, 1), (12,), (1,)])
@pytest.mark.parametrize("number", [1, 17])
def test_comparison_of_any_samples(sample, number):
    assert np.ptp(compare((number, *sample))) > 50


def test_comparison_grows_to_two_blocks_and_no_further():
    one, eight, nine, limit, more = (
        compare((number, 4, 4, 1)).shape for number in (1, 8, 9, LIMIT, LIMIT + 1)
    )
    assert one[0] == eight[0] and abs(nine[0] - 2 * eight[0]) <= 1
    assert one[1] < eight[1] == nine[1]
    assert nine == limit == more


@pytest.mark.parametrize(("channels", "low", "high"), [(1, 0.0, 1.0), (3, -2.0, 2.0)])
def test_truth_is_above_and_the_range_is_black_to_white(channels, low, high):
    height = compare((1, 4, 4, channels)).shape[0]
    for values in ((high, low), (low, high)):
        # The middle column of pixels goes through both samples.
        image = compare((1, 4, 4, channels), *values, input_range=(low, high))
        column = image[:, image.shape[1] // 2]
        above, below = column[height // 4], column[3 * height // 4]
        assert (above > 250 and below < 5) if values[0] == high else (above < 5 and below > 250)
    # What leaves the range is drawn at its end.
    np.testing.assert_array_equal(
        compare((1, 4, 4, channels), 5 * high, low - 9, input_range=(low, high)),
        compare((1, 4, 4, channels), high, low, input_range=(low, high)),
    )


@pytest.mark.parametrize("sample", [(8, 8, 1), (8, 8, 3), (12,)])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_damaged_reconstructions_are_drawn_all_the_same(sample, bad):
    compare((2, *sample), reconstruction=bad)


def test_comparison_reads_and_leaves_its_inputs():
    truth = np.linspace(-1, 2, 64, dtype=np.float32).reshape(1, 8, 8, 1)
    before = truth.copy()
    report.comparison(truth, truth, ["exact"], (0.0, 1.0))
    np.testing.assert_array_equal(truth, before)


FALLING = np.exp(-np.linspace(0, 5, 50))


@pytest.mark.parametrize(
    "trace",
    [
        FALLING[None],
        np.tile(FALLING, (17, 1)),
        np.stack([FALLING, np.where(np.arange(50) < 20, FALLING, np.nan)]),
        np.full((2, 50), np.nan),
        np.full((2, 50), np.inf),
        -FALLING[None],
        np.zeros((1, 50)),
        FALLING[None, :1],
        np.zeros((3, 0)),
        np.zeros((0, 0)),
    ],
    ids="one many nan all-nan all-inf negative zero single-step closed-form nothing".split(),
)
def test_objective_curves_of_any_trace(trace):
    assert np.ptp(pixels(report.objective_curves(trace))) > 50


def test_objective_curves_show_the_trace():
    first, again, other = (
        report.objective_curves(trace)
        for trace in (FALLING[None], FALLING[None], FALLING[None, ::-1])
    )
    assert first == again != other
