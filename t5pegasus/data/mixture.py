"""Which source each row of a mixture comes from: a function of the row's number, the seed and the changes of weights.

Row k of a run is of the source in whose interval u(k) = (seed's offset + k·φ) mod 1 falls, where the intervals divide
[0, 1) by the weights and φ is the golden ratio: the sequence with the most even spread (Niederreiter 1992, §3.1), so
any stretch of rows holds each source in its proportion, to a few rows. How many of the first k rows are of a source is
a sum of floors, known in O(log) steps: a run continues at any row with nothing stored but the changes of weights, and
each source goes on, through its own epochs, where it stopped.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import accumulate
from typing import Any, NamedTuple, Self

import numpy as np

from t5pegasus.data.hashing import GOLDEN, mix

_CIRCLE = 1 << 64


class Change(NamedTuple):
    """From a row on, the weights of the sources."""

    from_row: int
    weights: dict[str, float]
    """Fingerprint of the examples → weight; the order is that of the intervals."""

    def to_json(self) -> dict[str, Any]:
        """As checkpoints keep it; pairs, because the order counts."""
        return {"from_row": self.from_row, "weights": [list(pair) for pair in self.weights.items()]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        return cls(int(value["from_row"]), {str(name): float(weight) for name, weight in value["weights"]})

    def shares(self) -> dict[str, Fraction]:
        """Weights that sum to 1, exactly as their decimals say; sources of weight 0 are left out."""
        exact = {name: Fraction(repr(weight)) for name, weight in self.weights.items() if weight}
        return {name: weight / sum(exact.values()) for name, weight in exact.items()}


Changes = tuple[Change, ...]


def change_weights(changes: Changes, row: int, weights: Mapping[str, float]) -> Changes:
    """The changes with these weights from a row on; the same if they are as they were."""
    now = Change(row, dict(weights))
    if changes and changes[-1].shares() == now.shares():
        return changes
    return (*(change for change in changes if change.from_row < row), now)


class MixtureSchedule:
    """Row of the run → (source, row of that source)."""

    def __init__(self, changes: Sequence[Change], seed: int) -> None:
        """Take the changes, at least one, the first of them at row 0."""
        self._stretches: list[_Stretch] = []
        offset, before = int(mix(np.array([seed]))[0]), dict[str, int]()
        for change in changes:
            if self._stretches:
                before = self._stretches[-1].count(change.from_row)
            self._stretches.append(_Stretch(change, offset, before))
        self._begins = [change.from_row for change in changes]

    def count(self, row: int) -> dict[str, int]:
        """How many of the rows before `row` are of each source."""
        return self._stretches[int(np.searchsorted(self._begins, row, side="right")) - 1].count(row)

    def assign(self, rows: np.ndarray) -> list[tuple[str, np.ndarray, np.ndarray]]:
        """For each source among these rows its name, positions in `rows`, and the numbers of these rows in it.

        Args:
            rows: int64 [n]; all between the lowest and the highest are counted through.
        """
        found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        of_stretch = np.searchsorted(self._begins, rows, side="right") - 1
        for index in np.unique(of_stretch):
            places = np.flatnonzero(of_stretch == index)
            begin, end = int(rows[places].min()), int(rows[places].max()) + 1
            for name, source_rows in self._stretches[index].number(begin, end).items():
                mine = places[source_rows[rows[places] - begin] >= 0]
                found.setdefault(name, []).append((mine, source_rows[rows[mine] - begin]))
        parts = {name: [np.concatenate(arrays) for arrays in zip(*pairs)] for name, pairs in found.items()}
        return [(name, places, numbers) for name, (places, numbers) in parts.items() if len(places)]


class _Stretch:
    """The rows from one change to the next."""

    def __init__(self, change: Change, offset: int, before: Mapping[str, int]) -> None:
        self._begin, self._offset, self._before = change.from_row, offset, before
        shares = change.shares()
        self._ends = {name: int(end * _CIRCLE) for name, end in zip(shares, accumulate(shares.values()))}

    def count(self, row: int) -> dict[str, int]:
        """How many of the rows before `row` are of each source, since the beginning of the run."""
        below = [_count_below(row - self._begin, self._offset, end) for end in (0, *self._ends.values())]
        own = {name: after - before for name, before, after in zip(self._ends, below, below[1:])}
        return {**self._before, **{name: self._before.get(name, 0) + count for name, count in own.items()}}

    def number(self, begin: int, end: int) -> dict[str, np.ndarray]:
        """For each source int64 [end − begin]: the number in it of each of these rows, −1 where it is of another."""
        steps = np.arange(begin - self._begin, end - self._begin, dtype=np.uint64)
        points = np.array([self._offset], np.uint64) + steps * np.uint64(GOLDEN)
        inner_ends = np.array(list(self._ends.values())[:-1], np.uint64)
        sources, before = np.searchsorted(inner_ends, points, side="right"), self.count(begin)
        numbered = {}
        for at, name in enumerate(self._ends):
            mine = sources == at
            numbered[name] = np.where(mine, before[name] + np.cumsum(mine) - 1, -1)
        return numbered


def _count_below(count: int, offset: int, limit: int) -> int:
    """How many of (offset + j·φ) mod 2^64, j < count, lie below the limit: ⌊x/2^64⌋ − ⌊(x − limit)/2^64⌋ is 1 there."""
    above = _sum_floors(count, GOLDEN, offset + _CIRCLE - limit, _CIRCLE)
    return count + _sum_floors(count, GOLDEN, offset, _CIRCLE) - above


def _sum_floors(count: int, slope: int, offset: int, divisor: int) -> int:
    """Σ ⌊(slope·j + offset) / divisor⌋ over j < count, by Euclid's algorithm."""
    total = 0
    while True:
        total += count * (count - 1) // 2 * (slope // divisor) + count * (offset // divisor)
        slope, offset = slope % divisor, offset % divisor
        highest = slope * count + offset
        if highest < divisor:
            return total
        count, offset, divisor, slope = highest // divisor, highest % divisor, slope, divisor
