"""Speed of per-sample gradients and clipped sums: ours against `jax.vmap(jax.grad(loss))`.

    python benchmarks/per_sample_gradients.py --json per_sample_gradients.json

One thread, alternating rounds in one process, medians. Before timing, every result is checked to be
equal to the plain form to 1e-6 of its largest entry. The last column is the batch gradient's share: what
one sample's gradient costs beside a gradient that is not resolved by samples.
"""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"

import jax
import jax.numpy as jnp
import timing

import invjax
from invjax import gradients, models

MODELS = {
    "mlp(256)": lambda: models.mlp((256,)),
    "lenet": models.lenet,
    "convnet_small": models.convnet_small,
}
CLIP = 1.0


def plain_per_sample(model):
    """The textbook form."""

    def one(params, x, label):
        return model.loss(params, invjax.Batch(x[None], label[None]))

    return jax.vmap(jax.grad(one), in_axes=(None, 0, 0))


def plain_clipped_sum(model):
    """The textbook form: all per-sample gradients, their norms, and the scaled sum."""
    per_sample = plain_per_sample(model)

    def clipped(params, x, labels):
        found = per_sample(params, x, labels)
        squares = [jnp.square(leaf).reshape(len(x), -1).sum(1) for leaf in jax.tree.leaves(found)]
        scale = jnp.minimum(1.0, CLIP / jnp.sqrt(sum(squares)))
        return jax.tree.map(lambda leaf: jnp.tensordot(scale, leaf, 1), found)

    return clipped


def check(name: str, ours, plain) -> None:
    """Equal to 1e-6 of the largest entry of every leaf."""
    for left, right in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        error = float(jnp.abs(left - right).max() / jnp.abs(right).max())
        assert error < 1e-6, f"{name}: {error}"


def case(name: str, size: int, rounds: int) -> list[dict]:
    """Two rows of the table: per-sample gradients, and clipped sums."""
    model = MODELS[name]()
    key = jax.random.key(0)
    inputs = jax.random.uniform(key, (size, 32, 32, 3))
    labels = jnp.arange(size) % model.num_classes
    params = model.init(key, inputs.shape[1:])
    batch = invjax.Batch(inputs, labels)
    rows = []
    for what, ours, plain in (
        ("per-sample", gradients.per_sample_gradients, plain_per_sample(model)),
        (
            "clipped sum",
            lambda model, params, batch: gradients.clipped_sum(model, params, batch, CLIP),
            plain_clipped_sum(model),
        ),
    ):
        ours = jax.jit(lambda params, batch, ours=ours: ours(model, params, batch))
        plain = jax.jit(plain)
        check(f"{what} {name} {size}", ours(params, batch), plain(params, inputs, labels))
        mean = jax.jit(lambda params, batch: gradients.gradient(model, params, batch))
        systems = {
            "invjax": lambda ours=ours: jax.block_until_ready(ours(params, batch)),
            "plain": lambda plain=plain: jax.block_until_ready(plain(params, inputs, labels)),
            "mean": lambda mean=mean: jax.block_until_ready(mean(params, batch)),
        }
        times = timing.alternate(systems, rounds)
        rows.append(
            {
                "what": what,
                "model": name,
                "batch": size,
                **{f"{system} ms": times[system]["median"] for system in systems},
                "plain / invjax": times["plain"]["median"] / times["invjax"]["median"],
                "invjax / mean gradient": times["invjax"]["median"] / times["mean"]["median"],
                "spread": (times["invjax"]["high"] - times["invjax"]["low"])
                / times["invjax"]["median"],
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Run the cases and print the table."""
    parser = timing.parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[8, 64])
    parser.add_argument("--rounds", type=int, default=7, help="in which all systems take turns")
    options = parser.parse_args()
    rows = [
        row
        for name in options.models
        for size in options.batch_sizes
        for row in case(name, size, options.rounds)
    ]
    print("\n" + timing.table(rows))
    timing.write(options.json, rows, benchmark="per_sample_gradients")


if __name__ == "__main__":
    main()
