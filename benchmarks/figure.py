"""The README's figure: truth, what a defence sends, what comes back, by who attacks.

    python benchmarks/figure.py --out docs/figures/leak.png

Six digits, one gradient each, an untrained MLP. PSNR in decibels is the median over the six.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.figure import Figure

import invjax
from invjax import attacks, datasets, defenses, metrics
from invjax.report.figures import png

COUNT = 6


def reconstructions() -> dict[str, np.ndarray]:
    """Images `[COUNT, 8, 8, 1]` by row of the figure."""
    digits = datasets.digits()
    victims = datasets.draw(jax.random.key(1), digits, COUNT)
    model = invjax.models.mlp((128, 64))
    params = model.init(jax.random.key(0), digits.input_shape)
    keys = jax.random.split(jax.random.key(2), COUNT)

    def attacked(defense, attack):
        def one(key, inputs, label):
            batch = invjax.Batch(inputs[None], label[None])
            seen = invjax.observe(key, model, params, batch, defense, grant_labels=True)
            return attack(key, seen).inputs[0]

        return np.asarray(jax.jit(jax.vmap(one))(keys, victims.inputs, victims.labels))

    naive = attacks.inverting_gradients(model, labels="known", num_steps=600, total_variation=1e-4)
    soteria = defenses.soteria(model, 0.8)
    noise = invjax.chain(defenses.clip_per_sample(1.0), defenses.gaussian_noise(0.05))

    def knowing(defense):
        return attacks.bayes(model, defense, num_steps=600)

    return {
        "truth": np.asarray(victims.inputs),
        "no defence": attacked(None, naive),
        "Soteria,\nattack unaware of it": attacked(soteria, naive),
        "Soteria,\nattack that knows it": attacked(soteria, knowing(soteria)),
        "clip 1, noise 0.05,\nattack that knows them": attacked(noise, knowing(noise)),
        "mean image,\nno gradient at all": np.broadcast_to(
            np.asarray(digits.inputs).mean(axis=0), victims.inputs.shape
        ),
    }


def draw(images: dict[str, np.ndarray]) -> Figure:
    """A row for each, with its median PSNR."""
    figure = Figure(figsize=(7.2, 5.6), dpi=110, layout="constrained")
    axes = figure.subplots(len(images), COUNT)
    for line, (name, row) in zip(axes, images.items(), strict=True):
        for axis, image in zip(line, row, strict=True):
            axis.imshow(image[..., 0], cmap=matplotlib.colormaps["gray"], vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
        if name != "truth":
            quality = jnp.median(metrics.psnr(jnp.asarray(row), images["truth"], data_range=1.0))
            line[-1].yaxis.set_label_position("right")
            line[-1].set_ylabel(f"{quality:.0f} dB", rotation=0, ha="left", va="center")
    return figure


def main() -> None:
    """Attack and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("docs/figures/leak.png"),
        help="(default: %(default)s)",
    )
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_bytes(png(draw(reconstructions())))


if __name__ == "__main__":
    main()
