"""The record of multipliers in the grown model (docs/growth.md, “Dynamics”)."""

from collections.abc import Mapping

import numpy as np

from growth.expand import Array
from growth.index_map import IndexMap
from t5pegasus.axes import AxisMultiplier, ParamSpec, factored_axes, logical_axis


def grow_record(record: AxisMultiplier, entry: IndexMap, born: int | None) -> AxisMultiplier:
    """The record of one axis after this growth on top of all before it.

    Multipliers multiply. Entries that growth creates begin with ones, as a first model's do.

    Args:
        record: of the source.
        entry: the map of the axis.
        born: the update at which created entries and copies are to have been born, and to warm up from; None: they
            count as being as old as what they copy or stand beside.
    """
    np_or_jnp = record.written.__array_namespace__()
    sources = entry.sources

    def follow(values: Array, factor: np.ndarray | float) -> Array:
        taken = np_or_jnp.take(values, sources, mode="clip")
        return np_or_jnp.where(entry.created, 1.0, taken * factor).astype(values.dtype)

    inherited, age = (np_or_jnp.take(each, sources, mode="clip") for each in (record.inherited, record.born))
    return AxisMultiplier(
        written=follow(record.written, entry.written),
        read=follow(record.read, entry.read),
        ratio=follow(record.ratio, entry.ratio),
        inherited=np_or_jnp.where(entry.created, 0.0, inherited).astype(record.inherited.dtype),
        born=np_or_jnp.where(entry.created | entry.copied, age if born is None else born, age).astype(age.dtype),
    )


def grow_records(records: Mapping[str, AxisMultiplier], maps: Mapping[str, IndexMap], born: int | None) -> dict:
    """`grow_record` for every axis that grows; the others stay as they are."""
    return {axis: grow_record(each, maps[axis], born) if axis in maps else each for axis, each in records.items()}


def split_factors(spec: ParamSpec) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The axes of the row means and of the column means of a parameter's second moment, layers being in both."""
    factored = factored_axes(spec, 1)
    assert factored is not None
    layers = tuple(axis for axis in spec.axes if logical_axis(axis) == "layers")
    rows, columns = factored
    return layers + rows, layers + columns


def factor_second_moment(second_moment: Array, spec: ParamSpec) -> tuple[Array, Array]:
    """(row means, column means) of a second moment that was kept whole: exact only where it has rank one."""
    np_or_jnp = second_moment.__array_namespace__()
    means = (
        np_or_jnp.mean(second_moment, axis=tuple(place for place, axis in enumerate(spec.axes) if axis not in part))
        for part in split_factors(spec)
    )
    rows, columns = means
    return rows, columns
