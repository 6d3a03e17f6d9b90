"""Layer-wise linear systems: R-GAP, R-CONV and what they stand on.

`bootstrap` starts at the head, `solvers` undoes one convolution, `recursion` walks from the logits to
the image, and `residual` undoes a residual block.
"""

from invjax.attacks.analytic.layerwise.recursion import layerwise as layerwise

__all__ = ["layerwise"]
