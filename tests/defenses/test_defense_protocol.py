"""What every defence must keep: an optax transformation, and a law of what it sends.

(`test_channels.py` and `test_laws.py` compare the law with draws, `test_training.py` trains.)
"""

import importlib
import inspect
import pkgutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ready

from invjax import Defense, defenses
from invjax.defenses import parse

# Every constructor, and what it is at strength zero (where it has that).
ROWS = {
    "ats('21-13-3+7-4-15')": None,
    "clip_per_sample(0.8)": "clip_per_sample(1e999)",
    "dp_sgd(0.8, 0.5)": "dp_sgd(1e999, 0.0)",
    "dp_sgd(0.8, 0.5, 'mean')": "dp_sgd(1e999, 0.0, 'mean')",
    "gaussian_noise(0.3)": "gaussian_noise(0.0)",
    "gaussian_noise(0.3, per_sample=True)": "gaussian_noise(0.0, per_sample=True)",
    "global_clip(0.8)": "global_clip(1e999)",
    "gradient_dropout(0.4)": "gradient_dropout(0.0)",
    "instahide(2, num_classes=10)": None,
    "laplace_noise(0.3)": "laplace_noise(0.0)",
    "magnitude_prune(0.5)": "magnitude_prune(0.0)",
    "magnitude_prune(0.5, 'global')": "magnitude_prune(0.0, 'global')",
    "mixup(1.0, num_classes=10)": None,
    "quantize(4)": None,
    "quantize(4, stochastic=True)": None,
    "random_mask(0.4)": "random_mask(0.0)",
    "random_mask(0.4, known=False)": "random_mask(0.0, known=False)",
    "sign_compress()": None,
    "sign_compress('mean')": None,
}
EVERY = pytest.mark.parametrize("text", ROWS)
FRESH = ("dp_sgd", "gaussian_noise", "gradient_dropout", "laplace_noise", "quantize(4, s")

# Nested, and with a leaf without axes.
PARAMS = {
    "a": jnp.linspace(-1.0, 1.4, 12).reshape(3, 4),
    "b": (jnp.array([0.3, -0.7, 0.05]), [jnp.full((), 0.2, jnp.float32)]),
}
ZERO = jax.tree.map(jnp.zeros_like, PARAMS)


def gradient_for(defense, tree=PARAMS):
    """A gradient of the stage that a defence wants, whose mean is the tree."""
    if defense.stage == "aggregate":
        return tree
    return jax.tree.map(lambda leaf: jnp.stack([2.5 * leaf, 0.3 * leaf, 0.2 * leaf]), tree)


def send(defense, key, gradient):
    """Two steps: what is sent at each, and what the adversary makes of the second."""
    state = ready(defense, defense.init_with_key(key, PARAMS))
    first, state = defense.update(gradient, state, PARAMS)
    second, after = defense.update(gradient, ready(defense, state), PARAMS)
    return first, second, defense.log_likelihood(second, gradient, defense.public(after))


def test_every_public_constructor_has_a_row():
    found = set()
    for info in pkgutil.iter_modules(defenses.__path__):
        module = importlib.import_module(f"{defenses.__name__}.{info.name}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if inspect.signature(function).return_annotation is Defense and name[0] != "_":
                found.add(name)
    # These make a defence of others, or of a model.
    found -= {"chain", "from_stages", "parse", "soteria"}
    found -= {f"optimal_{what}" for what in ("noise", "clipped_noise", "pruning", "rounding")}
    found -= {"activation_count_pruning", "mask_exclusive_rows", "reduce_exclusivity"}
    assert found == {text.split("(")[0] for text in ROWS} and len(found) >= 10
    assert found <= set(defenses.__all__)


@EVERY
def test_it_is_an_optax_transformation(text):
    defense = parse(text)
    assert isinstance(defense, optax.GradientTransformation) and isinstance(defense, tuple)
    init, update = defense
    assert (init, update) == (defense.init, defense.update) and len(defense) == 2
    # Optax passes on whatever the other members of a chain want.
    gradient = gradient_for(defense)
    state = ready(defense, init(PARAMS))
    plain, _ = update(gradient, state)
    extra, _ = update(gradient, state, PARAMS, value=jnp.zeros(()), anything=None)
    chex.assert_trees_all_equal(plain, extra)


@EVERY
def test_a_chain_with_sgd_steps_by_what_is_sent(text):
    defense = parse(text)
    gradient, optimizer = gradient_for(defense), optax.chain(defense, optax.sgd(0.5))
    # Chex counts by the function's text, over all rows.
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state):
        state = (ready(defense, state[0]), *state[1:])
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    key = jax.random.key(1)
    state = (defense.init_with_key(key, PARAMS), *optimizer.init(PARAMS)[1:])
    once, after = step(PARAMS, state)
    twice, again = step(once, after)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, again)
    first, second, _ = send(defense, key, gradient)
    for before, sent, moved in ((PARAMS, first, once), (once, second, twice)):
        expected = jax.tree.map(lambda leaf, update: leaf - 0.5 * update, before, sent)
        chex.assert_trees_all_close(moved, expected, atol=1e-6)


@EVERY
def test_steps_and_keys_differ_where_noise_is_fresh(text):
    defense = parse(text)
    gradient = gradient_for(defense)
    first, second, _ = send(defense, jax.random.key(1), gradient)
    again, _, _ = send(defense, jax.random.key(1), gradient)
    other, _, _ = send(defense, jax.random.key(2), gradient)
    chex.assert_trees_all_equal(first, again)

    def same(one, two):
        return jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one, two))

    # A fixed mask is drawn once for all steps.
    assert same(first, second) == (not text.startswith(FRESH))
    assert same(first, other) == (not text.startswith((*FRESH, "random_mask")))


@EVERY
def test_it_keeps_structure_shapes_and_dtypes(text):
    defense = parse(text)
    params = {**PARAMS, "b": jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS["b"])}
    for tree in (PARAMS, params):
        gradient = gradient_for(defense, tree)
        observed, _ = defense.update(gradient, ready(defense, defense.init(tree)), tree)
        chex.assert_trees_all_equal_shapes_and_dtypes(observed, tree)
        chex.assert_tree_all_finite(observed)


@EVERY
def test_many_clients_under_jit_and_vmap_are_each_on_their_own(text):
    defense = parse(text)
    scales = jnp.array([1.0, 0.5, -2.0])

    def client(key, scale):
        scaled = jax.tree.map(lambda leaf: leaf * scale, PARAMS)
        return send(defense, key, gradient_for(defense, scaled))

    many = jax.jit(jax.vmap(client))(jax.random.split(jax.random.key(3), 3), scales)
    for index, key in enumerate(jax.random.split(jax.random.key(3), 3)):
        one = client(key, scales[index])
        *sent, score = jax.tree.map(lambda leaf, index=index: leaf[index], many)
        chex.assert_trees_all_close(tuple(sent), one[:2], atol=1e-5)
        # Where the channel is deterministic, a rounding error of a gradient is a tenth of the slack.
        np.testing.assert_allclose(score, one[2], rtol=1e-2, atol=0.1)


@EVERY
def test_no_key_is_used_twice(text):
    defense = parse(text)
    gradient = gradient_for(defense)
    with jax.debug_key_reuse(True):
        send(defense, jax.random.key(4), gradient)
        compiled = jax.jit(lambda key: send(defense, key, gradient))
        compiled(jax.random.key(4))
        # The default key of `init` may serve any number of times.
        for _ in range(2):
            state = ready(defense, defense.init(PARAMS))
            defense.update(gradient, state, PARAMS)


@EVERY
@pytest.mark.parametrize("tree", [PARAMS, ZERO], ids=["gradient", "zero"])
def test_nothing_is_nan_on_the_way(text, tree):
    defense = parse(text)
    gradient = gradient_for(defense, tree)
    with jax.debug_nans(True):
        first, second, score = send(defense, jax.random.key(5), gradient)
    chex.assert_tree_all_finite((first, second))
    assert score.shape == () and score.dtype == jnp.float32 and np.isfinite(score)


@EVERY
@pytest.mark.parametrize("tree", [PARAMS, ZERO], ids=["gradient", "zero"])
def test_slopes_of_the_log_likelihood_are_finite(text, tree):
    defense = parse(text)
    gradient = gradient_for(defense, tree)

    def slopes(key):
        state = ready(defense, defense.init_with_key(key, PARAMS))
        observed, _ = defense.update(gradient, state, PARAMS)
        return jax.grad(lambda c: defense.log_likelihood(observed, c, defense.public(state)))(
            gradient
        )

    chex.assert_tree_all_finite(jax.jit(slopes)(jax.random.key(6)))


@pytest.mark.parametrize("text", [zero for zero in ROWS.values() if zero is not None])
@pytest.mark.parametrize("tree", [PARAMS, ZERO], ids=["gradient", "zero"])
def test_strength_zero_is_the_identity_of_any_tree(text, tree):
    defense = parse(text)
    gradient = gradient_for(defense, tree)
    first, second, score = send(defense, jax.random.key(7), gradient)
    mean = gradient
    if defense.stage == "per_sample":
        mean = jax.tree.map(lambda leaf: leaf.mean(axis=0), gradient)
    # Two ways to average round differently, and a deterministic channel scores that.
    chex.assert_trees_all_close(first, mean, rtol=1e-6)
    chex.assert_trees_all_close(second, mean, rtol=1e-6)
    undefended = defenses.chain().log_likelihood(mean, mean)
    np.testing.assert_allclose(score, undefended, rtol=1e-3, atol=0.1)
