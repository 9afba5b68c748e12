"""Tokenizers on real text: golden ids of other programs, and what decoding gives back."""

import json
from collections import Counter
from itertools import islice

import pytest
import sentencepiece

from t5pegasus.text.clean import clean_documents
from t5pegasus.text.read import read_documents
from t5pegasus.text.tokenizer import adopt_vocabulary
from t5pegasus.text.tokenizer.training import train_sentencepiece
from t5pegasus.text.tokenizer.wordpiece import normalise

VOCABULARIES = {
    "t5_pegasus": ("t5_pegasus_vocab_50000.txt", True),
    "bert_zh": ("bert_google_zh_vocab_21128.txt", False),
}
MODELS = {  # size; ids of pad, unknown, end
    "uer_cluecorpussmall_spm.model": (100_000, 0, 1, 3),
    "pegasus_sp_test.model": (8_000, 0, 2, 1),
    "seqio_test_sentencepiece.model": (26, 0, 2, 1),
}


@pytest.fixture(scope="module")
def golden(shared_data):
    lines = (shared_data / "refs" / "tokenizer_golden.jsonl").read_text(encoding="utf-8").split("\n")
    cases = [json.loads(line) for line in lines if line]
    assert len(cases) == 150
    return cases


@pytest.fixture(scope="module")
def documents(shared_data):
    read = read_documents([shared_data / "pretrain_zh_small.jsonl.gz"])
    return list(islice(clean_documents(read, Counter()), 400))


def load(shared_data, column):
    name, dictionary = VOCABULARIES[column]
    return adopt_vocabulary(shared_data / "vocab" / name, dictionary=dictionary)


@pytest.mark.parametrize("column", VOCABULARIES)
def test_every_golden_case_of_bert4keras(shared_data, golden, column):
    tokenizer = load(shared_data, column)
    for case in golden:
        assert tokenizer.encode(case["text"]) == case[column]["bert4keras"], case["text"]


@pytest.mark.parametrize("column", VOCABULARIES)
def test_hugging_face_differs_where_its_rules_do_and_nowhere_else(shared_data, golden, column):
    tokenizer = load(shared_data, column)
    for case in golden:
        assert (tokenizer.encode(case["text"]) == case[column]["hf"]) == case[column]["agree"], case["text"]


@pytest.mark.parametrize("column", VOCABULARIES)
def test_wordpiece_decodes_real_text_to_its_normalised_form_up_to_white_space(shared_data, documents, column):
    tokenizer = load(shared_data, column)
    lines = [line for document in documents for line in document.text.split("\n")]
    num_compared = 0
    for line in lines:
        ids = tokenizer.encode(line)
        if tokenizer.unk_id not in ids:
            assert "".join(tokenizer.decode(ids).split()) == "".join(normalise(line).split())
            num_compared += 1
    assert num_compared > 0.85 * len(lines)


@pytest.mark.parametrize("name", MODELS)
def test_sentencepiece_models_give_the_ids_of_the_library(shared_data, golden, name):
    path = shared_data / "vocab" / name
    tokenizer = adopt_vocabulary(path)
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.unk_id, tokenizer.end_id) == MODELS[name]
    assert tokenizer.start_id == tokenizer.pad_id
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for case in golden:
        ids = library.encode(case["text"])
        assert tokenizer.encode(case["text"]) == ids
        assert tokenizer.encode_source(case["text"], 20) == [*ids[:19], tokenizer.end_id]


@pytest.mark.parametrize("name", [name for name, facts in MODELS.items() if facts[0] > 26])
def test_sentencepiece_decodes_real_text_to_its_normalised_form(shared_data, documents, name):
    path = shared_data / "vocab" / name
    tokenizer = adopt_vocabulary(path)
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    lines = [line for document in documents for line in document.text.split("\n")]
    num_compared = 0
    for line in lines:
        ids = tokenizer.encode(line)
        if tokenizer.unk_id not in ids:
            assert tokenizer.decode(ids) == library.normalize(line).replace("▁", " ").strip(" ")
            num_compared += 1
    assert num_compared > 0.95 * len(lines)


def test_a_trained_sentencepiece_model_gives_real_text_back_as_it_is(documents):
    tokenizer = train_sentencepiece(documents[:40], 5000)
    for document in documents[:200]:
        ids = tokenizer.encode(document.text)
        assert tokenizer.unk_id not in ids
        assert tokenizer.decode(ids) == document.text.replace("▁", " ")
