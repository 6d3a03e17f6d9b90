"""What several local steps hide: a federated round read as one gradient, by a surrogate, and simulated.

    python benchmarks/papers/federated_rounds.py --json federated.json
    python benchmarks/papers/federated_rounds.py --quick

Every client holds a few digits of different labels, which it grants, and weights of its own, makes `--epochs`
passes of SGD in mini-batches of a new random order each, and sends the difference of the weights. `one
gradient` is Inverting Gradients on the update as it is, `surrogate` matches a gradient at a point between the
weights sent and returned, `simulated` replays the round (Dimitrov et al. 2022): in one fixed order as
published, in orders that are learned, or in the true ones, which no server sees. `moved` is the length of the
update beside that of the weights. PSNR in decibels is a client's mean over its samples, then the mean and its
standard error over clients. The setting and its clients are those of `test_what_local_training_hides` in
`tests/attacks/matching/test_federated.py`.
"""

import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.append(str(pathlib.Path(__file__).parents[1]))
import timing

import invjax
from invjax import attacks, datasets, metrics, models
from invjax.attacks import federated
from invjax.base import LocalTraining

QUICK = 20
"""Steps of every attack in `--quick`."""


def readings(model, steps: int | None) -> dict:
    """By name, `attack_of(orders)`: of these the true orders are given to the last alone."""
    given = {} if steps is None else {"num_steps": steps}
    single = attacks.inverting_gradients(model, **({"num_steps": 1000} | given))
    surrogate = federated.surrogate(model, **given)
    fixed = federated.fedavg(model, **given)
    learned = federated.fedavg(model, orders="learned", **given)
    return {
        "one gradient": lambda orders: single,
        "surrogate": lambda orders: surrogate,
        "simulated, one fixed order": lambda orders: fixed,
        "simulated, orders learned": lambda orders: learned,
        "simulated, true orders": lambda orders: federated.fedavg(model, orders=orders, **given),
    }


def client(dataset, model, local: LocalTraining, seed: int):
    """A client's samples, the observation of its update, and its orders `[E, N]`."""
    params_key, data_key, key = jax.random.split(jax.random.key(seed), 3)
    params = model.init(params_key, dataset.input_shape)
    batch = datasets.draw(data_key, dataset, local.num_samples, distinct_labels=True)
    observation = invjax.observe(key, model, params, batch, local=local, grant_labels=True)
    # As the federated update draws them, which `main` checks.
    order_key = jax.random.split(key)[0]
    keys = [jax.random.fold_in(order_key, epoch) for epoch in range(local.epochs)]
    orders = jnp.stack([jax.random.permutation(key, local.num_samples) for key in keys])
    return batch, observation, orders


def check(model, local: LocalTraining, clients) -> None:
    """The round, simulated with the true samples and orders, is the update that was sent."""

    def replay(batch, observation, orders):
        return federated.simulate(model, observation.params, batch, local, orders)

    again = jax.jit(jax.vmap(replay))(*clients)
    for mine, sent in zip(
        jax.tree.leaves(again), jax.tree.leaves(clients[1].gradient), strict=True
    ):
        np.testing.assert_allclose(mine, sent, atol=1e-5)


def measure(attack_of, clients) -> np.ndarray:
    """`[V]` mean PSNR of clients attacked at once."""

    def one(key, batch, observation, orders):
        inputs = attack_of(orders)(key, observation).inputs
        order = metrics.match(inputs, batch.inputs)
        return metrics.psnr(inputs[order], batch.inputs, data_range=1.0).mean()

    keys = jax.random.split(jax.random.key(9), len(clients[2]))
    return np.asarray(jax.jit(jax.vmap(one))(keys, *clients))


def main() -> None:
    """Measure and print."""
    parser = timing.parser(__doc__)
    parser.add_argument("--clients", type=int, help="6; 2 if quick")
    parser.add_argument("--samples", type=int, default=4, help="of a client")
    parser.add_argument("--batch-size", type=int, default=2, help="of a local step")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--learning-rate", type=float, default=0.2, help="of the client")
    parser.add_argument("--units", type=int, default=128, help="of the hidden layer")
    parser.add_argument("--steps", type=int, help="of every attack; its default where left out")
    parser.add_argument("--quick", action="store_true", help=f"few clients, {QUICK} steps")
    options = parser.parse_args()
    number = options.clients or (2 if options.quick else 6)
    steps = options.steps or (QUICK if options.quick else None)
    dataset, model = datasets.digits(), models.mlp((options.units,))
    local = LocalTraining(
        epochs=options.epochs,
        batch_size=options.batch_size,
        num_samples=options.samples,
        learning_rate=options.learning_rate,
    )
    drawn = [client(dataset, model, local, seed) for seed in range(number)]
    clients = jax.tree.map(lambda *leaves: jnp.stack(leaves), *drawn)
    check(model, local, clients)
    norm = jax.vmap(optax.tree.norm)
    moved = np.asarray(norm(clients[1].gradient) / norm(clients[1].params))
    print(f"moved: {moved.mean():.3f}, from {moved.min():.3f} to {moved.max():.3f}", flush=True)
    rows = []
    for name, attack_of in readings(model, steps).items():
        started = time.perf_counter()
        psnr = measure(attack_of, clients)
        error = psnr.std(ddof=1) / number**0.5 if number > 1 else float("nan")
        row = {
            "update read as": name,
            "PSNR": round(float(psnr.mean()), 1),
            "error": round(float(error), 1),
            "lowest": round(float(psnr.min()), 1),
            "seconds": round(time.perf_counter() - started, 1),
        }
        rows.append(row)
        print(rows[-1], flush=True)
    print("\n" + timing.table(rows))
    timing.write(
        options.json,
        rows,
        clients=number,
        moved=float(moved.mean()),
        benchmark="papers/federated_rounds",
    )


if __name__ == "__main__":
    main()
