"""How much of a summary is copied from its source."""

import itertools

from t5pegasus.text.rouge import normalise_for_rouge


def measure_copied_fraction(source: str, summary: str) -> float:
    """The part of the summary's characters that stand in runs of two or more characters found in the source.

    This is the extractive fragment coverage of Grusky et al. (2018) on characters, without fragments of one character,
    which any two Chinese texts share. Case and white space do not count; an empty summary has 0.
    """
    source, summary = normalise_for_rouge(source), normalise_for_rouge(summary)
    if not summary:
        return 0.0
    found = set(itertools.pairwise(source))
    shared = [False, *(pair in found for pair in itertools.pairwise(summary)), False]
    return sum(before or behind for before, behind in itertools.pairwise(shared)) / len(summary)
