import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5pegasus.config import ModelConfig
from t5pegasus.errors import UsageError
from t5pegasus.generate.beam import search_beams
from t5pegasus.generate.candidates import take_likeliest
from t5pegasus.generate.options import GenerationOptions
from t5pegasus.generate.search import generate
from t5pegasus.generate.sequential import restrict_logits
from t5pegasus.model.decoding import CachedDecoder
from t5pegasus.model.t5 import bind, init_parameters

CONFIG = ModelConfig(
    vocab_size=11,
    d_model=16,
    d_kv=4,
    d_ff=24,
    num_heads=2,
    num_encoder_layers=2,
    num_decoder_layers=2,
    dropout_rate=0.0,
    pad_token_id=0,
    decoder_start_token_id=1,
    eos_token_id=2,
)
GREEDY = GenerationOptions(max_new_tokens=12)
SAMPLING = GenerationOptions(max_new_tokens=12, temperature=0.8, top_k=9, top_p=0.9, seed=4, length_penalty=0.0)
BEAM = GenerationOptions(max_new_tokens=12, num_beams=3, length_penalty=0.6)
LENGTHS = (9, 5, 1, 7, 3, 8)


@pytest.fixture(scope="module")
def parameters():
    # Sharper than at initialisation: rows end at different steps, and likely tokens are far apart.
    return sharpen(jax.jit(init_parameters, static_argnums=0)(CONFIG, 8))


def sharpen(parameters):
    return parameters | {"lm_head": 3 * parameters["lm_head"]}


def make_sources(lengths=LENGTHS, width=9, vocab_size=CONFIG.vocab_size):
    random = np.random.default_rng(0)
    segments = (np.arange(width) < np.array(lengths)[:, None]).astype(np.int32)
    tokens = random.integers(3, vocab_size, segments.shape) * segments
    return tokens.astype(np.int32), segments, np.arange(len(lengths), dtype=np.uint32)


def teacher_forced(config, parameters, sources, outputs):
    """Float32 logits [B, T, V] of these outputs without a cache."""
    inputs = np.concatenate([np.full((len(outputs), 1), config.decoder_start_token_id), outputs[:, :-1]], axis=1)
    return _decode(config, parameters, *sources[:2], inputs)


@functools.partial(jax.jit, static_argnums=0)
def _decode(config, parameters, tokens, segments, inputs):
    model = bind(config, parameters)
    positions = jnp.arange(inputs.shape[1])[None], jnp.arange(tokens.shape[1])[None]
    return model.decode(inputs, jnp.ones_like(inputs), model.encode(tokens, segments), segments, positions=positions)


def score_by_teacher_forcing(config, parameters, sources, outputs, lengths, length_penalty):
    """The scores [B] of outputs [B, T], from logits without a cache."""
    log_probabilities = jax.nn.log_softmax(teacher_forced(config, parameters, sources, outputs))
    taken = np.take_along_axis(np.asarray(log_probabilities), outputs[..., None], axis=-1)[..., 0]
    written = np.arange(outputs.shape[1]) < lengths[:, None]
    return np.where(written, taken, 0).sum(axis=1) / lengths**length_penalty


@pytest.mark.parametrize("options", [GREEDY, SAMPLING, BEAM], ids=["greedy", "sampling", "beam"])
def test_scores_are_those_of_teacher_forcing(parameters, options):
    # Also a test of the gather: with another hypothesis's keys in the cache a score would not be the output's own.
    sources = make_sources()
    generated = generate(CONFIG, parameters, *sources, options)
    for place in range(options.num_beams):
        outputs, lengths = np.asarray(generated.tokens)[:, place], np.asarray(generated.lengths)[:, place]
        expected = score_by_teacher_forcing(CONFIG, parameters, sources, outputs, lengths, options.length_penalty)
        np.testing.assert_allclose(generated.scores[:, place], expected, rtol=2e-5, atol=2e-5)
    assert (np.diff(generated.scores, axis=1) <= 0).all()


def test_greedy_takes_the_likeliest_token_at_every_step(parameters):
    sources = make_sources()
    generated = generate(CONFIG, parameters, *sources, GREEDY)
    outputs, lengths = np.asarray(generated.tokens)[:, 0], np.asarray(generated.lengths)[:, 0]
    likeliest = np.argmax(teacher_forced(CONFIG, parameters, sources, outputs), axis=-1)
    written = np.arange(12) < lengths[:, None]
    assert np.array_equal(outputs[written], likeliest[written])
    assert (outputs[~written] == CONFIG.pad_token_id).all()
    ended = lengths < 12
    assert ended.any()
    assert not ended.all(), "the test wants both kinds of rows"
    assert (outputs[ended, lengths[ended] - 1] == CONFIG.eos_token_id).all()


def test_one_beam_is_greedy(parameters):
    sources = make_sources()
    options = dataclasses.replace(GREEDY, length_penalty=0.0)

    @jax.jit
    def search_one_beam(parameters):
        model = bind(CONFIG, parameters)
        decoder = CachedDecoder.over(model, model.encode(*sources[:2]), sources[1] > 0)
        inputs = np.full((len(LENGTHS), 1), CONFIG.decoder_start_token_id)
        return search_beams(decoder, decoder.start(1, options.max_new_tokens), inputs, options)

    found, greedy = search_one_beam(parameters), generate(CONFIG, parameters, *sources, options)
    assert np.array_equal(found.tokens[..., 1:], greedy.tokens)
    assert np.array_equal(found.lengths, greedy.lengths)
    np.testing.assert_allclose(found.scores, greedy.scores, rtol=1e-5)


@pytest.mark.parametrize("length_penalty", [-0.5, 2.0])
def test_wide_beam_search_is_exhaustive(length_penalty):
    config = dataclasses.replace(CONFIG, vocab_size=5)
    parameters = sharpen(jax.jit(init_parameters, static_argnums=0)(config, 7))
    tokens, segments, row_ids = make_sources(lengths=(4, 6), width=6, vocab_size=5)
    max_new_tokens = 3
    complete = []
    for length in range(1, max_new_tokens + 1):
        ends = (config.eos_token_id,) if length < max_new_tokens else range(5)
        others = [token for token in range(5) if token != config.eos_token_id]
        complete += [(*start, last) for start in itertools.product(others, repeat=length - 1) for last in ends]
    assert len(complete) == 1 + 4 + 16 * 5
    padded = np.array([(*output, *(0,) * (max_new_tokens - len(output))) for output in complete])
    lengths = np.array([len(output) for output in complete])
    options = GenerationOptions(max_new_tokens, num_beams=len(complete), length_penalty=length_penalty)
    found = generate(config, parameters, tokens, segments, row_ids, options)
    for row in range(2):
        repeated = [np.repeat(array[row : row + 1], len(complete), axis=0) for array in (tokens, segments)]
        scores = score_by_teacher_forcing(config, parameters, repeated, padded, lengths, length_penalty)
        best = np.argsort(-scores, kind="stable")
        # All of them in order; equal up to rounding may change places, so outputs are compared where it matters.
        np.testing.assert_allclose(found.scores[row], scores[best], rtol=1e-4, atol=1e-5)
        assert np.array_equal(found.tokens[row, 0], padded[best[0]])
        assert {tuple(output) for output in np.asarray(found.tokens[row])} == {tuple(o) for o in padded}


@pytest.mark.parametrize(
    "options",
    [GREEDY, SAMPLING, BEAM, dataclasses.replace(BEAM, finalisation="huggingface-early"),
     dataclasses.replace(BEAM, finalisation="bert4keras")],
    ids=["greedy", "sampling", "beam", "huggingface-early", "bert4keras"],
)  # fmt: skip
def test_a_row_does_not_depend_on_its_batch(parameters, options):
    tokens, segments, row_ids = make_sources()
    together = generate(CONFIG, parameters, tokens, segments, row_ids, options)
    wider = [np.pad(array, ((0, 0), (0, 4))) for array in (tokens, segments)]
    for row in range(len(LENGTHS)):
        alone = generate(CONFIG, parameters, *(array[row : row + 1] for array in (*wider, row_ids)), options)
        assert np.array_equal(alone.tokens[0], together.tokens[row])
        np.testing.assert_allclose(alone.scores[0], together.scores[row], rtol=2e-5)


@pytest.mark.parametrize("options", [GREEDY, BEAM], ids=["greedy", "beam"])
def test_an_empty_row_writes_nothing(parameters, options):
    tokens, segments, row_ids = make_sources(lengths=(5, 0, 3, 4, 5, 6))
    generated = generate(CONFIG, parameters, tokens, segments, row_ids, options)
    assert not generated.tokens[1].any()
    assert not generated.lengths[1].any()
    assert not generated.scores[1].any()


def test_sampling_follows_the_seed_and_the_row(parameters):
    tokens, segments, row_ids = make_sources()
    tokens[:], segments[:] = tokens[0], segments[0]
    draw = functools.partial(generate, CONFIG, parameters, tokens, segments)
    first, again = draw(row_ids, SAMPLING), draw(row_ids, SAMPLING)
    assert np.array_equal(first.tokens, again.tokens)
    assert not np.array_equal(first.tokens[0], first.tokens[1])
    assert not np.array_equal(first.tokens, draw(row_ids, dataclasses.replace(SAMPLING, seed=5)).tokens)
    assert np.array_equal(first.tokens[0], draw(row_ids[::-1], SAMPLING).tokens[-1])


def test_restricted_logits_keep_the_likeliest_tokens():
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.05, 0.25, 0.2]]))

    def kept(**options):
        restricted = restrict_logits(logits, GenerationOptions(temperature=1.0, **options))
        return np.flatnonzero(np.isfinite(restricted[0])).tolist()

    assert kept() == [0, 1, 2, 3, 4]
    assert kept(top_k=2) == [1, 3]
    assert kept(top_k=9) == [0, 1, 2, 3, 4]
    assert kept(top_p=0.3) == [1]
    assert kept(top_p=0.6) == [1, 3]
    assert kept(top_p=0.7) == [1, 3, 4]
    assert kept(top_k=3, top_p=0.46) == [1]  # of the three the first has 0.4 / 0.85 = 0.47


def test_sampled_frequencies_are_the_probabilities(parameters):
    tokens, segments, _ = make_sources(lengths=(7,) * 1)
    num_rows = 4000
    repeated = [np.repeat(array, num_rows, axis=0) for array in (tokens, segments)]
    options = GenerationOptions(max_new_tokens=1, temperature=2.0, seed=9)
    drawn = generate(CONFIG, parameters, *repeated, np.arange(num_rows, dtype=np.uint32), options)
    counts = np.bincount(np.asarray(drawn.tokens).ravel(), minlength=CONFIG.vocab_size)
    logits = teacher_forced(CONFIG, parameters, (tokens, segments, None), np.zeros((1, 1), np.int32))
    expected = np.asarray(jax.nn.softmax(logits[0, 0] / 2.0))
    deviation = np.sqrt(expected * (1 - expected) / num_rows)
    assert (np.abs(counts / num_rows - expected) < 5 * deviation + 1e-4).all()


SHAPED = {
    "greedy": GenerationOptions(12, min_new_tokens=6, no_repeat_ngram_size=2),
    "sampling": GenerationOptions(12, min_new_tokens=6, no_repeat_ngram_size=2, temperature=1.2, seed=1, num_return=3),
    "beam": GenerationOptions(12, min_new_tokens=6, no_repeat_ngram_size=2, num_beams=4),
}


@pytest.mark.parametrize("name", SHAPED)
def test_outputs_have_their_prefix_their_length_and_no_ngram_twice(parameters, name):
    options, sources = SHAPED[name], make_sources()
    prefix = np.random.default_rng(2).integers(3, CONFIG.vocab_size, (len(LENGTHS), 2)).astype(np.int32)
    found = generate(CONFIG, parameters, *sources, options, prefix_tokens=prefix)
    free = generate(
        CONFIG, parameters, *sources, dataclasses.replace(options, no_repeat_ngram_size=0, min_new_tokens=0)
    )
    assert min(free.lengths.ravel()) < 6, "the test wants outputs that would be shorter"
    assert max(len(repeated_pairs(row)) for row in np.asarray(free.tokens[:, 0])) > 0, "and outputs that repeat"
    for row, hypotheses in enumerate(np.asarray(found.tokens)):
        assert (hypotheses[:, :2] == prefix[row]).all()
        for tokens, length in zip(hypotheses, np.asarray(found.lengths[row])):
            written = tokens[:length].tolist()
            assert 2 + 6 <= length <= 2 + 12
            assert CONFIG.eos_token_id not in written[: 2 + 6]
            assert not repeated_pairs([CONFIG.decoder_start_token_id, *written])
    assert (np.diff(found.scores, axis=1) <= 0).all()


def repeated_pairs(tokens):
    pairs = [pair for pair in itertools.pairwise(tokens) if CONFIG.pad_token_id not in pair]
    return [pair for pair in set(pairs) if pairs.count(pair) > 1]


@pytest.mark.parametrize("finalisation", ["exact", "huggingface"])
def test_hypotheses_of_beam_search_are_distinct(parameters, finalisation):
    options = GenerationOptions(12, num_beams=5, finalisation=finalisation)
    for hypotheses in np.asarray(generate(CONFIG, parameters, *make_sources(), options).tokens):
        assert len({tuple(tokens) for tokens in hypotheses}) == 5


def test_more_samples_leave_the_first_as_it_is(parameters):
    sources = make_sources()
    alone = generate(CONFIG, parameters, *sources, SAMPLING)
    several = generate(CONFIG, parameters, *sources, dataclasses.replace(SAMPLING, num_return=4))
    outputs = [{tuple(tokens) for tokens in row} for row in np.asarray(several.tokens).tolist()]
    assert all(tuple(first) in drawn for first, drawn in zip(np.asarray(alone.tokens[:, 0]).tolist(), outputs))
    assert max(map(len, outputs)) > 2
    assert (np.diff(several.scores, axis=1) <= 0).all()


@pytest.mark.parametrize("width", [3, 127, 1000, 5120])
@pytest.mark.parametrize("count", [1, 3])
def test_likeliest_tokens_are_those_of_top_k(width, count):
    random = np.random.default_rng(width)
    # Few different values, so that ties are everywhere; and a row in which most are forbidden.
    logits = random.integers(0, 40, (3, 2, width)).astype(np.float32)
    logits[0, 0, 2:] = -np.inf
    for got, wanted in zip(take_likeliest(jnp.asarray(logits), count), jax.lax.top_k(logits, count)):
        assert np.array_equal(got, wanted)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"num_beams": 0}, "num_beams=0"),
        ({"num_return": 0}, "num_return=0"),
        ({"num_return": 2}, "num_beams=2 or more"),
        ({"num_return": 5, "num_beams": 4}, "num_return=5"),
        ({"min_new_tokens": -1}, "min_new_tokens=-1"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "max_new_tokens=8"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size=-1"),
        ({"finalisation": "first"}, "finalisation='first'"),
        ({"finalisation": "huggingface", "temperature": 1.0}, "temperature=1.0"),
        ({"finalisation": "bert4keras", "num_beams": 3, "num_return": 2}, "num_return=2"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0"),
        ({"top_k": 5}, "temperature=0"),
        ({"temperature": 1.0, "num_beams": 4}, "num_beams=4"),
        ({"length_penalty": float("inf")}, "length_penalty=inf"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_impossible_options_are_refused_by_name(fields, named):
    with pytest.raises(UsageError, match=named):
        GenerationOptions(**fields)
