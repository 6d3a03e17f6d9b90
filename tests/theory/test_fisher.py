"""Fisher information of releases against dense linear algebra, finite differences and other bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from scipy import special
from sklearn.datasets import load_digits

import invjax
from invjax import models, theory
from invjax.base import Batch
from invjax.theory import fisher

SIZE, STD = 12, 0.3


def release(record):
    """A smooth map to a tree of 9 + 40 numbers."""
    rng = np.random.default_rng(0)
    first, second = (jnp.asarray(rng.normal(size=(n, SIZE)), record.dtype) for n in (9, 40))
    values = record.ravel()
    return {"a": jnp.tanh(first @ values), "b": (second @ values) ** 2 / 9}


def truth(dtype=np.float64):
    return np.random.default_rng(1).uniform(-1, 1, (3, 4)).astype(dtype)


def wide(function, *args):
    """Compiled and run in float64."""
    with jax.enable_x64(True):
        args = jax.tree.map(jnp.asarray, args)
        return jax.tree.map(np.asarray, jax.jit(function)(*args))


@pytest.fixture(scope="module")
def dense():
    """The Jacobian of `release`, by hand."""
    rng = np.random.default_rng(0)
    first, second = (rng.normal(size=(n, SIZE)) for n in (9, 40))
    values = truth().ravel()
    slope = 1 - np.tanh(first @ values) ** 2
    return np.concatenate([slope[:, None] * first, 2 / 9 * (second @ values)[:, None] * second])


def test_the_exact_trace_is_that_of_the_jacobian(dense):
    found = wide(lambda record: fisher.output_perturbation(release, record, STD), truth())
    assert float(found.dfil) == pytest.approx((dense**2).sum() / SIZE / STD**2, rel=1e-12)
    assert found.standard_error == 0
    narrow = fisher.output_perturbation(release, jnp.asarray(truth(), jnp.float32), STD)
    assert narrow.dfil.dtype == jnp.float32
    np.testing.assert_allclose(narrow.dfil, found.dfil, rtol=1e-6)


def test_probes_are_independent_and_their_spread_is_said(dense):
    record = jnp.asarray(truth(np.float32))

    @jax.jit
    @jax.vmap
    def probed(key):
        return fisher.output_perturbation(release, record, STD, num_probes=50, key=key)

    found = probed(jax.random.split(jax.random.key(0), 400))
    exact = (dense**2).sum() / SIZE / STD**2
    normal = dense.T @ dense
    # The variance of one probe is twice the squared off-diagonal part.
    deviation = np.sqrt(2 * ((normal**2).sum() - (np.diag(normal) ** 2).sum()) / 50)
    deviation /= SIZE * STD**2
    # One sign drawn 50 times over would spread seven times as far.
    assert np.std(found.dfil) == pytest.approx(deviation, rel=0.15)
    assert np.mean(found.standard_error) == pytest.approx(deviation, rel=0.1)
    assert np.mean(found.dfil) == pytest.approx(exact, abs=4 * deviation / 20)


def test_the_whole_matrix_and_the_cramer_rao_bound(dense):
    def values(record):
        return (
            fisher.fisher_information(release, record, STD),
            fisher.unbiased_mse(release, record, STD),
            fisher.output_perturbation(release, record, STD),
            fisher.unbiased_mse(lambda x: release(x)["a"], record, STD),
            fisher.unbiased_mse(lambda x: jnp.tile(x.ravel()[:6], 4), record, STD),
        )

    information, bound, leak, blind, same = wide(values, truth())
    np.testing.assert_allclose(information, dense.T @ dense / STD**2, rtol=1e-12)
    assert float(bound) == pytest.approx(np.trace(np.linalg.inv(information)) / SIZE, rel=1e-9)
    assert bound > 1 / leak.dfil
    assert np.isinf(blind) and np.isinf(same)


def test_gradients_are_as_the_other_bounds_have_them():
    model = models.mlp((7,), 3, "tanh")
    batch = Batch(jnp.asarray(np.random.default_rng(2).uniform(size=(1, 6))), jnp.asarray([1]))
    params = model.init(jax.random.key(3), (6,))
    params, batch = jax.tree.map(
        lambda leaf: np.asarray(leaf, float) if leaf.dtype == jnp.float32 else leaf, (params, batch)
    )

    def values(params, batch):
        def gradient(record):
            return jax.grad(model.loss)(params, batch._replace(inputs=record[None]))

        noise = invjax.defenses.gaussian_noise(STD)
        return (
            fisher.unbiased_mse(gradient, batch.inputs[0], STD),
            theory.cramer_rao(model, params, batch, noise).total,
        )

    mine, theirs = wide(values, params, batch)
    assert float(mine) == pytest.approx(float(theirs) / 6, rel=1e-6)


def test_power_iteration_comes_within_three_percent():
    model = models.mlp((16,), 10, "tanh")
    digit = invjax.datasets.take(invjax.datasets.digits(), range(1))
    params = model.init(jax.random.key(0), (8, 8, 1))

    def gradient(record):
        return jax.grad(model.loss)(params, digit._replace(inputs=record[None]))

    record = digit.inputs[0]
    found = jax.jit(lambda key: fisher.largest_information(gradient, record, STD, key=key))
    values = np.asarray([found(key) for key in jax.random.split(jax.random.key(1), 9)])
    flat = lambda values: ravel_pytree(gradient(values.reshape(8, 8, 1)))[0]  # noqa: E731
    jacobian = np.asarray(jax.jit(jax.jacfwd(flat))(record.ravel()))
    exact = np.linalg.svd(jacobian, compute_uv=False)[0] ** 2 / STD**2
    assert (values > 0.97 * exact).all() and (values < 1.0001 * exact).all()


class TestSmoothClip:
    def test_its_norm_has_the_published_supremum(self):
        ratios = np.linspace(0, 20, 200_001)
        clip = jax.vmap(lambda ratio: fisher.smooth_clip({"g": 0.5 * ratio[None]}, 0.5))
        norms = wide(clip, ratios)["g"][:, 0] / 0.5
        assert norms.max() == pytest.approx(1.1152, abs=5e-5)
        assert ratios[norms.argmax()] == pytest.approx(1.549, abs=1e-3)
        assert norms.max() <= fisher.SMOOTH_CLIP_NORM < norms.max() + 5e-6
        assert norms[-1] == pytest.approx(1, abs=1e-9)
        divisor = (ratios - 1) * special.ndtr(ratios - 1) + 1
        np.testing.assert_allclose(norms, ratios / divisor, rtol=1e-12)

    def test_it_is_of_the_whole_tree_and_smooth_at_zero(self):
        def values(tree):
            slope = jax.jacfwd(lambda x: fisher.smooth_clip(x, 1.0))(jnp.zeros(2))
            return fisher.smooth_clip(tree, 1.0), slope

        tree = {"a": np.array([3.0, 0.0]), "b": np.array([[4.0]])}
        found, slope = wide(values, tree)
        assert found["b"][0, 0] / found["a"][0] == pytest.approx(4 / 3, rel=1e-12)
        np.testing.assert_allclose(slope, np.eye(2) / (1 - special.ndtr(-1)), rtol=1e-12)


class TestDpSgd:
    CLIP, MULTIPLIER = 0.7, 1.5

    def setup_method(self):
        rng = np.random.default_rng(4)
        self.model = models.mlp((5,), 3, "tanh")
        self.params = self.model.init(jax.random.key(0), (2, 3, 1))
        inputs = jnp.asarray(rng.uniform(size=(4, 2, 3, 1)) * 3, jnp.float32)
        self.batch = Batch(inputs, jnp.asarray([0, 2, 1, 1]))

    def found(self, **settings):
        return jax.jit(
            lambda batch: fisher.dp_sgd_step(
                self.model,
                self.params,
                batch,
                clip_norm=self.CLIP,
                noise_multiplier=self.MULTIPLIER,
                **settings,
            )
        )(self.batch)

    def test_every_record_has_its_own(self):
        def clipped(record, label):
            batch = Batch(record.reshape(1, 2, 3, 1), label[None])
            gradient = ravel_pytree(jax.grad(self.model.loss)(self.params, batch))[0]
            norm = jnp.linalg.norm(gradient)
            return gradient / (jax.nn.gelu(norm / self.CLIP - 1, approximate=False) + 1)

        rows = self.batch.inputs.reshape(4, 6)
        jacobians = jax.jit(jax.vmap(jax.jacrev(clipped)))(rows, self.batch.labels)
        exact = np.square(jacobians).sum(axis=(1, 2)) / 6 / (self.CLIP * self.MULTIPLIER) ** 2
        found = self.found()
        np.testing.assert_allclose(found.dfil, exact, rtol=1e-5)
        probed = self.found(num_probes=200, key=jax.random.key(5), sampling_rate=0.01, delta=1e-3)
        epsilon = np.sqrt(2 * np.log(1.25e3)) * 2 * 1.1152 / self.MULTIPLIER
        credited = 0.01 / (0.01 + 0.99 * np.exp(-epsilon)) * exact
        assert (np.abs(probed.dfil - credited) < 5 * probed.standard_error).all()
        assert (probed.standard_error > 0).all()
        assert (probed.standard_error < 0.2 * credited).all()

    def test_the_credit_lies_between_the_rate_and_one(self):
        values = [float(fisher.subsampling_credit(0.1, sigma)) for sigma in (0.2, 2.0, 20.0, 1e6)]
        epsilon = np.sqrt(2 * np.log(1.25e5)) * 2 * 1.1152 / 20
        assert values[2] == pytest.approx(0.1 / (0.1 + 0.9 * np.exp(-epsilon)), rel=1e-4)
        assert values == sorted(values, reverse=True)
        assert values[0] == pytest.approx(1) and values[-1] == pytest.approx(0.1, rel=1e-4)
        assert fisher.subsampling_credit(1.0, 3.0) == 1


def logistic_optimum(padded, labels, penalty):
    theta = np.zeros(padded.shape[1])
    for _ in range(30):
        chance = special.expit(padded @ theta)
        slope = padded.T @ (chance - labels) + penalty * theta
        hessian = (padded * (chance * (1 - chance))[:, None]).T @ padded + np.diag(penalty)
        theta -= np.linalg.solve(hessian, slope)
    return theta


@pytest.mark.parametrize("free", [False, True], ids=["penalized", "free"])
def test_the_weights_of_logistic_regression_move_as_said(free):
    pixels, digit = load_digits(return_X_y=True)
    keep = np.isin(digit, (3, 8))
    inputs, labels = pixels[keep][:120] / 16, (digit[keep][:120] == 8).astype(float)
    penalty = np.full(65, 0.01 * 120)
    penalty[0] *= not free
    padded = np.concatenate([np.ones((120, 1)), inputs], axis=1)
    theta = logistic_optimum(padded, labels, penalty)
    step = 1e-5
    over_records = jax.vmap(fisher.logistic_jacobian, (None, None, 0, 0, None))
    found = wide(over_records, theta, inputs, inputs[:5], labels[:5], penalty)
    for record, column in ((0, 10), (3, 29), (4, 42)):
        ends = []
        for sign in (1, -1):
            moved = padded.copy()
            moved[record, 1 + column] += sign * step
            ends.append(logistic_optimum(moved, labels, penalty))
        slope = (ends[0] - ends[1]) / (2 * step)
        assert np.abs(found[record][:, column] - slope).max() < 1e-6 * np.abs(slope).max()


@pytest.mark.parametrize(("epsilon", "value"), [(0.1, 2.377083), (1.0, 0.145494)])
def test_the_bound_of_renyi_privacy(epsilon, value):
    assert float(fisher.rdp_mse(epsilon, jnp.ones(7))) == pytest.approx(value, rel=1e-5)
    uneven = float(fisher.rdp_mse(epsilon, jnp.array([2.0, 0.0])))
    assert uneven == pytest.approx(2 * value, rel=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: fisher.output_perturbation(release, x, 0.0), "std"),
        (lambda x: fisher.output_perturbation(release, x, 1.0, num_probes=1), "num_probes"),
        (lambda x: fisher.unbiased_mse(release, x, -1.0), "std"),
        (lambda x: fisher.fisher_information(release, x, -1.0), "std"),
        (lambda x: fisher.largest_information(release, x, 1.0, num_steps=0), "num_steps"),
        (lambda x: fisher.rdp_mse(0.0, x), "epsilon"),
        (lambda x: fisher.smooth_clip(x, 0.0), "clip_norm"),
        (lambda x: fisher.subsampling_credit(0.0, 1.0), "sampling_rate"),
        (lambda x: fisher.subsampling_credit(0.1, 1.0, 1.0), "delta"),
        (lambda x: fisher.subsampling_credit(0.1, 0.0), "noise_multiplier"),
    ],
)
def test_numbers_out_of_range_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.asarray(truth(np.float32)))


def test_a_step_checks_its_arguments():
    model = models.mlp((5,), 3)
    params = model.init(jax.random.key(0), (6,))
    batch = Batch(jnp.zeros((2, 6)), jnp.zeros(2, int))
    with pytest.raises(ValueError, match="clip_norm"):
        fisher.dp_sgd_step(model, params, batch, clip_norm=0.0, noise_multiplier=1.0)
    with pytest.raises(ValueError, match="params do not fit"):
        wrong = Batch(jnp.zeros((2, 7)), batch.labels)
        fisher.dp_sgd_step(model, params, wrong, clip_norm=1.0, noise_multiplier=1.0)
