"""Properties that hold for any shape and any tree, on examples that hypothesis draws."""

import keyword

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

import invjax
from invjax import attacks, calls, gradients

# Every example compiles anew, so there are few of them and no deadline.
few = hypothesis.settings(max_examples=4, deadline=None, derandomize=True)

networks = st.fixed_dictionaries(
    {
        "widths": st.lists(st.integers(1, 6), max_size=2).map(tuple),
        "num_classes": st.integers(2, 5),
        "activation": st.sampled_from(["relu", "sigmoid", "tanh"]),
        "bias": st.booleans(),
    }
)
shapes = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)


def problem(network, shape, size):
    """A network, its parameters and a batch that fit each other."""
    model = invjax.models.mlp(**network)
    keys = jax.random.split(jax.random.key(size), 3)
    inputs = jax.random.uniform(keys[1], (size, *shape))
    labels = jax.random.randint(keys[2], (size,), 0, network["num_classes"])
    return model, model.init(keys[0], shape), invjax.Batch(inputs, labels)


@few
@hypothesis.given(networks, shapes, st.integers(1, 5))
def test_every_gradient_has_the_tree_of_the_parameters(network, shape, size):
    model, params, batch = problem(network, shape, size)
    each = jax.jit(gradients.per_sample_gradients, static_argnums=0)(model, params, batch)
    chex.assert_tree_shape_prefix(each, (size,))
    take = jax.jit(gradients.gradient, static_argnums=0)
    mean = take(model, params, batch)
    chex.assert_trees_all_equal_shapes_and_dtypes(mean, params)
    chex.assert_trees_all_close(gradients.mean_samples(each), mean, atol=1e-5)
    # A loss that is a mean does not see the order of the samples.
    backwards = jax.tree.map(lambda leaf: leaf[::-1], batch)
    chex.assert_trees_all_close(take(model, params, backwards), mean, atol=1e-5)


@few
@hypothesis.given(networks, shapes, st.integers(1, 4), st.booleans())
def test_an_observation_grants_what_was_asked_and_shapes_what_is_reconstructed(
    network, shape, size, grant
):
    model, params, batch = problem(network, shape, size)
    observation = invjax.observe(jax.random.key(0), model, params, batch, grant_labels=grant)
    chex.assert_trees_all_equal_shapes_and_dtypes(observation.gradient, params)
    assert observation.facts.input_shape == shape and observation.facts.batch_size == size
    assert (observation.labels is not None) == grant
    attack = attacks.inverting_gradients(
        model, total_variation=0.0, num_steps=1, labels="known" if grant else "joint"
    )
    outcome = jax.jit(attack)(jax.random.key(1), observation)
    chex.assert_equal_shape([outcome.inputs, batch.inputs])
    chex.assert_shape([outcome.labels, outcome.found], (size,))
    assert np.isfinite(outcome.inputs).all() and outcome.found.all()


@few
@hypothesis.given(
    st.lists(st.integers(0, 6), min_size=1, max_size=7, unique=True), st.booleans(), shapes
)
def test_labels_without_repeats_are_recovered_in_any_order(classes, bias, shape):
    # Features are positive behind a sigmoid, so the signs of the head's gradient are proof.
    network = {"widths": (9,), "num_classes": 7, "activation": "sigmoid", "bias": bias}
    model, params, batch = problem(network, shape, len(classes))
    batch = batch._replace(labels=jnp.asarray(classes))
    observation = invjax.observe(jax.random.key(0), model, params, batch)
    recovered = attacks.labels.recover(model, observation, len(classes))
    assert sorted(recovered.tolist()) == sorted(classes)


numbers = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**6), 10**6)
values = numbers | st.booleans() | st.none() | st.text("abc d'\\\"", max_size=6)
names = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True).filter(
    lambda name: not keyword.iskeyword(name)
)


@hypothesis.settings(deadline=None, derandomize=True)
@hypothesis.given(
    st.lists(
        st.tuples(names, st.lists(values, max_size=3), st.dictionaries(names, values, max_size=3)),
        min_size=1,
        max_size=3,
    )
)
def test_calls_are_read_as_they_were_written(written):
    def text(name, positional, settings):
        parts = [repr(value) for value in positional]
        parts += [f"{key}={value!r}" for key, value in settings.items()]
        return f"{name}({', '.join(parts)})"

    joined = ",".join(text(*call) for call in written)
    parsed = calls.parse(joined, "attack")
    assert [(name, list(args), settings) for name, args, settings in parsed] == written
