"""What becomes of the optimizer's state, of the moving average, and of the record of axes."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from small_models import ALL, SOURCE, STEP, grow, logit_error, trained_state

from growth.expand import along
from growth.grow import grow_state
from growth.t5 import plan_growth
from t5pegasus.axes import dual_multipliers
from t5pegasus.config import OptimizerConfig
from t5pegasus.config.optimizer import NAMES
from t5pegasus.model.t5 import declare_parameters
from t5pegasus.train.optimizer import declare_moments

PAD = {"axes": {"embed": "pad", "*.[hmqv]*": "pad"}}
TOKENS = {"vocab_size": 45, "num_masked_tokens": 4}
GROWTHS = {
    "duplicated": (ALL, None),
    "padded, with new tokens": ({**ALL, **TOKENS}, PAD),
    "tables": ({**TOKENS, "relative_attention_boundaries": (30, 40)}, None),
    "stacked": ({"num_encoder_layers": 4}, {"axes": {"encoder.layers": "stack"}}),
}
growths = pytest.mark.parametrize("case", GROWTHS)


def masks(growth, name, attribute) -> np.ndarray:
    """bool, of the grown shape: entries that are `created` or `copied` along some axis."""
    spec = declare_parameters(growth.target)[name]
    mask = np.zeros(spec.shape, bool)
    for place, axis in enumerate(spec.axes):
        if axis in growth.plan.maps:
            mask |= along(getattr(growth.plan.maps[axis], attribute), place, mask.ndim)
    return mask


def image(growth, name, array, power) -> np.ndarray:
    spec = growth.specs[name]
    for place, axis in enumerate(spec.axes):
        if axis in growth.plan.maps:
            entry = growth.plan.maps[axis]
            r = dual_multipliers(axis, spec, entry)[1] ** power
            array = np.take(array, entry.sources, axis=place) * along(r, place, array.ndim)
    return array


@growths
def test_the_grown_state_has_the_names_and_shapes_of_a_fresh_one(case):
    growth, state = grow(SOURCE, *GROWTHS[case])
    specs = declare_parameters(growth.target)
    assert {name: array.shape for name, array in state.parameters.items()} == {n: s.shape for n, s in specs.items()}
    for kind, group in declare_moments(OptimizerConfig(), specs).items():
        shapes = {name: moment.spec.shape for name, moment in group.items()}
        assert {name: array.shape for name, array in getattr(state, kind).items()} == shapes
    sizes = {axis: size for spec in specs.values() for axis, size in zip(spec.axes, spec.shape)}
    for axis, size in sizes.items():
        assert {field.shape for field in state.multipliers[axis]} == {(size,)}
    assert (int(state.step), int(state.rows)) == (11, 88)


@growths
def test_moments_of_what_was_there_are_the_image_of_the_sources(case):
    growth, state = grow(SOURCE, *GROWTHS[case])
    before = trained_state(SOURCE)
    for power, kind in ((1, "first_moment"), (2, "second_moment")):
        for name, array in getattr(state, kind).items():
            kept = ~masks(growth, name, "created")
            wanted = image(growth, name, getattr(before, kind)[name], power)
            np.testing.assert_allclose(array[kept], wanted[kept], rtol=1e-14, err_msg=f"{kind} {name}")


@growths
def test_created_entries_have_no_first_moment_and_a_second_one_like_their_neighbours(case):
    growth, state = grow(SOURCE, *GROWTHS[case])
    for name, array in state.second_moment.items():
        created = masks(growth, name, "created")
        assert np.all(state.first_moment[name][created] == 0), name
        assert array.min() > 0, name
        if created.any():
            kept = array[~created]
            assert kept.min() / 2 < array[created].min(), name
            assert array[created].max() < 2 * kept.max(), name


def test_the_second_moment_of_a_new_row_or_column_is_the_mean_along_it():
    tail = {"operator": "pad", "layout": "tail"}
    _, state = grow(SOURCE, ALL, {"axes": {"embed": tail, "*.[hmqv]*": tail}})
    name = "decoder.layers.cross_attention.query"
    got, old, c = state.second_moment[name], trained_state(SOURCE).second_moment[name], 19 / 12
    assert len(old) == 1
    assert len(got) == 2  # layers
    for layer in got:
        np.testing.assert_allclose(layer[:12, :3, :5], c * old[0], rtol=1e-13)
        np.testing.assert_allclose(layer[12, :3, :5].sum(), c * old[0].mean(0).sum(), rtol=1e-12)
        np.testing.assert_allclose(layer[18, 4, 6], c * old[0].mean(), rtol=1e-12)
    name = "encoder.layers.mlp.wo"
    got, old = state.second_moment[name], trained_state(SOURCE).second_moment[name]
    np.testing.assert_allclose(got[0, 14:, :12], np.tile(old[0].mean(0) / c, (9, 1)), rtol=1e-12)
    np.testing.assert_allclose(got[0, :14, 12:], np.tile(old[0].mean(1)[:, None] / c, (1, 7)), rtol=1e-12)
    gain, old = state.parameters["decoder.final_norm"], trained_state(SOURCE).parameters["decoder.final_norm"]
    np.testing.assert_allclose(gain, np.concatenate([old, np.full(7, old.mean())]), rtol=1e-14)


def test_seeds_survive_float32_however_small_the_gradients_were():
    state = trained_state(SOURCE)
    tiny = state._replace(second_moment={n: (1e-22 * a).astype(np.float32) for n, a in state.second_moment.items()})
    _, grown = grow(SOURCE, ALL, PAD, tiny)
    _, wanted = grow(SOURCE, ALL, PAD)
    for name, array in grown.second_moment.items():
        np.testing.assert_allclose(array, 1e-22 * wanted.second_moment[name], rtol=3e-6, err_msg=name)


def test_copies_begin_without_momentum_where_the_state_is_asymmetric_and_everything_where_it_is_reset():
    _, mapped = grow(SOURCE, ALL, {"noise": 0.0})
    growth, state = grow(SOURCE, ALL, {"noise": 0.0, "state": "asymmetric"})
    for name, array in state.first_moment.items():
        fresh = masks(growth, name, "copied") | masks(growth, name, "created")
        assert np.all(array[fresh] == 0)
        np.testing.assert_array_equal(array[~fresh], mapped.first_moment[name][~fresh])
        np.testing.assert_array_equal(state.second_moment[name], mapped.second_moment[name])
    for choices in ({"state": "reset"}, {"state": "reset", **PAD}):
        _, state = grow(SOURCE, {**ALL, **TOKENS}, choices)
        for name, array in state.first_moment.items():
            assert not array.any()
            assert not state.second_moment[name].any()
            assert state.parameters[name].any()


def test_tokens_that_are_opened_get_the_second_moment_of_others_and_stay_what_they_are():
    source = dataclasses.replace(SOURCE, **TOKENS)
    state = trained_state(source)
    unseen = state.second_moment["lm_head"].copy()
    unseen[:, 41:] = 0  # a masked token's logit has no gradient
    state = state._replace(second_moment=state.second_moment | {"lm_head": unseen})
    growth, grown = grow(source, {"num_masked_tokens": 0}, state=state)
    for name, array in state.parameters.items():
        np.testing.assert_array_equal(grown.parameters[name], array)
        if name != "lm_head":  # masked tokens have been read all the time
            np.testing.assert_array_equal(grown.first_moment[name], state.first_moment[name])
            np.testing.assert_array_equal(grown.second_moment[name], state.second_moment[name])
    seeded = grown.second_moment["lm_head"]
    np.testing.assert_array_equal(seeded[:, :41], unseen[:, :41])
    np.testing.assert_allclose(seeded[:, 41:], np.tile(unseen[:, :41].mean(1)[:, None], (1, 4)), rtol=1e-12)
    assert growth.plan.promise == "L"
    assert np.all(grown.multipliers["vocab"].born[41:] == STEP)


def test_a_moving_average_grows_by_the_weights_random_numbers_into_one_that_computes_the_same():
    random, state = np.random.default_rng(8), trained_state(SOURCE)
    average = {name: array * (1 + 0.1 * random.random(array.shape)) for name, array in state.parameters.items()}
    growth, both = grow(SOURCE, ALL, PAD, state._replace(ema=average))
    before, after = state._replace(parameters=average), both._replace(parameters=both.ema)
    assert logit_error(SOURCE, growth, after, before) <= 1e-13
    _, alone = grow(SOURCE, ALL, PAD)
    assert alone.ema == {}
    for name, array in alone.parameters.items():
        np.testing.assert_array_equal(both.parameters[name], array)
    name = "encoder.layers.mlp.wi_0"
    created = masks(growth, name, "created")
    assert np.corrcoef(both.ema[name][created], both.parameters[name][created])[0, 1] > 0.999


def test_equal_plans_give_equal_bits_and_another_seed_other_ones():
    one, two, other = (grow(SOURCE, ALL, {**PAD, "seed": seed})[1].parameters for seed in (5, 5, 6))
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])
    name = "encoder.layers.mlp.wi_0"
    created = np.s_[0, :12, 20]  # a new unit
    assert not np.array_equal(one[name], other[name])
    assert not np.array_equal(one[name][created], one["encoder.layers.mlp.wi_1"][created])


def test_random_entries_have_the_spread_of_the_old_ones_in_each_layer():
    source = dataclasses.replace(SOURCE, d_model=64, d_ff=64)
    state, name = trained_state(source), "encoder.layers.mlp.wi_0"
    louder = state.parameters[name] * np.array([1.0, 10.0]).reshape(2, 1, 1)
    for noise in (0.5, 1.0):
        tail = {"operator": "pad", "layout": "tail"}
        _, grown = grow(source, {"d_ff": 512}, {"noise": noise, "axes": {"*.mlp": tail}},
                        state._replace(parameters=state.parameters | {name: louder}))  # fmt: skip
        spread = np.sqrt(np.mean(np.square(grown.parameters[name][:, :, 64:]), axis=(1, 2)))
        np.testing.assert_allclose(spread, noise * np.sqrt(np.mean(np.square(louder), axis=(1, 2))), rtol=0.02)


def test_random_readers_of_the_stream_have_the_spread_of_the_old_ones_after_scaling():
    source, name = dataclasses.replace(SOURCE, d_model=64, d_ff=64), "encoder.layers.mlp.wi_0"
    _, grown = grow(source, {"d_model": 256}, {"axes": {"embed": {"operator": "pad", "layout": "tail"}}})
    old, new = grown.parameters[name][:, :64], grown.parameters[name][:, 64:]
    np.testing.assert_allclose(old, trained_state(source).parameters[name] / 2, rtol=1e-15)
    np.testing.assert_allclose(np.std(new), np.sqrt(np.mean(old**2)), rtol=0.02)


def test_noise_along_two_axes_is_not_the_same():
    source, name = dataclasses.replace(SOURCE, d_model=64), "encoder.layers.self_attention.out"
    changes = {"num_heads": 6, "d_kv": 10}
    quiet, noisy = (grow(source, changes, {"noise": each})[1].parameters[name] for each in (0.0, 1.0))
    parts = (noisy - quiet).reshape(2, 3, 2, 5, 2, 64)  # head, copy, entry, copy
    along_heads, along_entries = parts.mean(4)[:, :, 0], parts.mean(2)[..., 0, :]
    assert np.std(along_heads) > 0.1 * np.std(parts)
    assert np.std(along_entries) > 0.1 * np.std(parts)
    assert abs(np.corrcoef(along_heads.ravel(), along_entries.ravel())[0, 1]) < 5 / along_heads.size**0.5


@pytest.mark.parametrize("noise", [0.25, 1.0])
def test_noise_parts_copies_as_strongly_as_the_plan_says(noise):
    source = dataclasses.replace(SOURCE, d_model=64, d_ff=64)
    changes, name = {"d_model": 128, "d_ff": 128}, "encoder.layers.mlp.wo"
    quiet, noisy = (grow(source, changes, {"noise": each, "seed": 2})[1].parameters[name] for each in (0.0, noise))
    parts = noisy - quiet
    np.testing.assert_allclose(parts[:, ::2], -parts[:, 1::2], atol=1e-14)  # over copies of a unit it cancels
    np.testing.assert_allclose(np.std(parts), noise * np.sqrt(np.mean(quiet**2)), rtol=0.02)


def test_records_remember_what_was_copied_what_was_created_and_when():
    first, middle = grow(SOURCE, {"d_model": 18, "d_ff": 20}, {"axes": {"*.mlp": "pad"}})
    record = middle.multipliers["embed"]
    entry = first.plan.maps["embed"]
    np.testing.assert_array_equal(record.inherited, 1)
    np.testing.assert_array_equal(record.born, np.where(entry.copied, STEP, -1))
    np.testing.assert_allclose(record.ratio, 1.5)
    units = middle.multipliers["encoder.mlp"]
    created = first.plan.maps["encoder.mlp"].created
    for field, fresh in (("written", 1), ("read", 1), ("ratio", 1), ("inherited", 0), ("born", STEP)):
        np.testing.assert_array_equal(getattr(units, field)[created], fresh, err_msg=field)
    later = plan_growth(
        first.target, dataclasses.replace(first.target, d_model=36, d_ff=40), {"axes": {"embed": "pad"}}, step=20
    )
    middle = middle._replace(step=np.int32(20))
    last = grow_state(middle, later)
    again, before = last.multipliers["embed"], record
    kept = ~later.plan.maps["embed"].created
    np.testing.assert_array_equal(again.born[~kept], 20)
    np.testing.assert_array_equal(again.born[kept], before.born)
    np.testing.assert_allclose(again.ratio, np.where(kept, 3.0, 1.0))
    np.testing.assert_array_equal(again.inherited, kept)
    np.testing.assert_allclose(again.written[kept], before.written * 2**0.5)
    units, entry = last.multipliers["encoder.mlp"], later.plan.maps["encoder.mlp"]
    np.testing.assert_array_equal(
        units.inherited, ~created[entry.sources]
    )  # copies of what was created are not, either
    np.testing.assert_allclose(units.read, 0.5)
    np.testing.assert_array_equal(units.born[::2], np.where(created, STEP, -1))
    np.testing.assert_array_equal(units.born[1::2], 20)
    inherited = units.inherited == 1
    shares = np.bincount(np.cumsum(~created)[entry.sources][inherited] - 1, (units.written * units.read)[inherited])
    np.testing.assert_allclose(shares, 1.0)


@pytest.mark.parametrize("name", NAMES)
def test_other_optimizers_states_grow_too(name):
    optimizer = OptimizerConfig(name=name, min_dim_size_to_factor=4, beta1=0.9)
    state = trained_state(SOURCE, optimizer)
    target = dataclasses.replace(SOURCE, **ALL)
    growth = plan_growth(SOURCE, target, PAD, step=STEP, optimizer=optimizer)
    grown = grow_state(state, growth)
    for kind, group in declare_moments(optimizer, declare_parameters(target)).items():
        shapes = {name: moment.spec.shape for name, moment in group.items()}
        assert {name: array.shape for name, array in getattr(grown, kind).items()} == shapes
        for name, array in getattr(grown, kind).items():
            assert kind == "first_moment" or array.min() > 0, (kind, name)


def test_moments_in_bfloat16_grow_as_those_in_float32_rounded_once():
    growth = plan_growth(SOURCE, dataclasses.replace(SOURCE, **ALL), PAD, step=STEP)
    state = trained_state(SOURCE)
    narrow = {
        kind: {name: array.astype(jnp.bfloat16) for name, array in getattr(state, kind).items()}
        for kind in ("first_moment", "second_moment")
    }
    wide = {kind: {name: each.astype(np.float32) for name, each in group.items()} for kind, group in narrow.items()}
    got, wanted = (grow_state(state._replace(**each), growth) for each in (narrow, wide))
    for kind in narrow:
        for name, array in getattr(got, kind).items():
            assert array.dtype == jnp.bfloat16
            np.testing.assert_array_equal(array, getattr(wanted, kind)[name].astype(jnp.bfloat16), err_msg=name)
