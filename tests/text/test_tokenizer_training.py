import io
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from t5pegasus.errors import ArtifactError, DataError, UsageError
from t5pegasus.text.read import Document
from t5pegasus.text.tokenizer import adopt_vocabulary, load_tokenizer, training
from t5pegasus.text.tokenizer.sentencepiece import SentencepieceTokenizer
from t5pegasus.text.tokenizer.training import (
    SPECIALS,
    list_common_characters,
    measure_coverage,
    train_sentencepiece,
    train_wordpiece,
)

PARTS = ["模型训练", "数据处理", "摘要生成", "语言理解", "城市交通", "天气预报", "历史研究", "科学实验", "经济发展"]
DOCUMENTS = [
    Document(
        str(i),
        "。".join(f"{PARTS[(i + j) % 9]}需要{PARTS[(i * j) % 9]}，network{j}与training并行" for j in range(8)) + "。龘",
        title=f"关于{PARTS[i % 9]}的报告",
    )
    for i in range(30)
]
WORDPIECE = train_wordpiece(DOCUMENTS, 4030)
SENTENCEPIECE = train_sentencepiece(DOCUMENTS, 340)
TRAINERS = pytest.mark.parametrize(
    ("train", "vocab_size"), [(train_wordpiece, 4030), (train_sentencepiece, 340)], ids=["wordpiece", "sentencepiece"]
)
TOKENIZERS = pytest.mark.parametrize("tokenizer", [WORDPIECE, SENTENCEPIECE], ids=["wordpiece", "sentencepiece"])


def vocabulary(tokenizer, path):
    tokenizer.save(path)
    return (path / "vocab.txt").read_text(encoding="utf-8").split("\n")[:-1]


def test_the_alphabet_is_fixed_and_without_repetition():
    characters = list_common_characters()
    assert len(set(characters)) == len(characters)
    assert (characters[0], characters[3754]) == ("啊", "座")
    assert {*"，。：；！？（）“”az09+"} <= set(characters)
    assert not any(character.isupper() or character.isspace() for character in characters)


def test_a_trained_vocabulary_has_the_layout_of_the_released_one(tmp_path):
    tokens = vocabulary(WORDPIECE, tmp_path / "tokenizer")
    assert len(tokens) == len(set(tokens)) == WORDPIECE.vocab_size == 4030
    assert tuple(tokens[:106]) == SPECIALS
    words = [token for token in tokens[106:] if not token.startswith("##")]
    pieces = [token for token in tokens[106:] if token.startswith("##")]
    assert tokens[106:] == words + pieces
    assert words == sorted(words, key=lambda token: (len(token), token))
    assert {*list_common_characters(), "龘", "训练", "training"} <= set(words)
    assert {f"##{character}" for character in "abcxyz019"} <= set(pieces)


@TRAINERS
def test_the_same_documents_give_the_same_bytes_also_in_another_process(train, vocab_size, tmp_path):
    here = train(iter(DOCUMENTS), vocab_size).fingerprint
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": d.text, "title": d.title}) + "\n" for d in DOCUMENTS), encoding="utf-8"
    )
    code = (
        f"from t5pegasus.text.tokenizer.training import {train.__name__} as train\n"
        "from t5pegasus.text.read import read_documents\n"
        f"print(train(read_documents([{str(tmp_path / 'a.jsonl')!r}]), {vocab_size}).fingerprint)"
    )
    environment = {"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)}
    there = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert here == there
    assert here != train([*DOCUMENTS, replace(DOCUMENTS[0], text="另一篇文章。" * 20)], vocab_size).fingerprint


def test_wordpiece_sizes_that_cannot_be_reached_name_the_bound_that_can():
    with pytest.raises(UsageError, match=r"vocab_size=500 is too small: .* alone are \d+ entries") as small:
        train_wordpiece(DOCUMENTS, 500)
    with pytest.raises(DataError, match="no text"):  # which no size would mend
        train_wordpiece([], 500)
    smallest = int(str(small.value).split()[-3])
    assert train_wordpiece(DOCUMENTS, smallest).vocab_size == smallest
    with pytest.raises(UsageError, match="vocab_size=90000 cannot be filled") as large:
        train_wordpiece(DOCUMENTS, 90000)
    largest = int(str(large.value).split()[-3])
    assert train_wordpiece(DOCUMENTS, largest).vocab_size == largest
    with pytest.raises(UsageError):
        train_wordpiece(DOCUMENTS, largest + 1)


def test_sentencepiece_sizes_that_cannot_be_reached_name_the_bound():
    with pytest.raises(UsageError, match=r"vocab_size=100 is too small: .* alone are \d+ entries"):
        train_sentencepiece(DOCUMENTS, 100)
    with pytest.raises(UsageError, match=r"vocab_size=90000 is too large: the documents give \d+ entries at most"):
        train_sentencepiece(DOCUMENTS, 90000)


@pytest.mark.parametrize("train", [train_wordpiece, train_sentencepiece])
def test_no_text_and_a_reader_that_fails_are_reported_as_they_are(train):
    with pytest.raises(DataError, match="no text"):
        train([], 5000)

    def failing():
        yield DOCUMENTS[0]
        raise UsageError("input a.gz is cut off")

    with pytest.raises(UsageError, match=r"a\.gz is cut off"):
        train(failing(), 5000)


def test_sentencepiece_has_the_specials_of_mt5():
    assert (SENTENCEPIECE.pad_id, SENTENCEPIECE.end_id, SENTENCEPIECE.unk_id, SENTENCEPIECE.start_id) == (0, 1, 2, 0)
    ids = SENTENCEPIECE.encode("模型训练")
    assert SENTENCEPIECE.encode_source("模型训练", 99) == [*ids, 1] == SENTENCEPIECE.encode_target("模型训练", 99)
    assert SENTENCEPIECE.encode_target("模型训练", 2) == [ids[0], 1]
    assert SENTENCEPIECE.decode([0, *ids, 1, 0]) == "模型训练"
    with pytest.raises(UsageError, match="max_target_tokens=0"):
        SENTENCEPIECE.encode_target("模型训练", 0)
    with pytest.raises(UsageError, match="id 340 is not in the vocabulary of 340"):
        SENTENCEPIECE.decode([340])


@given(st.text(st.one_of(st.sampled_from("模型，Ａ！３\nab 龘"), st.characters(exclude_categories=("C", "Z")))))
def test_sentencepiece_gives_any_clean_text_back_and_knows_every_character(text):
    text = " ".join(text.replace("▁", "").split(" ")).strip(" ")
    while "  " in text:
        text = text.replace("  ", " ")
    ids = SENTENCEPIECE.encode(text)
    assert SENTENCEPIECE.unk_id not in ids
    assert SENTENCEPIECE.decode(ids) == text


def test_memory_is_bounded_and_the_frequent_words_stay(monkeypatch, tmp_path):
    sizes = []

    def observed(words):
        sizes.append(len(words))
        return forget_rare(words)

    forget_rare = training._forget_rare
    monkeypatch.setattr(training, "_forget_rare", observed)
    monkeypatch.setattr(training, "MAX_COUNTED_WORDS", 300)
    rare = [Document(f"r{i}", " ".join(f"hash{i}x{j}" for j in range(60)) * 2) for i in range(50)]
    tokens = vocabulary(train_wordpiece([*DOCUMENTS, *rare, *DOCUMENTS], 4030), tmp_path / "tokenizer")
    assert sizes
    assert max(sizes) < 300 + 130  # the bound, and the words of one document
    assert {"训练", "training"} <= set(tokens)


def test_coverage_counts_unknown_characters():
    coverage = measure_coverage(WORDPIECE, [Document("1", "模型 训练😀龖", title="数据")])
    assert (coverage["num_characters"], coverage["num_unknown"]) == (8, 2)
    assert coverage["unknown_rate"] == 2 / coverage["num_tokens"]
    assert coverage["character_coverage"] == 6 / 8
    assert measure_coverage(SENTENCEPIECE, DOCUMENTS)["num_unknown"] == 0


@TOKENIZERS
def test_a_folder_gives_the_same_tokenizer_back(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer", made_by={"report": 1})
    loaded = load_tokenizer(tmp_path / "tokenizer")
    text = DOCUMENTS[3].text
    assert loaded.encode(text) == tokenizer.encode(text)
    for field in ("kind", "vocab_size", "pad_id", "unk_id", "start_id", "end_id", "fingerprint"):
        assert getattr(loaded, field) == getattr(tokenizer, field)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer"]
    with pytest.raises(UsageError, match="already in use"):
        tokenizer.save(tmp_path / "tokenizer")
    (file,) = set((tmp_path / "tokenizer").iterdir()) - {tmp_path / "tokenizer" / "tokenizer.json"}
    assert adopt_vocabulary(file).fingerprint == tokenizer.fingerprint


def test_folders_that_are_no_tokenizer_are_refused(tmp_path):
    path = tmp_path / "tokenizer"
    with pytest.raises(ArtifactError, match="no tokenizer folder"):
        load_tokenizer(path)
    WORDPIECE.save(path)
    with pytest.raises(ArtifactError, match="--from-vocabulary"):
        load_tokenizer(path / "vocab.txt")
    facts = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    for change, message in [
        ({"schema": 99}, "schema is 99, this version reads schema 1"),
        ({"kind": "characters"}, "kind 'characters' is unknown"),
        ({"fingerprint": "0"}, f"fingerprint of vocab.txt is {WORDPIECE.fingerprint}, tokenizer.json says 0"),
    ]:
        (path / "tokenizer.json").write_text(json.dumps(facts | change), encoding="utf-8")
        with pytest.raises(ArtifactError, match=message):
            load_tokenizer(path)
    (path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(ArtifactError, match="not valid JSON"):
        load_tokenizer(path)


def test_vocabulary_files_that_cannot_be_adopted_are_refused(tmp_path):
    (tmp_path / "spiece.model").write_bytes(b"not a model")
    for name, error, message in [
        ("spiece.model", ArtifactError, "is not a sentencepiece model"),
        ("missing.txt", ArtifactError, "does not exist"),
        ("missing.model", ArtifactError, "does not exist"),
        ("vocab.json", UsageError, r"must be a \*.txt"),
    ]:
        with pytest.raises(error, match=message):
            adopt_vocabulary(tmp_path / name)


def test_a_model_without_pad_is_refused():
    model = io.BytesIO()
    sentences = [document.text for document in DOCUMENTS]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, vocab_size=90, hard_vocab_limit=False, minloglevel=2
    )
    with pytest.raises(ArtifactError, match="spiece has no pad piece"):
        SentencepieceTokenizer(model.getvalue(), name="spiece")
