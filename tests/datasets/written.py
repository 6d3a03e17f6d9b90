"""What the tests of several readers write, and how they check what comes back."""

import struct

import hypothesis
import numpy as np

fuzz = hypothesis.settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def check(dataset, raw, labels):
    np.testing.assert_allclose(dataset.inputs, raw / 255, atol=1e-6)
    np.testing.assert_array_equal(dataset.labels, labels)
    assert dataset.input_range == (0.0, 1.0)


def idx_bytes(array):
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()
