"""Test set-up: eight host devices, strict numerics, and the persistent compilation cache."""

import os
import pathlib
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()

import jax
import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(".cache/jax").absolute()))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_configure(config: pytest.Config) -> None:
    """Compile the fast tests' programs quickly; the slow ones run them as users do.

    Most of the fast tests' time is compilation, which this halves.
    """
    if "not slow" in config.option.markexpr:
        os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module", autouse=True)
def _forget_programs() -> Iterator[None]:
    """Drop programs between modules where they are many: a process can map only 65,530 pages of code."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 10_000:
        jax.clear_caches()


DATA = pathlib.Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """The folder of real data sets, where this machine has one."""
    root = pathlib.Path(os.environ.get("INVJAX_DATA", DATA))
    if not (root / "mnist.npz").exists():
        pytest.skip("no folder of real data sets (set INVJAX_DATA)")
    return root


@pytest.fixture
def key() -> jax.Array:
    """A typed PRNG key."""
    return jax.random.key(0)


def nearest(samples, pool) -> tuple[np.ndarray, np.ndarray]:
    """Mean squared error of every sample `[..., B, D]` to the nearest of a pool `[..., N, D]`, and which.

    In NumPy, hence in the precision of the samples whatever the scope; infinity and N of an empty pool.
    """
    distances = np.asarray(samples)[..., :, None, :] - np.asarray(pool)[..., None, :, :]
    errors = np.square(distances).mean(axis=-1)
    errors = np.pad(errors, [(0, 0)] * (errors.ndim - 1) + [(0, 1)], constant_values=np.inf)
    return errors.min(axis=-1), errors.argmin(axis=-1)


def ready(defense, state):
    """A state that may be updated with, of a defence that would have to see a batch too."""
    from invjax.defenses.base import Prepared

    sees_batch = any(stage.prepare is not None for stage in defense.stages)
    return Prepared(state) if sees_batch else state
