"""Gradients follow the dual rule, training after exact growth is the source's, and breakers part copies (float64)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import (
    SOURCE,
    STEP,
    fresh_records,
    grow,
    logit_error,
    oracle_logits,
    relative_error,
    trained_state,
)

from growth.expand import along
from growth.grow import grow_state
from growth.index_map import IndexMap
from growth.t5 import ModelGrowth, plan_growth
from t5pegasus.axes import dual_multipliers
from t5pegasus.batch import Batch
from t5pegasus.config import NUMERICS, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from t5pegasus.errors import UsageError
from t5pegasus.model.t5 import bind, declare_parameters
from t5pegasus.train.loss import sum_losses
from t5pegasus.train.state import TrainState
from t5pegasus.train.step import pure_train_step

MINI = dataclasses.replace(SOURCE, d_model=8, d_ff=10, num_heads=2, d_kv=4, num_encoder_layers=1, num_decoder_layers=1)
DOUBLED = {"d_model": 16, "d_ff": 20, "num_heads": 4, "d_kv": 8}
UNEVEN = {"embed": 0.6, "*.mlp": 0.7, "*.heads": 0.3, "*.[qv]*": 0.2}
# Compiling is nearly all the time these tests take.
QUICK = {"xla_backend_optimization_level": 0}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def uneven(**choices):
    shares = {pattern: {"operator": "duplicate", "first_share": share} for pattern, share in UNEVEN.items()}
    return {"dynamics": "exact", "axes": shares, **choices}


def draw_batch(seed: int) -> Batch:
    random, (rows, source, target) = np.random.default_rng(seed), (4, 11, 6)
    inputs = random.integers(3, 41, (rows, source), np.int32)
    targets = random.integers(3, 41, (rows, target), np.int32)
    return Batch(
        encoder_input_tokens=inputs,
        encoder_segment_ids=np.ones_like(inputs),
        encoder_positions=np.tile(np.arange(source, dtype=np.int32), (rows, 1)),
        decoder_input_tokens=np.concatenate([np.ones((rows, 1), np.int32), targets[:, :-1]], axis=1),
        decoder_target_tokens=targets,
        decoder_loss_weights=np.ones(targets.shape, np.float32),
        decoder_segment_ids=np.ones_like(targets),
        decoder_positions=np.tile(np.arange(target, dtype=np.int32), (rows, 1)),
        row_ids=np.arange(rows, dtype=np.uint32),
    )


@functools.cache
def compile_gradients(config: ModelConfig):
    batch = draw_batch(1)

    def objective(parameters):
        logits = bind(config, parameters, jnp.float64)(batch)
        sums = sum_losses(logits, batch.decoder_target_tokens, batch.decoder_loss_weights)
        return sums.nll / sums.weight

    return jax.jit(jax.grad(objective), compiler_options=QUICK)


def gradient_error(growth: ModelGrowth, before: TrainState, after: TrainState, maps=None) -> float:
    """How far gradients are from r times the source's, the worst parameter's, in units of its largest one."""
    maps = growth.plan.maps if maps is None else maps
    wanted, got = (
        compile_gradients(growth.source)(before.parameters),
        compile_gradients(growth.target)(after.parameters),
    )
    worst = 0.0
    for name, spec in growth.specs.items():
        if any(axis.endswith("relpos_buckets") and axis in maps for axis in spec.axes):
            continue  # which bucket has which distances is what the data says
        image, kept = np.asarray(wanted[name]), np.ones((1,) * len(spec.axes), bool)
        for place, axis in enumerate(spec.axes):
            if axis in maps:
                r = dual_multipliers(axis, spec, maps[axis])[1]
                image = np.take(image, maps[axis].sources, axis=place) * along(r, place, image.ndim)
                kept = kept & ~along(maps[axis].created, place, image.ndim)
        worst = max(worst, float(np.max(np.abs(np.where(kept, got[name] - image, 0))) / np.max(np.abs(image))))
    return worst


@pytest.mark.parametrize(
    "profile", [pytest.param(name, marks=[pytest.mark.slow] * (name == "bert4keras")) for name in NUMERICS]
)
def test_gradients_are_the_sources_times_r(profile):
    source = dataclasses.replace(MINI, **NUMERICS[profile])
    for changes, choices in (
        ({"d_model": 13, "d_ff": 17, "num_heads": 3, "d_kv": 5}, uneven()),
        (
            {"d_model": 11, "d_ff": 12, "num_heads": 3, "d_kv": 5},
            {"dynamics": "exact", "axes": {"embed": {"operator": "pad", "scale_gains": True}, "*.[hmqv]*": "pad"}},
        ),
    )[: 2 if profile == "hf-mt5" else 1]:
        growth, grown = grow(source, changes, choices)
        assert gradient_error(growth, trained_state(source), grown) <= 1e-13


PADDED_AND_DEEPER = (
    {
        "d_model": 11, "d_ff": 12, "num_heads": 3, "d_kv": 5, "num_encoder_layers": 3, "num_decoder_layers": 2,
        "vocab_size": 43, "num_masked_tokens": 2,
    },
    {"axes": {"embed": "pad", "*.[hmqv]*": "pad"}},
)  # fmt: skip


def test_gradients_with_random_pads_inserted_layers_and_masked_tokens_are_the_sources_times_r():
    growth, grown = grow(MINI, *PADDED_AND_DEEPER)
    assert gradient_error(growth, trained_state(MINI), grown) <= 1e-13


def test_uneven_shares_of_equal_copies_keep_the_function_and_bend_gradients_and_are_refused():
    growth, _ = grow(MINI, {"d_model": 16}, {"noise": 0.0})
    sources = growth.plan.maps["embed"].sources
    naive = np.where(np.arange(16) % 2, 0.3, 0.7)
    entry = IndexMap(sources, np.ones(16), naive, np.zeros(16, bool), 8, ratio=2.0)
    wrong = {name: grown_wrongly(name, spec, entry) for name, spec in growth.specs.items()}
    grown = trained_state(MINI)._replace(parameters=wrong)
    assert logit_error(MINI, growth, grown) <= 1e-13
    assert 0.1 < gradient_error(growth, trained_state(MINI), grown, {"embed": growth.plan.maps["embed"]}) < 1.0
    explicit = {"operator": "explicit", "map": {"sources": sources.tolist(), "read": naive.tolist()}}
    with pytest.raises(UsageError, match=r"uneven shares of equal copies of the stream.*give read = written/2"):
        grow(MINI, {"d_model": 16}, {"axes": {"embed": explicit}})


def grown_wrongly(name, spec, entry):
    array = trained_state(MINI).parameters[name]
    for place, axis in enumerate(spec.axes):
        if axis == "embed":
            array = np.take(array, entry.sources, axis=place)
            if axis in spec.contracted:
                array = array * along(entry.read, place, array.ndim)
    return array


ADAMW = OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_steps=1, weight_decay=0.1, max_grad_norm=0.5)
SGD = dataclasses.replace(ADAMW, name="sgd", learning_rate=0.1)
ADAFACTOR = dataclasses.replace(ADAMW, name="adafactor", learning_rate=0.03, min_dim_size_to_factor=4)
SCALED = dataclasses.replace(ADAMW, name="adamw-scaled", learning_rate=0.03)
MUON, LION = (dataclasses.replace(ADAMW, name=name) for name in ("muon", "lion"))


@functools.cache
def compile_step(config: ModelConfig, optimizer: OptimizerConfig):
    micros = 2 if optimizer.accumulate_in_moments else 1
    training = TrainConfig(steps=100, batch_size=4, accumulation_steps=micros)
    run = RunConfig(model=config, optimizer=optimizer, train=training)
    return jax.jit(pure_train_step(run, declare_parameters(config), jnp.float64), compiler_options=QUICK)


def train(config: ModelConfig, optimizer: OptimizerConfig, state: TrainState, first: int, last: int):
    """Updates first … last - 1 of one stream of batches; the state, and the gradients' norms."""
    norms = []
    for index in range(first, last):
        state, metrics = compile_step(config, optimizer)(state, draw_batch(100 + index))
        norms.append(float(metrics["grad_norm"]))
    return state, np.array(norms)


def check_dynamics(optimizer: OptimizerConfig, *growths, apart: float) -> None:
    """25 updates, grown before the first, and again halfway where there are two growths, beside the source's 25."""
    state = trained_state(MINI, optimizer)
    wanted, wanted_norms = train(MINI, optimizer, state, 0, 25)
    assert np.all(wanted_norms[1:] > optimizer.max_grad_norm) or optimizer.name != "adamw"
    config, norms, starts = MINI, [], [0, 12][: len(growths)]
    without = state
    for (changes, choices), first, last in zip(growths, starts, [*starts[1:], 25]):
        growth = plan_growth(
            config, dataclasses.replace(config, **changes), choices, step=STEP + first, optimizer=optimizer
        )
        config, state, without = growth.target, grow_state(state, growth), grow_state(without, growth)
        without = without._replace(multipliers=fresh_records(declare_parameters(config)))
        state, some = train(config, optimizer, state, first, last)
        without, _ = train(config, optimizer, without, first, last)
        norms.extend(some)
    logits, start, got, naive = (
        oracle_logits(each, parameters, 41)
        for each, parameters in (
            (MINI, wanted.parameters), (MINI, trained_state(MINI, optimizer).parameters),
            (config, state.parameters), (config, without.parameters),
        )
    )  # fmt: skip
    np.testing.assert_allclose(norms, wanted_norms, rtol=1e-11)
    assert relative_error(got, logits) <= 1e-12
    assert relative_error(start, logits) > 0.3, "training must have moved"
    assert relative_error(naive, logits) > apart, "the same training without growth's record must differ"


def test_25_updates_with_a_growth_of_a_grown_model_between_are_the_sources():
    first = {"d_model": 13, "d_ff": 14, "num_heads": 3, "d_kv": 5}
    second = {"d_model": 19, "d_ff": 20, "num_heads": 4, "d_kv": 8}
    check_dynamics(ADAMW, (first, uneven()), (second, {"dynamics": "exact"}), apart=0.3)


OPTIMIZERS = {each.name: each for each in (ADAMW, SCALED, ADAFACTOR, MUON, SGD, LION)}
OPTIMIZERS["adamw accumulated"] = dataclasses.replace(ADAMW, accumulate_in_moments=True)
EXACT = [(name, how) for name in OPTIMIZERS for how in ("even", "uneven", "padded")]
EXACT.remove(("muon", "padded"))  # which the linter refuses


@pytest.mark.slow
@pytest.mark.parametrize(("name", "how"), EXACT)
def test_25_updates_after_exact_growth_are_the_sources(name, how):
    choices = {"even": {"dynamics": "exact"}, "uneven": uneven(), "padded": {"dynamics": "exact", "axes": {"*": "pad"}}}
    # Even copies have the root mean square of what they copy, up to a factor that the scale takes care of by itself.
    apart = 0.05 if name == "adamw-scaled" else 0.3 if how == "even" else 0.1
    check_dynamics(OPTIMIZERS[name], (DOUBLED, choices[how]), apart=apart)


@functools.cache
def separation(name: str, num_updates: int) -> tuple[float, float]:
    """After so many updates: how far copies are apart among feed-forward units, and among coordinates of the stream."""
    share = {"operator": "duplicate", "first_share": 0.7}
    choices, optimizer = {
        "even": ({"dynamics": "exact"}, ADAMW),
        "uneven": ({"dynamics": "exact", "axes": {"*": share}}, ADAMW),
        "noise": ({"learning_rate": "keep"}, ADAMW),
        "empty m of copies": ({"noise": 0.0, "learning_rate": "keep", "state": "asymmetric"}, ADAMW),
        "rates of their own": ({"noise": 0.0}, dataclasses.replace(ADAMW, rewarm_steps=250, rewarm_peak=1.3)),
    }[name]
    growth, grown = grow(MINI, DOUBLED, choices)
    state, _ = train(growth.target, optimizer, grown, 0, num_updates)
    found = []
    for axis, parameter, place in (("encoder.mlp", "wi_0", 2), ("embed", "wo", 2)):
        name = f"encoder.layers.mlp.{parameter}"
        entry, spec = growth.plan.maps[axis], growth.specs[name]
        natural = np.moveaxis(np.asarray(state.parameters[name]), place, 0)
        natural = natural / along(dual_multipliers(axis, spec, entry)[0], 0, 3)
        found.append(relative_error(natural[1::2], natural[::2]))
    return found[0], found[1]


@pytest.mark.parametrize("name", ["even", "uneven"])
def test_copies_without_a_breaker_stay_copies(name):
    assert max(separation(name, 1)) <= 1e-14
    assert max(separation(name, 10)) <= 1e-14


@pytest.mark.parametrize("name", ["noise", "empty m of copies", "rates of their own"])
def test_breakers_part_copies_from_the_first_update_on(name):
    first, tenth = separation(name, 1), separation(name, 10)
    assert min(first) > 1e-4
    assert min(tenth) > 3 * min(first)


def largest_gradients(growth: ModelGrowth, state: TrainState):
    """(parameter, axis, the largest gradient of each entry along it) for every axis that grew."""
    gradients = compile_gradients(growth.target)(state.parameters)
    for name, spec in growth.specs.items():
        for place, axis in enumerate(spec.axes):
            if axis in growth.plan.maps:
                others = tuple(each for each in range(len(spec.axes)) if each != place)
                yield name, axis, np.abs(np.asarray(gradients[name])).max(others)


def test_what_growth_created_is_alive_after_two_updates():
    growth, grown = grow(MINI, *PADDED_AND_DEEPER)
    trained, _ = train(growth.target, ADAMW, grown, 0, 2)
    for name, axis, gradients in largest_gradients(growth, trained):
        created = growth.plan.maps[axis].created
        if axis == "vocab" and name == "lm_head":
            assert np.all(gradients[created] == 0), "a masked token has no gradient in the head"
        elif axis != "vocab":  # and none in the embedding until it is read
            assert np.all(gradients[created] > 0), (name, axis)


def test_an_inserted_layer_first_learns_what_it_writes_and_then_the_rest():
    growth, grown = grow(MINI, *PADDED_AND_DEEPER)
    for name, axis, gradients in largest_gradients(growth, grown):
        if axis.endswith("layers"):
            writes = name.endswith((".out", ".wo"))
            assert np.all((gradients[growth.plan.maps[axis].created] > 0) == writes), name


def test_pads_without_random_numbers_have_no_gradient_for_ever():
    growth, grown = grow(
        MINI,
        {"d_model": 11, "d_ff": 12, "num_heads": 3, "d_kv": 5},
        {"dynamics": "exact", "axes": {"embed": {"operator": "pad", "scale_gains": True}, "*.[hmqv]*": "pad"}},
    )
    for name, axis, gradients in largest_gradients(growth, grown):
        created = growth.plan.maps[axis].created
        assert np.all(gradients[created] == 0), (name, axis)
        assert np.all(gradients[~created] > 0), (name, axis)
