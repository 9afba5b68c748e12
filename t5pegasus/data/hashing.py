"""Hashes of integers that are the same with every version of NumPy, for what must be drawn again alike."""

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15
"""2^64 / golden ratio, odd: multiples of it are spread evenly over the 64 bits."""


def mix(values: np.ndarray) -> np.ndarray:
    """A hash of uint64 values to uint64, one to one (the finaliser of SplitMix64, Steele et al. 2014)."""
    values = np.asarray(values, np.uint64)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def example_keys(seed: int, epochs: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """uint64 [n]: a key for each pair of an epoch and an example's number."""
    of_seed = mix(np.array([seed], np.uint64) + np.uint64(GOLDEN))
    return mix(mix(of_seed + epochs.astype(np.uint64)) + indices.astype(np.uint64) * np.uint64(GOLDEN))
