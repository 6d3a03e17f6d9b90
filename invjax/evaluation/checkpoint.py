"""State of a running block, so that a long attack resumes in its middle."""

import json
import pathlib
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from invjax import files
from invjax.evaluation import store


class Checkpoint(NamedTuple):
    """Steps done and the state then; `problem` is empty, or `none` (no file), or what is wrong."""

    step: int
    state: Any
    problem: str


def _facts(state: Any) -> list[list[Any]]:
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    name = jax.tree_util.keystr
    return [[name(path), list(leaf.shape), str(leaf.dtype)] for path, leaf in leaves]


def save(folder: pathlib.Path, block: str, step: int, state: Any, fingerprint: str) -> None:
    """Replace a block's checkpoint.

    Args:
      folder: the sweep's.
      block: its name.
      step: steps done.
      state: a pytree of JAX arrays, typed PRNG keys among them.
      fingerprint: of all that the state depends on; loading asks for the same.

    Raises:
      OSError: a full disk, say; the earlier checkpoint stays.
    """
    path, stored, kinds, leaves = store.npz_path(folder / "checkpoints", block), [], [], []
    for leaf in jax.tree.leaves(state):
        key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(leaf) if key else leaf)
        weak = "weak" if getattr(leaf, "weak_type", False) else "array"
        kinds.append(f"key {jax.random.key_impl(leaf)}" if key else weak)
        stored.append((array.shape, array.dtype.name))
        # Bytes, as npz forgets names such as bfloat16.
        leaves.append(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    header = {"block": block, "step": int(step), "fingerprint": fingerprint}
    header |= {"leaves": _facts(state), "stored": stored, "kinds": kinds}
    text = store.text(header).encode()
    arrays = {f"leaf{index}": leaf for index, leaf in enumerate(leaves)}
    with files.replacing(path) as file:
        crc = np.uint32(zlib.crc32(b"".join((text, *leaves))))
        np.savez(file, header=np.frombuffer(text, np.uint8), crc32=crc, **arrays)


def _restored(data: np.ndarray, shape: list[int], dtype: str, kind: str) -> jax.Array:
    array = data.view(np.dtype(dtype)).reshape(shape)
    if kind.startswith("key "):
        return jax.random.wrap_key_data(jnp.array(array), impl=kind.removeprefix("key "))
    if kind == "weak":  # Kept, as it decides later promotions; a fill is the way to make one.
        zero = {"i": 0, "f": 0.0, "c": 0j}[array.dtype.kind]
        return jnp.full(shape, zero).at[...].set(array)
    return jnp.array(array)


def load(folder: pathlib.Path, block: str, like: Any, fingerprint: str) -> Checkpoint:
    """Load a block's checkpoint, or say why it cannot be used; a bad file never raises.

    Args:
      folder: the sweep's.
      block: its name.
      like: arrays or `ShapeDtypeStruct`s, a pytree as the state is.
      fingerprint: as it was saved with.

    Returns:
      The checkpoint; step 0 and state `None` where there is a problem.
    """
    path = store.npz_path(folder / "checkpoints", block)
    wanted = {"block": block, "fingerprint": fingerprint, "leaves": _facts(like)}
    if not path.exists():
        return Checkpoint(0, None, "none")
    try:
        # Opened here, as NumPy forgets to close a file that is no zip.
        with open(path, "rb") as content, np.load(content, allow_pickle=False) as file:
            text = file["header"].tobytes()
            leaves = [file[f"leaf{index}"] for index in range(len(file.files) - 2)]
            if int(file["crc32"]) != zlib.crc32(b"".join((text, *leaves))):
                raise ValueError("its checksum does not match")
        header = json.loads(text)
        for name, now in wanted.items():
            was = header[name]
            if was == now:
                continue
            if name == "leaves":
                was, now = [x for x in was if x not in now], [x for x in now if x not in was]
            what = f"{path.name}: another {name}: recorded {was}, now {now}"
            return Checkpoint(0, None, what)
        facts = zip(leaves, header["stored"], header["kinds"], strict=True)
        flat = [_restored(leaf, shape, dtype, kind) for leaf, (shape, dtype), kind in facts]
        state = jax.tree.unflatten(jax.tree.structure(like), flat)
        if _facts(state) != header["leaves"]:
            raise ValueError("its dtypes cannot be had here")
        return Checkpoint(header["step"], state, "")
    except Exception as error:  # Whatever a damaged zip or npy header makes NumPy raise.
        return Checkpoint(0, None, f"{path.name}: damaged: {error or type(error).__name__}")
