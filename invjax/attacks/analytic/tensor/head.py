"""Features, labels and spans behind the last two dense layers of a classifier."""

import math
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp

from invjax.attacks.analytic.tensor import core
from invjax.attacks.analytic.tensor.hermite import ACTIVATIONS, is_homogeneous, leading_order
from invjax.attacks.analytic.tensor.moments import Estimator, Problem, gap_after, row_space
from invjax.attacks.analytic.tensor.polish import Candidate
from invjax.base import Array, Layer, Model, Params, PyTree
from invjax.checks import check_choice, check_count, check_number
from invjax.models.layers import layers_of


class HeadFeatures(NamedTuple):
    """What the gradient of a dense head tells of a batch, in an order of its own.

    Attributes:
      features: `[B, d]`, the inputs of the last layer but one. With a bias in that layer they come with
        sign and norm; without one the norm is fitted, and for ReLU guessed.
      labels: `[B]` classes.
      residual: `[B]`, how unreliable: the norm of the gradient that all samples leave unexplained over
        that of the sample's own part; or, where it is larger, the error of the fitted input over its
        norm, to first order, were an error all that is unexplained. With a noise level three standard
        errors over the norm, and more where more is unexplained than noise. Times the own part over the
        gradient, where that is larger: such parts cancel. 1e-15 where the polish succeeded without a
        defence. Infinite where the transmitted entries are fewer than twice the unknowns, and where the
        sign, and so the label, is a guess: two classes, an odd activation and no bias in that layer.
      subspace: `[B, d]`, orthonormal rows; the features lie in their span, exactly so without a defence.
      signals: `[B, C]`, derivatives of each sample's part of the loss by the logits.
      objective: relative norm of the unexplained gradient.
      gap: singular value `B + 1` over `B` of the hidden layer's gradient; near 1 the batch size or the
        span is in doubt, and 1 where there are no `B` values.
    """

    features: Array
    labels: Array
    residual: Array
    subspace: Array
    signals: Array
    objective: Array
    gap: Array


def head_layers(model: Model, tree: PyTree) -> tuple[Layer, Layer]:
    """The last two layers of a chain, both dense.

    Args:
      model: a model with a layer view.
      tree: parameters or a gradient.

    Returns:
      The hidden layer and the output layer.

    Raises:
      ValueError: no layer view, other layers, an activation on the output, or a hidden activation
        whose gradient reveals only sums.
    """
    layers = (layers_of(model, tree) if model.head is None else model.head.layers(tree))[-2:]
    if [layer.kind for layer in layers] != ["dense", "dense"]:
        raise ValueError(
            f"The model {model.name} must end in two dense layers, "
            f"got {[layer.kind for layer in layers]}."
        )
    hidden, output = layers
    if output.activation != "identity":
        raise ValueError(
            f"The model {model.name} must have no activation on its output, got {output.activation}."
        )
    check_choice(f"The hidden activation of {model.name}", hidden.activation, tuple(ACTIVATIONS))
    leading_order(hidden.activation)
    return hidden, output


def _weight(layer: Layer) -> Array:
    assert layer.weight is not None
    return layer.weight


def _rows(hidden: Layer) -> Array:
    """Weights unit by unit, with that of the constant input last."""
    weight = _weight(hidden)
    if hidden.bias is None:
        return weight.T
    return jnp.concatenate([weight.T, hidden.bias[:, None]], axis=1)


def head_problem(model: Model, params: Params, gradient: PyTree) -> Problem:
    """The last two layers as the attack sees them; a hidden bias becomes one more input, constantly 1.

    Zeros of the gradient count as not transmitted, but for ReLU, where they are common by nature.

    Args:
      model: a model with a layer view that ends in two dense layers.
      params: its parameters.
      gradient: a tree like it.

    Returns:
      The problem; `n` is `d`, or `d + 1` with a bias.

    Raises:
      ValueError: as `head_layers`.
    """
    hidden, output = head_layers(model, params)
    hidden_gradient, output_gradient = head_layers(model, gradient)

    def sent(values: Array) -> Array:
        present = jnp.isfinite(values) if hidden.activation == "relu" else values != 0
        return present.astype(values.dtype)

    seen, outer_seen = _rows(hidden_gradient), _weight(output_gradient)
    return Problem(
        weight=_rows(hidden),
        outer=_weight(output),
        weight_gradient=seen,
        outer_gradient=outer_seen,
        weight_seen=sent(seen),
        outer_seen=sent(outer_seen),
    )


def scaled_inputs(hidden: Layer, candidate: Candidate) -> Candidate:
    """Inputs without the constant one, which fixes the scale that a homogeneous activation hides."""
    if hidden.bias is None:
        return candidate
    inputs, last = candidate.inputs[:, :-1], candidate.inputs[:, -1:]
    if not is_homogeneous(hidden.activation):
        return Candidate(inputs, candidate.signals)
    norm = jnp.linalg.norm(inputs, axis=1, keepdims=True)
    scale = jnp.where(last > 1e-4 * norm, last, 1.0)
    return Candidate(inputs / scale, candidate.signals * scale)


def head_features(
    model: Model,
    params: Params,
    gradient: PyTree,
    batch_size: int,
    *,
    key: Array,
    estimator: Estimator | None = None,
    polish: bool = True,
    restarts: int = 4,
    max_steps: int = 100,
    noise_std: float | None = None,
) -> HeadFeatures:
    """Recover the inputs of the last two dense layers from their gradient, and the labels.

    The tensor method of Wang et al. 2023 for softmax cross-entropy at a random initialisation: the
    Hermite coefficients of the outer gradient's rows are `sum_i p_ic c_3 z_i z_i z_i` (four indices for
    c3 = 0), decomposed with one symmetric factor. `p_i = softmax - onehot` has one negative entry: it
    fixes the sign and is the label. No class rows are planted and the weights may have any scale, normal
    or uniform; the layers in front are not looked at.

    Pure; `jit` and `vmap` apply with `model`, `batch_size` and the settings closed over. Runs in the
    gradient's dtype.

    Args:
      model: a chain model that ends in two dense layers, of any activation of `hermite.ACTIVATIONS`
        between them that is neither linear nor quadratic; at least 2 classes.
      params: its parameters.
      gradient: the observed gradient of the mean loss, a tree like `params`; of any scale.
      batch_size: samples behind it, at most the hidden units and the width of the features (with a bias
        in the hidden layer one more).
      key: PRNG key.
      estimator: `outer` or `weights`, which layer's gradient the tensor is taken from; `outer` where
        `None`.
      polish: whether to fit the gradient by Levenberg-Marquardt afterwards.
      restarts: starts of the fit where some entries of the gradient are zero and so not transmitted
        (pruning, dropout of entries); 0 ignores that there are any.
      max_steps: of one fit.
      noise_std: standard deviation of noise on every entry; the fit is then one of maximum likelihood,
        in all coordinates.

    Returns:
      Features, labels, reliabilities and the span.

    Raises:
      ValueError: a model, batch size or estimator that will not do, a number out of range.
    """
    check_fit(restarts, max_steps, noise_std)
    hidden, _ = head_layers(model, params)
    if model.num_classes < 2:
        raise ValueError(f"The model {model.name} must have softmax logits, got a single logit.")
    problem = head_problem(model, params, gradient)
    estimator = estimator or "outer"
    check_choice("estimator", estimator, get_args(Estimator))
    check_size(batch_size, problem, hidden.activation, estimator)
    settings = core.Settings(
        activation=hidden.activation,
        method="regression",
        estimator=estimator,
        norm=None,
        polish=polish,
        noise_std=noise_std,
        restarts=restarts,
        max_steps=max_steps,
        constant=hidden.bias is not None,
    )
    with jax.default_matmul_precision("highest"):
        found = core.recover(key, problem, batch_size, settings)
    candidate = scaled_inputs(hidden, found.candidate)
    return HeadFeatures(
        features=candidate.inputs,
        labels=jnp.argmin(candidate.signals, axis=1),
        residual=found.residual,
        subspace=head_span(model, gradient, batch_size)[0],
        signals=candidate.signals,
        objective=found.objective,
        gap=found.gap,
    )


def head_span(model: Model, gradient: PyTree, batch_size: int) -> tuple[Array, Array]:
    """The span of the features, `[B, d]`, and its gap; see `HeadFeatures`."""
    hidden, _ = head_layers(model, gradient)
    with jax.default_matmul_precision("highest"):
        span, _ = row_space(_weight(hidden).T, batch_size)
        _, values = row_space(_rows(hidden), batch_size)
    return span.T, gap_after(values, batch_size)


def check_fit(restarts: int, max_steps: int, noise_std: float | None) -> None:
    """Refuse settings of the fit that are out of range."""
    check_count("restarts", restarts, 0)
    check_count("max_steps", max_steps, 1)
    if noise_std is not None:
        check_number("noise_std", noise_std, 0.0, open_low=True)


def check_size(
    batch_size: int, problem: Problem, activation: str, estimator: Estimator | None
) -> None:
    """Refuse a batch that cannot be told apart in the span of its inputs.

    Args:
      batch_size: samples.
      problem: the layers.
      activation: of the hidden layer.
      estimator: of the regression; `None` where there is none.

    Raises:
      ValueError: no samples, more than the layers have inputs or units, or more coefficients of the
        regression than units to fit them to.
    """
    most = min(problem.weight.shape)
    if not 1 <= batch_size <= most:
        raise ValueError(f"batch_size must lie in [1, {most}] for these layers, got {batch_size}.")
    if estimator is None:
        return
    units, classes = problem.outer.shape
    degree = max(leading_order(activation), 3) if estimator == "outer" else 3
    times = 1 if estimator == "outer" else classes
    needed = times * math.comb(batch_size + degree, degree)
    if needed > units:
        raise ValueError(
            f"{batch_size} samples and the activation {activation} take {needed} coefficients (Hermite "
            f"products up to degree {degree}), more than the {units} hidden units they are fitted to: "
            "a smaller batch_size or a wider layer is needed."
        )
