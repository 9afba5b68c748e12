"""The arrays of a checkpoint by dotted name: one zarr3 folder each, of which each process reads what its devices hold.

A chunk is compared with the manifest in the same pass that brings it into memory, so that what was verified is what is
used, and no byte is read twice. Devices whose memory is the host's are read into; others are sent what was read.
"""

import collections
import hashlib
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from t5pegasus.chunks import ArrayLayout, ChunkBuffer, Slices, StoredArray, open_with_tensorstore
from t5pegasus.errors import ArtifactError, reading
from t5pegasus.manifest import MANIFEST, DamagedError, Files, describe_difference, find_problems, read_manifest
from t5pegasus.parts import Bounds, Parts, count_parts, make_zeros, part_bytes
from t5pegasus.storage import is_remote

FOLDER = "arrays"
_NUM_THREADS = min(2 * (os.cpu_count() or 1) + 2, 16)
"""More than there are cores, since each waits for the disk in turn."""
_PIECE_BYTES = 1 << 20
"""Read at once: the next piece is on its way from the disk while this one is looked at, in the processor's cache."""
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
    """The arrays whose names are, or lie below, one of the prefixes; other ones are not read.

    Args:
        path: a checkpoint folder; one without a manifest, which is not finished, cannot be verified.
        prefixes: whole parts of dotted names, e.g. ("parameters.",) for inference; the last dot may be left out. An
            empty one means all.
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
    below = tuple(prefix and f"{prefix.removesuffix('.')}." for prefix in prefixes)
    names = sorted(n for n in stored if f"{n}.".startswith(below) and (shardings is None or n in shardings))
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


class _Reader:
    """Reads files of one checkpoint into memory, in threads, comparing each with its entry in the manifest."""

    def __init__(self, path: Path, files: Files | None, pool: ThreadPoolExecutor):
        self._path, self._files, self._pool = path, files, pool
        self._local = threading.local()
        self._zeros = make_zeros(0)

    def read_ahead(
        self, names: Sequence[str], shardings: Mapping[str, jax.sharding.Sharding]
    ) -> Iterator[tuple[str, Parts]]:
        """Arrays one after the other, while the next ones are being read."""
        waiting: collections.deque[tuple[str, int, Future[tuple[Parts, list[Future[None]]]]]] = collections.deque()
        ahead = 0
        layouts = dict(zip(names, self._pool.map(self._read_layout, names)))
        sizes = {name: part_bytes(layout, shardings.get(name)) for name, layout in layouts.items()}
        self._zeros = make_zeros(max(sizes.values(), default=0) if shardings else 0)
        for name in (*names, None):
            while waiting and (name is None or ahead > _BYTES_AHEAD):
                ready, num_bytes, started = waiting.popleft()
                ahead -= num_bytes
                parts, futures = started.result()
                for future in futures:
                    future.result()
                yield ready, parts
            if name is not None:
                started = self._pool.submit(self._start, name, layouts[name], shardings.get(name))
                num_bytes = sizes[name] * count_parts(layouts[name], shardings.get(name))
                ahead += num_bytes
                waiting.append((name, num_bytes, started))

    def _start(
        self, name: str, layout: ArrayLayout, sharding: jax.sharding.Sharding | None
    ) -> tuple[Parts, list[Future[None]]]:
        """Memory, which takes the kernel longer to hand out than to read from a page cache, and what will fill it."""
        parts = Parts.allocate(layout, sharding, self._zeros)
        return parts, [self._pool.submit(task) for task in self._tasks(name, layout, parts)]

    def _read_layout(self, name: str) -> ArrayLayout:
        file = f"{FOLDER}/{name}/zarr.json"
        content = (self._path / file).read_bytes()
        self._compare(file, len(content), hashlib.sha256(content))
        with reading(self._path / file):
            return ArrayLayout.from_json(content)

    def _tasks(self, name: str, layout: ArrayLayout, parts: Parts) -> Iterator[Callable[[], None]]:
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
        content, digest = target.reshape(-1).view(np.uint8).data, hashlib.sha256()
        look = (lambda _: None) if self._files is None else digest.update
        try:
            rest = _fill(self._path / name, content, look)
        except FileNotFoundError:
            raise DamagedError(self._path, f"file {name} is missing") from None
        if rest is None:
            raise DamagedError(self._path, f"file {name} is damaged: it is cut short, {num_bytes:,} bytes were written")
        self._compare(name, num_bytes + rest, digest)

    def _compare(self, name: str, num_bytes: int, digest: Any) -> None:
        if self._files is None:
            return
        if name not in self._files:
            raise DamagedError(self._path, f"file {name} is not in the manifest")
        problem = describe_difference(name, self._files[name], num_bytes, digest.hexdigest())
        if problem is not None:
            raise DamagedError(self._path, problem)

    def _decode(self, name: str, parts: Parts) -> None:
        """A compressed array: its files are read twice, first to be compared."""
        if self._files is not None:
            for problem in find_problems(self._path, lambda file: file.startswith(f"{FOLDER}/{name}/")):
                raise DamagedError(self._path, problem)
        with reading(self._path / FOLDER / name):
            store = open_with_tensorstore(self._path / FOLDER / name)
            for bounds, values in parts.values.items():
                values[...] = store[tuple(slice(*each) for each in bounds)].read().result()


def _fill(path: Path, content: memoryview, look: Callable[[bytes | memoryview], Any]) -> int | None:
    """Read a file into memory, and look at all of it; how many bytes it has beyond that, None if it ends before."""
    if is_remote(path):
        whole = path.read_bytes()
        if len(whole) < len(content):
            return None
        content[:] = whole[: len(content)]
        look(whole)
        return len(whole) - len(content)
    with path.open("rb", buffering=0) as file:
        done = 0
        while done < len(content):
            got = file.readinto(content[done : done + _PIECE_BYTES])
            if not got:
                return None
            look(content[done : done + got])
            done += got
        rest = file.read()
        look(rest)
        return len(rest)


def _overlap(bounds: Bounds, index: tuple[int, ...], chunk_shape: tuple[int, ...]) -> tuple[Slices, Slices]:
    """Of a part and a chunk: where what they share lies in the part, and in the chunk."""
    shared = [
        (start, place * step, max(start, place * step), min(stop, (place + 1) * step))
        for (start, stop), place, step in zip(bounds, index, chunk_shape)
    ]
    outer = tuple(slice(first - start, last - start) for start, _, first, last in shared)
    return outer, tuple(slice(first - begin, last - begin) for _, begin, first, last in shared)
