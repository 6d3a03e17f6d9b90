"""Blind guesses: closed forms, simulations, and what is sound about them."""

import numpy as np
import pytest
from scipy.special import betainc

from invjax.theory import baselines
from invjax.theory.baselines import kappa_ball, kappa_pool_heuristic, kappa_sphere, kappa_uniform


def test_uniform():
    assert kappa_uniform(8) == 0.125
    assert kappa_uniform(1) == 1


def test_ball():
    np.testing.assert_allclose(kappa_ball([0.5, 1.0, 3.0], 3, 2.0), [1 / 64, 1 / 8, 1])
    rng = np.random.default_rng(0)
    points = rng.uniform(-1, 1, (400_000, 3))
    points = points[np.linalg.norm(points, axis=1) <= 1]
    share = np.mean(np.linalg.norm(points - [0.3, 0, 0], axis=1) <= 0.5)
    assert share == pytest.approx(kappa_ball(0.5, 3), abs=2e-3)


@pytest.mark.parametrize(("guess", "expected"), [("anywhere", 0.0255016), ("sphere", 0.0106606)])
def test_sphere_in_ten_dimensions(guess, expected):
    kappa = kappa_sphere(0.8, 10, guess=guess)
    assert kappa == pytest.approx(expected, abs=5e-8)
    assert kappa_sphere(2.4, 10, 3.0, guess=guess) == pytest.approx(kappa, rel=1e-12)
    rng = np.random.default_rng(1)
    points = rng.normal(size=(200_000, 10))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    center = np.zeros(10)
    center[0] = np.sqrt(1 - 0.8**2) if guess == "anywhere" else 1.0
    share = np.mean(np.linalg.norm(points - center, axis=1) <= 0.8)
    assert share == pytest.approx(kappa, abs=4 * np.sqrt(kappa / len(points)))


def test_sphere_in_three_dimensions_is_archimedes():
    """A cap's area is proportional to its height."""
    eta = np.array([0.1, 0.5, 0.9, 1.2, 1.41, 1.5, 1.9])
    np.testing.assert_allclose(kappa_sphere(eta, 3, guess="sphere"), eta**2 / 4, rtol=1e-12)
    small = eta[eta < 1]
    np.testing.assert_allclose(kappa_sphere(small, 3), (1 - np.sqrt(1 - small**2)) / 2, rtol=1e-12)


def test_sphere_limits():
    assert kappa_sphere(1.0, 5) == 1 and kappa_sphere(0.0, 5) == 0
    assert kappa_sphere(2.0, 5, guess="sphere") == 1
    assert kappa_sphere(0.5, 1) == 0.5 and kappa_sphere(0.5, 1, guess="sphere") == 0.5
    eta = np.linspace(0.01, 2.2, 300)
    for dimension in (2, 7, 100):
        anywhere = kappa_sphere(eta, dimension)
        only = kappa_sphere(eta, dimension, guess="sphere")
        assert (np.diff(anywhere) >= 0).all() and (np.diff(only) >= 0).all()
        assert (anywhere >= only).all()
    # Log 1 / kappa grows as the dimension: the epsilon that reconstruction needs does too.
    logs = -np.log(kappa_sphere(0.5, np.array([100, 200, 400])))
    np.testing.assert_allclose(np.diff(logs) / [100, 200], np.log(2), rtol=0.02)
    assert kappa_sphere(0.5, 40) == pytest.approx(0.5 * betainc(19.5, 0.5, 0.25), rel=1e-12)


def test_pool(monkeypatch):
    pool = np.array([[0.0], [1.0], [2.0], [10.0], [10.0]])
    assert kappa_pool_heuristic(pool, 0.0) == 2 / 5
    # A guess of 0.5 would catch two at this error, and records none.
    assert kappa_pool_heuristic(pool[:3], 0.6) == 1 / 3
    assert kappa_pool_heuristic(pool[:3], 2 * 0.6) >= 2 / 3
    many = np.random.default_rng(2).normal(size=(50, 2, 3))
    whole = kappa_pool_heuristic(many, 1.5)
    monkeypatch.setattr(baselines, "POOL_ROWS", 7)
    assert kappa_pool_heuristic(many, 1.5) == whole
    distances = np.linalg.norm((many[:, None] - many[None]).reshape(50, 50, 6), axis=-1)
    assert whole == (distances <= 1.5).sum(1).max() / 50


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: kappa_uniform(0), "num_records must lie in"),
        (lambda: kappa_uniform(1.5), "num_records must be a whole number, got 1.5"),
        (lambda: kappa_ball(-0.1, 3), "eta must be at least 0, got -0.1"),
        (lambda: kappa_ball(0.1, 0), "dimension must be at least 1, got 0"),
        (lambda: kappa_sphere(0.1, 3, 0.0), "radius must lie in"),
        (lambda: kappa_sphere(0.1, 3, guess="inside"), "guess must be one of"),
        (lambda: kappa_sphere(np.nan, 3), "eta must be at least 0, got nan"),
        (lambda: kappa_pool_heuristic(np.zeros((0, 2)), 0.1), "pool must hold records"),
        (lambda: kappa_pool_heuristic(np.full((3, 2), np.nan), 0.1), "pool must hold finite"),
        (lambda: kappa_pool_heuristic(np.zeros((2, 2)), -1), "eta must lie in"),
    ],
)
def test_arguments_are_validated(call, words):
    with pytest.raises(ValueError, match=words):
        call()
