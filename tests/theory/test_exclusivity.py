"""Exclusivity states, the secure boundary, twins, and how often random batches are insecure."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import invjax
from invjax import Batch, gradients, models
from invjax.models.chain import Spec, chain_model
from invjax.theory.exclusivity import (
    exclusivity_probability,
    exclusivity_state,
    frozen_kernel,
    is_sufficient,
    secure_boundary,
    twin_batch,
)

SHAPE = (8, 8, 1)
state_of = jax.jit(exclusivity_state, static_argnums=0)


@functools.cache
def digits():
    return invjax.datasets.digits()


@functools.cache
def network(*widths, num_classes=10, seed=0):
    model = models.mlp(widths, num_classes, init="he")
    return model, model.init(jax.random.key(seed), SHAPE)


def batch_of(size, seed=0, num_classes=10):
    chosen = np.random.default_rng(seed).choice(1797, size, replace=False)
    batch = invjax.datasets.take(digits(), chosen)
    return batch._replace(labels=batch.labels % num_classes)


def sharing(size, num_classes):
    """Samples that share all patterns of a 64-16-K network, with different labels."""
    model, params = network(16, num_classes=num_classes)
    center = batch_of(1, seed=3).inputs
    change = 2e-3 * jax.random.normal(jax.random.key(5), (size, *SHAPE))
    batch = Batch(center + change, jnp.arange(size) % num_classes)
    active = (
        np.asarray(model.layers(params)[1].weight).T @ np.asarray(batch.inputs).reshape(size, 64).T
    )
    assert ((active > 0) == (active[:, :1] > 0)).all()
    return model, params, batch


@functools.partial(jax.jit, static_argnums=0)
def flat_gradient(model, params, batch):
    found = jax.tree.leaves(jax.grad(model.loss)(params, batch))
    return jnp.concatenate([leaf.ravel() for leaf in found])


def gradient_difference(model, params, one, other):
    """Largest difference of gradients, over the largest entry, in float64."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
        first, second = (
            flat_gradient(model, params, Batch(np.asarray(inputs, np.float64), np.asarray(labels)))
            for inputs, labels in (one, other)
        )
        assert first.dtype == jnp.float64
        return float(jnp.abs(first - second).max() / jnp.abs(first).max())


def rms(one, other):
    return np.sqrt(np.mean(np.square(np.asarray(one.inputs, float) - np.asarray(other.inputs))))


def moves(one, other):
    """Largest change of an input value, a sample."""
    change = np.asarray(other.inputs, float) - np.asarray(one.inputs)
    return np.abs(change).max(axis=(1, 2, 3))


def test_the_state_counts_neurons_that_one_sample_activates():
    rng = np.random.default_rng(0)
    model, params = network(30, 20)
    inputs = rng.uniform(size=(5, *SHAPE)).astype(np.float32)
    values, counts = inputs.reshape(5, 64), []
    for name in ("layer01", "layer02"):
        values = np.maximum(values @ params[name]["kernel"] + params[name]["bias"][None], 0)
        alone = (values > 0).sum(axis=0) == 1
        counts.append([int(((row > 0) & alone).sum()) for row in values])
    found = state_of(model, params, inputs)
    assert np.array(counts).sum() > 5 and found.dtype == jnp.int32
    np.testing.assert_array_equal(found, counts)
    # The same under vmap over batches, and of each batch alone.
    many = jnp.asarray(rng.uniform(size=(3, 4, *SHAPE)), jnp.float32)
    together = jax.jit(jax.vmap(lambda inputs: exclusivity_state(model, params, inputs)))(many)
    alone = [state_of(model, params, inputs) for inputs in many]
    np.testing.assert_array_equal(together, np.stack(alone))


def test_in_a_batch_of_one_every_active_neuron_is_exclusive():
    model, params = network(30, 20)
    assert (state_of(model, params, batch_of(1).inputs) > 5).all()
    # Two equal samples own nothing.
    twice = jnp.repeat(batch_of(1).inputs, 2, axis=0)
    assert not state_of(model, params, twice).any()


def test_of_a_convolutional_network_the_dense_head_counts():
    layers = [
        Spec("conv", 4, 3, 2, 1, "relu"),
        Spec("flatten"),
        Spec("dense", 40, activation="relu"),
    ]
    model = chain_model([*layers, Spec("dense", 10)], 10, "conv")
    params, batch = model.init(jax.random.key(0), SHAPE), batch_of(4)
    # The head's first layer, from the model itself: derivative by its bias.
    each = jax.jit(gradients.per_sample_gradients, static_argnums=0)
    active = each(model, params, batch)["layer02"]["bias"]
    alone = (active != 0) & ((active != 0).sum(axis=0, keepdims=True) == 1)
    found = state_of(model, params, batch.inputs)
    assert found.shape == (1, 4) and found.sum() > 0
    np.testing.assert_array_equal(found[0], alone.sum(axis=1))


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ([[2, 2]], True),
        ([[2, 1]], False),
        ([[1, 1], [2, 2]], True),
        ([[2, 2], [1, 2]], False),
        ([[0, 9], [9, 9]], False),
        ([[9, 9], [0, 9], [9, 9]], False),
    ],
)
def test_sufficiency_asks_two_at_the_top_and_one_below(state, expected):
    assert bool(jax.jit(is_sufficient)(jnp.array(state))) == expected


@pytest.mark.parametrize(("widths", "size"), [((16,), 20), ((8, 12), 12)])
def test_a_batch_larger_than_the_first_layer_has_twins_of_any_size(widths, size):
    (model, params), batch = network(*widths), batch_of(size)
    boundary = secure_boundary(model, params, batch)
    assert boundary.signal_rank <= widths[0] < size and boundary.weight_rank == widths[0]
    assert boundary.secure
    for change, tolerance in ((0.1, 1e-14), (1.0, 1e-12), (100.0, 1e-10)):
        twin = twin_batch(jax.random.key(1), model, params, batch, change)
        # Of NumPy: a double-precision array of JAX's would warn where these are off.
        assert isinstance(twin.inputs, np.ndarray) and twin.inputs.dtype == np.float64
        assert gradient_difference(model, params, batch, twin) < tolerance
        np.testing.assert_allclose(rms(batch, twin), change, rtol=1e-12)
        np.testing.assert_array_equal(moves(batch, twin) > 1e-5 * change, boundary.hidden)
        # Any other change of this size is seen.
        other = np.random.default_rng(2).normal(size=batch.inputs.shape) * change
        elsewhere = batch._replace(inputs=np.asarray(batch.inputs) + other)
        assert gradient_difference(model, params, batch, elsewhere) > 1e-2


def test_twins_depend_on_the_key():
    (model, params), batch = network(16), batch_of(20)
    first, again, second = (
        twin_batch(jax.random.key(seed), model, params, batch).inputs for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(np.asarray(first) - np.asarray(second)).max() > 0.1


@pytest.mark.parametrize(
    ("num_classes", "size"), [(2, 2), (3, 2), (3, 3), (5, 4), (5, 5), (2, 3), (5, 6)]
)
def test_samples_that_share_patterns_hide_where_there_are_as_many_as_classes(num_classes, size):
    model, params, batch = sharing(size, num_classes)
    boundary = secure_boundary(model, params, batch)
    kernel = frozen_kernel(model, params, batch)
    assert boundary.signal_rank == min(size, num_classes - 1)
    assert boundary.secure == (size >= num_classes)
    assert kernel.dimension >= boundary.kernel_dimension
    if size < num_classes:
        assert kernel.dimension == boundary.kernel_dimension == 0
        with pytest.raises(ValueError, match=f"its {size} first-layer signals are linearly"):
            twin_batch(jax.random.key(0), model, params, batch)
        return
    # All but what the logits see, for every dependency.
    free = size - num_classes + 1
    assert boundary.kernel_dimension == free * (64 - 16)
    assert kernel.dimension == free * (64 - num_classes)
    twin = twin_batch(jax.random.key(0), model, params, batch, 10.0)
    assert gradient_difference(model, params, batch, twin) < 1e-11
    assert boundary.hidden.all()


def test_only_those_that_share_move():
    # Two that share their patterns, and two that own neurons of the first layer.
    model, params, pair = sharing(2, 2)
    for seed in range(200):
        others = batch_of(2, seed, num_classes=2)
        batch = jax.tree.map(lambda *parts: jnp.concatenate(parts), pair, others)
        state = state_of(model, params, batch.inputs)
        if (state[0, 2:] > 0).all():
            break
    boundary = secure_boundary(model, params, batch)
    assert boundary.signal_rank == 3 and boundary.secure
    np.testing.assert_array_equal(boundary.hidden, [True, True, False, False])
    assert frozen_kernel(model, params, batch).dimension == 62
    twin = twin_batch(jax.random.key(0), model, params, batch, 10.0)
    assert gradient_difference(model, params, batch, twin) < 1e-11
    moved = moves(batch, twin)
    assert (moved[:2] > 1).all() and (moved[2:] < 1e-6).all()


def test_where_every_sample_owns_a_first_layer_neuron_there_is_no_twin():
    model, params = network(48)
    batches = [batch_of(4, seed) for seed in range(20)]
    owners = [b for b in batches if (state_of(model, params, b.inputs)[0] >= 1).all()]
    assert len(owners) >= 3
    for batch in owners[:3]:
        boundary = secure_boundary(model, params, batch)
        # The first weight has a null space: exclusivity alone decides.
        assert (boundary.signal_rank, boundary.weight_rank) == (4, 48)
        assert not boundary.secure and boundary.kernel_dimension == 0
        assert not boundary.hidden.any()
        assert frozen_kernel(model, params, batch).dimension == 0
        with pytest.raises(ValueError, match="as they are where every sample has an exclusive"):
            twin_batch(jax.random.key(0), model, params, batch)


def test_no_exclusive_neuron_is_no_security():
    model, params = network(16)
    found = [batch_of(6, seed) for seed in range(300)]
    states = jax.jit(jax.vmap(lambda inputs: exclusivity_state(model, params, inputs)))(
        jnp.stack([batch.inputs for batch in found])
    )
    chosen = np.flatnonzero(np.asarray(states).sum(axis=(1, 2)) == 0)
    assert len(chosen) >= 3
    empty = []
    for index in chosen[:3]:
        boundary = secure_boundary(model, params, found[index])
        assert boundary.secure == (boundary.signal_rank < 6)
        empty.append(frozen_kernel(model, params, found[index]).dimension == 0)
        assert empty[-1] == (boundary.signal_rank == 6)
    assert any(empty)


def test_a_wide_first_layer_sees_every_direction():
    # More samples than units that are ever active, yet the first weight has full rank.
    (model, params), batch = network(70), batch_of(80)
    boundary = secure_boundary(model, params, batch)
    assert boundary.signal_rank < 80 and boundary.weight_rank == 64 and not boundary.secure
    with pytest.raises(ValueError, match=r"the first weight, \(64, 70\), sees every direction"):
        twin_batch(jax.random.key(0), model, params, batch)


@pytest.mark.parametrize(
    ("widths", "size", "bias"),
    [((6,), 8, True), ((5, 7), 7, True), ((9,), 4, True), ((6,), 8, False)],
)
def test_the_frozen_kernel_is_that_of_the_derivatives_of_gradient_and_logits(widths, size, bias):
    rng = np.random.default_rng(1)
    model = models.mlp(widths, 3, bias=bias, init="he")
    params = model.init(jax.random.key(2), (10,))
    inputs = rng.uniform(-1, 1, size=(size, 10)).astype(np.float32)
    batch = Batch(jnp.asarray(inputs), jnp.arange(size) % 3)
    kernel = frozen_kernel(model, params, batch)
    assert kernel.basis.shape == (kernel.dimension, size, 10)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
        inputs = jnp.asarray(inputs, jnp.float64)

        @jax.jit
        @jax.jacfwd
        def jacobian(inputs):
            found = jax.grad(model.loss)(exact, batch._replace(inputs=inputs))
            return [*jax.tree.leaves(found), model.apply(exact, inputs)]

        rows = [np.reshape(leaf, (-1, size * 10)) for leaf in jacobian(inputs)]
    matrix = np.concatenate(rows)
    assert kernel.dimension == size * 10 - np.linalg.matrix_rank(matrix, rtol=1e-9)
    flat = kernel.basis.reshape(kernel.dimension, size * 10)
    np.testing.assert_allclose(matrix @ flat.T, 0, atol=1e-12)
    np.testing.assert_allclose(flat @ flat.T, np.eye(kernel.dimension), atol=1e-12)
    boundary = secure_boundary(model, params, batch)
    assert kernel.dimension >= boundary.kernel_dimension


def test_finite_moves_in_the_frozen_kernel_keep_the_gradient_until_a_neuron_flips():
    (model, params), batch = network(8), batch_of(10)
    kernel, boundary = frozen_kernel(model, params, batch), secure_boundary(model, params, batch)
    assert kernel.dimension > boundary.kernel_dimension >= 112
    # Directions that first-layer neurons do see.
    weight = np.asarray(params["layer01"]["kernel"], float)
    seen = np.abs(kernel.basis.reshape(-1, 10, 64) @ weight).max(axis=(1, 2))
    index = int(np.argmax(seen))
    assert seen[index] > 1e-2
    inputs = np.asarray(batch.inputs, float)

    def difference(size):
        moved = batch._replace(inputs=inputs + size * kernel.basis[index])
        return gradient_difference(model, params, batch, moved)

    assert difference(1e-3) < 1e-13 and difference(100.0) > 1e-3


def test_saturated_samples_are_hidden():
    model, params, batch = sharing(2, 3)
    assert not secure_boundary(model, params, batch).secure
    # A last bias that makes the first label certain.
    params = {**params, "layer02": {**params["layer02"], "bias": jnp.array([60.0, 0.0, 0.0])}}
    boundary = secure_boundary(model, params, batch)
    assert boundary.secure and boundary.signal_rank == 1
    np.testing.assert_array_equal(boundary.hidden, [True, False])


# Shares of random batches of digits that have sufficient exclusivity, at initialization.
FIGURES = [
    ((128,), 4, 0.71),
    ((512,), 8, 0.52),
    ((2048,), 8, 0.95),
    ((256, 256), 8, 0.03),
]


def test_width_and_small_batches_make_batches_insecure():
    found = {}
    for widths, size, expected in FIGURES:
        model, params = network(*widths)
        result = exclusivity_probability(
            jax.random.key(1), model, params, digits().inputs, size, 300
        )
        found[widths, size] = float(result.probability)
        assert result.mean_counts.shape == (len(widths),)
        assert abs(found[widths, size] - expected) < 0.2, (widths, size, found)
    assert found[(256, 256), 8] < found[(512,), 8] < found[(2048,), 8]


def test_probabilities_are_shares_of_draws_without_replacement():
    model, params = network(24, 20)
    inputs = batch_of(3).inputs
    # All samples in every batch: the state of that batch.
    state = state_of(model, params, inputs)
    found = exclusivity_probability(jax.random.key(0), model, params, inputs, 3, 5)
    assert float(found.probability) == float(is_sufficient(state))
    np.testing.assert_allclose(found.mean_counts, state.mean(axis=1), rtol=1e-6)
    # Of three samples there are three pairs.
    pairs = [inputs[jnp.array(pair)] for pair in ((0, 1), (0, 2), (1, 2))]
    states = [state_of(model, params, pair) for pair in pairs]
    expected = np.mean([bool(is_sufficient(state)) for state in states])
    counts = np.mean([state.mean(axis=1) for state in states], axis=0)
    found = exclusivity_probability(jax.random.key(0), model, params, inputs, 2, 4000)
    np.testing.assert_allclose(found.probability, expected, atol=0.04)
    np.testing.assert_allclose(found.mean_counts, counts, rtol=0.02)


def test_probabilities_over_training_in_one_call():
    model, params = network(128)
    batch = batch_of(200)
    course, steps = [params], jax.jit(gradients.gradient, static_argnums=0)
    for _ in range(60):
        update = steps(model, course[-1], batch)
        course.append(jax.tree.map(lambda leaf, step: leaf - 0.5 * step, course[-1], update))
    snapshots = jax.tree.map(lambda *leaves: jnp.stack(leaves), course[0], course[-1])
    over = jax.vmap(exclusivity_probability, (None, None, 0, None, None, None))
    found = over(jax.random.key(0), model, snapshots, digits().inputs, 4, 200)
    alone = [
        exclusivity_probability(jax.random.key(0), model, point, digits().inputs, 4, 200)
        for point in (course[0], course[-1])
    ]
    np.testing.assert_allclose(found.probability, [one.probability for one in alone])
    # Training made batches of four more secure.
    assert found.probability[1] < found.probability[0]


CALLS = {
    "draws": lambda model, params, batch, **settings: exclusivity_probability(
        jax.random.key(0), model, params, batch.inputs, **{"batch_size": 2, **settings}
    ),
    "twin": lambda model, params, batch, **settings: twin_batch(
        jax.random.key(0), model, params, batch, **settings
    ),
    "state": lambda model, params, batch: exclusivity_state(model, params, batch.inputs),
    "boundary": secure_boundary,
    "kernel": frozen_kernel,
}


@pytest.mark.parametrize(
    ("call", "settings", "message"),
    [
        ("draws", {"batch_size": 5}, r"batch_size must be a whole number in \[1, 4\], got 5"),
        ("draws", {"batch_size": 2.5}, r"batch_size must be a whole number in \[1, 4\], got 2.5"),
        ("draws", {"num_batches": 0}, "num_batches must be a whole number of at least 1, got 0"),
        ("twin", {"size": 0.0}, r"size must lie in \(0.0, inf\), got 0.0"),
        ("boundary", {"tolerance": np.nan}, r"tolerance must lie in \[0.0, 1.0\), got nan"),
        ("kernel", {"tolerance": 1.0}, r"tolerance must lie in \[0.0, 1.0\), got 1.0"),
    ],
)
def test_numbers_out_of_range_are_named(call, settings, message):
    model, params = network(16)
    with pytest.raises(ValueError, match=message):
        CALLS[call](model, params, batch_of(4), **settings)


@pytest.mark.parametrize(
    ("call", "model", "message"),
    [
        ("state", models.mlp(()), "the dense head of mlp has none"),
        ("draws", models.mlp((4,), activation="tanh"), "mlp must have the activations"),
        ("state", models.convnet(8), "has no layer view"),
        ("boundary", models.cnn(), "cnn must be fully connected, got a layer conv"),
        ("kernel", models.mlp((4,), num_classes=1), "got a single logit"),
    ],
)
def test_models_of_another_kind_are_refused(call, model, message):
    params = model.init(jax.random.key(0), SHAPE) if model.layers else {}
    batch = batch_of(4, num_classes=2)
    with pytest.raises(ValueError, match=message):
        CALLS[call](model, params, batch)


def test_batches_and_parameters_must_fit():
    (model, params), batch = network(16), batch_of(4)
    with pytest.raises(ValueError, match=r"batch.labels must lie in \[0, 9\]"):
        secure_boundary(model, params, batch._replace(labels=batch.labels + 99))
    with pytest.raises(ValueError, match="params do not fit the model mlp"):
        frozen_kernel(model, {}, batch)
