"""Span corruption (Raffel et al. 2020, §3.1.4): spans of a text are cut out, and the decoder writes them.

    tokens    我 爱 北 京 天 安 门 。
    source    [CLS] 我 爱 <s1> 天 安 门 <s2> [SEP]
    target    <s1> 北 京 <s2> 。 [SEP]

A text of n tokens loses round(n · rate) of them in round(lost / mean span) spans, so the lengths after corruption
follow from n alone and rows can be packed before anything is drawn. Kept and lost tokens are divided into spans
evenly among all ways to do so; the first span is kept, the last is lost, as in the paper's code.

What is drawn is a function of one 64-bit key per text, computed with integer arithmetic here: it is the same with any
version of NumPy, in any batch, in any order.
"""

from typing import Any, NamedTuple, Self

import numpy as np

from t5pegasus.data.hashing import GOLDEN, mix
from t5pegasus.data.records import Sequences


class SpanCorruption(NamedTuple):
    """How much is cut out, and which tokens stand for it."""

    rate: float
    """Share of the tokens, in (0, 1)."""
    mean_span_tokens: float
    """Mean length of what is cut out in one place, at least 1."""
    sentinel_ids: tuple[int, ...]
    """The tokens that stand for the first, second, … span."""
    prefix_ids: tuple[int, ...]
    """What a source begins with: `[CLS]`, or nothing."""
    end_id: int

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """The inverse of `_asdict` through JSON.

        Raises:
            TypeError: if a field is missing or of another name.
        """
        lists: dict[str, Any] = {name: tuple(value[name]) for name in ("sentinel_ids", "prefix_ids")}
        return cls(**{**value, **lists})

    def count(self, num_tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens that are cut out of so many (at least 2), and in how many spans; int64 of the same shape."""
        num_tokens = np.asarray(num_tokens, np.int64)
        lost = np.clip(np.rint(num_tokens * self.rate).astype(np.int64), 1, num_tokens - 1)
        spans = np.maximum(1, np.rint(lost / self.mean_span_tokens).astype(np.int64))
        return lost, np.minimum(spans, np.minimum(lost, num_tokens - lost))

    def lengths(self, num_tokens: np.ndarray) -> np.ndarray:
        """int64 [n, 2]: source and target length, with their specials, of texts of so many tokens (int [n])."""
        lost, spans = self.count(num_tokens)
        source = len(self.prefix_ids) + num_tokens - lost + spans + 1
        return np.stack([source, lost + spans + 1], axis=-1)

    def longest(self, max_source_tokens: int, max_target_tokens: int) -> int:
        """The longest text that fits a row; below 2 if none does."""
        candidates = np.arange(2, max_source_tokens + max_target_tokens)
        fits = (self.lengths(candidates) <= (max_source_tokens, max_target_tokens)).all(axis=-1)
        return int(np.count_nonzero(fits)) + 1  # both lengths grow with the text's

    def corrupt(self, texts: Sequences, keys: np.ndarray) -> tuple[Sequences, Sequences]:
        """Sources and targets of texts; one of length 0 stays empty.

        Args:
            texts: of at least 2 tokens each, or none.
            keys: uint64 [n], what each draws from.
        """
        full = np.flatnonzero(texts.lengths)
        lost, spans = self.count(texts.lengths[full])
        kept = texts.lengths[full] - lost
        kept_spans = _divide(kept, spans, mix(keys[full] ^ np.uint64(GOLDEN)))
        lost_spans = _divide(lost, spans, mix(keys[full]))
        tokens = texts.tokens[texts.places()]
        is_lost = np.repeat(np.tile([False, True], len(kept_spans)), np.stack([kept_spans, lost_spans], 1).ravel())
        sentinels = np.asarray(self.sentinel_ids, np.int64)[_count_up(spans)]
        sources = _interleave(tokens[~is_lost], kept_spans, sentinels, spans, self.prefix_ids, self.end_id)
        targets = _interleave(tokens[is_lost], lost_spans, sentinels, spans, (), self.end_id, sentinel_first=True)
        return _spread(sources, full, len(texts.lengths)), _spread(targets, full, len(texts.lengths))


def _divide(totals: np.ndarray, counts: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Each total as a sum of `counts` positive numbers, evenly among all such sums; all sums behind each other.

    Of the total − 1 places between its items, those with the smallest hashes become borders.
    """
    width = int(totals.max(initial=1))
    places = np.arange(1, width, dtype=np.uint64)
    drawn = mix(keys[:, None] + places * np.uint64(GOLDEN))
    bits = np.uint64(width.bit_length())
    drawn = (drawn >> bits << bits) | places
    drawn[places >= totals[:, None].astype(np.uint64)] = np.iinfo(np.uint64).max
    num_borders = counts - 1
    most = int(num_borders.max(initial=0))
    borders = np.sort(drawn, axis=1)[:, :most] & ((np.uint64(1) << bits) - np.uint64(1))
    behind = np.arange(most) >= num_borders[:, None]
    borders = borders.astype(np.int64)
    borders[behind] = width + 1
    borders = np.sort(borders, axis=1)
    # Behind the borders stands the total itself; what is further is not taken.
    padded = np.concatenate([np.zeros((len(totals), 1), np.int64), borders, np.zeros((len(totals), 1), np.int64)], 1)
    np.put_along_axis(padded, counts[:, None], totals[:, None], axis=1)
    return np.diff(padded, axis=1)[np.arange(most + 1) < counts[:, None]]


def _count_up(counts: np.ndarray) -> np.ndarray:
    """0 … count − 1 for each count, behind each other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _interleave(
    tokens: np.ndarray,
    span_lengths: np.ndarray,
    sentinels: np.ndarray,
    counts: np.ndarray,
    prefix_ids: tuple[int, ...],
    end_id: int,
    *,
    sentinel_first: bool = False,
) -> Sequences:
    """Prefix, spans of tokens with a sentinel behind (or before) each, end: `counts` spans to a sequence."""
    of_sequence = np.repeat(np.arange(len(counts)), counts)
    num_tokens = np.bincount(of_sequence, weights=span_lengths, minlength=len(counts)).astype(np.int64)
    lengths = len(prefix_ids) + num_tokens + counts + 1
    starts = np.cumsum(lengths) - lengths
    # In front of a span: the specials of all sequences so far, and one sentinel for each span before.
    specials = of_sequence * (len(prefix_ids) + 1) + len(prefix_ids) + np.arange(len(span_lengths))
    begins = np.cumsum(span_lengths) - span_lengths + specials
    out = np.empty(lengths.sum(), np.int32)
    for at, token in enumerate(prefix_ids):
        out[starts + at] = token
    out[starts + lengths - 1] = end_id
    out[begins if sentinel_first else begins + span_lengths] = sentinels
    out[np.arange(len(tokens)) + np.repeat(specials + sentinel_first, span_lengths)] = tokens
    return Sequences(out, starts, lengths)


def _spread(sequences: Sequences, places: np.ndarray, count: int) -> Sequences:
    """The sequences at their places among `count`, the others empty."""
    starts, lengths = np.zeros((2, count), np.int64)
    starts[places], lengths[places] = sequences.starts, sequences.lengths
    return Sequences(sequences.tokens, starts, lengths)
