import json
import random
import sys

import pytest

from t5pegasus.text.rouge_sets import score_rouge_sets


def f1(common, num_reference, num_summary):
    precision, recall = common / num_summary, common / num_reference
    return 2 * precision * recall / (precision + recall + 1e-8)


def test_n_grams_count_once():
    assert score_rouge_sets("哈哈哈哈", "哈哈") == pytest.approx((f1(1, 1, 1),) * 3, abs=1e-15)
    assert score_rouge_sets("中国中国", "中国") == pytest.approx((f1(2, 2, 2), f1(1, 2, 1), f1(2, 2, 2)), abs=1e-15)


def test_a_half_width_point_is_a_border_and_no_character():
    assert score_rouge_sets("35%", "3.5%").rouge_1 == pytest.approx(f1(3, 3, 3))
    assert score_rouge_sets(".3", "3.") == pytest.approx((f1(1, 1, 1), 0, f1(1, 1, 1)))
    # Each summary sentence finds its own subsequence; only the union of their characters counts.
    assert score_rouge_sets("甲乙丙", "丙.乙.甲").rouge_l == pytest.approx(f1(3, 3, 3))
    assert score_rouge_sets("甲乙丙", "丙乙甲").rouge_l == pytest.approx(f1(1, 3, 3))


def test_nothing_between_two_points_is_a_token():
    assert score_rouge_sets("甲..乙", "甲") == pytest.approx((f1(1, 3, 1), 0, f1(1, 3, 1)))
    assert score_rouge_sets("甲..乙", "丙..丁").rouge_1 == pytest.approx(f1(1, 3, 3))


def test_the_walk_back_drops_the_summary_first():
    # Both 甲乙 and 乙甲 of three and three characters have length 2; the walk meets 乙, then 甲 of the reference.
    assert score_rouge_sets("甲甲乙", "甲乙甲").rouge_l == pytest.approx(f1(2, 2, 2))
    assert score_rouge_sets("甲乙", "乙甲").rouge_l == pytest.approx(f1(1, 2, 2))
    # 甲丙 or 甲乙 against 甲: one subsequence of one character, whichever
    assert score_rouge_sets("甲乙丁甲", "乙甲乙").rouge_l == pytest.approx(f1(2, 3, 2))


@pytest.mark.parametrize(("reference", "summary"), [("", "甲"), ("甲", ""), ("甲", "."), (".", "甲"), ("甲", "  ")])
def test_a_side_without_a_sentence_scores_zero(reference, summary):
    assert score_rouge_sets(reference, summary) == (0, 0, 0)


def test_no_recursion_however_long_the_texts():
    length = 2 * sys.getrecursionlimit()
    alphabet = [chr(0x4E00 + index) for index in range(length)]
    assert score_rouge_sets(alphabet, alphabet[::2]).rouge_l == pytest.approx(f1(length // 2, length, length // 2))


def test_all_golden_cases_of_the_package(shared_data):
    with (shared_data / "refs" / "rouge_golden.jsonl").open(encoding="utf-8") as file:
        cases = [json.loads(line) for line in file]
    assert len(cases) == 200
    for case in cases:
        assert score_rouge_sets(case["reference"], case["summary"]) == pytest.approx(case["rouge_pkg"], abs=1e-12)


@pytest.mark.peers
def test_drawn_texts_score_as_in_the_package():
    package, generator = pytest.importorskip("rouge").Rouge(), random.Random(5)
    for alphabet in ("甲乙.", "甲乙丙. ", "甲乙丙丁戊己庚辛"):
        for _ in range(300):
            reference, summary = ("".join(generator.choices(alphabet, k=generator.randint(1, 14))) for _ in range(2))
            if not (reference.strip(".") and summary.strip(". ")):
                continue  # where the package raises, or the recipe counts 0
            (wanted,) = package.get_scores(" ".join(summary), " ".join(reference))
            wanted = [wanted[name]["f"] for name in ("rouge-1", "rouge-2", "rouge-l")]
            assert score_rouge_sets(reference, summary) == pytest.approx(wanted, abs=1e-12), (reference, summary)
