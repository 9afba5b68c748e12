"""What growing an array takes beside its entries: root mean square and means, gathered block by block."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from growth.index_map import Mixtures


@dataclasses.dataclass(frozen=True, eq=False)
class LeafStatistics:
    """Sums over one array of the source, layer by layer; float64, and small: O(sum of its sizes) for each layer."""

    root_mean_square: np.ndarray
    """[layers], or a scalar where the array has no such dimension."""
    mean: np.ndarray
    """The same shape."""
    marginals: tuple[np.ndarray | None, ...]
    """For each dimension the means over all others, [layers, size] or [size]; None for the layers' own."""
    rows: np.ndarray | None = None
    """What created rows begin as: the rows' means, with the dimension of rows first."""


class Gathering:
    """Accumulates a LeafStatistics from blocks that together are one array.

    Args:
        shape: of the array.
        layers: the dimension that counts layers, None if there is none.
        rows: the dimension of rows and what each created one is the mean of, None if there are none.
    """

    def __init__(self, shape: Sequence[int], layers: int | None, rows: tuple[int, Mixtures] | None = None):
        self.shape, self.layers, self.mixed = tuple(shape), layers, rows
        depth = () if layers is None else (shape[layers],)
        self._sum, self._squares = np.zeros(depth), np.zeros(depth)
        self._margins = [None if place == layers else np.zeros((*depth, size)) for place, size in enumerate(shape)]
        self._all_rows: np.ndarray | None = None
        self._rows: np.ndarray | None = None
        if rows is not None:
            dimension, mixtures = rows
            others = (*shape[:dimension], *shape[dimension + 1 :])
            self._rows = np.zeros((len(mixtures), *others))
            pairs = [(source, place) for place, each in enumerate(mixtures) for source in each or ()]
            self._pairs = np.array(sorted(pairs), np.int64).reshape(-1, 2)
            if None in mixtures:
                self._all_rows = np.zeros(others)

    def add(self, block: np.ndarray, target: tuple[slice, ...]) -> None:
        """Take one block, which is `array[target]`."""
        wide = block.astype(np.float64)
        inner = tuple(place for place in range(wide.ndim) if place != self.layers)
        at = () if self.layers is None else (target[self.layers],)
        self._sum[at] += wide.sum(axis=inner)
        for place, margin in enumerate(self._margins):
            if margin is not None:
                part = wide.sum(axis=tuple(each for each in inner if each != place))
                if self.layers is not None and place < self.layers:
                    part = part.T
                margin[(*at, target[place])] += part
        if self._rows is not None:
            self._add_rows(wide, target)
        np.square(wide, out=wide)
        self._squares[at] += wide.sum(axis=inner)

    def finish(self) -> LeafStatistics:
        """The statistics of all that was added."""
        inner = int(np.prod([size for place, size in enumerate(self.shape) if place != self.layers]))
        margins = tuple(
            None if margin is None else margin / (inner // size) for margin, size in zip(self._margins, self.shape)
        )
        return LeafStatistics(np.sqrt(self._squares / inner), self._sum / inner, margins, self._finish_rows())

    def _add_rows(self, wide: np.ndarray, target: tuple[slice, ...]) -> None:
        assert self.mixed is not None
        assert self._rows is not None
        dimension = self.mixed[0]
        first = np.moveaxis(wide, dimension, 0)
        begin, end = target[dimension].start or 0, target[dimension].stop
        others = (*target[:dimension], *target[dimension + 1 :])
        low, high = np.searchsorted(self._pairs[:, 0], (begin, begin + len(first) if end is None else end))
        for source, place in self._pairs[low:high]:
            self._rows[(place, *others)] += first[source - begin]
        if self._all_rows is not None:
            self._all_rows[others] += first.sum(axis=0)

    def _finish_rows(self) -> np.ndarray | None:
        if self.mixed is None or self._rows is None:
            return None
        dimension, mixtures = self.mixed
        rows = self._rows
        for place, mixture in enumerate(mixtures):
            if mixture is None:
                assert self._all_rows is not None
                rows[place] = self._all_rows / self.shape[dimension]
            else:
                rows[place] /= len(mixture)
        return rows


def measure(
    blocks: Iterable[tuple[np.ndarray, tuple[slice, ...]]],
    shape: Sequence[int],
    layers: int | None,
    rows: tuple[int, Mixtures] | None = None,
) -> LeafStatistics:
    """The statistics of an array given as blocks and where they lie; one block may be all of it."""
    gathering = Gathering(shape, layers, rows)
    for block, target in blocks:
        gathering.add(block, target)
    return gathering.finish()
