"""The arrays of a checkpoint by dotted name: one zarr3 folder each, of which each process reads what its devices hold.

A chunk is compared with the manifest in the same pass that brings it into memory, so that what was verified is what is
used, and no byte is read twice.
"""

import collections
import hashlib
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from t5pegasus.chunks import ArrayLayout, ChunkBuffer, Slices, StoredArray, open_with_tensorstore
from t5pegasus.errors import ArtifactError, reading
from t5pegasus.manifest import MANIFEST, DamagedError, Files, describe_difference, find_problems, read_manifest
from t5pegasus.storage import is_remote

FOLDER = "arrays"
Bounds = tuple[tuple[int, int], ...]
"""Part of an array: start and stop in every dimension."""
_NUM_THREADS = min(2 * (os.cpu_count() or 1) + 2, 16)
"""More than there are cores, since each waits for the disk in turn."""
_BYTES_AHEAD = 256 << 20
"""Read before they are asked for, so that reading goes on while an array is put on its devices."""


def list_arrays(path: Path) -> frozenset[str]:
    """The dotted names of a checkpoint's arrays: each has a folder."""
    return frozenset(file.parent.name for file in (path / FOLDER).glob("*/zarr.json"))


def open_arrays(path: Path) -> dict[str, StoredArray]:
    """The arrays of a checkpoint, by dotted name, to be read block by block."""
    with reading(path / FOLDER):
        return {name: StoredArray(path / FOLDER / name) for name in sorted(list_arrays(path))}


def load_arrays(
    path: Path,
    prefixes: tuple[str, ...] = ("",),
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
    *,
    verify: bool = True,
) -> dict[str, Any]:
    """The arrays whose names begin with one of the prefixes; other ones are not read.

    Args:
        path: a checkpoint folder; one without a manifest, which is not finished, cannot be verified.
        prefixes: e.g. ("parameters.",) for inference.
        shardings: by name, where each array shall lie, on any mesh of any processes, others not being read; None gives
            NumPy arrays.
        verify: compare every file that is read with the manifest.

    Raises:
        ArtifactError: if a name in `shardings` is not in the checkpoint.
        DamagedError: naming the file, if one is not as it was written.
    """
    files = read_manifest(path)["files"] if verify and (path / MANIFEST).is_file() else None
    stored = list_arrays(path)
    if shardings is not None and (absent := sorted(shardings.keys() - stored)):
        raise ArtifactError(f"checkpoint {path} has no array {absent[0]} ({len(absent)} missing)")
    names = sorted(name for name in stored if name.startswith(prefixes) and (shardings is None or name in shardings))
    loaded = {}
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        reader = _Reader(path, files, pool)
        try:
            for name, parts in reader.read_ahead(names, shardings or {}):
                loaded[name] = parts.place(None if shardings is None else shardings[name])
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return loaded


def find_bounds(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> Bounds:
    """The part that a sharding's index means; one that is None, or open, means all."""
    slices = index or tuple(slice(None) for _ in shape)
    return tuple(each.indices(size)[:2] for each, size in zip(slices, shape))


class _Parts(NamedTuple):
    """What one process needs of an array: each different part once, whichever devices hold it."""

    shape: tuple[int, ...]
    values: dict[Bounds, np.ndarray]

    @classmethod
    def allocate(cls, layout: ArrayLayout, sharding: jax.sharding.Sharding | None) -> "_Parts":
        if sharding is None:
            return cls(layout.shape, {find_bounds(None, layout.shape): np.empty(layout.shape, layout.dtype)})
        indices = sharding.addressable_devices_indices_map(layout.shape).values()
        bounds = sorted({find_bounds(index, layout.shape) for index in indices})
        # Not memory that was used before: a device on the host may share it with NumPy, whatever it is asked for.
        values = {each: np.empty([stop - start for start, stop in each], layout.dtype) for each in bounds}
        return cls(layout.shape, values)

    def place(self, sharding: jax.sharding.Sharding | None) -> Any:
        """The array itself: on the devices of a sharding, or in this process's memory."""
        if sharding is None:
            return next(iter(self.values.values()))
        shards = [
            # Memory that the device shares with NumPy could not be donated to the first update.
            jax.device_put(self.values[find_bounds(index, self.shape)], device, may_alias=False)
            for device, index in sharding.addressable_devices_indices_map(self.shape).items()
        ]
        jax.block_until_ready(shards)
        return jax.make_array_from_single_device_arrays(self.shape, sharding, shards)

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self.values.values())


class _Reader:
    """Reads files of one checkpoint into memory, in threads, comparing each with its entry in the manifest."""

    def __init__(self, path: Path, files: Files | None, pool: ThreadPoolExecutor):
        self._path, self._files, self._pool = path, files, pool
        self._local = threading.local()

    def read_ahead(
        self, names: Sequence[str], shardings: Mapping[str, jax.sharding.Sharding]
    ) -> Iterator[tuple[str, _Parts]]:
        """Arrays one after the other, while the next ones are being read."""
        waiting: collections.deque[tuple[str, _Parts, list[Future[None]]]] = collections.deque()
        ahead = 0
        for name in (*names, None):
            while waiting and (name is None or ahead > _BYTES_AHEAD):
                ready, parts, futures = waiting.popleft()
                ahead -= parts.nbytes
                for future in futures:
                    future.result()
                yield ready, parts
            if name is not None:
                layout = self._read_layout(name)
                parts = _Parts.allocate(layout, shardings.get(name))
                ahead += parts.nbytes
                waiting.append((name, parts, [self._pool.submit(task) for task in self._tasks(name, layout, parts)]))

    def _read_layout(self, name: str) -> ArrayLayout:
        file = f"{FOLDER}/{name}/zarr.json"
        content = (self._path / file).read_bytes()
        self._compare(file, len(content), content)
        with reading(self._path / file):
            return ArrayLayout.from_json(content)

    def _tasks(self, name: str, layout: ArrayLayout, parts: _Parts) -> Iterator[Callable[[], None]]:
        if layout.chunk_shape is None:
            yield lambda: self._decode(name, parts)
            return
        # Each chunk once, for all parts that have something of it.
        targets: dict[tuple[int, ...], list[tuple[Bounds, np.ndarray]]] = {}
        for bounds, values in parts.values.items():
            if values.size == 0:
                continue
            places = (range(start // step, -(-stop // step)) for (start, stop), step in zip(bounds, layout.chunk_shape))
            for index in itertools.product(*places):
                targets.setdefault(index, []).append((bounds, values))
        for index, wanted in targets.items():
            yield lambda index=index, wanted=wanted: self._read_chunk(name, layout, index, wanted)

    def _read_chunk(self, name: str, layout: ArrayLayout, index: tuple[int, ...], wanted: list[Any]) -> None:
        chunk_shape = layout.chunk_shape or ()
        file = "/".join([FOLDER, name, "c", *map(str, index)])
        copies = [(values, *_overlap(bounds, index, chunk_shape)) for bounds, values in wanted]
        (values, outer, _), *others = copies
        target = values[(*outer, ...)]  # also of a scalar an array
        if not others and target.shape == chunk_shape and target.flags.c_contiguous:
            self._read_file(file, layout.chunk_bytes, target)
            return
        chunk = self._scratch(layout.chunk_bytes).view(chunk_shape, layout.dtype)
        self._read_file(file, layout.chunk_bytes, chunk)
        for values, outer, inner in copies:
            values[outer] = chunk[inner]

    def _scratch(self, num_bytes: int) -> ChunkBuffer:
        if getattr(self._local, "num_bytes", -1) < num_bytes:
            self._local.buffer, self._local.num_bytes = ChunkBuffer(num_bytes), num_bytes
        return self._local.buffer

    def _read_file(self, name: str, num_bytes: int, target: np.ndarray) -> None:
        """Fill an array from the beginning of a file; Orbax puts an index behind the values."""
        content = target.reshape(-1).view(np.uint8).data
        try:
            rest = _fill(self._path / name, content)
        except FileNotFoundError:
            raise DamagedError(self._path, f"file {name} is missing") from None
        if rest is None:
            raise DamagedError(self._path, f"file {name} is damaged: it is cut short, {num_bytes:,} bytes were written")
        self._compare(name, num_bytes + len(rest), content, rest)

    def _compare(self, name: str, num_bytes: int, *content: bytes | memoryview) -> None:
        if self._files is None:
            return
        if name not in self._files:
            raise DamagedError(self._path, f"file {name} is not in the manifest")
        digest = hashlib.sha256()
        for each in content:
            digest.update(each)
        problem = describe_difference(name, self._files[name], num_bytes, digest.hexdigest())
        if problem is not None:
            raise DamagedError(self._path, problem)

    def _decode(self, name: str, parts: _Parts) -> None:
        """A compressed array: its files are read twice, first to be compared."""
        if self._files is not None:
            for problem in find_problems(self._path, lambda file: file.startswith(f"{FOLDER}/{name}/")):
                raise DamagedError(self._path, problem)
        with reading(self._path / FOLDER / name):
            store = open_with_tensorstore(self._path / FOLDER / name)
            for bounds, values in parts.values.items():
                values[...] = store[tuple(slice(*each) for each in bounds)].read().result()


def _fill(path: Path, content: memoryview) -> bytes | None:
    """Read a file into memory; what it has beyond that, None if it ends before."""
    if is_remote(path):
        whole = path.read_bytes()
        if len(whole) < len(content):
            return None
        content[:] = whole[: len(content)]
        return whole[len(content) :]
    with path.open("rb", buffering=0) as file:
        done = 0
        while done < len(content):
            got = file.readinto(content[done:])
            if not got:
                return None
            done += got
        return file.read()


def _overlap(bounds: Bounds, index: tuple[int, ...], chunk_shape: tuple[int, ...]) -> tuple[Slices, Slices]:
    """Of a part and a chunk: where what they share lies in the part, and in the chunk."""
    shared = [
        (start, place * step, max(start, place * step), min(stop, (place + 1) * step))
        for (start, stop), place, step in zip(bounds, index, chunk_shape)
    ]
    outer = tuple(slice(first - start, last - start) for start, _, first, last in shared)
    return outer, tuple(slice(first - begin, last - begin) for _, begin, first, last in shared)
