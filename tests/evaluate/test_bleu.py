import math
import random

import numpy as np
import pytest

from t5pegasus.text.bleu import count_n_grams, score_corpus_bleu, score_sentence_bleu, tokenize_zh

SENTENCES = [
    ("新图书馆今天开馆,首日读者超过3.5万人。", "图书馆今日开馆,读者超过3.5万人"),
    ("地铁三号线东延段开始试运行", "地铁三号线试运行"),
    ("果园里的苹果熟了", "梨树开花"),
    ("GPT-3 模型的研究", "gpt-3模型研究"),
    ("很短", "很"),
]


def test_sentence_bleu_of_hand_counted_pairs():
    assert score_sentence_bleu("abcdef", "abcdef") == pytest.approx(1)
    # 3 of 4, 2 of 3, 1 of 2 and 0 (0.1) of 1 n-grams, and one token too few
    wanted = (3 / 4 * 2 / 3 * 1 / 2 * 0.1) ** 0.25 * math.exp(1 - 5 / 4)
    assert score_sentence_bleu("abcde", "abcx") == pytest.approx(wanted)
    assert score_sentence_bleu("a", "a") == pytest.approx((1 * 0.1**3) ** 0.25)
    assert score_sentence_bleu("abc", "xyz") == 0
    assert score_sentence_bleu("abc", "") == 0


def test_counts_are_clipped_and_add_up():
    assert count_n_grams("aab", "aaab") == [4, 3, 3, 2, 1, 0, 4, 3, 2, 1]
    counts = [count_n_grams(reference, summary) for reference, summary in SENTENCES]
    both = score_corpus_bleu(np.array([np.sum(counts[:2], axis=0), np.sum(counts, axis=0)]))
    assert both[0] == score_corpus_bleu(np.sum(counts[:2], axis=0))
    assert 0 < both[1] < both[0] < 1


def test_corpus_bleu_of_hand_counted_pairs():
    # As above, but the order without a match counts 1/2, and a second one would count 1/4.
    wanted = (3 / 4 * 2 / 3 * 1 / 2 * 0.5) ** 0.25 * math.exp(1 - 5 / 4)
    assert score_corpus_bleu(np.array(count_n_grams("abcde", "abcx"))) == pytest.approx(wanted)
    assert score_corpus_bleu(np.array(count_n_grams("abxcdx", "abycdy"))) == pytest.approx(
        (4 / 6 * 2 / 5 * 1 / 2 / 4 * 1 / 4 / 3) ** 0.25
    )
    assert score_corpus_bleu(np.array(count_n_grams("abcd", "abc"))) == 0  # no n-gram of four tokens at all
    assert score_corpus_bleu(np.array(count_n_grams("abcd", "wxyz"))) == 0
    assert score_corpus_bleu(np.array(count_n_grams("abcd", ""))) == 0


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("中国 2024年GDP增长5.2%", "中 国 2024 年 GDP 增 长 5.2 %"),
        ("版本3.10.1,发布.", "版 本 3.10.1 , 发 布 ."),
        ("3-4月, well-known", "3 - 4 月 , well-known"),
        ("“引号”—破折号…", "“ 引 号 ” — 破 折 号 …"),
        ("don't (a+b)", "don't ( a + b )"),
        ("𠮷野家", "𠮷 野 家"),
        ("𠮷𠮷", "𠮷𠮷"),
        ("  ", ""),
    ],
)
def test_the_zh_tokenizer_sets_han_and_marks_apart(text, tokens):
    assert tokenize_zh(text) == tokens.split()


@pytest.mark.peers
def test_sentence_bleu_equals_nltk():
    nltk = pytest.importorskip("nltk.translate.bleu_score")
    smooth = nltk.SmoothingFunction().method1
    generator = random.Random(3)
    drawn = [["".join(generator.choices("甲乙丙 a", k=generator.randint(0, 12))) for _ in range(2)] for _ in range(300)]
    for pair in [*SENTENCES, *drawn]:
        reference, summary = (" ".join(text).split(" ") for text in pair)
        wanted = nltk.sentence_bleu([reference], summary, smoothing_function=smooth)
        assert score_sentence_bleu(reference, summary) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.peers
def test_corpus_bleu_equals_sacrebleu():
    metric = pytest.importorskip("sacrebleu").metrics.BLEU(tokenize="zh")
    generator = random.Random(4)
    corpora = [SENTENCES, *(generator.choices(SENTENCES, k=2) for _ in range(20))]
    for corpus in corpora:
        references, summaries = zip(*corpus)
        counts = [count_n_grams(*map(tokenize_zh, pair)) for pair in corpus]
        wanted = metric.corpus_score(summaries, [references]).score
        assert 100 * score_corpus_bleu(np.sum(counts, axis=0)) == pytest.approx(wanted, abs=1e-9)
    assert metric.get_signature().format().startswith("nrefs:1|case:mixed|eff:no|tok:zh|smooth:exp|")


@pytest.mark.peers
def test_the_zh_tokenizer_equals_sacrebleu_on_every_character():
    tokenize = pytest.importorskip("sacrebleu.tokenizers.tokenizer_zh").TokenizerZh()
    for block in range(0, 0x110000, 256):
        text = "".join(f"a{chr(code)}b1{chr(code)}2" for code in range(block, block + 256))
        assert tokenize_zh(text) == tokenize(text).split(), hex(block)
