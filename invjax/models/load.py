"""Models by name, and parameters in files."""

import functools
import pathlib
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from invjax import calls, files
from invjax.base import Model, Params
from invjax.models import resnet, zoo
from invjax.models.reference import CONVOLUTIONS, reference


def _mlp(*widths: Any, **settings: Any) -> Model:
    """As the command line writes it: `mlp(64, 32)` lists the widths."""
    listed = widths and all(isinstance(width, int) for width in widths)
    arguments: Any = (widths,) if listed else widths
    return zoo.mlp(*arguments, **settings)


_ZOO: dict[str, Callable[..., Model]] = (
    {"mlp": _mlp}
    | {name: functools.partial(reference, name) for name in CONVOLUTIONS}
    | {
        function.__name__: function
        for function in (
            zoo.lenet,
            zoo.convnet,
            zoo.convnet_small,
            zoo.cnn6,
            zoo.cnn6_d,
            zoo.cnn,
            resnet.resnet18,
        )
    }
)


def by_name(text: str, num_classes: int) -> Model:
    """A model of the zoo, as the command line names it.

    Args:
      text: a name, perhaps with settings: `lenet`, `mlp(64, 32)`, `convnet(width=32)`.
      num_classes: number of classes.

    Returns:
      The model.

    Raises:
      ValueError: an unknown name (the message lists the known ones) or setting.
    """
    models = calls.build(text, _ZOO, "model", num_classes=num_classes)
    if len(models) != 1:
        raise ValueError(f"Name one model, got {len(models)} in {text!r}.")
    return models[0]


def save_params(path: str | pathlib.Path, params: Params) -> None:
    """Write parameters as npz, so that whenever the machine stops the file is the old one or the new one.

    Args:
      path: the file; its folder is made if it is not there.
      params: the parameters.

    Raises:
      ValueError: a leaf of a type that npz cannot hold (bfloat16, keys).
      OSError: a full disk, say; no temporary file is left behind then.
    """
    arrays = {}
    for path_in_tree, leaf in jax.tree.leaves_with_path(params):
        name = jax.tree_util.keystr(path_in_tree)
        is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        array = leaf if is_key else np.asarray(leaf)
        if is_key or array.dtype.kind not in "biufc":
            raise ValueError(f"params{name} has dtype {array.dtype}, which npz cannot hold.")
        arrays[name] = array
    with files.replacing(pathlib.Path(path)) as file:
        np.savez(file, allow_pickle=False, **arrays)


def load_params(path: str | pathlib.Path, like: Params) -> Params:
    """Read parameters that `save_params` wrote; never unpickles.

    Args:
      path: the file.
      like: parameters (or shapes) of the tree to fill.

    Returns:
      The parameters.

    Raises:
      ValueError: a file that cannot be read, names or shapes that do not fit, values not finite.
    """
    try:
        # Opened here, because NumPy leaves a file open that is no archive.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read as weights (npz): {error}") from error
    expected = {
        jax.tree_util.keystr(name): leaf.shape for name, leaf in jax.tree.leaves_with_path(like)
    }
    if set(arrays) != set(expected):
        missing, extra = sorted(set(expected) - set(arrays)), sorted(set(arrays) - set(expected))
        raise ValueError(
            f"{path}: does not hold this model's weights: missing {missing[:4]}, "
            f"unknown {extra[:4]}."
        )
    for name, shape in expected.items():
        if arrays[name].shape != shape:
            raise ValueError(f"{path}: {name} must have shape {shape}, found {arrays[name].shape}.")
        if not np.isfinite(arrays[name]).all():
            raise ValueError(f"{path}: {name} must be finite, found NaN or infinity.")
    leaves = [
        jnp.asarray(arrays[jax.tree_util.keystr(name)], leaf.dtype)
        for name, leaf in jax.tree.leaves_with_path(like)
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
