"""Writing a checkpoint: each process its chunks, the first one what binds them together, all by files."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from t5pegasus.checkpoint.folder import commit_checkpoint, find_process, make_unfinished_folder, unfinished_folder
from t5pegasus.checkpoint.info import CheckpointInfo
from t5pegasus.checkpoint.meeting import Meeting, draw_token
from t5pegasus.checkpoint.snapshot import Chunk, Snapshot, take_snapshot
from t5pegasus.chunks import ChunkBuffer, write_chunk
from t5pegasus.errors import writing
from t5pegasus.storage import TakenOverError, is_remote, remove_tree

_NUM_THREADS, _NUM_REMOTE_THREADS = 4, 16


def save_checkpoint(
    path: Path,
    arrays: Mapping[str, jax.Array | np.ndarray],
    info: CheckpointInfo,
    tokenizer_path: Path,
    add_files: Callable[[Path], None] | None = None,
) -> None:
    """Write a checkpoint and wait for the disk; every process of a multi-process run calls it.

    Args:
        path: the folder to create; what lies there already is replaced only once the new one is whole (in an object
            store, where nothing can be renamed, it is copied aside, and `finish_saves` brings it back).
        arrays: by dotted name; names beginning with `parameters.` are required.
        info: see CheckpointInfo.
        tokenizer_path: folder copied to `tokenizer/`.
        add_files: called with the unfinished folder, on the first process, to put more into it.

    Raises:
        OSError: if the disk is full, or fails in another way; nothing of the new checkpoint is left then.
    """
    process = find_process()
    snapshot = take_snapshot(arrays, process[0])
    write_checkpoint(Meeting(path, draw_token(), process), snapshot, info, tokenizer_path, add_files)


def write_checkpoint(
    meeting: Meeting,
    snapshot: Snapshot,
    info: CheckpointInfo,
    tokenizer_path: Path,
    add_files: Callable[[Path], None] | None = None,
    require_ours: Callable[[], None] = lambda: None,
) -> None:
    """This process's part of a checkpoint that all processes write together, as `save_checkpoint`; needs no device.

    `require_ours` is called by the first process before it deletes anything that lies there.
    """
    path, unfinished = meeting.path, unfinished_folder(meeting.path)
    first = meeting.index == 0

    def prepare() -> None:
        require_ours()
        make_unfinished_folder(path)

    try:
        with _naming(path):
            meeting.begin(prepare)
            entries = _write_arrays(unfinished, snapshot, describes=first)
            meeting.hand_in(entries)
            if first:
                known = entries | meeting.gather()
                commit_checkpoint(unfinished, path, info, tokenizer_path, add_files, known)
    except BaseException as error:
        _give_up(meeting, unfinished, error, require_ours)
        raise
    meeting.end()
    meeting.wait_for_end(entries)


def save_arrays(folder: Path, arrays: Mapping[str, jax.Array | np.ndarray]) -> dict[str, Any]:
    """Write `arrays/` below a folder, by one process; the chunks' entries in a manifest are returned."""
    return _write_arrays(folder, take_snapshot(arrays), describes=True)


def _write_arrays(folder: Path, snapshot: Snapshot, *, describes: bool) -> dict[str, Any]:
    for name, content in snapshot.descriptions.items() if describes else ():
        with writing(folder / name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    return _write_chunks(folder, snapshot.chunks)


def _write_chunks(folder: Path, chunks: list[Chunk]) -> dict[str, Any]:
    """Write files in threads; after an error none is begun any more. Their entries are of what was in memory."""
    local = threading.local()
    num_bytes = max((np.prod(chunk.shape, dtype=int) * chunk.values.itemsize for chunk in chunks), default=0)

    def write(chunk: Chunk) -> dict[str, Any]:
        if not hasattr(local, "buffer"):
            local.buffer = ChunkBuffer(int(num_bytes))
        content = local.buffer.view(chunk.shape, chunk.values.dtype)
        if chunk.values.shape != chunk.shape:
            content[...] = 0  # a chunk at the edge is stored whole
        content[(*(slice(0, size) for size in chunk.values.shape), ...)] = chunk.values
        return write_chunk(folder / chunk.file, content)

    for parent in dict.fromkeys((folder / chunk.file).parent for chunk in chunks):
        parent.mkdir(parents=True, exist_ok=True)  # not in the threads, where one's error could be hidden by another
    with ThreadPoolExecutor(_NUM_REMOTE_THREADS if is_remote(folder) else _NUM_THREADS) as pool:
        futures = [pool.submit(write, chunk) for chunk in chunks]
        try:
            return {chunk.file: future.result() for chunk, future in zip(chunks, futures)}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _give_up(meeting: Meeting, unfinished: Path, error: BaseException, require_ours: Callable[[], None]) -> None:
    """Tell the others, and leave nothing of it. What fails here too is no news: it is the same disk.

    Raises:
        TakenOverError: if this is what the error comes from: the new job has cleared away what was being written.
    """
    meeting.give_up(error)
    if meeting.index == 0 and not isinstance(error, TakenOverError):
        with contextlib.suppress(OSError):
            require_ours()  # what another job has begun under this name since is whole, or will be
            remove_tree(unfinished)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Around writes to a checkpoint's unfinished folder: errors name the checkpoint, by the name that users know."""
    try:
        yield
    except OSError as error:
        if str(error.filename or path).startswith(str(path)):
            error.filename, error.filename2 = str(path), None
        raise
