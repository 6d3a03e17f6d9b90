"""Imprints: what a planted layer promises is what comes back, and nothing is claimed beside it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import nearest

import invjax
from invjax import Batch, LocalTraining, models
from invjax.attacks.analytic import imprints
from invjax.attacks.analytic.imprints.imprint import Rows, invert_rows
from invjax.models.chain import Spec, chain_model

SHAPE = (8, 8, 1)


@functools.cache
def digits():
    return invjax.datasets.digits()


def batch_of(size, seed=0):
    """Victims are among the first thousand, the server's own data behind them."""
    chosen = np.random.default_rng(seed).choice(1000, size, replace=False)
    return invjax.datasets.take(digits(), chosen)


@functools.cache
def auxiliary(size=797):
    return invjax.datasets.take(digits(), np.arange(1000, 1000 + size))


@functools.partial(jax.jit, static_argnums=0)
def observed(model, params, batch):
    with jax.default_matmul_precision("highest"):
        return invjax.observe(jax.random.key(1), model, params, batch)


def network(*widths, num_classes=10):
    model = models.mlp(widths, num_classes, init="he")
    return model, model.init(jax.random.key(0), SHAPE)


def recovered(found, batch, below=1e-6):
    """Which true samples are among the certified ones; none of these may be anything else."""
    size = batch.inputs.shape[0]
    truth = np.asarray(batch.inputs).reshape(size, -1)
    slots = np.asarray(found.inputs).reshape(found.inputs.shape[0], -1)[found.found]
    labels = np.asarray(found.labels)[found.found]
    error, owner = nearest(slots, truth)
    assert (error < below).all()
    assert len(set(owner)) == len(owner)
    np.testing.assert_array_equal(labels, np.asarray(batch.labels)[owner])
    return np.isin(np.arange(size), owner)


def active_units(params, name, batch):
    layer = params[name]
    flat = batch.inputs.reshape(batch.inputs.shape[0], -1)
    return np.asarray(flat @ layer["kernel"] + layer["bias"][None] > 0)


def alone(active):
    """Samples whose bin holds no other; a bin is the number of cuts below the sample."""
    bins = active.sum(axis=1)
    assert bins.min() >= 1
    return np.bincount(bins)[bins] == 1


@pytest.mark.parametrize(
    ("variant", "measurement", "bins"),
    [
        ("plain", "mean", 32),
        ("plain", "mean", 128),
        ("sparse", "dct", 128),
        pytest.param("sparse", "mean", 128, marks=pytest.mark.slow),
        pytest.param("plain", "dct", 128, marks=pytest.mark.slow),
        pytest.param("plain", "random", 32, marks=pytest.mark.slow),
    ],
)
def test_binning_recovers_exactly_the_samples_alone_in_their_bins(variant, measurement, bins):
    """Specified: the recall is the share of singly occupied bins, for 8 and for 64 samples."""
    model, params = network(64)
    imprint = imprints.robbing_the_fed(model, SHAPE, bins, variant, measurement, mode=3)
    planted = imprint.plant(jax.random.key(3), params, auxiliary())
    total = 0
    for size in (8, 64):
        batch = batch_of(size)
        single = alone(active_units(planted, "rows", batch))
        found = imprint.attack(jax.random.key(0), observed(imprint.model, planted, batch))
        np.testing.assert_array_equal(recovered(found, batch), single)
        assert found.inputs.shape == (size, *SHAPE)
        total += single.sum()
    assert total > 8


def test_the_top_bin_and_the_lowest_are_read_and_the_rest_of_the_model_still_learns():
    """Both ends of the law: what public code loses, and what a far first cut saturates."""
    model, params = network(64)
    imprint = imprints.robbing_the_fed(model, SHAPE, 8, location=0.5, scale=0.05)
    planted = imprint.plant(jax.random.key(3), params)
    # Brightness below, between and above all cuts.
    inputs = jnp.stack([jnp.full(SHAPE, level) for level in (0.0, 0.505, 1.0)])
    batch = Batch(inputs.at[:, 0, 0].add(jnp.asarray([0.01, 0, -0.01])[:, None]), jnp.arange(3))
    active = active_units(planted, "rows", batch)
    np.testing.assert_array_equal(active.sum(axis=1), [1, 5, 8])
    seen = observed(imprint.model, planted, batch)
    found = imprint.attack(jax.random.key(0), seen)
    assert recovered(found, batch).all()
    assert found.diagnostics["rows"] == 3 and found.objective < 1e-6
    confidence = jax.nn.softmax(imprint.model.apply(planted, batch.inputs)).max()
    assert confidence < 0.99
    base = jax.tree.map(lambda leaf: jnp.abs(leaf).max(), seen.gradient["base"])
    assert jax.tree.reduce(min, base) > 0


def test_one_shot_takes_one_sample_out_of_a_large_batch():
    model, params = network(64)
    batch = batch_of(256)
    # The cuts hold one fourth of the law, around its median.
    brightness = np.sort(np.asarray(batch.inputs).mean(axis=(1, 2, 3), dtype=float))
    gaps = np.minimum(np.diff(brightness)[1:], np.diff(brightness)[:-1])
    aim, gap = float(brightness[1 + gaps.argmax()]), float(gaps.max())
    imprint = imprints.robbing_the_fed(model, SHAPE, 4, "one_shot", location=aim, scale=gap)
    planted = imprint.plant(jax.random.key(3), params)
    active = active_units(planted, "rows", batch)
    inside = active[:, 0] & ~active[:, 1]
    assert active.shape == (256, 2) and inside.sum() == 1
    found = imprint.attack(jax.random.key(0), observed(imprint.model, planted, batch))
    np.testing.assert_array_equal(recovered(found, batch, 1e-5), inside)
    # Aimed by auxiliary data, the bin holds about its share of them.
    imprint = imprints.robbing_the_fed(model, SHAPE, 5, "one_shot", target=0.7)
    planted = imprint.plant(jax.random.key(3), params, auxiliary())
    share = active_units(planted, "rows", auxiliary()).mean(axis=0)
    np.testing.assert_allclose(share, [0.4, 0.2], atol=0.05)


def test_binning_goes_in_front_of_any_model_and_maps_over_victims():
    base = models.convnet_small(width=4)
    imprint = imprints.robbing_the_fed(base, SHAPE, 64)
    planted = imprint.plant(jax.random.key(3), base.init(jax.random.key(0), SHAPE), auxiliary())
    shapes = jax.eval_shape(lambda: imprint.model.init(jax.random.key(0), SHAPE))
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, planted)
    victims = [batch_of(8, seed) for seed in range(3)]
    seen = [observed(imprint.model, planted, victim) for victim in victims]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *seen)
    many = jax.jit(jax.vmap(imprint.attack))(jax.random.split(jax.random.key(0), 3), stacked)
    for index, victim in enumerate(victims):
        found = jax.tree.map(lambda leaf, index=index: leaf[index], many)
        single = alone(active_units(planted, "rows", victim))
        np.testing.assert_array_equal(recovered(found, victim), single)


@pytest.mark.parametrize(("steps", "below"), [(False, 1e-9), (True, 1e-4)])
def test_loki_keeps_clients_apart_in_their_aggregate(steps, below):
    """Specified: each client's recall is the share of its own samples alone in their bins."""
    clients, size = 5, 8
    model, params = network(32)
    imprint = imprints.loki(model, SHAPE, clients, 64, local_steps=steps)
    planted = imprint.plant(jax.random.key(1), params, auxiliary())
    first = jax.tree.map(lambda leaf: leaf[0], planted)
    everyone = batch_of(clients * size)
    batches = jax.tree.map(lambda leaf: leaf.reshape(clients, size, *leaf.shape[1:]), everyone)
    if steps:
        # Two local epochs of mini-batches of four.
        local = LocalTraining(epochs=2, batch_size=4, learning_rate=0.01, num_samples=size)
        each = [
            invjax.observe(
                jax.random.key(client),
                imprint.model,
                *jax.tree.map(lambda leaf, at=client: leaf[at], (planted, batches)),
                local=local,
            )
            for client in range(clients)
        ]
        seen = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    else:
        seen = jax.jit(jax.vmap(functools.partial(observed, imprint.model)))(planted, batches)
    together = imprints.aggregate(seen)
    assert together.facts.batch_size == clients * size
    found = imprint.attack(jax.random.key(0), together)
    kernel = first["rows"]["kernel"].reshape(8, 8, clients, 1, 64)[:, :, 0].reshape(64, 64)
    layer = {"rows": {"kernel": 10 * kernel, "bias": first["rows"]["bias"]}}
    recalls = []
    for client in range(clients):
        batch = jax.tree.map(lambda leaf, at=client: leaf[at], batches)
        own = slice(client * size, (client + 1) * size)
        slots = np.asarray(found.inputs)[own].reshape(size, -1)
        passed = np.asarray(found.found)[own]
        truth = np.asarray(batch.inputs).reshape(size, -1)
        close = ((slots[:, None] - truth[None]) ** 2).mean(axis=-1) < below
        single = alone(active_units(layer, "rows", batch))
        if steps:
            # Drift may part a pair; what is alone comes back, and passes the attack's own check.
            assert close[passed].any(axis=0)[single].all()
        else:
            np.testing.assert_array_equal(close[passed].any(axis=0), single)
            assert close[passed].any(axis=1).all()
            labels = np.asarray(found.labels)[own][passed]
            np.testing.assert_array_equal(
                labels, np.asarray(batch.labels)[close[passed].argmax(axis=1)]
            )
        recalls.append(single.mean())
    assert 0.6 < np.mean(recalls) <= 1


def test_loki_need_not_know_how_many_samples_all_clients_have():
    """They may be more than the slots of one client."""
    model, params = network(8)
    imprint = imprints.loki(model, SHAPE, 3, 16, location=0.3, scale=0.08, max_samples=2)
    planted, batch = imprint.plant(jax.random.key(1), params), batch_of(3)
    alone = jax.tree.map(lambda leaf: leaf[:, None], batch)
    together = imprints.aggregate(
        jax.vmap(functools.partial(observed, imprint.model))(planted, alone)
    )
    hidden = together._replace(facts=dataclasses.replace(together.facts, batch_size=None))
    found = imprint.attack(jax.random.key(0), hidden)
    assert found.inputs.shape == (6, *SHAPE)
    assert recovered(found, batch).all()


def test_a_row_that_is_not_finite_takes_no_slot_of_others():
    unit = jnp.ones(1)
    rows = Rows(jnp.asarray([[jnp.nan, 0.5]]), jnp.asarray([2.0, 1.0]), 0.0, 0 * unit, unit)
    found = invert_rows(rows, None, None, (1, 2), 2, 1e-4)
    np.testing.assert_array_equal(found.inputs, [[0.5], [0.0]])
    np.testing.assert_array_equal(found.found, [True, False])


@pytest.mark.parametrize("independent", [False, True])
def test_trap_weights_are_as_published(independent):
    model, params = network(400)
    imprint = imprints.trap_weights(
        model, SHAPE, sigma=0.5, scale=0.7, independent_signs=independent
    )
    planted = imprint.plant(jax.random.key(1), params)
    assert imprint.model is model
    kernel = np.asarray(planted["layer01"]["kernel"])
    assert (planted["layer01"]["bias"] == 0).all()
    # The rest of the model is what it was.
    np.testing.assert_array_equal(planted["layer02"]["kernel"], params["layer02"]["kernel"])
    negative = (kernel < 0).sum(axis=0)
    if independent:
        assert negative.std() > 2 and abs(negative.mean() - 32) < 1
    else:
        np.testing.assert_array_equal(negative, 32)
        for column in kernel.T[:5]:
            np.testing.assert_allclose(
                np.sort(column[column > 0]), np.sort(-0.7 * column[column < 0]), rtol=1e-5
            )
    assert abs(-kernel[kernel < 0].mean() - 0.5 * np.sqrt(2 / np.pi)) < 0.01
    # No coordinate is always of one sign.
    assert 0.3 < (kernel < 0).mean(axis=1).min() and (kernel < 0).mean(axis=1).max() < 0.7


def test_trap_weights_isolate_as_many_samples_as_measured():
    """Digits, 20 samples, 200 rows: the lower scale isolates more; a cascade takes all."""
    model, params = network(200)
    rates = {}
    for scale in (0.6, 0.95):
        imprint = imprints.trap_weights(model, SHAPE, scale=scale)
        peeling = imprints.trap_weights(model, SHAPE, scale=scale, cascade=True)
        rows = []
        for seed in range(4):
            planted, batch = imprint.plant(jax.random.key(seed), params), batch_of(20, seed)
            active = active_units(planted, "layer01", batch)
            alone_in = active.sum(axis=0) == 1
            isolated = active[:, alone_in].any(axis=1)
            rows.append((active.any(axis=0).mean(), alone_in.mean(), isolated.mean()))
            if seed == 0:
                seen = observed(model, planted, batch)
                found = imprint.attack(jax.random.key(0), seen)
                np.testing.assert_array_equal(recovered(found, batch), isolated)
                assert found.diagnostics["certified"] == alone_in.sum()
                more = peeling.attack(jax.random.key(0), seen)
                assert recovered(more, batch).sum() >= isolated.sum()
        rates[scale] = np.mean(rows, axis=0)
    np.testing.assert_allclose(rates[0.6], (0.52, 0.18, 0.72), atol=0.1)
    np.testing.assert_allclose(rates[0.95], (0.93, 0.05, 0.34), atol=0.1)


def test_the_batch_size_may_be_unknown():
    model, params = network(200)
    imprint = imprints.trap_weights(model, SHAPE, scale=0.6, max_samples=24, tolerance=1e-5)
    planted, batch = imprint.plant(jax.random.key(0), params), batch_of(6)
    active = active_units(planted, "layer01", batch)
    seen = observed(model, planted, batch)
    hidden = seen._replace(facts=dataclasses.replace(seen.facts, batch_size=None))
    found = imprint.attack(jax.random.key(0), hidden)
    assert found.inputs.shape == (24, *SHAPE)
    np.testing.assert_array_equal(
        recovered(found, batch), active[:, active.sum(axis=0) == 1].any(axis=1)
    )
    # With noise nothing is certified, and the candidates are there all the same.
    noisy = jax.tree.map(
        lambda leaf: leaf + 1e-5 * jax.random.normal(jax.random.key(2), leaf.shape), seen.gradient
    )
    found = imprint.attack(jax.random.key(0), seen._replace(gradient=noisy))
    assert not found.found.any() and (found.inputs != 0).any()


@pytest.mark.slow
def test_qbi_on_normal_features_is_as_the_theory_says():
    """Specified: d = 3072, B = 20, N = 500: one row in 0.377 +- 0.02 isolates, recall above 0.99."""
    model = models.mlp((500,), init="he")
    params = model.init(jax.random.key(0), (3072,))
    imprint = imprints.qbi(model, (3072,), 20)
    # Its bias is one number for all batches, so the rate is averaged over batches and rows.
    precision, recall = [], []
    for seed in range(8):
        planted = imprint.plant(jax.random.key(seed), params)
        inputs = jax.random.normal(jax.random.key(100 + seed), (20, 3072))
        active = active_units(planted, "layer01", Batch(inputs, jnp.arange(20)))
        alone_in = active.sum(axis=0) == 1
        precision.append(alone_in.mean())
        recall.append(active[:, alone_in].any(axis=1).mean())
    assert abs(np.mean(precision) - 0.95**19) < 0.02
    assert np.mean(recall) > 0.99
    # And the attack reads what is isolated.
    batch = Batch(inputs, jnp.arange(20) % 10)
    seen = invjax.observe(jax.random.key(1), model, planted, batch, input_range=(-9.0, 9.0))
    found = imprint.attack(jax.random.key(0), seen)
    np.testing.assert_array_equal(recovered(found, batch), active[:, alone_in].any(axis=1))


@pytest.mark.parametrize("name", ["qbi", "pairs", "soliton_free"])
def test_a_cascade_carries_planted_weights_on(name):
    """Measured: all of 32 digits in 512 units, where rows alone isolate some of them."""
    model, params = network(512)
    data, batch, size = auxiliary(128), batch_of(32), 32
    moments = {"mean": float(data.inputs.mean()), "std": float(data.inputs.std())}
    settings = {} if name == "soliton_free" else moments
    share = []
    for cascade in (False, True):
        imprint = getattr(imprints, name)(model, SHAPE, size, cascade=cascade, **settings)
        planted = imprint.plant(jax.random.key(1), params, data)
        found = imprint.attack(jax.random.key(0), observed(model, planted, batch))
        share.append(recovered(found, batch).mean())
    assert share[0] < share[1] == 1


def test_qbi_and_pairs_normalize_and_pairs_isolates_its_own_data():
    model, params = network(120)
    data, size = auxiliary(60), 20
    settings = {"mean": data.inputs.mean(axis=0), "std": data.inputs.std(axis=0) + 0.1}
    normal = (data.inputs - settings["mean"][None]) / settings["std"][None]
    raw = imprints.qbi(model, SHAPE, size).plant(jax.random.key(1), params)
    scaled = imprints.qbi(model, SHAPE, size, **settings).plant(jax.random.key(1), params)
    np.testing.assert_array_equal(
        active_units(raw, "layer01", data._replace(inputs=normal)),
        active_units(scaled, "layer01", data),
    )
    imprint = imprints.pairs(model, SHAPE, size, **settings)
    planted = jax.jit(imprint.plant)(jax.random.key(1), params, data)
    active = active_units(planted, "layer01", data).reshape(3, size, -1)
    alone_in = active.sum(axis=1) == 1
    # Row after row isolates another sample of the first batch, before the search moves on or ends.
    number = int(alone_in[0].cumprod().sum())
    assert number >= 5
    owners = active[0][:, :number].argmax(axis=0)
    assert len(set(owners)) == number
    batch = batch_of(size)
    found = imprint.attack(jax.random.key(0), observed(model, planted, batch))
    mine = active_units(planted, "layer01", batch)
    np.testing.assert_array_equal(
        recovered(found, batch), mine[:, mine.sum(axis=0) == 1].any(axis=1)
    )


def test_solitons_carry_the_cascade_where_a_passive_scan_stops():
    """Specified: 512 units, 128 digits: above 0.95 against below 0.4."""
    model, params = network(512)
    batch, size = batch_of(128), 128
    informed = imprints.soliton_data(model, SHAPE, size)
    passive = informed.attack
    planted = informed.plant(jax.random.key(0), params, auxiliary(size))
    found = passive(jax.random.key(0), observed(model, planted, batch))
    assert recovered(found, batch).mean() > 0.95
    plain = passive(jax.random.key(0), observed(model, params, batch))
    assert recovered(plain, batch).mean() < 0.4
    # On the very data that it was planted by, degrees are exact.
    degrees = active_units(planted, "layer01", auxiliary(size)).sum(axis=0)
    law = imprints.robust_soliton(size)
    assert abs((degrees == 2).mean() - law[1]) < 0.07 and degrees.min() >= 1
    # Without data, uniform inputs are what the degrees are made for.
    free = imprints.soliton_free(model, SHAPE, size).plant(jax.random.key(0), params)
    noise = Batch(jax.random.uniform(jax.random.key(5), (2048, *SHAPE)), jnp.zeros(2048, int))
    share = active_units(free, "layer01", noise).mean(axis=0)
    expected = np.asarray((law * np.arange(1, size + 1)).sum() / size)
    assert abs(share.mean() - expected) < 0.03


def test_the_robust_soliton_law():
    law = imprints.robust_soliton(128)
    assert law.shape == (128,) and abs(law.sum() - 1) < 1e-12 and (law >= 0).all()
    ripple = 0.05 * np.log(128 / 0.4) * np.sqrt(128)
    spike = round(128 / ripple)
    assert law[spike - 1] > 5 * law[spike] and law[spike - 1] > law[spike - 2]
    ratio = (1 / 128 + ripple / 128) / (0.5 + ripple / 256)
    np.testing.assert_allclose(law[0] / law[1], ratio)
    # A small batch: no spike beyond it.
    assert imprints.robust_soliton(4).shape == (4,) and (imprints.robust_soliton(4) >= 0).all()


def test_a_convolutional_front_is_made_to_pass_the_input_on():
    specs = [
        Spec("conv", 4, 3, padding=1, activation="relu"),
        Spec("conv", 3, 3, padding=1, activation="relu", bias=False),
        Spec("flatten"),
        Spec("dense", 200, activation="relu"),
        Spec("dense", 10),
    ]
    model = chain_model(specs, 10, "front", "he")
    params = model.init(jax.random.key(0), SHAPE)
    imprint = imprints.trap_weights(model, SHAPE, scale=0.6)
    planted, batch = imprint.plant(jax.random.key(0), params), batch_of(8)
    found = imprint.attack(jax.random.key(0), observed(model, planted, batch))
    dense = planted["layer03"]["kernel"].reshape(64, 3, 200)
    assert (dense[:, 1:] == 0).all()
    active = np.asarray(batch.inputs.reshape(8, -1) @ dense[:, 0] > 0)
    isolated = active[:, active.sum(axis=0) == 1].any(axis=1)
    assert isolated.sum() > 4
    np.testing.assert_array_equal(recovered(found, batch), isolated)
    # What is below zero ends at the front's ReLU.
    seen = observed(model, planted, batch)
    facts = dataclasses.replace(seen.facts, input_range=(-1.0, 1.0))
    with pytest.raises(ValueError, match=r"passes no values below zero on, .* from -1.0"):
        imprint.attack(jax.random.key(0), seen._replace(facts=facts))


def test_errors_name_what_is_wrong():
    model, params = network(8)
    key, fed = jax.random.key(0), imprints.robbing_the_fed
    for build, message in (
        (lambda: fed(model, SHAPE, 0), "bins must be a whole number of at least 1, got 0"),
        (lambda: fed(model, (), 4), "input_shape must have positive sides"),
        (lambda: fed(model, SHAPE, 4, "dense"), "variant must be one of"),
        (lambda: fed(model, SHAPE, 4, measurement="max"), "measurement must be one of"),
        (lambda: fed(model, SHAPE, 4, measurement="dct", mode=64), r"mode must lie in \[1, 63\]"),
        (lambda: fed(model, SHAPE, 4, location=0.5), "both or none of location and scale"),
        (lambda: fed(models.cnn6(), SHAPE, 4), "must have softmax logits, got a single logit"),
        (lambda: imprints.loki(model, (64,), 2, 4), r"must be \(height, width, channels\)"),
        (lambda: imprints.loki(model, SHAPE, 2, 4, peak=0.0), "peak must lie in"),
        (lambda: imprints.trap_weights(model, SHAPE, scale=1.5), r"scale must lie in \(0.0, 1.0\]"),
        (lambda: imprints.qbi(model, SHAPE, 1), "batch_size must be a whole number of at least 2"),
        (lambda: imprints.qbi(model, SHAPE, 8, std=np.zeros(SHAPE)), "std must be positive"),
        (lambda: imprints.pairs(model, SHAPE, 8, mean=np.zeros(64)), r"mean must be a number or"),
        (lambda: imprints.trap_weights(model, SHAPE, tolerance=0.0), "tolerance must lie in"),
        (lambda: fed(model, SHAPE, 4, tolerance=np.nan), "tolerance must lie in"),
        (lambda: fed(model, SHAPE, 4, input_range=(1.0, 0.0)), "input_range must be"),
        (
            lambda: imprints.soliton_free(model, SHAPE, 8, input_range=(0.0, 0.0)),
            "input_range must",
        ),
        (lambda: imprints.soliton_free(model, SHAPE, 8, sigma=0.0), "sigma must lie in"),
        (lambda: imprints.robust_soliton(8, failure=1.0), "failure must lie in"),
        (lambda: fed(model, SHAPE, 4).plant(key, params), "robbing_the_fed plants by auxiliary"),
        (
            lambda: imprints.pairs(model, SHAPE, 20).plant(key, params, auxiliary(5)),
            "pairs needs 20 auxiliary samples or more, got 5",
        ),
        (
            lambda: imprints.soliton_data(model, (4, 16, 1), 8).plant(key, params, auxiliary(8)),
            r"auxiliary.inputs must be \[A, 4, 16, 1\], got \(8, 8, 8, 1\)",
        ),
        (
            lambda: fed(model, SHAPE, 4).plant(key, params, auxiliary(1)),
            "two samples or more, got 1",
        ),
        (
            lambda: imprints.trap_weights(model, (4, 4, 1)).plant(key, params),
            r"input_shape \(4, 4, 1\) gives the first dense layer of .* 16 values, it takes 64",
        ),
        (
            lambda: imprints.trap_weights(models.lenet(activation="relu"), SHAPE).plant(
                key, models.lenet(activation="relu").init(key, SHAPE)
            ),
            "must be hidden and have a bias",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            build()
    strided = chain_model(
        [
            Spec("conv", 4, 3, 2, 1, "relu"),
            Spec("flatten"),
            Spec("dense", 8, activation="relu"),
            Spec("dense", 10),
        ],
        10,
        "strided",
    )
    with pytest.raises(ValueError, match="front of strided cannot pass inputs"):
        imprints.trap_weights(strided, SHAPE).plant(key, strided.init(key, SHAPE))
    imprint = imprints.trap_weights(model, SHAPE)
    seen = observed(model, imprint.plant(key, params), batch_of(4))
    local = LocalTraining(epochs=2, batch_size=4, learning_rate=0.1, num_samples=4)
    facts = seen.facts
    for other, message in (
        (dataclasses.replace(facts, local=local), "got an update of 2 local steps"),
        (dataclasses.replace(facts, input_shape=(64,)), "made for inputs of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            imprint.attack(key, seen._replace(facts=other))
    levels = Batch(jnp.zeros((4, *SHAPE), jnp.uint8), jnp.arange(4))
    with pytest.raises(TypeError, match=r"auxiliary.inputs must be floating point, got uint8"):
        imprints.soliton_data(model, SHAPE, 4).plant(key, params, levels)
    loki = imprints.loki(model, SHAPE, 3, 4, location=0.3, scale=0.1)
    planted = jax.tree.map(lambda leaf: leaf[0], loki.plant(key, params))
    one = observed(loki.model, planted, batch_of(4))
    with pytest.raises(ValueError, match="multiple of 3 clients, got 4"):
        loki.attack(key, one)
    for wrong in (one, one._replace(gradient=None)):
        with pytest.raises(ValueError, match="stacked along a leading axis of clients"):
            imprints.aggregate(wrong)
