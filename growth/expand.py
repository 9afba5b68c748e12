"""The primitives of growth: read an array through index vectors, scale it along its dimensions, draw by index.

NumPy arrays stay on the host and need no compilation; JAX arrays and tracers stay JAX's. Both give the same bits.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = Any
"""A NumPy or JAX array; results are of the same kind and dtype."""


def along(vector: Array, dimension: int, num_dimensions: int) -> Array:
    """The vector as an array of that many dimensions, all of size 1 but one."""
    return vector.reshape([-1 if each == dimension else 1 for each in range(num_dimensions)])


def gather(array: Array, indices: Sequence[Array | None]) -> Array:
    """`result[i, j, …] = array[indices_0[i], indices_1[j], …]`; None takes a dimension as it is."""
    np_or_jnp = array.__array_namespace__()
    for dimension, index in enumerate(indices):
        if index is not None:
            array = np_or_jnp.take(array, index, axis=dimension, mode="clip")
    return array


def scale(array: Array, vectors: Sequence[Array | None]) -> Array:
    """`result[i, j, …] = array[i, j, …] · vectors_0[i] · vectors_1[j] · …`, NumPy arrays in place; None: ones."""
    for dimension, vector in enumerate(vectors):
        if vector is not None:
            array *= along(vector, dimension, array.ndim).astype(array.dtype)
    return array


def settle(array: Array, zero: Array) -> Array:
    """The array as it is, each entry rounded to its own precision.

    Compilers contract a product and a sum into one rounding, and multiply constants beforehand, each backend in its own
    way. What passes through integers that they cannot know, they have to round as NumPy does.

    Args:
        array: NumPy arrays are returned as they are.
        zero: uint32 0, as an argument of the compiled program.
    """
    np_or_jnp = array.__array_namespace__()
    if np_or_jnp is np:
        return array
    words = np_or_jnp.dtype(f"uint{8 * array.dtype.itemsize}")
    return (array.view(words) ^ zero.astype(words)).view(array.dtype)


def draw(key: Sequence[Any], positions: Sequence[Array]) -> Array:
    """Random numbers of mean 0 and variance 1, each decided by the key and its own indices alone.

    So any part of an array can be drawn by itself, on the host or on any device of any mesh, without the rest.
    They are uniform in ±√3: integers from two rounds of a 32-bit mixing function (C. Wellons' lowbias32), scaled once,
    so that no difference in transcendental functions can show.

    Args:
        key: two 32-bit words.
        positions: an integer vector for each dimension: the indices to draw.

    Returns:
        float32 of the shape of the vectors' lengths.
    """
    np_or_jnp = positions[0].__array_namespace__()
    first, second = (np_or_jnp.asarray(word, np_or_jnp.uint32) for word in key)
    for position in positions[:-1]:
        step = position.astype(np_or_jnp.uint32).reshape((1,) * first.ndim + (-1,))
        first, second = _mix(first[..., None] + step), _mix(second[..., None] ^ step)
    step = positions[-1].astype(np_or_jnp.uint32).reshape((1,) * first.ndim + (-1,))
    words = _mix(_mix(first[..., None] + step) ^ second[..., None])
    centred = (words >> 8).astype(np_or_jnp.float32) - np.float32(2**23 - 0.5)
    return centred * np.float32(3**0.5 / 2**23)


def _mix(words: Array) -> Array:
    np_or_jnp = words.__array_namespace__()
    if np_or_jnp is np:  # in place: these passes are most of what drawing costs
        words = np.atleast_1d(words)
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            words ^= words >> np.uint32(shift)
            words *= np.uint32(factor)
        words ^= words >> np.uint32(16)
        return words
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        words = (words ^ (words >> shift)) * np_or_jnp.uint32(factor)
    return words ^ (words >> 16)
