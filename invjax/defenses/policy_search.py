"""The search behind ATS: how much of an image a transformation hides, and what it costs."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from invjax import conv, gradients
from invjax.base import Array, Batch, Bound, Model, Params
from invjax.checks import check_count
from invjax.defenses.augmentation import FILL, POOL, augment
from invjax.ranges import bounds, check_range

Transform = Callable[[Array, Array], Array]
"""`transform(key, inputs [B, ...]) -> inputs`."""

_RIDGE = 1e-5


class Candidates(NamedTuple):
    """Policies and their scores: those accepted come first, the safest at the top.

    Attributes:
      policies: `[N, T]` indices into `invjax.defenses.augmentation.POOL`; -1 is no transformation.
      privacy: `[N]` S_pri, lower is safer.
      accuracy: `[N]` S_acc, higher is more useful.
      accepted: `[N]` booleans: S_acc reaches the threshold.
    """

    policies: Array
    privacy: Array
    accuracy: Array
    accepted: Array


def privacy_score(
    model: Model,
    params: Params,
    inputs: Array,
    labels: Array,
    transform: Transform,
    key: Array,
    *,
    num_bins: int = 20,
    input_range: tuple[Bound, Bound] = (0.0, 1.0),
) -> Array:
    """S_pri (Gao et al. 2021): how well a gradient tells how near an image is to `T(x)`.

    On the straight path from noise to `T(x)`: the cosine between the gradient at a point and the
    gradient at `T(x)`, the mean over the parameter tensors; its area by the trapezoidal rule, the
    path's length being one; the mean over the images. The label is the image's own all along.

    Choices where the paper says nothing, as in the released code: the noise is uniform in the input
    range, and a tensor without a gradient has cosine zero.

    Args:
      model: the model.
      params: its parameters; the paper trains them on a tenth of the data.
      inputs: `[B, ...]`, of which each is scored on its own.
      labels: `[B]`.
      transform: `transform(key, inputs) -> inputs` of the same shape.
      key: PRNG key of the transformation and the noise.
      num_bins: trapezoids.
      input_range: lowest and highest value of an input, each one number or one per channel.

    Returns:
      A scalar in [-1, 1]; lower is safer.

    Raises:
      ValueError: no bins, or no range.
    """
    check_count("num_bins", num_bins, 1)
    check_range(input_range)
    model = conv.for_matching(model)
    transform_key, noise_key = jax.random.split(key)
    targets = transform(transform_key, inputs)
    low, high = bounds(input_range, targets.shape, targets.dtype)
    noise = low + (high - low) * jax.random.uniform(noise_key, targets.shape, targets.dtype)
    positions = jnp.arange(num_bins + 1, dtype=targets.dtype) / num_bins

    def area(sample):
        start, end, label = sample
        shares = positions.reshape((-1,) + (1,) * end.ndim)
        path = shares * end[None] + (1 - shares) * start[None]
        batch = Batch(path, jnp.broadcast_to(label, (num_bins + 1, *label.shape)))
        along = jax.tree.leaves(gradients.per_sample_gradients(model, params, batch))
        return jnp.trapezoid(sum(map(_cosine_to_last, along)) / len(along), dx=1 / num_bins)

    # One by one: the gradients along all paths together would fill the memory.
    return jnp.mean(jax.lax.map(area, (noise, targets, jnp.asarray(labels))))


def _cosine_to_last(tensors: Array) -> Array:
    flat = tensors.reshape(tensors.shape[0], -1)
    return optax.losses.cosine_similarity(flat, flat[-1:], epsilon=1e-16)


def accuracy_score(
    model: Model,
    params: Params,
    inputs: Array,
    labels: Array | None,
    transform: Transform,
    key: Array,
) -> Array:
    """S_acc (Gao et al. 2021, after Mellor et al. 2021): how different images are to the model.

    `-sum_k log(v_k + 1e-5) + 1 / (v_k + 1e-5)` over the eigenvalues `v_k` of the correlation matrix
    of the images' Jacobians, here the input gradients of the sum of the logits.

    The most that `N` images reach is `-N`, where all are uncorrelated. In the released code only the
    first image of every class counts: about 63 of 100 images of CIFAR-100, for which the threshold
    -85 was set, and at most 10 of CIFAR-10.

    Args:
      model: the model.
      params: its parameters.
      inputs: `[B, ...]`.
      labels: `[B]` classes, of which the first image each counts; all count where `None`.
      transform: `transform(key, inputs) -> inputs` of the same shape.
      key: PRNG key of the transformation.

    Returns:
      A scalar, higher is more useful; NaN where an image's Jacobian is constant.
    """
    model = conv.for_matching(model)
    jacobians = jax.grad(lambda x: jnp.sum(model.apply(params, x)))(transform(key, inputs))
    with jax.default_matmul_precision("highest"):
        correlation = jnp.corrcoef(jacobians.reshape(inputs.shape[0], -1))
    if labels is None:
        counts = jnp.ones(inputs.shape[0], bool)
    else:
        counts = ~jnp.any(jnp.tril(labels[:, None] == labels[None, :], -1), axis=1)
    # An image that does not count is made uncorrelated: an eigenvalue of one, taken off again.
    identity = jnp.eye(inputs.shape[0], dtype=correlation.dtype)
    correlation = jnp.where(counts[:, None] & counts[None, :], correlation, identity)
    # A correlation matrix has no negative eigenvalues; rounding has.
    eigenvalues = jnp.maximum(jnp.linalg.eigvalsh(correlation), 0)
    return jnp.sum(~counts) * _spread(1.0) - jnp.sum(_spread(eigenvalues))


def _spread(eigenvalues: Any) -> Array:
    return jnp.log(eigenvalues + _RIDGE) + 1 / (eigenvalues + _RIDGE)


def search_policies(
    key: Array,
    model: Model,
    params: Params,
    inputs: Array,
    labels: Array,
    *,
    num_candidates: int = 1600,
    num_transforms: int = 3,
    threshold: float = -85.0,
    num_images: int = 5,
    num_accuracy_images: int = 100,
    num_runs: int = 10,
    initial_params: Params | None = None,
    input_range: tuple[Bound, Bound] = (0.0, 1.0),
    crop_padding: int = 4,
    flip: bool = True,
    fill: float = FILL,
) -> Candidates:
    """Score random policies and sort them (ATS; Gao et al. 2021).

    Every candidate is scored on the same images, with the same random numbers, crop and flip
    included. Host code: one program is compiled, and candidates differ by their indices alone.

    Choices where the paper says nothing: images are drawn at random without replacement, anew for
    every run of S_acc (the released code takes fixed ones), and an index is -1 to 49 (it also draws
    50, which does not exist).

    S_pri falls the farther `T(x)` lies from the noise, whose mean is grey. Translations into grey come
    nearer to it, and untrained networks score the published policies less safe than no
    transformation; translations into black (`fill=0.0`, as released) score safer.

    Args:
      key: PRNG key.
      model: the model.
      params: its parameters, for S_pri; the paper trains them on a tenth of the data.
      inputs: `[N, H, W, C]`, the images to draw from.
      labels: `[N]` classes.
      num_candidates: policies drawn.
      num_transforms: transformations in each, none among them.
      threshold: least S_acc of what is accepted. -85 was set for CIFAR-100; see `accuracy_score`.
      num_images: images that S_pri is the mean over.
      num_accuracy_images: images of one run of S_acc, of which the first of every class counts.
      num_runs: runs that S_acc is the mean over.
      initial_params: parameters for S_acc: untrained ones in the released code; `params` where `None`.
      input_range: lowest and highest value of an input, each one number or one per channel.
      crop_padding: as in `ats`.
      flip: as in `ats`.
      fill: as in `ats`.

    Returns:
      The candidates, those accepted first, then by S_pri. `ats(policy_text(found.policies[0]))` is
      the best.

    Raises:
      ValueError: a count below one, or more images asked for than there are.
    """
    check_range(input_range)
    size = inputs.shape[0]
    _check_counts(
        size,
        num_candidates=num_candidates,
        num_transforms=num_transforms,
        num_images=num_images,
        num_accuracy_images=num_accuracy_images,
        num_runs=num_runs,
    )
    initial_params = params if initial_params is None else initial_params
    draw_key, privacy_key, accuracy_key, score_key = jax.random.split(key, 4)
    shape = (num_candidates, num_transforms)
    policies = jax.random.randint(draw_key, shape, -1, len(POOL))
    victims = jax.random.choice(privacy_key, size, (num_images,), replace=False)
    runs = jnp.stack(
        [
            jax.random.choice(one, size, (num_accuracy_images,), replace=False)
            for one in jax.random.split(accuracy_key, num_runs)
        ]
    )
    transforms = functools.partial(
        augment, input_range=input_range, crop_padding=crop_padding, flip=flip, fill=fill
    )

    @jax.jit
    def score(policies, params, initial_params, inputs, labels):
        def both(policy):
            transform = functools.partial(transforms, policy=policy)
            images, classes = inputs[victims], labels[victims]
            privacy = privacy_score(
                model, params, images, classes, transform, score_key, input_range=input_range
            )
            accuracy = _mean_accuracy(
                model, initial_params, inputs, labels, runs, transform, score_key
            )
            return privacy, accuracy

        return jax.lax.map(both, policies)

    inputs, labels = jnp.asarray(inputs), jnp.asarray(labels)
    privacy, accuracy = score(policies, params, initial_params, inputs, labels)
    accepted = accuracy >= threshold
    order = jnp.lexsort((privacy, ~accepted))
    return Candidates(policies[order], privacy[order], accuracy[order], accepted[order])


def _mean_accuracy(
    model: Model,
    params: Params,
    inputs: Array,
    labels: Array,
    runs: Array,
    transform: Transform,
    key: Array,
) -> Array:
    """S_acc, the mean over runs; `runs [R, B]` are indices of the images of each."""

    def run(chosen, key):
        return accuracy_score(model, params, inputs[chosen], labels[chosen], transform, key)

    return jnp.mean(jax.vmap(run)(runs, jax.random.split(key, len(runs))))


def _check_counts(size: int, **counts: int) -> None:
    for name, value in counts.items():
        check_count(name, value, 1)
    for name in ("num_images", "num_accuracy_images"):
        if counts[name] > size:
            raise ValueError(f"{name} is {counts[name]}, but there are {size} images.")
