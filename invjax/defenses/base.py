"""How defences are built and composed: elementary stages, and `chain`."""

import itertools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from invjax.base import Array, Batch, Defense, Params, PyTree, Stage
from invjax.checks import check_shapes
from invjax.defenses.law import Law, aggregate, log_likelihood
from invjax.gradients import mean_samples


class Elementary(NamedTuple):
    """One stage of a defence: the sampling side and the adversary's side of the same channel.

    Attributes:
      name: the constructor and its settings.
      stage: `inputs` stages change the batch and leave the gradient alone, `per_sample` stages map
        per-sample gradients to per-sample gradients, `aggregate` stages a gradient to a gradient.
      init: `init(key, params) -> state`.
      update: `update(gradients, state, count) -> (gradients, state)`; `count` is the number of
        samples behind an aggregated gradient where it is known, else 1.
      propagate: `propagate(law, observed, public) -> law`; `observed` is the observation where this
        stage's zeros (and values, see `reads_values`) can be read off it, else `None`.
      public: `public(state)`, the randomness that this stage publishes.
      prepare: `prepare(batch, state, params) -> (batch, state)`, before the gradient is taken; of
        any stage that changes the batch or needs to see it.
      keeps_zeros: a zero coordinate of the input is a zero of the output, and which others become
        zero does not depend on their values.
      reads_values: `propagate` reads more off the observation than where it is zero, the grid of a
        rounding for instance, which a mask or a factor behind it would hide.
    """

    name: str
    stage: Stage
    init: Callable[[Array, Params], Any]
    update: Callable[[PyTree, Any, int], tuple[PyTree, Any]]
    propagate: Callable[[Law, PyTree | None, Any], Law]
    public: Callable[[Any], Any] = lambda state: None
    prepare: Callable[[Batch, Any, Params], tuple[Batch, Any]] | None = None
    keeps_zeros: bool = False
    reads_values: bool = False


@jax.tree_util.register_pytree_with_keys_class
class Prepared(tuple):
    """The stages' states of a defence that has seen the batch: another tree, which `update` can tell.

    What keeps an old state beside the new one (`optax.apply_if_finite`) therefore goes behind the defence.
    """

    def tree_flatten_with_keys(self) -> tuple[tuple, None]:
        """The states with their places; nothing is static."""
        keys = jax.tree_util.SequenceKey
        return tuple((keys(place), state) for place, state in enumerate(self)), None

    @classmethod
    def tree_unflatten(cls, static: None, states: tuple) -> "Prepared":
        """From the states."""
        del static
        return cls(states)


ORDER: tuple[Stage, ...] = get_args(Stage)
ACTS_ON = {
    "inputs": "inputs",
    "per_sample": "per-sample gradients",
    "aggregate": "their aggregate",
}


def stateless(key: Array, params: Params) -> tuple:
    """The empty state, for stages without randomness.

    Args:
      key: not used.
      params: not used.

    Returns:
      The empty tuple.
    """
    del key, params
    return ()


def on_inputs(name: str, transform: Callable[[Array, Batch], Batch]) -> Elementary:
    """A stage that changes the batch, with a fresh key every time.

    Args:
      name: the constructor and its settings.
      transform: `transform(key, batch) -> batch`; labels may become `[B, C]` probabilities.

    Returns:
      The stage. Its state is a key; the likelihood knows nothing of it: it is of the changed batch.
    """

    def prepare(batch, state, params):
        del params
        now, later = jax.random.split(state)
        return transform(now, batch), later

    return nothing(name, "inputs")._replace(
        init=lambda key, params: jax.random.fold_in(key, 0), prepare=prepare
    )


def _unchanged(gradients: PyTree, state: Any, count: int) -> tuple[PyTree, Any]:
    del count
    return gradients, state


def nothing(name: str, stage: Stage) -> Elementary:
    """The stage that does nothing: what a defence of strength zero is, to its adversary too.

    Args:
      name: of the defence.
      stage: where it acts.

    Returns:
      The stage.
    """
    return Elementary(
        name,
        stage,
        stateless,
        update=_unchanged,
        propagate=lambda law, observed, public: law,
        keeps_zeros=True,
    )


def from_stages(*stages: Elementary, name: str | None = None, key: Array | None = None) -> Defense:
    """A defence from elementary stages.

    Args:
      *stages: in the order in which they act on the gradient.
      name: for tables; the stages' names joined by `,` otherwise.
      key: PRNG key of `init`; a fixed key derived from the name where `None`.

    Returns:
      The defence. Its `update` keeps every leaf's dtype, checks gradients against parameters where
      it is given these, and of stages with a `prepare` refuses a state that was not prepared.

    Raises:
      ValueError: a stage on inputs stands after one on gradients, or a per-sample stage after an
        aggregated one.
    """
    for before, after in itertools.pairwise(stages):
        if ORDER.index(before.stage) > ORDER.index(after.stage):
            raise ValueError(
                f"{after.name} acts on {ACTS_ON[after.stage]} and cannot follow {before.name}, "
                f"which acts on {ACTS_ON[before.stage]}: put it first."
            )
    name = ",".join(stage.name for stage in stages) if name is None else name
    per_sample = any(stage.stage == "per_sample" for stage in stages)
    sees_batch = [stage.name for stage in stages if stage.prepare is not None]

    def init_with_key(key: Array, params: Params) -> tuple:
        # Every stage draws from its own key; folding in also copies a key that may be donated.
        return tuple(
            stage.init(jax.random.fold_in(key, index), params) for index, stage in enumerate(stages)
        )

    def init(params: Params) -> tuple:
        default = jax.random.key(zlib.crc32(name.encode())) if key is None else key
        return init_with_key(default, params)

    def prepare(batch: Batch, state, params: Params):
        if not sees_batch:
            return batch, state
        new_state = list(state)
        for index, stage in enumerate(stages):
            if stage.prepare is not None:
                batch, new_state[index] = stage.prepare(batch, new_state[index], params)
        return batch, Prepared(tuple(new_state))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        if sees_batch and not isinstance(state, Prepared):
            raise ValueError(
                f"{', '.join(sees_batch)} must see the batch before every update: "
                "batch, state = defense.prepare(batch, state, params), and take the gradient of that batch. "
                "(In an optax.chain the state is that of its link.)"
            )
        dtypes = jax.tree.map(lambda leaf: leaf.dtype, updates)
        count = _leading_size(updates, name, params) if per_sample else 1
        if not per_sample and params is not None:
            check_shapes(f"{name} acts on a gradient of the parameters' shapes", params, updates)
        aggregated = not per_sample
        new_state = []
        for stage, stage_state in zip(stages, state, strict=True):
            if stage.stage == "aggregate" and not aggregated:
                updates, aggregated = mean_samples(updates), True
            updates, stage_state = stage.update(updates, stage_state, count)
            new_state.append(stage_state)
        updates = updates if aggregated else mean_samples(updates)
        # A strength may be wider than the gradient.
        updates = jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), updates, dtypes)
        return updates, tuple(new_state)

    def public(state) -> tuple:
        return tuple(stage.public(part) for stage, part in zip(stages, state, strict=True))

    def law(observed, candidate, public=None, slack=None) -> Law:
        slack = _default_slack(observed) if slack is None else slack
        # An adversary may assume a defence that the client did not use.
        published = (
            (None,) * len(stages) if public is None or len(public) != len(stages) else public
        )
        count = _leading_size(candidate, name) if per_sample else 1
        law = Law(location=candidate, count=count, slack=slack)
        aggregated = not per_sample
        for index, stage in enumerate(stages):
            if stage.stage == "aggregate" and not aggregated:
                law, aggregated = aggregate(law), True
            readable = _readable(stage, stages[index + 1 :])
            law = stage.propagate(law, observed if readable else None, published[index])
        return law if aggregated else aggregate(law)

    def defense_log_likelihood(observed, candidate, public=None, slack=None) -> Array:
        return log_likelihood(law(observed, candidate, public, slack), observed)

    return Defense(
        init,
        update,
        name=name or "none",
        stage="per_sample" if per_sample else "aggregate",
        stages=stages,
        init_with_key=init_with_key,
        prepare=prepare,
        public=public,
        law=law,
        log_likelihood=defense_log_likelihood,
        with_key=lambda key: from_stages(*stages, name=name, key=key),
    )


def chain(*defenses: Defense, key: Array | None = None) -> Defense:
    """Compose defences, both what they do and what an adversary knows of it.

    Every stage draws from its own key. `optax.chain` composes the sampling side only and leaves two
    equal stages with equal keys: use this one for defences, `optax.chain` for the optimizer behind.

    Args:
      *defenses: in the order in which they act on the gradient; none at all is no defence.
      key: PRNG key of `init`; a fixed one where `None`.

    Returns:
      The composed defence.

    Raises:
      TypeError: an argument is not a defence.
      ValueError: a per-sample stage stands after an aggregated one.

    Example:
      >>> import invjax
      >>> invjax.chain(invjax.defenses.clip_per_sample(1.0), invjax.defenses.gaussian_noise(0.01))
      clip_per_sample(1.0),gaussian_noise(0.01)
    """
    for defense in defenses:
        if not isinstance(defense, Defense):
            raise TypeError(
                f"invjax.chain composes defences, got {defense!r}; a list is unpacked, "
                "chain(*defenses), and an optimizer follows by optax.chain(chain(...), optimizer)."
            )
    return from_stages(
        *(stage for defense in defenses for stage in defense.stages),
        name=",".join(defense.name for defense in defenses),
        key=key,
    )


def _readable(stage: Elementary, later: tuple[Elementary, ...]) -> bool:
    """Whether what a stage did can be read off what the later ones made of it."""
    if stage.reads_values:
        return all(other.update is _unchanged for other in later)
    return all(other.keeps_zeros for other in later)


def _leading_size(gradients: PyTree, name: str, params: Params | None = None) -> int:
    """The number of samples; refuses what is not a tree of per-sample gradients."""
    hint = (
        "Feed invjax.gradients.per_sample_gradients; what accumulates gradients (optax.MultiSteps) comes "
        "behind the defence: optax.chain(defense, optax.MultiSteps(...).gradient_transformation())."
    )
    leaves = jax.tree.leaves(gradients)
    sizes = {leaf.shape[0] if leaf.ndim else None for leaf in leaves}
    if len(sizes) != 1 or None in sizes:
        raise ValueError(
            f"{name} acts on per-sample gradients: every leaf needs the same leading sample axis, "
            f"got leading sizes {sorted(map(str, sizes))}. {hint}"
        )
    if params is not None:
        for gradient, param in zip(leaves, jax.tree.leaves(params), strict=True):
            if gradient.shape[1:] != jnp.shape(param):
                raise ValueError(
                    f"{name} acts on per-sample gradients: a parameter of shape {jnp.shape(param)} "
                    f"needs a gradient of shape [B, ...] over it, got {gradient.shape}. {hint}"
                )
    return leaves[0].shape[0]


def _default_slack(observed: PyTree) -> Array:
    """A thousandth of the observation's root mean square: small, and never zero."""
    size = sum(leaf.size for leaf in jax.tree.leaves(observed))
    observed = jax.tree.map(
        lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), observed
    )
    return 1e-3 * optax.tree.norm(observed) / jnp.sqrt(size) + 1e-12
