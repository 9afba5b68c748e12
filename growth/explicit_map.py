"""An index map given entry by entry, taken only if it keeps the function and maps gradients in proportion."""

from typing import Any

import numpy as np

from growth.choices import refuse_unknown
from growth.index_map import IndexMap
from t5pegasus.errors import UsageError

_TOLERANCE = 1e-12
_LARGEST = 2**31


def read_explicit_map(where: str, kind: str, source_size: int, target_size: int, fields: Any) -> IndexMap:
    """The map of `sources` (-1: created), `written` and `read`, each a list of the target's size; both default to ones.

    Args:
        where: names the field in errors.
        kind: of the axis, stream or units.
        source_size: entries before growth.
        target_size: entries after.
        fields: JSON object.

    Raises:
        UsageError: in a sentence that says which law of lossless growth the map breaks, and how to keep it.
    """
    refuse_unknown(fields, ("sources", "written", "read"), where)
    sources = _read_list(where, "sources", fields.get("sources"), target_size, whole=True)
    if np.any((sources < -1) | (sources >= source_size)):
        raise UsageError(f"{where}: sources must lie from -1 (created) to {source_size - 1}")
    ones = np.ones(target_size)
    written = _read_list(where, "written", fields.get("written", ones), target_size)
    read = _read_list(where, "read", fields.get("read", ones), target_size)
    created = sources < 0
    kept = ~created
    if not (np.all(written[kept] > 0) and np.all(read[kept] > 0)):
        raise UsageError(
            f"{where}: written and read must be positive, since gradients are divided by them; give -1 in `sources` "
            "for entries that nothing reads"
        )
    entry = IndexMap(
        sources=np.where(created, 0, sources).astype(np.int32),
        written=np.where(created, 1.0, written),
        read=np.where(created, 1.0, read),
        created=created,
        source_size=source_size,
        ratio=target_size / source_size,
    )
    _check_shares(where, entry)
    if kind == "stream":
        _check_isometry(where, entry)
    elif not np.allclose(entry.written, 1.0, rtol=_TOLERANCE):
        raise UsageError(f"{where}: units go through functions that are not linear; give written = 1 everywhere")
    return entry


def _read_list(where: str, field: str, values: Any, size: int, *, whole: bool = False) -> np.ndarray:
    if isinstance(values, np.ndarray):
        values = values.tolist()
    kinds = int if whole else (int, float)
    valid = isinstance(values, list | tuple) and len(values) == size
    if not valid or not all(isinstance(each, kinds) and abs(each) < _LARGEST for each in values):
        raise UsageError(
            f"{where}: {field} must be a list of {size} {'whole ' * whole}numbers, one for each entry after growth"
        )
    return np.asarray(values, np.int64 if whole else np.float64)


def _check_shares(where: str, entry: IndexMap) -> None:
    shares = _sum_over_copies(entry, entry.written * entry.read)
    if not np.allclose(shares, 1.0, rtol=_TOLERANCE):
        worst = int(np.argmax(np.abs(shares - 1.0)))
        raise UsageError(
            f"{where}: over the copies of each entry written·read must sum to 1; for entry {worst} it sums to "
            f"{shares[worst]:g}"
        )


def _check_isometry(where: str, entry: IndexMap) -> None:
    squares = _sum_over_copies(entry, entry.written**2)
    if not np.allclose(squares, squares[0], rtol=_TOLERANCE):
        worst = int(np.argmax(np.abs(squares - squares[0])))
        raise UsageError(
            f"{where}: over the copies of each coordinate written² must sum to one number, or RMS norms change; it "
            f"sums to {squares[0]:g} for coordinate 0 and {squares[worst]:g} for {worst}: scale the copies of "
            "coordinate i by √(c / number of copies)"
        )
    kept = ~entry.created
    if not np.allclose(entry.read[kept] * squares[0], entry.written[kept], rtol=_TOLERANCE):
        raise UsageError(
            f"{where}: uneven shares of equal copies of the stream: the function would stay, but not gradients, since "
            f"a norm's backward pass gives each copy written/c; give read = written/{squares[0]:g}, or copies of "
            "unequal amplitude"
        )


def _sum_over_copies(entry: IndexMap, values: np.ndarray) -> np.ndarray:
    kept = ~entry.created
    return np.bincount(entry.sources[kept], values[kept], minlength=entry.source_size)
