import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rapidfuzz.distance import LCSseq

from t5pegasus.errors import DataError
from t5pegasus.text.pseudo_summary import make_pseudo_summaries, make_pseudo_summary, select_gap_sentences
from t5pegasus.text.read import read_documents
from t5pegasus.text.sentences import chunk_sentences, split_sentences

PROJECT = (
    "本项目训练一个中文摘要模型。\n模型采用编码器与解码器结构，先在通用语料上做伪摘要预训练，再在标题数据上微调。"
    "伪摘要任务从文档里挑出约四分之一的句子作为目标。\n其余句子作为原文，模型要根据原文生成被挑出的句子。"
    "分词器先用词典切词，再对未登录词做子词切分。\n训练使用固定学习率。评测采用字级指标。"
)


def longest_common_subsequence(a, b):
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def pick_by_the_rule(sentences, rate=0.25):
    """The rule word by word, every candidate at every step: (index, score) of each sentence in its turn."""
    remaining, picks = list(range(len(sentences))), []

    def join(indices):
        return "".join(sentences[index] for index in sorted(indices))

    while True:
        selected = [index for index, _ in picks]
        scores = [
            longest_common_subsequence(join([j for j in remaining if j != i]), join([*selected, i])) for i in remaining
        ]
        best = scores.index(max(scores))
        picks.append((remaining.pop(best), scores[best]))
        rest = len(join(remaining))
        if len(remaining) == 1 or rest == 0 or len(join(index for index, _ in picks)) / rest > rate:
            return picks


def select_by_the_rule(sentences, rate):
    return sorted(index for index, _ in pick_by_the_rule(sentences, rate))


@given(
    st.lists(st.text(st.sampled_from("ab甲乙😀"), max_size=9), min_size=2, max_size=9),
    st.sampled_from([0.1, 0.25, 0.5, 1.0]),
)
def test_bounds_never_change_which_sentences_are_selected(sentences, rate):
    assert select_gap_sentences(sentences, summary_rate=rate) == select_by_the_rule(sentences, rate)


def test_a_text_with_more_than_256_shared_characters_is_compared_as_well():
    alphabet = [chr(0x4E00 + index) for index in range(400)]
    sentences = ["".join(alphabet[start : start + 120]) for start in (0, 100, 200, 280, 50, 150, 250)]
    assert select_gap_sentences(sentences) == select_by_the_rule(sentences, 0.25)


@pytest.mark.parametrize(
    ("sentences", "source", "target", "picks", "swapped"),
    [
        (["abab", "cdcd", "abcd"], "ababcdcd", "abcd", [(2, 4)], False),
        (["aa", "bb", "cc", "dd"], "bbccdd", "aa", [(0, 0)], False),
        (["x", "abcdefgh", "abcdefgh"], "xabcdefgh", "abcdefgh", [(1, 8)], False),
        (["abc"] * 5, "abcabcabc", "abcabc", [(0, 3), (1, 6)], False),
        (["a", "bbbbbbbb", "c"], "abbbbbbbb", "c", [(0, 0), (1, 0)], True),
        (["ab", "", "ab", "cd", ""], "abcd", "ab", [(0, 2)], False),
        (["", "", ""], "", "", [(0, 0)], False),
    ],
)
def test_published_vectors(sentences, source, target, picks, swapped):
    result = make_pseudo_summary(sentences)
    assert (result.source, result.target, result.swapped) == (source, target, swapped)
    assert pick_by_the_rule(sentences) == picks
    selected = sorted(index for index, _ in picks)
    assert select_gap_sentences(sentences) == selected
    assert swapped == (list(result.target_indices) != selected)


def test_the_published_text_from_segmenting_to_selection():
    (chunk,) = chunk_sentences(split_sentences(PROJECT))
    assert list(map(len, chunk)) == [14, 39, 24, 25, 22, 19]
    assert pick_by_the_rule(chunk) == [(3, 12), (4, 14)]
    (result,) = make_pseudo_summaries(PROJECT)
    assert (result.target, result.swapped) == (chunk[3] + chunk[4], False)
    assert result.source == chunk[0] + chunk[1] + chunk[2] + chunk[5]


def test_swapping_changes_the_sides_but_not_the_selection():
    assert select_gap_sentences(["a", "bbbbbbbb", "c"]) == [0, 1]


def test_a_text_too_short_for_a_chunk_gives_nothing():
    assert list(make_pseudo_summaries("太短。")) == []


@pytest.mark.parametrize("sentences", [[], ["一句。"]])
def test_too_few_sentences_are_an_error(sentences):
    with pytest.raises(DataError, match=f"at least 2 sentences, got {len(sentences)}"):
        select_gap_sentences(sentences)


@pytest.fixture(scope="module")
def golden(shared_data):
    lines = (shared_data / "refs" / "pseudo_summary_golden.jsonl").read_text(encoding="utf-8").split("\n")
    cases = [json.loads(line) for line in lines if line]
    assert len(cases) == 120
    return cases


def test_every_golden_case_of_the_original_code(golden):
    for case in golden:
        result = make_pseudo_summary(case["sentences"])
        assert (result.source, result.target, result.swapped) == (case["source"], case["target"], case["swapped"])
        assert LCSseq.similarity(result.source, result.target) == case["lcs"]


@pytest.mark.slow
def test_the_golden_chunks_are_those_of_their_documents(golden, shared_data):
    """Segmenting and chunking: the original code cut these chunks out of documents that are here, but for four."""

    def texts():
        yield from (document.text for document in read_documents([shared_data / "pretrain_zh.jsonl.zst"]))
        yield from (document.text for document in read_documents([shared_data / "summarization" / "csl_test.jsonl"]))

    missing = {tuple(case["sentences"]) for case in golden}
    for text in texts():
        missing.difference_update(map(tuple, chunk_sentences(split_sentences(text))))
    assert len(missing) == 4
    assert not any(chunk[0] in text for text in texts() for chunk in missing)


def test_the_lcs_library_counts_characters_as_the_original_one_did(shared_data):
    lines = (shared_data / "refs" / "lcs_golden.jsonl").read_text(encoding="utf-8").split("\n")
    cases = [json.loads(line) for line in lines if line]
    assert len(cases) == 100
    for case in cases:
        assert LCSseq.similarity(case["a"], case["b"]) == case["lcs_len_pylcs"]
