"""The rank index: published values, ranks against plain singular values, and what it promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from invjax import Batch, linalg, models
from invjax.attacks.analytic.layerwise.inverses import inverses
from invjax.models.chain import Spec, activations, chain_model
from invjax.models.layers import apply_layer
from invjax.models.reference import NAMES, reference
from invjax.theory import layer_rows
from invjax.theory.security_index import (
    Change,
    closing_changes,
    jacobian_rank,
    minimum_filters,
    security_index,
)

CIFAR = (32, 32, 3)
# Deficit of every convolution, and the index: 32x32x3.
PUBLISHED = {
    "cnn2_c1": ([0], 0),
    "cnn2_c2": ([-1470], -1470),
    "cnn2_c4": ([-2146], -2146),
    "cnn2_c5": ([0], 0),
    "cnn2_c6": ([-189], -189),
    "cnn3_c1": ([0, -4533], -2266),
    "cnn3_c2": ([-1470, -1050], -1995),
    "cnn3_c3": ([0, 0], 0),
    "cnn3_c4": ([-2146, 0], -2146),
    "cnn4_c1": ([0, -3965, -386], -2772),
    "cnn4_c2": ([0, -9316, 0], -6211),
    "cnn4_c3": ([0, -330, 0], -220),
    "lenet2": ([0, 0, 0], 0),
    "lenet_leaky": ([0, 0, 0], 0),
    "cnn6": ([0] * 6, 0),
    "cnn6_d": ([0, -280, 0, 0, 0, 0], -233),
}
QUICK = ("cnn2_c4",)
QUICK_SMALL = ("cnn2_c4", "cnn2_c5", "cnn3_c4", "cnn4_c1", "lenet2")


def costly(names, quick):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def net(*specs, classes=10):
    return chain_model([*specs, Spec("flatten"), Spec("dense", classes)], classes, "net")


def single(filters, window, stride, activation="tanh"):
    return net(Spec("conv", filters, window, stride, 0, activation, bias=False))


def sample(model, shape, seed=0):
    params = model.init(jax.random.key(seed), shape)
    inputs = jax.random.uniform(jax.random.key(seed + 1), (1, *shape)) - 0.5
    return params, Batch(inputs, jnp.array([3 % max(model.num_classes, 2)]))


def same(*found):
    """Whether indices agree but for how their ranks were computed."""
    bare = [
        one._replace(layers=[layer._replace(mode="closed") for layer in one.layers])
        for one in found
    ]
    return bare[0] == bare[1]


def deficits(found):
    return [layer.deficit for layer in found.layers]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_index_in_closed_form(name):
    assert set(PUBLISHED) == set(NAMES)
    found = security_index(reference(name), CIFAR)
    assert (deficits(found), found.index) == PUBLISHED[name]
    assert found.exact == (found.index == 0)
    depth = len(found.layers)
    assert [layer.weight for layer in found.layers] == [(depth - i) / depth for i in range(depth)]


@pytest.mark.parametrize("name", costly(NAMES, QUICK))
def test_published_index_numerically(name):
    found = security_index(reference(name), CIFAR, mode="numeric")
    assert (deficits(found), found.index) == PUBLISHED[name]


@pytest.mark.parametrize("name", costly(NAMES, QUICK_SMALL))
def test_closed_form_is_numeric_at_sixteen_pixels(name):
    shape = (16, 16, 3)
    closed, numeric = (
        security_index(reference(name), shape, mode=m) for m in ("closed", "numeric")
    )
    assert same(closed, numeric)


def test_cnn6_d_ranks_and_the_naive_count():
    found = security_index(reference("cnn6_d"), CIFAR)
    assert [layer.unknowns for layer in found.layers] == [3072, 3468, 1620, 2916, 2916, 1600]
    second = found.layers[1]
    # The count of R-GAP takes the layer for determined; it is 280 short.
    assert (second.rank, second.margin, second.term) == (3188, 3468 - 1620 - 2160, -233)
    assert second.reason == "280 equations short" and second.rows == "all"


@pytest.mark.parametrize(
    ("filters", "window", "stride", "rank"),
    [(3, 3, 1, 660), (4, 3, 1, 768), (6, 4, 2, 546), (9, 4, 2, 768), (12, 5, 2, 675)],
)
def test_one_convolution_at_sixteen_pixels(filters, window, stride, rank):
    for mode in ("closed", "numeric"):
        (layer,) = security_index(single(filters, window, stride), (16, 16, 3), mode=mode).layers
        assert (layer.rank, layer.unknowns) == (rank, 768)


def test_gradient_and_weight_rows_share_the_square_of_the_filters():
    (layer,) = security_index(single(2, 4, 2), (12, 12, 3), mode="numeric").layers
    assert (layer.gradient_rank, layer.joint_rank) == (96, 50 + 96 - 2**2)


def rows_by_jax(layers, shape, draw):
    """Weight and gradient rows as Jacobians of what JAX computes."""

    def linear(weight, inputs):
        values = inputs.reshape(1, *shape)
        for layer in layers:
            kernel = weight if layer.kind == "conv" else None
            values = apply_layer(layer._replace(weight=kernel, activation="identity"), values)
        return values.ravel()

    def convolved(weight, inputs):
        return apply_layer(
            layers[0]._replace(weight=weight, activation="identity"), inputs.reshape(1, *shape)
        ).ravel()

    def gradient(inputs):
        pull = jax.vjp(lambda weight: convolved(weight, inputs), weight)[1]
        return pull(jnp.ravel(draw.signal))[0].ravel()

    with jax.enable_x64(True):
        weight, point = jnp.asarray(draw.weight), jnp.zeros(int(np.prod(shape)))
        both = jax.jit(jax.jacfwd(lambda inputs: (linear(weight, inputs), gradient(inputs))))
        return jax.tree.map(np.asarray, both(point))


@pytest.mark.parametrize(
    ("shape", "conv", "pools"),
    [
        ((8, 7, 2), Spec("conv", 4, 3, 1, 0), []),
        ((9, 9, 3), Spec("conv", 5, 4, 2, 1), []),
        ((6, 6, 2), Spec("conv", 40, 3, 1, 1), []),
        ((9, 10, 2), Spec("conv", 4, 3, 1, 1), [2]),
        ((12, 12, 1), Spec("conv", 5, 3, 1, 0), [2, 2]),
        ((8, 8, 2), Spec("conv", 6, 3, 1, 0), [0]),
    ],
)
def test_numerical_ranks_are_those_of_all_rows_together(shape, conv, pools):
    pooled = [Spec("average_pool" if w else "global_average_pool", window=w or 1) for w in pools]
    model = net(conv, *pooled)
    layers, shapes = layer_rows.input_shapes(model, shape)
    stage = layer_rows.stage(layers, 0, shapes[0])
    draw = layer_rows.random_draw(np.random.default_rng(0), stage, None)
    draw = draw._replace(active=np.arange(stage.outputs) % 3 > 0)
    bare = [layer._replace(bias=None) for layer in layers[: 1 + len(pools)]]
    weights, gradients = rows_by_jax(bare, shape, draw)
    assert weights.shape == (stage.outputs, stage.shape.unknowns)
    # Both kinds of rows brought to one size, which leaves the rank as it is.
    weights, gradients = weights / np.linalg.norm(weights), gradients / np.linalg.norm(gradients)
    expected = [
        linalg.numerical_rank(np.concatenate(parts))
        for parts in ([gradients], [weights, gradients], [weights[draw.active], gradients])
    ]
    assert list(layer_rows.numerical_ranks(stage, draw)) == expected
    assert list(layer_rows.closed_ranks(stage))[:2] == expected[:2]


def test_pooled_closed_form_on_random_convolutions():
    rng, hits = np.random.default_rng(2), []
    for _ in range(25):
        channels, filters = int(rng.integers(1, 4)), int(rng.integers(1, 13))
        window, stride, pad = (int(rng.integers(*span)) for span in ((2, 5), (1, 3), (0, 2)))
        pool = Spec("average_pool", window=int(rng.integers(2, 4)), activation="tanh")
        model, side = (
            net(Spec("conv", filters, window, stride, pad), pool),
            int(rng.integers(8, 12)),
        )
        pair = [
            security_index(model, (side, side, channels), mode=mode)
            for mode in ("closed", "numeric")
        ]
        hits.append(same(*pair))
    assert np.mean(hits) >= 0.9


@pytest.mark.parametrize("shape", [(40, 25), (25, 40)])
def test_rank_beyond(shape):
    rng = np.random.default_rng(0)
    left = np.linalg.qr(rng.normal(size=(shape[0], 25)))[0]
    right = np.linalg.qr(rng.normal(size=(shape[1], 25)))[0]
    for small, expected in ((1e-3, 25), (1e-6, 25), (1e-12, 20)):
        values = np.array([1.0] * 20 + [small] * 5)
        assert layer_rows.rank_beyond(left * values @ right.T, 1.0) == expected
    # A piece that is rounding of the whole has no rank.
    assert layer_rows.rank_beyond(1e-15 * rng.normal(size=shape), 1.0) == 0
    assert layer_rows.rank_beyond(np.zeros((4, 0)), 1.0) == 0


@pytest.mark.parametrize(
    ("model", "rank", "second"),
    [
        (single(3, 3, 1), 660, None),
        (single(6, 4, 2), 546, None),
        (single(9, 4, 2), 768, None),
        # A deficit of the second layer, mended in part by the first layer's 6*3*9 or 6*3*16 gradients.
        (reference("cnn3_c1"), 387 + 162, 387),
        (reference("cnn3_c2"), 180 + 288, 180),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_jacobian_rank_is_that_of_the_rows(model, rank, second):
    shape = (16, 16, 3)
    params, batch = sample(model, shape)
    assert jacobian_rank(model, params, batch) == rank
    found = security_index(model, shape, mode="numeric", params=params, batch=batch)
    # A sample's own derivatives are as generic as random ones.
    assert same(found, security_index(model, shape))
    assert found.layers[0].rank >= rank
    if second is None:
        assert found.layers[0].rank == rank
    else:
        assert found.layers[1].rank == second


def test_inputs_along_the_first_layers_kernel_share_the_gradient():
    """Whatever follows: here a ReLU, a max-pool and a second convolution."""
    shape, rng = (10, 10, 2), np.random.default_rng(0)
    model = net(
        Spec("conv", 2, 3, 1, 0, "relu"),
        Spec("max_pool", window=2),
        Spec("conv", 3, 3, 1, 0, "gelu"),
    )
    params, batch = sample(model, shape)
    found = security_index(model, shape)
    missing = found.layers[0].unknowns - found.layers[0].joint_rank
    assert found.index is None and missing > 0
    layers, shapes = layer_rows.input_shapes(model, shape)
    stage = layer_rows.stage(layers, 0, shapes[0])
    (draw,) = layer_rows.draws_of_sample(model, [stage], params, batch)
    system = np.concatenate(
        [
            linalg.conv_matrix(draw.weight, stage.shape).toarray(),
            linalg.gradient_matrix(draw.signal, stage.shape),
        ]
    )
    values, basis = np.linalg.svd(system)[1:]
    kernel = basis[int((values > 1e-9 * values[0]).sum()) :]
    assert len(kernel) >= missing
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        truth = jnp.asarray(batch.inputs, jnp.float64)
        step = (rng.normal(size=len(kernel)) @ kernel).reshape(truth.shape)
        gradient = jax.jit(jax.grad(model.loss))
        first = gradient(wide, Batch(truth, batch.labels))
        twin = gradient(wide, Batch(truth + step, batch.labels))
        assert float(jnp.abs(step).max()) > 1
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(twin), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


def test_every_activation_is_classified():
    assert set(activations) - set(layer_rows.INVERTIBLE) == {"relu", "gelu", "silu"}
    # As the attack that the index predicts has them.
    assert set(inverses) - set(layer_rows.INVERTIBLE) == {"relu"}


def test_relu_counts_gradient_rows_and_a_samples_active_outputs():
    model, shape = single(6, 3, 2, "relu"), (13, 13, 3)
    (layer,) = security_index(model, shape).layers
    assert (layer.rows, layer.rank) == ("gradient", 3 * 6 * 9) and "alone" in layer.reason
    assert layer.joint_rank > layer.rank
    params, batch = sample(model, shape)
    found = security_index(model, shape, mode="numeric", params=params, batch=batch)
    (layer,) = found.layers
    weight = np.asarray(params["layer00"]["kernel"], np.float64)
    geometry = linalg.Geometry(13, 13, 3, 6, (3, 3), (2, 2), ((0, 0), (0, 0)))
    rows = linalg.conv_matrix(weight, geometry)
    active = np.asarray(rows @ np.asarray(batch.inputs, np.float64).ravel()) > 0
    assert 0.3 < active.mean() < 0.7
    (draw,) = layer_rows.draws_of_sample(
        model, [layer_rows.stage(model.layers(params), 0, shape)], params, batch
    )
    # Where the output is hidden the derivative is zero.
    np.testing.assert_array_equal(draw.active, active)
    assert not draw.signal.ravel()[~active].any() and draw.signal.ravel()[active].all()
    system = [rows.toarray()[active], linalg.gradient_matrix(draw.signal, geometry)]
    system = np.concatenate([part / np.linalg.norm(part) for part in system])
    assert layer.rows == "active" and layer.rank == linalg.numerical_rank(system)
    assert 3 * 6 * 9 < layer.rank < layer.joint_rank


def conv(filters=8, activation="tanh", **settings):
    return Spec("conv", filters, 3, 1, 1, activation, **settings)


@pytest.mark.parametrize(
    ("specs", "reasons"),
    [
        ([conv(), conv(), Spec("max_pool", window=2)], ["not reached: the rec", "the max-pool"]),
        ([conv(), Spec("average_pool", window=2), conv()], ["the pool behind its tanh", ""]),
        ([conv(activation="gelu"), conv(8)], ["its gelu has no inverse", ""]),
        ([conv(), Spec("global_average_pool")], ["the pool behind its tanh hides"]),
        (
            [conv(activation="identity"), Spec("global_average_pool", activation="tanh")],
            ["the global average pool behind it is not undone"],
        ),
    ],
)
def test_what_stops_the_recursion_is_said(specs, reasons):
    for mode in ("closed", "numeric"):
        found = security_index(net(*specs), (8, 8, 3), mode=mode)
        assert found.index is None and not found.exact
        for layer, reason in zip(found.layers, reasons, strict=True):
            assert layer.reason.startswith(reason) and bool(layer.reason) == bool(reason)
            assert (layer.rank is None) == (layer.rows == "none") == (layer.reason != "")
            assert layer.joint_rank > 0


def test_average_pool_before_the_activation_is_linear():
    # Enough outputs behind the pool: 8 x 8 x 12 for 16 x 16 x 3.
    pool = Spec("average_pool", window=2, activation="tanh")
    specs = [Spec("conv", 40, 5, 1, 2), pool]
    found = security_index(net(*specs), (12, 12, 3), mode="numeric")
    assert found.exact and found.layers[0].rank == 432
    assert found.layers[0].margin == 432 - 6 * 6 * 40 - 40 * 3 * 25
    assert not security_index(net(Spec("conv", 2, 5, 1, 2), pool), (12, 12, 3)).exact


@pytest.mark.parametrize(
    ("specs", "reason", "stops"),
    [
        ([conv(), Spec("flatten")], "does not end in a dense layer", True),
        ([conv(), Spec("dense", 4), Spec("flatten"), Spec("dense", 2)], "over pixels", True),
        ([Spec("average_pool", window=2), conv(), Spec("flatten"), Spec("dense", 2)], "befo", True),
        (
            [conv(), Spec("flatten"), Spec("dense", 8, activation="silu", bias=False)]
            + [Spec("dense", 2)],
            "the silu of layer 2",
            True,
        ),
        (
            [conv(), Spec("flatten"), Spec("dense", 2, activation="tanh", bias=False)],
            "no bias, and tanh",
            True,
        ),
        ([conv(), Spec("flatten", activation="tanh"), Spec("dense", 2)], "of its own", True),
        ([conv(), Spec("flatten"), Spec("dense", 2, bias=False)], "only a prior decides", False),
        (
            [conv(), Spec("flatten"), Spec("dense", 8, activation="silu"), Spec("dense", 2)],
            "",
            False,
        ),
    ],
)
def test_layers_beside_the_convolutions(specs, reason, stops):
    found = security_index(chain_model(specs, 2, "net"), (8, 8, 3))
    assert reason in found.reason and bool(found.reason) == bool(reason)
    assert found.exact is not stops and (found.index is None) is stops


def test_dense_networks_have_no_convolution_to_count():
    found = security_index(models.mlp((20,)), (8, 8, 1))
    assert found.exact and found.index == 0 and found.layers == ()
    with pytest.raises(ValueError, match="has no convolution"):
        closing_changes(models.mlp((20,)), (8, 8, 1))


def test_weights_of_the_model_are_taken():
    model, shape = single(4, 3, 1), (8, 8, 3)
    params = model.init(jax.random.key(0), shape)
    params["layer00"]["kernel"] = jnp.zeros_like(params["layer00"]["kernel"]).at[1, 1].set(1.0)
    (layer,) = security_index(model, shape, mode="numeric", params=params).layers
    # Four equal filters: every interior pixel's sum of channels, once, and the gradient rows.
    assert layer.joint_rank < security_index(model, shape).layers[0].joint_rank
    assert layer.gradient_rank == security_index(model, shape).layers[0].gradient_rank


@pytest.mark.parametrize(
    ("window", "stride", "padding", "expected"),
    [
        (3, 1, 0, (4, 4, 114)),
        (3, 1, 1, (3, 3, 114)),
        (4, 2, 0, (12, 14, 64)),
        (4, 2, 1, (11, 12, 64)),
        (5, 2, 2, (10, 12, 64)),
        (5, 1, 0, (4, 4, 41)),
        (3, 2, 1, (12, 12, 256)),
        (7, 2, 3, (8, 12, 29)),
        # A last row and column that no window reads; pixels between windows.
        (5, 2, 0, (None, None, None)),
        (1, 2, 0, (None, None, None)),
    ],
)
def test_minimum_filters(window, stride, padding, expected):
    assert minimum_filters(CIFAR, window, stride, padding) == expected


def test_minimum_filters_numerically():
    shape = (10, 10, 2)
    joint, weights, gradients = minimum_filters(shape, 4, 2, 1)
    for filters, pick in ((joint, "joint_rank"), (gradients, "gradient_rank")):
        for count, full in ((filters, True), (filters - 1, False)):
            model = net(Spec("conv", count, 4, 2, 1, "tanh"))
            (layer,) = security_index(model, shape, mode="numeric").layers
            assert (getattr(layer, pick) == layer.unknowns) is full
    assert joint <= weights == 8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((CIFAR, 0), "window"),
        ((CIFAR, 2.5), "window must be a whole number"),
        ((CIFAR, 3, 0), "stride"),
        ((CIFAR, 3, 1, -1), "padding"),
        (((0, 3, 3), 1), "input_shape"),
        ((CIFAR, 35, 1, 1), "larger than the padded input"),
    ],
)
def test_minimum_filters_refuses(arguments, words):
    with pytest.raises(ValueError, match=words):
        minimum_filters(*arguments)


def test_changes_that_close_the_first_layer():
    changes = closing_changes(reference("cnn2_c1"), CIFAR)
    assert changes == (Change(3, 1, -300), Change(6, 2, -1596))
    for change in changes:
        (layer,) = security_index(single(change.filters, 3, change.stride), CIFAR).layers
        assert layer.deficit == change.deficit
    assert security_index(single(4, 3, 1), CIFAR).exact
    assert closing_changes(reference("cnn2_c2"), CIFAR) == ()
    # Pixels that no window reads leave the others given away.
    unread = reference("cnn2_c6")
    assert security_index(unread, CIFAR).index == -189
    fewer, wider = closing_changes(unread, CIFAR)
    assert fewer.filters < 12 and fewer.stride == 2 and fewer.deficit < -189
    assert wider.filters == 12 and wider.stride > 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mode": "exact"}, "mode must be one of 'closed', 'numeric'"),
        ({"key": jax.random.key}, "mode='numeric' only"),
        ({"mode": "numeric", "batch": True}, "batch needs the params"),
        ({"mode": "numeric", "params": {"layer00": {}}}, "params do not fit"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        security_index(single(3, 3, 1), (8, 8, 3), **settings)


def test_bad_samples():
    model, shape = single(3, 3, 1), (8, 8, 3)
    params, batch = sample(model, shape)
    two = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), batch)
    with pytest.raises(ValueError, match="one sample, got 2"):
        security_index(model, shape, mode="numeric", params=params, batch=two)
    with pytest.raises(ValueError, match="one sample, got 2"):
        jacobian_rank(model, params, two)
    with pytest.raises(ValueError, match=r"shape \(9, 8, 3\)"):
        security_index(model, (9, 8, 3), mode="numeric", params=params, batch=batch)
    with pytest.raises(ValueError, match="chunk"):
        jacobian_rank(model, params, batch, chunk=0)
    with pytest.raises(ValueError, match="at most 4096 pixels, layer 0 reads 4225"):
        security_index(model, (65, 65, 3), mode="numeric")
    with pytest.raises(ValueError, match="no layer view"):
        security_index(models.resnet18(), (8, 8, 3))
