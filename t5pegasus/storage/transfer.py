"""Moving objects: one by one with retries, several at a time."""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from t5pegasus.storage.attempts import attempt
from t5pegasus.storage.paths import is_remote

NUM_THREADS = 16
"""Transfers at a time: what a store gives one connection is far below what it gives a machine."""
PART_BYTES = 64 << 20
"""Read at once on the way down, so that a broken connection costs this much."""


def transfer(source: Path, target: Path) -> None:
    """Copy one file where at least one side is an object."""
    from_store: Any = source
    to_store: Any = target
    if not is_remote(source) and source.stat().st_size > PART_BYTES:  # read part by part as it goes
        attempt(target, "write", lambda: to_store.fs.put_file(str(source), to_store.path))
    elif not is_remote(source):
        target.write_bytes(source.read_bytes())
    elif is_remote(target) and type(source) is type(target):
        attempt(target, "write", lambda: from_store.fs.cp_file(from_store.path, to_store.path))
    elif is_remote(target):
        target.write_bytes(source.read_bytes())
    else:
        download(source, target)


def download(source: Path, target: Path) -> None:
    """Copy an object to a local file, part by part; the caller gives it its final name."""
    from t5pegasus.storage.remote_path import read_object_range

    size = int(source.stat().st_size)
    with target.open("wb") as file:
        for offset in range(0, size, PART_BYTES):
            file.write(read_object_range(source, offset, min(PART_BYTES, size - offset)))
        file.flush()
        os.fsync(file.fileno())


def transfer_all(pairs: Iterable[tuple[Path, Path]]) -> None:
    """Copy many files, several at a time; the first error ends it."""
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        futures = [pool.submit(transfer, source, target) for source, target in pairs]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def delete_all(paths: Sequence[Path]) -> None:
    """Delete objects: the first one before all others."""
    if not paths:
        return
    paths[0].unlink(missing_ok=True)
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        list(pool.map(lambda path: path.unlink(missing_ok=True), paths[1:]))
