"""Moments kept in bfloat16: read as float32, and rounded up or down at random when they are written.

A running mean moves by (1 − β) of the difference between what is new and what it is; bfloat16 has 8 bits, and with
β = 0.999 rounding to the nearest would undo most of these steps, and in a falling second moment all of them. Rounded up
with the probability that makes the expected value the exact one, the mean is right on average at every β. What is
drawn depends on parameter, update and place alone, so it is the same on every mesh and when a run is resumed.
"""

import zlib

import jax
import jax.numpy as jnp
import numpy as np


def round_stochastically(array: jax.Array, *streams: jax.Array | int) -> jax.Array:
    """bfloat16, each entry one of its two neighbours, the nearer the likelier; what is no number stays what it is.

    Args:
        array: of float32 or wider.
        streams: integers that decide the random numbers, with each entry's place.
    """
    wide = array.astype(jnp.float32)
    place = jnp.zeros(wide.shape, jnp.uint32)
    for dimension, size in enumerate(wide.shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, wide.shape, dimension)
    seed = jnp.uint32(0)
    for stream in streams:
        seed = _mix(seed ^ jnp.asarray(stream, jnp.uint32)) + np.uint32(0x9E3779B9)
    noise = _mix(_mix(place + seed) ^ seed) >> 16
    bits = (jax.lax.bitcast_convert_type(wide, jnp.uint32) + noise) & np.uint32(0xFFFF0000)
    rounded = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(jnp.isfinite(wide), rounded, wide).astype(jnp.bfloat16)


def name_stream(kind: str, name: str) -> int:
    """The stream of one moment of one parameter."""
    return zlib.crc32(f"{kind}.{name}".encode())


def _mix(words: jax.Array) -> jax.Array:
    """A bijection of 32-bit words in which every bit of the input changes half of the output's (lowbias32, Wellons)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        words = (words ^ (words >> shift)) * np.uint32(factor)
    return words ^ (words >> 16)
