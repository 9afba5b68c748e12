"""Laws of a vocabulary with further tokens: old ids stay, texts without the new tokens read as before."""

import io
import json
from itertools import islice

import pytest
import rjieba
import sentencepiece
from hypothesis import assume, given
from hypothesis import strategies as st

from t5pegasus.errors import UsageError
from t5pegasus.text.read import read_documents
from t5pegasus.text.tokenizer import adopt_vocabulary, load_tokenizer
from t5pegasus.text.tokenizer.added_tokens import add_tokens, read_tokens, refuse_tokens
from t5pegasus.text.tokenizer.sentencepiece import SentencepieceTokenizer
from t5pegasus.text.tokenizer.training import SPECIALS, list_common_characters
from t5pegasus.text.tokenizer.wordpiece import WordpieceTokenizer, normalise

PIECES = [f"##{character}" for character in "abcdefghijklmnopqrstuvwxyz0123456789"]
VOCABULARY = [*SPECIALS, *list_common_characters(), "今天", "天气", "token", *PIECES]
NEW = {  # 龘 is no common character, so the old vocabularies do not know it
    "wordpiece": ["模型", "语言", "tokenizer", "gpt4", "##izer", "龘"],
    "bert": ["tokenizer", "gpt4", "##izer", "龘"],
    "sentencepiece": ["模型", "今天天气", "tokenizer", "C++", "龘"],
}
ALPHABET = [*"今天气模型语言处理龘，。+ \n", "token", "izer", "tokenizers", "GPT4", "gpt45", "C++", "天气预报", "wizer"]
TEXTS = st.lists(st.sampled_from([*ALPHABET, *"abcgptz0459"])).map("".join)


def train_small_sentencepiece() -> SentencepieceTokenizer:
    model = io.BytesIO()
    lines = ["今天天气很好，模型处理语言token", "天气预报说今天有雨izer abc", "语言模型处理了天气 0459 gptz+"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="unigram", vocab_size=320, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, byte_fallback=True, normalization_rule_name="identity", hard_vocab_limit=False,
        num_threads=1, minloglevel=2,
    )  # fmt: skip
    return SentencepieceTokenizer(model.getvalue())


@pytest.fixture(scope="module", params=NEW)
def added(request, tmp_path_factory):
    """A tokenizer, it with new tokens, those tokens, and what they were read as before."""
    kind = request.param
    old = train_small_sentencepiece()
    if kind != "sentencepiece":
        old = WordpieceTokenizer(VOCABULARY, dictionary=kind == "wordpiece")
    folder = tmp_path_factory.mktemp(kind)
    old.save(folder / "old")
    pieces = add_tokens(folder / "old", NEW[kind], folder / "new")
    return old, load_tokenizer(folder / "new"), NEW[kind], pieces


def test_old_entries_and_special_ids_stay_and_the_new_ones_stand_behind(added):
    old, new, tokens, _ = added
    assert new.kind == old.kind
    assert [new.token(index) for index in range(new.vocab_size)] == [
        *(old.token(index) for index in range(old.vocab_size)), *tokens,
    ]  # fmt: skip
    for role in ("pad_id", "unk_id", "start_id", "end_id"):
        assert getattr(new, role) == getattr(old, role)
    assert new.fingerprint != old.fingerprint


def test_pieces_are_what_the_old_tokenizer_read(added):
    old, _, tokens, pieces = added
    assert len(pieces) == len(tokens)
    for token, ids in zip(tokens, pieces):
        assert ids
        assert all(0 <= index < old.vocab_size for index in ids)
        if token == "龘" and old.kind != "sentencepiece":
            assert ids == (old.unk_id,)
        elif token.startswith("##"):
            assert [old.token(index) for index in ids] == [f"##{character}" for character in token[2:]]
        else:
            assert "".join(old.decode(list(ids)).split()) == token
    if old.kind == "wordpiece":
        assert [old.token(index) for index in pieces[0]] == ["模", "型"]
        assert [old.token(index) for index in pieces[2]] == ["token", "##i", "##z", "##e", "##r"]


def test_every_new_token_is_used(added):
    old, new, tokens, _ = added
    for index, token in enumerate(tokens, start=old.vocab_size):
        text = f"w{token[2:]}" if token.startswith("##") else f"，{token}。"
        assert index in new.encode(text)
        assert token.removeprefix("##") in new.decode(new.encode(text))


@given(text=TEXTS)
def test_a_text_without_the_new_tokens_has_the_ids_it_had(added, text):
    old, new, tokens, _ = added
    plain = text if old.kind == "sentencepiece" else normalise(text)
    assume(not any(token.removeprefix("##") in plain for token in tokens))
    assert new.encode(text) == old.encode(text)


@given(text=TEXTS)
def test_the_new_vocabulary_loses_nothing(added, text):
    old, new, _, _ = added
    before, after = (each.encode(text) for each in (old, new))
    if old.unk_id not in before:
        assert "".join(new.decode(after).split()) == "".join(old.decode(before).split())
    assert after.count(new.unk_id) <= before.count(old.unk_id)


def test_what_was_added_is_recorded_and_the_same_bytes_come_out_again(tmp_path):
    WordpieceTokenizer(VOCABULARY).save(tmp_path / "old")
    for name in ("new", "again"):
        add_tokens(tmp_path / "old", NEW["wordpiece"], tmp_path / name)
    facts = json.loads((tmp_path / "new" / "tokenizer.json").read_text(encoding="utf-8"))
    assert facts["made_by"] == {"added_tokens": 6, "to_tokenizer": load_tokenizer(tmp_path / "old").fingerprint}
    for file in ("vocab.txt", "tokenizer.json"):
        assert (tmp_path / "new" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


@pytest.mark.parametrize(
    ("kind", "token", "why"),
    [
        ("wordpiece", "", "is empty"),
        ("wordpiece", "今天", f"is in the vocabulary already, with id {VOCABULARY.index('今天')}"),
        ("wordpiece", "GPT", "give 'gpt'"),
        ("wordpiece", "大语言模型", r"cut into 大 \| 语 \| 言 \| 模 \| 型 before it is looked up"),
        ("wordpiece", "gpt 4", "would never be used"),
        ("wordpiece", "[extra]", "would never be used"),
        ("wordpiece", "##模型", "continues no word"),
        ("wordpiece", "##", "continues no word"),
        ("wordpiece", "##a b", "continues no word"),
        ("bert", "模型", r"cut into 模 \| 型"),
        ("sentencepiece", "模 型", "holds white space"),
        ("sentencepiece", "▁模型", "holds white space"),
        ("sentencepiece", "</s>", "is in the vocabulary already, with id 1"),
    ],
)
def test_what_would_never_be_read_is_refused(tmp_path, kind, token, why):
    old = train_small_sentencepiece()
    if kind != "sentencepiece":
        old = WordpieceTokenizer(VOCABULARY, dictionary=kind == "wordpiece")
    old.save(tmp_path / "old")
    with pytest.raises(UsageError, match=f"1 of 2 tokens cannot be added .*{why}.* Leave them out, or correct them"):
        add_tokens(tmp_path / "old", ["ppp9", token], tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("dictionary", "way_out"), [(True, "jieba's own dictionary"), (False, "takes no Han words")])
def test_a_refusal_says_which_han_words_there_could_be(tmp_path, dictionary, way_out):
    WordpieceTokenizer(VOCABULARY, dictionary=dictionary).save(tmp_path / "old")
    with pytest.raises(UsageError, match=way_out):
        add_tokens(tmp_path / "old", ["大语言模型"], tmp_path / "new")


def test_tokens_given_twice_are_refused_and_many_faults_are_counted(tmp_path):
    old = WordpieceTokenizer(VOCABULARY)
    old.save(tmp_path / "old")
    assert refuse_tokens(old, ["模型", "语言", "模型"]) == {"模型": "is given 2 times"}
    with pytest.raises(UsageError, match=r"8 of 8 tokens .*; and 3 more"):
        add_tokens(tmp_path / "old", [f"A{index}" for index in range(8)], tmp_path / "new")
    with pytest.raises(UsageError, match="no tokens to add"):
        add_tokens(tmp_path / "old", [], tmp_path / "new")


def test_a_file_of_tokens_has_one_per_line(tmp_path):
    file = tmp_path / "tokens.txt"
    file.write_bytes("模型\r\n语言\ngpt4".encode())
    assert read_tokens(file) == ["模型", "语言", "gpt4"]
    file.write_bytes("模型\n\n语言\n".encode())
    assert read_tokens(file) == ["模型", "", "语言"]  # the empty one is then refused by name
    for content, message in ((b" \n", "is empty"), (b"\xff", "not valid UTF-8")):
        file.write_bytes(content)
        with pytest.raises(UsageError, match=message):
            read_tokens(file)
    with pytest.raises(UsageError, match="there is no such file"):
        read_tokens(tmp_path / "absent.txt")


def test_real_text_without_the_new_words_has_the_ids_it_had(shared_data, tmp_path):
    old = adopt_vocabulary(shared_data / "vocab" / "t5_pegasus_vocab_50000.txt")
    old.save(tmp_path / "old")
    documents = list(islice(read_documents([shared_data / "pretrain_zh_small.jsonl.gz"]), 300))
    cut = dict.fromkeys(word for document in documents for word in rjieba.cut(document.text, False) if len(word) == 4)
    refused = refuse_tokens(old, list(cut))
    words = [*[word for word in cut if word not in refused][:5], "脱氧核糖核酸", "##china"]
    pieces = add_tokens(tmp_path / "old", words, tmp_path / "new")
    assert all(len(ids) > 1 for ids in pieces)
    new = load_tokenizer(tmp_path / "new")
    unchanged = touched = 0
    for document in documents:
        before, after = old.encode(document.text), new.encode(document.text)
        if any(word.removeprefix("##") in normalise(document.text) for word in words):
            touched += before != after
        else:
            unchanged += 1
            assert after == before
    assert unchanged > 100
    assert touched
