"""Soteria: the published mask, its law, and the attacks that it does not stop."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import invjax
from invjax import Batch, attacks, defenses, gradients, metrics, models
from invjax.attacks import objectives
from invjax.defenses.soteria import drop_layer_weights, read_mask, sensitivity, soteria
from invjax.models.chain import Spec, chain_model

SHAPE = (8, 8, 1)
gradient_of = jax.jit(gradients.gradient, static_argnums=0)
SLOPES = {
    "tanh": lambda x: 1 - np.tanh(x) ** 2,
    "softplus": lambda x: 1 / (1 + np.exp(-x)),
    "relu": lambda x: (x > 0).astype(float),
}


def batch_of(size, shape=SHAPE, seed=1):
    keys = jax.random.split(jax.random.key(seed))
    return Batch(
        jax.random.uniform(keys[0], (size, *shape)), jax.random.randint(keys[1], (size,), 0, 10)
    )


@functools.cache
def problem():
    model = models.mlp((20, 12))
    return model, model.init(jax.random.key(0), SHAPE), batch_of(4)


@functools.partial(jax.jit, static_argnums=(0, 1))
def observed(defense, model, params, batch):
    return invjax.observe(jax.random.key(3), model, params, batch, defense)


@functools.partial(jax.jit, static_argnums=0)
def true_mask(defense, params, batch):
    return defense.prepare(batch, defense.init_with_key(jax.random.key(0), params), params)[1][0]


@pytest.mark.parametrize("activation", SLOPES)
def test_sensitivity_behind_one_layer_has_a_closed_form(activation):
    model = models.mlp((20,), activation=activation)
    params, batch = model.init(jax.random.key(0), SHAPE), batch_of(5)
    weight, bias = (np.asarray(params["layer01"][part], float) for part in ("kernel", "bias"))
    before = np.asarray(batch.inputs, float).reshape(5, 64) @ weight + bias
    features = np.asarray(models.activations[activation](jnp.asarray(before)))
    norms = SLOPES[activation](before) * np.linalg.norm(weight, axis=0)
    for epsilon in (0.1, 0.7):
        expected = (norms / (features + epsilon)).sum(axis=0)
        score = sensitivity(model, params, batch.inputs, -1, epsilon)
        np.testing.assert_allclose(score, expected, rtol=2e-3 if activation == "tanh" else 1e-4)


CHAINS = {
    "max_pool": [
        Spec("conv", 3, 3, 2, 1, "tanh"),
        Spec("max_pool", window=2),
        Spec("flatten", activation="softplus"),
        Spec("dense", 7, activation="elu", bias=False),
    ],
    "average_pool": [
        Spec("average_pool", window=2),
        Spec("conv", 4, 3, 1, 0, "gelu", bias=False),
        Spec("conv", 5, 1, 1, 1, "sigmoid"),
        Spec("global_average_pool"),
    ],
}


@pytest.mark.parametrize("name", CHAINS)
def test_sensitivity_is_that_of_the_features_that_the_model_itself_has(name):
    model = chain_model([*CHAINS[name], Spec("dense", 10)], 10, name)
    params, batch = model.init(jax.random.key(0), SHAPE), batch_of(2)

    # The features are the derivatives of the first logit in the last weight's first column.
    def features(sample):
        logit = jax.grad(lambda params: model.apply(params, sample[None])[0, 0])
        return attacks.labels.find_head(model, logit(params))[0][:, 0]

    values = jax.jit(jax.vmap(features))(batch.inputs)
    jacobian = jax.jit(jax.vmap(jax.jacfwd(features)))(batch.inputs)
    norms = np.linalg.norm(jacobian.reshape(*values.shape, -1), axis=-1)
    expected = (norms / (values + 0.1)).sum(axis=0)
    np.testing.assert_allclose(sensitivity(model, params, batch.inputs), expected, rtol=2e-4)


@pytest.mark.parametrize("layer", [-1, -2, 0])
def test_it_zeroes_rows_under_the_quantile_and_nothing_else(layer):
    model, params, batch = problem()
    plain = gradient_of(model, params, batch)
    defense = soteria(model, 0.6, layer=layer)
    sent = observed(defense, model, params, batch).gradient
    # At layer 0 the features are the pixels themselves: the derivative is one.
    score = np.asarray(sensitivity(model, params, batch.inputs, layer))
    if layer == 0:
        pixels = np.asarray(batch.inputs).reshape(4, 64)
        np.testing.assert_allclose(score, (1 / (pixels + 0.1)).sum(axis=0), rtol=1e-5)
    kept = np.abs(score) >= np.percentile(score, 60)
    name = {-1: "layer03", -2: "layer02", 0: "layer01"}[layer]
    expected = {part: dict(leaves) for part, leaves in plain.items()}
    expected[name]["kernel"] = plain[name]["kernel"] * kept[:, None]
    chex.assert_trees_all_close(sent, expected, atol=1e-7)
    assert 0.3 < kept.mean() < 0.5
    np.testing.assert_array_equal(true_mask(defense, params, batch), kept)


def test_the_mask_goes_where_a_layer_view_takes_its_weight_from():
    # A layer view of another layout: weights are stored [out, in], both in one leaf.
    inner = models.mlp((6,), num_classes=6)

    def unpack(tree):
        packed = tree["both"]
        return {
            "layer01": {"kernel": packed[0].T, "bias": tree["bias"]},
            "layer02": {"kernel": packed[1].T, "bias": tree["bias"]},
        }

    def layers(tree):
        assert inner.layers is not None
        return inner.layers(unpack(tree))

    params = {"both": jax.random.normal(jax.random.key(0), (2, 6, 6)), "bias": jnp.ones(6)}
    model = models.from_apply(lambda params, x: inner.apply(unpack(params), x), inner.init, 6)
    model = model._replace(layers=layers)
    batch = batch_of(2, (6,))._replace(labels=jnp.array([0, 5]))
    plain = gradient_of(model, params, batch)
    defense = soteria(model, 0.5)
    sent = observed(defense, model, params, batch).gradient
    kept = true_mask(defense, params, batch)
    assert 0 < kept.sum() < 6
    expected = plain["both"].at[1].multiply(kept[None].astype(float))
    chex.assert_trees_all_close(sent, {"both": expected, "bias": plain["bias"]}, atol=1e-7)
    np.testing.assert_array_equal(read_mask(model, sent), kept & read_mask(model, plain))
    # A leaf that holds the weight and more is dropped whole.
    assert jax.tree.map(float, drop_layer_weights(model, params)) == {"both": 0.0, "bias": 1.0}


def test_it_compiles_and_vectorises():
    model, params, batch = problem()
    defense = soteria(model, 0.5)

    def see(batch, rate):
        return invjax.observe(jax.random.key(3), model, params, batch, soteria(model, rate))

    # Each victim alone, and all of them at once; a traced rate, as in a sweep.
    victims = jax.tree.map(lambda leaf: leaf[:, None], batch)
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], victims) for i in range(4)]
    alone = [observed(defense, model, params, victim).gradient for victim in each]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    together = jax.jit(jax.vmap(see, (0, None)))(victims, jnp.float32(0.5)).gradient
    chex.assert_trees_all_close(together, stacked, atol=1e-6)
    plain = gradient_of(model, params, batch)
    with pytest.raises(ValueError, match=r"soteria\(.*\) must see the batch before every update"):
        defense.update(plain, defense.init(params), params)
    # Nothing is to be zeroed.
    off = observed(soteria(model, 0.0), model, params, batch).gradient
    chex.assert_trees_all_close(off, plain, atol=1e-7)


@pytest.mark.parametrize(
    ("known", "noisy", "compared"),
    [
        (False, False, "kept"),
        (True, False, "kept"),
        (True, True, "kept"),
        (False, True, "none"),
    ],
)
def test_the_law_compares_what_the_adversary_can_tell_was_kept(known, noisy, compared):
    model, params, batch = problem()
    defense = soteria(model, 0.5, known=known)
    if noisy:
        defense = invjax.chain(defense, defenses.gaussian_noise(1e-3))
    seen = observed(defense, model, params, batch)
    assert (seen.public[0] is not None) == known
    candidate = gradient_of(model, params, batch)

    def likelihood(candidate):
        return defense.log_likelihood(seen.gradient, candidate, seen.public)

    away = jax.tree.map(lambda leaf: leaf + 1e-2, candidate)
    slope = jax.jit(jax.grad(likelihood))(away)
    mask = true_mask(defense, params, batch)
    if not known:
        mask &= read_mask(model, candidate)
    expected = mask if compared == "kept" else jnp.zeros_like(mask)
    np.testing.assert_array_equal(
        slope["layer03"]["kernel"] != 0, np.broadcast_to(expected[:, None], (12, 10))
    )
    for name, part in (("layer03", "bias"), ("layer02", "kernel"), ("layer01", "bias")):
        assert (slope[name][part] != 0).all()


def test_a_published_mask_must_be_in_the_observation():
    model, params, batch = problem()
    gradient = gradient_of(model, params, batch)
    with pytest.raises(ValueError, match=r"needs the mask; pass public="):
        soteria(model, known=True).log_likelihood(gradient, gradient)


def test_weights_that_drop_a_layer():
    model, params, batch = problem()
    expected = {name: {part: 1.0 for part in leaves} for name, leaves in params.items()}
    for layer, name in ((-1, "layer03"), (1, "layer02"), (0, "layer01")):
        wanted = {**expected, name: {"kernel": 0.0, "bias": 1.0}}
        weights = drop_layer_weights(model, params, layer)
        assert jax.tree.map(float, weights) == wanted
    # An objective with them does not see that weight, and all the others.
    seen = observed(None, model, params, batch)
    weights = drop_layer_weights(model, params)
    assert seen.gradient is not None
    other = {**seen.gradient, "layer03": {**seen.gradient["layer03"], "kernel": jnp.ones((12, 10))}}
    for objective in (objectives.cosine, objectives.squared_l2):
        value = objective(weights).value(other, seen)
        assert abs(float(value)) < 1e-6 < float(objective().value(other, seen))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"rate": 1.1}, ValueError, r"rate must lie in \[0.0, 1.0\], got 1.1"),
        ({"epsilon": -1.0}, ValueError, r"epsilon must lie in \(0.0, inf\], got -1.0"),
        ({"epsilon": 0.0}, ValueError, r"epsilon must lie in \(0.0, inf\], got 0.0"),
        ({"layer": 1.5}, TypeError, "layer must be an integer, got 1.5"),
        ({"layer": 3}, ValueError, r"layer must lie in \[-3, 2\], the dense layers of mlp, got 3"),
        ({"layer": -4}, ValueError, r"layer must lie in \[-3, 2\]"),
    ],
)
def test_it_refuses(settings, error, message):
    model, params, _ = problem()
    with pytest.raises(error, match=message):
        soteria(model, **settings).init(params)


def test_it_needs_a_chain_with_vectors():
    model = models.convnet()
    with pytest.raises(ValueError, match="The model convnet64 has no layer view"):
        soteria(model)
    with pytest.raises(ValueError, match="has no layer view"):
        read_mask(model, {})
    pixels = chain_model([Spec("dense", 4), Spec("global_average_pool")], 4, "pixelwise")
    params = pixels.init(jax.random.key(0), SHAPE)
    with pytest.raises(ValueError, match=r"vector a sample as input, got \(8, 8, 1\)"):
        sensitivity(pixels, params, jnp.ones((1, *SHAPE)))


def attacked(model, number, num_steps):
    """Mean PSNR of the naive attack, the one that drops the layer, and the matched one."""
    digits = invjax.datasets.digits()
    params = model.init(jax.random.key(0), digits.input_shape)
    victims = invjax.datasets.take(digits, np.arange(number)[:, None])
    defense = soteria(model, 0.8, layer=-2)

    def see(batch, defense):
        return invjax.observe(jax.random.key(1), model, params, batch, defense, grant_labels=True)

    seen = jax.vmap(lambda batch: see(batch, defense))(victims)
    plain = jax.vmap(lambda batch: see(batch, None))(victims)
    masks = jax.vmap(lambda batch: true_mask(defense, params, batch))(victims)
    read = jax.vmap(lambda gradient: read_mask(model, gradient, -2))(seen.gradient)
    active = jax.vmap(lambda gradient: read_mask(model, gradient, -2))(plain.gradient)

    def quality(attack, batch, observation):
        found = attack(jax.random.key(2), observation)
        return metrics.psnr(found.inputs, batch.inputs, data_range=1.0)

    def matching(weights, batch, observation):
        attack = attacks.inverting_gradients(
            model, objective=objectives.cosine(weights), total_variation=0.0, num_steps=num_steps
        )
        return quality(attack, batch, observation)

    # The naive attack and the one that drops the layer, in one compilation.
    weights = jax.tree.map(
        lambda weight: jnp.stack([jnp.ones(()), weight]), drop_layer_weights(model, params, -2)
    )
    over_victims = jax.vmap(matching, (None, 0, 0))
    naive, drop = jax.jit(jax.vmap(over_victims, (0, None, None)))(weights, victims, seen)
    bayes = attacks.bayes(model, defense, num_steps=num_steps)
    masked = jax.jit(jax.vmap(lambda *victim: quality(bayes, *victim)))(victims, seen)
    decibels = {"naive": naive.mean(), "drop": drop.mean(), "masked": masked.mean()}
    return decibels, masks, read, active


def check_published(decibels, masks, read, active):
    assert decibels["naive"] <= 18
    assert decibels["drop"] >= 35
    assert decibels["masked"] >= max(decibels["drop"] - 1, 35)
    assert (read == masks)[active].all() and active.mean() > 0.3
    np.testing.assert_allclose(masks.mean(axis=1), 0.2, atol=0.01)


def test_it_stops_only_the_attack_that_does_not_know_it():
    check_published(*attacked(models.mlp((128, 64)), number=4, num_steps=300))


@pytest.mark.slow
def test_it_stops_only_the_attack_that_does_not_know_it_on_convolutions():
    dense = [Spec("dense", width, activation="relu") for width in (256, 64)]
    first = [Spec("conv", 16, 3, 2, 1, "relu"), Spec("flatten")]
    model = chain_model([*first, *dense, Spec("dense", 10)], 10, "conv")
    check_published(*attacked(model, number=12, num_steps=600))
