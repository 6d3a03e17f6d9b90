"""The steps of SPEAR: draw vectors, refine them, keep the sparsest, choose a basis."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from invjax.base import Array, Model, Observation
from invjax.models.layers import dense_layers
from invjax.observe import per_step_gradient

_TEST_UNITS = 32  # Their zeros fit one word of bits.
_KEPT = 256


class Problem(NamedTuple):
    """What the search reads of an observation: the first weight's gradient is `(left @ right).T`.

    Attributes:
      left: `[d_1, M]`, orthonormal columns: the derivative by the first layer is `left @ Q` for the
        `Q [M, M]` that is sought, and the inputs are `inv(Q) @ right`.
      right: `[M, d_0]`.
      total: `[M]`, the sum of the columns of `Q`, from the bias gradient.
      before: `[M, d_1]`, `right` behind the first layer's weight.
      bias: `[d_1]`, the first layer's.
      size: `[d_1]`, norms of the rows of `left`.
      active: `[d_1]`, the units with any gradient.
    """

    left: Array
    right: Array
    total: Array
    before: Array
    bias: Array
    size: Array
    active: Array


class Search(NamedTuple):
    """The state of the search.

    Attributes:
      problem: what it reads.
      key: of the draws to come.
      directions: `[C, M]`, unit vectors, candidates for the columns of `Q`, sparsest first.
      zeros: `[C]`, how many active units each leaves at zero; -1 where there is none.
      chosen: `[M, M]`, as rows the best choice of columns so far, without their scale.
      wrong: entries of the derivative whose support disagrees with the sign of what the unit
        computes on the recovered inputs; more than there are, where there was no choice yet.
      step: steps done.
    """

    problem: Problem
    key: Array
    directions: Array
    zeros: Array
    chosen: Array
    wrong: Array
    step: Array


def factorize(model: Model, observation: Observation, samples: int) -> Problem:
    """The factors of the first layer's gradient, and what else the search needs."""
    first = dense_layers(model, per_step_gradient(observation))[0]
    layer = dense_layers(model, observation.params)[0]
    assert first.weight is not None and first.bias is not None
    assert layer.weight is not None and layer.bias is not None
    left, values, right = jnp.linalg.svd(first.weight.T, full_matrices=False)
    left, right = left[:, :samples], values[:samples, None] * right[:samples]
    rows = jnp.linalg.norm(first.weight, axis=0)
    dead = 1e-11 if rows.dtype == jnp.float64 else 1e-6
    return Problem(
        left,
        right,
        total=left.T @ first.bias,
        before=right @ layer.weight,
        bias=layer.bias,
        size=jnp.linalg.norm(left, axis=1),
        active=rows > dead * rows.max(),
    )


def start(key: Array, problem: Problem) -> Search:
    """A search that has found nothing yet."""
    units, samples = problem.left.shape
    kept = 4 * samples
    return Search(
        problem,
        key,
        directions=jnp.zeros((kept, samples), problem.left.dtype),
        zeros=jnp.full(kept, -1),
        chosen=jnp.eye(samples, dtype=problem.left.dtype),
        wrong=jnp.asarray(units * samples + 1),
        step=jnp.asarray(0),
    )


def advance(search: Search, draws: int, sparsity: float, zero: float) -> Search:
    """One step: draw, refine, keep, choose."""
    key, draw_key = jax.random.split(search.key)
    found = draw(draw_key, search.problem, search.directions, draws, sparsity, zero)
    directions, zeros = refine(search.problem, found, sparsity, zero)
    search = keep(search._replace(key=key), directions, zeros)
    return choose(search, zero)._replace(step=search.step + 1)


def tested_units(units: int) -> int:
    """How many units a step keeps for the first test."""
    return min(_TEST_UNITS, units // 4)


def blocks_of_permutation(units: int, samples: int) -> int:
    """How many blocks of M units one permutation of the others is cut into."""
    return max((units - tested_units(units)) // samples, 1)


def number_of_blocks(units: int, samples: int, draws: int) -> int:
    """How many matrices a step inverts: those of whole permutations, `draws` or a few more."""
    each = blocks_of_permutation(units, samples)
    return -(-draws // each) * each


def draw(
    key: Array, problem: Problem, old: Array, draws: int, sparsity: float, zero: float
) -> Array:
    """`[N, M]` vectors that are orthogonal to M - 1 random rows of `left` and to a few more.

    N is 256, or fewer where fewer are drawn; a vector of zeros is none. The units that a vector is
    tested on are kept out of the draw, so their zeros are evidence.
    """
    units, samples = problem.left.shape
    tested, each = tested_units(units), blocks_of_permutation(units, samples)
    count = number_of_blocks(units, samples, draws)
    test_key, block_key = jax.random.split(key)
    rows = problem.left / jnp.where(problem.active, problem.size, 1.0)[:, None]
    order = random_order(test_key, problem.active, ())
    test = order[:tested]
    drawn = problem.active.at[test].set(False)
    blocks = random_order(block_key, drawn, (count // each,))[:, : each * samples]
    blocks = blocks.reshape(count, samples)
    vectors = jnp.swapaxes(jnp.linalg.inv(rows[blocks]), 1, 2).reshape(-1, samples)
    length = jnp.linalg.norm(vectors, axis=1)
    # Rows that leave more than one direction free give a vector of no meaning, and a long one.
    usable = jnp.repeat(drawn[blocks].all(axis=1), samples) & (length < 1e-3 / loose(zero))
    vectors = jnp.where(usable[:, None], vectors / length[:, None], 0.0)

    def zeros_of(vectors: Array) -> tuple[Array, Array]:
        hits = jnp.abs(rows[test] @ vectors.T) <= loose(zero)
        hits &= problem.active[test][:, None]
        bits = jnp.left_shift(jnp.uint32(1), jnp.arange(tested, dtype=jnp.uint32))
        return hits.sum(axis=0), (hits * bits[:, None]).sum(axis=0, dtype=jnp.uint32)

    zeros, codes = zeros_of(vectors)
    known = (codes[:, None] == zeros_of(old)[1][None]).any(axis=1) & (zeros > 0)
    passed = usable & ~known & ((zeros >= sparsity * tested) | (samples == 1))
    # The best of every group, for a sort of all would cost more than all else.
    groups = min(_KEPT, passed.size)
    width = passed.size // groups
    scores = jnp.where(passed, zeros, -1)[: groups * width].reshape(groups, width)
    at = jnp.arange(groups) * width + scores.argmax(axis=1)
    return jnp.where(passed[at][:, None], vectors[at], 0.0)


def loose(zero: float) -> float:
    """The tolerance for a vector that rests on few rows, whose rounding it multiplies."""
    return math.sqrt(zero * 1e-3) if zero < 1e-3 else zero


def random_order(key: Array, first: Array, shape: tuple[int, ...]) -> Array:
    """Random permutations of the units, those that `first` marks before all others."""
    noise = jax.random.uniform(key, (*shape, first.size), jnp.float32)
    return jnp.argsort(jnp.where(first.reshape((1,) * len(shape) + (-1,)), noise, 2.0), axis=-1)


def refine(problem: Problem, vectors: Array, sparsity: float, zero: float) -> tuple[Array, Array]:
    """Fit vectors to all rows that they leave at zero; `[N, M]` and how many these are, or -1."""
    samples = vectors.shape[1]
    rows = problem.left / jnp.where(problem.active, problem.size, 1.0)[:, None]
    exists = (vectors != 0).any(axis=1)

    def zeros_of(vectors: Array, tolerance: float) -> Array:
        return problem.active[None] & (jnp.abs(vectors @ rows.T) <= tolerance)

    at_zero = zeros_of(vectors, loose(zero)).astype(rows.dtype)
    spread = jnp.einsum("nu,ui,uj->nij", at_zero, rows, rows)
    values, axes = jnp.linalg.eigh(spread)
    fitted = axes[:, :, 0]
    zeros = zeros_of(fitted, zero).sum(axis=1)
    least = jnp.maximum(samples, sparsity * problem.active.sum())
    if samples > 1:
        # A second direction without a trace in these rows would make the first one arbitrary.
        exists &= (zeros >= least) & (values[:, 1] > 1e-6 * values[:, -1])
    return fitted, jnp.where(exists, zeros, -1)


def keep(search: Search, directions: Array, zeros: Array) -> Search:
    """Merge new directions with the old ones, each once, sparsest first."""
    directions = jnp.concatenate([search.directions, directions])
    zeros = jnp.concatenate([search.zeros, zeros])
    order = jnp.argsort(-zeros, stable=True)
    directions, zeros = directions[order], zeros[order]
    same = jnp.abs(directions @ directions.T) > 1 - 1e-6
    earlier = jnp.tril(same & (zeros >= 0)[None], -1).any(axis=1)
    zeros = jnp.where(earlier, -1, zeros)
    order = jnp.argsort(-zeros, stable=True)[: search.zeros.size]
    return search._replace(directions=directions[order], zeros=zeros[order])


def choose(search: Search, zero: float) -> Search:
    """The sparsest independent directions, or the last choice with one of them swapped, if better."""
    samples = search.chosen.shape[0]

    def take(index, carry):
        basis, chosen, count = carry
        vector = search.directions[index]
        rest = vector - basis.T @ (basis @ vector)
        rest = rest - basis.T @ (basis @ rest)
        length = jnp.linalg.norm(rest)
        fits = (search.zeros[index] >= 0) & (length > 1e-4) & (count < samples)
        where = jnp.where(fits, count, samples)
        basis = basis.at[where].set(rest / jnp.where(length > 0, length, 1.0), mode="drop")
        return basis, chosen.at[where].set(vector, mode="drop"), count + fits

    nothing = jnp.zeros_like(search.chosen)
    _, greedy, count = jax.lax.fori_loop(
        0, search.zeros.size, take, (nothing, nothing, jnp.asarray(0))
    )
    spare = search.step % search.zeros.size
    swapped = jnp.where(
        jnp.eye(samples, dtype=bool)[:, :, None],
        search.directions[spare][None, None],
        search.chosen[None],
    )
    options = jnp.concatenate([search.chosen[None], greedy[None], swapped])
    entries = search.problem.left.size
    possible = jnp.concatenate(
        [
            jnp.stack([search.wrong <= entries, count == samples]),
            jnp.full(samples, (search.zeros[spare] >= 0) & (search.wrong <= entries)),
        ]
    )
    wrong = jax.vmap(lambda chosen: disagreements(search.problem, chosen, zero).sum())(options)
    wrong = jnp.where(possible, wrong, entries + 1)
    best = jnp.argmin(wrong)
    return search._replace(chosen=options[best], wrong=wrong[best])


def disagreements(problem: Problem, chosen: Array, zero: float) -> Array:
    """`[M, d_1]`: where a derivative is zero and its unit above zero, or neither.

    Units without any gradient do not count: a defence may have masked them.
    """
    support = jnp.abs(chosen @ problem.left.T) > zero * problem.size[None]
    values = unmixed(problem, chosen, problem.before) + problem.bias[None]
    return (support != (values > 0)) & problem.active[None]


def unmixed(problem: Problem, chosen: Array, mixture: Array) -> Array:
    """`inv(Q) @ mixture`, where the scale of the columns of `Q` is that of the bias gradient."""
    inverse = jnp.linalg.inv(chosen.T)
    scale = inverse @ problem.total
    return inverse @ mixture / jnp.where(scale == 0, 1.0, scale)[:, None]


def share_wrong(search: Search) -> Array:
    """One minus the paper's score."""
    entries = search.problem.left.size
    return jnp.minimum(search.wrong, entries) / entries
