"""One array of a checkpoint on disk as zarr3 chunk files of bounded size, read and written block by block.

Chunks that `write_chunk` writes are the plain little-endian bytes of consecutive rows, so that what is in memory is
what is hashed, checked and stored: float noise does not compress, and `manifest.json` has a checksum of every file.
"""

import errno
import fcntl
import itertools
import json
import math
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from t5pegasus.errors import ArtifactError, writing
from t5pegasus.manifest import describe_bytes
from t5pegasus.storage import is_remote, write_bytes

CHUNK_BYTES = 16 << 20
"""Chunks are at most so large. A disk is as fast as with larger ones, and a reader of a slice needs little memory."""
_DIRECT = getattr(os, "O_DIRECT", 0)  # macOS has none
_ALIGNMENT = 4096  # of memory, offset and length in direct I/O; a multiple of every disk's block size in use

# TensorStore would start a thread for each core of the machine, and each takes memory.
_CONTEXT = ts.Context({"data_copy_concurrency": {"limit": 2}, "file_io_concurrency": {"limit": 4}})

Slices = tuple[slice, ...]


class ArrayLayout(NamedTuple):
    """What `zarr.json` says of an array."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk_shape: tuple[int, ...] | None
    """Of chunks whose files begin with their values as little-endian bytes; None if they are stored otherwise."""

    @classmethod
    def from_json(cls, content: bytes) -> "ArrayLayout":
        """The layout in the content of a `zarr.json`."""
        metadata = json.loads(content)
        return cls(tuple(metadata["shape"]), ts.dtype(metadata["data_type"]).numpy_dtype, _find_plain_chunks(metadata))

    @property
    def chunk_bytes(self) -> int:
        """The size of the values of a plain chunk."""
        return math.prod(self.chunk_shape or ()) * self.dtype.itemsize


class StoredArray:
    """An array on disk of which any block can be read; threads may share it.

    A block costs memory and time of its own size, where chunks lie as plain bytes. Compressed ones are decoded whole,
    and if they are larger than those that are written today, kept until `release`.
    """

    def __init__(self, path: Path):
        self._path = path
        self.shape, self.dtype, self._chunk_shape = ArrayLayout.from_json((path / "zarr.json").read_bytes())
        self._store: Any = open_with_tensorstore(path) if self._chunk_shape is None else None
        self._keeps_decoded = False
        self._decoded: np.ndarray | None = None
        self._lock = threading.Lock()
        if self._store is not None:
            decoded = (size or 1 for size in self._store.chunk_layout.read_chunk.shape or ())
            self._keeps_decoded = math.prod(decoded) * self.dtype.itemsize > 2 * CHUNK_BYTES

    def read(self, part: Slices | None = None) -> np.ndarray:
        """`array[part]`, with a start and a stop for every dimension, or all of it, in memory of its own."""
        if part is None:
            part = tuple(slice(0, size) for size in self.shape)
        if self._chunk_shape is not None:
            return self._read_plain(part, self._chunk_shape)
        if not self._keeps_decoded:
            return self._store[part].read().result()
        with self._lock:
            decoded = self._store.read().result() if self._decoded is None else self._decoded
            self._decoded = decoded
        return decoded[part].copy()

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def release(self) -> None:
        """Give back what is kept in memory; it can still be read."""
        self._decoded = None

    def _read_plain(self, part: Slices, chunk_shape: tuple[int, ...]) -> np.ndarray:
        shape = tuple(each.stop - each.start for each in part)
        places = [range(each.start // step, -(-each.stop // step)) for each, step in zip(part, chunk_shape)]
        if math.prod(map(len, places)) == 1:
            begin = [place[0] * step for place, step in zip(places, chunk_shape)]
            inner = tuple(slice(each.start - first, each.stop - first) for each, first in zip(part, begin))
            return self._read_chunk([place[0] for place in places], chunk_shape, inner)
        block = np.empty(shape, self.dtype)
        for index in itertools.product(*places):
            inner, outer = [], []
            for each, place, step in zip(part, index, chunk_shape):
                first, last = max(each.start, place * step), min(each.stop, (place + 1) * step)
                inner.append(slice(first - place * step, last - place * step))
                outer.append(slice(first - each.start, last - each.start))
            block[tuple(outer)] = self._read_chunk(index, chunk_shape, tuple(inner))
        return block

    def _read_chunk(self, index: Sequence[int], chunk_shape: tuple[int, ...], inner: Slices) -> np.ndarray:
        """Part of one chunk, from no more of its file than lies between the part's first and last entry."""
        steps = [math.prod(chunk_shape[dimension + 1 :]) for dimension in range(len(chunk_shape))]
        first = sum(part.start * step for part, step in zip(inner, steps))
        count = sum((part.stop - 1 - part.start) * step for part, step in zip(inner, steps)) + 1
        values = np.empty(count, self.dtype)
        path = self._path.joinpath("c", *map(str, index))
        content = values.view(np.uint8).data
        with path.open("rb", buffering=0) as file:
            file.seek(first * self.dtype.itemsize)
            done = 0
            while done < len(content):
                got = file.readinto(content[done:])
                if not got:
                    raise ArtifactError(f"{path} is cut short; copy the checkpoint anew, or use another step")
                done += got
        shape = tuple(part.stop - part.start for part in inner)
        if math.prod(shape) == count:
            return values.reshape(shape)
        strides = tuple(step * self.dtype.itemsize for step in steps)
        return np.lib.stride_tricks.as_strided(values, shape, strides, writeable=False)


def open_with_tensorstore(path: Path) -> Any:
    """An array in any layout of zarr3, such as a compressed one.

    Raises:
        ArtifactError: if it lies in an object store.
    """
    if is_remote(path):
        raise ArtifactError(f"{path} is compressed, and read from a local disk only; copy the checkpoint there first")
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path.absolute())}}
    return ts.open(spec, read=True, open=True, context=_CONTEXT).result()


def _find_plain_chunks(metadata: dict[str, Any]) -> tuple[int, ...] | None:
    """The shape of chunks whose files begin with their values as little-endian bytes; None if they do not.

    Orbax wraps each chunk into a shard of one, which appends an index.
    """
    chunk_shape = metadata["chunk_grid"]["configuration"]["chunk_shape"]
    (outer, *others), plain = metadata["codecs"], {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = outer["configuration"] if outer["name"] == "sharding_indexed" else {}
    if sharding.get("chunk_shape") == chunk_shape and sharding.get("index_location", "end") == "end":
        outer, *others = [*sharding["codecs"], *others]
    is_plain = outer == plain and not others and metadata["chunk_key_encoding"] == {"name": "default"}
    return tuple(chunk_shape) if is_plain else None


def choose_chunk_shape(
    shape: tuple[int, ...], itemsize: int, limit: int = CHUNK_BYTES, shard_shape: tuple[int, ...] | None = None
) -> tuple[int, ...]:
    """Cut the leading dimensions, as evenly as possible, so that a chunk is consecutive rows of at most `limit` bytes.

    It is a function of the array, and of how it is divided into shards, alone, whoever writes it. No chunk lies in two
    shards, so that each can be written by one process.

    Args:
        shape: of the array.
        itemsize: bytes of one entry.
        limit: bytes of one chunk.
        shard_shape: of the part of the array that a device holds; it divides `shape`.
    """
    shard = shard_shape or shape
    for dimension, size in enumerate(shard):
        row_bytes = math.prod(shard[dimension + 1 :]) * itemsize
        if row_bytes <= limit:
            num_chunks = max(1, -(-size * row_bytes // limit))
            while -(-size // num_chunks) * row_bytes > limit or (size != shape[dimension] and size % num_chunks):
                num_chunks += 1
            return (1,) * dimension + (max(1, -(-size // num_chunks)), *shard[dimension + 1 :])
    return (1,) * len(shape)


def list_chunks(shape: tuple[int, ...], chunk_shape: tuple[int, ...]) -> Iterator[tuple[str, Slices]]:
    """Name of the file below the array's folder, and the part of the array, of every chunk in C order."""
    for index in itertools.product(*(range(-(-size // step)) for size, step in zip(shape, chunk_shape))):
        part = tuple(
            slice(place * step, min((place + 1) * step, size)) for place, step, size in zip(index, chunk_shape, shape)
        )
        yield "/".join(["c", *map(str, index)]), part


def cut_rows(part: Slices, itemsize: int, limit: int) -> Iterator[Slices]:
    """Divide a part of an array further, as `choose_chunk_shape` would, in C order."""
    begin = tuple(each.start for each in part)
    shape = tuple(each.stop - each.start for each in part)
    for _, inner in list_chunks(shape, choose_chunk_shape(shape, itemsize, limit)):
        yield tuple(slice(first + each.start, first + each.stop) for first, each in zip(begin, inner))


def describe_array(shape: tuple[int, ...], dtype: np.dtype, chunk_shape: tuple[int, ...]) -> bytes:
    """The content of `zarr.json`."""
    metadata = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk_shape}},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        "fill_value": 0 if dtype.kind in "iu" else False if dtype.kind == "b" else 0.0,
    }
    return json.dumps(metadata).encode()


def describe_arrays(names: list[str]) -> dict[str, bytes]:
    """The files beside the arrays without which Orbax does not know what they are; here without its time stamps."""
    tree = {
        f"('{name}',)": {
            "key_metadata": [{"key": name, "key_type": 2}],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
        for name in sorted(names)
    }
    handler = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
    contents: dict[str, dict[str, Any]] = {
        "_METADATA": {
            "tree_metadata": tree,
            "use_ocdbt": False,
            "use_zarr3": True,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        },
        "_CHECKPOINT_METADATA": {"item_handlers": handler, "metrics": {}, "performance_metrics": {}},
    }
    return {name: json.dumps(content).encode() for name, content in contents.items()}


class ChunkBuffer:
    """Memory for one chunk at a time, placed so that the disk can fetch it without a copy."""

    def __init__(self, num_bytes: int):
        self._memory = mmap.mmap(-1, max(1, num_bytes))

    def view(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """The beginning of the buffer as an array; what it held before is still there."""
        return np.frombuffer(self._memory, dtype, math.prod(shape)).reshape(shape)


def write_chunk(path: Path, chunk: np.ndarray) -> dict[str, Any]:
    """Write a file and force it to the disk, or put it into the store.

    Args:
        path: in a folder that exists.
        chunk: whole, also at the edge of the array; contiguous and little-endian, best in a ChunkBuffer.

    Returns:
        Its entry in the manifest.

    Raises:
        OSError: if the disk is full, or fails in another way.
    """
    content = chunk.reshape(-1).view(np.uint8).data
    if is_remote(path):
        write_bytes(path, bytes(content))
        return describe_bytes(content)
    with writing(path):
        try:
            _write(path, content, _DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL or not _DIRECT:
                raise
            _write(path, content, 0)  # a file system, or memory, that direct I/O cannot do
    return describe_bytes(content)


def _write(path: Path, content: memoryview, direct: int) -> None:
    """Write a file past the page cache where `direct` is O_DIRECT: copying there costs more than all else of growth."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | direct, 0o666)
    try:
        whole = len(content) - len(content) % _ALIGNMENT if direct else len(content)
        written = 0
        while written < whole:
            written += os.write(descriptor, content[written:whole])
        if whole < len(content):
            fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~direct)
        while written < len(content):
            written += os.write(descriptor, content[written:])
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
