"""Defences as optax transformations in training code, and their arguments."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import invjax
from invjax import defenses, gradients

CONSTRUCTORS = {
    "gaussian_noise": (0.01, 0.0),
    "laplace_noise": (0.01, 0.0),
    "clip_per_sample": (1.0, float("inf")),
    "global_clip": (1.0, float("inf")),
    "dp_sgd": ((1.0, 0.5), (float("inf"), 0.0)),
    "magnitude_prune": (0.5, 0.0),
    "random_mask": (0.5, 0.0),
    "gradient_dropout": (0.5, 0.0),
    "sign_compress": ((), None),
    "quantize": (8, None),
}


def build(name, strength):
    args = strength if isinstance(strength, tuple) else (strength,)
    return getattr(defenses, name)(*args)


@pytest.fixture(scope="module")
def problem():
    digits = invjax.datasets.digits()
    model = invjax.models.mlp((16,))
    params = model.init(jax.random.key(0), digits.input_shape)
    return model, params, invjax.datasets.take(digits, range(200))


def train(problem, defense, per_sample, steps=60):
    """Parameters and accuracy of Adam behind a defence, or, with `None`, of Adam alone."""
    model, params, data = problem
    adam = optax.adam(1e-2)
    optimizer = adam if defense is None else optax.chain(defense, adam)

    @jax.jit
    def step(params, state, batch):
        compute = gradients.per_sample_gradients if per_sample else gradients.gradient
        updates = compute(model, params, batch)
        if defense is None and per_sample:
            updates = jax.tree.map(lambda leaf: leaf.mean(axis=0), updates)
        updates, state = optimizer.update(updates, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for index in range(steps):
        start = (index * 20) % 200
        batch = jax.tree.map(lambda leaf, s=start: leaf[s : s + 20], data)
        params, state = step(params, state, batch)
    logits = model.apply(params, data.inputs)
    return params, float((logits.argmax(-1) == data.labels).mean())


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_trains_inside_optax_chain(problem, name):
    defense = build(name, CONSTRUCTORS[name][0])
    params, accuracy = train(problem, defense, defense.stage == "per_sample")
    chex.assert_tree_all_finite(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, problem[1])
    assert accuracy > 0.4


@pytest.mark.parametrize(
    "name", [name for name, (_, zero) in CONSTRUCTORS.items() if zero is not None]
)
def test_strength_zero_trains_as_without(problem, name):
    defense = build(name, CONSTRUCTORS[name][1])
    per_sample = defense.stage == "per_sample"
    plain, plain_accuracy = train(problem, None, per_sample)
    params, accuracy = train(problem, defense, per_sample)
    # The order of summation may differ in the last bit.
    chex.assert_trees_all_close(params, plain, atol=1e-6)
    assert accuracy == plain_accuracy > 0.6


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_keeps_float64(name):
    with jax.enable_x64(True):
        defense = build(name, CONSTRUCTORS[name][0])
        tree = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)}
        gradient = tree
        if defense.stage == "per_sample":
            gradient = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), tree)
        observed, _ = defense.update(gradient, defense.init(tree), tree)
        assert observed["w"].dtype == jnp.float64 and observed["w"].shape == (3, 4)


def test_chain_takes_defenses_only():
    with pytest.raises(TypeError, match=r"optax\.chain"):
        invjax.chain(optax.adam(1e-3))


def test_two_laplace_noises_have_no_law():
    defense = defenses.parse("laplace(0.1),laplace(0.1)")
    tree = {"a": jnp.ones(3)}
    with pytest.raises(ValueError, match="closed-form"):
        defense.log_likelihood(tree, tree)


def test_noise_around_an_unknown_mask_has_no_law():
    defense = defenses.parse("gaussian(0.1),random_mask(0.5, known=False),gaussian(0.1)")
    tree = {"a": jnp.ones(3)}
    with pytest.raises(ValueError, match="unknown mask"):
        defense.log_likelihood(tree, tree)


def test_a_known_mask_must_be_published():
    tree = {"a": jnp.ones(3)}
    with pytest.raises(ValueError, match="mask"):
        defenses.random_mask(0.5).log_likelihood(tree, tree)


def test_two_unknown_masks_drop_together():
    defense = defenses.parse("gradient_dropout(0.5),gradient_dropout(0.5),gaussian(0.1)")
    law = defense.law({"a": jnp.ones(3)}, {"a": jnp.ones(3)})
    np.testing.assert_allclose(law.dropped, 0.75)


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("gaussian_noise", (-0.1,), "std"),
        ("gaussian_noise", ("a lot",), "std"),
        ("laplace_noise", (-0.1,), "scale"),
        ("clip_per_sample", (-1.0,), "clip_norm"),
        ("global_clip", (-1.0,), "clip_norm"),
        ("dp_sgd", (1.0, -1.0), "noise_multiplier"),
        ("dp_sgd", (1.0, 1.0, "both"), "noise_on"),
        ("magnitude_prune", (1.0,), "fraction"),
        ("magnitude_prune", (0.5, "layer"), "scope"),
        ("random_mask", (1.5,), "fraction"),
        ("gradient_dropout", (1.0,), "rate"),
        ("quantize", (1,), "bits"),
        ("quantize", (2.5,), "bits"),
        ("quantize", (np.float32(2.5),), "bits must be a whole number"),
        ("sign_compress", ("max",), "scale"),
    ],
)
def test_bad_strengths_are_named(name, args, words):
    with pytest.raises(ValueError, match=words):
        getattr(defenses, name)(*args)
