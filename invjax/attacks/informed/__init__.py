"""The informed adversary, who holds all records but one and what was released of their training.

`glm` has closed forms for generalised linear models, `unrolled` inverts a deterministic training.
"""

from invjax.attacks.informed import glm as glm
from invjax.attacks.informed.unrolled import unrolled as unrolled

__all__ = ["glm", "unrolled"]
