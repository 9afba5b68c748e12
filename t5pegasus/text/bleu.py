"""BLEU (Papineni et al. 2002) in two ways: sentence by sentence on characters, and of a corpus as sacreBLEU's `zh`.

The first is nltk's `sentence_bleu` with smoothing method 1 (Chen & Cherry 2014), averaged over the pairs: the recipe
of T5 PEGASUS' published tables. The second (Post 2018) adds up counts over the pairs, signature
`nrefs:1|case:mixed|eff:no|tok:zh|smooth:exp`.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

MAX_ORDER = 4
"""N-grams of 1 to 4 tokens, in equal weight."""
NUM_COUNTS = 2 + 2 * MAX_ORDER
"""What `count_n_grams` returns."""
_METHOD_1_COUNT = 0.1
"""Matches that an order without any is given."""

# What the zh tokenizer sets apart: Han with its radicals and strokes, full-width forms, Bopomofo, symbols. The first
# range is a slip of sacreBLEU's that is part of the definition: written for the ideographs from U+20000 on, it names
# the arrows, dashes, quotation marks and mathematics between U+2001 and U+2A6D; those ideographs stay together.
_SET_APART = re.compile(
    "([\u2001-\u2a6d\u2e80-\u2fdf\u2ff0-\u303f\u3100-\u312f\u31a0-\u31bf\u31c0-\u31ef\u3200-\u4db5\u4e00-\u9fbb"
    "\uf900-\ufa2d\ufa30-\ufa6a\ufa70-\ufad9\ufe10-\ufe1f\ufe30-\ufe4f\uff00-\uffef])"
)
# The rest goes by the rules of mteval-v13a, one after the other: ASCII marks stand alone, points and commas unless
# they are between digits, and a dash behind a digit.
_ASCII_MARK = re.compile(r"([ !\"#$%&()*+/:;<=>?@\[\\\]^_`{|}~])")
_POINT_RULES = (
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)


def tokenize_zh(text: str) -> list[str]:
    """The tokens of sacreBLEU's tokenizer `zh`."""
    text = text.strip()
    for pattern in (_SET_APART, _ASCII_MARK):  # what is captured comes back between its neighbours
        text = " ".join(pattern.split(text))
    for pattern, replacement in _POINT_RULES:
        text = pattern.sub(replacement, text)
    return text.split()


def count_n_grams(reference: Sequence[str], summary: Sequence[str]) -> list[int]:
    """All that BLEU needs of one pair; sums over pairs are what it needs of a corpus.

    Returns:
        `NUM_COUNTS` numbers: tokens of the summary, tokens of the reference, then per order 1…4 the n-grams of the
        summary that are in the reference (clipped), then per order all n-grams of the summary.
    """
    matches = []
    for order in range(1, MAX_ORDER + 1):
        wanted, given = (Counter(zip(*(side[first:] for first in range(order)))) for side in (reference, summary))
        matches.append(sum(min(count, wanted[n_gram]) for n_gram, count in given.items() if n_gram in wanted))
    totals = [max(len(summary) - order, 0) for order in range(MAX_ORDER)]
    return [len(summary), len(reference), *matches, *totals]


def score_sentence_bleu(reference: Sequence[str], summary: Sequence[str]) -> float:
    """BLEU between 0 and 1 of one summary; an order without a match counts 0.1 matches, no common token gives 0."""
    num_summary, num_reference, *counts = count_n_grams(reference, summary)
    matches, totals = counts[:MAX_ORDER], counts[MAX_ORDER:]
    if not matches[0]:
        return 0.0
    logs = [math.log((match or _METHOD_1_COUNT) / max(total, 1)) for match, total in zip(matches, totals)]
    brevity = min(0.0, 1 - num_reference / num_summary)
    return math.exp(brevity + math.fsum(logs) / MAX_ORDER)


def score_corpus_bleu(counts: np.ndarray) -> np.ndarray:
    """BLEU between 0 and 1 of whole corpora, with sacreBLEU's exponential smoothing.

    Args:
        counts: [..., NUM_COUNTS], sums of `count_n_grams` over the pairs of each corpus.

    Returns:
        [...]; 0 where nothing matches, or no summary has `MAX_ORDER` tokens.
    """
    counts = np.asarray(counts, np.float64)
    num_summary, num_reference = counts[..., 0], counts[..., 1]
    matches, totals = counts[..., 2 : 2 + MAX_ORDER], counts[..., 2 + MAX_ORDER :]
    defined = (matches.sum(axis=-1) > 0) & (totals.min(axis=-1) > 0)
    without = matches == 0  # the k-th order without a match counts 2^-k matches
    smoothed = np.where(without, 0.5 ** np.cumsum(without, axis=-1), matches)
    log_precision = np.log(smoothed / np.maximum(totals, 1)).mean(axis=-1)
    brevity = np.minimum(0.0, 1 - num_reference / np.maximum(num_summary, 1))
    return np.where(defined, np.exp(brevity + log_precision), 0.0)
