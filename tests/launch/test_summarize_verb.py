"""`summarize`: its flags reach the search, and its lines are what pipelines read."""

import json

import jax
import pytest

from launch.verbs.summarize import main
from t5pegasus.config import ModelConfig
from t5pegasus.convert.imported import Imported, save_imported
from t5pegasus.errors import UsageError
from t5pegasus.model.t5 import init_parameters
from t5pegasus.text.tokenizer.wordpiece import WordpieceTokenizer

TEXTS = ("果园里的苹果熟了。", "地铁三号线清晨开始试运行。")
TOKENIZER = WordpieceTokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted(set("".join(TEXTS)))])
MODEL = ModelConfig(
    vocab_size=TOKENIZER.vocab_size, d_model=16, d_kv=4, d_ff=24, num_heads=2, num_encoder_layers=1,
    num_decoder_layers=1, dropout_rate=0.0, decoder_start_token_id=2, eos_token_id=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    drawn = jax.jit(init_parameters, static_argnums=0)(MODEL, 1)
    return save_imported(Imported(MODEL, drawn, TOKENIZER), tmp_path_factory.mktemp("model") / "checkpoint")


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    path = tmp_path_factory.mktemp("documents") / "texts.jsonl"
    lines = [json.dumps({"id": str(number), "text": text}) for number, text in enumerate((*TEXTS, ""))]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def summarize(checkpoint, documents, capsys, *flags):
    main([str(checkpoint), "--input", str(documents), "--max-new-tokens", "7", *flags])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_candidates_come_where_they_are_asked_for(checkpoint, documents, capsys):
    beams = ("--num-beams", "4", "--finalisation", "huggingface", "--min-new-tokens", "2")
    plain = summarize(checkpoint, documents, capsys, *beams)
    assert [record.keys() for record in plain] == [{"id", "summary"}] * 3
    for record, candidates in zip(plain, summarize(checkpoint, documents, capsys, *beams, "--num-return", "3")):
        assert candidates.keys() == {"id", "summary", "candidates"}
        assert candidates["summary"] == record["summary"] == candidates["candidates"][0]["summary"]
        scores = [candidate["score"] for candidate in candidates["candidates"]]
        assert scores == sorted(scores, reverse=True)
        assert len(scores) == (1 if record["id"] == "2" else 3)


def test_prefix_and_repetitions_and_length_of_the_source(checkpoint, documents, capsys):
    shaped = ("--prefix", "苹果", "--no-repeat-ngram-size", "1", "--max-source-tokens", "4096")
    for record in summarize(checkpoint, documents, capsys, *shaped)[:2]:
        assert record["summary"].startswith("苹果")
        assert len(set(record["summary"])) == len(record["summary"])


def test_contradicting_flags_are_refused_before_anything_is_written(checkpoint, documents, capsys):
    with pytest.raises(UsageError, match="num_return=3 outputs were wanted of num_beams=2"):
        summarize(checkpoint, documents, capsys, "--num-beams", "2", "--num-return", "3")
    assert not capsys.readouterr().out
