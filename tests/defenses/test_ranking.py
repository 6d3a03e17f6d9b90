"""Ranks against sorting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from invjax.defenses.ranking import at_rank, smallest

VALUES = {
    "normal": np.abs(np.random.default_rng(0).normal(size=40)),
    "ties": np.random.default_rng(1).integers(0, 4, 40) / 3,
    "zeros": np.zeros(7),
    "one": np.array([0.3]),
    "extremes": np.array([0.0, np.inf, 1e-30, 1e30, 5e-7, np.inf, 0.0, 1.0]),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("name", VALUES)
def test_every_rank(name, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        values = jnp.asarray(VALUES[name]).astype(dtype)
        ranks = jnp.arange(len(values))
        found = jax.jit(jax.vmap(at_rank, in_axes=(None, 0)))(values, ranks)
        assert found.dtype == dtype
        np.testing.assert_array_equal(
            np.asarray(found, np.float64), np.sort(np.asarray(values, np.float64))
        )
        assert at_rank(values, len(values) + 3) == values.max()


@pytest.mark.parametrize("name", VALUES)
def test_the_smallest_and_of_equals_the_first(name):
    values = jnp.asarray(VALUES[name], jnp.float32)
    order = np.argsort(np.asarray(values), kind="stable")
    for count in range(len(values) + 1):
        expected = np.zeros(len(values), bool)
        expected[order[:count]] = True
        np.testing.assert_array_equal(smallest(values, count), expected)
