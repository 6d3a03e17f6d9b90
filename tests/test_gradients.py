"""What leaves the client: the oracle and its derivative, clipped sums, federated updates."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

import invjax
from invjax import gradients
from invjax.base import Batch, LocalTraining, Model

CLASSES = 3


def dense_model():
    """Two dense layers, smooth, so that finite differences apply."""

    def init(rng, shape):
        return {"a": rng.normal(size=(*shape, 4)), "b": rng.normal(size=(4, 3)), "c": np.zeros(3)}

    def apply(params, x):
        return jnp.tanh(x @ params["a"]) @ params["b"] + params["c"][None]

    return model_of(init, apply), (5,)


def conv_model():
    """A `lax.conv`, a nonlinearity, a dense head."""

    def init(rng, shape):
        height, width, channels = shape
        kernel = rng.normal(size=(3, 3, channels, 2)) / 3
        return [kernel, rng.normal(size=(2 * height * width, CLASSES)) / 4]

    def apply(params, x):
        dimensions = ("NHWC", "HWIO", "NHWC")
        h = jax.lax.conv_general_dilated(x, params[0], (1, 1), "SAME", dimension_numbers=dimensions)
        return jax.nn.softplus(h).reshape(x.shape[0], -1) @ params[1]

    return model_of(init, apply), (4, 4, 1)


def model_of(init, apply):
    def loss(params, batch):
        logits = apply(params, batch.inputs)
        if jnp.issubdtype(batch.labels.dtype, jnp.integer):
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()
        return optax.softmax_cross_entropy(logits, batch.labels).mean()

    return Model(init, apply, loss, CLASSES)


def setting(make, size=4, soft=False, seed=0):
    """A model, parameters and a batch, drawn by NumPy in the default precision."""
    (model, shape), rng = make(), np.random.default_rng(seed)
    params = jax.tree.map(jnp.asarray, model.init(rng, shape))
    labels = rng.dirichlet(np.ones(CLASSES), size) if soft else rng.integers(0, CLASSES, size)
    return model, params, Batch(jnp.asarray(rng.normal(size=(size, *shape))), jnp.asarray(labels))


def assert_close(actual, desired, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda a, d: np.testing.assert_allclose(a, d, rtol, atol), actual, desired)


MODELS = pytest.mark.parametrize("make", [dense_model, conv_model])


# The oracle.


@MODELS
@pytest.mark.parametrize("soft", [False, True])
def test_the_oracle_is_the_gradient(make, soft):
    model, params, batch = setting(make, soft=soft)
    expected = jax.jit(jax.grad(model.loss))(params, batch)
    oracle = gradients.gradient_oracle(model.loss)
    assert_close(oracle(params, batch), expected)
    assert_close(jax.jit(oracle)(params, batch), expected)
    assert_close(jax.jit(gradients.gradient, static_argnums=0)(model, params, batch), expected)


@MODELS
def test_its_derivative_against_finite_differences(make):
    with jax.enable_x64(True):
        model, params, batch = setting(make, soft=True)
        check_grads(
            jax.jit(lambda params, batch: gradients.gradient(model, params, batch)),
            (params, batch),
            order=1,
            modes=("rev",),
            rtol=1e-6,
            atol=1e-6,
        )


def gradient_matching(oracle, target):
    """The attacker's objective: the distance of a candidate's gradient from the observed one."""

    def objective(params, batch):
        found = oracle(params, batch)
        return sum(
            jnp.sum(jnp.square(a - b))
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(target), strict=True)
        )

    return objective


@MODELS
@pytest.mark.parametrize("soft", [False, True])
def test_its_derivative_is_reverse_over_reverse(make, soft):
    with jax.enable_x64(True):
        model, params, batch = setting(make, soft=soft)
        target = jax.tree.map(jnp.ones_like, params)
        ours = gradient_matching(gradients.gradient_oracle(model.loss), target)
        textbook = gradient_matching(jax.grad(model.loss), target)

        def derivative(objective):
            if soft:
                return jax.jit(jax.grad(objective, argnums=(0, 1)))(params, batch)
            of_inputs = lambda p, x: objective(p, Batch(x, batch.labels))  # noqa: E731
            return jax.jit(jax.grad(of_inputs, argnums=(0, 1)))(params, batch.inputs)

        assert_close(derivative(ours), derivative(textbook), rtol=1e-10, atol=1e-10)


def test_integer_labels_are_held_fixed():
    model, params, batch = setting(dense_model)
    objective = gradient_matching(gradients.gradient_oracle(model.loss), params)
    cotangent = jax.jit(jax.grad(objective, argnums=1, allow_int=True))(params, batch)
    assert cotangent.inputs.shape == batch.inputs.shape
    assert cotangent.labels.dtype == jax.dtypes.float0


@MODELS
def test_the_derivative_under_vmap_and_pmap(make):
    model, params, _ = setting(make)
    batches = [setting(make, seed=seed)[2] for seed in range(8)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
    objective = gradient_matching(gradients.gradient_oracle(model.loss), params)

    def derivative(batch):
        return jax.grad(lambda x: objective(params, batch._replace(inputs=x)))(batch.inputs)

    single = jax.jit(derivative)
    looped = np.stack([single(batch) for batch in batches])
    np.testing.assert_allclose(jax.jit(jax.vmap(derivative))(stacked), looped, rtol=2e-4, atol=1e-5)
    assert jax.local_device_count() == 8
    spread = jax.pmap(derivative, devices=jax.local_devices())(stacked)
    np.testing.assert_allclose(spread, looped, rtol=2e-4, atol=1e-5)


# Per-sample gradients and their clipped sum.


@MODELS
@pytest.mark.parametrize("soft", [False, True])
def test_per_sample_gradients_are_a_loop_and_average_to_the_gradient(make, soft):
    model, params, batch = setting(make, soft=soft)
    found = jax.jit(gradients.per_sample_gradients, static_argnums=0)(model, params, batch)
    one = jax.jit(jax.grad(model.loss))
    looped = [one(params, jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], batch)) for i in range(4)]
    assert_close(found, jax.tree.map(lambda *leaves: np.stack(leaves), *looped))
    mean = jax.tree.map(lambda leaf: leaf.mean(axis=0), found)
    assert_close(mean, gradients.gradient(model, params, batch))


def test_per_sample_gradients_have_the_textbook_derivative():
    model, params, batch = setting(conv_model)

    def ours(inputs):
        found = gradients.per_sample_gradients(model, params, batch._replace(inputs=inputs))
        return gradients.clip_scale(found, 0.5).sum()

    def textbook(inputs):
        def one(sample):
            return jax.grad(model.loss)(params, jax.tree.map(lambda leaf: leaf[None], sample))

        return gradients.clip_scale(jax.vmap(one)(batch._replace(inputs=inputs)), 0.5).sum()

    assert_close(jax.jit(jax.grad(ours))(batch.inputs), jax.jit(jax.grad(textbook))(batch.inputs))


def naive_clipped_sum(model, params, batch, clip_norm):
    """In NumPy, sample by sample; and how many samples were clipped."""
    total, clipped = jax.tree.map(np.zeros_like, params), 0
    one = jax.jit(jax.grad(model.loss))
    for i in range(batch.inputs.shape[0]):
        found = one(params, jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], batch))
        norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(found)))
        clipped += norm > clip_norm
        scale = min(1.0, clip_norm / norm)
        total = jax.tree.map(lambda t, leaf, s=scale: t + s * np.asarray(leaf), total, found)
    return total, clipped


@MODELS
@pytest.mark.parametrize("microbatch_size", [None, 1, 2, 6])
def test_clipped_sum_is_the_naive_one(make, microbatch_size):
    model, params, batch = setting(make, size=6)
    norms = jax.jit(gradients.per_sample_gradients, static_argnums=0)(model, params, batch)
    norms = np.sqrt(
        sum(np.square(leaf).reshape(6, -1).sum(axis=1) for leaf in jax.tree.leaves(norms))
    )
    clip_norm = float(np.median(norms))
    expected, clipped = naive_clipped_sum(model, params, batch, clip_norm)
    assert 0 < clipped < 6
    clipped_sum = jax.jit(gradients.clipped_sum, static_argnums=(0, 3, 4))
    found = clipped_sum(model, params, batch, clip_norm, microbatch_size)
    assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_clip_scale_and_scale_samples():
    tree = {"a": jnp.array([[3.0], [0.3], [0.0]]), "b": jnp.array([[[4.0]], [[0.4]], [[0.0]]])}
    scale = gradients.clip_scale(tree, 1.0)
    np.testing.assert_allclose(scale, [0.2, 1.0, 1.0], rtol=1e-6)
    scaled = gradients.scale_samples(tree, scale)
    np.testing.assert_allclose(scaled["a"], [[0.6], [0.3], [0.0]], rtol=1e-6)
    np.testing.assert_allclose(scaled["b"], [[[0.8]], [[0.4]], [[0.0]]], rtol=1e-6)


def test_a_zero_gradient_is_finite_and_so_is_its_derivative():
    def total(tree):
        scale = gradients.clip_scale(tree, 1.0)
        scaled = gradients.scale_samples(tree, scale)
        return sum(leaf.sum() for leaf in jax.tree.leaves(scaled))

    tree = {"a": jnp.zeros((2, 3)), "b": jnp.stack([jnp.zeros(4), jnp.full(4, 5.0)])}
    value, derivative = jax.value_and_grad(total)(tree)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(derivative))
    np.testing.assert_allclose(derivative["a"][0], 1.0)  # not clipped: the identity


def test_clipped_sum_errors():
    model, params, batch = setting(dense_model, size=6)
    for clip_norm in (0.0, -1.0, np.nan):
        with pytest.raises(ValueError, match=f"clip_norm must be positive, got {clip_norm}"):
            gradients.clipped_sum(model, params, batch, clip_norm)
    for size in (4, 0, -2, 12):
        with pytest.raises(ValueError, match=f"divide the batch of 6 samples, got {size}"):
            gradients.clipped_sum(model, params, batch, 1.0, size)


# Federated updates.


def round_of(epochs=1, batch_size=4, num_samples=4, learning_rate=0.1, **kwargs):
    return LocalTraining(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        num_samples=num_samples,
        **kwargs,
    )


@MODELS
def test_one_full_step_is_the_gradient(make):
    model, params, batch = setting(make)
    update = gradients.federated_update(jax.random.key(1), model, params, batch, round_of())
    expected = jax.tree.map(lambda leaf: 0.1 * leaf, gradients.gradient(model, params, batch))
    assert_close(update, expected)


@pytest.mark.parametrize(
    ("size", "optimizer"), [(6, None), (7, None), (6, optax.adam(0.05)), (7, optax.adam(0.05))]
)
def test_epochs_of_mini_batches_are_a_plain_loop(size, optimizer):
    # 7 samples in mini-batches of 3: the last one is short and is kept.
    model, params, batch = setting(dense_model, size=size)
    local, key = round_of(epochs=3, batch_size=3, num_samples=size), jax.random.key(2)
    rule = optax.sgd(0.1) if optimizer is None else optimizer
    end, state, seen, slope = params, rule.init(params), [], jax.jit(jax.grad(model.loss))
    for epoch in range(3):
        order = np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), size))
        for chosen in np.split(order, range(3, size, 3)):
            seen.append(chosen)
            mini = Batch(batch.inputs[chosen], batch.labels[chosen])
            step, state = rule.update(slope(end, mini), state)
            end = jax.tree.map(jnp.add, end, step)
    assert len(seen) == local.num_steps
    np.testing.assert_array_equal(np.bincount(np.concatenate(seen)), 3)
    update = gradients.federated_update(key, model, params, batch, local, optimizer)
    assert_close(update, jax.tree.map(jnp.subtract, params, end), atol=2e-6)


def test_keys_decide_the_orders():
    model, params, batch = setting(dense_model, size=6)

    def update(seed, local):
        found = gradients.federated_update(jax.random.key(seed), model, params, batch, local)
        return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(found)])

    several = round_of(epochs=2, batch_size=2, num_samples=6)
    np.testing.assert_array_equal(update(0, several), update(0, several))
    assert np.abs(update(0, several) - update(1, several)).max() > 1e-4
    whole = round_of(epochs=2, batch_size=6, num_samples=6)
    np.testing.assert_allclose(update(0, whole), update(1, whole), rtol=1e-5, atol=1e-6)


def test_every_epoch_has_its_own_order():
    # At a tiny rate a step's gradient hardly moves, so an epoch's order shows in its second order
    # only; instead make the optimizer weigh steps by their number and read the orders off.
    def init(params):
        return jnp.zeros(())

    def weigh(updates, state, params=None):
        del params
        return jax.tree.map(lambda leaf: -leaf * 10.0**-state, updates), state + 1

    model = Model(
        lambda key, shape: jnp.zeros(()),
        lambda params, x: x,
        lambda params, batch: params * batch.inputs.mean(),
        CLASSES,
    )
    batch = Batch(jnp.arange(1.0, 5.0)[:, None], jnp.zeros(4, jnp.int32))
    local = round_of(epochs=2, batch_size=1)
    with jax.enable_x64(True):
        update = gradients.federated_update(
            jax.random.key(3),
            model,
            jnp.zeros((), jnp.float64),
            batch,
            local,
            optax.GradientTransformation(init, weigh),
        )
    digits = f"{float(update):.7f}".replace(".", "")
    assert sorted(digits[:4]) == sorted(digits[4:]) == list("1234")
    assert digits[:4] != digits[4:]


@pytest.mark.parametrize(
    ("local", "message"),
    [
        (round_of(num_samples=5), "num_samples is 5, but the batch holds 4"),
        (round_of(optimizer="adam"), "local.optimizer is 'adam': give it as optimizer"),
    ],
)
def test_federated_update_refuses_what_does_not_fit(local, message):
    model, params, batch = setting(dense_model)
    with pytest.raises(ValueError, match=message):
        gradients.federated_update(jax.random.key(0), model, params, batch, local)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_samples": -1}, "num_samples must be at least 1, got -1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive and finite, got 0.0"),
        ({"learning_rate": np.nan}, "learning_rate must be positive and finite, got nan"),
    ],
)
def test_rounds_that_are_none_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        round_of(**settings)


@pytest.mark.parametrize(
    ("epochs", "batch_size", "num_samples", "steps"),
    [(1, 4, 4, 1), (3, 2, 6, 9), (2, 3, 7, 6), (5, 8, 3, 5)],
)
def test_num_steps(epochs, batch_size, num_samples, steps):
    assert round_of(epochs, batch_size, num_samples).num_steps == steps


@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_a_clipped_sum_has_the_precision_of_the_parameters(microbatch_size):
    model = invjax.models.mlp((4,), 3)
    params = model.init(jax.random.key(0), (5,))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    batch = Batch(jnp.ones((4, 5), jnp.bfloat16), jnp.zeros(4, int))
    total = gradients.clipped_sum(model, params, batch, 1.0, microbatch_size=microbatch_size)
    chex.assert_trees_all_equal_shapes_and_dtypes(total, params)
