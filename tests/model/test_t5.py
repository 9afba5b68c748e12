"""Laws of the model: causality, packing, padding, cached decoding, declared parameters."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5pegasus.axes import LOGICAL_AXES, logical_axis
from t5pegasus.batch import OF_ROWS, Batch
from t5pegasus.config import NUMERICS, MeshConfig, ModelConfig
from t5pegasus.errors import UsageError
from t5pegasus.model.attention import relative_position_bucket
from t5pegasus.model.decoding import CachedDecoder
from t5pegasus.model.flops import training_flops_per_row
from t5pegasus.model.t5 import bind, count_parameters, declare_parameters, init_parameters
from t5pegasus.presets import PRESETS, preset
from t5pegasus.sharding import RULES, make_mesh, param_shardings
from t5pegasus.train.loss import sum_losses

CONFIG = ModelConfig(
    vocab_size=61, d_model=16, d_kv=6, d_ff=24, num_heads=4, num_encoder_layers=2, num_decoder_layers=3,
    relative_attention_num_buckets=8, relative_attention_max_distance=12, dropout_rate=0.1,
    decoder_start_token_id=1, eos_token_id=2,
)  # fmt: skip


@pytest.fixture(scope="module", params=NUMERICS)
def config(request):
    """The same shape in every profile of numerics."""
    return dataclasses.replace(CONFIG, **NUMERICS[request.param])


@pytest.fixture(scope="module")
def parameters(config):
    return draw_parameters(config)


def draw_parameters(config: ModelConfig):
    """Random ones with relative biases that matter, and gains that are not all alike."""
    drawn = jax.jit(lambda: init_parameters(config, seed=3))()
    factors = {name: 3.0 for name in drawn if "relative_bias" in name}
    factors |= {name: 0.8 + 0.05 * index for index, name in enumerate(sorted(drawn)) if "norm" in name}
    return {name: value * factors.get(name, 1.0) for name, value in drawn.items()}


def make_rows(examples_by_row: list[list[tuple[int, int]]], source: int, target: int, seed: int = 0) -> Batch:
    """Rows of random examples with the given (source, target) lengths; example contents depend on their order only."""
    rng = np.random.default_rng(seed)
    fields = {name: np.zeros((len(examples_by_row), source if "encoder" in name else target), np.int32)
              for name in Batch._fields if name not in OF_ROWS}  # fmt: skip
    for row, examples in enumerate(examples_by_row):
        s = t = 0
        for segment, (num_source, num_target) in enumerate(examples, start=1):
            own = slice(s, s + num_source)
            fields["encoder_input_tokens"][row, own] = rng.integers(3, CONFIG.vocab_size, num_source)
            fields["encoder_segment_ids"][row, own] = segment
            fields["encoder_positions"][row, own] = np.arange(num_source)
            own = slice(t, t + num_target)
            targets = rng.integers(3, CONFIG.vocab_size, num_target)
            fields["decoder_target_tokens"][row, own] = targets
            fields["decoder_input_tokens"][row, own] = np.concatenate([[1], targets[:-1]])
            fields["decoder_loss_weights"][row, own] = 1
            fields["decoder_segment_ids"][row, own] = segment
            fields["decoder_positions"][row, own] = np.arange(num_target)
            s, t = s + num_source, t + num_target
    fields["decoder_loss_weights"] = fields["decoder_loss_weights"].astype(np.float32)
    return Batch(**{name: jnp.asarray(array) for name, array in fields.items()},
                 row_ids=jnp.arange(len(examples_by_row), dtype=jnp.uint32))  # fmt: skip


def test_a_position_does_not_see_later_ones(config, parameters):
    batch = make_rows([[(7, 6)]] * 7, 7, 6)
    batch = batch._replace(encoder_input_tokens=jnp.repeat(batch.encoder_input_tokens[:1], 7, axis=0))
    inputs = np.repeat(np.asarray(batch.decoder_input_tokens[:1]), 7, axis=0)
    for position in range(6):  # row p + 1 has another token at position p
        inputs[position + 1, position] = (inputs[0, position] + 5) % 40 + 3
    logits = bind(config, parameters)(batch._replace(decoder_input_tokens=jnp.asarray(inputs)))
    for position in range(6):
        changed = np.any(logits[position + 1] != logits[0], axis=-1)
        assert changed.tolist() == [False] * position + [True] * (6 - position)


def test_padding_changes_nothing(config, parameters):
    tight, padded = make_rows([[(7, 5)]], 7, 5), make_rows([[(7, 5)]], 12, 9)
    model = bind(config, parameters)
    np.testing.assert_allclose(model(padded)[:, :5], model(tight), rtol=0, atol=2e-5)


def test_a_packed_example_has_the_logits_and_the_loss_it_has_alone(config, parameters):
    lengths = [(5, 3), (4, 4), (6, 2)]
    packed, alone = make_rows([lengths], 18, 12), make_rows([[pair] for pair in lengths], 18, 12)
    model = bind(config, parameters)
    together, apart = model(packed), model(alone)
    sums, sums_apart = (
        sum_losses(logits, batch.decoder_target_tokens, batch.decoder_loss_weights)._replace(nll_by_row=None)
        for logits, batch in ((together, packed), (apart, alone))
    )
    np.testing.assert_allclose(*(jax.tree.leaves(each) for each in (sums, sums_apart)), rtol=1e-6)
    start = 0
    for row, (_, num_target) in enumerate(lengths):
        np.testing.assert_allclose(together[0, start : start + num_target], apart[row, :num_target], rtol=0, atol=2e-5)
        start += num_target


def test_cached_decoding_gives_teacher_forced_logits(config, parameters):
    batch = make_rows([[(9, 6)], [(5, 6)]], 9, 6)
    model = bind(config, parameters)
    decoder = CachedDecoder.over(
        model, model.encode(batch.encoder_input_tokens, batch.encoder_segment_ids), batch.encoder_segment_ids > 0
    )
    cache = decoder.start(num_hypotheses=1, max_tokens=8)
    forced = model(batch)
    for position in range(6):
        hidden, cache = decoder.step(cache, batch.decoder_input_tokens[:, position, None], jnp.int32(position))
        np.testing.assert_allclose(decoder.logits(hidden)[:, 0], forced[:, position], rtol=0, atol=2e-5)


def test_a_hypothesis_sees_what_its_ancestors_wrote_and_nothing_else(config, parameters):
    source = make_rows([[(7, 1)], [(4, 1)]], 7, 1)
    model = bind(config, parameters)
    encoded = model.encode(source.encoder_input_tokens, source.encoder_segment_ids)
    decoder = CachedDecoder.over(model, encoded, source.encoder_segment_ids > 0)
    random = np.random.default_rng(4)
    cache, lines = decoder.start(num_hypotheses=3, max_tokens=5), np.zeros((2, 3, 0), np.int32)
    positions = jnp.arange(5)[None], source.encoder_positions
    for position in range(5):
        tokens = random.integers(3, config.vocab_size, (2, 3))
        hidden, cache = decoder.step(cache, jnp.asarray(tokens), jnp.int32(position))
        lines = np.concatenate([lines, tokens[..., None]], axis=2)
        for hypothesis in range(3):
            inputs = np.pad(lines[:, hypothesis], ((0, 0), (0, 4 - position)))
            ids = np.ones_like(inputs)
            forced = model.decode(inputs, ids, encoded, source.encoder_segment_ids, positions=positions)
            np.testing.assert_allclose(decoder.logits(hidden)[:, hypothesis], forced[:, position], rtol=0, atol=3e-5)
        parents = random.integers(0, 3, (2, 3))
        cache, lines = cache.follow(jnp.asarray(parents)), np.take_along_axis(lines, parents[..., None], axis=1)


def test_dropout_depends_on_the_row_not_on_its_place_in_the_batch(config, parameters):
    batch = make_rows([[(6, 4)], [(5, 4)], [(7, 4)]], 8, 4)
    turned = jax.tree.map(lambda field: field[::-1], batch)
    model = bind(config, parameters)
    straight = model(batch, dropout_seed=5)
    np.testing.assert_allclose(model(turned, dropout_seed=5)[::-1], straight, rtol=0, atol=2e-5)
    assert np.abs(straight - model(batch, dropout_seed=6)).max() > 0.1
    assert np.abs(straight - model(batch)).max() > 0.1


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("small", 95_262_080), ("base", 275_029_248), ("large", 819_751_936), ("xl", 2_922_960_896)],
)
def test_presets_have_exactly_their_parameters(name, wanted):
    assert count_parameters(preset(name).model) == wanted


def test_flops_of_t5_base():
    base = dataclasses.replace(preset("base").model, vocab_size=32_128)
    assert training_flops_per_row(base, 512, 114) == pytest.approx(0.425e12, rel=1e-3)


@pytest.mark.parametrize("name", PRESETS)
def test_every_parameter_has_axes_and_every_axis_a_rule(name):
    for spec in declare_parameters(preset(name).model).values():
        assert len(spec.axes) == len(spec.shape)
        assert set(spec.contracted) <= set(spec.axes)
        assert {logical_axis(axis) for axis in spec.axes} <= set(LOGICAL_AXES) <= RULES.keys()


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2)])
def test_supported_meshes_divide_every_preset(name, sizes):
    param_shardings(declare_parameters(preset(name).model), make_mesh(MeshConfig(*sizes)))


def test_six_heads_do_not_split_by_eight():
    with pytest.raises(UsageError, match=r"num_heads=6 does not divide over mesh tensor=8.*among 1, 2, 3, 6"):
        param_shardings(declare_parameters(preset("small").model), make_mesh(MeshConfig(1, 1, 8)))


def test_initial_spread_is_the_declared_one():
    for name, value in jax.jit(lambda: init_parameters(preset("tiny").model, 0))().items():
        spec = declare_parameters(preset("tiny").model)[name]
        if spec.gain:
            assert (value == 1).all()
        else:
            assert float(value.std()) == pytest.approx(spec.init_std, rel=8 / math.sqrt(value.size))


def test_buckets_are_exact_near_and_logarithmic_far():
    distance = jnp.arange(-200, 201)
    both = relative_position_bucket(distance, bidirectional=True, num_buckets=32, max_distance=128)
    back = relative_position_bucket(distance, bidirectional=False, num_buckets=32, max_distance=128)
    at = {int(d): (int(b), int(u)) for d, b, u in zip(distance, both, back)}
    # t5-pegasus facts: half the buckets of a direction are exact, the last one is shared from max_distance on.
    assert [at[-n][0] for n in range(9)] == list(range(9))
    assert [at[n][0] for n in range(1, 8)] == [16 + n for n in range(1, 8)]
    assert [at[-n][1] for n in range(17)] == list(range(17))
    assert {at[n][1] for n in range(201)} == {0}
    assert at[-128] == at[-200] == (15, 31)
    assert at[128][0] == 31
    assert at[-16] == (8 + int(math.log(16 / 8) / math.log(128 / 8) * 8), 16)
