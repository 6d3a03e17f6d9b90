"""Published attacks are the Bayes adversary of a likelihood and a prior (Balunovic et al. 2022, table 1).

Each preset starts where a Bayes attack with the stated likelihood and prior starts, and there the slopes
agree: the objectives are equal up to a constant.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import invjax
from invjax import attacks, priors
from invjax.attacks import likelihoods
from invjax.attacks.matching.loop import normal

STD = math.sqrt(0.5)
UNIT_GAUSSIAN = invjax.defenses.gaussian_noise(STD)
SHAPE = (8, 8, 1)


@pytest.fixture(scope="module")
def victim():
    model = invjax.models.lenet(width=4)
    params = model.init(jax.random.key(0), SHAPE)
    batch = invjax.Batch(
        jax.random.uniform(jax.random.key(1), (2, *SHAPE)), jnp.array([3, 7], jnp.int32)
    )
    observation = invjax.observe(
        jax.random.key(2), model, params, batch, UNIT_GAUSSIAN, grant_labels=True
    )
    return model, observation


def anisotropic(weight):
    return priors.total_variation(weight, "anisotropic")


# The preset, the channel or likelihood and the prior that it stands for.
CASES = {
    "dlg": (
        lambda model, **given: attacks.dlg(model, **given),
        lambda model, **given: attacks.bayes(model, UNIT_GAUSSIAN, labels="joint", **given),
    ),
    "idlg": (
        lambda model, **given: attacks.idlg(model, labels="known", **given),
        lambda model, **given: attacks.bayes(model, UNIT_GAUSSIAN, **given),
    ),
    "tag": (
        lambda model, **given: attacks.tag(model, weight=0.01, **given),
        lambda model, **given: attacks.bayes(
            model,
            invjax.chain(),
            labels="joint",
            objective=likelihoods.product(likelihoods.gaussian(STD), likelihoods.laplace(100.0)),
            **given,
        ),
    ),
    "lasso": (
        lambda model, **given: attacks.gradient_matching(
            model,
            objective=attacks.objectives.l1(),
            optimizer=optax.sgd(0.1),
            num_steps=2,
            **given,
        ),
        lambda model, **given: attacks.bayes(model, invjax.defenses.laplace_noise(1.0), **given),
    ),
    "inverting_gradients": (
        lambda model, **given: attacks.inverting_gradients(
            model, total_variation=0.01, restarts=1, **given
        ),
        lambda model, **given: attacks.bayes(
            model,
            invjax.chain(),
            prior=anisotropic(0.01),
            objective=likelihoods.von_mises_fisher(1.0),
            **given,
        ),
    ),
    "gradinversion": (
        lambda model, **given: attacks.gradinversion(
            model, total_variation=1e-3, l2=1e-4, group=0.05, restarts=3, labels="known", **given
        ),
        lambda model, **given: attacks.bayes(
            model,
            UNIT_GAUSSIAN,
            prior=priors.combine(
                priors.total_variation(1e-3, "isotropic"),
                priors.l2(1e-4),
                priors.group_consistency(0.05),
            ),
            restarts=3,
            **given,
        ),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_published_objective_is_a_posterior(name, victim):
    (model, observation), key = victim, jax.random.key(3)
    preset, bayes = (
        jax.jit(make(model, initializer=normal(), constraint=None).init)(key, observation)
        for make in CASES[name]
    )
    # From the same start.
    np.testing.assert_array_equal(preset.variables["inputs"], bayes.variables["inputs"])
    assert set(preset.gradient) == set(bayes.gradient)
    for what, expected in bayes.gradient.items():
        scale = np.abs(expected).max()
        assert scale > 0
        np.testing.assert_allclose(preset.gradient[what], expected, atol=1e-5 * scale)


def test_the_batch_divides_the_noise_of_every_sample(victim):
    """Noise on each of `B` gradients is `std / sqrt(B)` on their mean, in the channel too."""
    model, observation = victim
    assumed, matched = (
        jax.jit(
            attacks.bayes(model, defense, initializer=normal(), constraint=None, **settings).init
        )(jax.random.key(3), observation).gradient["inputs"]
        for defense, settings in (
            (invjax.chain(), {"objective": likelihoods.gaussian(0.3, per_sample=True)}),
            (invjax.defenses.gaussian_noise(0.3, per_sample=True), {}),
        )
    )
    np.testing.assert_allclose(assumed, matched, atol=1e-5 * np.abs(matched).max())
