"""The tensor attack on a network of two dense layers."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from invjax.attacks.analytic.tensor import core
from invjax.attacks.analytic.tensor.head import (
    check_fit,
    check_size,
    head_layers,
    head_problem,
    scaled_inputs,
)
from invjax.attacks.analytic.tensor.hermite import is_homogeneous, is_odd
from invjax.attacks.analytic.tensor.moments import Estimator
from invjax.base import (
    Array,
    Attack,
    Layer,
    Model,
    Observation,
    Params,
    Reconstruction,
    closed_form,
)
from invjax.checks import check_choice, check_count, check_number
from invjax.models.layers import layers_of
from invjax.observe import check_observation, check_sgd, per_step_gradient

Method = Literal["regression", "paper"]
Loss = Literal["squared", "cross_entropy"]


def tensor(
    model: Model,
    *,
    method: Method = "regression",
    estimator: Estimator | None = None,
    loss: Loss | None = None,
    batch_size: int | None = None,
    norm: float | None = None,
    polish: bool | None = None,
    noise_std: float | None = None,
    restarts: int = 4,
    max_steps: int = 100,
    contractions: int = 8,
    tolerance: float | None = None,
) -> Attack:
    """Read a batch off the gradient of two dense layers, provably (Wang, Lee and Lei 2023).

    At normal weights `w_j` the gradient is a noisy evaluation of `sum_i r_i f(w x_i)` at every unit,
    with the activation `f`. Its Hermite coefficients are tensors `sum_i r_i c_p x_i ... x_i`, for inputs of
    unit norm with `c_p = E[f^(p)(Z)]`, and their components are the inputs.

    `paper` is algorithm 1: moments of the gradient, of orders 2 and 3 (3 alone where the second vanishes,
    as for tanh; 2 and 4 where the third does, as for ReLU), the span by eigenvectors, the decomposition
    in the span, signs and labels by linear fits. Departures: Jennrich's method with 100 trials and
    alternating least squares in place of the joint diagonalisation of 100 random contractions; 8 vectors
    (`contractions`) in place of one where an order-3 tensor gives the span; the whole order-4 tensor in
    place of one contraction; a label is the output at the input that was found, less the residual (the
    paper takes the expected output, and prints the residual with the opposite sign).

    `regression` is a stronger form of it: the span is exact, being that of the rows of the first layer's
    gradient; least squares on all Hermite products up to degree 3 (4 for `outer` and a vanishing third
    order) take the place of moments; and a Levenberg-Marquardt fit of the gradient makes the result
    exact. For ReLU and leaky ReLU the fit leaves out units near their kink.

    Softmax models (the tensor of all rows of the output layer's gradient, one symmetric factor) need
    `regression`, and no planted weights: any random initialisation will do. Hidden biases are read as
    weights of a constant input.

    Defences. Clipping scales all signals, no input. Zeros of the gradient are taken for entries that
    were not transmitted (pruning, dropout), and the fit uses the others, in all coordinates, from several
    starts; units without any are dropped. (Not for ReLU, whose gradient has zeros by nature.) Updates of
    `K` local steps are divided by `K` and the rate. Labels of a model of one output are read off the
    signals' size: a defence that changes it, clipping or rescaled dropout, makes them meaningless.

    Args:
      model: a flattening at most and two dense layers; `two_layer`, or a classifier such as `mlp`.
      method: `regression` or `paper`.
      estimator: which gradient the tensor is taken from: `weights`, the hidden layer's (the smaller
        variance), or `outer`, the output layer's. `weights` for one output and `outer` for several
        where `None`.
      loss: of a model of one output: `squared`, half the squared error as in `two_layer` and meant
        where `None`, or `cross_entropy`, by a sigmoid. It turns signals into labels, so a wrong one
        gives wrong labels. Softmax is cross-entropy.
      batch_size: samples behind the gradient, where the observation does not say; see
        `batch_size_by_gap`.
      norm: Euclidean norm of all inputs, where it is known. Otherwise the orders decide; 1 for `paper`,
        and for ReLU with one output and no hidden bias, whose gradient hides it. With several outputs
        and no hidden bias ReLU hides it too; norms are then guessed, and `found` is not about them.
      polish: whether to fit; as published not for `paper`, else yes, where `None`.
      noise_std: standard deviation of noise on every entry of the (per-step) gradient; the fit is then
        maximum likelihood, in all coordinates. At the query point the entries of the hidden gradient
        are of the order of `1 / m`, and noise buries them and the span that they give: start the fit by
        `method="paper", estimator="outer", polish=True` then.
      restarts: further starts of the fit where the first does not end in an exact one; 0 also ignores
        zeros.
      max_steps: of one fit.
      contractions: random vectors by which `paper` contracts a third-order tensor for the span; the
        paper takes 1, and more need fewer units.
      tolerance: largest objective of what is `found`. By default 1e-6 in double and 1e-3 in single
        precision, 0.1 without a fit, and 1.1 with a noise level.

    Returns:
      The attack; a closed form, in the observation's dtype. The objective is the norm of the gradient that
      is left unexplained, a share, of what was transmitted; with a noise level the root mean square
      deviation in its units. `found` says that the objective is within the tolerance, that there are twice
      as many transmitted entries as unknowns, that the sample has a part in the gradient (a batch size too
      large leaves slots without), and with a noise level that three standard errors of the input, to first
      order, are below its norm, what is unexplained beyond noise counted in. With an odd activation and no
      hidden bias `(x, p)` and `(-x, -p)` have one gradient. Of more than two outputs the derivatives tell
      which it is. Of one, residuals are taken to be positive, as an output bias makes them (the bias
      trick), and nothing is `found` unless the outputs at `x` and `-x` are at least 1, so that no label in
      [-1, 1] could make them negative; with two classes, or cross-entropy of one output, signs and labels
      mean nothing and nothing is `found`. `diagnostics` holds `signals` (`[B, C]`, derivatives of each
      sample's part of the mean loss by the outputs), `targets` (`[B]`, real labels of a model of one
      output), `residual` (`[B]`, how unreliable; see `HeadFeatures`), `tensor_residual` and `gap` (of
      singular values, near 1 where the batch size is wrong).

    Raises:
      ValueError: `paper` or a loss for softmax, an unknown word, a number out of range; and at its use, a
        model of other layers, an activation whose gradient reveals only sums, no batch size, one larger
        than the layers allow, or one whose regression has more coefficients than there are hidden units.
    """
    scalar = model.num_classes == 1
    estimator = estimator or ("weights" if scalar else "outer")
    _check_words(model, method, loss, estimator)
    check_fit(restarts, max_steps, noise_std)
    check_count("contractions", contractions, 1)
    for name, value in (("norm", norm), ("tolerance", tolerance)):
        if value is not None:
            check_number(name, value, 0.0, open_low=True)
    paper = method == "paper"

    def check(observation: Observation) -> None:
        check_observation(model, observation)
        check_sgd(observation)
        _check_front(model, observation)
        problem = head_problem(model, observation.params, observation.gradient)
        hidden, _ = head_layers(model, observation.params)
        size = _size_of(observation, batch_size)
        check_size(size, problem, hidden.activation, None if paper else estimator)

    def init(key: Array, observation: Observation) -> Reconstruction:
        hidden, _ = head_layers(model, observation.params)
        hides = scalar and hidden.bias is None and is_homogeneous(hidden.activation)
        settings = core.Settings(
            activation=hidden.activation,
            method=method,
            estimator=estimator,
            norm=_with_constant(hidden, 1.0 if norm is None and (paper or hides) else norm),
            polish=not paper if polish is None else polish,
            noise_std=noise_std,
            restarts=restarts,
            max_steps=max_steps,
            contractions=contractions,
            constant=hidden.bias is not None,
        )
        size = _size_of(observation, batch_size)
        return _reconstruct(key, model, observation, size, settings, loss, tolerance)

    return closed_form(init, check)


def _check_words(model: Model, method: str, loss: str | None, estimator: str) -> None:
    check_choice("method", method, get_args(Method))
    scalar = model.num_classes == 1
    if loss is not None:
        check_choice("loss", loss, get_args(Loss))
        if not scalar:
            raise ValueError(f"loss is for models of one output, {model.name} has softmax logits.")
    if method == "paper" and not scalar:
        raise ValueError("method 'paper' is for models of one output: use 'regression'.")
    check_choice("estimator", estimator, get_args(Estimator))


def _check_front(model: Model, observation: Observation) -> None:
    """Refuse anything but a flattening in front of the last two layers."""
    front = layers_of(model, observation.params)[:-2]
    for layer in front:
        if layer.kind != "flatten" or layer.activation != "identity":
            raise ValueError(
                f"The model {model.name} must be two dense layers, got a layer {layer.kind} in "
                "front: head_features recovers the features behind those."
            )


def _size_of(observation: Observation, given: int | None) -> int:
    size = observation.facts.batch_size
    size = given if size is None else size
    if size is None:
        raise ValueError(
            "The observation does not say the batch size: give tensor batch_size=, by "
            "batch_size_by_gap of the first layer's gradient, say."
        )
    return size


def _with_constant(hidden: Layer, norm: float | None) -> float | None:
    if norm is not None and hidden.bias is not None:
        # The bias is the weight of one more input, constantly 1.
        return (norm**2 + 1) ** 0.5
    return norm


def _reconstruct(
    key: Array,
    model: Model,
    observation: Observation,
    size: int,
    settings: core.Settings,
    loss: Loss | None,
    tolerance: float | None,
) -> Reconstruction:
    """The samples, their labels, and whether they are found."""
    params = observation.params
    hidden, _ = head_layers(model, params)
    with jax.default_matmul_precision("highest"):
        problem = head_problem(model, params, per_step_gradient(observation))
        found = core.recover(key, problem, size, settings)
        candidate = scaled_inputs(hidden, found.candidate)
        inputs = candidate.inputs.reshape((size, *observation.facts.input_shape))
        labels, targets = _labels(model, params, loss, inputs, candidate.signals)
    limit = _limit(settings, tolerance, inputs.dtype)
    exact = (found.objective <= limit) & jnp.isfinite(inputs).all()
    # A sample without a part in the gradient is none.
    own = found.residual <= (3 * limit * size**0.5 if settings.noise_std is None else 1.0)
    if model.num_classes == 1 and hidden.bias is None and is_odd(hidden.activation):
        own &= _signs_are_tricked(model, params, loss, inputs)
    return Reconstruction(
        inputs=jnp.where(jnp.isfinite(inputs), inputs, 0.0),
        labels=labels,
        found=jnp.broadcast_to(exact & own, size),
        objective=found.objective,
        diagnostics={
            "signals": candidate.signals,
            "residual": found.residual,
            "tensor_residual": found.tensor_residual,
            "gap": found.gap,
            **targets,
        },
    )


def _labels(
    model: Model, params: Params, loss: Loss | None, inputs: Array, signals: Array
) -> tuple[Array, dict[str, Array]]:
    """Classes; and of a model of one output the real labels, its outputs less the residuals."""
    if model.num_classes != 1:
        return jnp.argmin(signals, axis=1), {}
    output = model.apply(params, inputs)[:, 0]
    output = jax.nn.sigmoid(output) if loss == "cross_entropy" else output
    targets = output - len(inputs) * signals[:, 0]
    middle = 0.5 if loss == "cross_entropy" else 0.0
    return (targets > middle).astype(int), {"targets": targets}


def _signs_are_tricked(model: Model, params: Params, loss: Loss | None, inputs: Array) -> Array:
    """Whether both the inputs and their negatives are answered by more than labels of up to 1."""
    if loss == "cross_entropy":
        return jnp.zeros(len(inputs), bool)
    return (model.apply(params, inputs)[:, 0] >= 1) & (model.apply(params, -inputs)[:, 0] >= 1)


def _limit(settings: core.Settings, tolerance: float | None, dtype) -> float:
    if tolerance is not None:
        return tolerance
    if settings.noise_std is not None:
        return 1.1
    if not settings.polish:
        return 0.1
    return 1e-6 if dtype == jnp.float64 else 1e-3
