"""From data, model and defence to what the adversary sees."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from invjax import gradients
from invjax.base import (
    Array,
    Batch,
    Bound,
    Defense,
    Facts,
    LocalTraining,
    Model,
    Observation,
    Params,
    PyTree,
    check_model,
)
from invjax.checks import check_key, check_shapes
from invjax.defenses import chain
from invjax.ranges import check_range


def observe(
    key: Array,
    model: Model,
    params: Params,
    batch: Batch,
    defense: Defense | None = None,
    *,
    input_range: tuple[Bound, Bound] = (0.0, 1.0),
    local: LocalTraining | None = None,
    optimizer: optax.GradientTransformation | None = None,
    grant_labels: bool = False,
    grant_statistics: bool = False,
    grant_batch_size: bool = True,
) -> Observation:
    """What an honest-but-curious server sees of one client's batch.

    Args:
      key: PRNG key of everything random: the defence and, in a federated round, the sample order.
      model: the model.
      params: the parameters that the server sent.
      batch: inputs `[B, ...]`, labels `[B]` integers.
      defense: the client's defence; none by default.
      input_range: lowest and highest input value, public; one number or one per channel each. A
        warning says where it does not hold.
      local: the local training of a federated round; the observation is then the update
        `start - end`, and the defence acts on it (it must be of stage `aggregate`).
      optimizer: the client's optimizer in a federated round, which `local.optimizer` should name;
        SGD at the local rate by default.
      grant_labels: whether the adversary is told the labels, in the batch's order.
      grant_statistics: whether it is told the batch-norm statistics of the batch.
      grant_batch_size: whether it is told how many samples there are.

    Returns:
      The observation. It holds no private array but what was granted.

    Raises:
      ValueError: shapes that do not fit the model, labels out of range, inputs that are not finite, an
        input range that is none or has other channels, a per-sample defence on a federated update,
        another number of samples than `local` has, an optimizer without a federated round,
        statistics of a model without batch norm.
      TypeError: a key, model, batch or defence that is none, inputs that are not floats, labels that
        are not integers.

    Example:
      >>> import jax, invjax
      >>> key = jax.random.key(0)
      >>> batch = invjax.datasets.draw(key, invjax.datasets.digits(), 4)
      >>> model = invjax.models.mlp((16,))
      >>> params = model.init(key, (8, 8, 1))
      >>> defense = invjax.defenses.gaussian_noise(0.01)
      >>> observation = invjax.observe(key, model, params, batch, defense)
      >>> observation.facts.batch_size, observation.labels is None
      (4, True)
    """
    check_key(key)
    check_model(model)
    check_batch(model, batch)
    check_params(model, params, batch.inputs.shape[1:])
    _check_input_range(input_range, batch.inputs)
    defense = chain() if defense is None else defense
    if not isinstance(defense, Defense):
        raise TypeError(
            f"defense must be an invjax defence, got {defense!r}; of a text it is "
            "invjax.defenses.parse(text, model)."
        )
    if grant_statistics and model.statistics is None:
        raise ValueError(f"grant_statistics: the model {model.name} has no batch norm.")
    if local is not None and defense.stage == "per_sample":
        raise ValueError(
            f"{defense.name} acts on per-sample gradients; a federated update has none."
        )
    if local is None and optimizer is not None:
        raise ValueError("optimizer is that of a federated round: give local with it.")

    order_key, defense_key = jax.random.split(key)
    state = defense.init_with_key(defense_key, params)
    granted = batch.labels
    batch, state = defense.prepare(batch, state, params)
    if local is not None:
        private = gradients.federated_update(order_key, model, params, batch, local, optimizer)
    elif defense.stage == "per_sample":
        private = gradients.per_sample_gradients(model, params, batch)
    else:
        private = gradients.gradient(model, params, batch)

    observed, _ = defense.update(private, state, params)
    statistics = None
    if grant_statistics:
        assert model.statistics is not None
        statistics = model.statistics(params, batch.inputs)
    return Observation(
        params=params,
        gradient=observed,
        facts=Facts(
            input_shape=tuple(batch.inputs.shape[1:]),
            num_classes=model.num_classes,
            batch_size=batch.inputs.shape[0] if grant_batch_size else None,
            input_range=_plain(input_range),
            local=local,
        ),
        labels=jnp.asarray(granted) if grant_labels else None,
        statistics=statistics,
        public=defense.public(state),
    )


def prepared_batch(key: Array, params: Params, batch: Batch, defense: Defense) -> Batch:
    """The batch that `observe` takes the gradient of: what a defence on inputs made of the private one.

    The truth of an attack on such a defence is this batch as much as the private one: report both.

    Args:
      key: as given to `observe`.
      params: the parameters that the server sent.
      batch: the private batch.
      defense: the client's defence.

    Returns:
      The batch; labels may be `[B, C]` probabilities.
    """
    _, defense_key = jax.random.split(key)
    return defense.prepare(batch, defense.init_with_key(defense_key, params), params)[0]


def per_step_gradient(observation: Observation) -> PyTree:
    """The observation on the scale of one gradient.

    A federated update of `k` steps at rate `r` is read as `k r` times one gradient: the
    single-gradient approximation, exact for one step of plain SGD on all samples.

    Args:
      observation: an observation with a gradient.

    Returns:
      A tree like the parameters.
    """
    local = observation.facts.local
    if local is None:
        return observation.gradient
    scale = 1.0 / (local.num_steps * local.learning_rate)
    return jax.tree.map(lambda leaf: leaf * scale, observation.gradient)


def check_sgd(observation: Observation) -> None:
    """Refuse an update of another optimizer than plain SGD where a sum of gradients is read.

    Args:
      observation: what the adversary was granted.

    Raises:
      ValueError: local training by another optimizer, whose steps are no multiples of gradients.
    """
    local = observation.facts.local
    if local is not None and local.optimizer != "sgd":
        raise ValueError(
            "observation.facts.local.optimizer must be 'sgd', since this attack reads an update as a "
            f"sum of gradients, got {local.optimizer!r}."
        )


def check_batch(model: Model, batch: Batch) -> None:
    """Refuse a batch that cannot be this model's, with the reason.

    Args:
      model: the model.
      batch: inputs `[B, ...]`, labels `[B]` integers.

    Raises:
      ValueError: no samples, unequal lengths, labels out of range, inputs that are not finite.
      TypeError: no batch of arrays, labels that are not integers, inputs that are not floats.
    """
    if not isinstance(batch, Batch):
        raise TypeError(
            f"batch must be an invjax.Batch(inputs, labels), got {type(batch).__name__}."
        )
    for name, part in batch._asdict().items():
        if not hasattr(part, "shape"):
            raise TypeError(f"batch.{name} must be an array, got {type(part).__name__}.")
    inputs, labels = batch
    if jnp.ndim(inputs) < 2 or inputs.shape[0] == 0:
        raise ValueError(
            f"batch.inputs must be [B, ...] with B >= 1, got shape {jnp.shape(inputs)}."
        )
    if not jnp.issubdtype(inputs.dtype, jnp.floating):
        raise TypeError(
            f"batch.inputs must be floating point, got {inputs.dtype}; "
            "invjax.datasets.from_arrays scales bytes to [0, 1]."
        )
    if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        raise TypeError(f"batch.labels must be integers, got {jnp.result_type(labels)}.")
    if jnp.shape(labels) != (inputs.shape[0],):
        raise ValueError(
            f"batch.labels must have shape ({inputs.shape[0]},) to go with the inputs, "
            f"got {jnp.shape(labels)}. (A single sample has a batch axis too: [None].)"
        )
    if _traced(batch):
        return
    classes = max(model.num_classes, 2)
    # NumPy's own array, because under an enclosing trace JAX would trace even this.
    classes_seen = np.asarray(labels)
    low, high = int(classes_seen.min()), int(classes_seen.max())
    if low < 0 or high >= classes:
        raise ValueError(f"batch.labels must lie in [0, {classes - 1}], got [{low}, {high}].")
    if not np.isfinite(np.asarray(inputs)).all():
        raise ValueError("batch.inputs must be finite, got NaN or infinity.")


def _plain(input_range) -> tuple[Bound, Bound]:
    """Arrays have no hash, which what is static needs."""
    low, high = (
        float(bound) if np.ndim(bound) == 0 else tuple(map(float, bound)) for bound in input_range
    )
    return low, high


def _check_input_range(input_range: tuple[Bound, Bound], inputs: Array) -> None:
    check_range(input_range)
    channels = inputs.shape[-1]
    sizes = [np.size(bound) for bound in input_range]
    if not {*sizes} <= {1, channels}:
        raise ValueError(
            f"A bound of input_range must be one number or {channels}, one a channel of "
            f"batch.inputs, got bounds of {sizes} numbers."
        )
    if _traced(inputs):
        return
    values = np.asarray(inputs)
    low, high = (np.asarray(bound, float) for bound in input_range)
    eps = float(jnp.finfo(values.dtype).eps)
    rounding = 1e-4 * (high - low) + eps * np.maximum(np.abs(low), np.abs(high))
    if (values < low - rounding).any() or (values > high + rounding).any():
        warnings.warn(
            f"batch.inputs lie in [{values.min():.3g}, {values.max():.3g}], outside input_range "
            f"{input_range}: an attack that keeps to the range cannot find them. Of a data set it is "
            "dataset.input_range.",
            stacklevel=3,
        )


def check_params(model: Model, params: Params, input_shape: tuple[int, ...]) -> None:
    """Refuse parameters that the model cannot be applied with.

    Args:
      model: the model.
      params: a parameter tree.
      input_shape: shape of one input.

    Raises:
      ValueError: the tree, a shape, or the logits do not fit.
    """
    try:
        inputs = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
        logits = jax.eval_shape(model.apply, params, inputs)
    except Exception as error:
        raise ValueError(
            f"params do not fit the model {model.name} on inputs of shape {input_shape}: {error}"
        ) from error
    if logits.shape != (1, model.num_classes):
        raise ValueError(
            f"The model {model.name} must return logits [B, {model.num_classes}], "
            f"got {logits.shape} for one input."
        )


def check_observation(model: Model, observation: Observation) -> None:
    """Refuse an observation that an attack on gradients cannot use.

    Args:
      model: the model under attack.
      observation: what the adversary was granted.

    Raises:
      ValueError: no gradient, a tree or shape unlike the parameters', non-finite values.
    """
    if observation.gradient is None:
        raise ValueError(
            "The observation holds released weights and no gradient; this attack needs a gradient."
        )
    facts = observation.facts
    if facts.num_classes != model.num_classes:
        raise ValueError(
            f"The observation speaks of {facts.num_classes} classes, "
            f"the model {model.name} of {model.num_classes}."
        )
    check_shapes(
        "observation.gradient must have the tree and shapes of observation.params",
        observation.params,
        observation.gradient,
    )
    if _traced(observation):
        return
    check_params(model, observation.params, facts.input_shape)
    for path, leaf in jax.tree.leaves_with_path(observation.gradient):
        # NumPy, because under an enclosing trace JAX would trace even this.
        if not np.isfinite(np.asarray(leaf)).all():
            where = jax.tree_util.keystr(path)
            raise ValueError(f"observation.gradient{where} must be finite, got NaN or infinity.")


def _traced(tree: Any) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))
