"""A global order that any process can compute for its own records without seeing the others."""

import hashlib
from collections.abc import Sequence

import numpy as np


def order_key(seed: int, identifier: str) -> int:
    """Where a record stands in the order of this seed: 64 bits, uniform, a function of its arguments alone.

    Records sorted by (key, identifier) are a random permutation that does not depend on the order in which
    they were read, on file borders or on the number of processes.
    """
    key = seed.to_bytes(8, "little")
    digest = hashlib.blake2b(identifier.encode("utf-8"), digest_size=8, key=key).digest()
    return int.from_bytes(digest, "little")


def shuffled_order(seed: int, identifiers: Sequence[str]) -> np.ndarray:
    """Indices that put the records into the order of `order_key`; equal identifiers keep their order.

    Returns:
        int64 [num_records].
    """
    keys = np.fromiter((order_key(seed, item) for item in identifiers), np.uint64, len(identifiers))
    return np.argsort(keys, kind="stable")
