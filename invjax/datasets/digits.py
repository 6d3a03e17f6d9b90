"""The data set that needs no file."""

import numpy as np

from invjax.datasets.types import Dataset, from_arrays


def digits() -> Dataset:
    """The 1,797 handwritten digits of 8x8 grey pixels that scikit-learn brings, scaled to [0, 1].

    Returns:
      The data set, inputs `[1797, 8, 8, 1]` (Alpaydin and Kaynak 1998; the test part of UCI's
      optical recognition set).

    Example:
      >>> import invjax
      >>> dataset = invjax.datasets.digits()
      >>> dataset.inputs.shape, dataset.num_classes
      ((1797, 8, 8, 1), 10)
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    inputs = pixels.reshape(-1, 8, 8).astype(np.float32) / 16
    return from_arrays("digits", inputs, np.asarray(labels))
