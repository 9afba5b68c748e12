"""Laws of `relative_attention_boundaries`: a refined table begins as the same function, then each row is its own."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_t5 import bucket_by_cases, forward

from t5pegasus.config import NUMERICS, ModelConfig
from t5pegasus.convert.hf_tensors import parameters_to_hf
from t5pegasus.errors import UsageError
from t5pegasus.model.attention import refined_bucket_sources, relative_bias, relative_position_bucket
from t5pegasus.model.decoding import CachedDecoder
from t5pegasus.model.sizes import axis_size
from t5pegasus.model.t5 import bind, init_parameters

STANDARD = ModelConfig()  # 32 buckets up to 128
SMALL = ModelConfig(
    vocab_size=40, d_model=16, d_kv=6, d_ff=24, num_heads=3, num_encoder_layers=2, num_decoder_layers=2,
    relative_attention_num_buckets=8, relative_attention_max_distance=12, dropout_rate=0.0,
    decoder_start_token_id=1, eos_token_id=2,
)  # fmt: skip
STACKS = pytest.mark.parametrize("stack", ["encoder", "decoder"])
FAR = 4096
ascending = st.sets(st.integers(114, FAR), max_size=5).map(lambda some: tuple(sorted(some)))


def refine(config: ModelConfig, *boundaries: int) -> ModelConfig:
    return dataclasses.replace(config, relative_attention_boundaries=boundaries)


def num_rows(config: ModelConfig, stack: str) -> int:
    return axis_size(f"{stack}.relpos_buckets", config)


def draw_table(config: ModelConfig, stack: str) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(num_rows(config, stack), 4)).astype(np.float32)


def biases(table, config, stack):
    """[heads, 2 · FAR + 1] of all distances from -FAR to FAR."""
    positions = jnp.arange(2 * FAR + 1)[None]

    @jax.jit
    def compute(table):
        return relative_bias(table, positions[:, FAR, None], positions, config, bidirectional=stack == "encoder")

    return np.asarray(compute(table))[0, :, 0]


def test_the_encoder_has_two_more_rows_for_each_boundary_and_the_decoder_one():
    refined = refine(STANDARD, 256, 512, 1024)
    assert (num_rows(refined, "encoder"), num_rows(refined, "decoder")) == (38, 35)


@STACKS
def test_a_refined_table_of_copies_has_the_same_bias_at_every_distance(stack):
    steps = [STANDARD, refine(STANDARD, 256), refine(STANDARD, 256, 512, 1024), refine(STANDARD, 200, 256, 512, 1024)]
    table = draw_table(STANDARD, stack)
    wanted = biases(table, STANDARD, stack)
    for before, after in itertools.pairwise(steps):
        table = table[refined_bucket_sources(before, after, stack)]
        np.testing.assert_array_equal(biases(table, after, stack), wanted)


@settings(max_examples=30)
@given(ascending, ascending, st.sampled_from(["encoder", "decoder"]))
def test_a_row_is_copied_from_the_bucket_that_all_its_distances_had(old, further, stack):
    before, after = refine(STANDARD, *old), refine(STANDARD, *sorted({*old, *further}))
    sources = refined_bucket_sources(before, after, stack)
    distances = np.arange(-FAR - 1, FAR + 2)

    def buckets(config):
        return np.asarray(
            relative_position_bucket(
                jnp.asarray(distances), bidirectional=stack == "encoder", num_buckets=32, max_distance=128,
                boundaries=config.relative_attention_boundaries,
            )
        )  # fmt: skip

    assert sources.shape == (num_rows(after, stack),)
    np.testing.assert_array_equal(sources[buckets(after)], buckets(before))
    if all(each > max(old, default=0) for each in further):
        np.testing.assert_array_equal(sources[: num_rows(before, stack)], np.arange(num_rows(before, stack)))


@STACKS
def test_buckets_are_those_of_the_definition_and_every_boundary_has_its_own(stack):
    refined = refine(STANDARD, 114, 300, 301)
    of_row = biases(np.eye(num_rows(refined, stack), dtype=np.float32), refined, stack).argmax(axis=0)
    wanted = [
        bucket_by_cases(
            distance, bidirectional=stack == "encoder", num_buckets=32, max_distance=128,
            boundaries=refined.relative_attention_boundaries,
        )
        for distance in range(-FAR, FAR + 1)
    ]  # fmt: skip
    np.testing.assert_array_equal(of_row, wanted)
    assert set(range(32, num_rows(refined, stack))) <= set(wanted)


@pytest.fixture(scope="module", params=NUMERICS)
def config(request) -> ModelConfig:
    return dataclasses.replace(SMALL, **NUMERICS[request.param])


@pytest.fixture(scope="module")
def inputs():
    random = np.random.default_rng(1)
    return random.integers(3, 40, (2, 40)), random.integers(3, 40, (2, 30))


@functools.partial(jax.jit, static_argnums=0)
def compute_logits(config, parameters, source, target):
    model, segments = bind(config, parameters), (jnp.ones_like(source), jnp.ones_like(target))
    positions = jnp.arange(target.shape[1])[None], jnp.arange(source.shape[1])[None]
    encoded = model.encode(source, segments[0])
    return model.decode(target, segments[1], encoded, segments[0], positions=positions)


@functools.partial(jax.jit, static_argnums=0)
def compute_cached_logits(config, parameters, source, target):
    """The same token by token."""
    model, segments = bind(config, parameters), jnp.ones_like(source)
    decoder = CachedDecoder.over(model, model.encode(source, segments), segments > 0)

    def step(cache, position):
        token = jax.lax.dynamic_slice_in_dim(target, position, 1, axis=1)
        hidden, cache = decoder.step(cache, token, position)
        return cache, decoder.logits(hidden)[:, 0]

    _, logits = jax.lax.scan(step, decoder.start(1, target.shape[1]), jnp.arange(target.shape[1]))
    return jnp.swapaxes(logits, 0, 1)


def test_a_refined_model_is_the_same_in_training_and_in_cached_decoding(config, inputs):
    refined = refine(config, 16, 24)
    parameters = init_parameters(config, 5)
    grown = dict(parameters)
    for stack in ("encoder", "decoder"):
        name = f"{stack}.relative_bias"
        grown[name] = parameters[name][refined_bucket_sources(config, refined, stack)]
    for compute in (compute_logits, compute_cached_logits):
        np.testing.assert_array_equal(compute(refined, grown, *inputs), compute(config, parameters, *inputs))


def test_rows_of_their_own_are_what_the_definition_says_in_training_and_in_cached_decoding(config, inputs):
    refined = refine(config, 16, 24)
    parameters = {
        name: 3 * array if "relative_bias" in name else array for name, array in init_parameters(refined, 5).items()
    }
    logits = compute_logits(refined, parameters, *inputs)
    weights = parameters_to_hf(parameters, refined)
    for row, (source, target) in enumerate(zip(*inputs)):
        wanted = forward(weights, refined, source, np.ones(len(source), bool), target)
        np.testing.assert_allclose(logits[row], wanted, rtol=0, atol=2e-5)
    np.testing.assert_allclose(compute_cached_logits(refined, parameters, *inputs), logits, rtol=0, atol=2e-5)
    unrefined = dict(parameters) | {
        f"{stack}.relative_bias": parameters[f"{stack}.relative_bias"][:8] for stack in ("encoder", "decoder")
    }
    assert np.abs(logits - compute_logits(config, unrefined, *inputs)).max() > 1e-3


@pytest.mark.parametrize("num_buckets", [4, 8, 32, 128])
@pytest.mark.parametrize("max_distance", [65, 128, 1000])
def test_the_first_clipped_distance_is_that_of_the_formula(num_buckets, max_distance):
    config = ModelConfig(
        relative_attention_num_buckets=num_buckets, relative_attention_max_distance=max_distance
    )  # fmt: skip
    first = []
    for bidirectional in (True, False):
        of_distance = [
            bucket_by_cases(-n, bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance)
            for n in range(max_distance + 2)
        ]
        first.append(of_distance.index(max(of_distance)))
    # One more where the formula's logarithm is a whole number but for rounding.
    assert config.first_clipped_distance - max(first) in (0, 1)
    assert config.first_clipped_distance <= max_distance


@pytest.mark.parametrize(
    ("boundaries", "message"),
    [
        ((512, 256), "must be ascending"),
        ((256, 256), "must be ascending"),
        ((113, 256), "must lie above 113, .*num_buckets=32, max_distance=128.* begin with 226"),
        ((256, 2**31), "below 2\\^31"),
        ((256.0,), "must be whole numbers"),
        ([256], "must be whole numbers"),
    ],
)
def test_boundaries_that_split_no_single_bucket_are_refused(boundaries, message):
    with pytest.raises(UsageError, match=rf"model\.relative_attention_boundaries=.*{message}"):
        ModelConfig(relative_attention_boundaries=boundaries)


def test_boundaries_survive_json_and_their_elements_are_checked():
    refined = refine(STANDARD, 256, 512)
    assert ModelConfig.from_json({**refined.to_json(), "relative_attention_boundaries": [256, 512]}) == refined
    with pytest.raises(UsageError, match="must be whole numbers"):
        ModelConfig.from_json({"relative_attention_boundaries": ["256"]})


def test_only_a_refinement_has_sources():
    with pytest.raises(UsageError, match=r"lacks \[512\].* keep all of them"):
        refined_bucket_sources(refine(STANDARD, 256, 512), refine(STANDARD, 256), "encoder")
    other = dataclasses.replace(STANDARD, relative_attention_num_buckets=64)
    with pytest.raises(UsageError, match=r"relative_attention_num_buckets is 32, got 64.* refine"):
        refined_bucket_sources(STANDARD, other, "decoder")
