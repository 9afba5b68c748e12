"""Where each entry of a grown axis comes from, and by what it is multiplied where it is written and read.

One map per axis name serves every parameter that has the axis, so whatever must grow together does: the
columns of the relative bias with the heads of self-attention, the encoder's stream with the decoder's.
"""

import dataclasses
import math
from collections.abc import Iterable

import numpy as np

from t5pegasus.axes import axis_size, logical_axis
from t5pegasus.config import ModelConfig


@dataclasses.dataclass(frozen=True, eq=False)
class IndexMap:
    """One axis of the grown model in terms of the source's; all arrays have the grown size."""

    sources: np.ndarray
    """int32: the source index an entry copies, -1 where it copies none."""
    written: np.ndarray
    """float64: multiplier of what writes the axis; 0 marks an entry that growth creates."""
    read: np.ndarray
    """float64: multiplier of what reads the axis; 0 where `written` is."""

    @property
    def created(self) -> np.ndarray:
        """bool: the entries that the source model did not have."""
        return self.written == 0

    @property
    def num_kept(self) -> int:
        """Number of entries the source model had."""
        return int(np.count_nonzero(self.written))


def map_axis(axis: str, source_size: int, target_size: int) -> IndexMap:
    """The map of an axis that grows, by its logical kind (docs/growth.md, “Maps”).

    Raises:
        ValueError: for an axis that this package has no rule for, or a size that does not grow.
    """
    if target_size <= source_size:
        raise ValueError(f"axis {axis!r} has {source_size} entries, {target_size} are not more")
    match logical_axis(axis):
        case "embed":
            # Zeros lower the mean square by d/D; √(D/d) on what is kept restores it, so that ε may stay.
            return _pad(source_size, target_size, amplitude=math.sqrt(target_size / source_size))
        case "mlp" | "heads" | "qk" | "vo":
            return _pad(source_size, target_size, amplitude=1.0)
        case "layers":
            return _interpose(source_size, target_size)
        case other:
            raise ValueError(f"axis {axis!r} cannot grow: there is no rule for {other!r}")


def map_axes(axes: Iterable[str], source: ModelConfig, target: ModelConfig) -> dict[str, IndexMap]:
    """The maps of those axes whose size differs between two models, by axis name."""
    sizes = {axis: (axis_size(axis, source), axis_size(axis, target)) for axis in axes}
    return {axis: map_axis(axis, *pair) for axis, pair in sizes.items() if pair[0] != pair[1]}


def _pad(source_size: int, target_size: int, amplitude: float) -> IndexMap:
    entries = np.arange(target_size, dtype=np.int32)
    kept = entries < source_size
    return IndexMap(
        sources=np.where(kept, entries, -1).astype(np.int32),
        written=np.where(kept, amplitude, 0.0),
        read=np.where(kept, 1.0 / amplitude, 0.0),
    )


def _interpose(source_size: int, target_size: int) -> IndexMap:
    """Spread new layers evenly; each copies the layer before it."""
    sources = np.arange(target_size, dtype=np.int64) * source_size // target_size
    kept = np.diff(sources, prepend=-1) > 0
    return IndexMap(sources.astype(np.int32), written=kept.astype(np.float64), read=kept.astype(np.float64))
