"""Character ROUGE (Lin 2004) for Chinese, and the lead baseline.

The standard definition: F1 of clipped n-gram counts for ROUGE-1 and -2, of the longest common subsequence for
ROUGE-L (Lin 2004, §2 and §3.1, whole text as one sequence, β = 1). `rouge_sets` has the other definition in use.
"""

import re
from collections import Counter
from typing import NamedTuple

from rapidfuzz.distance import LCSseq

# A point ends a sentence unless it stands between two letters or digits (3.5, U.S) or closes the number of a
# list item (1. 首先…, at the beginning of a line).
_SENTENCE_END = re.compile(r"[。！？!?\n]|(?<![A-Za-z0-9０-９])[.．]|[.．](?![A-Za-z0-9０-９])")
_LIST_NUMBER = re.compile(r"\s*[(（]?[0-9０-９]{1,2}[.．]\Z")


class Rouge(NamedTuple):
    """F1 values between 0 and 1."""

    rouge_1: float
    rouge_2: float
    rouge_l: float


def normalise_for_rouge(text: str) -> str:
    """Lower-cased and without white space."""
    return "".join(text.lower().split())


def score_rouge(reference: str, summary: str) -> Rouge:
    """ROUGE of two strings, character by character as they are; an empty one scores 0."""
    return Rouge(
        _n_gram_f1(reference, summary, 1),
        _n_gram_f1(reference, summary, 2),
        _f1(LCSseq.similarity(reference, summary), len(reference), len(summary)),
    )


def first_sentence(text: str) -> str:
    r"""The lead of a text: up to its first sentence end, which belongs to it; all of it if there is none.

    A sentence ends at any of 。！？!? or ``\n``, and at `.` or `．` that neither stands between two letters or
    digits nor closes a list number: Chinese abstracts often use the half-width point.
    """
    text = text.strip()
    for match in _SENTENCE_END.finditer(text):
        line_start = text.rfind("\n", 0, match.start()) + 1
        if match[0] in ".．" and _LIST_NUMBER.match(text[line_start : match.end()]):
            continue
        return text[: match.end()].strip()
    return text


def _n_gram_f1(reference: str, summary: str, n: int) -> float:
    counts = [Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in (reference, summary)]
    return _f1((counts[0] & counts[1]).total(), counts[0].total(), counts[1].total())


def _f1(common: int, num_reference: int, num_summary: int) -> float:
    """Harmonic mean of common / num_reference and common / num_summary."""
    return 2 * common / (num_reference + num_summary) if common else 0.0
