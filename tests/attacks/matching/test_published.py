"""Published figures, on real images (slow); the full counts are in benchmarks/RESULTS.md."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import invjax
from invjax import attacks, datasets, driver, metrics, models

pytestmark = pytest.mark.slow


def attacked(dataset, make, number, labels):
    """PSNR in raw units and label hits of `number` victims, each with its own weights."""
    model = models.lenet(dataset.num_classes)
    attack = driver.runner(make(model))
    decibels, hits = [], []
    for index in range(number):
        key = jax.random.key(index)
        batch = datasets.draw(key, dataset, 1)
        params = model.init(key, dataset.input_shape)
        observation = invjax.observe(
            key, model, params, batch, input_range=dataset.input_range, grant_labels=labels
        )
        found = attack(key, observation)
        sides = [
            jnp.clip(datasets.denormalize(dataset, side), 0, 1)
            for side in (found.inputs, batch.inputs)
        ]
        decibels.append(float(metrics.psnr(*sides, data_range=1.0)[0]))
        hits.append(int(found.labels[0]) == int(batch.labels[0]))
    return np.array(decibels), hits


def test_dlg_brings_digits_back():
    decibels, hits = attacked(
        datasets.digits(), lambda model: attacks.dlg(model, restarts=4), 6, labels=False
    )
    assert all(hits)
    assert (decibels > 30).sum() >= 5


def test_dlg_brings_color_images_back(data_dir):
    dataset = datasets.load("cifar10", data_dir)
    decibels, hits = attacked(dataset, attacks.dlg, 4, labels=False)
    assert all(hits)
    assert (decibels > 30).sum() >= 3


def test_inverting_gradients_on_lenet(data_dir):
    """Geiping et al. 2020, table 1: 18.00 ± 3.33 dB over images.

    The median of six, since one image of six can come back at 33 dB: no lower than the spread, which
    a guess without a gradient (12.7 dB) is, and no higher than twice it. Twenty images are measured in
    benchmarks/RESULTS.md.
    """
    dataset = datasets.normalized(datasets.load("cifar10", data_dir))
    cosine, _ = attacked(dataset, attacks.inverting_gradients, 6, labels=True)
    assert 18.00 - 3.33 < np.median(cosine) < 18.00 + 2 * 3.33
