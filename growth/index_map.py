"""Where each entry of a grown axis comes from, and by what it is multiplied where it is written and read.

One map per axis name serves every parameter that has the axis, so whatever must grow together does: the
columns of the relative bias with the heads of self-attention, the encoder's stream with the decoder's.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

Mixtures = tuple[tuple[int, ...] | None, ...]
"""For each created row the source rows whose mean it begins as; None means all of them."""


@dataclasses.dataclass(frozen=True, eq=False)
class IndexMap:
    """One axis of the grown model in terms of the source's; all arrays have the grown size.

    `written`, `read` and `ratio` have the meaning of `t5pegasus.axes.AxisMultiplier`, for this growth alone.
    """

    sources: np.ndarray
    """int32: the source entry that an entry is, or stands beside if it is created."""
    written: np.ndarray
    """float64: multiplier of what writes the axis; 1 for created entries."""
    read: np.ndarray
    """float64: multiplier of what reads it; 1 for created entries."""
    created: np.ndarray
    """bool: entries that the source model has nothing for."""
    source_size: int
    ratio: float = 1.0
    """Grown over source size, where what the model computes may hang on it (stream and units)."""
    mixtures: Mixtures = ()
    """Where created entries are rows of a table: what each begins as, in their order."""

    @property
    def size(self) -> int:
        """Number of entries after growth."""
        return len(self.sources)

    @property
    def opens(self) -> bool:
        """Whether the created entries are there already, and only their training begins: tokens that were masked."""
        return self.size == self.source_size and bool(self.created.any())

    @property
    def copied(self) -> np.ndarray:
        """bool: entries that repeat a source entry which an earlier entry is already."""
        first = np.zeros(self.size, bool)
        kept = np.flatnonzero(~self.created)
        first[kept[np.unique(self.sources[kept], return_index=True)[1]]] = True
        return ~self.created & ~first

    @property
    def copies(self) -> np.ndarray:
        """int64 [source size]: how many entries each source entry has become."""
        return np.bincount(self.sources[~self.created], minlength=self.source_size)

    @property
    def contrast(self) -> np.ndarray:
        """float64: a direction along which what reads the axis may move without any effect.

        Over the copies of each source entry Σ written·contrast = 0, its root mean square is that of `read`, and
        it is different for every copy; 0 where there is a single one.
        """
        place = np.zeros(self.size)
        order = np.argsort(self.sources, kind="stable")
        order = order[~self.created[order]]
        ends = np.cumsum(self.copies)
        place[order] = np.arange(len(order)) - np.repeat(ends - self.copies, self.copies)

        def over_copies(values: np.ndarray) -> np.ndarray:
            sums = np.bincount(self.sources, np.where(self.created, 0.0, values), minlength=self.source_size)
            return sums[self.sources]

        centred = place - over_copies(self.written * place) / np.maximum(over_copies(self.written), 1e-300)
        centred[self.created | (self.copies[self.sources] < 2)] = 0.0
        norm = over_copies(centred**2)
        scale = np.sqrt(np.divide(over_copies(self.read**2), norm, out=np.zeros(self.size), where=norm > 0))
        return centred * scale

    def then(self, later: "IndexMap") -> "IndexMap":
        """The map of this growth followed by another one; rows created by either begin as theirs say.

        Raises:
            ValueError: if both create rows of a table, other than the very same ones.
        """
        sources, created = later.sources, later.created | self.created[later.sources]
        mixtures = self.mixtures or later.mixtures
        if mixtures and ((self.mixtures and later.mixtures) or np.count_nonzero(created) != len(mixtures)):
            raise ValueError("both plans begin rows; begin all of them in one plan, or grow twice")
        return IndexMap(
            sources=self.sources[sources],
            written=np.where(created, 1.0, self.written[sources] * later.written),
            read=np.where(created, 1.0, self.read[sources] * later.read),
            created=created,
            source_size=self.source_size,
            ratio=self.ratio * later.ratio,
            mixtures=mixtures,
        )


def spread(source_size: int, target_size: int) -> np.ndarray:
    """Entry j stands at source entry ⌊j·source/target⌋: every share of the axis is made of the same share.

    The order of an axis' entries means nothing to the model, so any is right; this one lets each device grow its
    own part of a split axis from the part that it has, wherever the devices divide both sizes.
    """
    return (np.arange(target_size, dtype=np.int64) * source_size // target_size).astype(np.int32)


def duplicate_stream(source_size: int, target_size: int, first_share: float | None, *, scale_gains: bool) -> IndexMap:
    """Repeat coordinates of the residual stream, at any size: a scaled isometry (theory T1).

    Coordinate i becomes k copies of amplitude √(c·β), with shares β that sum to 1 over its copies, so that the squares
    sum to c·x². With c = D/d the mean square, and with it ε, stay; with c = 1 (`scale_gains`) they fall by d/D, and
    gains and ε make up for it. Readers take √(β/c) of each, the left inverse that keeps gradients in proportion.

    Args:
        source_size: d.
        target_size: D.
        first_share: β of the first copy where there are several; None shares evenly.
        scale_gains: the form with c = 1.
    """
    sources = spread(source_size, target_size)
    shares = _shares(sources, source_size, first_share)
    return _isometry(sources, shares, np.zeros(target_size, bool), source_size, scale_gains=scale_gains)


def pad_stream(source_size: int, target_size: int, *, tail: bool, scale_gains: bool) -> IndexMap:
    """Keep each coordinate once and create the others, which nothing writes at first (see `duplicate_stream`)."""
    sources, created = _pad(source_size, target_size, tail=tail)
    return _isometry(sources, np.ones(target_size), created, source_size, scale_gains=scale_gains)


def duplicate_units(source_size: int, target_size: int, first_share: float | None) -> IndexMap:
    """Repeat hidden units, heads or entries of heads; what reads them takes the share β of each copy (T3, T4)."""
    sources = spread(source_size, target_size)
    return IndexMap(
        sources=sources,
        written=np.ones(target_size),
        read=_shares(sources, source_size, first_share),
        created=np.zeros(target_size, bool),
        source_size=source_size,
        ratio=target_size / source_size,
    )


def pad_units(source_size: int, target_size: int, *, tail: bool) -> IndexMap:
    """Keep every unit and create further ones, which nothing reads at first."""
    sources, created = _pad(source_size, target_size, tail=tail)
    ones = np.ones(target_size)
    return IndexMap(sources, ones, ones, created, source_size, ratio=target_size / source_size)


def insert_layers(source_size: int, after: Sequence[int]) -> IndexMap:
    """Insert layers that write nothing at first, each behind a source layer, whose copy it otherwise is.

    Args:
        source_size: number of layers.
        after: for each new layer the index of the one it stands behind, -1 for the bottom (it copies layer 0).
    """
    behind = np.sort(np.asarray(after, np.int64))
    sources, created = [], []
    for layer in range(-1, source_size):
        if layer >= 0:
            sources.append(layer)
            created.append(False)
        count = int(np.count_nonzero(behind == layer))
        sources += [max(layer, 0)] * count
        created += [True] * count
    ones = np.ones(len(sources))
    return IndexMap(np.array(sources, np.int32), ones, ones, np.array(created), source_size)


def stack_layers(source_size: int, order: Sequence[int]) -> IndexMap:
    """Layers in this order, some of them several times: what the model computes changes."""
    ones = np.ones(len(order))
    return IndexMap(np.array(order, np.int32), ones, ones, np.zeros(len(order), bool), source_size)


def add_rows(source_size: int, mixtures: Mixtures) -> IndexMap:
    """Append rows to a table, each beginning as the mean of some of its rows."""
    size = source_size + len(mixtures)
    ones, entries = np.ones(size), np.arange(size)
    sources = np.minimum(entries, source_size - 1).astype(np.int32)
    return IndexMap(sources, ones, ones, entries >= source_size, source_size, mixtures=mixtures)


def select_rows(source_size: int, sources: Sequence[int]) -> IndexMap:
    """A table whose rows are those of the source, some of them several times."""
    ones = np.ones(len(sources))
    return IndexMap(np.asarray(sources, np.int32), ones, ones, np.zeros(len(sources), bool), source_size)


def _shares(sources: np.ndarray, source_size: int, first_share: float | None) -> np.ndarray:
    copies = np.bincount(sources, minlength=source_size)[sources]
    if first_share is None:
        return 1.0 / copies
    first = np.diff(sources, prepend=-1) > 0
    return np.where(copies == 1, 1.0, np.where(first, first_share, (1.0 - first_share) / np.maximum(copies - 1, 1)))


def _pad(source_size: int, target_size: int, *, tail: bool) -> tuple[np.ndarray, np.ndarray]:
    if tail:
        entries = np.arange(target_size)
        return np.minimum(entries, source_size - 1).astype(np.int32), entries >= source_size
    sources = spread(source_size, target_size)
    return sources, np.diff(sources, prepend=-1) == 0


def _isometry(
    sources: np.ndarray, shares: np.ndarray, created: np.ndarray, source_size: int, *, scale_gains: bool
) -> IndexMap:
    ratio = len(sources) / source_size
    square = 1.0 if scale_gains else ratio
    return IndexMap(
        sources=sources,
        written=np.where(created, 1.0, np.sqrt(square * shares)),
        read=np.where(created, 1.0, np.sqrt(shares / square)),
        created=created,
        source_size=source_size,
        ratio=ratio,
    )
