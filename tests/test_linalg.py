"""A convolution as a linear system: its rows are those of JAX's convolution and its derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from invjax import linalg, models
from invjax.base import Layer

SHAPES = {
    "plain": linalg.Geometry(5, 6, 2, 3, (3, 3), (1, 1), ((0, 0), (0, 0))),
    "stride and padding": linalg.Geometry(8, 7, 3, 4, (4, 3), (2, 2), ((2, 2), (1, 0))),
    "unread pixels": linalg.Geometry(8, 8, 1, 2, (3, 3), (2, 2), ((0, 0), (0, 0))),
}


def convolve(inputs, weight, shape):
    return lax.conv_general_dilated(
        inputs, weight, shape.strides, shape.padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@pytest.mark.parametrize("name", SHAPES)
def test_rows_are_those_of_the_convolution(name):
    shape, rng = SHAPES[name], np.random.default_rng(0)
    with jax.enable_x64(True):
        weight = rng.normal(size=(*shape.window, shape.channels, shape.filters))
        inputs = rng.normal(size=(1, shape.height, shape.width, shape.channels))
        out, pull = jax.vjp(lambda weight: convolve(jnp.asarray(inputs), weight, shape), weight)
        assert out.shape[1:3] == shape.output and out.size == shape.outputs
        found = linalg.conv_matrix(weight, shape) @ inputs.ravel()
        np.testing.assert_allclose(found, np.ravel(out), rtol=0, atol=1e-13)
        signal = rng.normal(size=out.shape)
        (gradient,) = pull(jnp.asarray(signal))
        rows = linalg.gradient_matrix(signal.reshape(-1, shape.filters), shape)
        np.testing.assert_allclose(rows @ inputs.ravel(), np.ravel(gradient), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("size", "channels", "filters", "window", "stride", "ranks"),
    [
        # Rank of the weight rows, of the gradient rows, and of both: filters squared less than their sum.
        (12, 3, 2, 4, 2, (50, 96, 142)),
        (14, 3, 6, 3, 1, None),
        (14, 3, 6, 4, 2, (216, 288, 468)),
        (16, 3, 6, 4, 2, (294, 288, 546)),
    ],
)
def test_weight_and_gradient_rows_share_the_square_of_the_filters(
    size, channels, filters, window, stride, ranks
):
    shape = linalg.Geometry(
        size, size, channels, filters, (window, window), (stride, stride), ((0, 0), (0, 0))
    )
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(window, window, channels, filters))
    signal = rng.normal(size=(shape.outputs // filters, filters))
    rows = linalg.conv_matrix(weight, shape).toarray(), linalg.gradient_matrix(signal, shape)
    found = [linalg.numerical_rank(part) for part in (*rows, np.concatenate(rows))]
    if ranks is not None:
        assert tuple(found) == ranks
        assert found[2] == found[0] + found[1] - filters**2
    assert found[2] == linalg.closed_form_rank(shape)
    # The identity itself, for every pair of filters.
    taps = rows[1].reshape(window**2, channels, filters, -1)
    kernel = weight.reshape(window**2, channels, filters)
    outer = rows[0].reshape(-1, filters, shape.unknowns)
    left = np.einsum("tcp,tcox->pox", kernel, taps)
    right = np.einsum("qo,qpx->pox", signal, outer)
    np.testing.assert_allclose(left, right, rtol=0, atol=1e-12)


def test_the_closed_form_is_the_numerical_rank_of_most_convolutions():
    rng, hits = np.random.default_rng(1), []
    for _ in range(40):
        window, stride = int(rng.integers(2, 4)), int(rng.integers(1, 3))
        pads = tuple((int(pad), int(pad)) for pad in rng.integers(0, 2, 2))
        shape = linalg.Geometry(
            *rng.integers(6, 10, 2).tolist(),
            int(rng.integers(1, 4)),
            int(rng.integers(1, 7)),
            (window, window),
            (stride, stride),
            pads,
        )
        weight = rng.normal(size=(window, window, shape.channels, shape.filters))
        signal = rng.normal(size=(shape.outputs // shape.filters, shape.filters))
        rows = linalg.conv_matrix(weight, shape).toarray(), linalg.gradient_matrix(signal, shape)
        hits.append(linalg.numerical_rank(np.concatenate(rows)) == linalg.closed_form_rank(shape))
    assert np.mean(hits) >= 0.95


def test_published_ranks_in_closed_form():
    """The second convolution of CNN6-d at 32x32: 280 short of its 3468 unknowns; CNN6's is full."""
    for make, rank in ((models.cnn6_d, 3188), (models.cnn6, 3468)):
        model = make()
        params = jax.eval_shape(lambda model=model: model.init(jax.random.key(0), (32, 32, 3)))
        layer = [layer for layer in model.layers(params) if layer.kind == "conv"][1]
        shape = linalg.geometry(layer, (17, 17, 12))
        assert shape.unknowns == 3468 and linalg.closed_form_rank(shape) == rank


def test_published_columns_with_their_padding():
    """Programs that pad an image first count the padding as unknowns: CNN6 at 32x32, all full."""
    model, shape, columns = models.cnn6(), (32, 32, 3), []
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), shape))
    for layer in model.layers(params):
        if layer.kind == "conv":
            found = linalg.geometry(layer, shape)
            (top, bottom), (left, right) = found.padding
            columns.append(
                found.channels * (found.height + top + bottom) * (found.width + left + right)
            )
            assert linalg.closed_form_rank(found) == found.unknowns
            shape = (*found.output, found.filters)
    assert columns == [3888, 4332, 4356, 4356, 4356, 3136]


def test_geometry_is_of_a_convolution():
    with pytest.raises(ValueError, match="got a layer dense"):
        linalg.geometry(Layer("dense", np.zeros((2, 3))), (4, 4, 2))
    with pytest.raises(ValueError, match="wants 2 channels, input_shape has 3"):
        linalg.geometry(Layer("conv", np.zeros((3, 3, 2, 4))), (4, 4, 3))


def test_rank_of_nothing():
    assert linalg.numerical_rank(np.zeros((3, 2))) == 0
    assert linalg.numerical_rank(np.diag([1.0, 1e-3, 1e-12])) == 2
