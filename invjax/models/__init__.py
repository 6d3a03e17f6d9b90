"""Models: the networks of the literature, and adapters of users' own.

Everything is an `invjax.base.Model`: pure functions over a parameter tree. The zoo is written in
`flax.nnx`; a model that is a chain of layers has a layer view.
"""

from invjax.models.adapters import from_apply as from_apply
from invjax.models.adapters import from_linen as from_linen
from invjax.models.adapters import from_nnx as from_nnx
from invjax.models.adapters import normalized as normalized
from invjax.models.chain import activations as activations
from invjax.models.layers import with_layers as with_layers
from invjax.models.load import by_name as by_name
from invjax.models.load import load_params as load_params
from invjax.models.load import save_params as save_params
from invjax.models.losses import cross_entropy as cross_entropy
from invjax.models.reference import reference as reference
from invjax.models.resnet import resnet18 as resnet18
from invjax.models.zoo import cnn as cnn
from invjax.models.zoo import cnn6 as cnn6
from invjax.models.zoo import cnn6_d as cnn6_d
from invjax.models.zoo import convnet as convnet
from invjax.models.zoo import convnet_small as convnet_small
from invjax.models.zoo import lenet as lenet
from invjax.models.zoo import mlp as mlp

__all__ = [
    "activations",
    "by_name",
    "cnn",
    "cnn6",
    "cnn6_d",
    "convnet",
    "convnet_small",
    "cross_entropy",
    "from_apply",
    "from_linen",
    "from_nnx",
    "lenet",
    "load_params",
    "mlp",
    "normalized",
    "reference",
    "resnet18",
    "save_params",
    "with_layers",
]
