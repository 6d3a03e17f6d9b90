"""What optimal defences save at equal utility, by the criteria that they optimise (Chen et al. 2024).

    python benchmarks/papers/optimal_defenses.py --json optimal.json
    python benchmarks/papers/optimal_defenses.py --layerwise --batches 100

An untrained LeakyReLU network of two convolutions and two dense layers (3,658 parameters on 8x8 digits),
exact sensitivities. `noise`: the product of leakage `sum n_i / v_i` and cost `sum v_i q_i` over that of
uniform noise, with sensitivities averaged over all batches (and judged on their average), or each batch's
own. The other rows: the share of the squared Jacobian that is left where coordinates go, in an order,
until the utility `U_1 = sum of the kept q_i` has fallen to a level; each batch's own, averaged.
`reference` are figures of an independent prototype in NumPy on such a network, whose initialisation is not
known; it matters much (`--init torch` gives a tenth of the product: the last bias is then most of the
energy, and tells nothing).
"""

import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

sys.path.append(str(pathlib.Path(__file__).parents[1]))
import timing

from invjax import datasets
from invjax.defenses import sensitivity
from invjax.models.chain import Spec, chain_model

LEVELS = (0.99, 0.95, 0.9, 0.7, 0.5)
REFERENCE = {
    "noise, population": (0.758,),
    "noise, batch": (0.469,),
    "optimal": (0.904, 0.747, 0.623, 0.332, 0.168),
    "magnitude": (0.939, 0.823, 0.729, 0.417, 0.238),
    "random": (0.988, 0.953, 0.895, 0.699, 0.5),
    "smallest": (1.0, 1.0, 0.999, 0.939, 0.832),
}


def network(pool: str, init):
    """Two 3x3 convolutions, each with a pool, and two dense layers."""
    return chain_model(
        [
            Spec("conv", 8, window=3, padding=1, activation="leaky_relu"),
            Spec(pool, window=2),
            Spec("conv", 16, window=3, padding=1, activation="leaky_relu"),
            Spec(pool, window=2),
            Spec("flatten"),
            Spec("dense", 32, activation="leaky_relu"),
            Spec("dense", 10),
        ],
        10,
        "small_cnn",
        init,
    )


def flat(tree) -> np.ndarray:
    return np.asarray(ravel_pytree(tree)[0])


def product(found, layerwise: bool) -> float:
    """Leakage times cost of optimal noise, over that of uniform noise."""
    plan = sensitivity.pool_tensors(found) if layerwise else found
    variance = flat(sensitivity.scaled_to(plan, 1.0)) ** 2
    leakage, energy = flat(found.leakage), flat(found.energy)
    tells = variance > 0
    mine = (leakage[tells] / variance[tells]).sum() * (variance * energy).sum()
    return mine / (leakage.sum() * energy.sum())


def orders(found, layerwise: bool, rng) -> dict[str, np.ndarray]:
    """Coordinates in the order in which each rule prunes them."""
    plan = sensitivity.pool_tensors(found) if layerwise else found
    ratio = flat(sensitivity.ratio(plan, floor=1e-150, cap=np.inf))
    return {
        "optimal": np.argsort(-ratio, kind="stable"),
        "magnitude": np.argsort(flat(found.energy), kind="stable"),
        "random": rng.permutation(ratio.size),
        "smallest": np.argsort(ratio, kind="stable"),
    }


def left(order, leakage, energy) -> list[float]:
    """Share of the leakage at every level of utility."""
    utility = 1 - np.cumsum(energy[order]) / energy.sum()
    gone = np.concatenate([[0.0], np.cumsum(leakage[order])]) / leakage.sum()
    return [1 - gone[np.searchsorted(-utility, -level, side="right")] for level in LEVELS]


def main() -> None:
    """Measure and print."""
    parser = timing.parser(__doc__)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--pool", choices=["max_pool", "average_pool"], default="average_pool")
    parser.add_argument("--init", choices=["torch", "he", "lecun", "wide"], default="he")
    parser.add_argument("--layerwise", action="store_true", help="one strength a tensor")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    data, model = datasets.load("digits"), network(options.pool, options.init)
    rng = np.random.default_rng(options.seed)
    chosen = rng.permutation(len(data))[: options.batches * options.batch_size]
    batches = datasets.take(data, chosen.reshape(options.batches, options.batch_size))
    params = model.init(jax.random.key(options.seed), data.input_shape)
    with jax.enable_x64(True):
        params, batches = jax.tree.map(
            lambda leaf: jnp.asarray(leaf, float if leaf.dtype == np.float32 else None),
            (params, batches),
        )
        run = jax.jit(functools.partial(sensitivity.gradient_sensitivity, model))
        alone = [
            run(params, jax.tree.map(lambda leaf, i=index: leaf[i], batches))
            for index in range(options.batches)
        ]
        population = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *alone)
        measured = {
            "noise, population": [product(population, options.layerwise)],
            "noise, batch": [np.mean([product(found, options.layerwise) for found in alone])],
        }
        shares: dict[str, list] = {}
        for found in alone:
            leakage, energy = flat(found.leakage), flat(found.energy)
            for name, order in orders(found, options.layerwise, rng).items():
                shares.setdefault(name, []).append(left(order, leakage, energy))
    measured |= {name: np.mean(values, axis=0).tolist() for name, values in shares.items()}
    rows = [
        {
            "rule": name,
            "utility kept": level,
            "share left": round(float(value), 3),
            "reference": reference,
        }
        for name, values in measured.items()
        for level, value, reference in zip(
            LEVELS if len(values) > 1 else [None], values, REFERENCE[name], strict=True
        )
    ]
    print(timing.table(rows))
    timing.write(options.json, rows, benchmark="papers/optimal_defenses")


if __name__ == "__main__":
    main()
