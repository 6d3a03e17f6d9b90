"""Shadow models: as trained one by one, kept on the disk, and found again only where they are the same."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from invjax import datasets, defenses, models
from invjax.attacks.informed.training import training
from invjax.base import Batch
from invjax.evaluation.shadows import digest, shadows

KEY = jax.random.key(7)


def batch(seed, size):
    rng = np.random.default_rng(seed)
    return Batch(rng.uniform(size=(size, 4)).astype(np.float32), rng.integers(0, 3, size))


def cheap(factor, constant=0.0):
    """A training that costs nothing to compile."""
    constant = jnp.full(4, constant)

    def run(key, known, target):
        mean = factor * known.inputs.mean(axis=0) + target.inputs[0] + constant
        return {"mean": mean, "draw": jax.random.key_data(key) + target.labels[0].astype("uint32")}

    return run


def same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_they_are_trained_one_by_one():
    data = datasets.digits()
    model = models.mlp((4,), activation="elu")
    known, pool = (datasets.take(data, np.arange(*ends)) for ends in ((0, 10), (10, 15)))
    # Draws its weights, order and noise from the shadow's own key.
    run = training(model, optax.sgd(0.1), 3, batch_size=4, defense=defenses.dp_sgd(1.0, 0.1))
    seen = []
    found = shadows(KEY, run, known, pool, chunk=3, on_chunk=seen.append)
    assert [progress[:3] for progress in seen] == [(3, 5, False), (5, 5, False)]
    alone = jax.jit(run)
    for index in range(5):
        target = jax.tree.map(lambda leaf, index=index: leaf[index][None], pool)
        expected = alone(jax.random.fold_in(KEY, index), known, target)
        for leaf, one in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            np.testing.assert_allclose(leaf[index], one, rtol=1e-4, atol=1e-6)


def test_chunks_and_devices_change_nothing():
    known, pool = batch(0, 6), batch(1, 11)
    whole = shadows(KEY, cheap(1.0), known, pool)
    assert whole["mean"].shape == (11, 4) and isinstance(whole["mean"], np.ndarray)
    same(shadows(KEY, cheap(1.0), known, pool, chunk=4), whole)
    same(shadows(KEY, cheap(1.0), known, pool, chunk=4, devices=jax.local_devices()[:3]), whole)


def train(
    folder, *, key=KEY, factor=1.0, constant=0.0, known=None, pool=None, stop=None, **options
):
    """Shadows, and for every chunk whether it was cached and what was wrong."""
    seen = []

    def on_chunk(progress):
        seen.append((progress.cached, progress.problem))
        if len(seen) == stop:
            raise KeyboardInterrupt

    known, pool = known or batch(0, 6), pool or batch(1, 11)
    options = {"chunk": 4, "cache": folder, "on_chunk": on_chunk, **options}
    try:
        return shadows(key, cheap(factor, constant), known, pool, **options), seen
    except KeyboardInterrupt:
        return None, seen


def test_an_interrupted_training_goes_on(tmp_path):
    assert train(tmp_path, stop=2) == (None, [(False, "")] * 2)
    found, seen = train(tmp_path)
    assert seen == [(True, ""), (True, ""), (False, "")]
    same(found, shadows(KEY, cheap(1.0), batch(0, 6), batch(1, 11)))
    again, seen = train(tmp_path)
    assert seen == [(True, "")] * 3
    same(again, found)
    # A longer pool finds its first chunks.
    first = batch(1, 11)
    longer = Batch(*(np.concatenate([part, part[:4]]) for part in first))
    assert train(tmp_path, pool=longer)[1] == [(True, ""), (True, ""), (False, ""), (False, "")]


def test_whatever_matters_makes_it_another_training(tmp_path):
    train(tmp_path, pool=batch(1, 4))
    known, pool = batch(0, 6), batch(1, 4)
    changes = {
        "factor": {"factor": 1.0 + 1e-6},
        "constant": {"constant": 1e-6},
        "key": {"key": jax.random.key(8)},
        "known": {"known": known._replace(inputs=np.nextafter(known.inputs, 2))},
        "labels": {"pool": pool._replace(labels=pool.labels + 1)},
        "inputs": {"pool": pool._replace(inputs=np.nextafter(pool.inputs, 2))},
    }
    for name, change in changes.items():
        options = {"pool": pool, **change}
        assert train(tmp_path, **options)[1] == [(False, "")], name
    assert train(tmp_path, pool=pool)[1] == [(True, "")]


def test_settings_of_a_training_are_part_of_it(tmp_path):
    model = models.mlp((3,), activation="elu")
    data = Batch(batch(0, 6).inputs, batch(0, 6).labels)
    start = model.init(jax.random.key(0), (4,))
    moved = jax.tree.map(lambda leaf: leaf * (1 + 1e-6), start)
    tanh = models.mlp((3,), activation="tanh")
    variants = [
        training(model, optax.sgd(0.1), 2, params=start),
        training(model, optax.sgd(0.1), 2, params=moved),
        training(model, optax.sgd(0.11), 2, params=start),
        training(model, optax.sgd(0.1), 3, params=start),
        training(tanh, optax.sgd(0.1), 2, params=start),
        training(model, optax.sgd(0.1), 2, params=start, batch_size=2, order=jax.random.key(1)),
        training(model, optax.sgd(0.1), 2, params=start, batch_size=2, order=jax.random.key(2)),
        training(model, optax.sgd(0.1), 2, params=start, defense=defenses.dp_sgd(1.0, 0.1)),
        training(model, optax.sgd(0.1), 2, params=start, defense=defenses.dp_sgd(1.0, 0.2)),
    ]
    one = (KEY, jax.tree.map(lambda leaf: leaf[:1], data))
    found = [
        digest(lambda known, one, run=run: run(one[0], known, one[1]), data, one)
        for run in variants
    ]
    assert len(set(found)) == len(variants)


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign"])
def test_a_damaged_or_foreign_file_is_made_anew(tmp_path, damage):
    expected, _ = train(tmp_path, pool=batch(1, 8))
    first, second = sorted((tmp_path / "checkpoints").iterdir())
    content = bytearray(first.read_bytes())
    if damage == "cut":
        first.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        spots = [content.find(row.tobytes()) for row in expected["mean"]]
        content[max(spots)] ^= 1
        first.write_bytes(content)
    else:
        first.write_bytes(second.read_bytes())
    found, seen = train(tmp_path, pool=batch(1, 8))
    same(found, expected)
    assert sorted(cached for cached, _ in seen) == [False, True]
    (problem,) = [problem for cached, problem in seen if not cached]
    assert first.name in problem and ("another" if damage == "foreign" else "damaged") in problem
    assert train(tmp_path, pool=batch(1, 8))[1] == [(True, "")] * 2


def test_errors():
    with pytest.raises(ValueError, match="chunk must be a whole number"):
        shadows(KEY, cheap(1.0), batch(0, 6), batch(1, 4), chunk=0)
    wrong = batch(1, 4)._replace(inputs=np.zeros((4, 5), np.float32))
    for pool in (wrong, batch(1, 0)):
        with pytest.raises(ValueError, match="pool must hold records of the known ones' shape"):
            shadows(KEY, cheap(1.0), batch(0, 6), pool)
    short = batch(1, 4)._replace(labels=np.zeros(3, int))
    with pytest.raises(ValueError, match="pool must have a label for each of its 4 records, got 3"):
        shadows(KEY, cheap(1.0), batch(0, 6), short)
