"""The types that everything else speaks: NamedTuples of arrays, or of functions.

    private batch x ──G──▶ gradient ──D──▶ observation y ──A──▶ reconstruction x̂

Records (`Batch`, `Observation`, `Reconstruction`) hold arrays and may carry leading batch axes
through `vmap`. Behaviours (`Model`, `Attack`, `Defense`) hold functions and are closed over.
`Facts` is static: it decides shapes, so it lives in the tree structure and not among the leaves.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import optax

from invjax.checks import check_key

Array = jax.Array
PyTree = Any
Params = PyTree
Bound = float | tuple[float, ...]


class Batch(NamedTuple):
    """Private samples.

    Attributes:
      inputs: `[B, ...]` floats, in the data set's input range.
      labels: `[B]` integer classes, or `[B, C]` class probabilities.
    """

    inputs: Array
    labels: Array


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalTraining:
    """The public facts of a federated round: what every client was told to run.

    Attributes:
      epochs: passes over the client's data.
      batch_size: samples in a local mini-batch.
      learning_rate: the client's step size (of plain SGD; other optimizers name themselves).
      num_samples: samples the client holds.
      optimizer: the client's optimizer, by name.

    Raises:
      ValueError: a count below 1, or a learning rate that is not positive and finite.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    num_samples: int
    optimizer: str = "sgd"

    def __post_init__(self):
        for name in ("epochs", "batch_size", "num_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(
                f"learning_rate must be positive and finite, got {self.learning_rate}."
            )

    @property
    def num_steps(self) -> int:
        """Local optimizer steps: epochs times mini-batches an epoch."""
        return self.epochs * -(-self.num_samples // self.batch_size)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """The public facts of an observation. Static: two observations with equal facts share one compilation.

    Attributes:
      input_shape: shape of one input, without the batch axis.
      num_classes: number of classes.
      batch_size: samples behind the gradient; `None` where the adversary is not told.
      input_range: lowest and highest value of an input, each one number or one per channel.
      local: the local training of a federated round; `None` for a plain gradient.
    """

    input_shape: tuple[int, ...]
    num_classes: int
    batch_size: int | None = None
    input_range: tuple[Bound, Bound] = (0.0, 1.0)
    local: LocalTraining | None = None


class Observation(NamedTuple):
    """Exactly what the adversary is granted, and nothing more.

    Attributes:
      params: the released parameters: those that the gradient was taken at, or, where `gradient`
        is `None`, the result of training (a released-weights observation).
      gradient: the defended gradient; for a federated round the update `start - end`.
      facts: public facts (shapes, range, batch size, local training).
      labels: `[B]` classes, where the threat model grants them.
      statistics: batch-norm statistics of the private batch, where granted; a list of
        `(mean, variance)` in the order of `Model.statistics`.
      public: the defence's public randomness, one entry a stage (a known mask, say).
      auxiliary: data the adversary owns besides (for an informed adversary: the rest of the
        training set).
      initial_params: where training started, for a released-weights observation that grants it.
    """

    params: Params
    gradient: PyTree | None
    facts: Facts
    labels: Array | None = None
    statistics: PyTree | None = None
    public: PyTree | None = None
    auxiliary: Batch | None = None
    initial_params: Params | None = None


class Reconstruction(NamedTuple):
    """What an attack returns.

    Attributes:
      inputs: `[B, ...]` reconstructed inputs.
      labels: `[B]` reconstructed classes.
      found: `[B]` booleans; false where the attack itself knows that it failed.
      objective: the attack's own objective at the result, lower is better; it never reads the truth.
      diagnostics: what the attack wants to say besides (a trace of the objective, a reason).
    """

    inputs: Array
    labels: Array
    found: Array
    objective: Array
    diagnostics: dict[str, Any]


class Layer(NamedTuple):
    """One layer of a chain model, as `Model.layers(tree)` lists it.

    `tree` may be parameters or a gradient: `weight` and `bias` are then that layer's part of it.

    Attributes:
      kind: `dense`, `conv`, `average_pool`, `max_pool`, `global_average_pool` or `flatten`.
      weight: `[in, out]` (dense), `[height, width, in, out]` (conv), or `None`.
      bias: `[out]` or `None`.
      activation: name of the nonlinearity after the layer; `identity` where there is none.
      strides: window strides (conv, pool).
      padding: `((low, high), (low, high))` (conv, pool).
      window: pooling window.
    """

    kind: str
    weight: Array | None = None
    bias: Array | None = None
    activation: str = "identity"
    strides: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    window: tuple[int, int] | None = None


class Head(NamedTuple):
    """The dense layers at a model's end, and what goes into them.

    Attributes:
      features: `features(params, inputs [B, ...]) -> [B, d]`, what goes into the first of them.
      layers: `layers(tree) -> tuple[Layer, ...]`, of parameters or a gradient, to the logits.
    """

    features: Callable[[Params, Array], Array]
    layers: Callable[[PyTree], tuple[Layer, ...]]


class Model(NamedTuple):
    """A classifier as pure functions over a parameter tree.

    Attributes:
      init: `init(key, input_shape) -> params`.
      apply: `apply(params, inputs [B, ...]) -> logits [B, C]`, evaluation mode.
      loss: `loss(params, batch) -> scalar`, the mean over the samples.
      num_classes: number of classes; 1 for a binary model with one logit.
      name: for tables and messages.
      layers: `layers(tree) -> tuple[Layer, ...]` where the model is a chain of layers, else `None`.
      statistics: `statistics(params, inputs) -> [(mean, variance), ...]` of the input of every
        batch-norm layer, else `None`.
      running_statistics: the stored `(mean, variance)` of the same layers, else `None`.
      with_convolution: `with_convolution(conv) -> Model`, the same model on another
        implementation of `lax.conv_general_dilated`; `None` where it cannot be swapped.
      head: the dense layers at its end and what goes into them; `None` where the model does not say.
    """

    init: Callable[[Array, Sequence[int]], Params]
    apply: Callable[[Params, Array], Array]
    loss: Callable[[Params, Batch], Array]
    num_classes: int
    name: str = "model"
    layers: Callable[[PyTree], tuple[Layer, ...]] | None = None
    statistics: Callable[[Params, Array], list[tuple[Array, Array]]] | None = None
    running_statistics: list[tuple[Array, Array]] | None = None
    with_convolution: Callable[[Callable[..., Array]], "Model"] | None = None
    head: Head | None = None


def check_model(model: Model) -> None:
    """Refuse what is no model.

    Args:
      model: what was given.

    Raises:
      TypeError: it is something else.
    """
    if not isinstance(model, Model):
        raise TypeError(
            f"model must be an invjax.Model, got {type(model).__name__}: invjax.models has some, and "
            "from_nnx(module, input_shape) and from_linen(module, input_shape) return (model, params)."
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Attack:
    """An estimator of the private batch from an observation, as three pure functions.

    A dataclass and no NamedTuple, because `jax.jit(attack)` needs a weak reference to it, which
    Python gives to no tuple.

    Attributes:
      init: `init(key, observation) -> state`.
      step: `step(observation, state) -> state`.
      result: `result(observation, state) -> Reconstruction`.
      num_steps: how many steps at most; 0 for a closed form, which does its work in `init`.
      done: `done(state) -> bool scalar`: nothing is left to gain; `None` where only `num_steps` ends it.
      objective: `objective(state) -> scalar`, for progress; `None` for a closed form.
      check: `check(observation)` raises a `ValueError` on what the attack cannot use; it looks at
        values where they are concrete and at shapes otherwise.
    """

    init: Callable[[Array, Observation], Any]
    step: Callable[[Observation, Any], Any]
    result: Callable[[Observation, Any], Reconstruction]
    num_steps: int = 0
    done: Callable[[Any], Array] | None = None
    objective: Callable[[Any], Array] | None = None
    check: Callable[[Observation], None] | None = None

    def __call__(self, key: Array, observation: Observation) -> Reconstruction:
        """Run the whole attack: pure and traceable, so `jit` and `vmap` apply.

        Args:
          key: a typed PRNG key.
          observation: what the adversary was granted.

        Returns:
          The reconstruction.

        Raises:
          ValueError: an observation that the attack cannot use.
          TypeError: a key that is none.
        """
        check_key(key)
        if self.check is not None:
            self.check(observation)
        return _run_attack(self, key, observation)


def closed_form(
    solve: Callable[[Array, Observation], Reconstruction],
    check: Callable[[Observation], None] | None = None,
) -> Attack:
    """An attack of no steps.

    Args:
      solve: `solve(key, observation) -> Reconstruction`, pure.
      check: as `Attack.check`.

    Returns:
      The attack.
    """
    return Attack(
        solve,
        step=lambda observation, state: state,
        result=lambda observation, state: state,
        check=check,
    )


@functools.partial(jax.jit, static_argnums=0)
def _run_attack(attack: Attack, key: Array, observation: Observation) -> Reconstruction:
    state = attack.init(key, observation)
    if not attack.num_steps:
        return attack.result(observation, state)

    def unfinished(carry):
        count, state = carry
        more = count < attack.num_steps
        return more if attack.done is None else more & ~attack.done(state)

    def advance(carry):
        count, state = carry
        return count + 1, attack.step(observation, state)

    _, state = jax.lax.while_loop(unfinished, advance, (0, state))
    return attack.result(observation, state)


Stage = Literal["inputs", "per_sample", "aggregate"]


class Defense(optax.GradientTransformationExtraArgs):
    """An optax gradient transformation that also knows its own channel.

    It is the plain two-tuple `(init, update)` and composes inside `optax.chain`. A defence of stage
    `per_sample` takes gradients with a leading sample axis and returns their aggregate; any other
    maps a gradient to a gradient. One that changes the batch, or computes something of it, does so
    in `prepare`, which comes before the gradient.

    Attributes:
      name: the constructor and its settings, for tables and messages.
      stage: where it acts first on a gradient: `per_sample` or `aggregate`.
      stages: the elementary stages (`invjax.defenses.base.Elementary`) that it chains, in order.
      init_with_key: `init_with_key(key, params) -> state`; `init` is the same with the default key,
        which follows from the name: whoever knows it can subtract the noise.
      with_key: `with_key(key)`, the same defence with a key of your own in `init`: what real training
        takes, `optax.chain(defense.with_key(secret), ...)`, another one for every client.
      prepare: `prepare(batch, state, params) -> (batch, state)`, the batch that the gradient is to
        be taken of. A defence that changes the batch or must see it refuses an update without.
      public: `public(state) -> tuple`, what the defence publishes of its randomness, an entry a stage.
      law: `law(observed, candidate, public) -> Law`: the law of the observation given a candidate
        gradient (per-sample where the stage says so).
      log_likelihood: `log_likelihood(observed, candidate, public) -> scalar`.
    """

    name: str
    stage: Stage
    stages: tuple
    init_with_key: Callable[[Array, Params], Any]
    with_key: Callable[[Array], "Defense"]
    prepare: Callable[[Batch, Any, Params], tuple[Batch, Any]]
    public: Callable[[Any], tuple]
    law: Callable[..., Any]
    log_likelihood: Callable[..., Array]

    def __new__(cls, init, update, **attributes):
        """Build the two-tuple and attach what an adversary may know of it."""
        self = super().__new__(cls, init, update)
        for name, value in attributes.items():
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        return self.name
