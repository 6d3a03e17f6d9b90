"""Speed of an Inverting Gradients step: ours, plain JAX, and the ordinary PyTorch loop.

    pip install -e '.[peers]'
    python benchmarks/attack_speed.py --json attack_speed.json

One thread each, alternating rounds in one process, medians. Before timing, the objective at the same
point is checked to agree to 1e-4 between all systems.
"""

import itertools
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
# The size of XLA's thread pool on CPU.
os.environ.setdefault("NPROC", "1")

import jax
import jax.numpy as jnp
import numpy as np
import timing

import invjax
from invjax import attacks, models
from invjax.attacks.matching import objectives, priors

TV = 0.01
MODELS = {"lenet": models.lenet, "convnet_small": models.convnet_small}


def plain_attack(model, steps: int):
    """The textbook form: `lax.conv`, reverse over reverse, a scan."""
    cosine, variation = objectives.cosine(), priors.total_variation(TV)

    def value(x, observation):
        batch = invjax.Batch(x, observation.labels)
        gradient = jax.grad(model.loss)(observation.params, batch)
        context = priors.Context(observation, x)
        return cosine.value(gradient, observation) + variation(x, context)

    optimizer = attacks.matching.presets.signed_adam(0.1, 10**9)

    def run(starts, observation):
        def one(start):
            def step(carry, _):
                x, state = carry
                updates, state = optimizer.update(jax.grad(value)(x, observation), state)
                return (jnp.clip(x + updates, 0, 1), state), None

            return jax.lax.scan(step, (start, optimizer.init(start)), None, steps)[0][0]

        return jax.vmap(one)(starts)

    return jax.jit(run), value


def case(name: str, batch_size: int, restarts: int, steps: int, rounds: int, plain: bool):
    """One row of the table."""
    import torch
    import torch_peer

    torch.set_num_threads(1)
    model = MODELS[name]()
    key = jax.random.key(0)
    shape = (batch_size, 32, 32, 3)
    params = model.init(key, shape[1:])
    inputs = jax.image.resize(jax.random.uniform(key, (batch_size, 8, 8, 3)), shape, "cubic")
    batch = invjax.Batch(jnp.clip(inputs, 0, 1), jnp.arange(batch_size) % 10)
    observation = invjax.observe(key, model, params, batch, grant_labels=True)
    attack = attacks.inverting_gradients(
        model,
        total_variation=TV,
        num_steps=4800,
        restarts=restarts,
        initializer=attacks.matching.loop.uniform_box(),
    )
    state = jax.jit(attack.init)(key, observation)
    starts = state.variables["inputs"]

    layers = model.layers(params)
    weights = torch_peer.parameters(layers)

    labels = torch.tensor(np.asarray(batch.labels), dtype=torch.long)
    target = torch_peer.target_gradient(
        layers, weights, torch_peer.from_images(batch.inputs), labels
    )
    value = torch_peer.objective(layers, weights, target, labels, TV)
    theirs = [float(value(torch_peer.from_images(start)).detach()) for start in starts]
    # One minus a cosine near one: its rounding is of the cosine's size, not of the difference's.
    np.testing.assert_allclose(state.value, theirs, rtol=1e-4, atol=1e-5)

    advance = jax.jit(lambda o, s: jax.lax.fori_loop(0, steps, lambda _, s: attack.step(o, s), s))
    systems = {
        "invjax": lambda: jax.block_until_ready(advance(observation, state)),
        "torch": torch_peer.attack_loop(value, torch_peer.from_images(starts), steps),
    }
    if restarts > 1:
        systems["torch_vmap"] = torch_peer.attack_vmapped(
            layers, weights, target, labels, TV, torch_peer.from_images(starts), steps
        )
    if plain:
        run, plain_value = plain_attack(model, steps)
        np.testing.assert_allclose(
            state.value, [plain_value(start, observation) for start in starts], rtol=1e-4
        )
        systems["plain_jax"] = lambda: jax.block_until_ready(run(starts, observation))
    times = timing.alternate(systems, rounds)
    row = {"model": name, "batch": batch_size, "restarts": restarts}
    for system, result in times.items():
        row[f"{system} ms/step"] = result["median"] / steps
    for system in systems:
        if system != "invjax":
            row[f"{system} / invjax"] = times[system]["median"] / times["invjax"]["median"]
    row["spread"] = (times["invjax"]["high"] - times["invjax"]["low"]) / times["invjax"]["median"]
    return row


def main() -> None:
    """Run the cases and print the table."""
    parser = timing.parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--restarts", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=10, help="of a timed call")
    parser.add_argument("--rounds", type=int, default=5, help="in which all systems take turns")
    parser.add_argument(
        "--plain", action="store_true", help="time the plain JAX form as well (slow)"
    )
    options = parser.parse_args()
    rows = []
    for setting in itertools.product(options.models, options.batch_sizes, options.restarts):
        rows.append(case(*setting, options.steps, options.rounds, options.plain))
        print(rows[-1], flush=True)
    for columns in {tuple(row) for row in rows}:
        print("\n" + timing.table([row for row in rows if tuple(row) == columns]))
    timing.write(options.json, rows, benchmark="attack_speed")


if __name__ == "__main__":
    main()
