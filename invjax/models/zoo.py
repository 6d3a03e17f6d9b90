"""The networks of the literature, by the names it gives them."""

from collections.abc import Sequence

from invjax.base import Model
from invjax.models.chain import Init, Spec, chain_model


def mlp(
    widths: Sequence[int] | int = (128,),
    num_classes: int = 10,
    activation: str = "relu",
    bias: bool = True,
    init: Init = "torch",
) -> Model:
    """A multilayer perceptron on flattened inputs.

    Args:
      widths: units of every hidden layer; a number for one layer, none for a linear model.
      num_classes: number of classes; 1 for a binary model with one logit.
      activation: of the hidden layers, a name of `activations`.
      bias: whether layers have biases.
      init: how weights start: `torch`, `he`, `lecun` or `wide` (see `initializers`).

    Returns:
      The model.

    Raises:
      ValueError: an unknown activation or `init`, a size below one.

    Example:
      >>> import jax, invjax
      >>> model = invjax.models.mlp((16,), num_classes=3)
      >>> params = model.init(jax.random.key(0), (8, 8, 1))
      >>> model.apply(params, jax.numpy.zeros((2, 8, 8, 1))).shape
      (2, 3)
    """
    widths = (widths,) if isinstance(widths, int) else tuple(widths)
    hidden = [Spec("dense", width, activation=activation, bias=bias) for width in widths]
    head = Spec("dense", num_classes, bias=bias)
    return chain_model([Spec("flatten"), *hidden, head], num_classes, "mlp", init)


def lenet(
    num_classes: int = 10, activation: str = "sigmoid", width: int = 12, init: Init = "wide"
) -> Model:
    """The LeNet-style network of DLG (Zhu et al. 2019): three 5x5 convolutions and a dense layer.

    15,826 parameters on 32x32x3 inputs.

    Args:
      num_classes: number of classes.
      activation: `sigmoid` as published.
      width: channels of every convolution.
      init: `wide` as published: uniform between -0.5 and 0.5.

    Returns:
      The model.

    Raises:
      ValueError: an unknown activation or `init`, a size below one.
    """
    convs = [Spec("conv", width, 5, stride, 2, activation) for stride in (2, 2, 1)]
    return chain_model(
        [*convs, Spec("flatten"), Spec("dense", num_classes)], num_classes, "lenet", init
    )


def convnet(
    num_classes: int = 10, width: int = 64, norm: str = "batch", init: Init = "torch"
) -> Model:
    """The ConvNet of Inverting Gradients (Geiping et al. 2020): eight 3x3 convolutions, two pools.

    2.90 million parameters at width 64 on 32x32x3 inputs.

    Args:
      num_classes: number of classes.
      width: channels of the first convolution; the published sizes are 32, 64 and 128.
      norm: `batch` (evaluation mode) as published, `group` or `none`.
      init: how weights start, as in `mlp`.

    Returns:
      The model.

    Raises:
      ValueError: an unknown norm or `init`, a size below one.
    """

    def conv(factor: int) -> Spec:
        return Spec("conv", factor * width, 3, 1, 1, "relu", norm=norm)

    body = [conv(factor) for factor in (1, 2, 2, 4, 4, 4)]
    pool = Spec("max_pool", window=3)
    specs = [*body, pool, conv(4), conv(4), pool, Spec("flatten"), Spec("dense", num_classes)]
    return chain_model(specs, num_classes, f"convnet{width}", init)


def convnet_small(num_classes: int = 10, width: int = 32, init: Init = "torch") -> Model:
    """A small ConvNet without norm layers: four 3x3 convolutions, a pool, a global average.

    242,122 parameters at width 32 on 32x32x3 inputs.

    Args:
      num_classes: number of classes.
      width: channels of the first convolution.
      init: how weights start, as in `mlp`.

    Returns:
      The model.

    Raises:
      ValueError: an unknown `init`, a size below one.
    """

    def conv(factor: int, stride: int = 1) -> Spec:
        return Spec("conv", factor * width, 3, stride, 1, "relu")

    specs = [
        conv(1),
        conv(2),
        conv(4, 2),
        Spec("max_pool", window=3),
        conv(4, 2),
        Spec("global_average_pool"),
        Spec("dense", num_classes),
    ]
    return chain_model(specs, num_classes, f"convnet_small{width}", init)


def _cnn6(second: int, num_classes: int, name: str) -> Model:
    shapes = [(12, 4, 2, 2), (second, 3, 2, 1), (36, 3, 1, 1), (36, 3, 1, 1), (64, 3, 2, 1)]
    convs = [
        Spec("conv", *shape, activation="leaky_relu_0.2", bias=False)
        for shape in [*shapes, (128, 3, 1, 1)]
    ]
    head = Spec("dense", num_classes, bias=num_classes > 1)
    return chain_model([*convs, Spec("flatten"), head], num_classes, name)


def cnn6(num_classes: int = 1) -> Model:
    """CNN6 of R-GAP (Zhu and Blaschko 2021): six convolutions without bias, LeakyReLU 0.2.

    Args:
      num_classes: 1 as published (one logit, no bias); more give a dense head with bias.

    Returns:
      The model.

    Raises:
      ValueError: a number below one.
    """
    return _cnn6(36, num_classes, "cnn6")


def cnn6_d(num_classes: int = 1) -> Model:
    """CNN6-d of R-GAP: CNN6 with 20 channels in the second convolution, which makes it deficient.

    Args:
      num_classes: 1 as published; more give a dense head with bias.

    Returns:
      The model.

    Raises:
      ValueError: a number below one.
    """
    return _cnn6(20, num_classes, "cnn6_d")


def cnn(num_classes: int = 10, init: Init = "torch") -> Model:
    """The network of the Bayesian framework (Balunovic et al. 2022).

    Two 3x3 convolutions, each with ReLU and an average pool, and two dense layers.
    333,526 parameters on 28x28x1 inputs.

    Args:
      num_classes: number of classes.
      init: how weights start, as in `mlp`.

    Returns:
      The model.

    Raises:
      ValueError: an unknown `init`, a size below one.
    """
    pool = Spec("average_pool", window=2)
    specs = [
        Spec("conv", 32, 3, 1, 1, "relu"),
        pool,
        Spec("conv", 64, 3, 1, 1, "relu"),
        pool,
        Spec("flatten"),
        Spec("dense", 100, activation="relu"),
        Spec("dense", num_classes),
    ]
    return chain_model(specs, num_classes, "cnn", init)
