"""Rows that few samples activate: trap weights, QBI and PAIRS."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from invjax.attacks.analytic.imprints.imprint import Imprint, auxiliary_inputs
from invjax.attacks.analytic.imprints.planting import dense_imprint
from invjax.base import Array, Batch, Model
from invjax.checks import check_count, check_number


def trap_weights(
    model: Model,
    input_shape: Sequence[int],
    *,
    sigma: float = 0.5,
    scale: float = 0.95,
    independent_signs: bool = False,
    cascade: bool = False,
    max_samples: int = 128,
    tolerance: float | None = None,
) -> Imprint:
    """When the curious abandon honesty (Boenisch et al. 2023): rows whose minuses outweigh their pluses.

    In every row of the first dense layer, the weights of one unit, a random half is `-|v|` with normal
    `v`, the other half `scale` times the same values with a plus; biases are zero. On inputs in [0, 1]
    most rows stay inactive on most samples, and one that a single sample activates is that sample.
    The best `scale` depends on the data and on the batch size.

    Args:
      model: a model that ends in dense ReLU layers, one hidden at least with a bias; before them may
        stand convolutions of stride 1 that keep the size, which are made to pass the input on.
      input_shape: shape of one input. Rows count on inputs that are not negative, and a convolution
        with ReLU passes no others on: such an input range is then refused.
      sigma: standard deviation of `v`.
      scale: of the positive weights, in (0, 1].
      independent_signs: draw every weight by itself, negative or positive with probability one
        half, which does not collapse at a scale of 1 (Shariati and Alambardar Meybodi).
      cascade: whether to peel off what was found, by `row_scan`; fully connected models only.
      max_samples: slots, where the batch size is not known.
      tolerance: largest relative deviation of a certificate; by default that of `row_scan` with a
        cascade, else 1e-6 for gradients of double precision and 1e-4 for single.

    Returns:
      The imprint; the model is the given one.

    Raises:
      ValueError: a setting out of range; when planting, another kind of model, or of other inputs; at
        the attack's use, what `Imprint` says, and with a cascade what `row_scan` does.
    """
    check_number("sigma", sigma, 0.0, open_low=True)
    check_number("scale", scale, 0.0, 1.0, open_low=True)

    def draw(
        key: Array, shape: tuple[int, ...], units: int, auxiliary: Batch | None
    ) -> tuple[Array, Array]:
        del auxiliary
        size = math.prod(shape)
        value_key, sign_key = jax.random.split(key)
        values = sigma * jnp.abs(jax.random.normal(value_key, (size, units)))
        if independent_signs:
            negative = jax.random.bernoulli(sign_key, shape=(size, units))
            return jnp.where(negative, -values, scale * values), jnp.zeros(units)
        order = jnp.argsort(jax.random.uniform(sign_key, (size, units)), axis=0)
        half = size // 2
        # An odd entry out stays negative.
        ordered = jnp.concatenate([-values[: size - half], scale * values[:half]])
        columns = jnp.arange(units)[None]
        return jnp.zeros_like(values).at[order, columns].set(ordered), jnp.zeros(units)

    return dense_imprint(
        model,
        input_shape,
        draw,
        "trap_weights",
        cascade=cascade,
        max_samples=max_samples,
        tolerance=tolerance,
    )


def qbi(
    model: Model,
    input_shape: Sequence[int],
    batch_size: int,
    *,
    mean: float | Array = 0.0,
    std: float | Array = 1.0,
    cascade: bool = False,
    max_samples: int = 128,
    tolerance: float | None = None,
) -> Imprint:
    """Quantile-based bias initialisation (Nowak et al. 2024, QBI): rows active on one sample in `batch_size`.

    Normal weights and the bias `sqrt(d)` times the normal quantile of `1 / batch_size`. If inputs are
    about independent and standard normal, a row is active on exactly one sample with probability
    `P = (1 - 1/B)^(B - 1)`, and `N` rows isolate the share `1 - (1 - P/B)^N` of the samples; real images
    are far from that, and leak less.

    Args:
      model: as for `trap_weights`.
      input_shape: shape of one input.
      batch_size: the clients', at least 2.
      mean: of the inputs, a number or an array of the input's shape: the planted layer normalises.
      std: their standard deviation, likewise; positive everywhere, also where an entry never varies.
      cascade: as for `trap_weights`.
      max_samples: slots, where the batch size is not known.
      tolerance: as for `trap_weights`.

    Returns:
      The imprint, as of `trap_weights`.

    Raises:
      ValueError: as `trap_weights`; a mean or std that does not go with the inputs.
    """
    check_count("batch_size", batch_size, 2)
    check_moments(mean, std, input_shape)

    def draw(
        key: Array, shape: tuple[int, ...], units: int, auxiliary: Batch | None
    ) -> tuple[Array, Array]:
        del auxiliary
        size = math.prod(shape)
        bias = jax.scipy.special.ndtri(jnp.full(units, 1 / batch_size)) * math.sqrt(size)
        return normalizing(jax.random.normal(key, (size, units)), bias, mean, std, shape)

    return dense_imprint(
        model,
        input_shape,
        draw,
        "qbi",
        cascade=cascade,
        max_samples=max_samples,
        tolerance=tolerance,
    )


def pairs(
    model: Model,
    input_shape: Sequence[int],
    batch_size: int,
    *,
    mean: float | Array = 0.0,
    std: float | Array = 1.0,
    cascade: bool = False,
    max_samples: int = 128,
    tolerance: float | None = None,
) -> Imprint:
    """QBI whose rows are tried on the server's own data first (Nowak et al. 2024, PAIRS).

    Auxiliary data are cut into batches. A row is redrawn until it is active on exactly one sample
    of the present batch, one that no earlier row isolates; when all are isolated, the next batch
    comes. The search ends after five draws a sample and row, or 2000 without progress, as published;
    rows that are then left are drawn as in QBI.

    Args:
      model: as for `trap_weights`.
      input_shape: shape of one input.
      batch_size: the clients', at least 2.
      mean: of the inputs, as for `qbi`.
      std: their standard deviation, as for `qbi`.
      cascade: as for `trap_weights`.
      max_samples: slots, where the batch size is not known.
      tolerance: as for `trap_weights`.

    Returns:
      The imprint, as of `trap_weights`. `plant` needs auxiliary data, `batch_size` samples or more.

    Raises:
      ValueError: as `qbi`; when planting, too few data.
      TypeError: when planting, auxiliary inputs that are not floats.
    """
    check_count("batch_size", batch_size, 2)
    check_moments(mean, std, input_shape)

    def draw(
        key: Array, shape: tuple[int, ...], units: int, auxiliary: Batch | None
    ) -> tuple[Array, Array]:
        data = auxiliary_inputs(auxiliary, shape, "pairs")
        number, size = data.shape
        batches = number // batch_size
        if batches < 1:
            raise ValueError(f"pairs needs {batch_size} auxiliary samples or more, got {number}.")
        data = data[: batches * batch_size].reshape(batches, batch_size, size)
        bias = jax.scipy.special.ndtri(1 / batch_size) * math.sqrt(size)
        start, search = jax.random.split(key)
        drawn = jax.random.normal(start, (units, size), data.dtype)

        def unfinished(carry):
            _, _, row, _, tries, idle = carry
            return (row < units) & (tries < 5 * batch_size * units) & (idle < 2000)

        def attempt(carry):
            weight, covered, row, batch, tries, idle = carry
            vector = jax.random.normal(jax.random.fold_in(search, tries), (size,), data.dtype)
            kernel, offset = normalizing(vector[:, None], bias, mean, std, shape)
            active = data[batch] @ kernel[:, 0] + offset[0] > 0
            good = (active.sum() == 1) & ~(active & covered).any()
            covered = covered | (active & good)
            full = covered.all()
            return (
                weight.at[jnp.where(good, row, units)].set(vector, mode="drop"),
                covered & ~full,
                row + good,
                (batch + full) % batches,
                tries + 1,
                jnp.where(good, 0, idle + 1),
            )

        zero = jnp.asarray(0)
        carry = (drawn, jnp.zeros(batch_size, bool), zero, zero, zero, zero)
        weight = jax.lax.while_loop(unfinished, attempt, carry)[0].T
        return normalizing(weight, bias, mean, std, shape)

    return dense_imprint(
        model,
        input_shape,
        draw,
        "pairs",
        cascade=cascade,
        max_samples=max_samples,
        tolerance=tolerance,
    )


def check_moments(mean: float | Array, std: float | Array, input_shape: Sequence[int]) -> None:
    """Refuse what inputs of a shape cannot be normalised by; traced values pass.

    Args:
      mean: a number or an array that broadcasts to the shape.
      std: likewise, and positive.
      input_shape: shape of one input.

    Raises:
      ValueError: another shape, or a standard deviation that is not positive.
    """
    for name, value in (("mean", mean), ("std", std)):
        try:
            np.broadcast_to(np.empty(np.shape(value)), tuple(input_shape))
        except ValueError:
            raise ValueError(
                f"{name} must be a number or an array that broadcasts to {tuple(input_shape)}, got "
                f"shape {np.shape(value)}."
            ) from None
    if not isinstance(std, jax.core.Tracer) and not (np.asarray(std) > 0).all():
        raise ValueError(f"std must be positive, got {np.min(std)} as its least.")


def normalizing(
    weight: Array,
    bias: Array,
    mean: float | Array,
    std: float | Array,
    shape: tuple[int, ...],
) -> tuple[Array, Array]:
    """`[d, n]` weights and `[n]` biases on raw inputs that do what the given ones do on normalised inputs."""
    mean, std = (
        jnp.broadcast_to(jnp.asarray(side, weight.dtype), shape).reshape(-1) for side in (mean, std)
    )
    scaled = weight / std[:, None]
    return scaled, bias - mean @ scaled
