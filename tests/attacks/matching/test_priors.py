"""Every prior: closed forms by hand, smoothness where a root could spoil it, and transformations.

(`test_objectives.py` compares them with NumPy on one larger image.)
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import invjax
from invjax import priors
from invjax.attacks.matching.priors import Context, Prior, project_to_box
from invjax.base import Facts, Observation

SHAPE = (4, 4, 2)
FACTS = Facts(input_shape=SHAPE, num_classes=2, input_range=((0.0, -1.0), (1.0, 3.0)))
GROUP = jax.random.uniform(jax.random.key(0), (3, *SHAPE))


def statistics(params, inputs):
    """As of a network whose first layer normalises its input, and whose second its square."""
    return [
        (power.mean(axis=(0, 1, 2)), power.var(axis=(0, 1, 2)))
        for power in (params["scale"] * inputs, jnp.square(inputs))
    ]


def model(running=None):
    plain = invjax.models.mlp(num_classes=2)
    return plain._replace(statistics=statistics, running_statistics=running)


PARAMS = {"scale": jnp.float32(2.0)}
OBSERVATION = Observation(PARAMS, None, FACTS, statistics=statistics(PARAMS, GROUP))
CONTEXT = Context(OBSERVATION, GROUP)
SIZE = int(np.prod(SHAPE))

# Constructor and settings, without the weight, which all but the first two take.
ROWS = {
    "uniform": lambda weight: priors.uniform(),
    "combine": lambda weight: priors.combine(priors.l2(weight), priors.group_consistency(weight)),
    "total_variation": lambda weight: priors.total_variation(weight),
    "total_variation isotropic": lambda weight: priors.total_variation(weight, "isotropic"),
    "total_variation squared": lambda weight: priors.total_variation(weight, "squared"),
    "total_variation periodic": lambda weight: priors.total_variation(
        weight, "isotropic", periodic=True
    ),
    "l2": priors.l2,
    "box": priors.box,
    "gaussian": lambda weight: priors.gaussian(jnp.zeros(SIZE), jnp.eye(SIZE), weight),
    "batch_norm_statistics": lambda weight: priors.batch_norm_statistics(model(), weight),
    "group_consistency": priors.group_consistency,
    "patch_border": lambda weight: priors.patch_border(weight, 2),
}
EVERY = pytest.mark.parametrize("name", ROWS)


def test_every_prior_has_a_row():
    public = {
        name
        for name, function in inspect.getmembers(priors, inspect.isfunction)
        if inspect.signature(function).return_annotation == Prior and not name.startswith("_")
    }
    assert public == {name.split()[0] for name in ROWS} and len(public) >= 9


@EVERY
def test_scalars_under_jit_and_vmap(name):
    prior = ROWS[name](0.3)
    victims = jax.random.normal(jax.random.key(1), (2, 3, *SHAPE))
    values = jax.jit(jax.vmap(prior, in_axes=(0, None)))(victims, CONTEXT)
    for value, inputs in zip(values, victims, strict=True):
        plain = prior(inputs, CONTEXT)
        assert plain.shape == () and plain.dtype == jnp.float32
        np.testing.assert_allclose(value, plain, rtol=1e-5)


@EVERY
def test_the_weight_is_a_factor(name):
    inputs = jax.random.normal(jax.random.key(1), (3, *SHAPE))
    one, three = (ROWS[name](weight)(inputs, CONTEXT) for weight in (1.0, 3.0))
    np.testing.assert_allclose(three, 3 * one, rtol=1e-5)
    assert (one > 0) == (name != "uniform")
    assert ROWS[name](0.0)(inputs, CONTEXT) == 0


@EVERY
def test_slopes_are_finite_where_a_root_or_a_kink_could_spoil_them(name):
    prior = ROWS[name](1.0)
    constants = (jnp.full((3, *SHAPE), level) for level in (0.0, 0.5, 1.0, -7.0))
    with jax.debug_nans(True):
        for inputs in (GROUP, *constants, 1e4 * GROUP):
            value, slope = jax.value_and_grad(prior)(inputs, CONTEXT)
            assert np.isfinite(value) and np.isfinite(slope).all()


@EVERY
def test_slopes_against_finite_differences(name):
    with jax.enable_x64(True):
        context = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), CONTEXT)
        # Away from kinks: no neighbours are equal, nor is any value at the end of its range.
        inputs = 2 * jax.random.normal(jax.random.key(3), (3, *SHAPE), jnp.float64)
        direction = jax.random.normal(jax.random.key(4), inputs.shape, jnp.float64)
        prior = jax.jit(ROWS[name](1.0))
        _, slope = jax.jvp(lambda x: prior(x, context), (inputs,), (direction,))
        up, down = (prior(inputs + step * direction, context) for step in (1e-6, -1e-6))
        np.testing.assert_allclose((up - down) / 2e-6, slope, rtol=1e-5, atol=1e-8)


# Values by hand.

CORNER = jnp.array([[0.0, 3.0], [4.0, 4.0]])[None, :, :, None]


@pytest.mark.parametrize(
    ("prior", "value"),
    [
        # Down: 4 and 1. Right: 3 and 0.
        (priors.total_variation(1.0), 2.5 + 1.5),
        (priors.total_variation(1.0, "squared"), 16 + 1 + 9 + 0),
        # One pixel has both neighbours: 4 down, 3 to the right.
        (priors.total_variation(1.0, "isotropic"), 5.0),
        # Wrapped around, every difference counts twice.
        (priors.total_variation(1.0, periodic=True), 2.5 + 1.5),
        (priors.total_variation(1.0, "squared", periodic=True), 2 * 26),
        (priors.l2(1.0), (9 + 16 + 16) / 4),
        # Above the range [0, 1]: by 2, 3 and 3.
        (priors.box(1.0), 4 + 9 + 9),
        (priors.group_consistency(1.0), (1 + 4 + 9 + 9) / 4),
        # Twice the root of the mean of two squares: 16 and 1, 9 and 0.
        (priors.patch_border(1.0, 1), 8.5**0.5 + 4.5**0.5),
        (priors.gaussian(jnp.array([0.0, 3.0, 4.0, 4.0]), jnp.eye(4)), 0.0),
        (priors.gaussian(jnp.array([0.0, 3.0, 4.0, 2.0]), 5.0 * jnp.eye(4)), 0.5 * 5 * 4),
    ],
)
def test_by_hand(prior, value):
    facts = Facts(input_shape=(2, 2, 1), num_classes=2)
    context = Context(Observation(None, None, facts), group=jnp.ones_like(CORNER))
    np.testing.assert_allclose(prior(CORNER, context), value, atol=1e-5)


def test_batch_norm_statistics_by_hand():
    # Constant images of 1 and 3: scaled mean 4 and variance 4, square mean 5 and variance 16.
    inputs = jnp.broadcast_to(jnp.array([1.0, 3.0])[:, None, None, None], (2, 2, 2, 1))
    known = [(jnp.array([1.0]), jnp.array([0.0])), (jnp.array([5.0]), jnp.array([14.0]))]
    granted = Context(OBSERVATION._replace(statistics=known), inputs)
    hidden = Context(OBSERVATION._replace(statistics=None), inputs)
    for first_weight, expected in ((1.0, 3 + 4 + 0 + 2), (10.0, 70 + 2)):
        prior = priors.batch_norm_statistics(model(), 0.5, first_weight)
        np.testing.assert_allclose(prior(inputs, granted), 0.5 * expected, rtol=1e-5)
    # Without a grant those of training stand in; a grant goes first.
    stored = priors.batch_norm_statistics(model(running=known), 0.5)
    np.testing.assert_allclose(stored(inputs, hidden), 0.5 * 9, rtol=1e-5)
    own = granted._replace(observation=OBSERVATION._replace(statistics=statistics(PARAMS, inputs)))
    np.testing.assert_allclose(stored(inputs, own), 0.0, atol=1e-5)
    with pytest.raises(ValueError, match="neither the observation nor the model"):
        priors.batch_norm_statistics(model(), 1.0)(inputs, hidden)


# Invariances.

KINDS = ("anisotropic", "isotropic", "squared")


@pytest.mark.parametrize("periodic", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_total_variation_does_not_see_levels_signs_or_axes(kind, periodic):
    prior = priors.total_variation(1.0, kind, periodic)
    inputs = jax.random.normal(jax.random.key(2), (2, 5, 5, 3))
    value = prior(inputs, CONTEXT)
    others = [inputs + 0.7, -inputs, inputs.swapaxes(1, 2), inputs[::-1], inputs[..., ::-1]]
    if kind != "isotropic":
        # (A corner pixel's pair of differences is another pair in the mirror.)
        others += [inputs[:, ::-1], inputs[:, :, ::-1]]
    if periodic:
        others += [jnp.roll(inputs, (2, 3), (1, 2))]
    for other in others:
        np.testing.assert_allclose(prior(other, CONTEXT), value, rtol=1e-4)
    scale = 9.0 if kind == "squared" else 3.0
    np.testing.assert_allclose(prior(3 * inputs, CONTEXT), scale * value, rtol=1e-4)
    constant = jnp.full((2, 5, 5, 3), 0.3)
    np.testing.assert_allclose(prior(constant, CONTEXT), 0.0, atol=2e-4)


def test_patch_border_sees_borders_only():
    rng = np.random.default_rng(0)
    blocks = np.kron(rng.uniform(size=(3, 3)), np.ones((4, 4)))[None, :, :, None]
    prior = priors.patch_border(1.0, 4)
    value = prior(jnp.asarray(blocks, jnp.float32), CONTEXT)
    assert value > 0.1
    # Pixels that touch no border between patches may be anything.
    inside = np.array([0, 1, 2, 5, 6, 9, 10, 11])
    changed = blocks.copy()
    changed[:, inside[:, None], inside[None]] += 100 * rng.uniform(size=(1, 8, 8, 1))
    np.testing.assert_allclose(prior(jnp.asarray(changed, jnp.float32), CONTEXT), value, rtol=1e-5)
    # A smooth border: equal neighbours across it, whatever there is along it.
    smooth = np.zeros((12, 12))
    for start in (0, 4, 8):
        smooth[start : start + 4] += [[0.0], [1.0], [2.0], [0.0]]
    smooth = jnp.asarray(smooth + smooth.T, jnp.float32)[None, :, :, None]
    np.testing.assert_allclose(prior(smooth, CONTEXT), 0.0, atol=1e-5)
    assert priors.patch_border(1.0, 3)(smooth, CONTEXT) > 0.1


@pytest.mark.parametrize("periodic", [False, True])
def test_total_variation_does_not_pull_where_neighbours_are_equal(periodic):
    # A step in the middle: only its two sides are pulled, and by as much.
    inputs = jnp.zeros((1, 6, 6, 1)).at[:, :, 3:].set(1.0)
    prior = priors.total_variation(1.0, periodic=periodic)
    slope = np.asarray(jax.grad(prior)(inputs, CONTEXT))[0, :, :, 0]
    pulled = {2: -1.0, 3: 1.0, **({5: 1.0, 0: -1.0} if periodic else {})}
    expected = np.array([pulled.get(column, 0.0) for column in range(6)])
    np.testing.assert_allclose(slope, np.tile(expected * abs(slope).max(), (6, 1)), atol=1e-7)
    np.testing.assert_array_equal(jax.grad(prior)(0 * inputs + 0.5, CONTEXT), 0 * inputs)


@pytest.mark.parametrize("size", [5, 6, 7])
def test_patch_border_of_patches_that_do_not_fill_the_image(size):
    steps = np.arange(size) // 3
    inputs = jnp.asarray(steps[:, None] + 0.0 * steps[None], jnp.float32)[None, :, :, None]
    # Every border is a step of one, downwards only.
    np.testing.assert_allclose(priors.patch_border(1.0, 3)(inputs, CONTEXT), 1.0, atol=1e-5)


def test_projection_to_the_box():
    inputs = 5 * jax.random.normal(jax.random.key(5), (3, *SHAPE))
    once = project_to_box(inputs, OBSERVATION)
    np.testing.assert_array_equal(project_to_box(once, OBSERVATION), once)
    low, high = np.array([0.0, -1.0]), np.array([1.0, 3.0])
    np.testing.assert_array_equal(once, np.clip(np.asarray(inputs), low, high))
    assert priors.box(1.0)(once, CONTEXT) == 0
    # The soft form is the squared distance to the hard one.
    distance = np.square(np.asarray(inputs) - np.asarray(once)).sum() / 3
    np.testing.assert_allclose(priors.box(1.0)(inputs, CONTEXT), distance, rtol=1e-5)
    vectors = Observation(None, None, Facts(input_shape=(2,), num_classes=2))
    np.testing.assert_array_equal(project_to_box(jnp.array([[-1.0, 0.5]]), vectors), [[0.0, 0.5]])


def test_combine_of_nothing_is_uniform():
    assert priors.combine()(GROUP, CONTEXT) == priors.uniform()(GROUP, CONTEXT) == 0


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 5), (3, 2, 5, 5, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_total_variation_is_of_images(kind, shape):
    with pytest.raises(ValueError, match=r"total_variation needs images \[B, H, W, C\]"):
        priors.total_variation(1.0, kind)(jnp.ones(shape), CONTEXT)
