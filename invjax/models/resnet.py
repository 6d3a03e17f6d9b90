"""ResNet-18 for small images."""

from flax import nnx

from invjax.base import Layer, Model, PyTree
from invjax.checks import check_choice
from invjax.models.chain import activations, initializers, make_norm
from invjax.models.modules import check_image_shape, zoo_model


class Block(nnx.Module):
    """Two 3x3 convolutions and a skip (He et al. 2016)."""

    def __init__(self, channels: int, features: int, stride: int, norm: str, rngs, conv):
        def convolution(inputs, window, stride):
            padding = ((window // 2, window // 2),) * 2
            return nnx.Conv(
                inputs,
                features,
                (window, window),
                (stride, stride),
                padding=padding,
                use_bias=False,
                conv_general_dilated=conv,
                rngs=rngs,
                kernel_init=initializers("torch", window**2 * inputs)["kernel_init"],
            )

        self.conv1 = convolution(channels, 3, stride)
        self.norm1 = make_norm(norm, features, rngs)
        self.conv2 = convolution(features, 3, 1)
        self.norm2 = make_norm(norm, features, rngs)
        self.projects = stride != 1 or channels != features
        if self.projects:
            self.conv3 = convolution(channels, 1, stride)
            self.norm3 = make_norm(norm, features, rngs)

    def __call__(self, x):
        """Features of a batch of features."""
        h = nnx.relu(self.norm1(self.conv1(x)))
        h = self.norm2(self.conv2(h))
        skip = self.norm3(self.conv3(x)) if self.projects else x
        return nnx.relu(h + skip)


class ResNet(nnx.Module):
    """A 3x3 stem, four groups of two blocks, a global average and one or two dense layers."""

    def __init__(
        self, input_shape, num_classes: int, width: int, norm: str, hidden, activation, rngs, conv
    ):
        check_image_shape(input_shape)
        channels = input_shape[2]
        self.stem = nnx.Conv(
            channels,
            width,
            (3, 3),
            padding=((1, 1),) * 2,
            use_bias=False,
            conv_general_dilated=conv,
            rngs=rngs,
            kernel_init=initializers("torch", 9 * channels)["kernel_init"],
        )
        self.norm = make_norm(norm, width, rngs)
        blocks, channels = [], width
        for group in range(4):
            features = width * 2**group
            for index in range(2):
                stride = 2 if group > 0 and index == 0 else 1
                blocks.append(Block(channels, features, stride, norm, rngs, conv))
                channels = features
        self.blocks = nnx.List(blocks)
        self.activation = activation if hidden else None
        if hidden:
            self.hidden = nnx.Linear(channels, hidden, rngs=rngs, **initializers("torch", channels))
            channels = hidden
        self.head = nnx.Linear(channels, num_classes, rngs=rngs, **initializers("torch", channels))

    def __call__(self, x, features: bool = False):
        """Logits of a batch, or what goes into the dense layers."""
        x = nnx.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        x = x.mean(axis=(1, 2))
        if features:
            return x
        if self.activation is not None:
            x = activations[self.activation](self.hidden(x))
        return self.head(x)


def resnet18(
    num_classes: int = 10,
    width: int = 64,
    norm: str = "group",
    hidden: int = 0,
    activation: str = "relu",
) -> Model:
    """ResNet-18 (He et al. 2016) with the 3x3 stem that small images want.

    Args:
      num_classes: number of classes.
      width: channels of the first group; 64 as published.
      norm: `group`, or `batch` in evaluation mode.
      hidden: units of one more dense layer before the last; 0 for none, as published.
      activation: behind those units.

    Returns:
      The model.

    Raises:
      ValueError: an unknown norm or activation, a size below one, a negative number of hidden units.
    """
    check_choice("norm", norm, ("group", "batch"))
    check_choice("activation", activation, tuple(activations))
    for name, size, least in (
        ("num_classes", num_classes, 1),
        ("width", width, 1),
        ("hidden", hidden, 0),
    ):
        if size < least:
            raise ValueError(f"{name} must be at least {least}, got {size}.")

    def build(input_shape, rngs, conv):
        return ResNet(input_shape, num_classes, width, norm, hidden, activation, rngs, conv)

    def head(tree: PyTree) -> tuple[Layer, ...]:
        last = Layer("dense", tree["head"]["kernel"], tree["head"]["bias"])
        if not hidden:
            return (last,)
        first = Layer("dense", tree["hidden"]["kernel"], tree["hidden"]["bias"], activation)
        return first, last

    name = f"resnet18_{norm}" + (f"_{activation}{hidden}" if hidden else "")
    return zoo_model(build, num_classes, name, head=head, batch_norm=norm == "batch")
