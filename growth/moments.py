"""AdamW's moments and the record of multipliers in the grown model (docs/growth.md, “Moments”)."""

from collections.abc import Mapping

import numpy as np

from growth.expand import Array, expand, fill_with_mean
from growth.index_map import IndexMap
from growth.operators import dual_multipliers, is_layers
from t5pegasus.axes import AxisMultiplier, ParamSpec


def grow_first_moment(array: Array, spec: ParamSpec, maps: Mapping[str, IndexMap]) -> Array:
    """The first moment m' = r·m, and 0 for created entries."""
    growing = {axis: maps[axis] for axis in spec.axes if axis in maps}
    return expand(
        array,
        spec.axes,
        growing,
        {axis: _gradient_scale(axis, spec, entry) for axis, entry in growing.items()},
    )


def grow_second_moment(array: Array, spec: ParamSpec, maps: Mapping[str, IndexMap]) -> Array:
    """The second moment v' = r²·v; a created entry has its axis' mean, a new layer its neighbour's.

    A zero there would make the entry's first update lr·(1−β₁)/√(1−β₂), three times the usual at β₂ = 0.999.
    """
    growing = {axis: maps[axis] for axis in spec.axes if axis in maps}
    scales = {
        axis: np.ones_like(entry.written) if is_layers(axis) else _gradient_scale(axis, spec, entry) ** 2
        for axis, entry in growing.items()
    }
    grown = expand(array, spec.axes, growing, scales)
    for dimension, axis in enumerate(spec.axes):
        if axis in growing and not is_layers(axis):
            grown = fill_with_mean(grown, dimension, growing[axis].created)
    return grown


def grow_multiplier(multiplier: AxisMultiplier, entry: IndexMap) -> AxisMultiplier:
    """The record of one axis after this growth on top of all before it; created entries hold 0."""
    maps = {"axis": entry}
    return AxisMultiplier(
        written=expand(multiplier.written, ("axis",), maps, {"axis": entry.written}),
        read=expand(multiplier.read, ("axis",), maps, {"axis": entry.read}),
    )


def _gradient_scale(axis: str, spec: ParamSpec, entry: IndexMap) -> np.ndarray:
    return dual_multipliers(axis, spec, entry)[1]
