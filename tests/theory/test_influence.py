"""The inversion influence function against dense linear algebra, closed forms and real attacks."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import invjax
from invjax import conv, gradients, models, theory
from invjax.base import Batch, Model

SHAPES = {"mlp": (6,), "lenet": (8, 8, 1)}


def cast(tree, dtype=jnp.float64):
    floats = (jnp.float32, jnp.float64)
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf, dtype) if leaf.dtype in floats else leaf, tree
    )


def case(name="mlp", size=2, seed=0, soft=False):
    """A smooth model with its parameters, and a batch; float64 where that is enabled."""
    model = models.mlp((7,), 3, "tanh") if name == "mlp" else models.lenet(3, width=4)
    rng = np.random.default_rng(seed)
    inputs = rng.uniform(size=(size, *SHAPES[name])).astype(np.float32)
    labels = rng.dirichlet(np.ones(3), size) if soft else rng.integers(0, 3, size)
    labels = jnp.asarray(labels, jnp.float32 if soft else jnp.int32)
    params = model.init(jax.random.key(seed), SHAPES[name])
    batch = Batch(jnp.asarray(inputs), labels)
    dtype = jnp.result_type(float)
    return model, cast(params, dtype), cast(batch, dtype)


def run(call, model, *args, **settings):
    """A function of the theory, compiled."""
    return jax.jit(functools.partial(getattr(theory, call), model, **settings))(*args)


def flat_gradient(model, params, batch):
    model = conv.for_matching(model)

    def gradient(inputs):
        inputs = inputs.reshape(batch.inputs.shape)
        return ravel_pytree(jax.grad(model.loss)(params, batch._replace(inputs=inputs)))[0]

    return gradient


def dense_jacobian(model, params, batch):
    gradient = flat_gradient(model, params, batch)
    return np.asarray(jax.jit(jax.jacfwd(gradient))(batch.inputs.ravel()))


def perturbation(params, seed=0, std=1.0):
    draws = np.random.default_rng(seed).normal(size=ravel_pytree(params)[0].size) * std
    return jnp.asarray(draws, ravel_pytree(params)[0].dtype), ravel_pytree(params)[1]


def linear(matrix):
    """A model whose gradient is the mean of `matrix @ x` over the samples."""
    rows = matrix.shape[0]

    def loss(params, batch):
        return jnp.mean(batch.inputs @ jnp.asarray(matrix).T, axis=0) @ params

    def apply(params, inputs):
        return jnp.sum(params) * jnp.sum(inputs, axis=1, keepdims=True)

    return Model(lambda key, shape: jnp.zeros(rows), apply, loss, num_classes=1)


def linear_case(rows=9, columns=5, size=1, seed=0, singular_values=None):
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(rows, columns))
    if singular_values is not None:
        left, _, right = np.linalg.svd(matrix, full_matrices=False)
        matrix = left * np.asarray(singular_values)[None] @ right
    batch = Batch(jnp.asarray(rng.normal(size=(size, columns))), jnp.zeros(size, jnp.int32))
    return matrix, linear(matrix), jnp.zeros(rows), batch


def covariance(size, seed=0, rank=None):
    root = np.random.default_rng(seed).normal(size=(size, rank or size))
    return root @ root.T


# The displacement.


@pytest.mark.parametrize(
    ("name", "size", "soft", "damping", "dtype"),
    [
        ("mlp", 1, False, 0.0, jnp.float64),
        ("mlp", 4, True, 0.03, jnp.float64),
        ("lenet", 2, False, 0.0, jnp.float32),
    ],
)
def test_influence_is_the_dense_solution(name, size, soft, damping, dtype):
    with jax.enable_x64(True):
        model, params, batch = case(name, size, soft=soft)
        delta, unravel = perturbation(params)
        jacobian = dense_jacobian(model, params, batch)
        gram = jacobian.T @ jacobian + damping * np.eye(jacobian.shape[1])
        expected = np.linalg.solve(gram, jacobian.T @ delta)
        arguments = cast((params, batch, unravel(delta)), dtype)
        wide = dtype == jnp.float64
        settings = {"damping": damping, "tolerance": 1e-13 if wide else 1e-6}
        found = run("influence", model, *arguments, **settings)
        assert found.displacement.shape == batch.inputs.shape
        assert found.displacement.dtype == found.residual.dtype == dtype
        error = np.linalg.norm(found.displacement.ravel() - expected) / np.linalg.norm(expected)
        assert error < (1e-10 if wide else 1e-4) and found.residual < (1e-11 if wide else 1e-4)


def test_a_linear_gradient_is_inverted_exactly():
    with jax.enable_x64(True):
        matrix, model, params, batch = linear_case()
        delta, _ = perturbation(params)
        observed = gradients.gradient(model, params, batch) + delta
        attack = np.linalg.lstsq(matrix, np.asarray(observed))[0]
        found = run("influence", model, params, batch, delta, tolerance=1e-14)
        np.testing.assert_allclose(batch.inputs[0] + found.displacement[0], attack, rtol=1e-10)


def test_what_the_gradient_does_not_determine_stays_where_it_is():
    with jax.enable_x64(True):
        # Two samples whose gradient is that of their mean: the least norm moves both alike.
        matrix, model, params, batch = linear_case(size=2)
        delta, _ = perturbation(params)
        moved = run("influence", model, params, batch, delta, tolerance=1e-14).displacement
        np.testing.assert_allclose(moved[0], moved[1], rtol=1e-10)
        np.testing.assert_allclose(moved[0], np.linalg.pinv(matrix) @ delta, rtol=1e-10)


def test_no_perturbation_moves_nothing():
    model, params, batch = case()
    found = run("influence", model, params, batch, jax.tree.map(jnp.zeros_like, params))
    assert not found.displacement.any() and found.residual == 0


def test_a_solve_that_ran_out_of_steps_shows_in_the_residual():
    model, params, batch = case()
    delta, unravel = perturbation(params)
    found = run("influence", model, params, batch, unravel(delta), num_steps=3)
    assert found.residual > 1e-2


# The lower bound.


def test_the_lower_bound_is_below_the_influence():
    model, params, batch = case(size=3)
    flat, unravel = perturbation(params)

    @jax.jit
    def both(key, damping):
        keys = jax.random.split(key, 3)
        random = jax.random.normal(keys[0], (100, flat.size))
        sparse = random * jax.random.bernoulli(keys[1], 0.05, random.shape)
        weights = model.init(keys[2], SHAPES["mlp"])

        def one(delta):
            delta = unravel(delta)
            moved = theory.influence(model, weights, batch, delta, damping=damping)
            bound = theory.lower_bound(model, weights, batch, delta, damping=damping)
            return bound, jnp.linalg.norm(moved.displacement.ravel())

        return jax.vmap(one)(jnp.concatenate([random, sparse]))

    for seed, damping in enumerate([0.0, 0.0, 0.0, 0.01, 1.0]):
        bounds, norms = both(jax.random.key(seed), damping)
        assert (bounds <= norms).all() and (bounds > 0).any()


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_the_lower_bound_is_reached_along_the_largest_eigenvector(damping):
    with jax.enable_x64(True):
        model, params, batch = case()
        left, values, _ = np.linalg.svd(dense_jacobian(model, params, batch))
        delta = perturbation(params)[1](jnp.asarray(left[:, 0]))
        bound = run("lower_bound", model, params, batch, delta, damping=damping)
        moved = run("influence", model, params, batch, delta, damping=damping, tolerance=1e-13)
        norm = np.linalg.norm(moved.displacement)
        np.testing.assert_allclose(norm, values[0] / (values[0] ** 2 + damping), rtol=1e-10)
        np.testing.assert_allclose(bound, norm, rtol=1e-10)
        assert bound <= norm


SPECTRA = {
    "spread": np.linspace(0, 1, 200),
    "pair": np.r_[1.0, np.full(198, 0.999), 0.0],
    "decay": 0.9 ** np.arange(200),
    "alone": np.r_[1.0, np.zeros(199)],
    "flat": np.ones(200),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("num_steps", [14, 64])
def test_the_eigenvalue_is_bounded_from_above(name, num_steps):
    with jax.enable_x64(True):
        values = np.sqrt(SPECTRA[name])
        _, model, params, batch = linear_case(200, 200, singular_values=values)
        find = functools.partial(run, "largest_eigenvalue", model, params, batch)
        keys = jax.random.split(jax.random.key(1), 50)
        found = jax.vmap(lambda key: find(num_steps=num_steps, key=key))(keys)
        gap = (np.log(1.648 * np.sqrt(200) / 1e-6) / (2 * num_steps - 1)) ** 2
        assert (found >= 1 - 1e-12).all()
        assert (found <= 1.00001 / (1 - gap)).all()


def test_as_many_steps_as_inputs_find_the_eigenvalue():
    with jax.enable_x64(True):
        model, params, batch = case()
        expected = np.linalg.norm(dense_jacobian(model, params, batch), 2) ** 2
        found = run("largest_eigenvalue", model, params, batch, num_steps=1000)
        np.testing.assert_allclose(found, expected, rtol=1e-10)
        assert found >= expected


# The mean under noise.


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("rows", [9, 3])
def test_linear_gaussian_posterior(rows, rank):
    with jax.enable_x64(True):
        matrix, model, params, batch = linear_case(rows)
        prior, std = covariance(5, rank=rank), 0.7
        gain = prior @ matrix.T @ np.linalg.inv(matrix @ prior @ matrix.T + std**2 * np.eye(rows))
        expected = np.trace(prior - gain @ matrix @ prior)
        find = functools.partial(run, "expected_squared_error", model, params, batch, std)
        np.testing.assert_allclose(find(prior_covariance=prior).total, expected, rtol=1e-10)
        probed = find(prior_covariance=prior, method="hutchinson", num_probes=2000, tolerance=1e-12)
        assert abs(probed.total - expected) < 4 * probed.standard_error
        assert probed.standard_error < 0.05 * expected and probed.residual < 1e-10


@pytest.mark.parametrize(("prior", "size"), [(False, 1), (False, 3), (True, 3)])
def test_expected_error_is_the_dense_trace(prior, size):
    with jax.enable_x64(True):
        model, params, batch = case(size=size)
        std, sigma = 0.02, 0.1 * covariance(6)
        jacobian = dense_jacobian(model, params, batch)
        information = jacobian.T @ jacobian
        settings = {"prior_covariance": sigma} if prior else {}
        if prior:
            information = information + std**2 * np.kron(np.eye(size), np.linalg.inv(sigma))
        inverse = std**2 * np.linalg.inv(information)
        find = functools.partial(
            run, "expected_squared_error", model, params, batch, std, **settings
        )
        exact, probed = find(), find(method="hutchinson", num_probes=1000, tolerance=1e-10)
        np.testing.assert_allclose(exact.total, np.trace(inverse), rtol=1e-8)
        assert exact.standard_error == exact.residual == 0
        assert abs(probed.total - np.trace(inverse)) < 4 * probed.standard_error
        # Random signs: twice the squares off the diagonal (of the whitened trace, where there is a prior).
        variance = 2 * (np.sum(inverse**2) - np.sum(np.diag(inverse) ** 2))
        np.testing.assert_allclose(probed.standard_error, np.sqrt(variance / 1000), rtol=0.15)


@pytest.mark.parametrize(("rows", "size"), [(3, 1), (9, 2)])
def test_inputs_that_are_not_determined_have_no_finite_error(rows, size):
    _, model, params, batch = linear_case(rows, size=size)
    assert run("expected_squared_error", model, params, batch, 0.1).total == np.inf
    probed = run(
        "expected_squared_error", model, params, batch, 0.1, method="hutchinson", num_steps=50
    )
    assert not probed.residual < 0.1


def test_a_prior_only_helps_and_a_wide_one_says_nothing():
    model, params, batch = case()
    find = functools.partial(run, "expected_squared_error", model, params, batch, 0.02)
    without = find().total
    errors = [find(prior_covariance=scale * np.eye(6)).total for scale in (1e-6, 1e-2, 1e6)]
    assert errors[0] < errors[1] < without
    np.testing.assert_allclose(errors[0], 12 * 1e-6, rtol=1e-2)
    np.testing.assert_allclose(errors[2], without, rtol=1e-3)


def test_decibels():
    image = jnp.zeros((2, 4, 4, 1))
    noisy = image + 0.3
    expected = invjax.metrics.psnr(noisy, image, data_range=2.0)
    found = theory.expected_psnr(jnp.sum(jnp.square(noisy)), noisy.size, data_range=2.0)
    np.testing.assert_allclose(found, np.mean(expected), rtol=1e-6)


# Real attacks (acceptance check: attack / influence within 5 %).


def gauss_newton(model, params, batch, observed, num_steps=12):
    """A local minimum of the squared distance to the observed gradient, from the truth."""
    gradient = flat_gradient(model, params, batch)

    def misfit(inputs):
        return jnp.sum((gradient(inputs) - observed) ** 2) / 2

    def step(_, inputs):
        jacobian = jax.jacfwd(gradient)(inputs)
        slope = jacobian.T @ (gradient(inputs) - observed)
        return inputs - jnp.linalg.solve(jacobian.T @ jacobian, slope)

    start = batch.inputs.ravel()
    end = jax.lax.fori_loop(0, num_steps, step, start)
    ends = jnp.stack([start, end])
    return end - start, jax.lax.map(jax.value_and_grad(misfit), ends)


@pytest.mark.parametrize(
    ("model", "size"),
    [
        pytest.param(models.mlp((128,), activation="tanh"), 1, id="tanh mlp"),
        pytest.param(models.mlp((60, 60), activation="tanh"), 3, id="deep", marks=pytest.mark.slow),
        pytest.param(models.lenet(), 1, id="sigmoid lenet", marks=pytest.mark.slow),
    ],
)
def test_real_attacks_on_digits_go_where_it_says(model, size):
    digits = invjax.datasets.load("digits")
    with jax.enable_x64(True):
        params = cast(model.init(jax.random.key(0), (8, 8, 1)))
        unravel = perturbation(params)[1]

        def victim(index):
            chosen = slice(index * size, (index + 1) * size)
            inputs, labels = digits.inputs[chosen], digits.labels[chosen]
            return Batch(jnp.asarray(inputs, jnp.float64), jnp.asarray(labels))

        @jax.jit
        def compare(batch, delta, std):
            clean = flat_gradient(model, params, batch)(batch.inputs.ravel())
            attack = gauss_newton(model, params, batch, clean + delta)
            moved = theory.influence(model, params, batch, unravel(delta), tolerance=1e-10)
            bound = theory.lower_bound(model, params, batch, unravel(delta))
            mean = theory.expected_squared_error(model, params, batch, std).total
            return attack, moved.displacement.reshape(-1), bound, mean

        for std in (1e-3, 3e-3):
            results = [compare(victim(i), perturbation(params, i, std)[0], std) for i in range(6)]
            (found, (misfits, slopes)), moved, bounds, means = jax.tree.map(
                lambda *leaves: np.stack(leaves), *results
            )
            slopes = np.linalg.norm(slopes, axis=2)
            assert (slopes[:, 1] < 1e-7 * slopes[:, 0]).all()
            assert (misfits[:, 1] < misfits[:, 0]).all()
            squares, influences = (np.sum(each**2, axis=1) for each in (found, moved))
            assert abs(squares.sum() / influences.sum() - 1) < 0.05
            # Not only as far: every victim in its direction.
            assert (np.sum((found - moved) ** 2, axis=1) < 0.01 * influences).all()
            assert (bounds <= np.sqrt(influences)).all() and (bounds <= np.sqrt(squares)).all()
            np.testing.assert_allclose(squares.sum() / means.sum(), 1, atol=0.25)


# Transformations and refusals.


def test_jit_and_vmap_over_victims():
    model, params, _ = case()
    batches = [case(seed=seed)[2] for seed in range(3)]
    deltas = [perturbation(params, seed)[1](perturbation(params, seed)[0]) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *deltas)

    def everything(batch, delta, damping, std):
        perturbed = model, params, batch, delta
        noisy = model, params, batch, std
        return (
            theory.influence(*perturbed, damping=damping),
            theory.lower_bound(*perturbed, damping=damping),
            theory.expected_squared_error(*noisy),
            theory.expected_squared_error(*noisy, prior_covariance=jnp.eye(6), method="hutchinson"),
        )

    traced = chex.assert_max_traces(everything, n=1)
    many = jax.jit(jax.vmap(traced, in_axes=(0, 0, None, None)))
    found = many(stacked, together, 0.1, 0.05)
    many(stacked, together, 0.2, 0.06)
    everything = jax.jit(everything)
    for index, (batch, delta) in enumerate(zip(batches, deltas, strict=True)):
        alone = everything(batch, delta, 0.1, 0.05)
        here = jax.tree.map(lambda leaf, i=index: leaf[i], found)
        # Residuals are rounding, and rounding differs.
        chex.assert_trees_all_close(here, alone, rtol=1e-3, atol=1e-5)


def test_products_are_exact_on_accelerators_too():
    model, params, batch = case()
    prior = jnp.eye(6)

    def everything(batch, delta):
        noisy = model, params, batch, 0.1
        return (
            theory.influence(model, params, batch, delta),
            theory.lower_bound(model, params, batch, delta),
            theory.expected_squared_error(*noisy, prior_covariance=prior),
            theory.expected_squared_error(*noisy, prior_covariance=prior, method="hutchinson"),
        )

    program = str(jax.make_jaxpr(everything)(batch, params))
    assert program.count("dot_general[") == program.count("precision=(Precision.HIGHEST") > 50


@pytest.mark.parametrize(
    ("call", "settings", "message"),
    [
        ("influence", {"damping": -0.1}, r"damping must lie in \[0.0, inf\], got -0.1"),
        ("lower_bound", {"damping": -0.1}, "damping must lie in"),
        ("influence", {"num_steps": 0}, "num_steps must lie in"),
        ("influence", {"tolerance": 0.0}, "tolerance must lie in"),
        ("lower_bound", {"num_steps": 5}, "num_steps must be at least 9 .* 12 inputs, got 5"),
        ("expected_squared_error", {"std": 0.0}, r"std must lie in \(0.0, inf\], got 0.0"),
        ("expected_squared_error", {"std": -1.0}, "std must lie in"),
        ("expected_squared_error", {"num_probes": 1}, "num_probes must be a whole number"),
        ("expected_squared_error", {"method": "exact"}, "method must be one of 'dense', 'hutch"),
        (
            "expected_squared_error",
            {"prior_covariance": np.eye(12)},
            r"prior_covariance must have shape \(6, 6\)",
        ),
        (
            "expected_squared_error",
            {"prior_covariance": np.triu(np.ones((6, 6)))},
            "prior_covariance must be symmetric",
        ),
        (
            "expected_squared_error",
            {"prior_covariance": -np.eye(6)},
            "without negative eigenvalues",
        ),
    ],
)
def test_refusals(call, settings, message):
    model, params, batch = case()
    arguments = [model, params, batch]
    if call == "expected_squared_error":
        settings = {"std": 0.1, **settings}
    else:
        arguments.append(params)
    with pytest.raises(ValueError, match=message):
        getattr(theory, call)(*arguments, **settings)


def test_shapes_that_do_not_fit():
    model, params, batch = case()
    wider = models.mlp((8,), 3, "tanh").init(jax.random.key(0), (6,))
    with pytest.raises(ValueError, match="perturbation must have the shapes of params"):
        theory.influence(model, params, batch, wider)
    with pytest.raises(ValueError, match="perturbation must have the shapes of params"):
        theory.lower_bound(model, params, batch, jax.tree.leaves(params))
    with pytest.raises(ValueError, match="params do not fit the model"):
        run("largest_eigenvalue", model, params, batch._replace(inputs=jnp.ones((2, 5))))
    with pytest.raises(ValueError, match=r"batch.inputs must be \[B, ...\] with B >= 1"):
        run("influence", model, params, batch._replace(inputs=jnp.ones((0, 6))), params)
    with pytest.raises(ValueError, match="data_range must lie in"):
        theory.expected_psnr(1.0, 12, data_range=0.0)
