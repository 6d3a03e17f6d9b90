"""Laws against draws: densities integrate and fit, probabilities are frequencies, moments agree."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from invjax import defenses
from invjax.defenses import densities, parse
from invjax.defenses.law import deviation

LOCATION = 0.8


def observe(text, gradient, number, seed=0):
    """Independent draws of an aggregate-stage defence."""
    defense = parse(text)

    def one(key):
        return defense.update(gradient, defense.init_with_key(key, gradient))[0]

    return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(seed), number))


def law_of(text, observed, candidate):
    """The law and its deviations."""

    @jax.jit
    def law(observed, candidate):
        law = parse(text).law(observed, candidate)
        return law, deviation(law)

    return law(observed, candidate)


@pytest.mark.parametrize(
    "text",
    [
        "gaussian(0.5)",
        "laplace(0.5)",
        "gaussian(0.5),laplace(0.3)",
        "gaussian(0.3),gaussian(0.4),laplace(0.05)",
        "random_mask(0.4, known=False),gaussian(0.2)",
        "random_mask(0.4, known=False),laplace(0.2)",
        "gradient_dropout(0.4),gaussian(0.2)",
        "global_clip(0.5),gaussian(0.2)",
        "gradient_dropout(0.4),gaussian(0.2),sign_compress(),gaussian(1.0)",
    ],
)
def test_density_integrates_to_one_and_fits(text):
    gradient = {"a": jnp.full(1, LOCATION)}
    grid = np.linspace(-12, 12, 8001)
    defense = parse(text)
    with jax.enable_x64(True):
        candidate = {"a": jnp.full(1, LOCATION, jnp.float64)}
        value = jax.vmap(lambda y: defense.log_likelihood({"a": y[None]}, candidate, slack=1e-3))
        density = np.exp(np.asarray(jax.jit(value)(jnp.asarray(grid))))
    assert integrate.trapezoid(density, grid) == pytest.approx(1.0, abs=1e-4)
    if "sign" in text:
        return  # matched in two moments only, see below
    distribution = integrate.cumulative_trapezoid(density, grid, initial=0)
    samples = np.ravel(observe(text, gradient, 20_000)["a"])
    assert stats.kstest(samples, lambda y: np.interp(y, grid, distribution)).pvalue > 1e-3


TREE = {"a": jnp.linspace(-1.0, 1.4, 12).reshape(3, 4), "b": jnp.asarray([0.3, -0.7, 0.05])}


@pytest.mark.parametrize(
    "text",
    [
        "gaussian(0.3),laplace(0.2)",
        "global_clip(0.5),gaussian(0.3)",
        "magnitude_prune(0.5),gaussian(0.3)",
        "gradient_dropout(0.4),global_clip(100.0),gaussian(0.3)",
        "random_mask(0.4, known=False),laplace(0.3)",
        "quantize(3),gaussian(0.3)",
        "gaussian(0.5),sign_compress(),gaussian(0.3)",
        "laplace(0.5),sign_compress(),gaussian(0.3)",
        "gradient_dropout(0.4),gaussian(0.5),sign_compress(),gaussian(0.3)",
        "sign_compress('mean'),gaussian(0.3)",
    ],
)
def test_mean_and_variance_are_those_of_the_law(text):
    number = 20_000
    samples = observe(text, TREE, number)
    law, spreads = law_of(text, jax.tree.map(lambda leaf: leaf[0], samples), TREE)
    dropped = 0.0 if law.dropped is None else law.dropped
    for name, spread in spreads.items():
        mean = (1 - dropped) * law.location[name]
        variance = spread**2 + dropped * (1 - dropped) * law.location[name] ** 2
        bound = 5 * np.sqrt(variance / number)
        assert (np.abs(samples[name].mean(axis=0) - mean) < bound).all()
        np.testing.assert_allclose(samples[name].var(axis=0), variance, rtol=0.1)


@pytest.mark.parametrize(
    ("text", "rtol"),
    [
        ("quantize(4, stochastic=True),gaussian(0.1)", 0.6),
        ("gaussian(0.3),quantize(4),gaussian(0.1)", 0.1),
        ("gaussian(0.3),quantize(4, stochastic=True),gaussian(0.1)", 0.1),
    ],
)
def test_rounding_error_has_about_its_variance(text, rtol):
    # An anchor keeps the grid where it is.
    gradient = {"a": jnp.concatenate([jnp.asarray([7.0]), jnp.linspace(-1.0, 1.0, 41)])}
    samples = observe(text, gradient, 4000)["a"][:, 1:]
    _, spread = law_of(text, gradient, gradient)
    variance = np.asarray(spread["a"][1:]) ** 2
    np.testing.assert_allclose(samples.var(axis=0).mean(), variance.mean(), rtol=0.1)
    np.testing.assert_allclose(samples.var(axis=0), variance, rtol=rtol, atol=0.15)
    assert np.abs(np.asarray(samples.mean(axis=0) - gradient["a"][1:])).max() < 0.1


@pytest.mark.parametrize("noise", ["gaussian(1.0)", "laplace(0.7)", "gaussian(0.7),laplace(0.5)"])
@pytest.mark.parametrize("bits", ["8", "8, stochastic=True"])
def test_cells_have_the_probability_of_their_frequency(noise, bits):
    text = f"{noise},quantize({bits})"
    # The grid's step is 1 to a percent, whatever the noise.
    gradient = {"a": jnp.asarray([0.3, -1.7, 127.0])}
    samples = np.asarray(observe(text, gradient, 4000)["a"])
    cells = np.round(samples[:, 0] / (samples[:, 2] / 127)).astype(int)
    defense = parse(text)

    # The coordinate's own probabilities sum to one wherever it lies: the rest stays the same.
    elsewhere = {"a": gradient["a"].at[0].add(3.0)}

    @jax.jit
    @jax.vmap
    def values(cell):
        observed = {"a": jnp.asarray([0.0, 0.0, 127.0]).at[0].set(cell)}
        return tuple(defense.log_likelihood(observed, x) for x in (gradient, elsewhere))

    support = jnp.arange(-14.0, 15.0)
    logs, shifted = (np.asarray(part, np.float64) for part in values(support))
    expected = np.exp(logs - logs.max())
    expected /= expected.sum()
    assert np.logaddexp.reduce(shifted) == pytest.approx(np.logaddexp.reduce(logs), abs=2e-3)
    counts = np.array([(cells == cell).sum() for cell in support.astype(int)])
    rare = expected * 4000 < 10
    observed = np.append(counts[~rare], counts[rare].sum())
    predicted = np.append(expected[~rare], expected[rare].sum()) * 4000
    assert stats.chisquare(observed, predicted).pvalue > 1e-3


@pytest.mark.parametrize(
    ("text", "up"),
    [
        ("gaussian(0.5),sign_compress()", stats.norm.cdf(LOCATION / 0.5)),
        ("laplace(0.5),sign_compress()", stats.laplace.cdf(LOCATION / 0.5)),
        (
            "random_mask(0.4, known=False),gaussian(0.5),sign_compress()",
            0.6 * stats.norm.cdf(LOCATION / 0.5) + 0.4 * 0.5,
        ),
        ("gaussian(0.5),sign_compress('mean'),random_mask(0.01)", stats.norm.cdf(LOCATION / 0.5)),
        ("random_mask(0.01),gaussian(0.5),sign_compress()", stats.norm.cdf(LOCATION / 0.5)),
    ],
)
def test_signs_have_their_probability(text, up):
    defense = parse(text)
    gradient = {"a": jnp.full(1, LOCATION)}
    public = defense.public(defense.init({"a": jnp.ones(1)}))
    likelihood = [
        float(jnp.exp(defense.log_likelihood({"a": jnp.full(1, sign)}, gradient, public)))
        for sign in (1.0, -1.0)
    ]
    np.testing.assert_allclose(likelihood, [up, 1 - up], rtol=1e-5)
    if "known=False" in text:
        samples = np.ravel(observe(text, gradient, 4000)["a"])
        assert abs((samples > 0).mean() - up) < 5 * 0.5 / 4000**0.5


def test_stochastic_cells_without_noise():
    defense, gradient = parse("quantize(4, stochastic=True)"), {"a": jnp.asarray([0.3, 7.0])}
    samples = np.asarray(observe("quantize(4, stochastic=True)", gradient, 4000)["a"][:, 0])
    assert abs((samples == 1).mean() - 0.3) < 5 * 0.5 / 4000**0.5
    for cell, probability in ((0.0, 0.7), (1.0, 0.3)):
        value = defense.log_likelihood({"a": jnp.asarray([cell, 7.0])}, gradient)
        assert float(jnp.exp(value)) == pytest.approx(probability, rel=1e-4)


def test_pruned_coordinates_are_calibrated():
    """Of the coordinates that an adversary gives a chance p to lie below the threshold, p do."""
    gradient = {"a": jnp.linspace(-1.0, 1.0, 2001)}
    defense = parse("gaussian(0.3),magnitude_prune(0.5)")
    observed = defense.update(gradient, defense.init(gradient))[0]
    law = defense.law(observed, gradient)
    assert law.pruned["a"] == jnp.abs(observed["a"][observed["a"] != 0]).min()
    chance = jnp.exp(
        densities.log_interval(gradient["a"], 0.0, law.pruned["a"], densities.Noise(0.3))
    )
    zeros = np.asarray(observed["a"] == 0)
    for group in np.array_split(np.argsort(chance), 8):
        spread = np.sqrt(float((chance[group] * (1 - chance[group])).sum()))
        assert abs(zeros[group].sum() - float(chance[group].sum())) < 4 * spread + 1


def test_pruning_in_a_mask():
    """What a known mask left out says nothing, what it left in and pruning zeroed lies below."""
    gradient = {"a": jnp.asarray([3.0, -0.1, 2.0, 0.2, 5.0, 0.05])}
    for text in ("random_mask(0.4),magnitude_prune(0.5)", "magnitude_prune(0.5),random_mask(0.4)"):
        defense = parse(text).with_key(jax.random.key(6))
        state = defense.init(gradient)
        public = defense.public(state)
        mask = next(part for part in public if part is not None)["a"]
        assert 0 < int(mask.sum()) < 6
        observed = defense.update(gradient, state)[0]

        @jax.jit
        def score(candidate, defense=defense, observed=observed, public=public):
            return defense.log_likelihood(observed, {"a": candidate}, public)

        best = score(gradient["a"])
        outside = int(jnp.argmin(mask))
        assert score(gradient["a"].at[outside].add(100.0)) == best
        inside = int(jnp.argmax(mask & (observed["a"] == 0)))
        assert observed["a"][inside] == 0 and mask[inside]
        assert score(gradient["a"].at[inside].add(100.0)) < best - 1e3


def test_pruning_behind_an_unknown_mask_forgives_zeros_only():
    """A large coordinate that reads zero was masked; one that reads otherwise was not."""
    defense = parse("random_mask(0.5, known=False),magnitude_prune(0.25)")
    observed = {"a": jnp.asarray([0.0, 3.0, 1.0, 0.0])}
    candidate = jnp.asarray([7.0, 3.0, 1.0, 0.2])

    @jax.jit
    def score(candidate):
        return defense.log_likelihood(observed, {"a": candidate})

    assert score(candidate) > score(candidate.at[1].set(4.0)) + 1e3
    small = score(candidate.at[0].set(0.1))
    assert float(small - score(candidate)) == pytest.approx(np.log(2), abs=1e-3)


@pytest.mark.parametrize(
    "behind", ["random_mask(0.5)", "gradient_dropout(0.5)", "global_clip(0.5)", "gaussian(0.1)"]
)
def test_a_grid_is_not_read_where_a_later_stage_hides_it(behind):
    """The largest coordinate tells the grid, if it was neither masked nor multiplied."""
    gradient = {"a": jnp.linspace(-1.0, 1.4, 60)}
    defense = parse(f"quantize(5),{behind}")
    state = defense.init(gradient)
    observed, _ = defense.update(gradient, state)
    law = defense.law(observed, gradient, defense.public(state))
    assert law.rounding is None
    if "gaussian" not in behind:
        kept = observed["a"] != 0
        np.testing.assert_allclose(law.location["a"][kept], observed["a"][kept], atol=1e-6)
    # What does nothing hides nothing.
    bare = defenses.chain(parse("quantize(5)"), parse("gaussian(0.0)"))
    assert bare.law(gradient, gradient).rounding is not None


def test_zero_tensors_are_harmless():
    zeros = {"a": jnp.zeros(4), "b": jnp.ones(3)}
    for text in (
        "magnitude_prune(0.5)",
        "magnitude_prune(0.5, 'global')",
        "quantize(4)",
        "quantize(4, stochastic=True)",
        "sign_compress()",
        "sign_compress('mean')",
        "gradient_dropout(0.5)",
    ):
        defense = parse(text)

        @jax.jit
        def both(defense=defense):
            observed = defense.update(zeros, defense.init(zeros))[0]
            score = jax.value_and_grad(
                lambda candidate: defense.log_likelihood(observed, candidate)
            )
            return observed, score(jax.tree.map(lambda leaf: leaf + 0.1, zeros))

        observed, scores = both()
        chex.assert_tree_all_finite(scores)
        chex.assert_trees_all_equal(observed["a"], zeros["a"])


ZERO = [
    "gaussian_noise(0)",
    "gaussian_noise(0.0, per_sample=True)",
    "laplace_noise(0.0)",
    "clip_per_sample(1e999)",
    "global_clip(1e999)",
    "dp_sgd(1e999, 0.0)",
    "magnitude_prune(0)",
    "random_mask(0.0)",
    "random_mask(0.0, known=False)",
    "gradient_dropout(0.0)",
]


@pytest.mark.parametrize("text", ZERO)
def test_strength_zero_is_the_identity(text):
    """To the bit, for the client and for the adversary: zeros are no masked coordinates."""
    gradient = {"a": TREE["a"].at[0].set(0.0), "b": TREE["b"]}
    defense, plain = parse(text), defenses.chain()
    given, mean = gradient, gradient
    if defense.stage == "per_sample":
        given = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.1 * leaf, leaf + 1]), gradient)
        mean = jax.tree.map(lambda leaf: leaf.mean(axis=0), given)
    state = defense.init(gradient)
    observed, _ = defense.update(given, state, gradient)
    chex.assert_trees_all_equal(observed, mean)
    candidate = jax.tree.map(lambda leaf: leaf + 0.01, given)
    shifted = candidate
    if defense.stage == "per_sample":
        shifted = jax.tree.map(lambda leaf: leaf.mean(axis=0), candidate)
    found = defense.log_likelihood(observed, candidate, defense.public(state))
    assert found == plain.log_likelihood(mean, shifted)


@pytest.mark.parametrize(
    ("make", "strengths"),
    [
        (defenses.gaussian_noise, [0.0, 0.1, 1.0]),
        (defenses.laplace_noise, [0.0, 0.1, 1.0]),
        (lambda b: defenses.chain(defenses.gaussian_noise(0.1), defenses.laplace_noise(b)), [0, 1]),
        (lambda s: defenses.chain(defenses.gaussian_noise(s), defenses.laplace_noise(1)), [0, 1]),
        (defenses.global_clip, [0.1, 1.0, jnp.inf]),
        (defenses.magnitude_prune, [0.0, 0.5, 0.9]),
        (lambda p: defenses.random_mask(p, known=False), [0.0, 0.5]),
        (defenses.gradient_dropout, [0.0, 0.5]),
        (defenses.quantize, [2.0, 4.0, 8.0]),
    ],
)
def test_strengths_may_be_swept(make, strengths):
    """One compilation serves all strengths, zero included, and agrees with each on its own."""

    def both(strength):
        defense = make(strength)
        state = defense.init_with_key(jax.random.key(0), TREE)
        observed = defense.update(TREE, state)[0]
        candidate = jax.tree.map(lambda leaf: leaf + 0.01, TREE)
        score = jax.value_and_grad(lambda c: defense.log_likelihood(observed, c))
        return observed, *score(candidate)

    swept = jax.jit(jax.vmap(both))(jnp.asarray(strengths, jnp.float32))
    chex.assert_tree_all_finite(swept)
    chex.assert_trees_all_close(
        jax.tree.map(lambda leaf: leaf[-1], swept),
        jax.jit(lambda: both(strengths[-1]))(),
        rtol=1e-3,
    )


def test_swept_clipping_radius():
    tree = {"a": jnp.ones((3, 4))}
    norms = jax.vmap(lambda r: jnp.sum(defenses.clip_per_sample(r).update(tree, ((),))[0]["a"]))(
        jnp.asarray([0.5, 1.0, 100.0])
    )
    np.testing.assert_allclose(norms, [1.0, 2.0, 4.0], rtol=1e-6)


def test_wider_strengths_do_not_widen_gradients():
    with jax.enable_x64(True):
        tree = {"a": jnp.ones((1, 4), jnp.float32), "b": jnp.ones((1, 4), jnp.float64)}
        defense = defenses.dp_sgd(jnp.asarray(0.5), np.float64(0.1))
        observed = defense.update(tree, defense.init(tree))[0]
        assert observed["a"].dtype == jnp.float32
        assert observed["b"].dtype == jnp.float64
        assert defense.name == "dp_sgd(0.5, 0.1, 'sum')"


def test_with_key_changes_the_draw_and_nothing_else():
    defense = defenses.chain(defenses.gaussian_noise(1.0), defenses.gradient_dropout(0.5))
    other = defense.with_key(jax.random.key(7))

    def draw(defense):
        return defense.update(TREE, defense.init(TREE))[0]

    assert other.name == defense.name and other.stages == defense.stages
    chex.assert_trees_all_equal(draw(defense), draw(defense))
    assert not np.allclose(draw(defense)["a"], draw(other)["a"])
    expected = defense.update(TREE, defense.init_with_key(jax.random.key(7), TREE))[0]
    chex.assert_trees_all_equal(draw(other), expected)
    chex.assert_trees_all_equal(draw(defenses.chain(defense, key=jax.random.key(7))), expected)


def test_mean_of_laplace_noise_has_no_law():
    defense = defenses.laplace_noise(0.1)
    early = defenses.base.from_stages(*(s._replace(stage="per_sample") for s in defense.stages))
    tree = {"a": jnp.ones((2, 3))}
    with pytest.raises(ValueError, match="no closed form for batches over 1"):
        early.log_likelihood({"a": jnp.ones(3)}, tree)
    one = {"a": jnp.ones((1, 3))}
    expected = defense.log_likelihood({"a": jnp.zeros(3)}, {"a": jnp.ones(3)})
    assert early.log_likelihood({"a": jnp.zeros(3)}, one) == expected


def test_a_likelihood_of_half_precision_is_summed_in_single():
    tree = {"a": jnp.linspace(-1.0, 1.0, 4096)}
    near = {"a": tree["a"].at[0].add(0.5)}
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)
    other = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), near)
    defense = parse("gaussian(0.01)")
    gap = defense.log_likelihood(half, half) - defense.log_likelihood(half, other)
    assert gap.dtype == jnp.float32
    np.testing.assert_allclose(gap, 0.5**2 / 2e-4, rtol=1e-2)


def test_a_likelihood_is_as_precise_as_the_finer_of_both_sides():
    with jax.enable_x64(True):
        defense = parse("gaussian(1e-6)")
        observed = {"a": jnp.ones(3, jnp.float32)}
        scores = [
            defense.log_likelihood(observed, {"a": jnp.ones(3) + error}) for error in (0.0, 5e-8)
        ]
        np.testing.assert_allclose(scores[0] - scores[1], 3 * 0.05**2 / 2, rtol=1e-6)


def test_the_slack_of_half_precision_is_finite():
    observed = {"a": jnp.full(70_000, 2.0, jnp.float16)}
    assert np.isfinite(parse("magnitude_prune(0.5)").log_likelihood(observed, observed))


def test_a_strength_on_the_device_is_checked_and_serves_inside_jit():
    with pytest.raises(ValueError, match="std must lie in"):
        defenses.gaussian_noise(jnp.float32(-1.0))
    std, tree = jnp.float32(0.1), {"a": jnp.zeros(3)}

    @jax.jit
    def run(tree):
        defense = defenses.gaussian_noise(std)
        return defense.update(tree, defense.init_with_key(jax.random.key(0), tree))[0]

    assert run(tree)["a"].any()
