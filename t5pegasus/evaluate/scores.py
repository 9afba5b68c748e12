"""How near summaries are to their references: eight scores under fixed names, of each pair and of a corpus."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from t5pegasus.text.bleu import NUM_COUNTS, count_n_grams, score_corpus_bleu, score_sentence_bleu, tokenize_zh
from t5pegasus.text.rouge import normalise_for_rouge, score_rouge
from t5pegasus.text.rouge_sets import score_rouge_sets

PAIR_SCORES = {
    "rouge-1": "F1 of clipped counts of characters, lower-cased, without white space (Lin 2004; rouge-score)",
    "rouge-2": "the same of character bigrams",
    "rouge-l": "F1 of the longest common subsequence of the same characters (Lin 2004; rouge-score)",
    "t5-pegasus-rouge-1": "ROUGE-1 of the package rouge 1.0.1 on lower-cased characters, as in T5 PEGASUS' tables",
    "t5-pegasus-rouge-2": "ROUGE-2 of the same",
    "t5-pegasus-rouge-l": "ROUGE-L of the same",
    "t5-pegasus-bleu": "sentence BLEU of nltk, smoothing method 1, on lower-cased characters, as in T5 PEGASUS' tables",
}
"""Scores that a pair has, and a corpus as their mean over pairs; name → definition."""
CORPUS_SCORES = {"bleu": "corpus BLEU of sacreBLEU, signature nrefs:1|case:mixed|eff:no|tok:zh|smooth:exp"}
"""Scores that only a corpus has."""
DEFINITIONS = {
    name: (PAIR_SCORES | CORPUS_SCORES)[name]
    for name in ("rouge-1", "rouge-2", "rouge-l", "bleu", *list(PAIR_SCORES)[3:])
}
"""All of them in the order in which they are shown; all in percent."""


class PairScores(NamedTuple):
    """What is known of every pair, enough for the scores of any corpus made of them."""

    values: np.ndarray
    """float64[pairs, len(PAIR_SCORES)] between 0 and 1."""
    bleu_counts: np.ndarray
    """float64[pairs, NUM_COUNTS] of `count_n_grams` for corpus BLEU."""

    def of_corpora(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Scores in percent of several corpora made of the pairs.

        Args:
            weights: float64[corpora, pairs], how often each pair is in each corpus; no row is all 0.

        Returns:
            For each name of `DEFINITIONS`, float64[corpora].
        """
        means = 100 * (weights @ self.values) / weights.sum(axis=1, keepdims=True)
        scores = dict(zip(PAIR_SCORES, means.T)) | {"bleu": 100 * score_corpus_bleu(weights @ self.bleu_counts)}
        return {name: scores[name] for name in DEFINITIONS}

    def of_all(self) -> dict[str, float]:
        """Scores in percent of all pairs together."""
        return {name: float(value) for name, (value,) in self.of_corpora(np.ones((1, len(self.values)))).items()}


def score_pairs(references: Sequence[str], summaries: Sequence[str]) -> dict[str, float]:
    """Scores in percent of summaries as a corpus, by the names of `DEFINITIONS`; an empty summary counts as 0.

    Raises:
        ValueError: if there is no pair, or the numbers differ.
    """
    if not references:
        raise ValueError("no pair to score")
    return score_each_pair(references, summaries).of_all()


def score_each_pair(references: Sequence[str], summaries: Sequence[str]) -> PairScores:
    """Every pair for itself."""
    pairs = list(zip(references, summaries, strict=True))
    values = [score_pair(reference, summary) for reference, summary in pairs]
    counts = [count_n_grams(tokenize_zh(reference), tokenize_zh(summary)) for reference, summary in pairs]
    return PairScores(
        np.array(values, np.float64).reshape(-1, len(PAIR_SCORES)),
        np.array(counts, np.float64).reshape(-1, NUM_COUNTS),
    )


def score_pair(reference: str, summary: str) -> tuple[float, ...]:
    """The scores of one pair between 0 and 1, in the order of `PAIR_SCORES`."""
    characters = [[character.lower() for character in text] for text in (reference, summary)]
    # The recipe joins characters by spaces and parts them again: a space of the text becomes two empty tokens.
    spaced = [" ".join(text).lower().split(" ") for text in (reference, summary)]
    return (
        *score_rouge(normalise_for_rouge(reference), normalise_for_rouge(summary)),
        *score_rouge_sets(*characters),
        score_sentence_bleu(*spaced) if summary.strip() else 0.0,
    )
