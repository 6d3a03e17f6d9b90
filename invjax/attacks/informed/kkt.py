"""Training samples from nothing but a trained network's weights (Haim et al. 2022, Buzaglo et al. 2023).

Training to a small loss brings the weights near a stationary point of a problem in which they are a
combination of the training samples' derivatives, `theta = sum_i l_i dPhi(x_i) / dtheta`; the attack
solves that for samples and multipliers. The three variants differ in what is combined:

* `binary`: `l_i y_i dPhi(x_i)`, `l_i >= 0`, of one logit: the margin problem that a homogeneous network
  without weight decay converges to (Haim et al. 2022);
* `multiclass`: `l_i d(Phi_y - max_{j != y} Phi_j)(x_i)`, `l_i >= 0`, the same of several logits
  (Buzaglo et al. 2023);
* `decay`: `sum_k l_ik dPhi_k(x_i)` of any sign, for any loss with weight decay, where it is exact at
  every stationary point with `l_ik = -(d loss_i / d Phi_k) / (n wd)` (Buzaglo et al. 2023).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from scipy import optimize

from invjax import gradients
from invjax.attacks.matching.priors import input_bounds
from invjax.base import Array, Attack, Batch, Model, Observation, Params, PyTree, Reconstruction
from invjax.checks import check_choice, check_count, check_number
from invjax.models.chain import activations
from invjax.models.layers import apply_layer
from invjax.models.losses import cross_entropy
from invjax.observe import check_params

Variant = Literal["binary", "multiclass", "decay"]
Apply = Callable[[Params, Array], Array]


class State(NamedTuple):
    """Where the attack is.

    Attributes:
      variables: `inputs [m, ...]` and `multipliers [m]` (`[m, K]` of `decay`), `m` times the real ones.
      optimizer: its state.
      labels: `[m]` classes that are held fixed.
      value: the loss at the variables before the last step.
    """

    variables: dict[str, Array]
    optimizer: Any
    labels: Array
    value: Array


def modified_relu(alpha: float) -> Callable[[Array], Array]:
    """ReLU whose derivative is `sigmoid(alpha z)`, so that it has a second one (Haim et al. 2022).

    Args:
      alpha: how steep, positive; the larger, the closer to ReLU's own derivative.

    Returns:
      The activation; its values are ReLU's.

    Raises:
      ValueError: `alpha` is not positive and finite.
    """
    check_number("alpha", alpha, 0.0, open_low=True, open_high=True)

    @jax.custom_jvp
    def activation(values):
        return jax.nn.relu(values)

    @activation.defjvp
    def _(primals, tangents):
        (values,), (direction,) = primals, tangents
        return activation(values), jax.nn.sigmoid(alpha * values) * direction

    return activation


def smoothed(model: Model, alpha: float) -> Apply:
    """A chain model's logits with `modified_relu` for every ReLU.

    Args:
      model: a model with a layer view.
      alpha: of the modified ReLU.

    Returns:
      `apply(params, inputs) -> logits`, equal to the model's; its derivatives differ.

    Raises:
      ValueError: a model without a layer view.
    """
    if model.layers is None:
        raise ValueError(
            f"The model {model.name} has no layer view to find its ReLUs with: alpha must be None."
        )
    relu = modified_relu(alpha)
    layers = model.layers

    def apply(params, inputs):
        values = inputs
        for layer in layers(params):
            values = apply_layer(layer._replace(activation="identity"), values)
            values = relu(values) if layer.activation == "relu" else _activate(layer, values)
        return values

    return apply


def _activate(layer, values: Array) -> Array:
    return activations[layer.activation](values)


def combination(
    apply: Apply,
    params: Params,
    inputs: Array,
    labels: Array,
    multipliers: Array,
    variant: Variant = "binary",
) -> Params:
    """The samples' derivatives, combined: what the weights are at a stationary point.

    Args:
      apply: `apply(params, inputs) -> logits [m, K]`.
      params: the weights.
      inputs: `[m, ...]`.
      labels: `[m]` classes; not read by `decay`.
      multipliers: `[m]`, of `decay` `[m, K]`.
      variant: what is combined.

    Returns:
      A tree like `params`, differentiable in the inputs and the multipliers.
    """
    logits = jax.lax.stop_gradient(apply(params, inputs))
    if variant == "decay":
        weights = multipliers
    elif variant == "binary":
        weights = (multipliers * (2 * labels - 1))[:, None]
    else:
        right = jax.nn.one_hot(labels, logits.shape[1], dtype=logits.dtype)
        other = jnp.argmax(jnp.where(right > 0, -jnp.inf, logits), axis=1)
        apart = right - jax.nn.one_hot(other, logits.shape[1], dtype=logits.dtype)
        weights = multipliers[:, None] * apart

    def weighted(params, data):
        inputs, weights = data
        return jnp.sum(weights * apply(params, inputs))

    return gradients.gradient_oracle(weighted)(params, (inputs, weights))


def decay_multipliers(
    model: Model,
    params: Params,
    batch: Batch,
    weight_decay: float,
    loss: Callable[[Apply], Callable[[Params, Batch], Array]] = cross_entropy,
) -> Array:
    """The multipliers of known samples in the variant `decay`: `-(d loss_i / d Phi) / (n wd)`.

    With them, at any weights and not only at the optimum, `params` minus the `combination` is the
    gradient of `loss + wd |params|^2 / 2` over `wd`.

    Args:
      model: the model.
      params: its weights.
      batch: all `n` training samples.
      weight_decay: `wd`, positive.
      loss: `loss(apply) -> (loss(params, batch) -> scalar)`, a mean over samples.

    Returns:
      `[n, K]`; of one logit and cross-entropy it is `y_i sigmoid(-y_i Phi_i) / (n wd)`.

    Raises:
      ValueError: `weight_decay` is not positive.
    """
    check_number("weight_decay", weight_decay, 0.0, open_low=True)
    logits = model.apply(params, batch.inputs)
    of_offset = loss(lambda offset, inputs: logits + offset)
    return -jax.grad(of_offset)(jnp.zeros_like(logits), batch) / weight_decay


def fit_multipliers(
    model: Model, params: Params, batch: Batch, variant: Variant = "binary"
) -> tuple[np.ndarray, float]:
    """The multipliers that explain the weights best by known samples. Host code, in float64.

    Non-negative least squares, or plain ones of `decay`. The residual says how far the weights are
    from a stationary point: that of ReLU networks stalls, because their optimum lies on kinks.

    Args:
      model: the model.
      params: its weights.
      batch: the training samples.
      variant: what is combined.

    Returns:
      Multipliers `[n]` (`[n, K]` of `decay`), and the residual's norm relative to the weights'.

    Raises:
      ValueError: an unknown variant, or one that does not fit the model.
    """
    _check_variant(model, variant)
    shape = (len(batch.labels),) + ((model.num_classes,) if variant == "decay" else ())

    def column(multipliers):
        one = combination(
            model.apply, params, batch.inputs, batch.labels, multipliers.reshape(shape), variant
        )
        return _flat(one)

    units = jnp.eye(math.prod(shape), dtype=jax.tree.leaves(params)[0].dtype)
    matrix = np.asarray(jax.lax.map(column, units), np.float64).T
    target = np.asarray(_flat(params), np.float64)
    if variant == "decay":
        found = np.linalg.lstsq(matrix, target)[0]
    else:
        found = optimize.nnls(matrix, target)[0]
    residual = np.linalg.norm(matrix @ found - target) / np.linalg.norm(target)
    return found.reshape(shape), float(residual)


def kkt(
    model: Model,
    *,
    num_images: int,
    variant: Variant = "binary",
    num_steps: int = 50_000,
    optimizer: Literal["sgd", "adam"] = "sgd",
    learning_rate: float = 0.0305,
    multiplier_rate: float = 1e-4,
    scale: float = 0.035,
    least_multiplier: float = 0.447,
    alpha: float | None = 149.9,
) -> Attack:
    """Reconstruct training samples from trained weights (Haim et al. 2022; Buzaglo et al. 2023).

    With `m` images and multipliers it minimises::

        |theta - (1/m) combination|^2
            + sum relu(x - high)^2 + relu(low - x)^2 + 5 sum relu(l_min - l)^2

    over both, without the last term in the variant `decay`. The number of training samples is not
    known: `m` is published as twice it. The published numbers are a random search's, a setting for
    each network; the defaults are the first for MNIST. The minimum is not unique (a network that is
    narrow, or was trained from a tiny start, fits wrong images as well), so results go through
    `kkt_scoring.score` with unseen images beside them.

    Args:
      model: the model; homogeneous in theory (biases in the first layer only).
      num_images: `m`.
      variant: what the weights are a combination of.
      num_steps: steps.
      optimizer: `sgd` with momentum 0.9 as published, or `adam`.
      learning_rate: of the images.
      multiplier_rate: of the multipliers.
      scale: deviation of the normal start of the images, input units.
      least_multiplier: `l_min`.
      alpha: of `modified_relu`, which needs the model's layer view; `None` takes the model as it is.

    Returns:
      The attack, of observations whose `params` are the released weights and whose
      `facts.input_range` is the box. Labels are those granted, else dealt evenly; of `decay`, which
      uses none, the classes that the network says. `diagnostics` holds `multipliers`, those of the
      sum, and `loss`.

    Raises:
      ValueError: a setting out of range, a variant that does not fit the model, or at its use
        weights that do not.
    """
    _check_variant(model, variant)
    check_count("num_images", num_images, 1)
    check_count("num_steps", num_steps, 1)
    check_choice("optimizer", optimizer, ("sgd", "adam"))
    check_number("learning_rate", learning_rate, 0.0)
    check_number("multiplier_rate", multiplier_rate, 0.0)
    check_number("scale", scale, 0.0, open_low=True)
    settings = _Settings(
        model=model,
        apply=model.apply if alpha is None else smoothed(model, alpha),
        variant=variant,
        num_images=num_images,
        transform=_transform(optimizer, inputs=learning_rate, multipliers=multiplier_rate),
        scale=scale,
        least_multiplier=least_multiplier,
    )
    return Attack(
        functools.partial(_init, settings),
        functools.partial(_step, settings),
        functools.partial(_result, settings),
        num_steps,
        objective=lambda state: state.value,
        check=functools.partial(_check, settings),
    )


class _Settings(NamedTuple):
    """The settings of `kkt`, for its parts."""

    model: Model
    apply: Apply
    variant: Variant
    num_images: int
    transform: optax.GradientTransformation
    scale: float
    least_multiplier: float


def _transform(optimizer: str, **rates: float) -> optax.GradientTransformation:
    """The optimizer, with a rate for every variable."""
    make = optax.adam if optimizer == "adam" else functools.partial(optax.sgd, momentum=0.9)
    return optax.partition(
        {name: make(rate) for name, rate in rates.items()}, {name: name for name in rates}
    )


def _check(settings: _Settings, observation: Observation) -> None:
    check_params(settings.model, observation.params, observation.facts.input_shape)
    if observation.labels is not None and observation.labels.shape != (settings.num_images,):
        raise ValueError(
            f"The observation's labels must be of {settings.num_images} images, got "
            f"{observation.labels.shape}."
        )


def _loss(settings: _Settings, variables, labels: Array, observation: Observation) -> Array:
    inputs, multipliers = variables["inputs"], variables["multipliers"]
    params, shares = observation.params, multipliers / settings.num_images
    found = combination(settings.apply, params, inputs, labels, shares, settings.variant)
    value = optax.tree.norm(optax.tree.sub(params, found), squared=True)
    low, high = input_bounds(observation, inputs.dtype, inputs.ndim)
    outside = jax.nn.relu(inputs - high) + jax.nn.relu(low - inputs)
    value += jnp.sum(jnp.square(outside))
    if settings.variant == "decay":
        return value
    return value + 5 * jnp.sum(jnp.square(jax.nn.relu(settings.least_multiplier - multipliers)))


def _init(settings: _Settings, key: Array, observation: Observation) -> State:
    inputs_key, multipliers_key = jax.random.split(key)
    dtype = jax.tree.leaves(observation.params)[0].dtype
    shape = (settings.num_images, *observation.facts.input_shape)
    if settings.variant == "decay":
        size = (settings.num_images, settings.model.num_classes)
        multipliers = jax.random.normal(multipliers_key, size, dtype)
    else:
        multipliers = jax.random.uniform(multipliers_key, (settings.num_images,), dtype)
    inputs = settings.scale * jax.random.normal(inputs_key, shape, dtype)
    variables = {"inputs": inputs, "multipliers": multipliers}
    labels = observation.labels
    if labels is None:
        labels = jnp.arange(settings.num_images) % max(settings.model.num_classes, 2)
    value = _loss(settings, variables, labels, observation)
    return State(variables, settings.transform.init(variables), labels, value)


def _step(settings: _Settings, observation: Observation, state: State) -> State:
    loss = functools.partial(_loss, settings)
    value, slope = jax.value_and_grad(loss)(state.variables, state.labels, observation)
    updates, inner = settings.transform.update(slope, state.optimizer, state.variables)
    variables: Any = optax.apply_updates(state.variables, updates)
    return State(variables, inner, state.labels, value)


def _result(settings: _Settings, observation: Observation, state: State) -> Reconstruction:
    inputs, labels = state.variables["inputs"], state.labels
    value = _loss(settings, state.variables, labels, observation)
    if settings.variant == "decay":
        logits = settings.model.apply(observation.params, inputs)
        single = settings.model.num_classes == 1
        labels = (logits[:, 0] > 0).astype(int) if single else logits.argmax(1)
    finite = jnp.isfinite(inputs).all(axis=tuple(range(1, inputs.ndim)))
    return Reconstruction(
        inputs=inputs,
        labels=labels,
        found=finite & jnp.isfinite(value),
        objective=value,
        diagnostics={
            "multipliers": state.variables["multipliers"] / settings.num_images,
            "loss": value,
        },
    )


def _check_variant(model: Model, variant: str) -> None:
    check_choice("variant", variant, get_args(Variant))
    one = model.num_classes == 1
    if (variant == "binary" and not one) or (variant == "multiclass" and one):
        needs = "a single logit" if variant == "binary" else "several logits"
        raise ValueError(
            f"variant={variant!r} needs {needs}, the model {model.name} has {model.num_classes}."
        )


def _flat(tree: PyTree) -> Array:
    return ravel_pytree(tree)[0]
