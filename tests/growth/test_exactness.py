"""Law 7 in float64: a grown model computes the same, its gradients and its training follow the dual rule."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from growth.expand import along, expand
from growth.grow import grow_state
from growth.index_map import map_axes
from growth.operators import dual_multipliers
from growth.plan import plan_growth
from growth.verify import draw_batches
from t5pegasus.axes import ParamSpec
from t5pegasus.config import NUMERICS, DataConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from t5pegasus.model.t5 import bind, declare_parameters, init_parameters
from t5pegasus.train.loss import sum_losses
from t5pegasus.train.optimizer import init_multipliers
from t5pegasus.train.state import TrainState, start_state
from t5pegasus.train.step import pure_train_step

SOURCE = ModelConfig(
    vocab_size=41, d_model=12, d_kv=5, d_ff=14, num_heads=3, num_encoder_layers=2, num_decoder_layers=1,
    relative_attention_num_buckets=8, relative_attention_max_distance=20, dropout_rate=0.0,
    decoder_start_token_id=1, eos_token_id=2,
)  # fmt: skip
TIED = dataclasses.replace(SOURCE, **NUMERICS["t5-1.0"])
WIDE = dataclasses.replace(SOURCE, d_model=64, d_kv=8, num_heads=2)
ALL = {
    "d_model": 19, "d_kv": 7, "d_ff": 23, "num_heads": 5, "num_encoder_layers": 5, "num_decoder_layers": 2
}  # fmt: skip
WIDTHS = {field: size for field, size in ALL.items() if "layers" not in field}


def random_growth(seed: int) -> dict[str, int]:
    random = np.random.default_rng(seed)
    fields = random.permutation(list(ALL))[: random.integers(2, 6)]
    return {str(field): getattr(SOURCE, field) + int(random.integers(1, 9)) for field in sorted(fields)}


def named(*cases: tuple[ModelConfig, dict[str, int]], marks=()):
    return [pytest.param(*case, id=",".join(f"{k}={v}" for k, v in case[1].items()), marks=marks) for case in cases]


AXES_ALONE = named(
    *((SOURCE, {field: size}) for field, size in ALL.items()), (SOURCE, {"d_model": 48}), (WIDE, {"d_model": 97})
)
COMBINATIONS = [
    *named((SOURCE, ALL), (SOURCE, random_growth(0))),
    *named((TIED, {field: size for field, size in ALL.items() if field != "d_model"})),
    *named(*((SOURCE, random_growth(seed)) for seed in range(1, 6)), marks=pytest.mark.slow),
]
axes_alone = pytest.mark.parametrize(("source", "changes"), AXES_ALONE)
combinations = pytest.mark.parametrize(("source", "changes"), COMBINATIONS)
growths = pytest.mark.parametrize(("source", "changes"), AXES_ALONE + COMBINATIONS)
# Compiling is nearly all the time these tests take.
QUICK = {"xla_backend_optimization_level": 0}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@functools.cache
def trained_state(config: ModelConfig) -> TrainState:
    """As training would leave it: gains off one, moments of the size of gradients, a position in the data."""
    random = np.random.default_rng(7)
    specs = declare_parameters(config)

    def draw(spec: ParamSpec) -> np.ndarray:
        values = random.standard_normal(spec.shape)
        return 1 + 0.1 * values if spec.gain else spec.init_std * values

    return TrainState(
        step=np.int32(11),
        rows=np.uint32(88),
        parameters={name: draw(spec) for name, spec in specs.items()},
        first_moment={name: 1e-2 * random.standard_normal(spec.shape) for name, spec in specs.items()},
        second_moment={name: 1e-4 * random.random(spec.shape) for name, spec in specs.items()},
        multipliers=jax.tree.map(np.asarray, init_multipliers(specs)),
    )


@functools.cache
def grown(source: ModelConfig, target: ModelConfig, noise: float = 1.0) -> TrainState:
    return grow_state(trained_state(source), declare_parameters(source), plan_growth(source, target, 5, noise))


@functools.cache
def compiled(config: ModelConfig, *, gradients: bool):
    (batch,) = draw_batches(config, DataConfig(max_source_tokens=13, max_target_tokens=7), seed=1)

    def objective(parameters):
        logits = bind(config, parameters, jnp.float64)(batch)
        sums = sum_losses(logits, batch.decoder_target_tokens, batch.decoder_loss_weights)
        return sums.nll / sums.weight, logits

    return jax.jit(jax.grad(objective, has_aux=True) if gradients else objective, compiler_options=QUICK)


def compute_logits(config: ModelConfig, state: TrainState):
    return compiled(config, gradients=False)(state.parameters)[1]


def compute_gradients(config: ModelConfig, state: TrainState):
    return compiled(config, gradients=True)(state.parameters)


def relative_error(got, wanted) -> float:
    return float(jnp.max(jnp.abs(got - wanted)) / jnp.max(jnp.abs(wanted)))


def kept_entries(spec, maps) -> np.ndarray:
    """bool, of the grown shape up to broadcasting: what the source had."""
    mask = np.ones((1,) * len(spec.axes), bool)
    for dimension, axis in enumerate(spec.axes):
        if axis in maps:
            mask = mask & ~np.asarray(along(maps[axis].created, dimension, len(spec.axes)))
    return mask


def test_a_moving_average_grows_into_one_that_computes_the_same():
    target = dataclasses.replace(SOURCE, **ALL)
    state = trained_state(SOURCE)
    random = np.random.default_rng(8)
    average = {name: array * (1 + 0.1 * random.random(array.shape)) for name, array in state.parameters.items()}
    plan, specs = plan_growth(SOURCE, target, 5), declare_parameters(SOURCE)
    both = grow_state(state._replace(ema=average), specs, plan)
    before, after = state._replace(parameters=average), both._replace(parameters=both.ema)
    assert relative_error(compute_logits(target, after), compute_logits(SOURCE, before)) < 1e-12
    for name, array in grown(SOURCE, target).parameters.items():
        np.testing.assert_array_equal(both.parameters[name], array)
    assert grow_state(state, specs, plan).ema == {}


@axes_alone
def test_logits_are_kept(source, changes):
    target = dataclasses.replace(source, **changes)
    logits, grown_logits = compute_logits(source, trained_state(source)), compute_logits(target, grown(source, target))
    assert grown_logits.dtype == jnp.float64
    assert relative_error(grown_logits, logits) < 1e-12


@combinations
def test_logits_are_kept_and_gradients_follow_the_dual_rule(source, changes):
    target = dataclasses.replace(source, **changes)
    gradients, logits = compute_gradients(source, trained_state(source))
    grown_gradients, grown_logits = compute_gradients(target, grown(source, target))
    assert relative_error(grown_logits, logits) < 1e-12
    specs = declare_parameters(source)
    maps = map_axes({axis for spec in specs.values() for axis in spec.axes}, source, target)
    for name, spec in specs.items():
        growing = {axis: maps[axis] for axis in spec.axes if axis in maps}
        scales = {axis: dual_multipliers(axis, spec, entry)[1] for axis, entry in growing.items()}
        wanted = expand(gradients[name], spec.axes, growing, scales)
        got = jnp.where(kept_entries(spec, growing), grown_gradients[name], 0.0)
        assert relative_error(got, wanted) < 1e-12, name


@growths
def test_the_grown_state_has_the_structure_of_a_fresh_one_and_keeps_its_place(source, changes):
    target = dataclasses.replace(source, **changes)
    state = grown(source, target)
    with jax.enable_x64(False):
        fresh = jax.eval_shape(lambda: start_state(init_parameters(target, 0), declare_parameters(target)))
        float32 = jax.tree.map(lambda leaf: leaf.astype(np.float32) if leaf.dtype == np.float64 else leaf, state)
        got = jax.eval_shape(lambda: float32)
    assert jax.tree.leaves_with_path(got) == jax.tree.leaves_with_path(fresh)
    assert (int(state.step), int(state.rows)) == (11, 88)


@growths
def test_no_second_moment_starts_at_zero_and_first_moments_of_created_entries_do(source, changes):
    target = dataclasses.replace(source, **changes)
    state = grown(source, target)
    specs = declare_parameters(source)
    maps = map_axes({axis for spec in specs.values() for axis in spec.axes}, source, target)
    for name, spec in specs.items():
        assert float(jnp.min(state.second_moment[name])) > 0, name
        created = ~np.broadcast_to(kept_entries(spec, maps), state.first_moment[name].shape)
        assert np.all(np.asarray(state.first_moment[name])[created] == 0), name


def test_an_independent_derivation_of_one_parameter_of_each_kind():
    target = dataclasses.replace(SOURCE, **WIDTHS)
    state, before = grown(SOURCE, target), trained_state(SOURCE)
    c = 19 / 12

    def leaf(group, name, of=state):
        return np.asarray(getattr(of, group)[name])

    wo, old = leaf("parameters", "encoder.layers.mlp.wo"), leaf("parameters", "encoder.layers.mlp.wo", before)
    np.testing.assert_allclose(wo[:, :14, :12], old * c**0.5, rtol=1e-15)
    assert np.all(wo[:, 14:] == 0)
    assert np.all(wo[:, :, 12:] == 0)
    query, old = (leaf("parameters", "decoder.layers.cross_attention.query", of) for of in (state, before))
    np.testing.assert_allclose(query[:, :12, :3, :5], old / c**0.5, rtol=1e-15)
    assert np.all(query[..., 5:] == 0)
    assert np.all(query[:, 12:, :, :5] != 0)
    assert np.all(query[:, :, 3:, :5] != 0)
    second, old = (leaf("second_moment", "decoder.layers.cross_attention.query", of) for of in (state, before))
    np.testing.assert_allclose(second[:, :12, :3, :5], old * c, rtol=1e-14)
    np.testing.assert_allclose(second[:, 12, :3, :5], c * old.mean(axis=1), rtol=1e-14)
    np.testing.assert_allclose(second[:, 18, 4, 6], c * old.mean(axis=(1, 2, 3)), rtol=1e-14)
    first, old = (leaf("first_moment", "encoder.layers.mlp.wo", of) for of in (state, before))
    np.testing.assert_allclose(first[:, :14, :12], old / c**0.5, rtol=1e-14)
    gain, old = (leaf("parameters", "encoder.layers.pre_mlp_norm", of) for of in (state, before))
    np.testing.assert_allclose(gain, np.concatenate([old, np.tile(old.mean(1, keepdims=True), 7)], 1), rtol=1e-15)


def test_random_entries_have_the_spread_of_the_old_ones_in_each_layer():
    source = dataclasses.replace(SOURCE, d_model=64, d_ff=64)
    target = dataclasses.replace(source, d_ff=512)
    state = trained_state(source)
    name = "encoder.layers.mlp.wi_0"
    scale = np.array([1.0, 10.0]).reshape(2, 1, 1)
    state = state._replace(parameters=state.parameters | {name: state.parameters[name] * scale})
    wi = grow_state(state, declare_parameters(source), plan_growth(source, target, 0)).parameters[name]
    spread = jnp.sqrt(jnp.mean(jnp.square(wi[:, :, 64:]), axis=(1, 2)))
    np.testing.assert_allclose(spread, jnp.sqrt(jnp.mean(jnp.square(wi[:, :, :64]), axis=(1, 2))), rtol=0.03)


def test_equal_plans_give_equal_bits_and_another_seed_other_ones():
    target = dataclasses.replace(SOURCE, **ALL)
    specs, state = declare_parameters(SOURCE), trained_state(SOURCE)
    one, two, other = (grow_state(state, specs, plan_growth(SOURCE, target, seed)) for seed in (5, 5, 6))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    name = "encoder.layers.mlp.wi_0"
    assert np.any(one.parameters[name] != other.parameters[name])
    assert np.any(one.parameters[name][:, :, 14:] != one.parameters["encoder.layers.mlp.wi_1"][:, :, 14:])


def test_growth_on_a_device_under_jit_equals_growth_on_the_host():
    target = dataclasses.replace(SOURCE, **ALL)
    plan, specs = plan_growth(SOURCE, target, 5), declare_parameters(SOURCE)
    jitted = jax.jit(lambda state: grow_state(state, specs, plan))(trained_state(SOURCE))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(jitted))
    assert all(isinstance(leaf, np.ndarray | np.generic) for leaf in jax.tree.leaves(grown(SOURCE, target)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13), jitted, grown(SOURCE, target))


def test_growing_twice_keeps_the_function_and_composes_the_record():
    middle = dataclasses.replace(SOURCE, d_model=15, num_heads=4, num_encoder_layers=3)
    target = dataclasses.replace(SOURCE, **ALL)
    twice = grow_state(grown(SOURCE, middle), declare_parameters(middle), plan_growth(middle, target, 9))
    logits, grown_logits = compute_gradients(SOURCE, trained_state(SOURCE))[1], compute_gradients(target, twice)[1]
    assert relative_error(grown_logits, logits) < 1e-12
    once = grown(SOURCE, target)
    for axis, multiplier in once.multipliers.items():
        if not axis.endswith("layers"):  # which copies are interposed where depends on the way
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-15), twice.multipliers[axis], multiplier)
    assert int(np.sum(np.asarray(twice.multipliers["encoder.layers"].written) == 1)) == SOURCE.num_encoder_layers


def run_config(model: ModelConfig) -> RunConfig:
    return RunConfig(
        model=model,
        optimizer=OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_steps=1, weight_decay=0.1),
        train=TrainConfig(steps=100, batch_size=8),
    )


def batch_of_step(model: ModelConfig, step: int):
    return draw_batches(model, DataConfig(max_source_tokens=13, max_target_tokens=7), seed=100 + step)[0]


def train(model: ModelConfig, state: TrainState, num_steps: int) -> TrainState:
    step = jax.jit(pure_train_step(run_config(model), declare_parameters(model), jnp.float64), compiler_options=QUICK)
    for index in range(num_steps):
        state, _ = step(state, batch_of_step(model, index))
    return state


def test_training_goes_on_exactly_as_before_if_the_new_entries_are_silent():
    """Growth theory T6: with noise 0 the grown model's every update is the image of the source's."""
    target = dataclasses.replace(SOURCE, **WIDTHS)
    before = compute_logits(SOURCE, trained_state(SOURCE))
    logits = compute_logits(SOURCE, train(SOURCE, trained_state(SOURCE), 20))
    grown_logits = compute_logits(target, train(target, grown(SOURCE, target, 0.0), 20))
    assert relative_error(logits, before) > 0.1
    assert relative_error(grown_logits, logits) < 1e-11


def test_after_two_updates_every_created_entry_has_a_gradient():
    target = dataclasses.replace(SOURCE, **ALL)
    gradients, _ = compute_gradients(target, train(target, grown(SOURCE, target), 2))
    specs = declare_parameters(SOURCE)
    maps = map_axes({axis for spec in specs.values() for axis in spec.axes}, SOURCE, target)
    for name, spec in specs.items():
        for dimension, axis in enumerate(spec.axes):
            if axis in maps:
                others = tuple(each for each in range(len(spec.axes)) if each != dimension)
                largest = np.asarray(jnp.max(jnp.abs(gradients[name]), axis=others))
                assert np.all(largest[maps[axis].created] > 0), (name, axis)
