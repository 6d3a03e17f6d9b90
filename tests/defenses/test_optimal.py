"""Optimal defences: what they minimise, their law, and what every defence must keep."""

import functools
import itertools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ready
from jax.flatten_util import ravel_pytree
from scipy import stats

import invjax
from invjax import datasets, models
from invjax.base import Batch, Defense
from invjax.defenses import chain, gaussian_noise, global_clip
from invjax.defenses.optimal import (
    optimal_clipped_noise,
    optimal_noise,
    optimal_pruning,
    optimal_rounding,
)
from invjax.defenses.sensitivity import (
    Sensitivity,
    gradient_sensitivity,
    keep_telling_least,
    population_sensitivity,
)

SHAPE = (6,)
MODEL = models.mlp((5,), 3, "leaky_relu")
PARAMS = MODEL.init(jax.random.key(0), SHAPE)
SIZE = ravel_pytree(PARAMS)[0].size
BOUND = 0.05


def draw(number=None, seed=1):
    """A batch, or several."""
    rng = np.random.default_rng(seed)
    lead = (3,) if number is None else (number, 3)
    return Batch(
        jnp.asarray(rng.normal(size=(*lead, *SHAPE)), jnp.float32),
        jnp.asarray(rng.integers(0, 3, lead)),
    )


@functools.cache
def population():
    run = jax.jit(functools.partial(population_sensitivity, MODEL))
    return jax.tree.map(np.asarray, run(PARAMS, draw(4, seed=0)))


# Every constructor at a strength and at none, of public sensitivities and of every batch.
MAKERS = {
    "noise": (lambda source, **k: optimal_noise(source, 0.1, **k), (0.0,), optimal_noise),
    "clipped": (
        lambda source, **k: optimal_clipped_noise(source, BOUND, 0.02, **k),
        (np.inf, 0.0),
        optimal_clipped_noise,
    ),
    "pruning": (lambda source, **k: optimal_pruning(source, 0.4, **k), (0.0,), optimal_pruning),
    "rounding": (lambda source, **k: optimal_rounding(source, 0.1, **k), (0.0,), optimal_rounding),
}
SLOW = (("noise", False), ("clipped", False), ("pruning", False), ("rounding", True))
CASES = [
    pytest.param(*case, marks=pytest.mark.slow) if case in SLOW else case
    for case in itertools.product(MAKERS, (False, True))
]
EVERY = pytest.mark.parametrize(("name", "per_batch"), CASES)
FRESH = ("noise", "clipped")


def source(per_batch):
    return MODEL if per_batch else population()


@functools.cache
def defended(name, per_batch, **settings) -> Defense:
    return MAKERS[name][0](source(per_batch), **settings)


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0], float)


class Sent(NamedTuple):
    """Two steps of a client, and what the adversary makes of the second."""

    first: Any
    second: Any
    gradient: Any
    public: Any
    score: Any
    slopes: Any


def send(defense, key, batch) -> Sent:
    state = defense.init_with_key(key, PARAMS)
    batch, state = defense.prepare(batch, state, PARAMS)
    gradient = jax.grad(MODEL.loss)(PARAMS, batch)
    first, state = defense.update(gradient, state, PARAMS)
    # The same batch once more.
    second, after = defense.update(gradient, ready(defense, state), PARAMS)
    public = defense.public(after)
    score, slopes = jax.value_and_grad(
        lambda candidate: defense.log_likelihood(second, candidate, public)
    )(gradient)
    return Sent(first, second, gradient, public, score, slopes)


@functools.cache
def clients(name, per_batch):
    """One compilation a case: a client, with another key, with inputs of zero, with other inputs."""
    batches = [draw(), draw(), draw()._replace(inputs=jnp.zeros((3, *SHAPE))), draw(seed=2)]
    keys = jax.random.split(jax.random.key(0))[np.array([0, 1, 0, 0])]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
    run = jax.jit(jax.vmap(functools.partial(send, defended(name, per_batch))))
    return _unstack(jax.tree.map(np.asarray, run(keys, stacked)))


def sent(name, per_batch) -> Sent:
    return clients(name, per_batch)[0]


# What they minimise.


def digits_case(size=2, number=6):
    """A small classifier of digits, and batches `[V, B, ...]` in float64."""
    data = datasets.load("digits")
    model = models.mlp((12,), 10, "leaky_relu")
    params = model.init(jax.random.key(3), data.input_shape)
    indices = np.random.default_rng(4).permutation(len(data))[: number * size]
    batches = datasets.take(data, indices.reshape(number, size))
    return model, *jax.tree.map(
        lambda leaf: jnp.asarray(leaf, float if leaf.dtype == jnp.float32 else None),
        (params, batches),
    )


@functools.cache
def digits_sensitivity():
    with jax.enable_x64(True):
        model, params, batches = digits_case()
        run = jax.jit(functools.partial(population_sensitivity, model))
        return jax.tree.map(np.asarray, run(params, batches)), params


def test_optimal_noise_reaches_the_least_product_of_leakage_and_cost():
    with jax.enable_x64(True):
        found, params = digits_sensitivity()
        defense = optimal_noise(found, 0.7)
        law = defense.law(params, params)
        leakage, energy, variance = flat(found.leakage), flat(found.energy), flat(law.variance)
        np.testing.assert_allclose(np.sqrt(variance.mean()), 0.7, rtol=1e-12)
        tells = leakage > 0
        assert (variance[~tells] == 0).all() and tells.sum() > 500

        def product(variance):
            return (leakage[tells] / variance[tells]).sum() * (variance * energy).sum()

        least, uniform = np.sqrt(leakage * energy).sum() ** 2, leakage.sum() * energy.sum()
        # Some coordinates have next to no energy: the cap on the ratio costs the last digits.
        np.testing.assert_allclose(product(variance), least, rtol=1e-6)
        assert product(variance) < 0.9 * uniform
        np.testing.assert_allclose(product(np.ones_like(leakage)), uniform, rtol=1e-12)
        rng = np.random.default_rng(5)
        for spread in np.linspace(0.05, 1.5, 50):
            other = variance * rng.lognormal(0, spread, variance.size)
            other *= (variance * energy).sum() / (other * energy).sum()
            assert product(other) > product(variance) * (1 + 1e-6)


def remaining(order, leakage, energy, utility=0.9):
    """Share of the leakage that is left where coordinates go in an order until `U_1` is spent."""
    kept = energy.sum() - np.cumsum(energy[order]) >= utility * energy.sum()
    gone = order[: int(np.argmin(kept))]
    return 1 - leakage[gone].sum() / leakage.sum()


def test_optimal_pruning_leaves_least_leakage_at_equal_utility():
    with jax.enable_x64(True):
        model, params, batches = digits_case()
        alone = jax.jit(functools.partial(gradient_sensitivity, model))
        shares = []
        for index in range(6):
            found = alone(params, jax.tree.map(lambda leaf, i=index: leaf[i], batches))
            leakage, energy = flat(found.leakage), flat(found.energy)
            values = leakage / np.maximum(energy, 1e-60)
            rng = np.random.default_rng(index)
            orders = (
                np.argsort(-values, kind="stable"),
                np.argsort(energy),
                rng.permutation(values.size),
                np.argsort(values),
            )
            shares.append([remaining(order, leakage, energy) for order in orders])
            # The defence itself goes by that order.
            gone = 300 / values.size + 1e-9
            kept = flat(keep_telling_least(found, gone)) > 0
            assert (~kept).sum() == 300
            assert values[~kept].min() >= values[kept].max()
        optimal, magnitude, random, smallest = np.mean(shares, axis=0)
        assert optimal < 0.95 * magnitude and magnitude < 0.95 * random and random < 0.99 * smallest


def test_pruning_zeroes_the_stated_share_of_what_leaks_most():
    found, fraction = population(), 0.3
    defense = optimal_pruning(found, fraction)
    gradient = jax.tree.map(jnp.ones_like, PARAMS)
    out, _ = defense.update(gradient, defense.init(PARAMS))
    gone = flat(out) == 0
    assert gone.sum() == int(fraction * SIZE)
    values = flat(found.leakage) / flat(found.energy)
    assert values[gone].min() >= values[~gone].max()


# The channel.


def deviations(sensitivity, std):
    """The formula once more, in NumPy."""
    ratios = np.sqrt(flat(sensitivity.leakage) / flat(sensitivity.energy))
    return std * np.sqrt(ratios / ratios.mean())


@pytest.mark.parametrize("per_batch", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_noise_has_the_law_that_its_likelihood_says(per_batch):
    settings = {"num_probes": None} if per_batch else {}
    defense, batch = optimal_noise(source(per_batch), 0.1, **settings), draw()
    found = gradient_sensitivity(MODEL, PARAMS, batch) if per_batch else population()
    expected = deviations(found, 0.1)

    _, state = jax.jit(defense.prepare)(batch, defense.init(PARAMS), PARAMS)
    gradient = sent("noise", True).gradient

    @jax.jit
    @jax.vmap
    def run(key):
        (part,) = state
        out, _ = defense.update(gradient, ready(defense, (part._replace(key=key),)))
        return out, defense.log_likelihood(out, gradient, defense.public(state))

    drawn, scores = run(jax.random.split(jax.random.key(1), 3000))
    drawn = np.stack([flat(part) for part in _unstack(jax.tree.map(np.asarray, drawn))])
    noise = drawn - flat(gradient)[None]
    np.testing.assert_allclose(noise.std(axis=0) / expected, 1, atol=0.08)
    np.testing.assert_allclose(noise.mean(axis=0) / expected, 0, atol=0.08)
    closed = stats.norm.logpdf(drawn[:20], flat(gradient)[None], expected[None]).sum(axis=1)
    np.testing.assert_allclose(scores[:20], closed, rtol=1e-4)


def _unstack(tree):
    leaves, treedef = jax.tree.flatten(tree)
    return [jax.tree.unflatten(treedef, parts) for parts in zip(*leaves, strict=True)]


@pytest.mark.parametrize("per_batch", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_clamped_coordinates_are_sent_without_noise_and_known_for_it(per_batch):
    first, second, gradient, public, score, _ = sent("clipped", per_batch)
    plain = flat(gradient)
    clamped = np.abs(plain) >= BOUND
    assert 3 < clamped.sum() < SIZE - 3
    bounds = np.sign(plain[clamped]) * np.float32(BOUND)
    assert (flat(first)[clamped] == bounds).all() and (flat(second)[clamped] == bounds).all()
    assert (flat(first)[~clamped] != plain[~clamped]).all()
    defense = defended("clipped", per_batch)
    law = defense.law(second, gradient, public)
    variance = flat(law.variance)
    assert (variance[clamped] == 0).all() and (variance[~clamped] > 0).all()
    scale = np.where(clamped, law.slack, np.sqrt(variance))
    closed = stats.norm.logpdf(flat(second), np.clip(plain, -BOUND, BOUND), scale).sum()
    np.testing.assert_allclose(score, closed, rtol=1e-3)
    # A later stage hides what was clamped: the clamp is replayed on the candidate.
    hidden = chain(defense, gaussian_noise(0.01))
    law = hidden.law(second, gradient, (*public, None))
    np.testing.assert_allclose(flat(law.variance), variance + 1e-4, rtol=1e-4)


@pytest.mark.parametrize("per_batch", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_rounding_is_to_its_own_grid_within_half_a_step(per_batch):
    _, second, gradient, public, score, _ = sent("rounding", per_batch)
    defense = defended("rounding", per_batch)
    law = defense.law(second, gradient, public)
    steps, out, plain = flat(law.rounding.steps), flat(second), flat(gradient)
    np.testing.assert_allclose(np.sqrt((steps**2).mean()), 0.1, rtol=1e-5)
    np.testing.assert_allclose(out / steps, np.round(out / steps), atol=1e-4)
    assert (np.abs(out - plain) <= steps / 2 * (1 + 1e-5)).all()
    assert (out != plain).any() and len(set(np.round(steps, 6))) > SIZE / 2
    probability = stats.norm.cdf((out - plain + steps / 2) / law.slack) - stats.norm.cdf(
        (out - plain - steps / 2) / law.slack
    )
    np.testing.assert_allclose(score, np.log(probability).sum(), rtol=1e-2, atol=0.2)
    # The law after later noise.
    hidden = chain(gaussian_noise(0.02), defense, gaussian_noise(0.03))
    law = hidden.law(second, gradient, (None, *public, None))
    np.testing.assert_allclose(flat(law.variance), 13e-4 + steps**2 / 12, rtol=1e-4)
    silent = chain(defense, gaussian_noise(0.03))
    law = silent.law(second, gradient, (*public, None))
    np.testing.assert_allclose(flat(law.location), out, atol=1e-6)
    # A factor hides the grid, and is replayed with the rounding.
    clipped = chain(defense, global_clip(0.1))
    state = ready(defense, clipped.init(PARAMS))
    third, _ = clipped.update(gradient, state)
    law = clipped.law(third, gradient, clipped.public(state))
    assert law.rounding is None
    np.testing.assert_allclose(flat(law.location), flat(third), atol=1e-6)


def test_a_pruning_mask_is_read_off_the_zeros_or_published():
    _, second, gradient, public, _, _ = sent("pruning", True)
    defense = defended("pruning", True)
    zero = flat(second) == 0
    assert zero.sum() == int(0.4 * SIZE) and public == (None,)
    law = defense.law(second, gradient)
    assert (flat(law.informative) == ~zero).all() and (flat(law.location)[zero] == 0).all()
    published = optimal_pruning(MODEL, 0.4, known=True)
    _, state = published.prepare(draw(), published.init(PARAMS), PARAMS)
    (mask,) = published.public(state)
    assert (~flat(mask).astype(bool)).sum() == zero.sum()
    behind = chain(published, gaussian_noise(0.1)).law(second, gradient, (mask, None))
    assert (flat(behind.informative) == flat(mask)).all()
    # Unpublished and hidden, it is a mask of that share.
    unknown = chain(defense, gaussian_noise(0.1)).law(second, gradient)
    assert unknown.informative is None
    np.testing.assert_allclose(unknown.dropped, 0.4)
    # Of public sensitivities it is known whatever follows.
    public = defended("pruning", False)
    out, _ = public.update(gradient, public.init(PARAMS))
    fixed = chain(public, gaussian_noise(0.1)).law(out, gradient)
    assert (flat(fixed.informative) == (flat(out) != 0)).all()


def test_who_is_not_told_the_deviations_takes_them_to_be_equal():
    _, second, gradient, *_ = sent("noise", True)
    for make, expected in (
        (lambda **k: optimal_noise(MODEL, 0.1, **k), 0.01),
        (lambda **k: optimal_rounding(MODEL, 0.1, **k), 0.01 / 12),
    ):
        law = make(known=False).law(second, gradient)
        np.testing.assert_allclose(flat(law.variance), expected, rtol=1e-5)
        with pytest.raises(ValueError, match="pass public=defense"):
            make().law(second, gradient)


@pytest.mark.parametrize("name", ["noise", "rounding"])
def test_layerwise_strengths_are_equal_within_a_tensor(name):
    defense = MAKERS[name][0](population(), layerwise=True)
    law = defense.law(PARAMS, PARAMS)
    strengths = law.rounding.steps if name == "rounding" else law.variance
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(strengths)]
    assert all(np.ptp(leaf) <= 1e-6 * leaf.max() for leaf in leaves)
    assert len({float(leaf.flat[0]) for leaf in leaves}) == len(leaves)
    squares = np.concatenate([leaf.ravel() for leaf in leaves])
    squares = squares**2 if name == "rounding" else squares
    np.testing.assert_allclose(squares.mean(), 0.01, rtol=1e-5)


# What every defence must keep.


@EVERY
def test_many_clients_differ_where_they_should_and_nothing_is_nan(name, per_batch):
    one, key, zero, batch = clients(name, per_batch)
    chex.assert_tree_all_finite((one, key, zero, batch))
    assert (flat(one.first) == flat(one.second)).all() == (name not in FRESH)
    # Probes are drawn too.
    assert (flat(one.first) == flat(key.first)).all() == (name not in FRESH and not per_batch)
    assert (flat(one.first) != flat(batch.first)).any()
    assert one.score.shape == () and one.score.dtype == np.float32
    assert any(leaf is not None for leaf in one.public) == (per_batch and name != "pruning")


@pytest.mark.parametrize(
    ("name", "per_batch"),
    [("noise", True), pytest.param("pruning", False, marks=pytest.mark.slow)],
)
def test_observe_prepares_it(name, per_batch):
    defense, keys = defended(name, per_batch), jax.random.split(jax.random.key(0))

    def client(key, batch):
        seen = invjax.observe(key, MODEL, PARAMS, batch, defense)
        return seen.gradient, seen.public

    with jax.debug_key_reuse(True):
        gradient, public = jax.jit(client)(keys[0], draw())
    # As by hand, alone and not among many.
    state = defense.init_with_key(jax.random.split(keys[0])[1], PARAMS)
    _, state = jax.jit(defense.prepare)(draw(), state, PARAMS)
    plain = sent(name, per_batch).gradient
    expected, state = defense.update(plain, state, PARAMS)
    chex.assert_trees_all_close(gradient, expected, atol=1e-5)
    chex.assert_trees_all_close(public, defense.public(state), rtol=1e-4, atol=1e-6)
    wrong = jax.tree.map(lambda leaf: leaf + 0.3, plain)
    assert defense.log_likelihood(gradient, plain, public) > defense.log_likelihood(
        gradient, wrong, public
    )


@EVERY
def test_it_is_an_optax_transformation_that_keeps_shapes_and_dtypes(name, per_batch):
    defense = defended(name, per_batch)
    assert isinstance(defense, Defense) and len(defense) == 2
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    for tree in (PARAMS, params):
        out, _ = defense.update(tree, ready(defense, defense.init(tree)), tree)
        chex.assert_trees_all_equal_shapes_and_dtypes(out, tree)
        chex.assert_tree_all_finite(out)
    optimizer = optax.chain(defense, optax.sgd(0.5))
    state = optimizer.init(PARAMS)
    prepared = (ready(defense, state[0]), *state[1:])
    updates, after = optimizer.update(PARAMS, prepared, PARAMS, value=0.0)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
    plain, _ = defense.update(PARAMS, ready(defense, defense.init(PARAMS)))
    chex.assert_trees_all_close(updates, jax.tree.map(lambda leaf: -0.5 * leaf, plain), atol=1e-6)


@EVERY
def test_strength_zero_is_the_identity(name, per_batch):
    _, zero, make = MAKERS[name]
    defense = make(source(per_batch), *zero)
    gradient, state = sent("noise", True).gradient, defense.init(PARAMS)
    for _ in range(2):
        batch, state = defense.prepare(draw(), state, PARAMS)
        chex.assert_trees_all_equal(batch, draw())
        out, state = defense.update(gradient, state, PARAMS)
        chex.assert_trees_all_equal(out, gradient)
    assert defense.public(state) == (None,)
    score = defense.log_likelihood(gradient, gradient)
    np.testing.assert_allclose(score, chain().log_likelihood(gradient, gradient))


@pytest.mark.parametrize("name", ["clipped", "pruning"])
def test_it_must_see_the_batch(name):
    defense = MAKERS[name][0](MODEL, num_probes=None)
    state = defense.init(PARAMS)
    with pytest.raises(ValueError, match="must see the batch before every update"):
        defense.update(PARAMS, state, PARAMS)
    (plan,) = (part.plan for part in state)
    start = {"noise": 0.1, "clipped": 0.02, "pruning": 1, "rounding": 0.1}[name]
    np.testing.assert_allclose(flat(plan), start, rtol=1e-6)
    batch, after = defense.prepare(draw(), state, PARAMS)
    chex.assert_trees_all_equal(batch, draw())
    chex.assert_trees_all_equal_shapes_and_dtypes(tuple(after), state)
    assert not np.allclose(flat(after[0].plan), start)


def test_a_traced_strength_passes():
    gradient, make = PARAMS, functools.partial(optimal_noise, population())

    @jax.jit
    def run(std):
        defense = make(std)
        out, _ = defense.update(gradient, defense.init_with_key(jax.random.key(0), PARAMS))
        return out

    fixed = make(0.2)
    out, _ = fixed.update(gradient, fixed.init_with_key(jax.random.key(0), PARAMS))
    chex.assert_trees_all_close(run(0.2), out, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: optimal_noise(population(), -1.0), ValueError, "std must lie in"),
        (lambda: optimal_clipped_noise(population(), 0.0, 1.0), ValueError, "bound must lie in"),
        (lambda: optimal_clipped_noise(population(), 1.0, -1.0), ValueError, "std must lie in"),
        (lambda: optimal_pruning(population(), 1.0), ValueError, "fraction must lie in"),
        (lambda: optimal_rounding(population(), -0.1), ValueError, "step must lie in"),
        (lambda: optimal_noise(MODEL, 0.1, num_probes=0), ValueError, "num_probes must be a whole"),
        (lambda: optimal_noise(PARAMS, 0.1), TypeError, "source must be an invjax Sensitivity"),
    ],
)
def test_settings_out_of_range_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_sensitivities_of_another_model_are_refused():
    other = models.mlp((4,), 3).init(jax.random.key(0), SHAPE)
    defense = optimal_noise(population(), 0.1)
    with pytest.raises(ValueError, match="source must have the gradient's tree and shapes"):
        defense.init(other)
    with pytest.raises(ValueError, match="source must have the gradient's tree and shapes"):
        defense.law(other, other)


def test_a_sensitivity_is_a_tree_that_may_be_passed_about():
    assert isinstance(jax.tree.map(lambda leaf: 2 * leaf, population()), Sensitivity)
