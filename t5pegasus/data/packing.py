"""The packing table: which examples share a row, decided once and memory-mapped from then on.

First-fit over a bounded window of open rows, in the (already shuffled) order of the examples: an example
goes into the oldest open row with room for its source and its target. Against best-fit-decreasing this
loses at most two percent of the positions, keeps memory bounded and needs no second look at the data.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from t5pegasus.config import DataConfig
from t5pegasus.data.shard_files import hash_file
from t5pegasus.data.shards import ExampleShards
from t5pegasus.data.span_corruption import SpanCorruption
from t5pegasus.errors import ArtifactError, UsageError, reading, writing
from t5pegasus.json_files import SCHEMA, check_schema, read_json, write_json

_OPEN_ROWS = 128
"""More raise the efficiency by under one percent and cost time in proportion."""
_BLOCK_EXAMPLES = 2**16
_VERIFIED = "verified.json"


class PackingTable(NamedTuple):
    """Row k holds the examples `examples[row_starts[k]:row_starts[k + 1]]`, in the order of its segments."""

    row_starts: np.ndarray
    """int64 [num_rows + 1]."""
    examples: np.ndarray
    """int64 [num_examples]: every example once."""
    source_efficiency: float
    """Share of the source positions that are not padding."""
    target_efficiency: float

    @property
    def num_rows(self) -> int:
        """Rows in one epoch."""
        return len(self.row_starts) - 1


def pack_examples(lengths: np.ndarray, max_source_tokens: int, max_target_tokens: int) -> Iterator[list[int]]:
    """Rows of examples, each row a list of example indices whose lengths fit it together.

    Args:
        lengths: int [n, 2], source and target length of each example; longer than a row counts as a full row.
        max_source_tokens: source positions of a row.
        max_target_tokens: target positions of a row.

    Yields:
        every row once, when it closes: no room for the shortest example, or pushed out by newer rows.
    """
    capacity = np.array([max_source_tokens, max_target_tokens])
    least_source, least_target = np.minimum(lengths.min(axis=0, initial=2**31 - 1), capacity).tolist()
    room: list[list[int]] = []  # [source positions left, target positions left] of each open row
    rows: list[list[int]] = []
    for block in range(0, len(lengths), _BLOCK_EXAMPLES):
        fitted = np.minimum(lengths[block : block + _BLOCK_EXAMPLES], capacity)
        for index, (source, target) in enumerate(fitted.tolist(), start=block):
            for at, left in enumerate(room):
                if left[0] >= source and left[1] >= target:
                    rows[at].append(index)
                    break
            else:
                at, left = len(room), [max_source_tokens, max_target_tokens]
                room.append(left)
                rows.append([index])
            left[0] -= source
            left[1] -= target
            if left[0] < least_source or left[1] < least_target:
                del room[at]
                yield rows.pop(at)
            elif len(room) > _OPEN_ROWS:
                del room[0]
                yield rows.pop(0)
    yield from rows


def load_packing(shards: ExampleShards, data: DataConfig) -> PackingTable:
    """The table of these examples and lengths, from the examples folder; built there the first time.

    Without packing row k is example k. The first build also verifies the checksums of all shards; later on, a shard's
    is verified again if its size or time is no longer what it was then.

    Raises:
        ArtifactError: if a shard or a stored table is damaged, or the folder cannot be written to.
    """
    folder = shards.path / f"packing-{_table_hash(shards.fingerprint, data)}"
    if folder.is_dir():
        verify_changed(shards, folder / _VERIFIED)
    else:
        shards.verify()
        try:
            _write_table(folder, shards, data)
        except OSError as error:
            if not _is_read_only(error):
                raise
            raise ArtifactError(
                f"{folder} cannot be written ({error.strerror}): the packing table is kept beside the "
                "examples; copy them to a folder you may write to"
            ) from error
    description = read_json(folder / "packing.json")
    check_schema(description, folder / "packing.json")
    with reading(folder / "packing.json"):
        arrays = {}
        for name, wanted in description["sha256"].items():
            path = folder / name
            got = hash_file(path) if path.is_file() else "absent"
            if got != wanted:
                raise ArtifactError(
                    f"{path}: sha256 is {got}, packing.json says {wanted}; delete {folder}, it is made anew"
                )
            arrays[path.stem] = np.load(path, mmap_mode="r")
        return PackingTable(
            **arrays,
            source_efficiency=float(description["source_efficiency"]),
            target_efficiency=float(description["target_efficiency"]),
        )


def row_lengths(shards: ExampleShards, data: DataConfig) -> np.ndarray:
    """Int [n, 2]: source and target positions that each example takes in a row.

    Raises:
        ArtifactError: if a text is too short to be corrupted.
        UsageError: if rows are too short for any text.
    """
    corruption = shards.corruption
    if corruption is None:
        return np.minimum(shards.lengths, (data.max_source_tokens, data.max_target_tokens))
    longest = longest_text(corruption, data)
    if len(shards) and shards.lengths[:, 0].min() < 2:
        raise ArtifactError(f"{shards.path} holds a text of fewer than 2 tokens to corrupt; build it again")
    of_length = corruption.lengths(np.arange(2, longest + 1)).astype(np.int32)
    return of_length[np.minimum(shards.lengths[:, 0], longest) - 2]


def longest_text(corruption: SpanCorruption, data: DataConfig) -> int:
    """How many tokens a text may have before corruption, so that it fits a row; longer ones lose their end.

    Raises:
        UsageError: if there is no room for the shortest.
    """
    longest = corruption.longest(data.max_source_tokens, data.max_target_tokens)
    if longest < 2:
        raise UsageError(
            f"data.max_source_tokens={data.max_source_tokens} and max_target_tokens={data.max_target_tokens} leave no "
            "room for a text of span corruption; make rows longer"
        )
    return longest


def verify_changed(shards: ExampleShards, record_path: Path) -> None:
    """Verify the shards whose size or time differs from what is recorded, and record those of all.

    Raises:
        ArtifactError: naming the first shard whose content is another than the manifest says.
    """
    known = read_json(record_path) if record_path.is_file() else {}
    states = {shard.file: _state(shards.path / shard.file) for shard in shards.shards}
    changed = [shard for shard in shards.shards if known.get(shard.file) != states[shard.file]]
    if changed:
        shards.verify(changed)
        try:
            write_json(record_path, states)
        except OSError as error:
            if not _is_read_only(error):  # then they are verified each time
                raise


def _is_read_only(error: OSError) -> bool:
    """Whether a user may not write there, or nobody may."""
    return isinstance(error, PermissionError) or error.errno == errno.EROFS


def _state(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _table_hash(fingerprint: str, data: DataConfig) -> str:
    lengths = (data.max_source_tokens, data.max_target_tokens)
    key = ["first-fit" if data.pack else "single", _OPEN_ROWS, fingerprint, *lengths]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]


def _write_table(folder: Path, shards: ExampleShards, data: DataConfig) -> None:
    """Build under a temporary name of this process; whoever renames first wins, the tables are the same."""
    temporary = folder.with_name(f".{folder.name}.{os.uname().nodename}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        lengths = row_lengths(shards, data)
        num_rows = _write_arrays(temporary, lengths, data)
        capacity = np.array([data.max_source_tokens, data.max_target_tokens])
        used = lengths.sum(axis=0, dtype=np.int64) / (capacity * num_rows)
        description = {
            "schema": SCHEMA,
            "kind": "packing",
            "examples_fingerprint": shards.fingerprint,
            "data": {name: getattr(data, name) for name in ("max_source_tokens", "max_target_tokens", "pack")},
            "num_examples": len(shards),
            "num_rows": num_rows,
            "source_efficiency": float(used[0]),
            "target_efficiency": float(used[1]),
            "sha256": {path.name: hash_file(path) for path in sorted(temporary.glob("*.npy"))},
        }
        write_json(temporary / "packing.json", description)
        write_json(temporary / _VERIFIED, {shard.file: _state(shards.path / shard.file) for shard in shards.shards})
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_arrays(folder: Path, lengths: np.ndarray, data: DataConfig) -> int:
    """Stream the table to disk, holding one block of it in memory; returns the number of rows."""
    if data.pack:
        rows = pack_examples(lengths, data.max_source_tokens, data.max_target_tokens)
    else:
        rows = ([index] for index in range(len(lengths)))
    ends_path = folder / "row_ends"
    done, num_rows = 0, 0
    # No memory maps: on a full disk writing to one kills the process.
    with _array_file(folder / "examples.npy", len(lengths)) as examples, ends_path.open("wb") as ends:
        for block in _blocks(rows):
            flat = np.array([index for row in block for index in row], np.int64)
            examples.write(flat.tobytes())
            ends.write(np.add.accumulate([done] + [len(row) for row in block], dtype=np.int64)[1:].tobytes())
            done += len(flat)
            num_rows += len(block)
    with _array_file(folder / "row_starts.npy", num_rows + 1) as row_starts, ends_path.open("rb") as ends:
        row_starts.write(np.zeros(1, np.int64).tobytes())
        shutil.copyfileobj(ends, row_starts)
    ends_path.unlink()
    return num_rows


@contextlib.contextmanager
def _array_file(path: Path, size: int) -> Iterator[BinaryIO]:
    """A file of NumPy's format, for int64 [size] to be written into."""
    with writing(path), path.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.int64)), "fortran_order": False, "shape": (size,)}
        np.lib.format.write_array_header_1_0(file, header)
        yield file


def _blocks(rows: Iterator[list[int]]) -> Iterator[list[list[int]]]:
    block: list[list[int]] = []
    for row in rows:
        block.append(row)
        if len(block) == _BLOCK_EXAMPLES:
            yield block
            block = []
    if block:
        yield block
