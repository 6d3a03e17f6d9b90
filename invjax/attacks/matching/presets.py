"""Published gradient-matching attacks, by name, with their published settings."""

from typing import Any

import optax

from invjax.attacks.matching import objectives, priors
from invjax.attacks.matching.loop import Labels, gradient_matching
from invjax.base import Attack, Model
from invjax.checks import check_count, check_number, equals


def signed_adam(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
    """Adam on the sign of the gradient, the rate a tenth after 3/8, 5/8 and 7/8 of the steps.

    Args:
      learning_rate: first step size, in input units.
      num_steps: total steps.

    Returns:
      The optimizer of Geiping et al. 2020.

    Raises:
      ValueError: a rate that is not positive.
    """
    check_number("learning_rate", learning_rate, 0.0, open_low=True)
    return optax.chain(optax.scale_by_sign(), optax.adam(decayed(learning_rate, num_steps)))


def cosine_adam(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
    """Adam whose rate falls to zero along half a cosine.

    Args:
      learning_rate: first step size, in input units.
      num_steps: total steps.

    Returns:
      The optimizer.

    Raises:
      ValueError: a rate that is not positive, no steps.
    """
    check_number("learning_rate", learning_rate, 0.0, open_low=True)
    check_count("num_steps", num_steps, 1)
    return optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))


def decayed(learning_rate: float, num_steps: int) -> optax.Schedule:
    """A tenth of the rate after 3/8, 5/8 and 7/8 of the steps each (Geiping et al. 2020).

    Args:
      learning_rate: first step size.
      num_steps: total steps.

    Returns:
      The schedule.
    """
    boundaries = {int(num_steps * part / 8): 0.1 for part in (3, 5, 7)}
    return optax.piecewise_constant_schedule(learning_rate, boundaries)


def lbfgs(memory_size: int = 100) -> optax.GradientTransformation:
    """L-BFGS with unit steps, halved only where the objective would not fall (12 times at most).

    Args:
      memory_size: steps remembered.

    Returns:
      The optimizer. Nearly every step is one evaluation.
    """
    linesearch = optax.scale_by_backtracking_linesearch(
        max_backtracking_steps=12,
        decrease_factor=0.5,
        increase_factor=float("inf"),
        max_learning_rate=1.0,
        store_grad=True,
    )
    return optax.lbfgs(1.0, memory_size=memory_size, linesearch=linesearch)


def dlg(
    model: Model,
    *,
    num_steps: int = 6000,
    restarts: int = 1,
    labels: Labels = "joint",
    **settings: Any,
) -> Attack:
    """Deep Leakage from Gradients (Zhu et al. 2019): squared L2, soft labels optimised, L-BFGS.

    Published as 300 calls of an optimizer that takes 20 unit steps a call; here a step is one of
    those. Departures: a step that would raise the objective is halved until it does not, because
    plain unit steps diverge from some starts and never come back; and a restart ends when 300 steps
    have not lowered its objective by a tenth (`patience` and `tolerance`).

    Args:
      model: the model.
      num_steps: L-BFGS steps.
      restarts: independent starts.
      labels: `joint` as published; `known` or `recovered`.
      **settings: of `gradient_matching`.

    Returns:
      The attack.

    Raises:
      ValueError: as `gradient_matching`.
    """
    settings: dict[str, Any] = {
        "objective": objectives.squared_l2(),
        "optimizer": lbfgs(),
        "patience": 300,
        "tolerance": 0.1,
        **settings,
    }
    return gradient_matching(
        model, num_steps=num_steps, restarts=restarts, labels=labels, **settings
    )


def idlg(
    model: Model,
    *,
    num_steps: int = 6000,
    restarts: int = 1,
    labels: Labels = "recovered",
    **settings: Any,
) -> Attack:
    """Improved DLG (Zhao et al. 2020): the label from the sign of the last layer's gradient, then DLG.

    Args:
      model: the model.
      num_steps: L-BFGS steps.
      restarts: independent starts.
      labels: `recovered` as published.
      **settings: of `gradient_matching`.

    Returns:
      The attack.

    Raises:
      ValueError: as `gradient_matching`.
    """
    return dlg(model, num_steps=num_steps, restarts=restarts, labels=labels, **settings)


def tag(
    model: Model,
    *,
    weight: float = 0.01,
    num_steps: int = 6000,
    restarts: int = 1,
    labels: Labels = "joint",
    **settings: Any,
) -> Attack:
    """TAG's objective on any model (Deng et al. 2021): squared L2 plus weighted L1.

    Args:
      model: the model.
      weight: of the L1 part.
      num_steps: L-BFGS steps.
      restarts: independent starts.
      labels: `joint` as published.
      **settings: of `gradient_matching`.

    Returns:
      The attack.

    Raises:
      ValueError: as `gradient_matching`.
    """
    settings: dict[str, Any] = {"objective": objectives.squared_l2_and_l1(weight), **settings}
    return dlg(model, num_steps=num_steps, restarts=restarts, labels=labels, **settings)


def inverting_gradients(
    model: Model,
    *,
    total_variation: float = 1e-2,
    learning_rate: float = 0.1,
    num_steps: int = 4800,
    restarts: int = 1,
    labels: Labels = "known",
    **settings: Any,
) -> Attack:
    """Inverting Gradients (Geiping et al. 2020): cosine, total variation, signed Adam, box.

    Departure: of several restarts the best is that of the lowest objective, total variation included;
    the authors' code compares the cosines alone.

    Args:
      model: the model.
      total_variation: weight of the anisotropic total variation; 0 for inputs that are no images.
      learning_rate: of signed Adam, in input units (published on inputs of unit variance).
      num_steps: steps.
      restarts: independent starts.
      labels: `known` as published.
      **settings: of `gradient_matching`.

    Returns:
      The attack.

    Raises:
      ValueError: a weight or rate out of range, or as `gradient_matching`.
    """
    settings: dict[str, Any] = {
        "objective": objectives.cosine(),
        "prior": priors.combine(*smoothness(total_variation, "anisotropic")),
        "optimizer": signed_adam(learning_rate, num_steps),
        "constraint": priors.project_to_box,
        **settings,
    }
    return gradient_matching(
        model, num_steps=num_steps, restarts=restarts, labels=labels, **settings
    )


def gradinversion(
    model: Model,
    *,
    total_variation: float = 1e-4,
    l2: float = 1e-6,
    batch_norm: float = 0.1,
    group: float = 1e-2,
    learning_rate: float = 0.1,
    num_steps: int = 4000,
    restarts: int = 4,
    labels: Labels = "recovered",
    **settings: Any,
) -> Attack:
    """GradInversion (Yin et al. 2021): squared L2, image priors, batch-norm statistics, group consistency.

    Departures: the batch-norm term is left out for a model without batch norm; the group's mean is
    taken without registration (`priors.group_consistency`); labels may repeat, where the published
    row minima (`labels.row_minimum`) know no repeats.

    Args:
      model: the model.
      total_variation: weight of the isotropic total variation; 0 for inputs that are no images.
      l2: weight of the mean squared value.
      batch_norm: weight of the batch-norm statistics.
      group: weight of the distance to the mean of the restarts.
      learning_rate: of Adam with cosine decay.
      num_steps: steps.
      restarts: members of the group.
      labels: `recovered` as published, but by `labels.recover`.
      **settings: of `gradient_matching`.

    Returns:
      The attack.

    Raises:
      ValueError: a weight or rate out of range, or as `gradient_matching`.
    """
    terms = [*smoothness(total_variation, "isotropic"), priors.l2(l2)]
    if restarts > 1:
        terms.append(priors.group_consistency(group))
    if model.statistics is not None:
        terms.append(priors.batch_norm_statistics(model, batch_norm))
    settings: dict[str, Any] = {
        "objective": objectives.squared_l2(),
        "prior": priors.combine(*terms),
        "optimizer": cosine_adam(learning_rate, num_steps),
        **settings,
    }
    return gradient_matching(
        model, num_steps=num_steps, restarts=restarts, labels=labels, **settings
    )


def smoothness(weight: float, kind: priors.Variation) -> list[priors.Prior]:
    """Total variation, or nothing at weight 0, so that inputs which are no images have the attack too.

    Args:
      weight: factor of the term.
      kind: as of `priors.total_variation`.

    Returns:
      One prior or none.

    Raises:
      ValueError: a negative weight.
    """
    return [] if equals(weight, 0) else [priors.total_variation(weight, kind)]
