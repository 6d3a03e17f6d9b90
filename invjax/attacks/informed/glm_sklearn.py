"""Generalised linear models that scikit-learn has trained."""

from collections.abc import Callable
from typing import Any, cast

import numpy as np

from invjax.attacks.informed.glm_model import Family, Glm
from invjax.base import Array
from invjax.checks import check_count


def from_sklearn(estimator: Any, *, num_records: int | None = None) -> Glm:
    """A fitted estimator of scikit-learn with the objective that it minimised. Host code.

    Every estimator scales its penalty in its own way: `Ridge` adds `alpha |w|^2` to the squared error
    (`penalty = alpha`), `LogisticRegression` multiplies the losses by `C` (`penalty = 1 / C`),
    `PoissonRegressor` takes the mean of the losses (`penalty = n alpha`). None penalises the intercept but
    the solver `liblinear`, through a column of `intercept_scaling`: `1 / (C intercept_scaling^2)`.

    Labels of a classifier are positions in its `classes_`. Sample weights given to `fit` leave no trace in
    an estimator and make the attack fail. So do the default tolerances of iterative solvers: the attack
    needs an optimum (`solver="newton-cholesky", tol=1e-12`).

    Args:
      estimator: `LinearRegression`, `Ridge`, `LogisticRegression` or `PoissonRegressor`.
      num_records: `n`, the target counted; for `PoissonRegressor` only.

    Returns:
      The model, float64.

    Raises:
      TypeError: any other estimator.
      ValueError: it is not fitted, has several outputs, or minimised something else: an L1 penalty, class
        weights, one model a class, positive weights; or a Poisson model without `num_records`.
    """
    from sklearn import linear_model
    from sklearn.utils.validation import check_is_fitted

    readers: dict[type, Callable[[], tuple[Family, float, float]]] = {
        linear_model.LinearRegression: lambda: ("linear", 0.0, 0.0),
        linear_model.Ridge: lambda: ("linear", float(np.squeeze(estimator.alpha)), 0.0),
        linear_model.LogisticRegression: lambda: _logistic(estimator),
        linear_model.PoissonRegressor: lambda: _poisson(estimator, num_records),
    }
    if type(estimator) not in readers:
        names = ", ".join(kind.__name__ for kind in readers)
        raise TypeError(f"estimator must be one of {names}, got {type(estimator).__name__}.")
    check_is_fitted(estimator)
    if getattr(estimator, "positive", False):
        raise ValueError("estimator has positive=True: its optimum is no stationary point.")
    coefficients = np.asarray(estimator.coef_, np.float64)
    several = coefficients.ndim == 2 and not hasattr(estimator, "classes_")
    if (several and len(coefficients) > 1) or np.size(getattr(estimator, "alpha", 0.0)) > 1:
        raise ValueError(f"estimator must have one output, got coef_ of {coefficients.shape}.")
    family, penalty, intercept_penalty = readers[type(estimator)]()
    softmax = family == "softmax"
    weight = coefficients.T if softmax else coefficients.reshape(-1)
    intercept: Any = None
    if estimator.fit_intercept:
        intercept = np.reshape(np.asarray(estimator.intercept_, np.float64), weight.shape[1:])
    return Glm(
        weight=cast(Array, weight),
        intercept=intercept,
        penalty=penalty,
        intercept_penalty=intercept_penalty,
        family=family,
    )


def _logistic(estimator: Any) -> tuple[Family, float, float]:
    if estimator.class_weight is not None:
        raise ValueError(f"estimator must have class_weight=None, got {estimator.class_weight!r}.")
    kind = getattr(estimator, "penalty", "deprecated")
    if kind not in ("deprecated", "l2", None) or (
        kind == "deprecated" and (estimator.l1_ratio or 0.0) != 0.0
    ):
        raise ValueError(
            "estimator must have an L2 penalty or none, got "
            f"penalty={kind!r}, l1_ratio={estimator.l1_ratio!r}."
        )
    penalty = 0.0 if kind is None else 1 / float(estimator.C)
    several = len(estimator.classes_) > 2
    liblinear = estimator.solver == "liblinear"
    mode = getattr(estimator, "multi_class", "auto")
    if (several and (liblinear or mode == "ovr")) or (not several and mode == "multinomial"):
        raise ValueError(
            "estimator must be one binary model or one softmax, got "
            f"{len(estimator.classes_)} classes, solver={estimator.solver!r}, multi_class={mode!r}."
        )
    if several:
        return "softmax", penalty, 0.0
    scaled = penalty / float(estimator.intercept_scaling) ** 2 if liblinear else 0.0
    return "logistic", penalty, scaled


def _poisson(estimator: Any, num_records: int | None) -> tuple[Family, float, float]:
    if num_records is None:
        raise ValueError("num_records must be given for a PoissonRegressor, got None.")
    check_count("num_records", num_records, 1)
    return "poisson", float(estimator.alpha) * num_records, 0.0
