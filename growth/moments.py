"""The record of multipliers in the grown model (docs/growth.md, “Dynamics”)."""

from collections.abc import Mapping

import numpy as np

from growth.expand import Array
from growth.index_map import IndexMap
from t5pegasus.axes import AxisMultiplier


def grow_record(record: AxisMultiplier, entry: IndexMap, step: int) -> AxisMultiplier:
    """The record of one axis after this growth on top of all before it.

    Multipliers multiply. Entries that growth creates begin with ones, as a first model's do; these and copies are
    remembered as born at `step`.
    """
    np_or_jnp = record.written.__array_namespace__()
    sources = entry.sources

    def follow(values: Array, factor: np.ndarray | float) -> Array:
        taken = np_or_jnp.take(values, sources, mode="clip")
        return np_or_jnp.where(entry.created, 1.0, taken * factor).astype(values.dtype)

    inherited = np_or_jnp.take(record.inherited, sources, mode="clip")
    return AxisMultiplier(
        written=follow(record.written, entry.written),
        read=follow(record.read, entry.read),
        ratio=follow(record.ratio, entry.ratio),
        inherited=np_or_jnp.where(entry.created, 0.0, inherited).astype(record.inherited.dtype),
        born=np_or_jnp.where(
            entry.created | entry.copied, step, np_or_jnp.take(record.born, sources, mode="clip")
        ).astype(record.born.dtype),
    )


def grow_records(records: Mapping[str, AxisMultiplier], maps: Mapping[str, IndexMap], step: int) -> dict:
    """`grow_record` for every axis that grows; the others stay as they are."""
    return {axis: grow_record(each, maps[axis], step) if axis in maps else each for axis, each in records.items()}
