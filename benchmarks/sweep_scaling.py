"""Jobs a second of the sweep's runner: by jobs a device, by devices, and over the bare attack.

    python benchmarks/sweep_scaling.py --json sweep_scaling.json
    XLA_FLAGS=--xla_force_host_platform_device_count=2 python benchmarks/sweep_scaling.py --devices 1 2

`runner` is `evaluation.parallel.run`: chunks of steps, early stop, progress on the host. `bare` is
`jit(vmap(attack))` of the same jobs, `one by one` is the jitted attack called for each, as the frameworks
that have no vectorised attacks do. Alternating rounds in one process, medians; the objectives are checked to
agree.
"""

import itertools

import jax
import numpy as np
import timing

import invjax
from invjax import attacks, models
from invjax.evaluation import parallel

MODELS = {"mlp": lambda: models.mlp((64,)), "lenet": models.lenet, "convnet": models.convnet_small}
NUMBERS = np.zeros(0, np.float32)


def problem(name: str, jobs: int, image_size: int):
    """A model, parameters, stacked observations without them, and keys."""
    model, key = MODELS[name](), jax.random.key(0)
    inputs = jax.random.uniform(key, (jobs, 1, image_size, image_size, 1))
    batch = invjax.Batch(inputs, jax.random.randint(key, (jobs, 1), 0, 10))
    params = model.init(key, inputs.shape[2:])
    keys = jax.random.split(key, jobs)

    def watch(key, sample):
        observation = invjax.observe(key, model, params, sample, grant_labels=True)
        return observation._replace(params=None)

    return model, params, jax.jit(jax.vmap(watch))(keys, batch), keys


def case(name: str, jobs: int, devices: int, steps: int, rounds: int, size: int) -> dict:
    """One row of the table."""
    model, params, observation, keys = problem(name, jobs, size)
    attack = attacks.inverting_gradients(model, num_steps=steps)
    program = parallel.program(lambda numbers: attack, NUMBERS, jax.local_devices()[:devices])

    def whole(hidden, key):
        return attack(key, hidden._replace(params=params))

    bare, single = jax.jit(jax.vmap(whole)), jax.jit(whole)
    parts = [jax.tree.map(lambda leaf, job=job: leaf[job], observation) for job in range(jobs)]
    systems = {
        "runner": lambda: parallel.run(program, NUMBERS, params, observation, keys),
        "bare": lambda: jax.block_until_ready(bare(observation, keys)),
        "one by one": lambda: [
            jax.block_until_ready(single(part, keys[job])) for job, part in enumerate(parts)
        ],
    }
    found = systems["runner"]().reconstruction.objective
    np.testing.assert_allclose(found, systems["bare"]().objective, rtol=0.05)
    times = timing.alternate(systems, rounds)
    row = {"model": name, "jobs": jobs, "devices": devices, "steps": steps}
    for system, result in times.items():
        row[f"{system} jobs/s"] = 1e3 * jobs / result["median"]
    row["runner / bare"] = times["runner"]["median"] / times["bare"]["median"]
    row["one by one / runner"] = times["one by one"]["median"] / times["runner"]["median"]
    return row


def main() -> None:
    """Run the cases and print the table."""
    parser = timing.parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["mlp", "lenet"])
    parser.add_argument("--jobs", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--devices", nargs="+", type=int, default=[1], help="how many")
    parser.add_argument("--steps", type=int, default=500, help="of the attack")
    parser.add_argument("--rounds", type=int, default=3, help="in which all systems take turns")
    parser.add_argument("--image-size", type=int, default=8)
    options = parser.parse_args()
    rows = []
    for setting in itertools.product(options.models, options.jobs, options.devices):
        rows.append(case(*setting, options.steps, options.rounds, options.image_size))
        print(rows[-1], flush=True)
    print("\n" + timing.table(rows))
    device = jax.devices()[0].device_kind
    timing.write(options.json, rows, device=device, benchmark="sweep_scaling")


if __name__ == "__main__":
    main()
