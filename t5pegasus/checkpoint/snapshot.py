"""What one process has to write of a set of arrays, held in memory of its own while training goes on.

Which process writes which chunk follows from the arrays' shardings alone, so that nothing has to be agreed: replica
i mod R of a shard that R devices hold writes chunk i.
"""

import collections
import itertools
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from t5pegasus.arrays import FOLDER
from t5pegasus.chunks import CHUNK_BYTES, Slices, choose_chunk_shape, describe_array, describe_arrays, list_chunks
from t5pegasus.parts import Bounds, find_bounds

_NUM_THREADS = 8
"""Each slice of a replica takes memory of its device until it is here: at most so many chunks at a time."""


class Chunk(NamedTuple):
    """One chunk that this process writes."""

    file: str
    """Below the checkpoint's folder."""
    values: np.ndarray
    """At the edge of an array fewer than `shape`."""
    shape: tuple[int, ...]


class Snapshot(NamedTuple):
    """A process's part of the arrays of a checkpoint."""

    descriptions: dict[str, bytes]
    """The files beside the chunks, without which nobody knows what those are; one process writes them."""
    chunks: list[Chunk]

    @property
    def num_bytes(self) -> int:
        """Of the chunks."""
        return sum(chunk.values.nbytes for chunk in self.chunks)


class Memory:
    """Where snapshots are kept, one at a time: fresh pages would take several times as long as the copy itself."""

    def __init__(self) -> None:
        self._copies: dict[str, np.ndarray] = {}

    def copy(self, key: str, values: np.ndarray) -> np.ndarray:
        """The values in memory of its own, that of the last call with this key."""
        kept = self._copies.get(key)
        if kept is None or (kept.shape, kept.dtype) != (values.shape, values.dtype):
            kept = self._copies[key] = np.empty_like(values)
        np.copyto(kept, values)
        return kept

    def keep_only(self, keys: Collection[str]) -> None:
        """Let go of what the other keys hold."""
        self._copies = {key: array for key, array in self._copies.items() if key in keys}


def take_snapshot(
    arrays: Mapping[str, jax.Array | np.ndarray], process_index: int = 0, memory: Memory | None = None
) -> Snapshot:
    """Bring to the host what this process writes; every process calls it with the same arrays.

    Args:
        arrays: by dotted name; NumPy arrays, which every process has, are written by the first.
        process_index: of this process.
        memory: where to copy what lies in memory that the devices share with the host, so that the arrays may be
            donated or changed afterwards; the snapshot before this one is gone then. None uses it where it lies.
    """
    descriptions = {f"{FOLDER}/{name}": content for name, content in describe_arrays(list(arrays)).items()}
    pieces: list[_Piece] = []
    counter = itertools.count()
    for name, array in sorted(arrays.items()):
        shard_shape = array.sharding.shard_shape(array.shape) if isinstance(array, jax.Array) else array.shape
        chunk_shape = choose_chunk_shape(array.shape, array.dtype.itemsize, CHUNK_BYTES, shard_shape)
        descriptions[f"{FOLDER}/{name}/zarr.json"] = describe_array(array.shape, np.dtype(array.dtype), chunk_shape)
        pieces += _own_pieces(name, array, chunk_shape, process_index, counter)
    _start_transfers(pieces)
    if memory is not None:
        memory.keep_only({piece.key for piece in pieces})
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        chunks = list(pool.map(lambda piece: piece.fetch(memory), pieces))
    return Snapshot(descriptions, [chunk for each in chunks for chunk in each])


class _Piece(NamedTuple):
    """Memory of one device, or of the host, that holds chunks of this process."""

    data: jax.Array | np.ndarray
    chunks: list[tuple[str, Slices, tuple[int, ...]]]
    """File, part of `data`, shape of the stored chunk."""
    is_whole: bool = True
    """Whether they are all of `data`; else there is one, and no more than that leaves the device."""

    @property
    def key(self) -> str:
        return self.chunks[0][0]

    def fetch(self, memory: Memory | None) -> list[Chunk]:
        data, chunks = self.data, self.chunks
        if not self.is_whole:
            ((file, part, shape),) = chunks
            sizes = [each.stop - each.start for each in part]
            data = jax.lax.dynamic_slice(data, [each.start for each in part], sizes)
            chunks = [(file, tuple(slice(0, size) for size in sizes), shape)]
        values = np.asarray(data)
        if memory is not None and _shares_host_memory(data):
            values = memory.copy(self.key, values)
        return [Chunk(file, values[(*part, ...)], shape) for file, part, shape in chunks]


def _own_pieces(
    name: str,
    array: jax.Array | np.ndarray,
    chunk_shape: tuple[int, ...],
    process_index: int,
    counter: Iterator[int],
) -> Iterator[_Piece]:
    chunks = ((f"{FOLDER}/{name}/{file}", part) for file, part in list_chunks(array.shape, chunk_shape))
    if not isinstance(array, jax.Array):
        if process_index == 0:
            own = [(file, part, chunk_shape) for file, part in chunks]
            yield from [_Piece(array, own)] if own else []
        return
    holders = _list_holders(array)
    by_shard: dict[Bounds, list[tuple[str, Slices, bool]]] = collections.defaultdict(list)
    for file, part in chunks:
        shard = _find_shard(part, array)
        owners = holders[shard]
        is_own = owners[next(counter) % len(owners)] == process_index
        by_shard[shard].append((file, _relative(part, shard), is_own))
    data = {find_bounds(shard.index, array.shape): shard.data for shard in array.addressable_shards}
    for shard, files in by_shard.items():
        own = [(file, part, chunk_shape) for file, part, is_own in files if is_own]
        if len(own) == len(files):
            yield _Piece(data[shard], own)
        else:  # other replicas bring the rest to their hosts
            yield from (_Piece(data[shard], [each], is_whole=False) for each in own)


def _list_holders(array: jax.Array) -> dict[Bounds, list[int]]:
    """Each different shard of an array, and the processes of the devices that hold it."""
    holders: dict[Bounds, list[int]] = collections.defaultdict(list)
    indices = array.sharding.devices_indices_map(array.shape)
    for device, index in sorted(indices.items(), key=lambda item: item[0].id):
        holders[find_bounds(index, array.shape)].append(device.process_index)
    return dict(holders)


def _find_shard(part: Slices, array: jax.Array) -> Bounds:
    sizes = array.sharding.shard_shape(array.shape)
    begins = (each.start // size * size for each, size in zip(part, sizes))
    return tuple((begin, begin + size) for begin, size in zip(begins, sizes))


def _relative(part: Slices, shard: Bounds) -> Slices:
    return tuple(slice(each.start - begin, each.stop - begin) for each, (begin, _) in zip(part, shard))


def _start_transfers(pieces: list[_Piece]) -> None:
    """Let accelerators send all at once that they hold anyway."""
    for piece in pieces:
        if piece.is_whole and isinstance(piece.data, jax.Array) and not _shares_host_memory(piece.data):
            piece.data.copy_to_host_async()


def _shares_host_memory(data: Any) -> bool:
    """Whether NumPy sees the device's own memory, which donation hands to the next update."""
    if not isinstance(data, jax.Array):
        return True
    (device,) = data.devices()
    return device.platform == "cpu" or "host" in (data.sharding.memory_kind or "")
