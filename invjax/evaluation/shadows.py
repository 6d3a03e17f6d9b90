"""Shadow models: the adversary's own trainings with one record after another in the target's place."""

import hashlib
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from invjax.attacks.informed.training import Training
from invjax.base import Array, Batch, Params
from invjax.checks import check_count
from invjax.evaluation import checkpoint, parallel


class Progress(NamedTuple):
    """What a caller is told after every chunk.

    Attributes:
      done: shadows so far.
      total: shadows in the end.
      cached: whether the chunk was found on the disk.
      problem: what is wrong with the file that was found and could not be used; else empty.
    """

    done: int
    total: int
    cached: bool
    problem: str


def shadows(
    key: Array,
    procedure: Training,
    known: Batch,
    pool: Batch,
    *,
    chunk: int = 256,
    cache: pathlib.Path | str | None = None,
    on_chunk: Callable[[Progress], None] | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Params:
    """Train one model on the known records and one more, for every record of a pool.

    The first step of the informed adversary's attack (Balle, Cherubin and Hayes 2022), and how its
    victims are made: with the targets for a pool. Shadow `i` draws from `fold_in(key, i)`.

    Chunks that are done are kept in the cache. A chunk is known by what it computes: the traced
    program with all its constants, the known records, its own records and keys. So it is found again
    whatever else has changed, a longer pool's other chunks too; another version of JAX may trace
    another program.

    Args:
      key: a PRNG key.
      procedure: of `attacks.informed.training`.
      known: the records that the adversary knows.
      pool: `[N]` records, one a shadow.
      chunk: shadows trained at once, on all devices together, and kept in one file.
      cache: a folder; nothing is kept where `None`.
      on_chunk: called after every chunk; what it raises ends the training, which the cache resumes.
      devices: of this process; all of them where `None`.

    Returns:
      Parameters, stacked `[N, ...]`, on the host.

    Raises:
      ValueError: a chunk below 1, an empty pool, records of different shapes, or without labels.
    """
    total = _check(known, pool, chunk)
    known, pool = (jax.tree.map(np.asarray, part) for part in (known, pool))
    size = min(chunk, total)

    def train(known: Batch, one) -> Params:
        key, record = one
        return procedure(key, known, jax.tree.map(lambda leaf: leaf[None], record))

    mapped = parallel.sharded_map(train, devices)
    first = (key, jax.tree.map(lambda leaf: leaf[0], pool))
    like = jax.eval_shape(train, known, first)
    folder = None if cache is None else pathlib.Path(cache)
    program = b"" if folder is None else digest(train, known, first)
    parts = []
    for start in range(0, total, size):
        # The last chunk is filled up, so that all share one compilation.
        picks = np.minimum(np.arange(start, start + size), total - 1)
        keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(picks)
        stacked = (keys, jax.tree.map(lambda leaf, picks=picks: leaf[picks], pool))
        params, problem, fingerprint = None, "", ""
        if folder is not None:
            fingerprint = hashlib.sha256(program + _bytes(stacked)).hexdigest()
            params, problem = _load(folder, fingerprint, like, size)
        cached = params is not None
        if params is None:
            params = mapped(known, stacked)
            if folder is not None:
                checkpoint.save(folder, _name(fingerprint), size, params, fingerprint)
        parts.append(params)
        if on_chunk is not None:
            on_chunk(Progress(min(start + size, total), total, cached, problem))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:total], *parts)


def _check(known: Batch, pool: Batch, chunk: int) -> int:
    check_count("chunk", chunk, 1)
    shapes = jnp.shape(known.inputs)[1:], jnp.shape(pool.inputs)[1:]
    if shapes[0] != shapes[1] or len(pool.labels) == 0:
        raise ValueError(
            "pool must hold records of the known ones' shape, and not be empty, got inputs of shape "
            f"{jnp.shape(pool.inputs)} beside {jnp.shape(known.inputs)}."
        )
    for name, batch in (("known", known), ("pool", pool)):
        if len(batch.labels) != len(batch.inputs):
            raise ValueError(
                f"{name} must have a label for each of its {len(batch.inputs)} records, got "
                f"{len(batch.labels)}."
            )
    return len(pool.labels)


def _name(fingerprint: str) -> str:
    return f"shadows-{fingerprint[:16]}"


def _load(folder: pathlib.Path, fingerprint: str, like: Params, count: int):
    """A chunk's parameters, or `None`, and what is wrong with its file."""

    def shaped(leaf):
        return jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype)

    found = checkpoint.load(folder, _name(fingerprint), jax.tree.map(shaped, like), fingerprint)
    if found.problem:
        return None, "" if found.problem == "none" else found.problem
    return jax.tree.map(np.asarray, found.state), ""


def digest(train: Callable, known: Batch, one: Any) -> bytes:
    """What a training computes: its program, the constants in it, and the known records.

    Args:
      train: `train(known, one) -> params`.
      known: the known records; their values count.
      one: a shadow's key and record; their shapes count.

    Returns:
      A hash, the same in every process.
    """
    closed = jax.make_jaxpr(train)(known, one)
    # Functions that a program names are printed with their addresses.
    text = re.sub(r"0x[0-9a-f]+", "", str(closed.jaxpr))
    constants = (*closed.consts, *_constants(closed.jaxpr))
    content = (text.encode(), *map(_bytes, constants), _bytes(known))
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in content)).digest()


def _constants(jaxpr) -> Iterator[Any]:
    """Values that a jaxpr holds in itself, inner jaxprs included."""
    for equation in jaxpr.eqns:
        for variable in equation.invars:
            if isinstance(variable, jax.extend.core.Literal):
                yield variable.val
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if isinstance(inner, jax.extend.core.ClosedJaxpr):
                    yield from inner.consts
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from _constants(inner)


def _bytes(tree: Any) -> bytes:
    """Names, shapes, types and values of a tree's leaves."""
    digest = hashlib.sha256(str(jax.tree.structure(tree)).encode())
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
            digest.update(str(jax.random.key_impl(leaf)).encode())
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        digest.update(
            f"{array.shape} {array.dtype}".encode() + np.ascontiguousarray(array).tobytes()
        )
    return digest.digest()
