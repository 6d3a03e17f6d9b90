"""Training samples from weights: identities in float64, then what is reconstructed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from scipy import special

from invjax import datasets
from invjax.attacks.informed import kkt_scoring
from invjax.attacks.informed.kkt import (
    combination,
    decay_multipliers,
    fit_multipliers,
    kkt,
    modified_relu,
    smoothed,
)
from invjax.base import Batch, Facts, Observation
from invjax.models.chain import Spec, chain_model

KEY = jax.random.key(0)
DECAY = 3e-3


def network(classes, width=12, activation="tanh"):
    """Homogeneous but for the activation: a bias in the first layer only."""
    layers = [
        Spec("flatten"),
        Spec("dense", width, activation=activation),
        Spec("dense", classes, bias=False),
    ]
    return chain_model(layers, classes, "net")


def problem(classes, count=7):
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.standard_normal((count, 5)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, max(classes, 2), count))
    model = network(classes)
    return model, weights(model), Batch(inputs, labels)


def weights(model):
    """Drawn on the host: an initialisation takes long to compile."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: model.init(KEY, (5,)))
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.5 * rng.standard_normal(leaf.shape), leaf.dtype), shapes
    )


def double(tree):
    return jax.tree.map(
        lambda x: jnp.asarray(np.asarray(x), np.float64 if x.dtype == np.float32 else x.dtype), tree
    )


def margins(model, params, batch):
    logits = model.apply(params, batch.inputs)
    if model.num_classes == 1:
        return (2 * batch.labels - 1) * logits[:, 0]
    right = jax.nn.one_hot(batch.labels, model.num_classes)
    others = jnp.where(right > 0, -jnp.inf, logits).max(axis=1)
    return jnp.take_along_axis(logits, batch.labels[:, None], 1)[:, 0] - others


def squared(apply):
    """A loss that is no cross-entropy."""

    def loss(params, batch):
        wanted = jax.nn.one_hot(batch.labels, apply(params, batch.inputs).shape[1])
        return jnp.mean(jnp.sum(jnp.square(apply(params, batch.inputs) - wanted), axis=1))

    return loss


@pytest.mark.parametrize(
    ("variant", "classes", "loss"),
    [
        ("binary", 1, None),
        ("multiclass", 4, None),
        ("decay", 1, None),
        ("decay", 4, None),
        ("decay", 4, squared),
    ],
)
def test_residual_is_the_gradient_of_the_decayed_loss(variant, classes, loss):
    options = {} if loss is None else {"loss": loss}

    @jax.jit
    def both(params, batch):
        def total(params):
            if variant == "decay":
                value = (model.loss if loss is None else loss(model.apply))(params, batch)
            else:
                value = jnp.mean(jax.nn.softplus(-margins(model, params, batch)))
            return value + DECAY / 2 * optax.tree.norm(params, squared=True)

        if variant == "decay":
            multipliers = decay_multipliers(model, params, batch, DECAY, **options)
        else:
            parts = jax.nn.sigmoid(-margins(model, params, batch))
            multipliers = parts / (len(batch.labels) * DECAY)
        found = combination(model.apply, params, *batch, multipliers, variant)
        slope = jax.grad(total)(params)
        return [ravel_pytree(tree)[0] for tree in (params, optax.tree.sub(params, found), slope)]

    with jax.enable_x64(True):
        model, params, batch = double_problem(classes)
        weights, residual, slope = map(np.asarray, both(params, batch))
    assert residual.dtype == np.float64
    # At these weights, which are no optimum: the residual is as large as they are.
    assert np.linalg.norm(residual) > 0.1 * np.linalg.norm(weights)
    slope = slope / DECAY
    np.testing.assert_allclose(residual, slope, rtol=0, atol=1e-12 * np.linalg.norm(slope))


def double_problem(classes):
    model, params, batch = problem(classes)
    return model, double(params), double(batch)


def train(model, params, batch):
    """To the optimum of a small smooth network: Adam, then Newton."""

    def total(flat):
        return model.loss(unravel(flat), batch) + DECAY / 2 * jnp.sum(jnp.square(flat))

    flat, unravel = ravel_pytree(params)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-2, 3000))

    def advance(carry, _):
        flat, state = carry
        updates, state = optimizer.update(jax.grad(total)(flat), state)
        return (flat + updates, state), None

    def newton(_, flat):
        slope, curvature = jax.grad(total)(flat), jax.hessian(total)(flat)
        return flat - jnp.linalg.solve(curvature, slope)

    flat = jax.lax.scan(advance, (flat, optimizer.init(flat)), None, length=3000)[0][0]
    flat = jax.lax.fori_loop(0, 10, newton, flat)
    return unravel(flat), jnp.linalg.norm(jax.grad(total)(flat))


def test_multipliers_of_a_trained_network_are_found_by_least_squares():
    with jax.enable_x64(True):
        model, params, batch = double_problem(1)
        params, slope = jax.jit(functools.partial(train, model))(params, batch)
        assert slope < 1e-10
        true = decay_multipliers(model, params, batch, DECAY)
        fitted, residual = fit_multipliers(model, params, batch, "binary")
        signs = 2 * np.asarray(batch.labels) - 1
        np.testing.assert_allclose(fitted * signs, true[:, 0], atol=1e-3 * np.abs(true).max())
        assert residual < 1e-6 and fitted.min() >= 0
        either, residual = fit_multipliers(model, params, batch, "decay")
        np.testing.assert_allclose(either, true, atol=1e-3 * np.abs(true).max())
        # Samples that were not trained on explain the weights badly.
        others = batch._replace(inputs=batch.inputs[:, ::-1])
        assert fit_multipliers(model, params, others, "binary")[1] > 0.1


@pytest.mark.parametrize("alpha", [3.0, 150.0])
def test_modified_relu(alpha):
    relu = modified_relu(alpha)
    values = np.linspace(-2.0, 2.0, 41)
    with jax.enable_x64(True):
        orders = [relu, jax.grad(relu), jax.grad(jax.grad(relu))]
        found = jax.jit(lambda values: [jax.vmap(order)(values) for order in orders])(values)
    smooth = special.expit(alpha * values)
    np.testing.assert_array_equal(found[0], np.maximum(values, 0))
    np.testing.assert_allclose(found[1], smooth, rtol=1e-12)
    # Where the sigmoid is 1 in float64, its derivative is lost in rounding.
    curve = alpha * smooth * special.expit(-alpha * values)
    np.testing.assert_allclose(found[2], curve, rtol=1e-9, atol=1e-13)


def test_smoothed_network_says_the_same_and_has_other_derivatives():
    model = network(3, activation="relu")
    params = weights(model)
    inputs = jax.random.normal(KEY, (6, 5))
    soft = smoothed(model, 2.0)
    np.testing.assert_allclose(soft(params, inputs), model.apply(params, inputs), atol=1e-6)

    def slope(apply):
        return ravel_pytree(jax.grad(lambda params: apply(params, inputs).sum())(params))[0]

    assert jnp.abs(slope(soft) - slope(model.apply)).max() > 1e-2
    steep = smoothed(model, 1e6)
    np.testing.assert_allclose(slope(steep), slope(model.apply), atol=1e-4)


def observation(params, shape=(5,), classes=1, **fields):
    facts = Facts(input_shape=shape, num_classes=classes, input_range=(-1.0, 1.0))
    return Observation(params, None, facts, **fields)


@pytest.mark.parametrize(
    ("variant", "classes", "optimizer"),
    [("binary", 1, "sgd"), ("multiclass", 3, "adam"), ("decay", 3, "adam")],
)
def test_loss_is_the_published_one_and_falls(variant, classes, optimizer):
    model = network(classes, activation="relu")
    params = weights(model)
    attack = kkt(
        model,
        num_images=6,
        variant=variant,
        num_steps=150,
        optimizer=optimizer,
        learning_rate=1e-2,
        multiplier_rate=3e-2,
        scale=0.9,
        least_multiplier=0.3,
        alpha=20.0,
    )
    seen = observation(params, classes=classes)

    @jax.jit
    def run(key):
        start = attack.init(key, seen)
        return start, attack.result(seen, start), attack(key, seen)

    start, at_start, result = run(KEY)
    inputs, multipliers = start.variables["inputs"], start.variables["multipliers"]
    labels = np.arange(6) % max(classes, 2)
    np.testing.assert_array_equal(start.labels, labels)
    found = combination(smoothed(model, 20.0), params, inputs, labels, multipliers, variant)
    apart = jax.tree.map(lambda a, b: np.sum((a - b / 6) ** 2), params, found)
    x, low = np.asarray(inputs), np.asarray(multipliers)
    expected = sum(jax.tree.leaves(apart)) + np.sum(np.maximum(np.abs(x) - 1, 0) ** 2)
    assert (np.abs(x) > 1).any()
    if variant != "decay":
        expected += 5 * np.sum(np.maximum(0.3 - low, 0) ** 2)
        assert (low < 0.3).any() and low.min() >= 0 and low.max() < 1
    np.testing.assert_allclose(start.value, expected, rtol=1e-5)
    # Of the sum, not of the mean over images that the loss has.
    np.testing.assert_allclose(at_start.diagnostics["multipliers"], low / 6, rtol=1e-6)
    np.testing.assert_allclose(at_start.diagnostics["loss"], start.value, rtol=1e-6)
    assert result.inputs.shape == (6, 5) and result.found.all()
    assert result.objective < 0.8 * start.value
    if variant == "decay":
        labels = model.apply(params, result.inputs).argmax(1)
    np.testing.assert_array_equal(result.labels, labels)


def test_granted_labels_are_held():
    model = network(1)
    params = weights(model)
    attack = kkt(model, num_images=3, num_steps=2, alpha=None)
    given = jnp.array([1, 1, 0])
    found = jax.jit(attack)(KEY, observation(params, labels=given))
    np.testing.assert_array_equal(found.labels, given)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: kkt(network(3), num_images=2), "needs a single logit"),
        (lambda: kkt(network(1), num_images=2, variant="multiclass"), "needs several logits"),
        (lambda: kkt(network(1), num_images=0), "num_images"),
        (lambda: kkt(network(1), num_images=2, optimizer="lbfgs"), "optimizer"),
        (lambda: kkt(network(1), num_images=2, variant="margin"), "variant"),
        (lambda: kkt(network(1), num_images=2, learning_rate=-1.0), "learning_rate must"),
        (lambda: kkt(network(1), num_images=2, multiplier_rate=-1.0), "multiplier_rate must"),
        (lambda: modified_relu(0.0), "alpha"),
        (lambda: modified_relu(np.inf), "alpha"),
        (lambda: smoothed(network(1)._replace(layers=None), 1.0), "layer view"),
        (lambda: decay_multipliers(*problem(1), 0.0), "weight_decay"),
    ],
)
def test_refuses(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_refuses_labels_of_another_number():
    model = network(1)
    seen = observation(weights(model), labels=jnp.zeros(4, int))
    with pytest.raises(ValueError, match="must be of 3 images"):
        kkt(model, num_images=3)(KEY, seen)


class TestScore:
    DATA = datasets.digits().inputs
    TRAINING, UNSEEN = jnp.asarray(DATA[:6]), jnp.asarray(DATA[20:26])

    def test_finds_what_is_there_and_reports_the_control(self):
        mean = jnp.asarray(self.DATA.mean(axis=0))
        noise = 0.02 * jax.random.normal(KEY, (9, 8, 8, 1))
        # Three of the six training images, at another scale, and noise.
        candidates = noise.at[:3].add(3.0 * (self.TRAINING[:3] - mean[None]))
        report = kkt_scoring.score(
            candidates, self.TRAINING - mean[None], self.UNSEEN - mean[None], mean
        )
        np.testing.assert_array_equal(report.training.ncc > 0.95, [True] * 3 + [False] * 3)
        assert (report.unseen.ncc < 0.9).all()
        assert report.training.ssim[:3].min() > report.unseen.ssim.max()
        assert report.training.best_dssim < report.unseen.best_dssim
        assert report.training.images.min() == 0 and report.training.images.max() == 1

    def test_correlation_is_that_of_numpy(self):
        found = kkt_scoring.correlation(self.TRAINING, self.UNSEEN)
        a, b = (np.asarray(x).reshape(6, -1) for x in (self.TRAINING, self.UNSEEN))
        np.testing.assert_allclose(found, np.corrcoef(a, b)[:6, 6:], atol=1e-5)

    def test_constant_images_correlate_with_nothing(self):
        levels = jnp.linspace(-0.95, 0.95, 39)[:, None, None, None] * jnp.ones((1, 8, 8, 1))
        assert not kkt_scoring.correlation(self.TRAINING, levels).any()
        assert not kkt_scoring.correlation(levels, levels).any()
        # Nor where rounding, as of an interpolation, leaves them not quite constant.
        rough = levels * (1 + 2e-7 * jax.random.rademacher(KEY, levels.shape))
        assert not kkt_scoring.correlation(self.TRAINING, rough).any()

    def test_near_candidates_vote(self):
        twice = jnp.concatenate([self.TRAINING[:1]] * 2 + [self.UNSEEN[:1]])
        blurred = twice.at[:2].add(0.1 * jax.random.normal(KEY, (2, 8, 8, 1)))
        report = kkt_scoring.score(twice, self.TRAINING[:1], self.UNSEEN[:1])
        assert report.training.votes[0] == 2 and report.unseen.votes[0] == 1
        np.testing.assert_allclose(report.training.ssim, 1.0, atol=1e-2)
        alone = kkt_scoring.score(blurred[:1], self.TRAINING[:1], self.UNSEEN[:1])
        assert alone.training.ssim[0] < 0.98

    def test_near_is_within_a_tenth_of_the_least_distance(self):
        # An orthonormal basis, of mean 0, of images at half resolution, and what has them there.
        draws = np.random.default_rng(0).standard_normal((16, 5))
        basis = np.linalg.qr(np.concatenate([np.ones((16, 1)), draws], axis=1))[0][:, 1:].T
        pixels = jnp.eye(64).reshape(64, 8, 8, 1)
        half = jax.image.resize(pixels, (64, 4, 4, 1), "cubic", antialias=False)
        lifted = basis @ np.linalg.pinv(np.asarray(half).reshape(64, 16))
        distance = np.array([0.02, 0.0215, 0.025])
        cosine = (1 - distance)[:, None]
        candidates = cosine * lifted[:1] + np.sqrt(1 - cosine**2) * lifted[1:4]
        images = [jnp.asarray(x.reshape(-1, 8, 8, 1), jnp.float32) for x in (candidates, lifted)]
        found = kkt_scoring.score(images[0], images[1][:1], images[1][4:]).training
        assert found.votes == 2
        average = np.asarray(candidates[:2].mean(axis=0))
        expected = (average - average.min()) / np.ptp(average)
        np.testing.assert_allclose(found.images.ravel(), expected, atol=1e-5)

    TWELVE = jnp.asarray(DATA[30:42])

    def test_perfect_candidates_are_found(self):
        """Rounding puts their distance below zero."""
        found = kkt_scoring.score(self.TWELVE, self.TWELVE, self.TWELVE[::-1])
        for match in found:
            assert (match.votes >= 1).all() and match.ncc.max() <= 1
            np.testing.assert_allclose(match.ncc, 1.0, atol=1e-6)
            np.testing.assert_allclose(match.ssim, 1.0, atol=1e-2)

    def test_the_ten_best_count(self):
        levels = jnp.linspace(0.0, 1.0, 12)[:, None, None, None]
        noisy = self.TWELVE + levels * jax.random.normal(KEY, self.TWELVE.shape)
        found = kkt_scoring.score(noisy, self.TWELVE, self.TWELVE[::-1]).training
        dissimilar = (1 - np.sort(found.ssim)[::-1]) / 2
        assert dissimilar[-1] > dissimilar[0] + 0.2
        np.testing.assert_allclose(found.best_dssim, dissimilar[:10].mean(), rtol=1e-5)

    @pytest.mark.parametrize("bad", [np.nan, np.inf, 1e38, 3e38])
    def test_candidates_that_diverged_do_not_count(self, bad):
        clean = kkt_scoring.score(self.TWELVE, self.TWELVE, self.TWELVE[::-1]).training
        broken = self.TWELVE.at[3].set(-bad).at[3, 2:].set(bad)
        found = kkt_scoring.score(broken, self.TWELVE, self.TWELVE[::-1]).training
        others = np.arange(12) != 3
        for name in ("ncc", "ssim", "images"):
            ours, theirs = getattr(found, name), getattr(clean, name)
            np.testing.assert_allclose(ours[others], theirs[others], atol=1e-6)
            assert np.isfinite(ours).all()
        assert found.votes[3] >= 1 and found.ncc[3] < 0.99
        none = kkt_scoring.score(0 * broken + np.nan, self.TWELVE, self.TWELVE[::-1]).training
        assert not none.votes.any() and not none.images.any() and (none.ncc == -1).all()
        assert (none.ssim < 0.1).all()

    def test_refuses_images_of_different_shapes(self):
        with pytest.raises(ValueError, match="of one shape"):
            kkt_scoring.score(self.TRAINING, self.TRAINING[:, :4], self.UNSEEN)
        with pytest.raises(ValueError, match="side"):
            small = self.TRAINING[:, :3]
            kkt_scoring.score(small, small, small)


@pytest.mark.slow
def test_reconstructs_training_images_and_no_unseen_ones():
    """Ten digits, odd or even, from a wide network; the weight decay has not yet erased the start."""
    width, half = 1000, 5
    data = datasets.digits()
    order = np.random.default_rng(0).permutation(len(data))
    odd = data.labels % 2
    # Five of each class to train on, five to control with.
    by_class = [order[:400][odd[order[:400]] == side] for side in (0, 1)]
    training, unseen = (
        np.concatenate([part[first : first + half] for part in by_class]) for first in (0, 20)
    )
    mean = data.inputs[order[400:]].mean(axis=0)
    batch = Batch(jnp.asarray(data.inputs[training] - mean), jnp.asarray(odd[training]))
    model = network(1, width, "relu")
    keys = jax.random.split(KEY, 3)
    params = {
        "layer01": {
            "kernel": 0.1 * jax.random.normal(keys[0], (64, width)),
            "bias": jnp.zeros(width),
        },
        "layer02": {"kernel": 0.1 * jax.random.normal(keys[1], (width, 1))},
    }
    optimizer = optax.adam(1e-3)

    def total(params):
        return model.loss(params, batch) + 0.5e-4 * optax.tree.norm(params, squared=True)

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(total)(params), state)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def train(params):
        return jax.lax.scan(step, (params, optimizer.init(params)), None, length=2500)[0][0]

    attack = kkt(
        model,
        num_images=20,
        num_steps=4000,
        optimizer="adam",
        learning_rate=1e-2,
        multiplier_rate=1e-2,
        scale=0.1,
        least_multiplier=0.1,
        alpha=25.0,
    )
    seen = observation(train(params), (8, 8, 1))
    # Three starts, whose candidates are pooled.
    starts = jax.lax.map(lambda key: attack(key, seen).inputs, jax.random.split(keys[2], 3))
    candidates = starts.reshape(-1, 8, 8, 1)
    control = jnp.asarray(data.inputs[unseen] - mean)
    report = kkt_scoring.score(candidates, batch.inputs, control, jnp.asarray(mean))
    assert (report.training.ncc > 0.9).sum() >= 4, np.sort(report.training.ncc)
    assert (report.unseen.ncc > 0.9).sum() == 0
    assert np.median(report.training.ssim) > np.median(report.unseen.ssim) + 0.1
    assert report.training.best_dssim < report.unseen.best_dssim
