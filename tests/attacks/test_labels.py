"""Label recovery: closed forms, exact recovery, then behaviour and errors."""

import chex
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from sklearn.datasets import load_digits

from invjax import gradients
from invjax.attacks import heads, labels
from invjax.base import Batch, Facts, Layer, LocalTraining, Model, Observation

DIGITS = load_digits()
IMAGES = (DIGITS.images[..., None] / 16).astype(np.float32)
TARGETS = DIGITS.target.astype(np.int32)
SHAPE = (8, 8, 1)


def model_of(init, apply, num_classes=10, **attributes):
    """A plain-function model under cross-entropy."""

    def loss(params, batch):
        logits = apply(params, batch.inputs)
        if num_classes == 1:
            targets = batch.labels.astype(logits.dtype)
            return optax.sigmoid_binary_cross_entropy(logits[:, 0], targets).mean()
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()

    return Model(init, apply, loss, num_classes, "plain", **attributes)


def mlp(activation=jax.nn.relu, bias=True, num_classes=10, width=48, **attributes):
    """A two-layer network."""

    def init(key, shape):
        params = {
            "hidden": {"w": jnp.zeros((int(np.prod(shape)), width)), "b": jnp.zeros(width)},
            "out": {"w": jnp.zeros((width, num_classes))},
        }
        return params | {"out": params["out"] | ({"b": jnp.zeros(num_classes)} if bias else {})}

    def apply(params, x):
        h = x.reshape(x.shape[0], -1) @ params["hidden"]["w"] + params["hidden"]["b"][None]
        logits = activation(h) @ params["out"]["w"]
        return logits + params["out"]["b"][None] if bias else logits

    return model_of(init, apply, num_classes, **attributes)


def conv_net(bias):
    """A LeNet-like network on one-channel images."""

    def init(key, shape):
        head = [jnp.zeros((6 * 16, 10))] + ([jnp.zeros(10)] if bias else [])
        return {"kernel": jnp.zeros((3, 3, shape[-1], 6)), "head": head}

    def apply(params, x):
        dimensions = ("NHWC", "HWIO", "NHWC")
        h = jax.lax.conv_general_dilated(
            x, params["kernel"], (2, 2), "SAME", dimension_numbers=dimensions
        )
        logits = jax.nn.sigmoid(h).reshape(x.shape[0], -1) @ params["head"][0]
        return logits + params["head"][1][None] if bias else logits

    return model_of(init, apply)


def times(factor, activation):
    """Large features: a network far from its initialisation's even probabilities."""
    return lambda x: factor * activation(x)


def draw(seed, trials, size, repeats=False):
    """`trials` batches of digits, each class at most once unless `repeats`."""
    rng = np.random.default_rng(seed)
    if repeats:
        chosen = [rng.choice(len(TARGETS), size, replace=False) for _ in range(trials)]
    else:
        classes = [rng.permutation(10)[:size] for _ in range(trials)]
        chosen = [[rng.choice(np.flatnonzero(TARGETS == c)) for c in row] for row in classes]
    return Batch(jnp.asarray(IMAGES[np.array(chosen)]), jnp.asarray(TARGETS[np.array(chosen)]))


def observe(model, params, batch, **facts):
    facts = {"batch_size": batch.labels.shape[0]} | facts
    return Observation(
        params,
        jax.jit(gradients.gradient, static_argnums=0)(model, params, batch),
        Facts(input_shape=batch.inputs.shape[1:], num_classes=model.num_classes, **facts),
    )


def estimate(model, observation, size):
    return np.asarray(jax.jit(lambda o: labels.estimate_counts(model, o, size))(observation))


def fresh(model, trials, shape=SHAPE):
    """`trials` untrained parameters, drawn by NumPy: kernels by their fan-in, zero biases."""
    rng = np.random.default_rng(7)

    def leaf(one):
        values = rng.uniform(-1, 1, (trials, *one.shape)) / np.sqrt(one.shape[0])
        return jnp.asarray(values * (len(one.shape) > 1), jnp.float32)

    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), shape))
    return jax.tree.map(leaf, shapes)


def untrained(model, shape=SHAPE):
    return jax.tree.map(lambda leaf: leaf[0], fresh(model, 1, shape))


def attack_many(model, batches, noises=(0.0,), **kwargs):
    """Labels recovered at every noise level, fresh parameters for every batch; and the truth."""
    params = fresh(model, batches.labels.shape[0])
    rng = np.random.default_rng(8)
    normal = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), params)

    @jax.jit
    @jax.vmap
    def run(params, batch, noise):
        observation = observe(model, params, batch)
        noisy = jax.tree.map(jnp.add, observation.gradient, noise)
        return labels.recover(model, observation._replace(gradient=noisy), **kwargs)

    found = [
        np.asarray(run(params, batches, jax.tree.map(lambda leaf, s=std: s * leaf, normal)))
        for std in noises
    ]
    truth = np.sort(np.asarray(batches.labels), axis=1)
    return (found[0] if len(found) == 1 else found), truth


def histogram(rows, classes=10):
    return np.stack([np.bincount(row, minlength=classes) for row in rows])


def label_error(found, truth):
    """The share of the samples with a wrong label."""
    return np.abs(histogram(found) - histogram(truth)).sum() / 2 / truth.size


# Mathematics.


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_counts_are_exact_where_the_probabilities_are_known(scale):
    # B (p - gradient) with p of the private inputs themselves: an identity, trained or not.
    model = mlp(times(scale, jax.nn.relu))
    params = untrained(model)
    batch = jax.tree.map(lambda leaf: leaf[0], draw(0, 1, 30, repeats=True))
    observation = observe(model, params, batch)._replace(auxiliary=batch)
    counts = estimate(model, observation, 30)
    np.testing.assert_allclose(counts, histogram([batch.labels])[0], atol=1e-4)


@pytest.mark.parametrize("activation", [jax.nn.relu, jnp.tanh])
def test_weight_form_is_exact_where_all_features_are_equal(activation):
    model = mlp(activation, bias=False)
    params = untrained(model)
    batch = Batch(jnp.tile(IMAGES[:1], (6, 1, 1, 1)), jnp.array([4, 4, 4, 0, 9, 9]))
    observation = observe(model, params, batch)._replace(auxiliary=batch)
    counts = estimate(model, observation, 6)
    np.testing.assert_allclose(counts, [1, 0, 0, 0, 3, 0, 0, 0, 0, 2], atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_estimated_counts_add_up(bias):
    model = mlp(bias=bias)
    batch = jax.tree.map(lambda leaf: leaf[0], draw(1, 1, 12, repeats=True))
    observation = observe(model, untrained(model), batch)
    assert float(estimate(model, observation, 12).sum()) == pytest.approx(12, abs=1e-3)


@pytest.mark.parametrize("size", [1, 4, 10])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [jax.nn.relu, jax.nn.sigmoid])
def test_a_batch_without_repeats_is_recovered_exactly(activation, bias, size):
    found, truth = attack_many(mlp(activation, bias), draw(size, 40, size))
    np.testing.assert_array_equal(found, truth)


def test_features_of_both_signs_without_a_bias():
    # No sign is certain here: the projection on the mean feature carries the estimate.
    found, truth = attack_many(mlp(jnp.tanh, bias=False), draw(2, 40, 6))
    np.testing.assert_array_equal(found, truth)


@pytest.mark.parametrize("bias", [True, False])
def test_convolutional_network_on_one_channel(bias):
    model = conv_net(bias)
    params = untrained(model)
    batches = draw(3, 8, 7)
    run = jax.jit(lambda batch: labels.recover(model, observe(model, params, batch)))
    found = np.stack([run(Batch(*batch)) for batch in zip(*batches, strict=True)])
    np.testing.assert_array_equal(found, np.sort(batches.labels, axis=1))


@pytest.mark.parametrize("bias", [True, False])
def test_signs_correct_an_estimate_that_is_wrong(bias):
    # Large features: probabilities far from those on noise, and different for every image.
    model = mlp(times(8.0, jax.nn.relu), bias)
    params, batches = untrained(model), draw(4, 30, 6)

    @jax.jit
    @jax.vmap
    def run(batch):
        observation = observe(model, params, batch)
        return (
            labels.estimate_counts(model, observation, 6),
            labels.recover(model, observation, method="counts"),
        )

    counts, found = run(batches)
    truth = np.sort(batches.labels, axis=1)
    np.testing.assert_array_equal(found, truth)
    largest = np.sort(np.argsort(-np.asarray(counts), axis=1)[:, :6], axis=1)
    assert (largest != truth).any()


@pytest.mark.parametrize("activation", [jax.nn.relu, jnp.tanh])
@pytest.mark.parametrize("bias", [True, False])
def test_idlg_is_exact_for_features_of_any_sign(activation, bias):
    found, truth = attack_many(mlp(activation, bias), draw(5, 60, 1), method="idlg")
    np.testing.assert_array_equal(found, truth)


def test_idlg_on_a_confident_and_wrong_network():
    # Nearly all mass on one wrong class: the two columns then have nearly equal norms.
    found, truth = attack_many(mlp(times(20.0, jnp.tanh), bias=False), draw(6, 60, 1))
    np.testing.assert_array_equal(found, truth)


@pytest.mark.parametrize("bias", [True, False])
def test_two_classes_and_one_logit(bias):
    for classes in (1, 2):
        batches = draw(8, 20, 1)
        batches = batches._replace(labels=batches.labels % 2)
        found, truth = attack_many(mlp(jax.nn.sigmoid, bias, classes), batches)
        np.testing.assert_array_equal(found, truth)


def test_one_logit_counts():
    batches = draw(9, 20, 9, repeats=True)
    batches = batches._replace(labels=batches.labels % 2)
    found, truth = attack_many(mlp(jax.nn.sigmoid, num_classes=1), batches)
    np.testing.assert_array_equal(found, truth)


def test_row_minimum_is_its_definition():
    model = mlp()
    batch = jax.tree.map(lambda leaf: leaf[0], draw(10, 1, 5))
    observation = observe(model, untrained(model), batch)
    lowest = np.asarray(observation.gradient["out"]["w"]).min(axis=0)
    found = labels.recover(model, observation, method="row_minimum")
    np.testing.assert_array_equal(found, np.sort(np.argsort(lowest)[:5]))
    np.testing.assert_array_equal(found, np.sort(batch.labels))


# Batches with repeats, noise, federated rounds.


@pytest.mark.parametrize(
    ("activation", "bias", "limit"),
    [
        (jax.nn.sigmoid, True, 0.01),
        (jax.nn.sigmoid, False, 0.01),
        (jax.nn.relu, True, 0.03),
        (jax.nn.relu, False, 0.08),
    ],
)
def test_large_batches_with_repeats(activation, bias, limit):
    # Published for an untrained MLP and B = 50: 16 % (weight form), 12 % (bias form).
    found, truth = attack_many(mlp(activation, bias), draw(11, 30, 50, repeats=True))
    assert label_error(found, truth) <= limit


@pytest.mark.parametrize("bias", [True, False])
def test_noise_degrades_gracefully(bias):
    batches = draw(12, 30, 8)
    found, truth = attack_many(mlp(jax.nn.relu, bias), batches, (0.0, 0.005, 0.5))
    assert np.min(found) >= 0 and np.max(found) < 10
    errors = [label_error(rows, truth) for rows in found]
    assert errors[0] == 0
    assert errors[1] < 0.05
    assert errors[1] <= errors[2]


@pytest.mark.parametrize("bias", [True, False])
def test_noise_is_not_taken_for_a_sign(bias):
    # Under noise the row minimum of every class is negative, present or not.
    inputs = jnp.asarray(IMAGES[TARGETS == 3][:60].reshape(10, 6, *SHAPE))
    batches = Batch(inputs, jnp.full((10, 6), 3))
    found, truth = attack_many(mlp(jax.nn.sigmoid, bias), batches, noises=(0.03,))
    np.testing.assert_array_equal(found, truth)


def test_features_of_both_signs_are_no_evidence():
    # With tanh features every class has negative entries, so one label six times is no six labels.
    inputs = jnp.asarray(IMAGES[TARGETS == 3][:60].reshape(10, 6, *SHAPE))
    batches = Batch(inputs, jnp.full((10, 6), 3))
    found, truth = attack_many(mlp(jnp.tanh, bias=False), batches)
    assert label_error(found, truth) < 0.5


def federated(model, params, batch, local, optimizer=None, size=None):
    update = gradients.federated_update(jax.random.key(5), model, params, batch, local, optimizer)
    facts = Facts(input_shape=SHAPE, num_classes=10, batch_size=size, local=local)
    return Observation(params, update, facts)


def test_one_local_step_is_a_gradient():
    model = mlp()
    params = untrained(model)
    batch = jax.tree.map(lambda leaf: leaf[0], draw(13, 1, 6, repeats=True))
    local = LocalTraining(epochs=1, batch_size=6, learning_rate=0.01, num_samples=6)
    chex.assert_trees_all_close(
        estimate(model, federated(model, params, batch, local), 6),
        estimate(model, observe(model, params, batch), 6),
        atol=1e-3,
    )


@pytest.mark.parametrize("bias", [True, False])
def test_federated_rounds(bias):
    model = mlp(jax.nn.sigmoid, bias)
    params = untrained(model)
    local = LocalTraining(epochs=3, batch_size=3, learning_rate=0.1, num_samples=9)
    recover = jax.jit(lambda observation: labels.recover(model, observation))
    for batch in zip(*draw(14, 4, 9), strict=True):
        batch = Batch(*batch)
        found = recover(federated(model, params, batch, local))
        np.testing.assert_array_equal(found, np.sort(batch.labels))


def test_probabilities_follow_the_weights_through_a_federated_round():
    # Long training moves the probabilities; those of the sent parameters alone are further off.
    model = mlp(jax.nn.sigmoid)
    params = untrained(model)
    local = LocalTraining(epochs=20, batch_size=5, learning_rate=0.1, num_samples=20)
    batch = jax.tree.map(lambda leaf: leaf[0], draw(15, 1, 20, repeats=True))
    batch = batch._replace(labels=batch.labels % 3)
    truth = histogram([batch.labels])[0]
    observation = federated(model, params, batch, local)
    along = estimate(model, observation, 20)
    scaled = jax.tree.map(lambda leaf: leaf / (0.1 * local.num_steps), observation.gradient)
    still = observation._replace(
        gradient=scaled, facts=Facts(input_shape=SHAPE, num_classes=10, batch_size=20)
    )
    at_start = estimate(model, still, 20)
    assert np.abs(along - truth).sum() < 0.6 * np.abs(at_start - truth).sum()


def test_other_local_optimizers_show_signs_only():
    model = mlp()
    params = untrained(model)
    batch = jax.tree.map(lambda leaf: leaf[0], draw(16, 1, 4))
    local = LocalTraining(
        epochs=1, batch_size=4, learning_rate=0.01, num_samples=4, optimizer="adam"
    )
    observation = federated(model, params, batch, local, optax.adam(0.01))
    with pytest.raises(ValueError, match="row_minimum"):
        labels.recover(model, observation)
    assert labels.recover(model, observation, method="row_minimum").shape == (4,)


# Where the head is.


class NnxNet(nnx.Module):
    def __init__(self, rngs, use_bias):
        self.layers = nnx.List(
            [nnx.Linear(64, 20, rngs=rngs), nnx.Linear(20, 10, use_bias=use_bias, rngs=rngs)]
        )

    def __call__(self, x):
        return self.layers[1](jax.nn.relu(self.layers[0](x.reshape(x.shape[0], -1))))


class LinenNet(flax.linen.Module):
    use_bias: bool

    @flax.linen.compact
    def __call__(self, x):
        x = jax.nn.relu(flax.linen.Dense(20)(x.reshape(x.shape[0], -1)))
        return flax.linen.Dense(10, use_bias=self.use_bias)(x)


def nnx_model(use_bias):
    graph = nnx.graphdef(NnxNet(nnx.Rngs(0), use_bias))
    return model_of(
        lambda key, shape: nnx.state(NnxNet(nnx.Rngs(key), use_bias)),
        lambda params, x: nnx.merge(graph, params)(x),
    )


def linen_model(use_bias):
    net = LinenNet(use_bias)
    return model_of(lambda key, shape: net.init(key, jnp.zeros((1, *shape))), net.apply)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("make", [nnx_model, linen_model, conv_net])
def test_the_head_is_found_in_any_tree(make, use_bias):
    model = make(use_bias)
    params = untrained(model)
    weight, bias = labels.find_head(model, params)
    assert weight.shape[1] == 10
    assert (bias is not None) == use_bias
    batch = jax.tree.map(lambda leaf: leaf[0], draw(17, 1, 6))
    found = jax.jit(lambda o: labels.recover(model, o))(observe(model, params, batch))
    np.testing.assert_array_equal(found, np.sort(batch.labels))


def test_the_layer_view_decides_where_there_is_one():
    def layers(tree):
        return (
            Layer("dense", tree["hidden"]["w"], tree["hidden"]["b"], "relu"),
            Layer("dense", tree["out"]["w"], tree["out"]["b"]),
            Layer("flatten"),
        )

    # A hidden layer as wide as there are classes: the leaves alone do not tell.
    model = mlp(width=10, layers=layers)
    params = untrained(model)
    assert labels.find_head(model, params)[0] is params["out"]["w"]
    assert labels.find_head(model, params)[1] is params["out"]["b"]
    plain = model._replace(layers=None)
    batch = jax.tree.map(lambda leaf: leaf[0], draw(18, 1, 4))
    observation = observe(model, params, batch)
    with pytest.raises(ValueError, match=r"2 leaves have that shape.*head="):
        labels.recover(plain, observation)
    head = lambda tree: (tree["out"]["w"], tree["out"]["b"])  # noqa: E731
    for method in ("counts", "row_minimum"):
        np.testing.assert_array_equal(
            labels.recover(plain, observation, method=method, head=head), np.sort(batch.labels)
        )


def test_heads_that_cannot_be_told():
    model = mlp()
    with pytest.raises(ValueError, match="0 leaves have that shape"):
        labels.find_head(model, {"w": jnp.zeros((10, 64)), "b": jnp.zeros(10)})
    with pytest.raises(ValueError, match="2 leaves beside it could be its bias"):
        labels.find_head(model, {"w": jnp.zeros((4, 10)), "a": jnp.zeros(10), "b": jnp.zeros(10)})
    conv = model._replace(layers=lambda tree: (Layer("conv", jnp.zeros((1, 1, 4, 10))),))
    with pytest.raises(ValueError, match="the last layer is conv"):
        labels.find_head(conv, untrained(model))


# Behaviour and errors.


def test_jit_and_vmap_agree_with_plain_calls():
    model = mlp(bias=False)
    params = untrained(model)
    batches = draw(19, 3, 5, repeats=True)
    observations = [observe(model, params, Batch(*one)) for one in zip(*batches, strict=True)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *observations)
    for method in ("auto", "row_minimum"):
        one = lambda o, method=method: labels.recover(model, o, method=method)  # noqa: E731
        plain = np.stack([one(observation) for observation in observations])
        np.testing.assert_array_equal(jax.jit(jax.vmap(one))(stacked), plain)
        assert jnp.issubdtype(plain.dtype, jnp.integer)


def test_it_reads_neither_order_nor_granted_labels():
    model = mlp()
    params = untrained(model)
    batch = jax.tree.map(lambda leaf: leaf[0], draw(20, 1, 6, repeats=True))
    observation = observe(model, params, batch)
    turned = observe(model, params, jax.tree.map(lambda leaf: leaf[::-1], batch))
    expected = labels.recover(model, observation)
    np.testing.assert_array_equal(labels.recover(model, turned), expected)
    granted = observation._replace(labels=jnp.zeros(6, jnp.int32))
    np.testing.assert_array_equal(labels.recover(model, granted), expected)


def test_input_range_may_differ_between_channels():
    model = mlp(jax.nn.sigmoid)
    inputs = jnp.asarray(np.concatenate([IMAGES[:5], 4 * IMAGES[:5] - 2], axis=-1))
    batch = Batch(inputs, jnp.asarray(TARGETS[:5]))
    observation = observe(
        model, untrained(model, (8, 8, 2)), batch, input_range=((0.0, -2.0), (1.0, 2.0))
    )
    np.testing.assert_array_equal(labels.recover(model, observation), np.sort(batch.labels))
    dummies = np.asarray(heads.dummy_inputs(observation))
    assert 0 <= dummies[..., 0].min() and dummies[..., 0].max() <= 1
    assert -2 <= dummies[..., 1].min() < -1.9 and 1.9 < dummies[..., 1].max() <= 2


def test_auxiliary_data_are_thinned_evenly():
    model = mlp()
    batch = jax.tree.map(lambda leaf: leaf[0], draw(25, 1, 3))
    auxiliary = Batch(jnp.arange(1200.0).reshape(1200, 1), jnp.zeros(1200, jnp.int32))
    observation = observe(model, untrained(model), batch)._replace(auxiliary=auxiliary)
    np.testing.assert_array_equal(heads.dummy_inputs(observation)[:, 0], np.arange(0, 1200, 3))
    few = observation._replace(auxiliary=jax.tree.map(lambda leaf: leaf[:500], auxiliary))
    assert heads.dummy_inputs(few).shape == (500, 1)


def test_dead_features_stay_finite():
    model = mlp(bias=False)
    params = jax.tree.map(jnp.zeros_like, untrained(model))
    batch = jax.tree.map(lambda leaf: leaf[0], draw(21, 1, 3))
    observation = observe(model, params, batch)
    assert np.isfinite(estimate(model, observation, 3)).all()
    assert labels.recover(model, observation).shape == (3,)


def test_batch_size_of_small_batches():
    model = mlp(jax.nn.sigmoid)
    params = untrained(model)
    for size in (1, 2, 3, 5, 7):
        batch = jax.tree.map(lambda leaf: leaf[0], draw(22, 1, size))
        observation = observe(model, params, batch, batch_size=None)
        assert labels.estimate_batch_size(model, observation) == size


def test_batch_size_shows_only_up_to_a_common_divisor():
    model = mlp(jax.nn.sigmoid)
    batch = Batch(jnp.asarray(IMAGES[:4]), jnp.array([2, 2, 7, 7]))
    observation = observe(model, untrained(model), batch, batch_size=None)
    assert labels.estimate_batch_size(model, observation) == 2


def test_batch_size_errors():
    batch = jax.tree.map(lambda leaf: leaf[0], draw(23, 1, 7))
    model = mlp(bias=False)
    with pytest.raises(ValueError, match="plain has none"):
        labels.estimate_batch_size(model, observe(model, untrained(model), batch))
    model = mlp()
    observation = observe(model, untrained(model), batch)
    with pytest.raises(ValueError, match="max_batch_size=6"):
        labels.estimate_batch_size(model, observation, max_batch_size=6)


def test_errors():
    model = mlp()
    params = untrained(model)
    batch = jax.tree.map(lambda leaf: leaf[0], draw(24, 1, 12, repeats=True))
    observation = observe(model, params, batch)
    with pytest.raises(ValueError, match=r"'auto', 'idlg', 'row_minimum', 'counts'.*'gcd'"):
        labels.recover(model, observation, method="gcd")
    with pytest.raises(ValueError, match="give batch_size"):
        labels.recover(model, observe(model, params, batch, batch_size=None))
    for recover in (labels.recover, labels.row_minimum, labels.counts, labels.estimate_counts):
        with pytest.raises(ValueError, match=r"batch_size must be a whole number.* got -1"):
            recover(model, observation, -1)
    with pytest.raises(ValueError, match="the batch has 12"):
        labels.recover(model, observation, method="idlg")
    with pytest.raises(ValueError, match="at most 10, got 12"):
        labels.recover(model, observation, method="row_minimum")
    with pytest.raises(ValueError, match="no gradient"):
        labels.recover(model, observation._replace(gradient=None))
