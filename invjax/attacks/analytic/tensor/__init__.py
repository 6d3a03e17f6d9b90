"""The tensor attack on two dense layers (Wang, Lee and Lei 2023), and what it stands on.

`hermite` holds the polynomials, `moments` takes spans and tensors from a gradient, `decompose` finds
components, `readout` their signs, norms and labels, `polish` fits the gradient, and `core` puts them
together; `attack` and `head` are the public faces, `two_layer` the model and the server's query point.
"""

from invjax.attacks.analytic.tensor.attack import tensor as tensor
from invjax.attacks.analytic.tensor.error import rmse as rmse
from invjax.attacks.analytic.tensor.head import HeadFeatures as HeadFeatures
from invjax.attacks.analytic.tensor.head import head_features as head_features
from invjax.attacks.analytic.tensor.hermite import hermite_coefficients as hermite_coefficients
from invjax.attacks.analytic.tensor.moments import batch_size_by_gap as batch_size_by_gap
from invjax.attacks.analytic.tensor.two_layer import planted_query as planted_query
from invjax.attacks.analytic.tensor.two_layer import query as query
from invjax.attacks.analytic.tensor.two_layer import two_layer as two_layer

__all__ = [
    "HeadFeatures",
    "batch_size_by_gap",
    "head_features",
    "hermite_coefficients",
    "planted_query",
    "query",
    "rmse",
    "tensor",
    "two_layer",
]
