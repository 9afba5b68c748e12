"""Beam search in one compiled program finds what a search by definition finds, whatever the way it ends."""

import dataclasses
import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_search import search

from t5pegasus.config import NUMERICS, ModelConfig
from t5pegasus.generate.options import Finalisation, GenerationOptions
from t5pegasus.generate.search import generate
from t5pegasus.model.t5 import bind, init_parameters

CONFIG = ModelConfig(
    vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_heads=2, num_encoder_layers=1, num_decoder_layers=2,
    dropout_rate=0.0, decoder_start_token_id=1, eos_token_id=2,
)  # fmt: skip
NUM_BEAMS, LIMIT, SEEDS = 3, 8, (5, 9)
OTHER = {
    "negative penalty": {"length_penalty": -0.8},
    "penalty 2": {"length_penalty": 2.0},
    "restricted": {"min_new_tokens": 4, "no_repeat_ngram_size": 2},
    "no token twice": {"no_repeat_ngram_size": 1, "length_penalty": 0.0},
}
PREFIX = np.array([[7, 9], [12, 7], [4, 4], [30, 31]], np.int32)


@pytest.fixture(scope="module", params=SEEDS)
def parameters(request):
    return draw_parameters(CONFIG, request.param)


def draw_parameters(config, seed):
    """Hypotheses end at different steps."""
    drawn = jax.jit(init_parameters, static_argnums=0)(config, seed)
    drawn = {name: np.array(value) for name, value in drawn.items()}
    drawn["decoder.final_norm"] *= 1.2 * (
        config.d_model**0.5 if "lm_head" in drawn and config.scale_decoder_outputs else 1
    )
    if "lm_head" in drawn:
        drawn["lm_head"][:, config.eos_token_id] *= 2
    return drawn


def make_sources(lengths=(7, 3, 1, 6)):
    random = np.random.default_rng(1)
    segments = (np.arange(7) < np.array(lengths)[:, None]).astype(np.int32)
    tokens = random.integers(3, CONFIG.vocab_size, segments.shape) * segments
    return tokens.astype(np.int32), segments, np.arange(len(lengths), dtype=np.uint32)


def make_oracle(config, parameters, source, segments, before):
    """Log-probabilities after hypotheses, by teacher forcing; shapes are those of one program."""

    def log_probabilities(hypotheses):
        inputs = np.zeros((2 * NUM_BEAMS, len(before) + LIMIT), np.int32)
        for row, tokens in enumerate(hypotheses):
            inputs[row, : len(before) + len(tokens)] = [*before, *tokens]
        last = len(before) + len(hypotheses[0]) - 1
        return np.asarray(_decode(config, parameters, source, segments, inputs), np.float64)[: len(hypotheses), last]

    return log_probabilities


@functools.partial(jax.jit, static_argnums=0)
def _decode(config, parameters, source, segments, inputs):
    model = bind(config, parameters)
    repeated = [jnp.broadcast_to(array, (len(inputs), array.shape[1])) for array in (source, segments)]
    positions = jnp.arange(inputs.shape[1])[None], jnp.arange(source.shape[1])[None]
    logits = model.decode(inputs, jnp.ones_like(inputs), model.encode(*repeated), repeated[1], positions=positions)
    return jax.nn.log_softmax(logits)


def check(config, parameters, options, prefix=None):
    """All hypotheses and scores of every row; returns the lengths of the best."""
    tokens, segments, rows = make_sources()
    found = generate(config, parameters, tokens, segments, rows, options, prefix_tokens=prefix)
    assert found.tokens.shape[1] == (1 if options.finalisation == "bert4keras" else options.num_beams)
    given = np.zeros((len(rows), 0), np.int32) if prefix is None else prefix
    for row in range(len(rows)):
        before = [config.decoder_start_token_id, *given[row]]
        oracle = make_oracle(config, parameters, tokens[row : row + 1], segments[row : row + 1], before)
        wanted = search(oracle, before, config.eos_token_id, options)
        assert len(wanted) == found.tokens.shape[1]
        for place, (score, output) in enumerate(wanted):
            assert found.lengths[row, place] == given.shape[1] + len(output)
            assert found.tokens[row, place, : found.lengths[row, place]].tolist() == [*given[row], *output]
            assert not found.tokens[row, place, found.lengths[row, place] :].any()
            np.testing.assert_allclose(found.scores[row, place], score, rtol=1e-4, atol=1e-5)
    return np.asarray(found.lengths[:, 0])


@pytest.mark.parametrize("finalisation", get_args(Finalisation))
def test_every_finalisation_is_its_definition(parameters, finalisation):
    options = GenerationOptions(LIMIT, num_beams=NUM_BEAMS, length_penalty=1.5, finalisation=finalisation)
    check(CONFIG, parameters, options)


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.parametrize("finalisation", ["exact", "huggingface-never", "bert4keras"])
def test_with_other_penalties_and_restrictions(parameters, finalisation, name):
    options = GenerationOptions(LIMIT, num_beams=NUM_BEAMS, finalisation=finalisation, **OTHER[name])
    check(CONFIG, parameters, options)


@pytest.mark.parametrize("finalisation", ["exact", "huggingface", "bert4keras"])
def test_a_prefix_is_kept_and_counts_as_written_only_for_repetitions(parameters, finalisation):
    options = GenerationOptions(
        LIMIT, num_beams=NUM_BEAMS, finalisation=finalisation, no_repeat_ngram_size=2, min_new_tokens=2
    )
    check(CONFIG, parameters, options, PREFIX)


@pytest.mark.parametrize("numerics", NUMERICS)
def test_in_every_numerics(numerics):
    config = dataclasses.replace(CONFIG, **NUMERICS[numerics])
    options = GenerationOptions(LIMIT, num_beams=NUM_BEAMS)
    check(config, draw_parameters(config, 3), options, PREFIX)


def test_the_ways_to_end_differ_and_some_hypotheses_end_early(parameters):
    # Without this the tests above could compare five names of one search on hypotheses that all reach the limit.
    results = {}
    for name in get_args(Finalisation):
        options = GenerationOptions(LIMIT, num_beams=NUM_BEAMS, length_penalty=1.5, finalisation=name)
        found = generate(CONFIG, parameters, *make_sources(), options)
        results[name] = np.asarray(found.tokens).tolist()
        assert (found.lengths < LIMIT).any()
    assert len({str(outputs) for outputs in results.values()}) >= 4
