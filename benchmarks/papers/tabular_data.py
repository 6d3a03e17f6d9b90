"""Rows of a table from their gradient (Vero et al. 2023): TabLeak, and gradient matching without its parts.

    python benchmarks/papers/tabular_data.py --data-dir DATA --json tabular.json
    python benchmarks/papers/tabular_data.py --data-dir DATA --quick

Adult, an MLP of two hidden layers of 100 units, untrained, labels known. `right` is the share of entries that
come back: of a category the class, of a number to within 0.319 of its deviation. `surer` and `other` are
these shares in the half of a kind's entries of the lower and of the higher entropy over the ensemble.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

sys.path.append(str(pathlib.Path(__file__).parents[1]))
import timing

import invjax
from invjax import attacks, datasets, models
from invjax.attacks.matching.tabular import accuracy, match
from invjax.datasets import tabular

KINDS = {"categories": tabular.Categorical, "numbers": tabular.Continuous}
PARTS = {
    "TabLeak": {},
    "without its parts": {"restarts": 1, "relaxation": False, "pooling": False},
}


def victim(dataset, model, index: int, size: int):
    """What the server sees of a batch, and the batch."""
    key = jax.random.key(index)
    batch = datasets.draw(key, dataset, size)
    params = model.init(jax.random.fold_in(key, 1), dataset.input_shape)
    observation = invjax.observe(
        jax.random.fold_in(key, 2),
        model,
        params,
        batch,
        input_range=dataset.input_range,
        grant_labels=True,
    )
    return observation, batch


def halves(schema, found, batches, right) -> dict[str, float]:
    """Share of right entries of each kind, the surer half and the other."""
    order = jax.vmap(lambda a, b: match(schema, a, b))(found.inputs, batches.inputs)
    entropy = np.take_along_axis(
        np.asarray(found.diagnostics["entropy"]), np.asarray(order)[:, :, None], axis=1
    )
    shares = {}
    for name, kind in KINDS.items():
        chosen = [isinstance(column, kind) for column in schema.columns]
        values, correct = entropy[..., chosen].ravel(), right[..., chosen].ravel()
        sure = values <= np.median(values)
        for half, share in (("surer", correct[sure]), ("other", correct[~sure])):
            shares[f"{name}, {half}"] = round(float(share.mean()), 3)
    return shares


def main() -> None:
    """Measure and print."""
    parser = timing.parser(__doc__, data_dir=True)
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=1500, help="of every attack")
    parser.add_argument("--restarts", type=int, default=30, help="of the ensemble")
    parser.add_argument(
        "--quick", action="store_true", help="one batch of 8, 100 steps, 4 restarts"
    )
    options = parser.parse_args()
    if options.data_dir is None:
        parser.error("Adult is read from files: give --data-dir.")
    if options.quick:
        options.batches, options.batch_size, options.steps, options.restarts = 1, 8, 100, 4
    dataset, schema = tabular.adult(options.data_dir)
    model = models.mlp((100, 100), 2)
    victims = [
        victim(dataset, model, index, options.batch_size) for index in range(options.batches)
    ]
    observations, batches = jax.tree.map(lambda *leaves: jnp.stack(leaves), *victims)
    keys = jax.vmap(jax.random.key)(100 + jnp.arange(options.batches))
    rows = []
    for name, settings in PARTS.items():
        chosen = {"num_steps": options.steps, "restarts": options.restarts} | settings
        attack = attacks.tableak(model, schema, **chosen)
        found = jax.jit(jax.vmap(attack))(keys, observations)
        right = np.asarray(
            jax.vmap(lambda a, b: accuracy(schema, a, b))(found.inputs, batches.inputs)
        )
        row = {"attack": name, "right": round(float(right.mean()), 3)}
        if settings:
            row |= dict.fromkeys(list(rows[0])[2:], "")
        else:
            row |= halves(schema, found, batches, right)
        rows.append(row)
        print(rows[-1], flush=True)
    print("\n" + timing.table(rows))
    timing.write(options.json, rows, benchmark="papers/tabular_data")


if __name__ == "__main__":
    main()
