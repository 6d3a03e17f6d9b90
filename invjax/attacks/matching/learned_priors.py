"""Priors fitted to auxiliary data: Gaussians, mixtures, one density a class, variational autoencoders.

Each is `weight` times a negative log-density up to a constant, summed over the samples of a batch,
so that weight 1 beside a matched likelihood is the true posterior (Balunovic et al. 2022). Those
over vectors raise a `ValueError` at their first use on inputs of another size.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.stats import norm
from jax.typing import ArrayLike

from invjax import models
from invjax.attacks.matching.priors import Context, Prior, gaussian
from invjax.attacks.matching.vectors import flattened
from invjax.base import Array, Params
from invjax.checks import check_count, check_number


def fit_gaussian(inputs: ArrayLike, weight: float = 1.0, shrinkage: float | None = None) -> Prior:
    """Gaussian with the mean and the full covariance of auxiliary data. Host code.

    The covariance is `(1 - shrinkage) S + shrinkage (tr S / d) I` with the empirical `S`, which
    alone is singular where coordinates are constant or outnumber the samples.

    Args:
      inputs: `[N, ...]` auxiliary samples, in input units.
      weight: factor of the term.
      shrinkage: in [0, 1]; by default that of Ledoit and Wolf 2004, of least mean squared error.

    Returns:
      The prior, summed over samples: `priors.gaussian` of the fit.

    Raises:
      ValueError: samples not finite or all the same, a shrinkage out of range or too small.
    """
    mean, covariance = _moments(_samples("inputs", inputs), shrinkage)
    (factor,), _ = _whitening(mean[None], covariance[None])
    return gaussian(jnp.asarray(mean), jnp.asarray(factor.T @ factor), weight)


def gaussian_mixture(
    proportions: ArrayLike, means: ArrayLike, covariances: ArrayLike, weight: float = 1.0
) -> Prior:
    """Mixture of Gaussians with full covariances over the flattened input.

    Args:
      proportions: `[K]` of the components, positive; only their ratios matter.
      means: `[K, d]`, in input units.
      covariances: `[K, d, d]`, positive definite; no tracers, for they are factored on the host.
      weight: factor of the term.

    Returns:
      The prior: `-weight log sum_k p_k N(x; m_k, S_k)` up to a constant, summed over samples. One
      component is `priors.gaussian`.

    Raises:
      ValueError: shapes that do not go together, proportions or covariances not positive, a negative
        weight.
    """
    check_number("weight", weight, 0.0)
    factors, log_scale = _whitening(means, covariances)
    shares = np.asarray(proportions, np.float64)
    if shares.shape != log_scale.shape or not (shares > 0).all():
        raise ValueError(f"proportions must be [{len(factors)}] positive numbers, got {shares}.")
    log_scale += np.log(shares)

    def value(inputs, context):
        del context
        energies = _energies(inputs, means, factors, log_scale)
        return -weight * jax.nn.logsumexp(-energies, axis=1).sum()

    return value


def fit_gaussian_mixture(
    inputs: ArrayLike,
    num_components: int,
    *,
    ridge: float = 1e-2,
    seed: int = 0,
    weight: float = 1.0,
) -> Prior:
    """Mixture of Gaussians fitted to auxiliary data by expectation maximisation. Host code.

    Its posterior has many modes, some narrow: on digits a single Gaussian reconstructs better.

    Args:
      inputs: `[N, ...]` auxiliary samples, in input units.
      num_components: Gaussians.
      ridge: added to every variance, in units of the mean variance of a coordinate; without it
        constant coordinates and small components have singular covariances.
      seed: of the start of the iteration.
      weight: factor of the term.

    Returns:
      The prior, summed over samples: `gaussian_mixture` of the fit.

    Raises:
      ValueError: samples not finite, all the same or too few, a ridge that is not positive.
    """
    from sklearn.mixture import GaussianMixture

    samples = _samples("inputs", inputs)
    check_number("ridge", ridge, 0.0, open_low=True)
    check_count("num_components", num_components, 1, len(samples))
    ridge *= samples.var(axis=0).mean()
    fit = GaussianMixture(num_components, reg_covar=ridge, random_state=seed).fit(samples)
    found = (np.asarray(part) for part in (fit.weights_, fit.means_, fit.covariances_))
    return gaussian_mixture(*found, weight=weight)


def class_conditional(means: ArrayLike, covariances: ArrayLike, weight: float = 1.0) -> Prior:
    """One Gaussian a class, chosen by the labels of the context.

    How frequent classes are is left out: that is a density of labels.

    Args:
      means: `[C, d]`, in input units.
      covariances: `[C, d, d]`, as of `gaussian_mixture`.
      weight: factor of the term.

    Returns:
      The prior: `-weight log N(x; m_y, S_y)` up to one constant for all classes, summed over
      samples. Where labels are probabilities it is the mean under them of the classes' values. It
      raises a `ValueError` on a context without labels, or with labels of other classes.

    Raises:
      ValueError: shapes that do not go together, covariances not positive, a negative weight.
    """
    check_number("weight", weight, 0.0)
    factors, log_scale = _whitening(means, covariances)

    def value(inputs, context):
        probabilities = _probabilities(context, inputs.shape[0], len(factors))
        return weight * jnp.sum(probabilities * _energies(inputs, means, factors, log_scale))

    return value


def fit_class_conditional(
    inputs: ArrayLike,
    labels: ArrayLike,
    num_classes: int,
    *,
    shrinkage: float | None = None,
    weight: float = 1.0,
) -> Prior:
    """One Gaussian a class, fitted to labelled auxiliary data. Host code.

    Args:
      inputs: `[N, ...]` auxiliary samples, in input units.
      labels: `[N]` integers in [0, num_classes).
      num_classes: classes; each needs two different samples.
      shrinkage: of every class's covariance, as in `fit_gaussian`.
      weight: factor of the term.

    Returns:
      The prior, summed over samples: `class_conditional` of the fit.

    Raises:
      ValueError: labels that do not go with the inputs or are out of range; and what `fit_gaussian`
        refuses, of any class.
    """
    samples, classes = _samples("inputs", inputs), np.asarray(labels)
    integers = classes.shape == samples.shape[:1] and classes.dtype.kind in "ui"
    if not integers or classes.min() < 0 or classes.max() >= num_classes:
        raise ValueError(
            f"labels must be [{len(samples)}] integers in [0, {num_classes - 1}], got "
            f"{classes.dtype} of shape {classes.shape}, {classes.min()} to {classes.max()}."
        )
    moments = [
        _moments(_samples(f"inputs of class {label}", samples[classes == label]), shrinkage)
        for label in range(num_classes)
    ]
    means, covariances = (np.stack(part) for part in zip(*moments, strict=True))
    return class_conditional(means, covariances, weight)


class VAE(NamedTuple):
    """A variational autoencoder with one hidden layer on either side (Kingma and Welling 2014).

    Attributes:
      encoder: parameters of the network from inputs to means and log-variances of the latents.
      decoder: parameters of the network from latents to the logits of the mean input.
      log_std: `[]` logarithm of the standard deviation of an input around that mean.
    """

    encoder: Params
    decoder: Params
    log_std: Array


def vae(trained: VAE, weight: float = 1.0, num_samples: int = 8, key: Array | None = None) -> Prior:
    """A variational autoencoder's evidence lower bound in place of the log-density.

    The bound lies below `log p(x)` by the divergence of the encoder's posterior from the true one;
    Balunovic et al. 2022 use it so. The draws of latents are fixed, the same for all samples and
    calls: the objective is deterministic and does not depend on the order of the batch.

    Args:
      trained: as `train_vae` returns it.
      weight: factor of the term.
      num_samples: draws of the latents.
      key: PRNG key of the draws; a fixed one where `None`.

    Returns:
      The prior: minus `weight` times the `elbo`, summed over samples.

    Raises:
      ValueError: no draws, a negative weight.
    """
    check_number("weight", weight, 0.0)
    check_count("num_samples", num_samples, 1)
    key = jax.random.key(0) if key is None else key
    noise = jax.random.normal(key, (num_samples, 1, _widths(trained.decoder)[0]))
    return lambda inputs, context: -weight * elbo(trained, inputs, noise.astype(inputs.dtype)).sum()


def elbo(trained: VAE, inputs: Array, noise: Array) -> Array:
    """The evidence lower bound of every input's log-density, in nats.

    `E_q(z|x) log p(x|z) - KL(q(z|x), p(z))`, the divergence in closed form and the expectation over
    the given draws; in the mean over them it lies below `log p(x)`.

    Args:
      trained: the autoencoder.
      inputs: `[B, ...]` in [0, 1].
      noise: `[S, B, latent]` standard normal draws, or `[S, 1, latent]`, the same for all inputs.

    Returns:
      `[B]`.

    Raises:
      ValueError: inputs or noise of another size than the autoencoder's.
    """
    flat, latent = flattened(inputs, _widths(trained.encoder)[0]), _widths(trained.decoder)[0]
    if noise.ndim != 3 or noise.shape[1] not in (1, len(flat)) or noise.shape[2] != latent:
        raise ValueError(
            f"noise must be [S, {len(flat)} or 1, {latent}] here, got shape {noise.shape}."
        )
    mean, log_variance = jnp.split(_perceptron(trained.encoder, flat), 2, axis=-1)
    log_variance = jnp.clip(log_variance, -20.0, 20.0)  # far from all data it would overflow
    latents = mean[None] + jnp.exp(0.5 * log_variance)[None] * noise
    logits = _perceptron(trained.decoder, latents.reshape(-1, latent))
    decoded = jax.nn.sigmoid(logits).reshape(len(noise), *flat.shape)
    likelihood = norm.logpdf(flat[None], decoded, jnp.exp(trained.log_std)).sum(axis=-1)
    divergence = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance).sum(axis=-1)
    return likelihood.mean(axis=0) - divergence


def train_vae(
    key: Array,
    inputs: ArrayLike,
    *,
    latent: int = 20,
    hidden: int = 500,
    num_steps: int = 3000,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    observation_std: float | None = 0.1,
) -> VAE:
    """Train a variational autoencoder on auxiliary data by Adam. Host code around a compiled loop.

    Sizes are those of Balunovic et al. 2022. Departures: inputs are Gaussian around the decoder's
    mean, because a candidate is no bit; and there is no weight decay.

    Args:
      key: PRNG key of the initial weights, the mini-batches and the latents.
      inputs: `[N, ...]` auxiliary samples in [0, 1].
      latent: latents.
      hidden: ReLU units of a hidden layer.
      num_steps: optimizer steps.
      batch_size: samples a step, drawn with replacement.
      learning_rate: of Adam.
      observation_std: standard deviation of an input around the decoder's mean, in input units;
        learned where `None`, which on few samples overfits: watch the `elbo` of held-out ones.

    Returns:
      The autoencoder.

    Raises:
      ValueError: a number out of range, inputs outside [0, 1].
    """
    sizes = {"latent": latent, "hidden": hidden, "num_steps": num_steps, "batch_size": batch_size}
    for name, size in sizes.items():
        check_count(name, size, 1)
    # One that is learned starts wide: a narrow one would hide the divergence at first.
    std = 0.3 if observation_std is None else observation_std
    check_number("observation_std", std, 0.0, open_low=True)
    check_number("learning_rate", learning_rate, 0.0, open_low=True)
    data = _samples("inputs", inputs)
    if data.min() < 0 or data.max() > 1:
        raise ValueError(f"inputs must lie in [0, 1], got [{data.min():.3g}, {data.max():.3g}].")
    samples = jnp.asarray(data, jnp.float32)
    encoder_key, decoder_key, steps_key = jax.random.split(key, 3)
    start = VAE(
        models.mlp((hidden,), 2 * latent).init(encoder_key, (data.shape[1],)),
        models.mlp((hidden,), data.shape[1]).init(decoder_key, (latent,)),
        jnp.log(jnp.float32(std)),
    )
    optimizer = optax.adam(learning_rate)

    def loss(trained: VAE, batch: Array, noise: Array) -> Array:
        if observation_std is not None:
            trained = trained._replace(log_std=jax.lax.stop_gradient(trained.log_std))
        return -elbo(trained, batch, noise).mean()

    def step(carry, key):
        trained, state = carry
        batch_key, noise_key = jax.random.split(key)
        batch = samples[jax.random.randint(batch_key, (batch_size,), 0, len(samples))]
        noise = jax.random.normal(noise_key, (1, batch_size, latent))
        updates, state = optimizer.update(jax.grad(loss)(trained, batch, noise), state)
        return (optax.apply_updates(trained, updates), state), None

    keys = jax.random.split(steps_key, num_steps)
    return jax.lax.scan(step, (start, optimizer.init(start)), keys)[0][0]


def _widths(params: Params) -> tuple[int, int, int]:
    """Inputs, hidden units and outputs of a perceptron."""
    first, last = (params[name]["kernel"].shape for name in ("layer01", "layer02"))
    return *first, last[1]


def _perceptron(params: Params, inputs: Array) -> Array:
    _, hidden, outputs = _widths(params)
    return models.mlp((hidden,), outputs).apply(params, inputs)


def _samples(name: str, inputs: ArrayLike) -> np.ndarray:
    """Samples as `[N, d]` in float64."""
    samples = np.asarray(inputs, np.float64)
    if samples.ndim < 2 or samples.size == 0:
        raise ValueError(f"{name} must be [N, ...] and not empty, got shape {samples.shape}.")
    if not np.isfinite(samples).all() or (samples == samples[:1]).all():
        raise ValueError(f"{name} must be finite and not all the same, got {len(samples)} not so.")
    return samples.reshape(len(samples), -1)


def _moments(samples: np.ndarray, shrinkage: float | None) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.covariance import LedoitWolf, ShrunkCovariance

    fit = LedoitWolf() if shrinkage is None else ShrunkCovariance(shrinkage=shrinkage)
    fit.fit(samples)
    return np.asarray(fit.location_), np.asarray(fit.covariance_)


def _whitening(means: ArrayLike, covariances: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Factors `F [K, d, d]` of the precisions `F^T F`, and `[K]` their log-determinants."""
    given, shape = np.asarray(covariances, np.float64), np.shape(means)
    if len(shape) != 2 or 0 in shape or given.shape != (*shape, shape[1]):
        raise ValueError(
            f"means must be [K, d] and covariances [K, d, d], got {shape} and {given.shape}."
        )
    variances, axes = np.linalg.eigh(given)
    least, most = variances[:, 0], variances[:, -1]
    # Rounding leaves a singular matrix eigenvalues of about 1e-15 of the largest.
    asymmetry = np.abs(given - given.swapaxes(1, 2)).max(axis=(1, 2))
    good = (least > 1e-12 * most) & (asymmetry <= 1e-5 * most)
    if not good.all():
        raise ValueError(
            f"covariances[{np.argmin(good)}] must be symmetric and positive definite, and is not; "
            "a fitted one becomes so by more shrinkage."
        )
    return axes.swapaxes(1, 2) / np.sqrt(variances)[..., None], -0.5 * np.log(variances).sum(axis=1)


def _energies(inputs: Array, means: ArrayLike, factors: np.ndarray, log_scale: np.ndarray) -> Array:
    """`[B, K]` negative log-densities, up to the constant that puts the highest mode at zero."""
    dtype = inputs.dtype
    centered = flattened(inputs, factors.shape[1])[:, None] - jnp.asarray(means, dtype)[None]
    white = jnp.einsum(
        "kde,bke->bkd", jnp.asarray(factors, dtype), centered, precision=jax.lax.Precision.HIGHEST
    )
    offset = jnp.asarray(log_scale.max() - log_scale, dtype)
    return 0.5 * jnp.square(white).sum(axis=-1) + offset[None]


def _probabilities(context: Context, size: int, classes: int) -> Array:
    """The labels of a context as `[B, C]` probabilities."""
    if context.labels is None:
        raise ValueError("class_conditional needs context.labels, got None.")
    labels = jnp.asarray(context.labels)
    known = max(context.observation.facts.num_classes, 2)
    integers = jnp.issubdtype(labels.dtype, jnp.integer)
    if labels.shape != ((size,) if integers else (size, classes)) or known > classes:
        raise ValueError(
            f"class_conditional of {classes} classes needs context.labels [{size}] or "
            f"[{size}, {classes}], got shape {labels.shape} in a problem of {known} classes."
        )
    return jax.nn.one_hot(labels, classes) if integers else labels
