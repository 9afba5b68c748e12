"""ROUGE as the package `rouge` 1.0.1 defines it, which the published tables of T5 PEGASUS and its peers used.

Three traits make its figures one to three points higher than Lin's (2004): n-grams count once each, however often
they occur; every half-width point is a border between sentences and no character, so that 3.5 reads as 35; and
ROUGE-L is the number of different characters in the union of one longest common subsequence for every pair of
sentences. Which of several subsequences it is decides the figure, so the path through the table is part of the
definition. Time and memory are O(length of the reference × length of the summary / 64).
"""

import itertools
from collections.abc import Sequence

from t5pegasus.text.rouge import Rouge

_EPSILON = 1e-8
"""What the package adds to precision + recall: a perfect summary has 1 - 5e-9."""
_NOTHING = ("",)
"""A sentence of white space only, or nothing between two points, is one empty token there."""


def score_rouge_sets(reference: Sequence[str], summary: Sequence[str]) -> Rouge:
    """F1 by the definition above, of tokens: the characters of a string, as they are.

    It equals `Rouge().get_scores(" ".join(summary), " ".join(reference))` where that answers, at any length. Where it
    raises (a side is empty or a single point) and for a summary of white space, this is 0.
    """
    wanted, given = _split_sentences(reference), _split_sentences(summary)
    if not wanted or not given or not any(map(str.strip, summary)):
        return Rouge(0.0, 0.0, 0.0)
    tokens = [[token for sentence in sentences for token in sentence] for sentences in (wanted, given)]
    unigrams = [set(side) for side in tokens]
    bigrams = [set(itertools.pairwise(side)) for side in tokens]
    common: set[str] = set()
    for sentence in wanted:
        for other in given:
            common |= _common_subsequence(sentence, other)
    return Rouge(
        _f1(len(unigrams[0] & unigrams[1]), *map(len, unigrams)),
        _f1(len(bigrams[0] & bigrams[1]), *map(len, bigrams)),
        _f1(len(common), *map(len, unigrams)),
    )


def _split_sentences(tokens: Sequence[str]) -> list[Sequence[str]]:
    """The runs between points, without white space; a run with nothing in it counts unless it is at an end."""
    runs: list[list[str]] = [[]]
    for token in tokens:
        if token == ".":
            runs.append([])
        else:
            runs[-1].append(token)
    inner = runs[0 if runs[0] else 1 :]
    inner = inner if not inner or inner[-1] else inner[:-1]
    return [[token for token in run if token.strip()] or _NOTHING for run in inner]


def _common_subsequence(reference: Sequence[str], summary: Sequence[str]) -> set[str]:
    """The tokens of the longest common subsequence that the package's walk through the table of lengths finds.

    The walk starts at both ends and takes a match wherever it stands on one; else it drops the last token of the
    reference if only that loses nothing, and that of the summary otherwise. With n = length(i, j), that is the case
    if length(i, j - 1) < n: bit j - 1 of row i, of which the bit-parallel recurrence (Hyyrö 2004) makes a whole row
    at a time.
    """
    places: dict[str, int] = {}
    for place, token in enumerate(summary):
        places[token] = places.get(token, 0) | 1 << place
    everywhere = (1 << len(summary)) - 1
    flat = everywhere
    """Bit j - 1 is set where length(i, j) = length(i, j - 1)."""
    stops: list[int] = []
    for token in reference:
        matches = places.get(token, 0)
        carried = flat & matches
        flat = (flat + carried | flat - carried) & everywhere
        stops.append(matches | everywhere ^ flat)
    found: set[str] = set()
    length = len(summary)
    for token, row in zip(reversed(reference), reversed(stops)):
        length = (row & (1 << length) - 1).bit_length()
        if length and summary[length - 1] == token:
            found.add(token)
            length -= 1
    return found


def _f1(num_common: int, num_reference: int, num_summary: int) -> float:
    precision = num_common / num_summary if num_summary else 0.0
    recall = num_common / num_reference if num_reference else 0.0
    return 2.0 * (precision * recall / (precision + recall + _EPSILON))
