"""Growth of stored arrays out of core: block by block from one checkpoint's arrays to another's.

Memory is a few blocks and chunks per thread, whatever the size of the model. Every block is decided by itself, so it
does not matter which process writes it, in which order, or whether an earlier call already has.
"""

import dataclasses
import itertools
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from growth.journal import Journal
from growth.statistics import Gathering, LeafStatistics
from t5pegasus.arrays import FOLDER
from t5pegasus.chunks import (
    CHUNK_BYTES,
    ChunkBuffer,
    Slices,
    StoredArray,
    choose_chunk_shape,
    cut_rows,
    describe_array,
    describe_arrays,
    list_chunks,
    write_chunk,
)

BLOCK_BYTES = 2 << 20
"""A chunk is computed in blocks of this size, which stay in the processor's cache from one step to the next."""
NUM_THREADS = min(os.cpu_count() or 1, 8) + 1
"""One more than there are cores, since each waits for the disk in turn."""

Item = TypeVar("Item")


class Leaf(Protocol):
    """One array to make, as a function of the stored array of the same name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """Of the array."""
        ...

    @property
    def reads_source(self) -> bool:
        """Whether `compute` looks at the values it is given."""
        ...

    def source_slices(self, target: Slices) -> Slices:
        """The part of the stored array that a block is made of."""
        ...

    def compute(self, block: np.ndarray, target: Slices) -> np.ndarray:
        """A block of the array, from that part."""
        ...


class KnownArray:
    """A leaf whose values are known, as those of counters and records of axes are."""

    reads_source = False

    def __init__(self, array: np.ndarray):
        self._array = array
        self.shape, self.dtype = array.shape, array.dtype

    def source_slices(self, target: Slices) -> Slices:
        """Nothing."""
        return ()

    def compute(self, block: np.ndarray, target: Slices) -> np.ndarray:
        """The part itself."""
        return self._array[target]


@dataclasses.dataclass(frozen=True)
class StreamReport:
    """What one process did."""

    bytes_read: int
    """Of the stored arrays, blocks that were read again counted again."""
    bytes_written: int
    bytes_found: int
    """Written by an earlier call that was interrupted."""


@dataclasses.dataclass(frozen=True)
class _ChunkFile:
    name: str
    leaf: str
    chunk_shape: tuple[int, ...]
    part: Slices


def gather_statistics(
    stored: Mapping[str, StoredArray], gatherings: Mapping[str, Gathering], num_threads: int = NUM_THREADS
) -> dict[str, LeafStatistics]:
    """Read arrays once, block by block, for what must be known of them before they grow.

    Args:
        stored: the source's arrays by name.
        gatherings: of the names to read.
        num_threads: arrays read at the same time.
    """

    def gather(name: str) -> None:
        for part in cut_rows(_whole(stored[name].shape), stored[name].dtype.itemsize, BLOCK_BYTES):
            gatherings[name].add(stored[name].read(part), part)
        stored[name].release()

    _run(gather, sorted(gatherings, key=lambda name: -math.prod(stored[name].shape)), num_threads)
    return {name: gathering.finish() for name, gathering in gatherings.items()}


def write_leaves(
    folder: Path,
    stored: Mapping[str, StoredArray],
    leaves: Mapping[str, Leaf],
    journal: Journal,
    *,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = NUM_THREADS,
    chunk_bytes: int = CHUNK_BYTES,
    advance: Callable[[int], None] = lambda _: None,
) -> StreamReport:
    """Write the chunks of `arrays/` that fall to this process and are not there yet.

    Each is on the disk before the journal has it.

    Args:
        folder: of the unfinished checkpoint.
        stored: the source's arrays by name.
        leaves: the arrays to make, by name; those that read need the stored array of the same name.
        journal: of the unfinished checkpoint.
        process_index: of this process.
        process_count: the processes that share the work; the first one also writes what describes the arrays.
        num_threads: chunks in work at the same time.
        chunk_bytes: largest size of a chunk.
        advance: called with the number of bytes of each chunk that is done.

    Raises:
        OSError: if the disk is full, or fails in another way.
    """
    if process_index == 0:
        _describe(folder / FOLDER, leaves, chunk_bytes)
    own = list(itertools.islice(_list_files(leaves, chunk_bytes), process_index, None, process_count))
    found = journal.find_whole(chunk.name for chunk in own)
    work = _Work(folder, stored, leaves, journal, advance)
    left = [chunk for chunk in own if chunk.name not in found]
    work.count_chunks(left)
    bytes_found = sum(entry["bytes"] for entry in found.values())
    advance(bytes_found)
    _run(work.write, left, num_threads)
    return StreamReport(work.bytes_read, work.bytes_written, bytes_found)


def count_bytes(leaves: Mapping[str, Leaf]) -> int:
    """The size of arrays."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves.values())


class _Work:
    """What the threads of `write_leaves` share."""

    def __init__(
        self,
        folder: Path,
        stored: Mapping[str, StoredArray],
        leaves: Mapping[str, Leaf],
        journal: Journal,
        advance: Callable[[int], None],
    ):
        self.folder, self.stored, self.leaves, self.journal, self.advance = folder, stored, leaves, journal, advance
        self.bytes_read = self.bytes_written = 0
        self._lock = threading.Lock()
        self._local = threading.local()
        self._chunks_left: dict[str, int] = {}
        self._buffer_bytes = 0

    def count_chunks(self, chunks: Iterable[_ChunkFile]) -> None:
        for chunk in chunks:
            self._chunks_left[chunk.leaf] = self._chunks_left.get(chunk.leaf, 0) + 1
            num_bytes = math.prod(chunk.chunk_shape) * self.leaves[chunk.leaf].dtype.itemsize
            self._buffer_bytes = max(self._buffer_bytes, num_bytes)

    def write(self, chunk: _ChunkFile) -> None:
        leaf = self.leaves[chunk.leaf]
        if not hasattr(self._local, "buffer"):
            self._local.buffer = ChunkBuffer(self._buffer_bytes)
        content = self._local.buffer.view(chunk.chunk_shape, leaf.dtype)
        if content.shape != tuple(part.stop - part.start for part in chunk.part):
            content[...] = 0  # a chunk at the edge is stored whole
        begin = tuple(part.start for part in chunk.part)
        bytes_read = 0
        for target in cut_rows(chunk.part, leaf.dtype.itemsize, BLOCK_BYTES):
            block = self._read(chunk.leaf, leaf, target)
            bytes_read += block.nbytes if leaf.reads_source else 0
            inner = tuple(slice(part.start - first, part.stop - first) for part, first in zip(target, begin))
            grown = leaf.compute(block, target)
            if (grown.shape, grown.dtype) != (content[inner].shape, content.dtype):
                raise TypeError(
                    f"{chunk.leaf}: block {target} is {grown.dtype}{grown.shape}, "
                    f"{content.dtype}{content[inner].shape} was wanted"
                )
            content[inner] = grown
        path = self.folder / chunk.name
        path.parent.mkdir(parents=True, exist_ok=True)
        entry = write_chunk(path, content)
        self.journal.add(chunk.name, entry)
        self._count(chunk.leaf, bytes_read, entry["bytes"])

    def _read(self, name: str, leaf: Leaf, target: Slices) -> np.ndarray:
        part = leaf.source_slices(target)
        if leaf.reads_source:
            return self.stored[name].read(part)
        return np.zeros([each.stop - each.start for each in part], leaf.dtype)

    def _count(self, name: str, bytes_read: int, bytes_written: int) -> None:
        with self._lock:
            self.bytes_read += bytes_read
            self.bytes_written += bytes_written
            self._chunks_left[name] -= 1
            if not self._chunks_left[name] and name in self.stored:
                self.stored[name].release()
            self.advance(bytes_written)


def _list_files(leaves: Mapping[str, Leaf], chunk_bytes: int) -> Iterator[_ChunkFile]:
    for name, leaf in leaves.items():
        chunk_shape = choose_chunk_shape(leaf.shape, leaf.dtype.itemsize, chunk_bytes)
        for file, part in list_chunks(leaf.shape, chunk_shape):
            yield _ChunkFile(f"{FOLDER}/{name}/{file}", name, chunk_shape, part)


def _describe(folder: Path, leaves: Mapping[str, Leaf], chunk_bytes: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in describe_arrays(list(leaves)).items():
        (folder / name).write_bytes(content)
    for name, leaf in leaves.items():
        chunk_shape = choose_chunk_shape(leaf.shape, leaf.dtype.itemsize, chunk_bytes)
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "zarr.json").write_bytes(describe_array(leaf.shape, leaf.dtype, chunk_shape))


def _run(function: Callable[[Item], None], items: Iterable[Item], num_threads: int) -> None:
    """Call a function on every item, in threads; after an error none is begun any more."""
    stopped = threading.Event()

    def call(item: Item) -> None:
        if not stopped.is_set():
            try:
                function(item)
            except BaseException:
                stopped.set()
                raise

    with ThreadPoolExecutor(num_threads) as pool:
        futures = [pool.submit(call, item) for item in items]
        try:
            for future in futures:
                future.result()
        finally:
            stopped.set()


def _whole(shape: tuple[int, ...]) -> Slices:
    return tuple(slice(0, size) for size in shape)
