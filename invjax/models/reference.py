"""The architectures on which layer-wise reconstruction was published, by their published names.

Chen and Campbell 2021, 2022 (convolutions without bias, then one dense layer with bias) and R-GAP
(Zhu and Blaschko 2021), as their programs define them.
"""

from invjax import calls
from invjax.base import Model
from invjax.models import zoo
from invjax.models.chain import Init, Spec, chain_model

Convolution = tuple[int, int, int, int]
"""Channels, window, stride, padding."""

CONVOLUTIONS: dict[str, list[Convolution]] = {
    "cnn2_c1": [(6, 3, 1, 0)],
    "cnn2_c2": [(6, 4, 2, 0)],
    "cnn2_c4": [(1, 3, 1, 0)],
    "cnn2_c5": [(3, 3, 1, 1)],
    "cnn2_c6": [(12, 5, 2, 0)],
    "cnn3_c1": [(6, 3, 1, 0), (3, 4, 2, 0)],
    "cnn3_c2": [(6, 4, 2, 0), (3, 3, 2, 0)],
    "cnn3_c3": [(6, 3, 1, 0), (9, 3, 1, 0)],
    "cnn3_c4": [(1, 3, 1, 0), (6, 3, 1, 0)],
    "cnn4_c1": [(6, 3, 1, 0), (5, 4, 2, 0), (3, 4, 1, 0)],
    "cnn4_c2": [(16, 5, 1, 0), (6, 5, 2, 0), (32, 5, 1, 2)],
    "cnn4_c3": [(6, 5, 1, 0), (16, 5, 2, 0), (16, 5, 1, 2)],
    "lenet2": [(12, 3, 2, 1), (12, 5, 2, 2), (12, 5, 1, 2)],
    "lenet_leaky": [(12, 5, 2, 2), (12, 5, 2, 2), (12, 5, 1, 2)],
}
"""The networks of Chen and Campbell; `lenet_leaky` is their LeNet."""

NAMES = (*CONVOLUTIONS, "cnn6", "cnn6_d")
"""All sixteen."""


def reference(
    name: str,
    num_classes: int = 10,
    activation: str | None = None,
    last_activation: str | None = None,
    init: Init = "torch",
) -> Model:
    """A reference architecture.

    The published variants with a second digit differ in activations alone: `cnn2_c11` is
    `reference("cnn2_c1", activation="leaky_relu", last_activation="sigmoid")`, `cnn2_c12` the same
    with `softplus`.

    Args:
      name: one of `NAMES`.
      num_classes: number of classes; of `cnn6` and `cnn6_d` 1 is as R-GAP has it, without any bias.
      activation: of the convolutions; as published by default (`tanh`, of the LeNet `leaky_relu`).
      last_activation: of the dense layer; as published by default (`tanh` for `cnn2_c4` and
        `cnn2_c5`, else `identity`).
      init: how weights start.

    Returns:
      The model, made for 32x32x3 inputs and possible on others.

    Raises:
      ValueError: an unknown name or choice, or a setting of CNN6, which has none.
    """
    if name in ("cnn6", "cnn6_d"):
        if (activation, last_activation, init) != (None, None, "torch"):
            raise ValueError(f"{name} takes no activation, last_activation or init.")
        return (zoo.cnn6 if name == "cnn6" else zoo.cnn6_d)(num_classes)
    if name not in CONVOLUTIONS:
        hint = calls.nearest(name, NAMES)
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}.{hint}")
    classic = name == "lenet_leaky"
    if activation is None:
        activation = "leaky_relu" if classic else "tanh"
    if last_activation is None:
        last_activation = "tanh" if name in ("cnn2_c4", "cnn2_c5") else "identity"
    # LeNet alone has biases in its convolutions.
    convs = [
        Spec("conv", *shape, activation=activation, bias=classic) for shape in CONVOLUTIONS[name]
    ]
    head = Spec("dense", num_classes, activation=last_activation)
    return chain_model([*convs, Spec("flatten"), head], num_classes, name, init)
