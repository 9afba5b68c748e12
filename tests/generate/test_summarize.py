import dataclasses
import math

import jax
import numpy as np
import pytest

from t5pegasus.config import MeshConfig, ModelConfig
from t5pegasus.errors import UsageError
from t5pegasus.generate.options import GenerationOptions
from t5pegasus.generate.search import generate
from t5pegasus.generate.summarize import Summarizer, Summary
from t5pegasus.model.t5 import declare_parameters, init_parameters
from t5pegasus.sharding import make_mesh, param_shardings, place_rows
from t5pegasus.text.tokenizer.wordpiece import WordpieceTokenizer

TEXTS = [
    "新图书馆今天开馆。",
    "",
    "地铁三号线东延段昨天清晨开始试运行，首班列车从柳桥站驶出。" * 3,
    "果园里的苹果熟了。",
    "  \n",
    "研究人员提出一种新方法。" * 12,
    "果园里的苹果熟了。",
]
TOKENIZER = WordpieceTokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted(set("".join(TEXTS)) - {" ", "\n"})])
MODEL = ModelConfig(
    vocab_size=TOKENIZER.vocab_size, d_model=16, d_kv=4, d_ff=24, num_heads=2, num_encoder_layers=1,
    num_decoder_layers=1, dropout_rate=0.0, decoder_start_token_id=2, eos_token_id=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def parameters():
    drawn = jax.jit(init_parameters, static_argnums=0)(MODEL, 1)
    return drawn | {"lm_head": 3 * drawn["lm_head"]}


def make_summarizer(parameters, batch_size=4, **options):
    return Summarizer(
        MODEL, parameters, TOKENIZER, GenerationOptions(8, **options), 128, "float32", batch_size=batch_size
    )


def test_summaries_come_in_the_order_of_the_texts(parameters):
    summarizer = make_summarizer(parameters)
    summaries = summarizer.summarize(TEXTS)
    order = [5, 0, 6, 3, 2, 4, 1]
    shuffled = summarizer.summarize([TEXTS[index] for index in order])
    for place, index in enumerate(order):
        assert shuffled[place].text == summaries[index].text
        assert shuffled[place].score == pytest.approx(summaries[index].score, rel=1e-4)
    assert summaries[3].text == summaries[6].text
    assert len({summary.text for summary in summaries}) > 2, "the test wants different summaries"


@pytest.mark.parametrize(
    ("sizes", "options"),
    [((1, 1, 1), {}), ((2, 2, 2), {}), pytest.param((1, 4, 2), {"num_beams": 3}, marks=pytest.mark.slow)],
    ids=["one device", "all axes", "beam"],
)
def test_a_mesh_writes_what_one_device_writes(parameters, sizes, options):
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])
    split = jax.device_put(parameters, param_shardings(declare_parameters(MODEL), mesh))
    ours = make_summarizer(split, batch_size=3, **options).summarize(TEXTS)
    theirs = make_summarizer(parameters, batch_size=3, **options).summarize(TEXTS)
    for one, other in zip(ours, theirs, strict=True):
        assert (one.text, one.num_tokens) == (other.text, other.num_tokens)
        assert one.score == pytest.approx(other.score, rel=1e-4)


def test_no_device_of_a_mesh_ever_holds_all_weights():
    model = dataclasses.replace(MODEL, vocab_size=128, d_model=128, d_ff=256, num_decoder_layers=6)
    mesh = make_mesh(MeshConfig(1, 8, 1))
    specs = declare_parameters(model)
    shardings = param_shardings(specs, mesh)
    abstract = {
        name: jax.ShapeDtypeStruct(spec.shape, np.float32, sharding=shardings[name]) for name, spec in specs.items()
    }
    tokens, rows = (place_rows(np.zeros(shape, np.int32), mesh) for shape in ((8, 16), (8,)))
    with jax.set_mesh(mesh):
        options = GenerationOptions(8)
        program = generate.lower(model, abstract, tokens, tokens, rows.astype(np.uint32), options).compile()
    memory = program.memory_analysis()
    own = sum(4 * math.prod(shardings[name].shard_shape(spec.shape)) for name, spec in specs.items())
    assert memory.argument_size_in_bytes == pytest.approx(own, rel=0.01)
    assert memory.temp_size_in_bytes < 8 * own / 2, "beside its layers one by one, and one whole layer of the encoder"


def test_an_empty_text_has_an_empty_summary(parameters):
    summaries = make_summarizer(parameters).summarize(TEXTS)
    assert summaries[1] == summaries[4] == Summary("", 0.0, 0)
    assert make_summarizer(parameters).summarize([]) == []


def test_sampling_depends_on_the_index_of_a_text_not_on_its_batch(parameters):
    sampling = make_summarizer(parameters, temperature=1.2, seed=3)
    together = [summary.text for summary in sampling.summarize(TEXTS)]
    portions = [summary.text for first in (0, 4) for summary in sampling.summarize(TEXTS[first : first + 4], first)]
    assert portions == together
    assert together[3] != together[6]


def test_many_lengths_need_few_programs(parameters):
    summarizer = make_summarizer(parameters, batch_size=4, num_beams=2)
    before = generate._cache_size()
    lengths = np.random.default_rng(0).integers(1, 200, size=40)
    texts = ["苹" * int(length) for length in lengths]
    assert len(summarizer.summarize(texts)) == 40
    assert generate._cache_size() - before == 2  # 64 and 128 wide


@pytest.mark.parametrize("options", [{"num_beams": 4}, {"temperature": 1.5, "seed": 2}], ids=["beam", "sampling"])
def test_candidates_are_distinct_best_first_and_the_first_is_the_summary(parameters, options):
    summarizer = make_summarizer(parameters, num_return=3, **options)
    candidates = summarizer.summarize_n_best(TEXTS)
    assert [found[0] for found in candidates] == summarizer.summarize(TEXTS)
    for text, found in zip(TEXTS, candidates):
        if not text.strip():
            assert found == [Summary("", 0.0, 0)]
            continue
        assert 1 <= len(found) <= 3
        assert len({summary.text for summary in found}) == len(found)
        assert [summary.score for summary in found] == sorted((summary.score for summary in found), reverse=True)
    assert max(map(len, candidates)) == 3


def test_a_prefix_begins_every_summary(parameters):
    summarizer = dataclasses.replace(make_summarizer(parameters, num_beams=3), prefix="地铁")
    free = make_summarizer(parameters, num_beams=3).summarize(TEXTS)
    summaries = summarizer.summarize(TEXTS)
    assert all(summary.text.startswith("地铁") for summary, text in zip(summaries, TEXTS) if text.strip())
    assert not all(summary.text.startswith("地铁") for summary in free)
    assert summaries[1] == Summary("", 0.0, 0)
    with pytest.raises(UsageError, match="prefix='龘'"):
        dataclasses.replace(summarizer, prefix="龘")
    last = summarizer.tokenizer.token(summarizer.model.vocab_size - 1)
    masked = dataclasses.replace(summarizer.model, num_masked_tokens=1)
    with pytest.raises(UsageError, match=f"prefix='{last}' holds '{last}', one of the last num_masked_tokens=1 of"):
        dataclasses.replace(summarizer, prefix=last, model=masked)


def test_longer_texts_than_the_model_was_trained_on_are_read_whole_if_asked(parameters):
    text = "研究人员提出一种新方法。" * 20
    summarizer = make_summarizer(parameters)
    assert summarizer.summarize([text]) == summarizer.summarize([text[:200]])
    longer = dataclasses.replace(summarizer, max_source_tokens=512)
    assert longer.summarize([text])[0].score != longer.summarize([text[:200]])[0].score
    with pytest.raises(UsageError, match="max_source_tokens=1"):
        dataclasses.replace(summarizer, max_source_tokens=1)


@pytest.mark.parametrize("fields", [{}, {"temperature": 1.0}, {"num_beams": 2}], ids=["greedy", "sampling", "beam"])
def test_impossible_demands_are_named(parameters, fields):
    summarizer = make_summarizer(parameters)
    demanding = GenerationOptions(80, min_new_tokens=80, no_repeat_ngram_size=1, **fields)
    assert MODEL.vocab_size < 80
    with pytest.raises(UsageError, match="min_new_tokens=80 and no_repeat_ngram_size=1"):
        dataclasses.replace(summarizer, options=demanding).summarize(["苹果"])
