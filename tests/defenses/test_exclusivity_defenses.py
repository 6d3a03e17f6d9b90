"""Exclusivity reduction of inputs, activations and gradients; pruning by activation counts."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import invjax
from invjax import Batch, conv, defenses, gradients, models
from invjax.defenses.activation_pruning import activation_count_pruning
from invjax.defenses.base import Prepared
from invjax.defenses.exclusivity import dominances, exclusivity_dropout, mask_exclusive_rows
from invjax.defenses.exclusivity_inputs import (
    make_exclusive,
    reduce_exclusivity,
    remove_exclusive,
    remove_exclusive_lp,
)
from invjax.evaluation import utility
from invjax.models.chain import Spec, chain_model

SHAPE = (8, 8, 1)
gradient_of = jax.jit(gradients.gradient, static_argnums=0)
jit_dominances = jax.jit(dominances, static_argnums=0)
remove = jax.jit(
    jax.vmap(remove_exclusive, (None, None, 0)),
    static_argnums=0,
)


@functools.partial(jax.jit, static_argnums=(0, 1))
def through(defense, model, params, batch):
    """A batch's gradient, what a defence makes of it, and the state that it had then."""
    batch, state = defense.prepare(batch, defense.init(params), params)
    plain = gradients.gradient(model, params, batch)
    sent, after = defense.update(plain, state, params)
    return plain, sent, state[0], after


@functools.partial(jax.jit, static_argnums=(0, 1))
def observed(defense, model, params, batch):
    """What is seen, which of it the likelihood compares, and the defence's first state."""
    seen = invjax.observe(jax.random.key(3), model, params, batch, defense)
    law = defense.law(seen.gradient, params, seen.public)
    return seen, law.informative, defense.prepare(batch, defense.init(params), params)[1][0]


@functools.cache
def digits():
    return invjax.datasets.digits()


@functools.cache
def network(*widths, bias=True):
    model = models.mlp(widths, bias=bias, init="he")
    return model, model.init(jax.random.key(0), SHAPE)


def batch_of(size, seed=0):
    chosen = np.random.default_rng(seed).choice(1797, size, replace=False)
    return invjax.datasets.take(digits(), chosen)


@functools.cache
def convolutional():
    layers = [Spec("conv", 8, 3, 2, 1, "relu"), Spec("flatten")]
    dense = [Spec("dense", 60, activation="relu"), Spec("dense", 10)]
    model = chain_model([*layers, *dense], 10, "conv")
    return model, model.init(jax.random.key(0), SHAPE)


def victims(number, size):
    batches = [batch_of(size, seed) for seed in range(number)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)


def exact_values(params, inputs):
    """Pre-activations of hidden layers in float64, by hand."""
    values, found = np.asarray(inputs, float).reshape(len(inputs), -1), []
    for name in sorted(params)[:-1]:
        found.append(values @ np.asarray(params[name]["kernel"], float))
        if "bias" in params[name]:
            found[-1] = found[-1] + np.asarray(params[name]["bias"], float)[None]
        values = np.maximum(found[-1], 0)
    return found


def total(params, inputs):
    """Exclusive neurons of all layers, by hand."""
    return sum(int(((v > 0).sum(axis=0) == 1).sum()) for v in exact_values(params, inputs))


def cosine(one, other):
    one, other = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (one, other)
    )
    return one @ other / np.linalg.norm(one) / np.linalg.norm(other)


def psnr(one, other):
    return -10 * np.log10(np.mean(np.square(np.asarray(one) - np.asarray(other))))


# ---------------------------------------------------------------- inputs


@pytest.mark.parametrize(
    ("widths", "size", "decibels", "least"),
    [
        ((512,), 4, 20, 0.95),
        ((512,), 8, 27, 0.985),
        ((512,), 16, 33, 0.995),
        ((256, 96), 8, 24, 0.9),
    ],
)
def test_perturbed_inputs_have_no_exclusive_neuron(widths, size, decibels, least):
    (model, params), batches = network(*widths), victims(3, size)
    found = remove(model, params, batches.inputs)
    for index, inputs in enumerate(found.inputs):
        before = jax.tree.map(lambda leaf, i=index: leaf[i], batches)
        assert total(params, before.inputs) > 20
        assert total(params, inputs) == 0 and int(found.remaining[index]) == 0
        assert psnr(inputs, before.inputs) > decibels
        # Most of the way is not enough.
        assert total(params, 0.05 * before.inputs + 0.95 * inputs) > 0
        after = before._replace(inputs=inputs)
        assert cosine(gradient_of(model, params, before), gradient_of(model, params, after)) > least
    assert (found.num_steps > 3).all() and (found.num_steps < 500).all()


def test_the_head_of_a_convolutional_network_is_reduced_through_the_convolution():
    (model, params), batch = convolutional(), batch_of(6)
    each = jax.jit(gradients.per_sample_gradients, static_argnums=0)

    def active(inputs):
        found = each(model, params, batch._replace(inputs=inputs))["layer02"]["bias"]
        return np.asarray(found != 0).sum(axis=0)

    inputs = remove(model, params, batch.inputs[None]).inputs[0]
    assert (active(batch.inputs) == 1).sum() > 0 and (active(inputs) == 1).sum() == 0
    assert psnr(inputs, batch.inputs) > 20


def tiny(weight, bias):
    """A network of one hidden layer on vectors, and its parameters."""
    weight, bias = jnp.array(weight, jnp.float32), jnp.array(bias, jnp.float32)
    model = models.mlp((weight.shape[1],), 3, init="he")
    params = model.init(jax.random.key(0), (weight.shape[0],))
    return model, {**params, "layer01": {"kernel": weight, "bias": bias}}


@pytest.mark.parametrize(
    ("bias", "sample", "sign"), [(-0.2, 0, -1), (0.0, 1, 1), (-0.35, 0, -1), (0.2, 1, 1)]
)
def test_a_step_goes_the_cheaper_way(bias, sample, sign):
    # One neuron with weight (3, 4) / 10: the pre-activations are 0.4 and -0.3, plus the bias.
    model, params = tiny([[0.3], [0.4]], [bias])
    inputs = jnp.array([[0.0, 1.0], [-1.0, 0.0]])
    found = remove_exclusive(model, params, inputs, step=0.1, max_steps=1)
    expected = np.array(inputs)
    expected[sample] += sign * 0.1 * np.array([0.6, 0.8])
    np.testing.assert_allclose(found.inputs, expected, atol=1e-6)
    assert int(found.num_steps) == 1


def test_it_stops_at_once_where_nothing_is_exclusive():
    model, params = network(32)
    inputs = jnp.repeat(batch_of(2).inputs, 2, axis=0)
    found = remove(model, params, inputs[None])
    assert int(found.num_steps[0]) == int(found.remaining[0]) == 0
    np.testing.assert_array_equal(found.inputs[0], inputs)


def test_radius_box_and_steps_are_kept_and_what_remains_is_counted():
    (model, params), batch = network(128), batch_of(4)
    settings = {"max_steps": 60, "input_range": (0.0, 1.0)}
    bounded = jax.jit(
        lambda inputs, radius: remove_exclusive(model, params, inputs, radius=radius, **settings)
    )
    for radius, succeeds in ((0.005, False), (0.5, True)):
        found = bounded(batch.inputs, radius)
        change = np.abs(np.asarray(found.inputs - batch.inputs))
        assert change.max() <= radius + 1e-6
        assert found.inputs.min() >= 0 and found.inputs.max() <= 1
        assert (total(params, found.inputs) == 0) == succeeds == (int(found.remaining) == 0)
        assert int(found.num_steps) <= 60 and (succeeds or int(found.num_steps) == 60)


def test_the_defense_sends_the_gradient_of_the_perturbed_batch():
    model, params = network(128)
    defense, batches = reduce_exclusivity(model), victims(2, 8)

    @jax.jit
    @jax.vmap
    def see(batch):
        seen = invjax.observe(jax.random.key(1), model, params, batch, defense)
        likelihoods = [
            part.log_likelihood(seen.gradient, params) for part in (defense, defenses.chain())
        ]
        return seen.gradient, likelihoods

    moved = batches._replace(inputs=remove(model, params, batches.inputs).inputs)
    for index, (sent, likelihoods) in enumerate(zip(*map(unstack, see(batches)), strict=True)):
        batch = jax.tree.map(lambda leaf, i=index: leaf[i], moved)
        chex.assert_trees_all_close(sent, gradient_of(model, params, batch), atol=1e-6)
        # To its adversary it is the gradient of some batch.
        np.testing.assert_allclose(*likelihoods)


def unstack(tree):
    return [jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(2)]


def test_the_state_is_what_remains():
    (model, params), batch = network(128), batch_of(8)
    defense = reduce_exclusivity(model, max_steps=1, margin=0.0)
    state = defense.init(params)
    prepared, after = jax.jit(defense.prepare)(batch, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tuple(after))
    assert 0 < int(after[0]) == total(params, prepared.inputs) < total(params, batch.inputs)


# ---------------------------------------------------------------- linear programs


def test_programs_move_inputs_as_little_as_possible():
    # One neuron: the least change of the largest entry is the distance over the weight's L1 norm.
    model, params = tiny([[0.3], [-0.4]], [0.05])
    batch = Batch(jnp.array([[1.0, 0.0], [-1.0, 0.0]]), jnp.array([0, 1]))
    moved = remove_exclusive_lp(model, params, batch, margin=0.01).inputs
    # The pre-activations are 0.35 and -0.25: the second is switched on.
    expected = np.array([[0, 0], [1, -1]]) * 0.26 / 0.7
    np.testing.assert_allclose(moved - batch.inputs, expected, atol=1e-6)
    # Two neurons: it is cheaper that each sample takes the one that the other has more of.
    model, params = tiny([[0.3, 0.4], [-0.4, 0.0]], [0.05, 0.5])
    moved = make_exclusive(model, params, batch, count=1, margin=0.01).inputs
    expected = [[-0.36 / 0.7, 0.36 / 0.7], [-0.11 / 0.4, -(0.26 + 0.3 * 0.275) / 0.4]]
    np.testing.assert_allclose(moved - batch.inputs, expected, atol=1e-6)
    assert ((exact_values(params, moved)[0] > 0) == [[False, True], [True, False]]).all()


@pytest.mark.parametrize("size", [4, 8, 16])
def test_programs_remove_exclusivity_by_less_than_steps_do(size):
    (model, params), batch = network(512), batch_of(size)
    found = remove_exclusive_lp(model, params, batch)
    assert found.inputs.dtype == jnp.float32 and found.inputs.shape == batch.inputs.shape
    assert total(params, batch.inputs) > 20 and total(params, found.inputs) == 0
    largest = np.abs(np.asarray(found.inputs - batch.inputs)).max()
    stepped = remove(model, params, batch.inputs[None]).inputs[0]
    assert largest < np.abs(np.asarray(stepped - batch.inputs)).max()
    assert largest < {4: 0.15, 8: 0.1, 16: 0.06}[size]


@pytest.mark.parametrize(("size", "largest", "decibels"), [(12, 0.015, 48), (16, 0.02, 43)])
def test_batches_are_made_exclusive_by_tiny_changes(size, largest, decibels):
    (model, params), batch = network(512), batch_of(size, seed=1)

    def owned(inputs):
        active = exact_values(params, inputs)[0] > 0
        return (active & (active.sum(axis=0) == 1)[None]).sum(axis=1)

    assert owned(batch.inputs).min() < 2
    found = make_exclusive(model, params, batch)
    assert owned(found.inputs).min() >= 2
    assert np.abs(np.asarray(found.inputs - batch.inputs)).max() < largest
    assert psnr(found.inputs, batch.inputs) > decibels
    boxed = make_exclusive(model, params, batch, input_range=(0.0, 1.0)).inputs
    assert owned(boxed).min() >= 2 and boxed.min() >= -1e-6 and boxed.max() <= 1 + 1e-6


def test_what_is_exclusive_stays_as_it_is():
    (model, params), batch = network(512), batch_of(3)
    found = make_exclusive(model, params, batch, margin=1e-4)
    np.testing.assert_allclose(found.inputs, batch.inputs, atol=1e-7)
    twice = remove_exclusive_lp(model, params, remove_exclusive_lp(model, params, batch))
    np.testing.assert_array_equal(twice.inputs, remove_exclusive_lp(model, params, batch).inputs)


@pytest.mark.parametrize("function", [remove_exclusive_lp, make_exclusive])
def test_programs_refuse(function):
    (model, params), batch = network(128), batch_of(4)
    with pytest.raises(ValueError, match="The linear program is infeasible"):
        function(model, params, batch, margin=100.0, input_range=(0.0, 1.0))
    with pytest.raises(ValueError, match=r"margin must lie in \(0.0, inf\], got 0.0"):
        function(model, params, batch, margin=0.0)
    with pytest.raises(ValueError, match="one hidden layer, and mlp has 2"):
        function(*network(16, 12), batch)
    with pytest.raises(ValueError, match="input_range"):
        function(model, params, batch, input_range=(1.0, 0.0))


def test_programs_need_samples_neurons_and_rounds():
    (model, params), batch = network(128), batch_of(8)
    with pytest.raises(ValueError, match="8 samples need 136 neurons, but there are 128"):
        make_exclusive(model, params, batch, count=17)
    with pytest.raises(ValueError, match="count must be a whole number of at least 1, got 0"):
        make_exclusive(model, params, batch, count=0)
    with pytest.raises(ValueError, match="batch of one sample"):
        remove_exclusive_lp(model, params, batch_of(1))
    with pytest.raises(ValueError, match="after max_rounds=1 rounds"):
        remove_exclusive_lp(model, params, batch, max_rounds=1)


# ---------------------------------------------------------------- dropout


@pytest.mark.parametrize("bias", [True, False])
def test_dropped_gradients_are_those_of_masked_layers(bias):
    (model, params), batch = network(24, 16, bias=bias), batch_of(5)
    sent = gradient_of(exclusivity_dropout(model), params, batch)
    names, inputs, masks = sorted(params), [np.asarray(batch.inputs).reshape(5, 64)], []
    for name in names:
        values = inputs[-1] @ np.asarray(params[name]["kernel"])
        values = values + np.asarray(params[name].get("bias", np.zeros(values.shape[1])))[None]
        active = values > 0
        masks.append(active & (active.sum(axis=0, keepdims=True) != 1))
        inputs.append(values * masks[-1])
    assert sum(int((mask.sum(axis=0) == 1).sum()) for mask in masks[:-1]) == 0
    delta = np.array(jax.nn.softmax(values))
    delta[np.arange(5), np.asarray(batch.labels)] -= 1
    for index, name in reversed(list(enumerate(names))):
        np.testing.assert_allclose(sent[name]["kernel"], inputs[index].T @ delta / 5, atol=1e-5)
        if bias:
            np.testing.assert_allclose(sent[name]["bias"], delta.mean(axis=0), atol=1e-6)
        if index:
            delta = (delta @ np.asarray(params[name]["kernel"]).T) * masks[index - 1]
    # It is not the plain gradient, whose logits stay what they are.
    plain = gradient_of(model, params, batch)
    assert 0.5 < cosine(plain, sent) < 0.999
    np.testing.assert_array_equal(
        exclusivity_dropout(model).apply(params, batch.inputs), model.apply(params, batch.inputs)
    )


def test_dropout_is_a_model_like_any_other():
    (model, params), batch = convolutional(), batch_of(4)
    dropped = exclusivity_dropout(model)
    assert dropped.name == "exclusivity_dropout(conv)"
    soft = batch._replace(labels=jax.nn.one_hot(batch.labels, 10))
    loss = jax.jit(dropped.loss)(params, batch)
    np.testing.assert_allclose(jax.jit(dropped.loss)(params, soft), loss, rtol=1e-6)
    np.testing.assert_allclose(
        conv.for_matching(dropped, "cpu").loss(params, batch), loss, rtol=1e-5
    )
    assert abs(float(loss) - float(model.loss(params, batch))) > 1e-6 * float(loss)
    # The gradient of exclusive units of the hidden layer is gone.
    plain, sent = (gradient_of(one, params, batch)["layer02"]["bias"] for one in (model, dropped))
    assert (sent == 0).sum() > (plain == 0).sum()
    with pytest.raises(ValueError, match="not per-sample gradients: got inputs of shape"):
        gradients.per_sample_gradients(dropped, params, batch)


# ---------------------------------------------------------------- rows


def signals(model, params, batch):
    """Derivative of every sample's loss by its pre-activations: its own bias gradients."""
    each = jax.jit(gradients.per_sample_gradients, static_argnums=0)(model, params, batch)
    return [np.abs(np.asarray(each[name]["bias"])) for name in sorted(params)[:-1]]


@pytest.mark.parametrize("dominance", [1.0, 0.9, 0.6])
def test_rows_that_one_sample_dominates_are_zeroed_and_nothing_else(dominance):
    (model, params), batch = network(40, 24), batch_of(4)
    plain, sent, found_kept, _ = through(
        mask_exclusive_rows(model, dominance), model, params, batch
    )
    shares = [
        s.max(axis=0) / np.maximum(s.sum(axis=0), 1e-30) for s in signals(model, params, batch)
    ]
    for share, found in zip(shares, jit_dominances(model, params, batch), strict=True):
        np.testing.assert_allclose(found, share, atol=1e-5)
    kept = [share < dominance - 1e-6 for share in shares]
    for mask, found in zip(kept, found_kept, strict=True):
        assert 0 < mask.sum() < mask.size
        np.testing.assert_array_equal(found, mask)
    ends = [np.ones(64, bool), *kept, np.ones(10, bool)]
    for index, name in enumerate(sorted(params)):
        both = ends[index][:, None] & ends[index + 1][None]
        np.testing.assert_array_equal(sent[name]["kernel"], plain[name]["kernel"] * both)
        np.testing.assert_array_equal(sent[name]["bias"], plain[name]["bias"] * ends[index + 1])
    if dominance == 1.0:
        for mask, values in zip(kept, exact_values(params, batch.inputs), strict=True):
            np.testing.assert_array_equal(~mask, (values > 0).sum(axis=0) == 1)


def test_exclusive_neurons_are_masked_where_no_signal_reaches_them():
    (model, params), batch = network(40), batch_of(4)
    params = {**params, "layer02": {**params["layer02"], "kernel": jnp.zeros((40, 10))}}
    _, sent, _, _ = through(mask_exclusive_rows(model), model, params, batch)
    alone = (exact_values(params, batch.inputs)[0] > 0).sum(axis=0) == 1
    # The last weight's gradient would show one sample's loss vector there.
    assert alone.sum() > 3 and not np.asarray(sent["layer02"]["kernel"])[alone].any()
    assert np.asarray(sent["layer02"]["kernel"])[~alone].any(axis=1).sum() > 10


def test_figures_of_cosines_and_of_what_nearly_exclusive_rows_still_show():
    (model, params), batch = network(512), batch_of(4, seed=2)
    plain, flat = gradient_of(model, params, batch), np.asarray(batch.inputs).reshape(4, 1, 64)
    dropped = gradient_of(exclusivity_dropout(model), params, batch)
    assert cosine(plain, dropped) > 0.97
    errors = {}
    for dominance, least in ((1.0, 0.97), (0.9, 0.96), (0.6, 0.85)):
        _, sent, _, _ = through(mask_exclusive_rows(model, dominance), model, params, batch)
        assert cosine(plain, sent) > least
        weight, bias = (np.asarray(sent["layer01"][part]) for part in ("kernel", "bias"))
        rows = (weight[:, bias != 0] / bias[bias != 0][None]).T[None]
        errors[dominance] = np.median(np.square(rows - flat).mean(axis=2).min(axis=1))
    assert 1e-8 < errors[1.0] < 1e-3 < errors[0.9] < errors[0.6] < 0.1, errors


@pytest.mark.parametrize(
    ("known", "hidden", "bias", "compared"),
    [
        (False, False, True, "read"),
        (True, False, False, "kept"),
        (True, True, True, "kept"),
        (False, True, False, "none"),
    ],
)
def test_the_law_compares_what_the_adversary_can_tell_was_kept(known, hidden, bias, compared):
    (model, params), batch = network(20, 12, bias=bias), batch_of(4)
    defense = mask_exclusive_rows(model, 0.9, known=known)
    if hidden:
        # Whose zeros are not told from the mask's.
        defense = invjax.chain(defense, defenses.magnitude_prune(0.1))
    seen, compares, state = observed(defense, model, params, batch)
    assert (seen.public[0] is not None) == known
    kept = [np.asarray(mask) for mask in state]
    active = [(v > 0).any(axis=0) for v in exact_values(params, batch.inputs)]
    if compared == "read":
        kept = [mask & seen for mask, seen in zip(kept, active, strict=True)]
    if compared == "none":
        kept = [np.zeros_like(mask) for mask in kept]
    ends = [np.ones(64, bool), *kept, np.ones(10, bool)]
    for index, name in enumerate(sorted(params)):
        both = ends[index][:, None] & ends[index + 1][None]
        np.testing.assert_array_equal(compares[name]["kernel"], both)
        if bias:
            np.testing.assert_array_equal(compares[name]["bias"], ends[index + 1])


def test_an_unpublished_known_mask_is_asked_for():
    model, params = network(20, 12)
    gradient = gradient_of(model, params, batch_of(4))
    with pytest.raises(ValueError, match=r"needs the mask; pass public="):
        mask_exclusive_rows(model, known=True).log_likelihood(gradient, gradient)
    for defense in (mask_exclusive_rows(model), activation_count_pruning(model)):
        with pytest.raises(ValueError, match="must see the batch before every update"):
            jax.jit(defense.update)(gradient, defense.init(params))


# ---------------------------------------------------------------- counts


def test_rows_keep_as_many_of_their_largest_entries_as_their_counts_allow():
    (model, params), batch = network(60, 20), batch_of(14)
    plain = gradient_of(model, params, batch)
    # Pixels that are zero on all samples have no entries to keep.
    plain["layer01"]["kernel"] += 1e-3 * jax.random.normal(jax.random.key(1), (64, 60))
    counts = (exact_values(params, batch.inputs)[0] > 0).sum(axis=0)
    weight = np.abs(plain["layer01"]["kernel"])
    defense = activation_count_pruning(model)
    _, first = jax.jit(defense.prepare)(batch, defense.init(params), params)
    np.testing.assert_array_equal(first[0].counts, counts)

    @jax.jit
    def update(drop, state):
        return activation_count_pruning(model, drop=drop).update(plain, state)

    sent = {}
    for drop in (0.0, 0.75):
        sent[drop], state = update(drop, first)
        chex.assert_trees_all_equal_shapes_and_dtypes(tuple(first), state)
        for name in params:
            np.testing.assert_array_equal(sent[drop][name]["bias"], plain[name]["bias"])
        np.testing.assert_array_equal(sent[drop]["layer02"]["kernel"], plain["layer02"]["kernel"])
        again, _ = update(drop, Prepared(state))
        same = np.array_equal(again["layer01"]["kernel"], sent[drop]["layer01"]["kernel"])
        assert same == (drop == 0.0)
    assert set(range(1, 11)) & set(counts) and (counts > 10).any()
    for neuron, count in enumerate(counts):
        row, original = (
            np.asarray(tree["layer01"]["kernel"])[:, neuron] for tree in (sent[0.0], plain)
        )
        thinned = np.asarray(sent[0.75]["layer01"]["kernel"])[:, neuron]
        if count == 0 or count > 10:
            np.testing.assert_array_equal(row, original)
            np.testing.assert_array_equal(thinned, original)
            continue
        share = (count - 1) ** 2 * (0.95 - 0.01) / 14**2 + 0.01
        kept = 64 - int(64 * (1 - share))
        largest = np.argsort(weight[:, neuron])[64 - kept :]
        assert set(np.flatnonzero(row)) == set(largest)
        np.testing.assert_array_equal(row[largest], original[largest])
        survivors = np.flatnonzero(thinned)
        assert len(survivors) == kept - int(0.75 * kept) and set(survivors) <= set(largest)
        np.testing.assert_array_equal(thinned[survivors], original[survivors])


def test_entries_are_dropped_where_all_were_kept():
    (model, params), batch = network(20, 12), batch_of(4)
    _, sent, _, _ = through(activation_count_pruning(model, keep=(1.0, 1.0)), model, params, batch)
    active = (exact_values(params, batch.inputs)[0] > 0).any(axis=0)
    kept = (np.asarray(sent["layer01"]["kernel"])[:, active] != 0).sum(axis=0)
    assert (kept <= 16).all()  # A quarter of 64 pixels, some of which are zero.


def test_what_pruning_keeps_are_pixels():
    (model, params), batch = network(60), batch_of(3)
    _, sent, _, _ = through(activation_count_pruning(model), model, params, batch)
    weight, bias = (np.asarray(sent["layer01"][part]) for part in ("kernel", "bias"))
    active = exact_values(params, batch.inputs)[0] > 0
    for neuron in np.flatnonzero((active.sum(axis=0) == 1) & (bias != 0)):
        pixels = np.asarray(batch.inputs).reshape(3, 64)[np.argmax(active[:, neuron])]
        kept = weight[:, neuron] != 0
        assert kept.sum() == 1
        np.testing.assert_allclose(weight[kept, neuron] / bias[neuron], pixels[kept], rtol=1e-4)


@pytest.mark.parametrize("hidden", [False, True])
def test_zeros_of_the_pruned_weight_say_nothing(hidden):
    (model, params), batch = network(20, 12), batch_of(14)
    defense = activation_count_pruning(model)
    if hidden:
        # Whose zeros are not told from the mask's.
        defense = invjax.chain(defense, defenses.magnitude_prune(0.1))
    seen, compares, _ = observed(defense, model, params, batch)
    sent = np.asarray(seen.gradient["layer01"]["kernel"]) != 0
    assert hidden or 0.05 < sent.mean() < 0.9
    expected = np.zeros_like(sent) if hidden else sent
    np.testing.assert_array_equal(compares["layer01"]["kernel"], expected)
    for name, part in (("layer01", "bias"), ("layer02", "kernel"), ("layer03", "bias")):
        assert compares[name][part].all()


# ---------------------------------------------------------------- all of them


def test_training_behind_them_costs_little():
    data, plain = digits(), models.mlp((64,), init="he")
    split = [
        dataclasses.replace(data, inputs=data.inputs[part], labels=data.labels[part])
        for part in (slice(1400), slice(1400, None))
    ]
    found, ends = {}, {}
    for name, model, defense in (
        ("none", plain, None),
        ("inputs", plain, reduce_exclusivity(plain, max_steps=100)),
        ("dropout", exclusivity_dropout(plain), None),
        ("rows", plain, mask_exclusive_rows(plain)),
        ("counts", plain, activation_count_pruning(plain, max_count=3)),
    ):
        end = utility.train(model, *split, defense, steps=(200,), batch_size=8)[-1]
        found[name], ends[name] = end.accuracy, end.params
    assert found["none"] > 0.7
    assert min(found.values()) > found["none"] - 0.03, found
    # Each of them changed something.
    for name in set(ends) - {"none"}:
        assert cosine(ends[name], ends["none"]) < 1 - 1e-4, name


FACTORIES = {
    "reduce_exclusivity": reduce_exclusivity,
    "exclusivity_dropout": exclusivity_dropout,
    "mask_exclusive_rows": mask_exclusive_rows,
    "activation_count_pruning": activation_count_pruning,
}


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("reduce_exclusivity", {"step": 0.0}, r"step must lie in \(0.0, inf\], got 0.0"),
        ("reduce_exclusivity", {"margin": -1.0}, "margin must lie in"),
        ("reduce_exclusivity", {"max_steps": 0}, "max_steps must be a whole number"),
        ("reduce_exclusivity", {"radius": 0.0}, "radius must lie in"),
        ("reduce_exclusivity", {"input_range": (1.0, 0.0)}, "input_range"),
        ("mask_exclusive_rows", {"dominance": 0.0}, r"dominance must lie in \(0.0, 1.0\]"),
        ("mask_exclusive_rows", {"dominance": 1.1}, "dominance must lie in"),
        ("activation_count_pruning", {"max_count": 0}, "max_count must be a whole number"),
        ("activation_count_pruning", {"cutoff": 10}, r"cutoff must lie in \[11, inf\]"),
        ("activation_count_pruning", {"keep": (0.9, 0.5)}, r"keep\[1\] must lie in \[0.9, 1.0\]"),
        ("activation_count_pruning", {"drop": 1.5}, "drop must lie in"),
    ],
)
def test_settings_out_of_range_are_named(name, settings, message):
    with pytest.raises(ValueError, match=message):
        FACTORIES[name](models.mlp((4,)), **settings)


@pytest.mark.parametrize("name", FACTORIES)
def test_models_without_such_a_head_are_refused(name):
    with pytest.raises(ValueError, match="The model convnet8 has no layer view"):
        FACTORIES[name](models.convnet(width=8))
    flat = models.mlp(())
    params, batch = flat.init(jax.random.key(0), SHAPE), batch_of(3)
    with pytest.raises(ValueError, match="dense head of mlp has none"):
        found = FACTORIES[name](flat)
        if name == "exclusivity_dropout":
            found.loss(params, batch)
        else:
            found.prepare(batch, found.init(params), params)


def test_a_batch_of_one_cannot_be_reduced():
    model, params = network(20, 12)
    defense = reduce_exclusivity(model)
    with pytest.raises(ValueError, match="exclusive in a batch of one sample: give at least 2"):
        defense.prepare(batch_of(1), defense.init(params), params)


def test_names_say_the_settings():
    model = models.mlp((4,))
    assert reduce_exclusivity(model, radius=0.1).name == (
        "reduce_exclusivity(step=0.02, margin=0.0001, max_steps=500, radius=0.1)"
    )
    assert mask_exclusive_rows(model, 0.9).name == "mask_exclusive_rows(0.9, known=False)"
    assert activation_count_pruning(model).name == (
        "activation_count_pruning(max_count=10, cutoff=16, keep=(0.01, 0.95), drop=0.75)"
    )
