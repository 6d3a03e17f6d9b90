"""Defences by name."""

import jax.numpy as jnp
import pytest

from invjax.defenses import chain, clip_per_sample, gaussian_noise, parse

ALL = [
    "clip_per_sample(1.0)",
    "global_clip(0.5)",
    "gaussian_noise(0.01)",
    "gaussian_noise(0.01, per_sample=True)",
    "laplace_noise(0.1)",
    "dp_sgd(1.0, 1.1, 'mean')",
    "magnitude_prune(0.9, 'global')",
    "random_mask(0.5, known=False)",
    "gradient_dropout(0.25)",
    "sign_compress('mean')",
    "quantize(4)",
    "quantize(8, stochastic=True)",
    "clip_per_sample(1.0),gaussian_noise(0.01)",
]


@pytest.mark.parametrize("text", ALL)
def test_names_are_what_is_parsed(text):
    assert parse(text).name == text
    assert repr(parse(text)) == text


def test_unambiguous_beginnings():
    short, full = (
        parse("clip(1.0), gaussian(0.01)"),
        chain(clip_per_sample(1.0), gaussian_noise(0.01)),
    )
    assert short.name == full.name
    assert short.stage == "per_sample"


def test_keywords():
    assert parse("dp_sgd(noise_multiplier=1.0, clip_norm=2.0)").name == "dp_sgd(2.0, 1.0, 'sum')"


def test_none_is_no_defense():
    defense = parse("none")
    assert defense.stages == ()
    gradient = {"a": jnp.arange(3.0)}
    assert defense.update(gradient, defense.init(gradient))[0]["a"] is not None
    assert defense.name == "none"
    assert parse("none,clip(1.0),none").name == "clip_per_sample(1.0)"


def test_unknown_names_list_the_known_and_the_nearest():
    with pytest.raises(ValueError, match=r"clip_per_sample.*random_mask.*Did you mean 'gaussian_"):
        parse("gausian_noise(0.1)")
    with pytest.raises(ValueError, match=r"Ambiguous.*global_clip"):
        parse("g(0.1)")


@pytest.mark.parametrize("text", ["", "clip(", "1.0", "clip(1.0) gaussian(0.1)", "clip(open('x'))"])
def test_bad_syntax_shows_the_text(text):
    with pytest.raises(ValueError, match="Cannot read the defense") as error:
        parse(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize("text", ["clip()", "clip(1.0, 2.0)", "clip(norm=1.0)"])
def test_wrong_arguments(text):
    with pytest.raises(ValueError, match="clip"):
        parse(text)


def test_wrong_strengths():
    for text in ("gaussian(-1.0)", "gaussian(1e999)", "laplace(1e999)", "dp(1.0, 1e999)"):
        with pytest.raises(ValueError, match=r"must lie in \[0.0, inf\), got"):
            parse(text)
    with pytest.raises(ValueError, match="cannot follow"):
        parse("gaussian(1.0),clip(1.0)")
