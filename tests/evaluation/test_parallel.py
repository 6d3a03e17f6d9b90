"""Many jobs at once: the same result on any number of devices, in any padding, from any checkpoint."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import invjax
from invjax import attacks, calls, datasets, defenses
from invjax.evaluation import parallel

JOBS = 13
MODEL = invjax.models.mlp((8,), activation="tanh")
NOISE = calls.parse("gaussian_noise(0.01)", "defense")
NUMBERS = np.array([0.01], np.float32)


def defense(numbers):
    return defenses.parse(calls.with_numbers(NOISE, numbers))


def build(numbers):
    return attacks.bayes(MODEL, defense(numbers), num_steps=40)


@pytest.fixture(scope="module")
def problem():
    dataset = datasets.digits()
    params = MODEL.init(jax.random.key(0), dataset.input_shape)
    drawn = datasets.draw(jax.random.key(1), dataset, JOBS)
    batch = jax.tree.map(lambda leaf: leaf.reshape(JOBS, 1, *leaf.shape[1:]), drawn)
    keys = jax.random.split(jax.random.key(2), JOBS)

    def watch(key, sample):
        return invjax.observe(
            key, MODEL, params, sample, defense(NUMBERS), grant_labels=True
        )._replace(params=None)

    return params, jax.vmap(watch)(keys, batch), keys


@pytest.fixture(scope="module")
def plain(problem):
    params, observation, keys = problem
    attack = build(NUMBERS)
    one = jax.jit(lambda hidden, key: attack(key, hidden._replace(params=params)))
    outcomes = [
        one(jax.tree.map(lambda leaf, job=job: leaf[job], observation), keys[job])
        for job in range(JOBS)
    ]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *outcomes)


@pytest.mark.parametrize(
    "number", [*(pytest.param(few, marks=pytest.mark.slow) for few in (1, 2, 4)), 8]
)
def test_any_number_of_devices_gives_the_plain_result(problem, plain, number):
    program = parallel.program(build, NUMBERS, jax.local_devices()[:number])
    result = parallel.run(program, NUMBERS, *problem)
    assert result.reconstruction.inputs.shape == (JOBS, 1, 8, 8, 1) and result.steps == 40
    initial = plain.diagnostics["trace"][:, 0, 0]
    np.testing.assert_allclose(result.initial_objective, initial, rtol=1e-6)
    # Rounding differs with the number of jobs that a device holds, and forty steps carry it on.
    np.testing.assert_allclose(result.reconstruction.inputs, plain.inputs, atol=1e-4)
    np.testing.assert_allclose(result.reconstruction.objective, plain.objective, rtol=1e-4)
    np.testing.assert_array_equal(result.reconstruction.labels, plain.labels)


def test_numbers_share_a_compilation(problem):
    traces = []

    def counted(numbers):
        attack = build(numbers)
        if isinstance(numbers, jax.core.Tracer):
            return dataclasses.replace(
                attack, step=lambda *args: (traces.append(1), attack.step(*args))[1]
            )
        return attack

    program = parallel.program(counted, NUMBERS, jax.local_devices()[:1])
    first = parallel.run(program, NUMBERS, *problem)
    before = len(traces)
    other = parallel.run(program, 10 * NUMBERS, *problem)
    assert len(traces) == before > 0
    assert (first.reconstruction.objective != other.reconstruction.objective).all()


class Interruption(Exception):
    pass


def test_a_checkpoint_resumes_bit_for_bit_on_any_number_of_devices(problem):
    program = parallel.program(build, NUMBERS, jax.local_devices()[:2])
    whole = parallel.run(program, NUMBERS, *problem)
    kept = []

    def save(step, state):
        kept.append((step, jax.tree.map(jnp.copy, state)))
        if step >= 15:
            raise Interruption

    checkpoints = parallel.Checkpoints(lambda like: None, save, interval=0.0)
    with pytest.raises(Interruption):
        parallel.run(program, NUMBERS, *problem, checkpoints=checkpoints)
    step, state = kept[-1]
    assert 15 <= step < 40
    shapes = []

    def load(like):
        shapes.append(jax.tree.map(lambda leaf: leaf.shape, like))
        return step, state

    resumed = parallel.Checkpoints(load, lambda *_: None, interval=1e9)
    result = parallel.run(program, NUMBERS, *problem, checkpoints=resumed)
    np.testing.assert_array_equal(result.reconstruction.inputs, whole.reconstruction.inputs)
    np.testing.assert_array_equal(result.initial_objective, whole.initial_objective)
    assert shapes[0] == jax.tree.map(lambda leaf: leaf.shape, state)
    five = parallel.program(build, NUMBERS, jax.local_devices()[:5])
    moved = parallel.run(five, NUMBERS, *problem, checkpoints=resumed)
    np.testing.assert_allclose(moved.reconstruction.inputs, whole.reconstruction.inputs, atol=1e-4)


def test_out_of_memory_halves_the_jobs(problem, plain):
    program = parallel.program(build, NUMBERS, jax.local_devices()[:2])
    sizes = []

    def start(numbers, params, observation, keys):
        sizes.append(keys.shape)
        if keys.shape[1] > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: pretended")
        return program.start(numbers, params, observation, keys)

    result = parallel.run(program._replace(start=start), NUMBERS, *problem)
    np.testing.assert_allclose(result.reconstruction.inputs, plain.inputs, atol=1e-4)
    assert sizes[:3] == [(2, 7), (2, 4), (2, 2)]

    def never(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: pretended")

    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE"):
        parallel.run(program._replace(start=never), NUMBERS, *problem)


def test_jobs_per_device_are_what_memory_holds(problem, monkeypatch):
    params, observation, keys = problem
    one = jax.tree.map(lambda leaf: leaf[0], observation)
    program = parallel.program(build, NUMBERS, jax.local_devices()[:1])

    def fitting(memory):
        monkeypatch.setattr(parallel, "_memory", lambda device: memory)
        return parallel.jobs_per_device(program, NUMBERS, params, one, keys[0], 64)

    few, many = fitting(200_000), fitting(1e12)
    assert many == 64 and 1 <= few < 64
    assert fitting(0) == 1


def test_progress_and_a_closed_form(problem):
    seen = []
    program = parallel.program(build, NUMBERS, jax.local_devices()[:4])
    parallel.run(program, NUMBERS, *problem, on_chunk=seen.append)
    steps = [progress.step for progress in seen]
    assert steps == sorted(set(steps)) and steps[-1] == 40
    assert all(progress.objective.shape == (JOBS,) for progress in seen)

    def closed(numbers):
        def init(key, observation):
            noise = jax.random.normal(key, (1, 8, 8, 1))
            return invjax.Reconstruction(
                noise, observation.labels, jnp.ones(1, bool), noise.sum(), {}
            )

        return invjax.Attack(init, lambda o, s: s, lambda o, s: s)

    params, observation, keys = problem
    program = parallel.program(closed, NUMBERS, jax.local_devices()[:4])
    result = parallel.run(program, NUMBERS, params, observation, keys)
    expected = jax.vmap(lambda key: jax.random.normal(key, (1, 8, 8, 1)))(keys)
    np.testing.assert_allclose(result.reconstruction.inputs, expected, atol=1e-6)
    assert result.steps == 0 and np.isnan(result.initial_objective).all()


def test_a_map_over_devices_is_a_map():
    traces = []

    def function(shared, one):
        traces.append(1)
        return {"sum": shared["a"] + one[0].sum(), "key": jax.random.key_data(one[1])}

    rng = np.random.default_rng(0)
    shared, values = {"a": rng.normal(size=3)}, rng.normal(size=(JOBS, 4)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), JOBS)
    for devices in (None, jax.local_devices()[:1], jax.local_devices()[:5]):
        mapped = parallel.sharded_map(function, devices)
        found = mapped(shared, (values, keys))
        assert isinstance(found["sum"], np.ndarray) and found["sum"].shape == (JOBS, 3)
        np.testing.assert_allclose(
            found["sum"], shared["a"][None] + values.sum(axis=1)[:, None], rtol=1e-5
        )
        np.testing.assert_array_equal(found["key"], jax.random.key_data(keys))
    before = len(traces)
    mapped({"a": 2 * shared["a"]}, (-values, keys))
    assert len(traces) == before
