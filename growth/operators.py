"""What growth does to one parameter, decided by its declaration alone.

Everything old is scaled by the product of its axes' multipliers. A created entry is either 0, where it would
otherwise change what the model computes, or random, so that its partner has a gradient from the first update:

| axis                       | where it is written     | where it is read (`contracted`) | gain              |
| -------------------------- | ----------------------- | ------------------------------- | ----------------- |
| stream (`embed`)           | 0                       | random                          | mean of the gains |
| units (mlp, heads, qk, vo) | random                  | 0                               | –                 |
| layers                     | 0 if the parameter writes the stream, else a copy of the layer before       |||
"""

import functools
import math
import operator
from collections.abc import Mapping

import numpy as np

from growth.expand import Array, along, expand, fill_with_mean
from growth.index_map import IndexMap
from t5pegasus.axes import ParamSpec, logical_axis


def is_layers(axis: str) -> bool:
    """Whether the axis counts copies of a block instead of entries of one."""
    return logical_axis(axis) == "layers"


def is_stream(axis: str) -> bool:
    """Whether the axis is the residual stream's."""
    return logical_axis(axis) == "embed"


def dual_multipliers(axis: str, spec: ParamSpec, entry: IndexMap) -> tuple[np.ndarray, np.ndarray]:
    """(s, r): by what this parameter and its gradient are multiplied along one of its axes.

    A gradient scales inversely to what it is taken by, so reading and writing exchange their parts.
    """
    if spec.gain:
        return np.ones_like(entry.written), entry.written * entry.read
    if axis in spec.contracted:
        return entry.read, entry.written
    return entry.written, entry.read


def grow_parameter(
    array: Array, spec: ParamSpec, maps: Mapping[str, IndexMap], random: np.random.Generator, noise: float
) -> Array:
    """One parameter of the grown model.

    Args:
        array: the source's parameter, float32 or float64.
        spec: its declaration.
        maps: the axes that grow.
        random: this parameter's own source of random numbers.
        noise: standard deviation of random entries over the RMS of the mapped old ones, layer by layer.

    Returns:
        The parameter with every dimension of its grown size.
    """
    growing = {axis: maps[axis] for axis in spec.axes if axis in maps}
    if not growing:
        return array
    grown = expand(array, spec.axes, growing, {axis: _scale(axis, spec, entry) for axis, entry in growing.items()})
    if spec.gain:
        for dimension, axis in enumerate(spec.axes):
            if axis in growing and not is_layers(axis):
                grown = fill_with_mean(grown, dimension, growing[axis].created)
        return grown
    drawn, zero = _created_entries(spec, growing)
    if not drawn or noise == 0:
        return grown
    mask = functools.reduce(operator.or_, drawn)
    if zero:
        mask = mask & ~functools.reduce(operator.or_, zero)
    values = random.standard_normal(grown.shape, dtype=grown.dtype) * _root_mean_square(grown, spec, growing)
    return grown.__array_namespace__().where(mask, noise * values, grown)


def _writes_stream(spec: ParamSpec) -> bool:
    return not spec.gain and any(is_stream(axis) and axis not in spec.contracted for axis in spec.axes)


def _scale(axis: str, spec: ParamSpec, entry: IndexMap) -> np.ndarray:
    if is_layers(axis):
        # A block whose writers are zero adds nothing to the stream, whatever else it holds.
        return entry.written if _writes_stream(spec) else np.ones_like(entry.written)
    return dual_multipliers(axis, spec, entry)[0]


def _created_entries(spec: ParamSpec, growing: Mapping[str, IndexMap]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Masks of the entries to draw and of those to keep at zero, one per axis that says so."""
    drawn, zero = [], []
    for dimension, axis in enumerate(spec.axes):
        if axis in growing:
            mask = along(growing[axis].created, dimension, len(spec.axes))
            if is_layers(axis):
                if _writes_stream(spec):
                    zero.append(mask)
            elif is_stream(axis) == (axis in spec.contracted):
                drawn.append(mask)
            else:
                zero.append(mask)
    return drawn, zero


def _root_mean_square(grown: Array, spec: ParamSpec, growing: Mapping[str, IndexMap]) -> Array:
    """RMS of the mapped old entries, layer by layer; created ones are still zero and do not count."""
    dimensions = tuple(each for each, axis in enumerate(spec.axes) if not is_layers(axis))
    kept = math.prod(
        growing[axis].num_kept / grown.shape[each]
        for each, axis in enumerate(spec.axes)
        if each in dimensions and axis in growing
    )
    np_or_jnp = grown.__array_namespace__()
    return np_or_jnp.sqrt(np_or_jnp.mean(np_or_jnp.square(grown), axis=dimensions, keepdims=True) / kept)
