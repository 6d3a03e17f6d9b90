"""Likelihoods by name: by hand with SciPy, and against the channels of the defences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import invjax
from invjax.attacks import likelihoods, objectives
from invjax.base import Facts, Observation

RNG = np.random.default_rng(0)
TREE = {"a": (4, 3), "b": (5,)}
A, B = ({name: RNG.normal(size=shape) for name, shape in TREE.items()} for _ in range(2))
MASK = {"a": RNG.random((4, 3)) < 0.5, "b": np.array([True, False, True, True, False])}


def observation(gradient=B, **facts):
    changed = Facts(input_shape=(2,), num_classes=2, **{"batch_size": 4, **facts})
    return Observation(as_jax(gradient), as_jax(gradient), changed)


def as_jax(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def normal(x, at, std):
    return scipy.stats.norm(at, std).logpdf(x)


def constant(std):
    """What a Gaussian log-density is at its centre, left out everywhere."""
    return normal(0.0, 0.0, std)


STDS = {"a": 0.3, "b": np.full(5, 2.0)}
FLAT_STDS = np.concatenate([np.full(12, 0.3), np.full(5, 2.0)])
CASES = {
    "gaussian": (likelihoods.gaussian(0.5), -(normal(flat(B), flat(A), 0.5) - constant(0.5)).sum()),
    "gaussian per sample": (
        likelihoods.gaussian(0.5, per_sample=True),
        -(normal(flat(B), flat(A), 0.25) - constant(0.25)).sum(),
    ),
    "gaussian per parameter": (
        likelihoods.gaussian(STDS),
        -(normal(flat(B), flat(A), FLAT_STDS) - constant(FLAT_STDS)).sum(),
    ),
    "laplace": (
        likelihoods.laplace(0.5),
        -(scipy.stats.laplace(flat(A), 0.5).logpdf(flat(B)) - np.log(1.0)).sum(),
    ),
    "von_mises_fisher": (
        likelihoods.von_mises_fisher(3.0),
        3 * scipy.spatial.distance.cosine(flat(A), flat(B)),
    ),
    "product": (
        likelihoods.product(likelihoods.gaussian(0.5), likelihoods.laplace(0.2)),
        (np.square(flat(A) - flat(B)) / 0.5 + np.abs(flat(A) - flat(B)) / 0.2).sum(),
    ),
    "masked": (
        likelihoods.masked(likelihoods.gaussian(0.5), MASK),
        (np.square(flat(A) - flat(B)) / 0.5)[flat(MASK)].sum(),
    ),
    "spike_and_slab": (
        likelihoods.spike_and_slab(0.5, 0.3),
        -(
            np.log(
                0.7 * np.exp(normal(flat(B), flat(A), 0.5)) + 0.3 * np.exp(normal(flat(B), 0, 0.5))
            )
            - constant(0.5)
        ).sum(),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_by_hand(name):
    likelihood, expected = CASES[name]
    found = likelihood.value(as_jax(A), observation())
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    # Traceable, and smooth enough to descend on.
    slope = jax.jit(jax.grad(likelihood.value))(as_jax(A), observation())
    assert np.isfinite(flat(slope)).all() and np.abs(flat(slope)).max() > 0


def test_top_k_by_hand():
    observed = {"a": np.array([0.0, 3.0, 0.0, -2.0]), "b": np.array([0.5, 0.0])}
    candidate = {"a": np.array([1.5, 2.0, -2.5, -2.0]), "b": np.array([0.5, 0.6])}
    # Exceeds the smallest seen by 0, misses by 1, exceeds by 0.5, exact; exact, exceeds by 0.1.
    expected = (0 + 1 + 0.25 + 0 + 0 + 0.01) / (2 * 0.1**2)
    found = likelihoods.top_k(0.1).value(as_jax(candidate), observation(observed))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    # A tensor of which nothing is seen says nothing.
    nothing = {"a": np.zeros(4), "b": np.array([0.5, 0.0])}
    found = likelihoods.top_k(0.1).value(as_jax(candidate), observation(nothing))
    np.testing.assert_allclose(found, 0.01 / (2 * 0.1**2), rtol=1e-4)


@pytest.mark.parametrize("known", [True, False])
def test_the_channels_of_a_mask_below_noise(known):
    """What the defence itself says is what the named likelihood says, up to a constant."""
    mask = invjax.defenses.random_mask(0.3, known=known)
    defense = invjax.chain(mask, invjax.defenses.gaussian_noise(0.5))
    params = as_jax(A)
    state = defense.init(params)
    seen = observation()._replace(public=defense.public(state))
    if known:
        named = likelihoods.masked(likelihoods.gaussian(0.5), seen.public[0])
    else:
        named = likelihoods.spike_and_slab(0.5, 0.3)
    matched = objectives.matched(defense)
    for left, right in zip(
        jax.tree.leaves(jax.grad(matched.value)(params, seen)),
        jax.tree.leaves(jax.grad(named.value)(params, seen)),
        strict=True,
    ):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-4)


def test_dropped_layers_do_not_count():
    weights = likelihoods.drop_layers(as_jax(A), lambda path: "b" in path)
    assert weights == {"a": 1.0, "b": 0.0}
    other = {**A, "b": A["b"] + 10}
    for make in (objectives.cosine, objectives.squared_l2, objectives.l1):
        values = [make(weights).value(as_jax(tree), observation()) for tree in (A, other)]
        np.testing.assert_allclose(*values, rtol=1e-6)
    for nothing in (lambda path: False, lambda path: True):
        with pytest.raises(ValueError, match=r"dropped must pick.*\['a'\]"):
            likelihoods.drop_layers(as_jax(A), nothing)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: likelihoods.gaussian(0.0), "std"),
        (lambda: likelihoods.gaussian({"a": -1.0}), "std"),
        (lambda: likelihoods.gaussian({"a": np.array([1.0, 0.0])}), "std"),
        (lambda: likelihoods.laplace(-1.0), "scale"),
        (lambda: likelihoods.von_mises_fisher(0.0), "concentration"),
        (lambda: likelihoods.spike_and_slab(0.1, 1.0), "fraction"),
        (lambda: likelihoods.top_k(0.0), "std"),
        (lambda: likelihoods.product(), "one stage"),
        (
            lambda: likelihoods.gaussian(1.0, per_sample=True).value(
                as_jax(A), observation(batch_size=None)
            ),
            "per_sample",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
