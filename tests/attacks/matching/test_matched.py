"""Knowing the defence pays: the matched adversary against squared L2, L1 and the cosine, on digits.

Each of the others has its data term's weight tuned on other images; the matched one has none to tune.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import invjax
from invjax import attacks, datasets, defenses, metrics, models, priors
from invjax.attacks import likelihoods

STD = 0.05
MASK = defenses.random_mask(0.5)
GAUSSIAN = defenses.gaussian_noise(STD)
LAPLACE = defenses.laplace_noise(STD / math.sqrt(2))
CHANNELS = {
    "gaussian": GAUSSIAN,
    "laplace": LAPLACE,
    "prune, gaussian": invjax.chain(MASK, GAUSSIAN),
    "prune, laplace": invjax.chain(MASK, LAPLACE),
}
# Data term, and the weights to choose from, around what the noise asks for.
MISMATCHED = {
    "l2": (likelihoods.gaussian(STD), (0.1, 0.3, 1.0, 3.0)),
    "l1": (likelihoods.laplace(STD / math.sqrt(2)), (0.1, 0.3, 1.0, 3.0)),
    "cosine": (likelihoods.von_mises_fisher(1.0), (1e3, 1e4, 1e5)),
}
NUMBER, TUNING = 24, 8
DIGITS = datasets.digits()
# He starts, whose gradients stand well above the noise.
MODEL = models.mlp((128,), init="he")


@functools.cache
def problem():
    params = MODEL.init(jax.random.key(0), DIGITS.input_shape)
    auxiliary = np.asarray(DIGITS.inputs[:1500]).reshape(1500, -1)
    precision = np.linalg.inv(np.cov(auxiliary.T) + 1e-3 * np.eye(64))
    prior = priors.gaussian(
        jnp.asarray(auxiliary.mean(axis=0)), jnp.asarray(precision, jnp.float32)
    )
    return params, prior


KEYS = jax.random.split(jax.random.key(1), NUMBER + TUNING)


@functools.cache
def observed(channel):
    """What the adversary of every victim sees."""
    params, _ = problem()
    picks = slice(1500, 1500 + NUMBER + TUNING)

    def watch(key, image, label):
        batch = invjax.Batch(image[None], label[None])
        return invjax.observe(key, MODEL, params, batch, CHANNELS[channel], grant_labels=True)

    return jax.jit(jax.vmap(watch))(KEYS, DIGITS.inputs[picks], DIGITS.labels[picks])


def decibels(attack, observations):
    found = jax.vmap(attack)(KEYS, observations).inputs[:, 0]
    truth = jnp.asarray(DIGITS.inputs[1500 : 1500 + NUMBER + TUNING])
    return metrics.psnr(found, truth, data_range=1.0)


@jax.jit
def mismatched(weights, observations):
    """All three in one program: the terms that are not meant have weight zero."""
    terms = [term for term, _ in MISMATCHED.values()]

    def value(candidate, observation):
        return sum(
            weight * term.value(candidate, observation)
            for weight, term in zip(weights, terms, strict=True)
        )

    objective = attacks.objectives.Objective(value)
    _, prior = problem()
    attack = attacks.bayes(MODEL, invjax.chain(), prior, objective=objective, num_steps=300)
    return decibels(attack, observations)


@functools.cache
def results(channel):
    seen = observed(channel)
    _, prior = problem()
    attack = attacks.bayes(MODEL, CHANNELS[channel], prior, num_steps=300)
    found = {
        "bayes": np.asarray(jax.jit(lambda seen: decibels(attack, seen))(seen))[TUNING:].mean()
    }
    for index, (name, (_, weights)) in enumerate(MISMATCHED.items()):
        tried = [
            np.asarray(mismatched(weight * jnp.eye(3)[index], seen._replace(public=None)))
            for weight in weights
        ]
        found[name] = max(tried, key=lambda psnr: psnr[:TUNING].mean())[TUNING:].mean()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("channel", CHANNELS)
def test_nothing_beats_the_matched_adversary(channel):
    found = results(channel)
    others = max(psnr for name, psnr in found.items() if name != "bayes")
    assert found["bayes"] > others - 0.1
    if channel.startswith("prune"):
        assert found["bayes"] > others + 6
    # All of them see something: the mean image is 11.5 dB.
    assert min(found.values()) > 11.5


@pytest.mark.slow
def test_the_norm_that_the_noise_asks_for():
    assert results("gaussian")["l2"] > results("gaussian")["l1"] + 0.8
    assert results("laplace")["l1"] > results("laplace")["l2"] + 1.0
    # And these are the matched adversaries themselves.
    np.testing.assert_allclose(results("gaussian")["l2"], results("gaussian")["bayes"], atol=0.1)
    np.testing.assert_allclose(results("laplace")["l1"], results("laplace")["bayes"], atol=0.1)


@pytest.mark.slow
def test_an_unknown_mask_costs_little():
    """Spike and slab, which knows the share alone, against the mask and against L2 on the mean."""
    channel = invjax.chain(defenses.random_mask(0.5, known=False), GAUSSIAN)
    seen = observed("prune, gaussian")
    _, prior = problem()

    hidden = seen._replace(public=(None, None))

    def run(weight, **settings):
        attack = attacks.bayes(MODEL, channel, prior, num_steps=300, **settings)
        return decibels(attack, hidden)

    @jax.jit
    def rescaled(weight):
        def value(candidate, observation):
            shrunk = jax.tree.map(lambda leaf: leaf / 2, candidate)
            return weight * likelihoods.gaussian(STD).value(shrunk, observation)

        return run(weight, objective=attacks.objectives.Objective(value))

    known = results("prune, gaussian")["bayes"]
    marginal = np.asarray(jax.jit(run)(1.0))[TUNING:].mean()
    tried = [np.asarray(rescaled(weight)) for weight in (0.1, 0.3, 1.0)]
    mean = max(tried, key=lambda psnr: psnr[:TUNING].mean())[TUNING:].mean()
    assert known + 0.3 > marginal > known - 2
    assert marginal > mean + 6


@pytest.mark.slow
def test_the_published_bars_on_mnist(data_dir):
    """Specified: L2 under Gaussian noise in [19, 21.5] dB, and under pruning Bayes 3 dB over it.

    An untrained network with LeCun starts, 200 steps from 0.5 times 0.94 a step, weights as tuned in
    `benchmarks/papers/bayes_framework.py` on images that are not among these.
    """
    data = datasets.normalized(datasets.load("mnist", data_dir))
    order = np.random.default_rng(0).permutation(len(data))[4:20]
    images, labels = datasets.take(data, order)
    model, noise = models.cnn(init="lecun"), defenses.gaussian_noise(0.1)
    params = model.init(jax.random.key(0), data.input_shape)
    low, high = (float(np.squeeze(bound)) for bound in data.input_range)
    pruned = invjax.chain(defenses.random_mask(0.5), noise)

    def mean(defense, variation, **settings):
        attack = attacks.bayes(
            model,
            defense,
            priors.total_variation(variation, "squared", periodic=True),
            num_steps=200,
            optimizer=optax.adam(optax.exponential_decay(0.5, 1, 0.94)),
            constraint=None,
            **settings,
        )

        def one(key, image, label):
            batch = invjax.Batch(image[None], label[None])
            seen = invjax.observe(key, model, params, batch, defense, grant_labels=True)
            found = jnp.clip(attack(key, seen).inputs, low, high)
            raw = [datasets.denormalize(data, side) for side in (found, batch.inputs)]
            return metrics.psnr(*raw, data_range=1.0)[0]

        keys = jax.random.split(jax.random.key(2), len(labels))
        return float(jax.jit(jax.vmap(one))(keys, images, labels).mean())

    def l2(weight):
        return likelihoods.gaussian(math.sqrt(0.5 / weight))

    assert 19 <= mean(noise, 0.3, objective=l2(20.0)) <= 21.5
    matched = mean(pruned, 0.3, schedule="paper")
    assert matched >= mean(pruned, 1.0, objective=l2(80.0)) + 3
