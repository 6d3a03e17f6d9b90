"""DP-SGD: conventions, and accounting against published values."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from invjax.defenses import chain, clip_per_sample, dp_sgd, gaussian_noise, privacy_spent


@pytest.mark.parametrize(("noise_on", "std"), [("sum", 2.0 * 0.5 / 4), ("mean", 2.0 * 0.5)])
def test_noise_convention(noise_on, std):
    defense = dp_sgd(2.0, 0.5, noise_on)
    gradients = {"a": jnp.zeros((4, 20_000))}
    observed = defense.update(gradients, defense.init(gradients))[0]["a"]
    assert float(observed.std()) == pytest.approx(std, rel=0.03)
    law = defense.law({"a": observed}, gradients)
    np.testing.assert_allclose(law.variance["a"], std**2, rtol=1e-6)


def test_is_clip_and_noise(key):
    gradients = {"a": jax.random.normal(key, (4, 3)), "b": jax.random.normal(key, (4, 2, 2))}
    composed = chain(clip_per_sample(1.5), gaussian_noise(1.5 * 0.8 / 4))
    defense = dp_sgd(1.5, 0.8)
    mine = defense.update(gradients, defense.init_with_key(key, gradients))[0]
    theirs = composed.update(gradients, composed.init_with_key(key, gradients))[0]
    for name in gradients:
        np.testing.assert_allclose(mine[name], theirs[name], atol=1e-6)


def test_mnist_tutorial():
    """TensorFlow Privacy's tutorial: epsilon 3.01 by moments over the orders it lists."""
    steps = 60 * 60_000 // 256
    epsilon = privacy_spent(1.1, 60_000, 256, steps, 1e-5)
    assert 2.3 < epsilon < 3.01


def test_agrees_with_renyi_accounting():
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant()
    step = dp_accounting.PoissonSampledDpEvent(0.01, dp_accounting.GaussianDpEvent(1.0))
    accountant.compose(step, 1000)
    renyi = accountant.get_epsilon(1e-5)
    epsilon = privacy_spent(1.0, 10_000, 100, 1000, 1e-5)
    assert 0.8 * renyi < epsilon < renyi


def test_one_full_batch_step_is_the_gaussian_mechanism():
    """Balle & Wang 2018, theorem 8: delta as a function of epsilon."""
    from scipy.stats import norm

    epsilon, sigma = privacy_spent(2.0, 10, 10, 1, 1e-3), 2.0
    delta = norm.cdf(0.5 / sigma - epsilon * sigma) - math.exp(epsilon) * norm.cdf(
        -0.5 / sigma - epsilon * sigma
    )
    assert delta == pytest.approx(1e-3, rel=1e-2)


def test_privacy_is_monotonic():
    base = privacy_spent(1.0, 1000, 10, 100, 1e-5)
    assert privacy_spent(2.0, 1000, 10, 100, 1e-5) < base
    assert privacy_spent(1.0, 2000, 10, 100, 1e-5) < base
    assert privacy_spent(1.0, 1000, 20, 100, 1e-5) > base
    assert privacy_spent(1.0, 1000, 10, 200, 1e-5) > base
    assert privacy_spent(1.0, 1000, 10, 100, 1e-6) > base
    assert privacy_spent(0.0, 1000, 10, 100, 1e-5) == math.inf
    assert privacy_spent(1.0, 1000, 10, 0, 1e-5) == 0


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
        ({"num_samples": 0}, "num_samples"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 101}, "batch_size"),
        ({"steps": -1}, "steps"),
        ({"delta": 0.0}, "delta"),
        ({"delta": 1.0}, "delta"),
    ],
)
def test_accounting_arguments_are_validated(change, name):
    arguments = {
        "noise_multiplier": 1.0, "num_samples": 100, "batch_size": 10, "steps": 1, "delta": 1e-5,
    }  # fmt: skip
    with pytest.raises(ValueError, match=f"{name} must lie in"):
        privacy_spent(**{**arguments, **change})


def test_arguments_are_validated():
    with pytest.raises(ValueError, match="clip_norm must lie"):
        dp_sgd(0.0, 1.0)
    with pytest.raises(ValueError, match="noise_multiplier must lie"):
        dp_sgd(1.0, -0.1)
    with pytest.raises(ValueError, match="noise_on must be one of 'sum', 'mean', got 'samples'"):
        dp_sgd(1.0, 1.0, "samples")
    with pytest.raises(ValueError, match="clip_norm must be finite"):
        dp_sgd(math.inf, 1.0)
