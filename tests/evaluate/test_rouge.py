import json

import pytest

from t5pegasus.text.rouge import first_sentence, normalise_for_rouge, score_rouge


def test_rouge_of_hand_counted_pairs():
    # 4 of 5 and 4 characters shared; bigrams 中国 国人 against 中国 国的 的人; 中国人 is the longest subsequence
    assert score_rouge("abcd", "abcd") == (1, 1, 1)
    assert score_rouge("中国人", "中国的人") == pytest.approx((6 / 7, 2 / 5, 6 / 7))
    assert score_rouge("ab", "ba") == (1, 0, 1 / 2)


def test_counts_are_clipped():
    assert score_rouge("的", "的的的").rouge_1 == pytest.approx(2 / 4)
    assert score_rouge("的的", "的的的").rouge_1 == pytest.approx(4 / 5)


@pytest.mark.parametrize(("reference", "summary"), [("", ""), ("中国", ""), ("", "中国"), ("中国", "美洲")])
def test_nothing_in_common_scores_zero(reference, summary):
    assert score_rouge(reference, summary) == (0, 0, 0)


def test_normalising_lowers_case_and_removes_white_space():
    assert normalise_for_rouge(" GPT\u3000模 型\nA\t") == "gpt模型a"


@pytest.mark.parametrize(
    ("text", "lead"),
    [
        ("第一句。第二句。", "第一句。"),
        ("真的吗？是的。", "真的吗？"),
        ("标题一行\n正文。", "标题一行"),
        ("没有结尾", "没有结尾"),
        ("精度为3.5,速度快.结果表明", "精度为3.5,速度快."),
        ("C.I.B蓝的研究．方法", "C.I.B蓝的研究．"),
        ("1.概述部分.然后", "1.概述部分."),
        ("1. 概述部分.然后", "1. 概述部分."),
        ("  \n前面有空行。后面", "前面有空行。"),
        ("共12.其次", "共12."),
        ("", ""),
    ],
)
def test_the_lead_ends_where_the_first_sentence_does(text, lead):
    assert first_sentence(text) == lead


def test_rouge_equals_the_independent_implementation(shared_data):
    with (shared_data / "refs" / "rouge_golden.jsonl").open(encoding="utf-8") as file:
        cases = [json.loads(line) for line in file]
    assert len(cases) == 200
    for case in cases:
        got = score_rouge(case["reference"].replace(" ", ""), case["summary"].replace(" ", ""))
        assert got == pytest.approx(case["rouge_score"], abs=1e-12)


@pytest.mark.parametrize(("name", "num_pairs", "mean_characters"), [("csl", 1000, 68.2), ("lctt_title", 341, 39.8)])
def test_first_sentences_have_the_published_length(shared_data, name, num_pairs, mean_characters):
    with (shared_data / "summarization" / f"{name}_dev.jsonl").open(encoding="utf-8") as file:
        leads = [first_sentence(json.loads(line)["text"]) for line in file]
    assert len(leads) == num_pairs
    assert sum(map(len, leads)) / num_pairs == pytest.approx(mean_characters, abs=0.05)
