"""Pseudo-summaries: take the sentences out of a text that share most with what remains.

Greedy selection by the longest common subsequence (LCS), the rule of T5-PEGASUS (`train.py` of
ZhuiyiTechnology/t5-pegasus), after the gap sentences of PEGASUS (Zhang et al. 2020, §3.1). The rule needs the
LCS of every candidate at every step; here most are never computed, because a bound shows that they cannot win.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from rapidfuzz.distance import LCSseq

from t5pegasus.errors import DataError
from t5pegasus.text.sentences import chunk_sentences, split_sentences

SUMMARY_RATE = 0.25


@dataclass(frozen=True, slots=True)
class PseudoSummary:
    """One example: the target was cut out of the text, the source is what remains.

    `target_indices` are the sentences of `target`, ascending. Normally these are the selected ones. If the
    selected ones came out longer than the rest, the two sides change places: then `swapped` is true and
    `target_indices` are the sentences that had remained.
    """

    source: str
    target: str
    target_indices: tuple[int, ...]
    swapped: bool


def make_pseudo_summaries(text: str, summary_rate: float = SUMMARY_RATE) -> Iterator[PseudoSummary]:
    """All examples of one document: split into sentences, chunk, and select in each chunk."""
    for chunk in chunk_sentences(split_sentences(text)):
        yield make_pseudo_summary(chunk, summary_rate=summary_rate)


def make_pseudo_summary(sentences: Sequence[str], *, summary_rate: float = SUMMARY_RATE) -> PseudoSummary:
    """Source and target of one chunk, each joined in document order; the longer one is the source.

    Raises:
        DataError: for fewer than two sentences.
    """
    selected = select_gap_sentences(sentences, summary_rate=summary_rate)
    remaining = sorted(set(range(len(sentences))) - set(selected))
    target, source = ("".join(sentences[i] for i in side) for side in (selected, remaining))
    if len(source) < len(target):
        return PseudoSummary(target, source, tuple(remaining), swapped=True)
    return PseudoSummary(source, target, tuple(selected), swapped=False)


def select_gap_sentences(sentences: Sequence[str], *, summary_rate: float = SUMMARY_RATE) -> list[int]:
    """Indices, in document order, of the sentences that make the pseudo-summary.

    Again and again the sentence moves from the rest to the summary for which the LCS (in code points, not
    normalised) of the joined rest and the joined summary comes out longest, the first one on ties. It ends
    when one sentence is left, or the summary is longer than `summary_rate` times the rest.

    Raises:
        DataError: for fewer than two sentences.
    """
    if len(sentences) < 2:
        raise DataError(f"a pseudo-summary needs at least 2 sentences, got {len(sentences)}")
    lengths = [len(sentence) for sentence in sentences]
    candidates = _Candidates(sentences)
    num_selected_characters, num_remaining_characters = 0, sum(lengths)
    while True:
        index = candidates.move_best()
        num_selected_characters += lengths[index]
        num_remaining_characters -= lengths[index]
        # All that remains may be empty sentences; the original would divide by zero there.
        if len(candidates.remaining) == 1 or num_remaining_characters == 0:
            break
        if num_selected_characters / num_remaining_characters > summary_rate:
            break
    return candidates.selected


class _Candidates:
    """The two sides of the selection and, for each remaining sentence, an upper bound of its score.

    The score of i is LCS(rest without i, summary with i). In the first step it is at most the length of i.
    When j joins the summary, no score grows by more than the score that j had in the first step:
    LCS(A, B with j) ≤ LCS(A, B) + LCS(A, j), and A only shrinks.
    """

    def __init__(self, sentences: Sequence[str]) -> None:
        self.selected: list[int] = []
        self.remaining = list(range(len(sentences)))
        self._sentences = _keep_shared_characters(sentences)
        self._bounds = [len(sentence) for sentence in self._sentences]
        self._first_bounds: list[int] = []

    def move_best(self) -> int:
        """Move the remaining sentence with the largest score, the first on ties, to the selected ones."""
        sentences, bounds = self._sentences, self._bounds
        rest, rest_starts = _join(sentences, self.remaining)
        summary, summary_starts = _join(sentences, self.selected)
        best, best_score = -1, 0
        # Sorting is stable: of equal bounds the first sentence comes first.
        for place in sorted(range(len(self.remaining)), key=lambda k: -bounds[self.remaining[k]]):
            index = self.remaining[place]
            if bounds[index] < best_score:
                break
            if bounds[index] == best_score and index > best >= 0:
                continue
            start, end = rest_starts[place], rest_starts[place + 1]
            cut = summary_starts[bisect_left(self.selected, index)]
            score = LCSseq.similarity(
                summary[:cut] + sentences[index] + summary[cut:],
                rest[:start] + rest[end:],
                score_cutoff=best_score,
            )
            # Below the cut-off the LCS is not finished and comes back as 0: what is known is "less than best".
            bounds[index] = score if score >= best_score else best_score - 1
            if score > best_score or (score == best_score and (index < best or best < 0)):
                best, best_score = index, score
        self._first_bounds = self._first_bounds or bounds
        self._bounds = [bound + self._first_bounds[best] for bound in bounds]
        self.remaining.remove(best)
        insort(self.selected, best)
        return best


def _join(sentences: Sequence[str], indices: Sequence[int]) -> tuple[str, list[int]]:
    """The joined sentences, and where each of them starts, with the end as the last."""
    parts = [sentences[index] for index in indices]
    return "".join(parts), [0, *accumulate(map(len, parts))]


def _keep_shared_characters(sentences: Sequence[str]) -> list[str]:
    """The sentences without the characters that only one of them has, the others renumbered.

    Such a character is always on one side alone and in no common subsequence; that is a third of a text.
    Strings below U+0100 are compared fastest (2.6 times, and a text rarely shares more characters).
    """
    text = "".join(sentences)
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    if len(codes) == 0:
        return list(sentences)
    lengths = [len(sentence) for sentence in sentences]
    owner = np.repeat(np.arange(len(lengths)), lengths)
    # The last assignment to a repeated index stays: tables by code point of the first and last owner.
    first, last = np.empty((2, int(codes.max()) + 1), np.int64)
    last[codes], first[codes[::-1]] = owner, owner[::-1]
    is_shared = first[codes] != last[codes]
    shared = codes[is_shared]
    positions = np.arange(len(shared))
    last[shared] = positions
    is_new = last[shared] == positions
    if is_new.sum() <= 256:
        kept = (np.cumsum(is_new) - 1)[last[shared]].astype(np.uint8).tobytes().decode("latin-1")
    else:
        kept = shared.tobytes().decode("utf-32-le", "surrogatepass")
    num_kept = np.concatenate([[0], np.cumsum(is_shared)])
    ends = num_kept[np.cumsum(lengths)].tolist()
    return [kept[start:end] for start, end in zip([0, *ends], ends)]
