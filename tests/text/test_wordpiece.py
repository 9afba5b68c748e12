import json
import unicodedata

import jieba
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5pegasus.errors import ArtifactError, UsageError
from t5pegasus.text.tokenizer import adopt_vocabulary, load_tokenizer
from t5pegasus.text.tokenizer.training import SPECIALS, list_common_characters
from t5pegasus.text.tokenizer.wordpiece import WordpieceTokenizer, normalise, read_vocabulary

PIECES = [f"##{character}" for character in "abcdefghijklmnopqrstuvwxyz0123456789"]
WORDS = ["今天", "天气", "不错", "模型", "café", "token", "##izer", "中华人民共和国"]
SMALL = WordpieceTokenizer([*SPECIALS, *list_common_characters(), *WORDS, *PIECES])
COMMON_TEXT = st.lists(
    st.sampled_from([*list_common_characters()[::9], *"今天模型，。！'abcXYZ019 \n", "token", "Café"])
).map("".join)


@pytest.fixture(scope="module")
def released(shared_data):
    return adopt_vocabulary(shared_data / "vocab" / "t5_pegasus_vocab_50000.txt")


def test_special_ids_are_those_of_the_released_models():
    assert (SMALL.pad_id, SMALL.unk_id, SMALL.start_id, SMALL.end_id) == (0, 100, 101, 102)
    assert SPECIALS[103:] == ("[MASK]", "<S>", "<T>")


@given(COMMON_TEXT)
def test_decoding_gives_the_normalised_text_back_up_to_white_space(text):
    ids = SMALL.encode(text)
    assert SMALL.unk_id not in ids
    assert "".join(SMALL.decode(ids).split()) == "".join(normalise(text).split())


@given(st.text())
def test_any_text_has_ids_and_the_cache_does_not_change_them(text):
    fresh = WordpieceTokenizer([*SPECIALS, *list_common_characters(), *WORDS, *PIECES])
    ids = SMALL.encode(text)
    assert ids == SMALL.encode(text) == fresh.encode(text)
    assert all(0 <= index < SMALL.vocab_size for index in ids)
    SMALL.decode(ids)


@given(st.text(st.one_of(st.characters(), st.sampled_from("éÅ한Σİ\u0301\u0327\u302e\U0001d165"))))
def test_normalising_is_lower_case_nfd_without_marks(text):
    decomposed = unicodedata.normalize("NFD", text.lower())
    assert normalise(text) == "".join(c for c in decomposed if unicodedata.category(c) != "Mn")


HAND = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"今天气不，。.℃", "今天", "300", "ab", "##0", "##℃", "##c"]
HAND_IDS = {token: index for index, token in enumerate(HAND)}


@pytest.mark.parametrize(
    ("text", "tokens", "without_dictionary"),
    [
        # Jieba cuts 今天天气 into the one word it knows, which this vocabulary does not have: single characters.
        ("今天天气", "今 天 天 气", "今 天 天 气"),
        ("今天，天气", "今天 ， 天 气", "今 天 ， 天 气"),
        ("300℃", "300 ℃", "300 ##℃"),
        ("3000", "300 ##0", "300 ##0"),
        ("abc", "ab ##c", "ab ##c"),
        ("ÁB c", "ab [UNK]", "ab [UNK]"),  # accents go, capitals fall; c alone is only a continuation
        ("abd", "[UNK]", "[UNK]"),  # stuck in the middle: the whole word
        ("ab\u200bab", "ab ab", "[UNK]"),  # a format character goes, after the dictionary has cut at it
        ("不\r\n今天\t", "不 今天", "不 今 天"),
        ("不\0\ufffd\x07不", "不 不", "不 不"),
        ("３.。", "[UNK] . 。", "[UNK] . 。"),  # no folding of full-width forms
        ("ab" + "c" * 198, "ab" + " ##c" * 198, "ab" + " ##c" * 198),
        ("ab" + "c" * 199, "[UNK]", "[UNK]"),  # longer than 200
        ("", "", ""),
    ],
)
def test_ids_worked_out_by_hand(text, tokens, without_dictionary):
    for dictionary, expected in ((True, tokens), (False, without_dictionary)):
        tokenizer = WordpieceTokenizer(HAND, dictionary=dictionary)
        assert tokenizer.encode(text) == [HAND_IDS[token] for token in expected.split()], dictionary


def test_both_kinds_have_their_own_fingerprint_and_folder(tmp_path):
    for dictionary, kind in ((True, "wordpiece"), (False, "bert")):
        tokenizer = WordpieceTokenizer(HAND, dictionary=dictionary)
        tokenizer.save(tmp_path / kind)
        loaded = load_tokenizer(tmp_path / kind)
        assert (loaded.kind, loaded.fingerprint) == (kind, tokenizer.fingerprint)
        assert loaded.encode("300℃") == tokenizer.encode("300℃")
    assert load_tokenizer(tmp_path / "bert").fingerprint != load_tokenizer(tmp_path / "wordpiece").fingerprint


def test_unknown_characters_count_one_each():
    assert SMALL.encode("今天龘😀３ok").count(SMALL.unk_id) == 3
    assert SMALL.decode(SMALL.encode("今天龘不错")) == "今天不错"


@pytest.mark.parametrize(
    ("text", "decoded"),
    [
        ("今天 天气，不错。", "今天天气，不错。"),
        ("A token, it's 3.5%!", "a token, it's 3.5% !"),
        ("模型tokenizer", "模型tokenizer"),
        ("（x）《y》", "（x）《y》"),
    ],
)
def test_decoding_places_spaces_as_the_original_does(text, decoded):
    assert SMALL.decode(SMALL.encode(text)) == decoded


def test_truncation_spares_the_specials():
    ids = SMALL.encode("今天天气不错。")
    assert SMALL.encode_source("今天天气不错。", 99) == [101, *ids, 102]
    assert SMALL.encode_source("今天天气不错。", 4) == [101, *ids[:2], 102]
    assert SMALL.encode_target("今天天气不错。", 99) == [*ids, 102]
    assert SMALL.encode_target("今天天气不错。", 3) == [*ids[:2], 102]
    assert SMALL.encode_source("今天", 2) == [101, 102]
    with pytest.raises(UsageError, match="max_source_tokens=1 must be at least 2"):
        SMALL.encode_source("今天", 1)
    with pytest.raises(UsageError, match="max_target_tokens=0 must be at least 1"):
        SMALL.encode_target("今天", 0)


def test_an_id_of_another_vocabulary_is_an_error():
    with pytest.raises(UsageError, match=f"id 70000 is not in the vocabulary of {SMALL.vocab_size}"):
        SMALL.decode([5, 70000])
    with pytest.raises(UsageError, match="id -1 "):
        SMALL.decode([-1])


def test_a_vocabulary_must_be_complete_and_unambiguous(tmp_path):
    with pytest.raises(ArtifactError, match=r"lacks \[CLS\], \[SEP\]"):
        WordpieceTokenizer(["[PAD]", "[UNK]", "一"])
    with pytest.raises(ArtifactError, match="lists '一' twice"):
        WordpieceTokenizer([*SPECIALS, "一", "二", "一"])
    (tmp_path / "vocab.txt").write_bytes("[PAD]\r\n甲\u2028乙\n\u2028\n".encode())
    assert read_vocabulary(tmp_path / "vocab.txt") == ["[PAD]", "甲\u2028乙", "\u2028"]
    (tmp_path / "vocab.txt").write_bytes("甲".encode("gbk"))
    with pytest.raises(ArtifactError, match="not valid UTF-8"):
        read_vocabulary(tmp_path / "vocab.txt")


def test_published_vectors(released):
    vectors = {
        "今天天气不错，适合出门散步。": [306, 1231, 1231, 2653, 7059, 5661, 32268, 10630, 20263, 179],
        "T5 PEGASUS的分词器，Café 2021年！": [
            161, 48555, 6085, 49275, 49031, 3399, 595, 4628, 1057, 5661, 43266, 43170, 1625, 5658,
        ],
        "全国人民代表大会常务委员会\n第３次": [48549, 3701, 100, 2588],
        "魑魅魍魉internationalization😀ok": [100, 5543, 100, 100, 48548, 48568, 49073, 49884, 100, 6071],
    }  # fmt: skip
    for text, ids in vectors.items():
        assert released.encode(text) == ids
    assert released.encode_source("今天天气不错，适合出门散步。", 6) == [101, 306, 1231, 1231, 2653, 102]


def test_the_segmenter_cuts_as_jieba_does(shared_data, caplog):
    import rjieba

    lines = (shared_data / "summarization" / "csl_dev.jsonl").read_text(encoding="utf-8").split("\n")[:300]
    for line in filter(None, lines):
        text = normalise(json.loads(line)["text"])
        assert rjieba.cut(text, False) == list(jieba.cut(text, HMM=False))
