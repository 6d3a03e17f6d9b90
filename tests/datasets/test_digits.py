"""The embedded digits."""

import numpy as np

from invjax import datasets


def test_digits_are_embedded():
    dataset = datasets.digits()
    assert dataset.inputs.shape == (1797, 8, 8, 1)
    assert dataset.num_classes == 10
    assert (dataset.inputs.min(), dataset.inputs.max()) == (0, 1)
    # The first rows of the first digit, a zero, in sixteenths.
    expected = [[0, 0, 5, 13, 9, 1, 0, 0], [0, 0, 13, 15, 10, 15, 5, 0]]
    np.testing.assert_array_equal(16 * dataset.inputs[0, :2, :, 0], expected)
    np.testing.assert_array_equal(dataset.labels[:10], range(10))
