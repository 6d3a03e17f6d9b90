"""Data sets: the embedded digits, and readers of the usual files.

Every reader returns one `Dataset`; `load` finds a reader by name, `draw` picks victims.
"""

from invjax.datasets import tabular as tabular
from invjax.datasets.arrays import npz as npz
from invjax.datasets.cifar import cifar10_binary as cifar10_binary
from invjax.datasets.cifar import cifar10_python as cifar10_python
from invjax.datasets.digits import digits as digits
from invjax.datasets.folder import image_folder as image_folder
from invjax.datasets.idx import idx as idx
from invjax.datasets.load import NAMES as NAMES
from invjax.datasets.load import load as load
from invjax.datasets.types import Dataset as Dataset
from invjax.datasets.types import DatasetError as DatasetError
from invjax.datasets.types import denormalize as denormalize
from invjax.datasets.types import draw as draw
from invjax.datasets.types import from_arrays as from_arrays
from invjax.datasets.types import normalized as normalized
from invjax.datasets.types import take as take

__all__ = [
    "NAMES",
    "Dataset",
    "DatasetError",
    "cifar10_binary",
    "cifar10_python",
    "denormalize",
    "digits",
    "draw",
    "from_arrays",
    "idx",
    "image_folder",
    "load",
    "normalized",
    "npz",
    "tabular",
    "take",
]
