"""One example as the bytes of a record, and many records taken apart at once.

A record is the source length (uint32, little endian) followed by the ids of source and target, as uint16
while the vocabulary is smaller than 65,536 and as uint32 from there on.
"""

from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np

_HEADER = np.dtype("<u4")


class Example(NamedTuple):
    """One (source, target) pair of token ids, both with their end token, without the decoder's start id."""

    source: np.ndarray
    """int32 [S]."""
    target: np.ndarray
    """int32 [T]."""


class Sequences(NamedTuple):
    """Token sequences that lie in one array, in any order and with anything between them."""

    tokens: np.ndarray
    """Integers [any]."""
    starts: np.ndarray
    """int64 [n]: where each begins."""
    lengths: np.ndarray
    """int64 [n]."""

    @classmethod
    def of(cls, arrays: Sequence[np.ndarray]) -> Self:
        """Those of separate arrays."""
        lengths = np.array([len(array) for array in arrays], np.int64)
        tokens = np.concatenate([np.empty(0, np.int32), *arrays])
        return cls(tokens, np.cumsum(lengths) - lengths, lengths)

    def shortened(self, max_tokens: int) -> Self:
        """Their first tokens."""
        return self._replace(lengths=np.minimum(self.lengths, max_tokens))

    def places(self) -> np.ndarray:
        """int64 [sum of lengths]: where their tokens lie, one sequence behind the other."""
        offsets = np.cumsum(self.lengths) - self.lengths
        return np.arange(self.lengths.sum()) + np.repeat(self.starts - offsets, self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:  # pyright: ignore[reportIncompatibleMethodOverride] - of sequences
        """The tokens of one, int32."""
        start = self.starts[index]
        return self.tokens[start : start + self.lengths[index]].astype(np.int32)


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of the two unsigned types that holds every id."""
    return np.dtype("<u2" if vocab_size < 2**16 else "<u4")


def pack_record(source: Sequence[int] | np.ndarray, target: Sequence[int] | np.ndarray, dtype: np.dtype) -> bytes:
    """One example as the bytes of a record."""
    header = np.array(len(source), _HEADER).tobytes()
    return header + np.asarray(source, dtype).tobytes() + np.asarray(target, dtype).tobytes()


def unpack_record(record: bytes, dtype: np.dtype) -> Example:
    """The example in a record written by `pack_record` with the same `dtype`."""
    num_source = int(np.frombuffer(record, _HEADER, count=1)[0])
    ids = np.frombuffer(record, dtype, offset=_HEADER.itemsize).astype(np.int32)
    return Example(ids[:num_source], ids[num_source:])


def unpack_records(
    records: Sequence[bytes], lengths: np.ndarray, vocab_size: int
) -> tuple[Sequences, Sequences, dict[int, str]]:
    """Sources and targets of many records, without a loop over them, and what is wrong with which.

    Args:
        records: what was read; empty where a reason for that is known already.
        lengths: int [n, 2], source and target length that each was written with.
        vocab_size: ids must lie below it.

    Returns:
        Sources, targets, and position → fault; faulty ones are of length 0.
    """
    dtype = token_dtype(vocab_size)
    header_ids = _HEADER.itemsize // dtype.itemsize
    lengths = np.asarray(lengths, np.int64).reshape(-1, 2)
    wanted = _HEADER.itemsize + lengths.sum(axis=1) * dtype.itemsize
    sizes = np.fromiter(map(len, records), np.int64, len(records))
    faults = {int(at): f"it has {sizes[at]} bytes, {wanted[at]} were written" for at in np.flatnonzero(sizes != wanted)}
    if faults:
        records = [b"" if at in faults else record for at, record in enumerate(records)]
        sizes[list(faults)] = 0
    tokens = np.frombuffer(b"".join(records), dtype)
    ends = np.cumsum(sizes // dtype.itemsize)
    starts = ends - sizes // dtype.itemsize
    whole = np.flatnonzero(sizes)
    headers = tokens[starts[whole][:, None] + np.arange(header_ids)].copy().view(_HEADER)[:, 0]
    for at in np.flatnonzero(headers != lengths[whole, 0]):
        told = lengths[whole[at], 0]
        faults[int(whole[at])] = f"its header says {headers[at]} source tokens, {told} were written"
    for place in np.flatnonzero(tokens >= vocab_size):
        at = int(np.searchsorted(ends, place, side="right"))
        if place >= starts[at] + header_ids:
            faults.setdefault(at, f"it holds token {tokens[place]}, the vocabulary has {vocab_size}")
    lengths = lengths.copy()
    lengths[list(faults)] = 0
    begin = starts + header_ids
    sources = Sequences(tokens, begin, lengths[:, 0])
    return sources, Sequences(tokens, begin + lengths[:, 0], lengths[:, 1]), faults
