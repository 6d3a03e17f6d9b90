"""Generalised linear models: the missing record is exact at the optimum, and off by a law elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special
from sklearn import exceptions, linear_model

import invjax
from invjax.attacks.informed import glm
from invjax.attacks.informed.glm_model import Glm
from invjax.attacks.informed.glm_roots import TURN, _predictors
from invjax.base import Batch
from invjax.theory import fisher


def digits(number=None):
    data = invjax.datasets.digits()
    inputs = np.asarray(data.inputs, float).reshape(-1, 64)
    return inputs[:number], np.asarray(data.labels)[:number]


def few_classes(count):
    """Those of the first so many digits that are a 0, 1, 2 or 3."""
    inputs, labels = digits(count)
    return Batch(inputs[labels < 4], labels[labels < 4])


@pytest.fixture(scope="module")
def pair():
    """Digits 3 (class 0) against 8 (class 1): 357 records."""
    inputs, labels = digits()
    keep = np.isin(labels, (3, 8))
    return Batch(inputs[keep], (labels[keep] == 8).astype(int))


@pytest.fixture(scope="module")
def counts(pair):
    rate = np.exp(pair.inputs @ np.random.default_rng(0).normal(size=64) * 0.3)
    return Batch(pair.inputs, np.random.default_rng(1).poisson(rate).astype(float))


def worst(found, truth):
    return np.abs(found.inputs - truth.inputs).max()


def spread(found, truth):
    """Largest error of every target, `[n]`."""
    return np.abs(found.inputs - truth.inputs).max(axis=1)


def among(found, truth):
    """Smallest error over the candidates of every target, `[n]`."""
    errors = np.abs(found.diagnostics["candidates"] - truth.inputs[:, None]).max(axis=2)
    return np.where(found.diagnostics["valid"], errors, np.inf).min(axis=1)


class TestExactRecovery:
    @pytest.mark.parametrize("free", [True, False], ids=["free", "penalized"])
    @pytest.mark.parametrize("strength", [0.1, 0.01])
    def test_logistic(self, pair, strength, free):
        penalty = strength * len(pair.inputs)
        model = glm.fit(pair, "logistic", penalty=penalty, intercept_penalty=0 if free else penalty)
        found = glm.reconstruct_all(model, pair, input_range=(0.0, 1.0))
        assert worst(found, pair) <= 1e-10
        assert np.abs(found.diagnostics["label_value"] - pair.labels).max() <= 1e-10
        np.testing.assert_array_equal(found.labels, pair.labels)
        assert found.found.all() and found.inputs.dtype == np.float64
        # What it cost to leave the optimum by rounding is foreseen.
        assert (spread(found, pair) <= 10 * found.diagnostics["predicted_error"] + 1e-12).all()

    def test_one_target_as_all(self, pair):
        model = glm.fit(pair, "logistic", penalty=3.57)
        every = glm.reconstruct_all(model, pair)
        for target in (0, 5):
            known = Batch(*(np.delete(leaf, target, axis=0) for leaf in pair))
            found = glm.reconstruct(model, known)
            assert np.abs(found.inputs[0] - pair.inputs[target]).max() < 1e-10
            assert found.labels.tolist() == [pair.labels[target]] and found.found.tolist() == [True]
            for name in ("residual", "conditioning"):
                np.testing.assert_allclose(
                    found.diagnostics[name], every.diagnostics[name][target], rtol=1e-9
                )

    @pytest.mark.parametrize("strength", [0.01, pytest.param(0.001, marks=pytest.mark.slow)])
    def test_softmax(self, strength):
        data = Batch(*digits(600))
        model = glm.fit(data, "softmax", penalty=600 * strength, num_classes=10)
        found = glm.reconstruct_all(model, data)
        assert worst(found, data) <= 1e-10
        np.testing.assert_array_equal(found.labels, data.labels)
        assert found.objective.max() < 1e-12
        one_hot = np.eye(10)[data.labels]
        assert np.abs(found.diagnostics["label_value"] - one_hot).max() < 1e-12
        assert found.diagnostics["rank_one_residual"].max() < 1e-9
        # The residuals of all classes, unpenalised intercepts, add up to zero.
        assert np.abs(found.diagnostics["residual"].sum(axis=1)).max() < 1e-12

    def test_ridge(self, pair):
        model = glm.fit(pair, "linear", penalty=3.57)
        found = glm.reconstruct_all(model, pair)
        assert worst(found, pair) <= 1e-8
        assert np.abs(found.labels - pair.labels).max() <= 1e-8

    def test_least_squares_of_independent_inputs(self):
        rng = np.random.default_rng(3)
        data = Batch(rng.normal(size=(40, 6)), rng.normal(size=40))
        found = glm.reconstruct_all(glm.fit(data, "linear"), data)
        assert worst(found, data) <= 1e-9 and np.abs(found.labels - data.labels).max() <= 1e-9

    def test_poisson(self, counts):
        model = glm.fit(counts, "poisson", penalty=3.0)
        found = glm.reconstruct_all(model, counts)
        assert worst(found, counts) <= 1e-9
        assert np.abs(found.labels - counts.labels).max() <= 1e-9

    def test_images_keep_their_shape(self, pair):
        images = Batch(pair.inputs.reshape(-1, 8, 8, 1).astype(np.float32), pair.labels)
        model = glm.fit(images, "logistic", penalty=3.57)
        found = glm.reconstruct_all(model, images, input_range=((0.0,), (1.0,)))
        assert found.inputs.shape == (357, 8, 8, 1) and worst(found, images) <= 1e-10
        one = glm.reconstruct(model, Batch(images.inputs[1:], images.labels[1:]))
        assert one.inputs.shape == (1, 8, 8, 1)


class TestFit:
    def test_the_optimum_is_met_to_rounding(self, pair):
        for strength in (0.1, 1e-2, 1e-3, 1e-4):
            model = glm.fit(pair, "logistic", penalty=strength * 357)
            weight, intercept = glm.residual_gradient(model, pair)
            # By hand, of the mean of the losses.
            chance = special.expit(pair.inputs @ model.weight + model.intercept)
            slope = pair.inputs.T @ (chance - pair.labels) / 357 + strength * model.weight
            assert np.abs(slope).max() < 1e-15 and np.abs(weight).max() / 357 < 1e-15
            assert abs((chance - pair.labels).mean()) < 1e-15 and abs(intercept) / 357 < 1e-15

    def test_it_is_scikit_learns(self, pair, counts):
        ridge = glm.fit(pair, "linear", penalty=2.0)
        theirs = linear_model.Ridge(alpha=2.0, solver="cholesky").fit(*pair)
        np.testing.assert_allclose(ridge.weight, theirs.coef_, atol=1e-10)
        assert float(ridge.intercept) == pytest.approx(theirs.intercept_, abs=1e-10)
        poisson = glm.fit(counts, "poisson", penalty=0.1 * 357)
        settings = {"alpha": 0.1, "solver": "newton-cholesky", "tol": 1e-10}
        theirs = linear_model.PoissonRegressor(**settings).fit(*counts)
        np.testing.assert_allclose(poisson.weight, theirs.coef_, atol=1e-7)

    @pytest.mark.parametrize("dtype", [np.int64, np.uint8])
    def test_integers_are_taken_as_floats(self, dtype):
        """Pixels as they are stored: up to 255, whose squares are beyond `uint8`."""
        inputs = np.random.default_rng(0).integers(0, 256, (30, 4))
        whole = Batch(inputs.astype(dtype), (inputs[:, 0] > 127).astype(int))
        data = whole._replace(inputs=inputs.astype(float))
        model, same = (glm.fit(batch, "logistic", penalty=0.5) for batch in (data, whole))
        assert same.weight.dtype == np.float64
        np.testing.assert_array_equal(same.weight, model.weight)
        found, expected = (
            glm.reconstruct(model, Batch(batch.inputs[1:], batch.labels[1:]))
            for batch in (whole, data)
        )
        np.testing.assert_allclose(found.inputs, expected.inputs, rtol=1e-12)
        traced = jax.eval_shape(
            lambda inputs: glm.fit(whole._replace(inputs=inputs), "logistic", penalty=0.5),
            jnp.asarray(whole.inputs),
        )
        assert traced.weight.dtype == jnp.float32

    def test_under_jit_and_vmap_it_takes_the_given_type(self, pair):
        inputs = jnp.asarray(pair.inputs[:60].reshape(2, 30, 64), jnp.float32)
        labels = jnp.asarray(pair.labels[:60].reshape(2, 30))

        @jax.jit
        @jax.vmap
        def attacked(batch):
            model = glm.fit(batch, "logistic", penalty=3.0)
            return model, glm.reconstruct(model, Batch(batch.inputs[1:], batch.labels[1:]))

        model, found = attacked(Batch(inputs, labels))
        assert model.weight.shape == (2, 64) and model.weight.dtype == jnp.float32
        assert found.inputs.shape == (2, 1, 64)
        assert np.abs(found.inputs[:, 0] - inputs[:, 0]).max() < 1e-3
        np.testing.assert_array_equal(found.labels[:, 0], labels[:, 0])


class TestOffTheOptimum:
    """`(r x - g_x) / (r - g_0)`, with `g` the total gradient at the released weights."""

    @pytest.mark.parametrize("size", [1e-3, 1e-6])
    def test_the_law_of_conditioning(self, pair, size):
        model = glm.fit(pair, "logistic", penalty=3.57)
        rng = np.random.default_rng(0)
        moved = Glm(
            weight=model.weight + size * rng.normal(size=64),
            intercept=model.intercept + size * rng.normal(),
            penalty=model.penalty,
            family="logistic",
        )
        found = glm.reconstruct_all(moved, pair)
        slope, level = glm.residual_gradient(moved, pair)
        residual = special.expit(pair.inputs @ moved.weight + moved.intercept) - pair.labels
        law = residual[:, None] * pair.inputs - slope[None]
        law = law / (residual - level)[:, None]
        np.testing.assert_allclose(found.inputs, law, rtol=1e-7, atol=1e-7)
        errors = np.linalg.norm(found.inputs - pair.inputs, axis=1)
        assert errors.max() > 0.1 * size
        assert (errors <= found.diagnostics["predicted_error"] * 1.01).all()

    def test_float32_costs_digits(self, pair):
        model = glm.fit(pair, "logistic", penalty=3.57)
        narrow = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), model)
        errors = spread(glm.reconstruct_all(narrow, pair), pair)
        assert 1e-6 < np.median(errors) < 1e-3

    def test_scikit_learns_default_hides_the_record(self, pair):
        released = glm.from_sklearn(linear_model.LogisticRegression().fit(*pair))
        found = glm.reconstruct_all(released, pair, input_range=(0.0, 1.0))
        errors = spread(found, pair)
        assert np.median(errors) > 0.1
        # And the attack knows it, mostly even without the box.
        assert not found.found[errors > 0.1].any()
        assert glm.reconstruct_all(released, pair).found.mean() < 0.1

    def test_noise_costs_its_variance_and_never_less_than_fisher_says(self, pair):
        penalty = 0.01 * 357
        model = glm.fit(pair, "logistic", penalty=penalty)
        targets = np.arange(0, 357, 4)
        theta = np.concatenate([model.intercept[None], model.weight])
        penalties = np.full(65, penalty)
        penalties[0] = 0
        errors = {}
        with jax.enable_x64(True):

            @jax.jit
            def attacked(noise):
                moved = Glm(
                    weight=model.weight + noise[1:],
                    intercept=model.intercept + noise[0],
                    penalty=penalty,
                    family="logistic",
                )
                return glm.reconstruct_all(moved, pair).inputs[targets]

            jacobians = jax.jit(jax.vmap(fisher.logistic_jacobian, (None, None, 0, 0, None)))(
                theta, pair.inputs, pair.inputs[targets], pair.labels[targets], penalties
            )
            draws = np.random.default_rng(1).normal(size=(100, 65))
            for std in (1e-8, 1e-7):
                found = np.asarray(jax.lax.map(attacked, jnp.asarray(std * draws), batch_size=10))
                errors[std] = np.mean((found - pair.inputs[targets]) ** 2, axis=(0, 2))
        np.testing.assert_allclose(errors[1e-7] / errors[1e-8], 100, rtol=0.05)
        information = np.square(jacobians).sum(axis=(1, 2)) / 64 / 1e-7**2
        ratios = errors[1e-7] * information
        assert ratios.min() >= 10 and 20 < np.median(ratios) < 60


class TestWithoutIntercept:
    def test_logistic_candidates_hold_the_truth(self, pair):
        model = glm.fit(pair, "logistic", penalty=3.57, intercept=False)
        assert model.intercept is None
        found = glm.reconstruct_all(model, pair, input_range=(0.0, 1.0))
        assert among(found, pair).max() < 1e-9
        valid, feasible = (found.diagnostics[name].sum(axis=1) for name in ("valid", "feasible"))
        assert valid.max() == 4 and (valid == 4).sum() == 355
        # The box leaves the two lengths of one direction.
        assert feasible.max() == 2 and (feasible == 2).mean() == pytest.approx(0.9, abs=0.02)
        assert (spread(found, pair) < 1e-9).mean() > 0.99
        mirrored = np.where(
            found.diagnostics["valid"][..., None], found.diagnostics["candidates"], 0.0
        )
        np.testing.assert_allclose(mirrored[:, :2], -mirrored[:, 2:], rtol=1e-9, atol=1e-12)

    def test_a_norm_settles_the_length(self, pair):
        norms = np.linalg.norm(pair.inputs, axis=1, keepdims=True)
        unit = Batch(pair.inputs / norms, pair.labels)
        model = glm.fit(unit, "logistic", penalty=1.0, intercept=False)
        for target in range(3):
            known = Batch(*(np.delete(leaf, target, axis=0) for leaf in unit))
            found = glm.reconstruct(model, known, norm=1.0, input_range=(0.0, 1.0))
            assert np.abs(found.inputs[0] - unit.inputs[target]).max() < 1e-10
            assert found.labels[0] == unit.labels[target] and found.found[0]
            assert found.objective < 1e-10

    def test_a_label_tells_a_record_from_its_mirror_image(self):
        """Where there is no box to do so."""
        inputs = np.random.default_rng(0).normal(size=(30, 4))
        unit = Batch(inputs / np.linalg.norm(inputs, axis=1, keepdims=True), np.arange(30) % 2)
        model = glm.fit(unit, "logistic", penalty=1.0, intercept=False)
        for target in range(2):
            known = Batch(*(np.delete(leaf, target, axis=0) for leaf in unit))
            found = glm.reconstruct(model, known, norm=1.0, label=unit.labels[target])
            assert np.abs(found.inputs[0] - unit.inputs[target]).max() < 1e-10
            assert found.labels[0] == unit.labels[target] and found.found[0]

    def test_softmax_has_one_root(self):
        data = few_classes(300)
        model = glm.fit(data, "softmax", penalty=1.5, num_classes=4, intercept=False)
        found = glm.reconstruct_all(model, data)
        assert worst(found, data) < 1e-10 and found.found.all()
        np.testing.assert_array_equal(found.labels, data.labels)
        norm = np.linalg.norm(data.inputs[0])
        one = glm.reconstruct(model, Batch(data.inputs[1:], data.labels[1:]), norm=norm)
        assert np.abs(one.inputs[0] - data.inputs[0]).max() < 1e-10

    @pytest.mark.parametrize("family", ["linear", "poisson"])
    def test_a_known_label_settles_the_others(self, pair, counts, family):
        data = pair if family == "linear" else counts
        model = glm.fit(data, family, penalty=3.0, intercept=False)
        found = glm.reconstruct_all(model, data, grant_labels=True, input_range=(0.0, 1.0))
        # Where the two roots nearly meet, digits are lost.
        errors = among(found, data)
        assert np.median(errors) < 1e-10 and errors.max() < 1e-5
        assert (spread(found, data) < 1e-5).mean() > 0.97
        known = Batch(data.inputs[1:], data.labels[1:])
        norm = np.linalg.norm(data.inputs[0])
        one = glm.reconstruct(model, known, norm=norm, input_range=(0.0, 1.0))
        assert np.abs(one.inputs[0] - data.inputs[0]).max() < 1e-9
        assert one.labels[0] == pytest.approx(data.labels[0], abs=1e-9)
        if family == "poisson":
            one = glm.reconstruct(model, known, norm=norm, label=data.labels[0])
            assert np.abs(one.inputs[0] - data.inputs[0]).max() < 1e-9

    @pytest.mark.parametrize("family", ["linear", "logistic", "poisson"])
    def test_every_predictor_is_among_the_roots(self, family):
        link = {"linear": lambda t: t, "logistic": special.expit, "poisson": np.exp}[family]
        predictor = np.concatenate([np.linspace(-6, 3, 50), np.linspace(0.01, 2.5, 23)])
        # With the minima themselves: of labels 0 and 1 of each family.
        turns = {"linear": [0.5], "logistic": [-TURN, TURN], "poisson": [-1.0, 0.0]}[family]
        predictor = np.append(predictor, turns)
        with jax.enable_x64(True):
            solve = jax.jit(jax.vmap(lambda y, level: _predictors(family, y, level)))
            for label in (0.0, 1.0) if family == "logistic" else (0.0, 1.0, 3.0):
                level = predictor * (link(predictor) - label)
                roots, valid = solve(jnp.full_like(level, label), jnp.asarray(level))
                errors = np.where(valid, np.abs(roots - predictor[:, None]), np.inf).min(axis=1)
                assert errors.max() < 1e-6 and np.median(errors) < 1e-13
                values = np.asarray(roots) * (link(np.asarray(roots)) - label)
                left = np.where(valid, np.abs(values - level[:, None]), 0.0)
                assert left.max() < 1e-10


class TestScikitLearn:
    NEWTON = {"solver": "newton-cholesky", "tol": 1e-12, "max_iter": 1000}  # noqa: RUF012

    @pytest.mark.parametrize(
        ("estimator", "bound"),
        [
            (linear_model.LogisticRegression(**NEWTON), 1e-5),
            (linear_model.LogisticRegression(C=0.1, fit_intercept=False, **NEWTON), 1e-5),
            (
                linear_model.LogisticRegression(
                    solver="liblinear", intercept_scaling=2.0, tol=1e-12, max_iter=10_000
                ),
                1e-2,
            ),
            (linear_model.Ridge(alpha=3.0, solver="cholesky"), 1e-7),
        ],
        ids=["logistic", "no-intercept", "liblinear", "ridge"],
    )
    def test_two_classes(self, pair, estimator, bound):
        released = glm.from_sklearn(estimator.fit(*pair))
        found = glm.reconstruct_all(released, pair, input_range=(0.0, 1.0))
        if released.intercept is None:
            assert among(found, pair).max() <= bound
        else:
            assert worst(found, pair) <= bound and np.abs(found.labels - pair.labels).max() <= bound

    def test_many_classes(self):
        data = few_classes(300)
        released = glm.from_sklearn(linear_model.LogisticRegression(**self.NEWTON).fit(*data))
        assert released.family == "softmax" and released.weight.shape == (64, 4)
        found = glm.reconstruct_all(released, data)
        assert worst(found, data) <= 1e-4
        np.testing.assert_array_equal(found.labels, data.labels)

    def test_regressions(self, counts):
        settings = {"alpha": 0.02, "solver": "newton-cholesky", "tol": 1e-12}
        poisson = linear_model.PoissonRegressor(**settings).fit(*counts)
        released = glm.from_sklearn(poisson, num_records=357)
        assert released.penalty == pytest.approx(0.02 * 357)
        assert worst(glm.reconstruct_all(released, counts), counts) < 1e-5
        rng = np.random.default_rng(3)
        data = Batch(rng.normal(size=(40, 6)), rng.normal(size=40))
        released = glm.from_sklearn(linear_model.LinearRegression().fit(*data))
        assert released.penalty == 0 and worst(glm.reconstruct_all(released, data), data) < 1e-8

    @pytest.mark.parametrize(
        ("estimator", "message"),
        [
            (linear_model.LogisticRegression(l1_ratio=1.0, solver="saga"), "L2 penalty"),
            (linear_model.LogisticRegression(l1_ratio=0.5, solver="saga"), "L2 penalty"),
            (linear_model.LogisticRegression(class_weight="balanced"), "class_weight"),
            (linear_model.Ridge(positive=True), "positive"),
            (linear_model.LinearRegression(positive=True), "positive"),
            (linear_model.PoissonRegressor(), "num_records"),
        ],
    )
    @pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
    def test_what_has_another_objective_is_refused(self, pair, estimator, message):
        with pytest.raises(ValueError, match=message):
            glm.from_sklearn(estimator.fit(pair.inputs[:80], pair.labels[:80]))

    def test_what_is_no_such_model_is_refused(self, pair):
        with pytest.raises(exceptions.NotFittedError):
            glm.from_sklearn(linear_model.Ridge())
        for other in (linear_model.Lasso(), linear_model.LogisticRegressionCV(), object()):
            with pytest.raises(TypeError, match="estimator must be one of LinearRegression"):
                glm.from_sklearn(other)
        several = np.stack([pair.labels, 1 - pair.labels], axis=1)
        for kind in (linear_model.Ridge, linear_model.LinearRegression):
            with pytest.raises(ValueError, match="one output"):
                glm.from_sklearn(kind().fit(pair.inputs, several))
        several = linear_model.Ridge(alpha=[1.0, 2.0]).fit(pair.inputs, several)
        with pytest.raises(ValueError, match="one output"):
            glm.from_sklearn(several)


def tiny(family="logistic", **changes):
    weight = np.ones((3, 2)) if family == "softmax" else np.ones(3)
    settings = {"weight": weight, "intercept": np.zeros(weight.shape[1:]), "family": family}
    return Glm(**(settings | changes))


RECORDS = Batch(np.ones((4, 3)), np.array([0, 1, 1, 0]))


@pytest.mark.parametrize(
    ("model", "known", "settings", "message"),
    [
        (tiny("ridge"), RECORDS, {}, "family"),
        (tiny(penalty=-1.0), RECORDS, {}, "penalty"),
        (tiny(weight=np.ones((3, 1))), RECORDS, {}, "weight must be"),
        (tiny(intercept=np.zeros(1)), RECORDS, {}, "intercept must have"),
        (tiny(weight=np.ones(5)), RECORDS, {}, "5 values"),
        (tiny(), Batch(RECORDS.inputs, RECORDS.labels * 2), {}, "0 or 1"),
        (tiny("softmax"), Batch(RECORDS.inputs, RECORDS.labels * 2), {}, "0 to 1"),
        (tiny("poisson"), Batch(RECORDS.inputs, RECORDS.labels - 1.0), {}, "numbers from 0"),
        (tiny(), Batch(RECORDS.inputs * np.nan, RECORDS.labels), {}, "inputs must be finite"),
        (tiny(), Batch(RECORDS.inputs, RECORDS.labels[:3]), {}, "a label each"),
        (tiny(), Batch(RECORDS.inputs[:0], RECORDS.labels[:0]), {}, "at least 1 records"),
        (tiny("linear", intercept=None), RECORDS, {}, "label or its norm"),
        (tiny("poisson", intercept=None), RECORDS, {}, "label or its norm"),
        (tiny("softmax", intercept=None), RECORDS, {}, "at least 3 classes"),
        (tiny(intercept=None), RECORDS, {"norm": 0.0}, "norm"),
        (tiny(intercept=None), RECORDS, {"label": 2}, "0 or 1, got 2"),
        (tiny(), RECORDS, {"input_range": (1.0, 0.0)}, "input_range must be"),
        (tiny(), RECORDS, {"tolerance": -1.0}, "tolerance"),
    ],
)
def test_what_cannot_be_attacked_is_refused(model, known, settings, message):
    with pytest.raises(ValueError, match=message):
        glm.reconstruct(model, known, **settings)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("ridge", {}, "family"),
        ("logistic", {"penalty": -1.0}, "penalty"),
        ("logistic", {"intercept_penalty": -1.0}, "intercept_penalty"),
        ("softmax", {}, "num_classes"),
        ("logistic", {"max_steps": 0}, "max_steps"),
    ],
)
def test_what_cannot_be_trained_is_refused(family, settings, message):
    with pytest.raises(ValueError, match=message):
        glm.fit(RECORDS, family, **settings)


def test_inputs_that_are_not_finite_are_refused():
    """Newton's method would end where it began, at weights of zero."""
    for value in (np.nan, np.inf):
        broken = Batch(np.where(np.eye(4, 3) > 0, value, 1.0), RECORDS.labels)
        with pytest.raises(ValueError, match="inputs must be finite"):
            glm.fit(broken, "logistic")


def test_a_record_without_a_residual_is_not_found():
    """Weights that fit the target as they are: its gradient is zero."""
    model = tiny("linear", intercept=np.zeros(()), weight=np.zeros(3))
    known = Batch(np.eye(3), np.zeros(3))
    found = glm.reconstruct(model, known)
    assert not found.found[0] and np.isfinite(found.inputs).all()
