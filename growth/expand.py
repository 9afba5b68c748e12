"""The primitive of growth: read an array through index maps, scaling each axis by a vector.

NumPy arrays stay on the host and need no compilation; JAX arrays and tracers stay JAX's.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from growth.index_map import IndexMap

Array = Any
"""A NumPy or JAX array; results are of the same kind and dtype."""


def along(vector: np.ndarray, dimension: int, num_dimensions: int) -> np.ndarray:
    """The vector as an array of that many dimensions, all of size 1 but one."""
    return vector.reshape([-1 if each == dimension else 1 for each in range(num_dimensions)])


def expand(
    array: Array, axes: tuple[str, ...], maps: Mapping[str, IndexMap], scales: Mapping[str, np.ndarray]
) -> Array:
    """`grown[i, j, …] = array[sources_1[i], sources_2[j], …] · scale_1[i] · scale_2[j] · …`.

    Args:
        array: source values, one dimension per axis.
        axes: the axis names of the dimensions.
        maps: the axes that grow; others stay as they are.
        scales: per growing axis a vector of the grown size, 0 where there is no source.
    """
    np_or_jnp = array.__array_namespace__()
    for dimension, axis in enumerate(axes):
        if axis in maps:
            scale = along(scales[axis].astype(array.dtype), dimension, array.ndim)
            array = np_or_jnp.take(array, np.maximum(maps[axis].sources, 0), axis=dimension, mode="clip") * scale
    return array


def fill_with_mean(array: Array, dimension: int, created: np.ndarray) -> Array:
    """Give the created entries of one dimension the mean of the others."""
    np_or_jnp = array.__array_namespace__()
    mask = along(created, dimension, array.ndim)
    mean = np_or_jnp.mean(array, axis=dimension, keepdims=True, where=~mask)
    return np_or_jnp.where(mask, mean, array)
