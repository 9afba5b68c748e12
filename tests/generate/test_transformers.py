"""transformers' `generate` writes the same ids with the same scores, in all modes, on random models."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_finalisation import CONFIG, draw_parameters

from t5pegasus.config import NUMERICS
from t5pegasus.convert.hf_config import model_to_hf_config
from t5pegasus.convert.hf_tensors import parameters_to_hf
from t5pegasus.generate.options import GenerationOptions
from t5pegasus.generate.search import generate
from t5pegasus.generate.sequential import restrict_logits
from t5pegasus.json_files import write_json

pytestmark = pytest.mark.peers

MODEL = dataclasses.replace(CONFIG, vocab_size=90, num_encoder_layers=2)
SEEDS = (0, 1, 2, 5, 9)
LENGTHS = (9, 4, 1, 7, 8, 6)
EARLY_STOPPING = {"huggingface": False, "huggingface-early": True, "huggingface-never": "never"}
BEAMS = [
    {"finalisation": name, "length_penalty": penalty} for name in EARLY_STOPPING for penalty in (0.0, 1.0, 2.0, -0.7)
]
RESTRICTED = [
    {"min_new_tokens": 5, "finalisation": "huggingface"},
    {"no_repeat_ngram_size": 1, "finalisation": "huggingface"},
    {"no_repeat_ngram_size": 2, "finalisation": "huggingface-early"},
    {"no_repeat_ngram_size": 3, "min_new_tokens": 7, "finalisation": "huggingface-never", "length_penalty": 1.5},
]
PREFIX = np.array([[7, 9, 7]] * 3 + [[12, 3, 60]] * 3, np.int32)


@pytest.fixture(scope="module", autouse=True)
def peers():
    pytest.importorskip("torch")
    pytest.importorskip("transformers").utils.logging.set_verbosity_error()


@pytest.fixture(scope="module")
def sources():
    random = np.random.default_rng(1)
    segments = (np.arange(9) < np.array(LENGTHS)[:, None]).astype(np.int32)
    return (random.integers(3, MODEL.vocab_size, segments.shape) * segments).astype(np.int32), segments


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Our parameters and transformers' model of the same weights, for several draws."""
    return [make_pair(MODEL, seed, tmp_path_factory.mktemp("hf")) for seed in SEEDS]


def make_pair(config, seed: int, folder: Path):
    from safetensors.numpy import save_file
    from transformers import AutoModelForSeq2SeqLM

    parameters = draw_parameters(config, seed)
    save_file(parameters_to_hf(parameters, config), folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", model_to_hf_config(config))
    return parameters, AutoModelForSeq2SeqLM.from_pretrained(folder, local_files_only=True).eval()


def write_with_transformers(model, sources, options: GenerationOptions, prefix=None):
    """Tokens [B, K, T] without the start token, and scores [B, K] of beam search."""
    import torch

    extra = {}
    if prefix is not None:
        start = np.full((len(prefix), 1), model.config.decoder_start_token_id)
        extra["decoder_input_ids"] = torch.tensor(np.concatenate([start, prefix], axis=1), dtype=torch.long)
    if options.num_beams > 1:
        extra["early_stopping"] = EARLY_STOPPING[options.finalisation]
        extra["length_penalty"] = options.length_penalty
    ids, mask = (torch.tensor(array, dtype=torch.long) for array in sources)
    with torch.inference_mode():
        written = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            num_beams=options.num_beams,
            num_return_sequences=options.num_beams,
            max_new_tokens=options.max_new_tokens,
            min_new_tokens=options.min_new_tokens or None,
            no_repeat_ngram_size=options.no_repeat_ngram_size or None,
            return_dict_in_generate=True,
            output_scores=True,
            **extra,
        )
    shape = (len(ids), options.num_beams)
    scores = written.sequences_scores.numpy().reshape(shape) if options.num_beams > 1 else None
    return written.sequences[:, 1:].numpy().reshape(*shape, -1), scores


def check(config, parameters, model, sources, options: GenerationOptions, prefix=None):
    rows = np.arange(len(LENGTHS), dtype=np.uint32)
    ours = generate(config, parameters, *sources, rows, options, prefix_tokens=prefix)
    theirs, scores = write_with_transformers(model, sources, options, prefix)
    width, lengths = theirs.shape[-1], np.asarray(ours.lengths)
    assert lengths.max() == width
    # Behind its end a row is filled, by theirs in beam search with the end token where the pad id is 0.
    written = np.arange(width) < lengths[..., None]
    assert np.array_equal(np.where(written, ours.tokens[..., :width], 0), np.where(written, theirs, 0))
    assert np.isin(theirs[~written], (config.pad_token_id, config.eos_token_id)).all()
    if scores is not None:
        np.testing.assert_allclose(ours.scores, scores, rtol=2e-5, atol=1e-5)
    return lengths


def describe(fields) -> str:
    return " ".join(f"{name}={value}" for name, value in fields.items())


@pytest.mark.parametrize("fields", [*BEAMS, *RESTRICTED], ids=describe)
def test_beam_search(pairs, sources, fields):
    # All hypotheses with their scores, not the best only.
    options = GenerationOptions(10, num_beams=4, **fields)
    lengths = [check(MODEL, parameters, model, sources, options) for parameters, model in pairs]
    if options.length_penalty < 2:  # which makes the longest the best
        assert len(np.unique(lengths)) > 2, "the test wants hypotheses that end at different steps"


@pytest.mark.parametrize("fields", [{}, {"min_new_tokens": 6}, {"no_repeat_ngram_size": 2}], ids=describe)
def test_greedy_search(pairs, sources, fields):
    for parameters, model in pairs:
        check(MODEL, parameters, model, sources, GenerationOptions(10, **fields))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_forced_prefix(pairs, sources, num_beams):
    fields = {"finalisation": "huggingface", "length_penalty": 1.3} if num_beams > 1 else {}
    options = GenerationOptions(8, num_beams=num_beams, no_repeat_ngram_size=2, min_new_tokens=3, **fields)
    for parameters, model in pairs:
        check(MODEL, parameters, model, sources, options, PREFIX)


@pytest.mark.parametrize("num_beams", [1, 4])
def test_the_original_t5(sources, tmp_path, num_beams):
    config = dataclasses.replace(MODEL, **NUMERICS["t5-1.0"])
    parameters, model = make_pair(config, 4, tmp_path)
    fields = {"finalisation": "huggingface"} if num_beams > 1 else {}
    check(config, parameters, model, sources, GenerationOptions(10, num_beams=num_beams, **fields))


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (7, 1.0), (0, 0.6), (0, 0.95), (25, 0.8), (200, 0.3)])
def test_sampling_is_restricted_alike(temperature, top_k, top_p):
    # The random numbers differ, so what is drawn from is compared.
    import torch
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    logits = np.random.default_rng(6).normal(0, 2, (16, 120)).astype(np.float32)
    theirs = torch.softmax(warpers(None, torch.tensor(logits)), dim=-1).numpy()
    options = GenerationOptions(temperature=temperature, top_k=top_k, top_p=top_p)
    ours = jax.nn.softmax(restrict_logits(jnp.asarray(logits), options), axis=-1)
    assert np.array_equal(ours > 0, theirs > 0)
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-8)
