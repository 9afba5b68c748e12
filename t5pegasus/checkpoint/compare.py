"""What differs between two checkpoints: what they are, and their arrays, read block by block."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from t5pegasus.arrays import open_arrays
from t5pegasus.checkpoint.info import CheckpointInfo, load_checkpoint_info
from t5pegasus.chunks import StoredArray, cut_rows

_BLOCK_BYTES = 4 << 20


@dataclasses.dataclass(frozen=True)
class ArrayDifference:
    """One array that is not the same in both."""

    name: str
    first: str | None
    """Type and shape in the first checkpoint; None where it is absent."""
    second: str | None
    max_abs_difference: float | None = None
    """NaN where one of the two is; None if they cannot be compared entry by entry."""
    num_different: int | None = None
    """Entries that differ in their bits."""
    num_entries: int | None = None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two checkpoints."""

    fields: dict[str, tuple[Any, Any]]
    """Of config, position and origin, those that differ: dotted name → (first, second)."""
    arrays: tuple[ArrayDifference, ...]
    num_equal_arrays: int
    """Equal bit for bit."""

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs."""
        return not self.fields and not self.arrays

    def to_json(self) -> dict[str, Any]:
        """As a JSON object; a NaN is written as text."""
        arrays = [dataclasses.asdict(each) for each in self.arrays]
        for each in arrays:
            if each["max_abs_difference"] is not None and not math.isfinite(each["max_abs_difference"]):
                each["max_abs_difference"] = str(each["max_abs_difference"])
        return {
            "equal": self.is_equal,
            "fields": {name: list(values) for name, values in self.fields.items()},
            "arrays": arrays,
            "num_equal_arrays": self.num_equal_arrays,
        }


def compare_checkpoints(
    first: Path, second: Path, advance: Callable[[int], None] = lambda num_bytes: None
) -> Comparison:
    """Compare all that two checkpoints hold, in memory of a few blocks.

    Args:
        first: a checkpoint on a local disk.
        second: another one.
        advance: called with the bytes of each block of the first one that is compared.
    """
    fields = dict(_compare_fields(load_checkpoint_info(first), load_checkpoint_info(second)))
    ours, theirs = open_arrays(first), open_arrays(second)
    differences = []
    for name in sorted(ours.keys() | theirs.keys()):
        difference = _compare_arrays(name, ours.get(name), theirs.get(name), advance)
        if difference is not None:
            differences.append(difference)
    return Comparison(fields, tuple(differences), len(ours.keys() | theirs.keys()) - len(differences))


def _compare_fields(first: CheckpointInfo, second: CheckpointInfo) -> Iterator[tuple[str, tuple[Any, Any]]]:
    ours, theirs = first.to_json(), second.to_json()
    for each in (ours, theirs):
        config = each.pop("config")
        each |= {
            f"config.{group}.{field}": value for group, fields in config.items() for field, value in fields.items()
        }
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            yield name, (ours.get(name), theirs.get(name))


def _compare_arrays(
    name: str, first: StoredArray | None, second: StoredArray | None, advance: Callable[[int], None]
) -> ArrayDifference | None:
    if first is None or second is None:
        return ArrayDifference(name, _describe(first), _describe(second))
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return ArrayDifference(name, _describe(first), _describe(second))
    largest, different = 0.0, 0
    for part in cut_rows(tuple(slice(0, size) for size in first.shape), first.dtype.itemsize, _BLOCK_BYTES):
        ours, theirs = first.read(part), second.read(part)
        unequal = _bits(ours) != _bits(theirs)
        if unequal.any():
            different += int(unequal.sum())
            with np.errstate(invalid="ignore"):
                distance = np.abs(_widen(ours) - _widen(theirs))[unequal].max()
            largest = float(np.maximum(largest, distance))  # which keeps a NaN
        advance(ours.nbytes)
    first.release()
    second.release()
    if not different:
        return None
    return ArrayDifference(name, _describe(first), _describe(second), largest, different, math.prod(first.shape))


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}").reshape(array.shape)


def _widen(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64)


def _describe(array: StoredArray | None) -> str | None:
    return None if array is None else f"{array.dtype.name}{list(array.shape)}"
