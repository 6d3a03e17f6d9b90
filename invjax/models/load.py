"""Models by name, and parameters in files."""

import os
import pathlib
import zipfile
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from invjax import calls
from invjax.base import Model, Params
from invjax.models import resnet, zoo

_ZOO: dict[str, Callable[..., Model]] = {
    function.__name__: function
    for function in (
        zoo.mlp,
        zoo.lenet,
        zoo.convnet,
        zoo.convnet_small,
        zoo.cnn6,
        zoo.cnn6_d,
        zoo.cnn,
        resnet.resnet18,
    )
}


def by_name(text: str, num_classes: int) -> Model:
    """A model of the zoo, as the command line names it.

    Args:
      text: a name, perhaps with settings: `lenet`, `mlp((64, 32))`, `convnet(width=32)`.
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
    """Write parameters as npz, under a temporary name first.

    Args:
      path: the file.
      params: the parameters.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(path.name + ".partial")
    arrays = {
        jax.tree_util.keystr(name): np.asarray(leaf)
        for name, leaf in jax.tree.leaves_with_path(params)
    }
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read as weights (npz): {error}") from error
    expected = {
        jax.tree_util.keystr(name): leaf.shape for name, leaf in jax.tree.leaves_with_path(like)
    }
    if set(arrays) != set(expected):
        missing, extra = sorted(set(expected) - set(arrays)), sorted(set(arrays) - set(expected))
        raise ValueError(
            f"{path}: does not hold this model's weights: missing {missing[:4]}, unknown {extra[:4]}."
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
