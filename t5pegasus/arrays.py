"""The arrays of a checkpoint by dotted name, through Orbax and TensorStore: one zarr3 folder each."""

import contextlib
import logging
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from t5pegasus.chunks import CHUNK_BYTES, StoredArray
from t5pegasus.errors import ArtifactError, reading

FOLDER = "arrays"
_ECHOES = (
    "Skipping merge of OCDBT",  # which it was told not to write
    "_SignalingThread.run() raised an exception",  # and `save` raises it, too
)
logging.getLogger("absl").addFilter(lambda record: not any(echo in record.getMessage() for echo in _ECHOES))
# When one write fails, Orbax raises its error and forgets the other writes, which fail likewise.
logging.getLogger("asyncio").addFilter(lambda record: not (record.exc_info and _disk_error(record.exc_info[1])))


def save_arrays(path: Path, arrays: Mapping[str, jax.Array | np.ndarray]) -> None:
    """Write `arrays/` of a checkpoint; in a multi-process run each process writes its own shards.

    Chunks are of bounded size, so that a slice can be read without its array, and not compressed: of trained weights
    and moments zstd saves 7 % of the bytes, and takes at least twice as long (benchmarks/RESULTS.md).

    Args:
        path: the unfinished checkpoint folder.
        arrays: by dotted name.

    Raises:
        OSError: if the disk is full, or fails in another way; the caller knows the name that users know.
    """
    with _disk_errors_by_type(), _open() as writer:
        save_args = {name: _chunked(array) for name, array in arrays.items()}
        writer.save(path.absolute() / FOLDER, args=ocp.args.PyTreeSave(dict(arrays), save_args=save_args))


def load_arrays(
    path: Path,
    prefixes: tuple[str, ...] = ("",),
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
) -> dict[str, Any]:
    """The arrays whose names begin with one of the prefixes; other ones are not read.

    Args:
        path: a checkpoint folder, verified by the caller (`find_checkpoint` does).
        prefixes: e.g. ("parameters.",) for inference.
        shardings: by name, where each array shall lie, on any mesh, others not being read; None gives NumPy arrays.

    Raises:
        ArtifactError: if a name in `shardings` is not in the checkpoint.
    """
    with _open() as reader:
        stored = reader.metadata(path.absolute() / FOLDER).item_metadata.tree
        names = [name for name in stored if name.startswith(prefixes) and (shardings is None or name in shardings)]
        if shardings is not None and (absent := sorted(shardings.keys() - stored.keys())):
            raise ArtifactError(f"checkpoint {path} has no array {absent[0]} ({len(absent)} missing)")
        restore_args = {
            name: ocp.RestoreArgs(restore_type=np.ndarray)
            if shardings is None
            else ocp.ArrayRestoreArgs(sharding=shardings[name], strict=True)
            for name in names
        }
        item = {name: stored[name] for name in names}
        restore = ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=True)
        return reader.restore(path.absolute() / FOLDER, args=restore)


def open_arrays(path: Path) -> dict[str, StoredArray]:
    """The arrays of a checkpoint, by dotted name, to be read block by block."""
    with reading(path / FOLDER):
        folders = sorted(file.parent for file in (path / FOLDER).glob("*/zarr.json"))
        return {folder.name: StoredArray(folder) for folder in folders}


def _open() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True, use_compression=False))


def _chunked(array: jax.Array | np.ndarray) -> ocp.SaveArgs:
    """Orbax halves the longest dimensions until a chunk is small enough; stacked layers are taken apart first."""
    stored = array.sharding.shard_shape(array.shape) if isinstance(array, jax.Array) else array.shape
    stacked = len(stored) > 2 and math.prod(stored) * array.dtype.itemsize > CHUNK_BYTES
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if stacked else ())


def _disk_error(error: BaseException | None) -> int | None:
    """The errno in TensorStore's message about a full or failing disk."""
    code = re.search(r"os_error_code='(\d+)'", str(error)) if isinstance(error, ValueError) else None
    return int(code[1]) if code else None


@contextlib.contextmanager
def _disk_errors_by_type() -> Iterator[None]:
    """Turn TensorStore's ValueError for a full or failing disk into the OSError it is."""
    before = sys.unraisablehook

    def report(unraisable: "sys.UnraisableHookArgs") -> None:
        # From TensorStore's threads, when a write ends after Orbax has given up: nobody waits for it any more.
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = report
    try:
        yield
    except ValueError as error:
        code = _disk_error(error)
        if code is None:
            raise
        raise OSError(code, os.strerror(code)) from None  # such writes may still end: keep the hook
    else:
        sys.unraisablehook = before
