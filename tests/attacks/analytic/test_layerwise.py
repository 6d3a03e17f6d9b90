"""Layer by layer: exact where every layer's system is of full rank, and silent where one is not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.ndimage
from scipy import special, stats

import invjax
from invjax import gradients, models
from invjax.attacks.analytic.layerwise import bootstrap, layerwise
from invjax.attacks.analytic.layerwise.inverses import invert
from invjax.models.chain import Spec, chain_model
from invjax.models.reference import NAMES, reference
from invjax.theory.security_index import security_index

CENTERED = (-0.5, 0.5)


def image(size, seed=0, channels=3):
    """A smooth random image with values from 0 to 1."""
    noise = np.random.default_rng(seed).normal(size=(size, size, channels))
    smooth = scipy.ndimage.gaussian_filter(noise, (1.5, 1.5, 0), mode="nearest")
    return (smooth - smooth.min()) / (smooth.max() - smooth.min())


def convolutions(shapes, activation="tanh", bias=False, init="torch"):
    """A network of convolutions (filters, window, stride, padding) and a dense layer."""
    body = [Spec("conv", *shape, activation=activation, bias=bias) for shape in shapes]
    return chain_model([*body, Spec("flatten"), Spec("dense", 10)], 10, "convolutions", init)


def cast(tree, dtype=jnp.float64):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def observed(model, inputs, label=3, seed=0, input_range=CENTERED, defense=None, **granted):
    """What a server sees of one image, in the image's precision."""
    inputs = jnp.asarray(inputs)[None]
    batch = invjax.Batch(inputs, jnp.asarray([label]))

    @jax.jit
    def see(key, batch):
        params = cast(model.init(jax.random.key(seed), inputs.shape[1:]), inputs.dtype)
        return invjax.observe(
            key, model, params, batch, defense, input_range=input_range, **granted
        )

    return batch, see(jax.random.key(1), batch)


def run(model, seen, **settings):
    return jax.jit(layerwise(model, **settings))(jax.random.key(0), seen)


def mse(batch, found):
    return float(jnp.mean((batch.inputs - found.inputs) ** 2))


def flipped(model, seen, inputs):
    """The label that the model does not predict: R-GAP's demonstration."""
    return int(model.apply(seen.params, jnp.asarray(inputs)[None])[0, 0] <= 0)


def cnn6_observed(size, make=models.cnn6, **settings):
    model, inputs = make(), image(size)
    _, seen = observed(model, inputs, 0, input_range=(0.0, 1.0))
    label = flipped(model, seen, inputs)
    return model, *observed(model, inputs, label, input_range=(0.0, 1.0), **settings)


def test_homogeneous_layers_share_one_inner_product():
    with jax.enable_x64(True):
        model, batch, seen = cnn6_observed(16)
        margin = (2 * batch.labels[0] - 1) * model.apply(seen.params, batch.inputs)[0, 0]
        pairs = zip(model.layers(seen.params), model.layers(seen.gradient), strict=True)
        found = [
            jnp.sum(layer.weight * observed.weight)
            for layer, observed in pairs
            if layer.weight is not None
        ]
        assert len(found) == 7 and margin < 0
        np.testing.assert_allclose(found, -margin * special.expit(-margin), rtol=1e-12)


@pytest.mark.parametrize(
    ("size", "bound", "ranks"),
    [
        (16, 1e-20, (768, 972, 900, 900, 900, 576, 1152)),
        pytest.param(32, 1e-18, (3072, 3468, 2916, 2916, 2916, 1600, 3200), marks=pytest.mark.slow),
    ],
)
def test_cnn6_exactly(size, bound, ranks):
    """R-GAP's network with its flipped label: all ranks are full."""
    with jax.enable_x64(True):
        model, batch, seen = cnn6_observed(size, grant_labels=True)
        found = run(model, seen)
        assert mse(batch, found) < bound and found.found.all() and found.objective < 1e-12
        assert found.diagnostics["rank"].tolist() == list(ranks)
        assert found.diagnostics["unknowns"].tolist() == list(ranks)
        assert found.diagnostics["smallest"].min() > 1e-4


@pytest.mark.slow
def test_cnn6_in_single_precision_and_without_the_label():
    model, batch, seen = cnn6_observed(16)
    seen = seen._replace(params=cast(seen.params, jnp.float32))
    batch = invjax.Batch(jnp.asarray(batch.inputs, jnp.float32), batch.labels)
    seen = seen._replace(gradient=gradients.gradient(model, seen.params, batch))
    found = run(model, seen)
    assert found.inputs.dtype == jnp.float32
    assert mse(batch, found) < 1e-9 and found.found.all()
    assert found.labels == batch.labels and found.diagnostics["candidates"] == 1


@pytest.mark.slow
def test_cnn6_d_is_deficient_where_published():
    """Conv 2 lacks 280 of 3468; the layers behind it are exact, the image is not."""
    with jax.enable_x64(True):
        model, batch, seen = cnn6_observed(32, models.cnn6_d)
        found = run(model, seen)
        short = found.diagnostics["unknowns"] - found.diagnostics["rank"]
        assert short.tolist() == [0, 280, 0, 0, 0, 0, 0]
        assert mse(batch, found) > 1e-2 and not found.found.any()
        assert found.diagnostics["residual"][2:].max() < 1e-12


@pytest.mark.parametrize(
    ("shapes", "short"),
    [
        ([(3, 3, 1, 0)], (108, 0)),
        ([(4, 3, 1, 0)], (0, 0)),
        ([(6, 4, 2, 0)], (222, 0)),
        ([(12, 5, 2, 0)], (93, 0)),
        ([(6, 3, 1, 0), (3, 4, 2, 0)], (0, 789, 0)),
        ([(12, 3, 2, 1), (12, 5, 2, 2), (12, 5, 1, 2)], (0, 0, 0, 0)),
    ],
)
def test_full_rank_decides(shapes, short):
    """Networks of Chen and Campbell at 16x16: exact with full rank, and far off without."""
    with jax.enable_x64(True):
        model = convolutions(shapes)
        batch, seen = observed(model, image(16) - 0.5)
        found = run(model, seen)
        unknowns, rank = found.diagnostics["unknowns"], found.diagnostics["rank"]
        assert (unknowns - rank).tolist() == list(short)
        assert found.labels == 3
        if any(short):
            assert mse(batch, found) > 5e-3 and not found.found.any()
        else:
            assert mse(batch, found) < 1e-20 and found.found.all()


@pytest.mark.parametrize(
    "activation", ["relu", "softplus", "sigmoid", "leaky_relu", "elu", "identity"]
)
def test_activations_of_convolutions(activation):
    """With biases, and the head's input negative in part where the activation allows it."""
    with jax.enable_x64(True):
        model = convolutions([(8, 3, 1, 1), (16, 3, 2, 1)], activation, bias=True)
        batch, seen = observed(model, image(8) - 0.5)
        found = run(model, seen)
        assert mse(batch, found) < 1e-20 and found.found.all(), found.diagnostics


@pytest.mark.slow
def test_the_index_tells_what_comes_back():
    """The sixteen reference networks at 16x16, three seeds each: exact where the index is zero."""
    shape, indices, errors = (16, 16, 3), [], []
    with jax.enable_x64(True):
        for name in NAMES:
            rgap = name in ("cnn6", "cnn6_d")
            model = reference(name, 1 if rgap else 10)
            index = security_index(model, shape).index
            attack = jax.jit(layerwise(model))
            for seed in range(3):
                inputs, label = image(16) - (0.0 if rgap else 0.5), 3
                span = (0.0, 1.0) if rgap else CENTERED
                if rgap:
                    _, seen = observed(model, inputs, 0, seed, span)
                    label = flipped(model, seen, inputs)
                batch, seen = observed(model, inputs, label, seed, span, grant_labels=True)
                found = attack(jax.random.key(0), seen)
                indices.append(index)
                errors.append(mse(batch, found))
                assert found.found.all() == (index == 0), (name, seed)
    indices, errors = np.array(indices), np.array(errors)
    assert errors[indices == 0].max() < 1e-20 and errors[indices < 0].min() > 5e-3
    # The order among exact results is that of rounding; with it the correlation is -0.83.
    assert stats.spearmanr(indices, np.maximum(errors, 1e-20)).statistic < -0.85


def test_outputs_of_softplus_that_overflow_an_exponential():
    for value in (1e-3, 1.0, 90.0):
        before, known, slope = invert("softplus", jnp.full(1, value, jnp.float32))
        np.testing.assert_allclose(jax.nn.softplus(before), value, rtol=1e-5)
        np.testing.assert_allclose(slope, jax.nn.sigmoid(before), rtol=1e-5)
        assert known.all()


def test_solvers_agree_on_what_is_determined():
    with jax.enable_x64(True):
        model = convolutions([(8, 3, 1, 1), (16, 3, 1, 1)])
        batch, seen = observed(model, image(8) - 0.5)
        for solver in ("joint", "weight_only", ("joint", "gradient_only"), ["nullspace"] * 2):
            found = run(model, seen, solver=solver)
            assert mse(batch, found) < 1e-20 and found.found.all(), solver
        short = run(model, seen, solver="gradient_only")
        # 72 gradient rows for 64 pixels behind, 72 for 64 in front; with 4 filters too few.
        assert short.found.all() and mse(batch, short) < 1e-20
        model = convolutions([(4, 3, 1, 1)])
        batch, seen = observed(model, image(8) - 0.5)
        short = run(model, seen, solver="gradient_only")
        assert short.diagnostics["rank"][0] == 3 * 36 and not short.found.any()
        assert short.diagnostics["residual"][0] > 1e-3


@pytest.mark.parametrize("kind", ["nullspace", "joint"])
def test_a_deficient_layer_gets_the_solution_of_least_norm(kind):
    with jax.enable_x64(True):
        model = convolutions([(3, 3, 2, 0)])
        batch, seen = observed(model, image(8) - 0.5)
        found = run(model, seen, solver=kind)
        layer = model.layers(seen.params)[0]
        shape = invjax.linalg.geometry(layer, (8, 8, 3))
        rows = np.concatenate(
            [
                invjax.linalg.conv_matrix(layer.weight, shape).toarray(),
                invjax.linalg.gradient_matrix(signal_of(model, seen, batch), shape),
            ]
        )
        truth = np.ravel(batch.inputs)
        least = np.linalg.pinv(rows, 1e-10) @ (rows @ truth)
        np.testing.assert_allclose(np.ravel(found.inputs), least, rtol=0, atol=1e-10)


def signal_of(model, seen, batch):
    """The derivative of the loss by what the first convolution computes, `[Q, filters]`."""
    first, rest = model.layers(seen.params)[0], model.layers(seen.params)[1:]

    def loss(values):
        outputs = models.layers.apply_layers(rest, jnp.tanh(values))
        return -jax.nn.log_softmax(outputs)[0, batch.labels[0]]

    plain = models.layers.apply_layer(first._replace(activation="identity"), batch.inputs)
    return np.asarray(jax.grad(loss)(plain)).reshape(-1, first.weight.shape[-1])


@pytest.mark.parametrize(
    ("activation", "bias"),
    [(name, True) for name in ("tanh", "relu", "gelu")]
    + [(name, False) for name in ("leaky_relu_0.2", "softplus", "elu")],
)
def test_fully_connected_networks(activation, bias):
    """With biases every layer speaks for itself; without, each from the one behind it."""
    with jax.enable_x64(True):
        widths = (100, 50) if activation == "relu" else (32, 16)
        model = models.mlp(widths, 10, activation, bias)
        inputs, _ = invjax.datasets.take(invjax.datasets.digits(), np.array([5]))
        batch, seen = observed(model, np.float64(inputs[0]), 4, input_range=(0.0, 1.0))
        found = run(model, seen)
        assert mse(batch, found) < 1e-25 and found.found.all() and found.labels == 4
        assert found.diagnostics["unknowns"].tolist() == [64, *widths]


def with_margin(margin):
    """CNN6 with a head scaled to a margin, its image and what is seen with the right label."""
    model, batch, seen = cnn6_observed(16)
    logit = model.apply(seen.params, batch.inputs)[0, 0]
    params = jax.tree.map(lambda leaf: leaf, seen.params)
    params["layer07"]["kernel"] = params["layer07"]["kernel"] * margin / jnp.abs(logit)
    label = (logit > 0).astype(jnp.int32)[None]
    batch = invjax.Batch(batch.inputs, label)
    see = jax.jit(lambda key, *parts: invjax.observe(key, model, *parts, grant_labels=True))
    return model, batch, see(jax.random.key(0), params, batch)


PRODUCT = -2.5 * special.expit(-2.5)
TWIN = (-PRODUCT - special.lambertw(PRODUCT * np.exp(-PRODUCT), 0).real) / 2.5  # 0.20135


def test_twins_have_the_same_gradients():
    with jax.enable_x64(True):
        model, batch, seen = with_margin(2.5)
        differentiate = jax.jit(functools.partial(gradients.gradient, model))
        for branch, factor in ((-1, 1.0), (0, TWIN)):
            found = run(model, seen, branch=branch)
            np.testing.assert_allclose(found.inputs, factor * batch.inputs, rtol=0, atol=1e-12)
            assert found.found.all()
            again = differentiate(seen.params, invjax.Batch(found.inputs, batch.labels))
            wrong = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), again, seen.gradient)
            assert max(jax.tree.leaves(wrong)) < 1e-12
        # Both lie in the range: the larger is returned, and nothing is claimed.
        found = run(model, seen)
        assert mse(batch, found) < 1e-20 and not found.found.any()
        assert found.diagnostics["candidates"] == 2


@pytest.mark.slow
def test_the_range_tells_twins_apart():
    """With a margin of a half the twin is five times as bright."""
    with jax.enable_x64(True):
        model, batch, seen = with_margin(0.5)
        found = run(model, seen)
        assert mse(batch, found) < 1e-20 and found.found.all()
        assert found.diagnostics["candidates"] == 2
        # Nor is the label needed: of the other one all images are negative.
        found = run(model, seen._replace(labels=None))
        assert mse(batch, found) < 1e-20 and found.found.all() and found.labels == batch.labels


def test_a_clipped_gradient_says_nothing_of_brightness():
    """Too bright is out of range and not found; too dark is in range, and taken for the truth."""
    with jax.enable_x64(True):
        model, batch, seen = with_margin(2.5)
        norm = float(optax.tree.norm(seen.gradient))
        clip = invjax.defenses.global_clip(norm / 2)
        see = jax.jit(lambda key, *parts: invjax.observe(key, model, *parts, clip))
        clipped = see(jax.random.key(0), seen.params, batch)._replace(labels=batch.labels)
        for branch, said in ((-1, False), (0, True), (None, True)):
            found = run(model, clipped, branch=branch)
            margin = bootstrap.logistic_margin(jnp.asarray(PRODUCT / 2), branch or 0)
            factor = float(margin) / 2.5
            np.testing.assert_allclose(found.inputs, factor * batch.inputs, rtol=0, atol=1e-12)
            assert (factor > 1) == (branch == -1) and (found.found.all() == said)
            assert found.objective < 1e-10


@pytest.mark.parametrize("activation", ["leaky_relu_0.2", "softplus"])
def test_rescaled_gradients_of_several_logits_are_noticed(activation):
    """Without biases every dense gradient is of rank one by any factor, of all layers or of one."""
    with jax.enable_x64(True):
        model = models.mlp((32, 16), 10, activation, False)
        batch, seen = observed(model, image(4), 4, input_range=(0.0, 1.0))
        attack = jax.jit(layerwise(model))
        found = attack(jax.random.key(0), seen)
        assert mse(batch, found) < 1e-25 and found.found.all()
        halved = jax.tree.map(lambda leaf: leaf / 2, seen.gradient)
        for names in [list(halved)] + [[name] for name in halved]:
            part = {**seen.gradient, **{name: halved[name] for name in names}}
            found = attack(jax.random.key(0), seen._replace(gradient=part))
            assert not found.found.any() and found.objective > 1e-3, names
            assert len(names) == 1 or mse(batch, found) > 1e-4


POOLED = [
    Spec("conv", 8, 3, 1, 1, "leaky_relu_0.2"),
    Spec("conv", 14, 3, 1, 1),
    Spec("average_pool", window=2, activation="tanh"),
    Spec("flatten"),
    Spec("dense", 10),
]


def test_biases_and_an_average_pool():
    with jax.enable_x64(True):
        model = chain_model(POOLED, 10, "pooled", "wide")
        batch, seen = observed(model, 0.2 * (image(12) - 0.5))
        found = run(model, seen)
        assert found.diagnostics["rank"].tolist() == [432, 1152, 504]
        assert mse(batch, found) < 1e-24 and found.found.all()
        signal = signal_of_pooled(model, seen, batch)
        np.testing.assert_allclose(signal, model.layers(seen.gradient)[1].bias, rtol=0, atol=1e-14)
        # Without the biases of the convolutions the systems contradict each other.
        bare = jax.tree.map(lambda leaf: leaf, seen.params)
        for name in ("layer00", "layer01"):
            bare[name]["bias"] = jnp.zeros_like(bare[name]["bias"])
        blind = run(model, seen._replace(params=bare))
        assert mse(batch, blind) > 1e-3 and not blind.found.any()


def signal_of_pooled(model, seen, batch):
    """The derivative by the second convolution's output, summed over pixels."""
    layers = model.layers(seen.params)
    hidden = models.layers.apply_layers(layers[:2], batch.inputs)

    def loss(hidden):
        logits = models.layers.apply_layers(layers[2:], hidden)
        return -jax.nn.log_softmax(logits)[0, batch.labels[0]]

    return jax.grad(loss)(hidden).sum(axis=(0, 1, 2))


@pytest.mark.parametrize(("size", "window", "rank"), [(9, 2, 243), (7, 3, 108)])
def test_a_pool_that_crops(size, window, rank):
    """In the second, weight rows add nothing to gradient rows: the rounding left of them is no rank."""
    with jax.enable_x64(True):
        pool = Spec("average_pool", window=window, activation="elu")
        specs = [Spec("conv", 24, 3, 1, 1), pool, Spec("flatten"), Spec("dense", 10)]
        model = chain_model(specs, 10, "crops")
        batch, seen = observed(model, image(size) - 0.5)
        found = run(model, seen)
        full = rank == 3 * size**2
        assert found.diagnostics["rank"][0] == rank and found.found == full
        assert (mse(batch, found) < 1e-20) == full


def test_several_pools_are_one():
    """Windows of 2, 1 and 2 as one of 4, the activation behind the last."""
    with jax.enable_x64(True):
        pools = [Spec("average_pool", window=window) for window in (2, 1, 2)]
        pools[-1] = pools[-1]._replace(activation="tanh")
        specs = [Spec("conv", 24, 9, 1, 4), *pools, Spec("flatten"), Spec("dense", 10)]
        model = chain_model(specs, 10, "pools")
        batch, seen = observed(model, image(8) - 0.5)
        found = run(model, seen)
        (layer,) = security_index(model, (8, 8, 3), mode="numeric").layers
        assert found.diagnostics["rank"][0] == layer.rank == 192
        assert mse(batch, found) < 1e-20 and found.found.all()


@pytest.mark.parametrize("size", [16, pytest.param(32, marks=pytest.mark.slow)])
def test_gradient_rows_alone_behind_relu(size):
    """R-CONV's LetNet_O: ReLU within, gradient rows alone but for the first layer."""
    with jax.enable_x64(True):
        shapes = [(12, 5, 2, 2), (16, 5, 2, 2), (3, 5, 1, 2), (3, 5, 1, 2)]
        names = ["leaky_relu_0.2"] * 2 + ["relu"] * 2
        body = [Spec("conv", *shape, name) for shape, name in zip(shapes, names, strict=True)]
        model = chain_model([*body, Spec("flatten"), Spec("dense", 10)], 10, "letnet_o", "wide")
        batch, seen = observed(model, image(size), input_range=(0.0, 1.0))
        found = run(model, seen, solver=["weight_only"] + ["gradient_only"] * 3)
        ranks = np.array([3072, 3072, 1024, 192, 192]) * size**2 // 32**2
        np.testing.assert_array_equal(found.diagnostics["rank"], ranks)
        assert found.diagnostics["residual"][1:].max() < 1e-10
        assert mse(batch, found) < 1e-12 and found.found.all()


@pytest.mark.parametrize(
    "shapes",
    [
        [(6, 3, 1, 0)],
        pytest.param([(12, 3, 2, 1), (12, 5, 2, 2), (12, 5, 1, 2)], marks=pytest.mark.slow),
    ],
)
def test_the_error_is_linear_in_the_noise(shapes):
    with jax.enable_x64(True):
        model = convolutions(shapes)
        batch, seen = observed(model, image(16) - 0.5)
        leaves, tree = jax.tree.flatten(seen.gradient)
        keys = jax.random.split(jax.random.key(3), len(leaves))
        attack = jax.jit(layerwise(model))

        def error(sigma):
            noisy = [
                leaf + sigma * jnp.std(leaf) * jax.random.normal(key, leaf.shape)
                for key, leaf in zip(keys, leaves, strict=True)
            ]
            found = attack(
                key=jax.random.key(0), observation=seen._replace(gradient=tree.unflatten(noisy))
            )
            return mse(batch, found), bool(found.found[0])

        (small, _), (large, said) = error(1e-6), error(1e-4)
        np.testing.assert_allclose(large / small, 1e4, rtol=0.01)
        assert not said and small > 1e-18


def test_jit_and_vmap_over_victims():
    with jax.enable_x64(True):
        model = convolutions([(8, 3, 1, 1), (9, 3, 2, 1)])
        inputs = jnp.stack([jnp.asarray(image(8, seed) - 0.5) for seed in range(3)])
        params = cast(model.init(jax.random.key(0), (8, 8, 3)))
        batches = invjax.Batch(inputs[:, None], jnp.arange(3)[:, None])
        keys = jax.random.split(jax.random.key(0), 3)
        see = functools.partial(invjax.observe, model=model, params=params, input_range=CENTERED)
        seen = jax.vmap(lambda key, batch: see(key, batch=batch))(keys, batches)
        found = jax.jit(jax.vmap(layerwise(model)))(keys, seen)
        assert jnp.mean((found.inputs - batches.inputs) ** 2) < 1e-20 and found.found.all()
        np.testing.assert_array_equal(found.labels, batches.labels)


def test_what_it_cannot_undo_is_refused_at_use():
    """By its activation, its pool, its batch, its number of solvers; before anything is compiled."""
    dense = [Spec("flatten"), Spec("dense", 10)]
    pool = Spec("average_pool", window=2)
    cases = [
        ([Spec("conv", 4, 3, 1, 1, "gelu"), *dense], ValueError, "activation gelu of the layer 0"),
        ([Spec("conv", 4, 3, 1, 1, "tanh"), pool, *dense], NotImplementedError, "average_pool"),
        (
            [Spec("conv", 4, 3, 1, 1), pool._replace(kind="max_pool"), *dense],
            NotImplementedError,
            "Layer 1 of refused, max_pool",
        ),
        (
            [Spec("conv", 4, 3, 1, 1), Spec("global_average_pool"), dense[1]],
            NotImplementedError,
            "Layer 1 of refused, global_average_pool",
        ),
        (
            [Spec("conv", 4, 3, 1, 1), Spec("flatten", activation="tanh"), dense[1]],
            NotImplementedError,
            "Layer 1 of refused, flatten",
        ),
        (
            [Spec("flatten"), Spec("dense", 8, activation="silu", bias=False), dense[1]],
            ValueError,
            "silu",
        ),
        (
            [Spec("flatten"), Spec("dense", 10, activation="tanh", bias=False)],
            ValueError,
            "of the head",
        ),
    ]
    for specs, kind, message in cases:
        with pytest.raises(kind, match=message):
            check(chain_model(specs, 10, "refused"))
    model = convolutions([(4, 3, 1, 1)])
    with pytest.raises(ValueError, match=r"one for each of the 1 convolutions .* got 2"):
        check(model, solver=["joint", "joint"])
    with pytest.raises(ValueError, match=r"layerwise reads one sample.* got 2"):
        check(model, batch_size=2)
    rounds = invjax.LocalTraining(epochs=2, batch_size=1, learning_rate=0.1, num_samples=1)
    with pytest.raises(
        ValueError, match=r"layerwise reads the gradient of one step, .* 2 local steps"
    ):
        check(model, local=rounds)


def check(model, solver="nullspace", batch_size=1, local=None):
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), (8, 8, 3)))
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    facts = invjax.Facts(input_shape=(8, 8, 3), num_classes=10, batch_size=batch_size, local=local)
    layerwise(model, solver=solver).check(invjax.Observation(params, params, facts))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "qr"}, "solver must be one of"),
        ({"branch": 1}, "branch must be 0, -1 or None, got 1"),
        ({"rtol": 0.0}, "rtol must lie in"),
        ({"tolerance": -1.0}, "tolerance must lie in"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        layerwise(models.cnn6(), **settings)
