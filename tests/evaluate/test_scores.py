"""Laws of the scores of a corpus, their intervals, and the baselines that real pairs must give."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest

from t5pegasus.corpus.pairs import read_pairs
from t5pegasus.evaluate import DEFINITIONS, score_pairs
from t5pegasus.evaluate.bootstrap import Bootstrap
from t5pegasus.evaluate.lengths import score_by_length
from t5pegasus.evaluate.scores import PAIR_SCORES, score_each_pair
from t5pegasus.text.clean import clean_text
from t5pegasus.text.overlap import measure_copied_fraction
from t5pegasus.text.rouge import first_sentence

REFERENCES = ["新图书馆今天开馆", "地铁三号线试运行", "果园里的苹果熟了", "Deep Learning 综述", "精度为3.5%"]
SUMMARIES = ["图书馆今天开馆了", "三号线开始试运行", "农民", "deep learning 综述", ""]


def test_names_are_the_same_for_ever():
    assert tuple(score_pairs(REFERENCES, SUMMARIES)) == tuple(DEFINITIONS)
    assert tuple(DEFINITIONS) == (
        "rouge-1", "rouge-2", "rouge-l", "bleu",
        "t5-pegasus-rouge-1", "t5-pegasus-rouge-2", "t5-pegasus-rouge-l", "t5-pegasus-bleu",
    )  # fmt: skip


def test_scores_are_means_in_percent():
    figures = score_pairs(["中国的图书馆", "法国"], ["中国的图书馆", ""])
    halves = {name: figures[name] for name in PAIR_SCORES}
    assert halves == pytest.approx(dict.fromkeys(PAIR_SCORES, 50), abs=1e-6)
    # BLEU is the corpus', not a mean: all n-grams match, 6 tokens stand against 8.
    assert figures["bleu"] == pytest.approx(100 * np.exp(1 - 8 / 6))


def test_only_sacrebleu_minds_case():
    as_written, lowered = (
        score_pairs(["深度学习 Deep Learning"], [text]) for text in ("深度学习 DEEP learning", "深度学习 deep learning")
    )
    assert {name: as_written[name] for name in PAIR_SCORES} == {name: lowered[name] for name in PAIR_SCORES}
    assert score_pairs(["深度学习 Deep"], ["深度学习 deep"])["bleu"] < 100


def test_a_space_is_two_tokens_in_the_published_bleu_only():
    with_space, without = (score_pairs(["深度学习"], [text]) for text in ("深度 学习", "深度学习"))
    assert with_space["t5-pegasus-bleu"] < without["t5-pegasus-bleu"]
    assert with_space["rouge-l"] == without["rouge-l"]
    assert with_space["t5-pegasus-rouge-2"] == without["t5-pegasus-rouge-2"]


def test_pairs_must_be_there_and_match():
    with pytest.raises(ValueError, match="no pair"):
        score_pairs([], [])
    with pytest.raises(ValueError, match="shorter"):
        score_pairs(REFERENCES, SUMMARIES[:2])


def test_a_corpus_of_repeated_pairs_is_scored_by_weights():
    scored = score_each_pair(REFERENCES, SUMMARIES)
    weights = np.array([[1, 1, 1, 1, 1], [3, 0, 0, 2, 1]], np.float64)
    together = scored.of_corpora(weights)
    for row, counts in enumerate(weights.astype(int)):
        drawn = [index for index, count in enumerate(counts) for _ in range(count)]
        wanted = score_pairs([REFERENCES[index] for index in drawn], [SUMMARIES[index] for index in drawn])
        assert {name: figures[row] for name, figures in together.items()} == pytest.approx(wanted)


def test_bootstrap_is_the_distribution_of_means():
    generator = np.random.default_rng(1)
    characters = [chr(0x4E00 + index) for index in range(30)]
    references = ["".join(generator.choice(characters, 12)) for _ in range(200)]
    summaries = ["".join(generator.choice(characters, 12)) for _ in range(200)]
    scored = score_each_pair(references, summaries)
    bootstrap = Bootstrap(num_resamples=3000)
    resampled = bootstrap.resample({"model": scored})["model"]["rouge-1"]
    error = 100 * scored.values[:, 0].std() / np.sqrt(200)
    assert resampled.mean() == pytest.approx(scored.of_all()["rouge-1"], abs=0.1 * error)
    assert resampled.std() == pytest.approx(error, rel=0.1)
    interval = bootstrap.bound(scored.of_all()["rouge-1"], resampled)
    assert interval.low < interval.value < interval.high
    assert interval.half_width == pytest.approx(1.96 * error, rel=0.1)


def test_bootstrap_is_paired_and_repeats(monkeypatch):
    scored = score_each_pair(REFERENCES, SUMMARIES)
    better = scored._replace(values=scored.values + 0.1)
    resampled = Bootstrap(50).resample({"model": better, "lead": scored})
    for name in PAIR_SCORES:
        np.testing.assert_allclose(resampled["model"][name] - resampled["lead"][name], 10)
    # The same figures where memory allows only a few resamples at a time.
    monkeypatch.setattr("t5pegasus.evaluate.bootstrap._CHUNK_WEIGHTS", 15)
    again = Bootstrap(50).resample({"lead": scored})["lead"]
    for name in DEFINITIONS:
        np.testing.assert_allclose(again[name], resampled["lead"][name])


def test_bins_by_length_hold_every_pair_once():
    scored = score_each_pair(REFERENCES, SUMMARIES)
    lengths = [len(text) for text in REFERENCES]
    bins = score_by_length(lengths, {"model": scored})
    assert sum(found.num_pairs for found in bins) == len(lengths)
    assert (bins[0].low, bins[-1].high) == (min(lengths), max(lengths))
    assert all(before.high < after.low for before, after in itertools.pairwise(bins))
    total = sum(found.num_pairs * found.scores["model"]["rouge-l"] for found in bins)
    assert total / len(lengths) == pytest.approx(scored.of_all()["rouge-l"])
    (only,) = score_by_length([7] * 5, {"model": scored})
    assert (only.low, only.high, only.num_pairs) == (7, 7, 5)


@pytest.mark.parametrize(
    ("source", "summary", "fraction"),
    [
        ("新图书馆今天开馆。", "图书馆开馆", 1),
        ("新图书馆今天开馆。", "书店开业", 0),
        ("新图书馆今天开馆。", "市图书馆开放", 3 / 6),
        ("GPT 模型", "gpt模型", 1),
        ("文章", "", 0),
        ("文章", "文", 0),
    ],
)
def test_copied_are_characters_in_runs_of_two(source, summary, fraction):
    assert measure_copied_fraction(source, summary) == pytest.approx(fraction)


@pytest.mark.parametrize(
    ("name", "lead", "first_18"),
    [
        ("csl_dev", (40.11, 26.80, 35.31), (38.05, 26.56, 33.88)),
        ("lctt_title_dev", (30.47, 19.75, 26.54), (28.28, 18.75, 25.50)),
        ("csl_test", (None, None, 34.39), None),
        ("lctt_title_test", None, (None, None, 27.85)),
    ],
)
def test_baselines_without_a_model_are_reproduced(shared_data, name, lead, first_18):
    path = shared_data / "summarization" / f"{name}.jsonl"
    with path.open(encoding="utf-8") as file:
        raw = [json.loads(line) for line in file]
    raw = [(record["text"], record["summary"]) for record in raw]
    read = [(clean_text(pair.text), clean_text(pair.title)) for pair in read_pairs([path], Counter())]
    for pairs in (raw, read):  # cleaning must not change them
        texts, references = zip(*pairs)
        for take, wanted in ((first_sentence, lead), (lambda text: text[:18], first_18)):
            figures = score_pairs(references, [take(text) for text in texts]) if wanted else {}
            for metric, figure in zip(("1", "2", "l"), wanted or ()):
                assert figure is None or figures[f"t5-pegasus-rouge-{metric}"] == pytest.approx(figure, abs=0.005)


@pytest.mark.peers
def test_the_published_recipe_equals_its_packages():
    nltk, package = pytest.importorskip("nltk.translate.bleu_score"), pytest.importorskip("rouge").Rouge()
    smooth = nltk.SmoothingFunction().method1
    totals = dict.fromkeys(("t5-pegasus-rouge-1", "t5-pegasus-rouge-2", "t5-pegasus-rouge-l", "t5-pegasus-bleu"), 0.0)
    for reference, summary in zip(REFERENCES, SUMMARIES):
        wanted, given = (" ".join(text).lower() for text in (reference, summary))
        if given.strip():
            (found,) = package.get_scores(given, wanted)
            for metric in ("rouge-1", "rouge-2", "rouge-l"):
                totals[f"t5-pegasus-{metric}"] += found[metric]["f"]
            totals["t5-pegasus-bleu"] += nltk.sentence_bleu(
                [wanted.split(" ")], given.split(" "), smoothing_function=smooth
            )
    figures = score_pairs(REFERENCES, SUMMARIES)
    assert {name: figures[name] for name in totals} == pytest.approx(
        {name: 100 * total / len(REFERENCES) for name, total in totals.items()}, abs=1e-9
    )
