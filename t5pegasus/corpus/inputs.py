"""What a build reads: the identity of its input files, and about how many documents they hold."""

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import zstandard

from t5pegasus.data.shard_files import hash_file

_SAMPLE_BYTES = 2**24


def describe_inputs(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Name, size and sha256 of each file: the same content elsewhere is the same input."""
    return [{"file": path.name, "bytes": path.stat().st_size, "sha256": hash_file(path)} for path in paths]


def estimate_documents(paths: Sequence[Path]) -> int | None:
    """About how many documents there are, from the first 16 MiB of each file; for the time left.

    Returns:
        None if a file is of a kind without lines, or damaged: reading it says so in words.
    """
    if any(path.name.endswith(".parquet") for path in paths):
        return None
    try:
        return sum(map(_estimate, paths))
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError):
        return None


def _estimate(path: Path) -> int:
    with path.open("rb") as file:
        if path.name.endswith(".gz"):
            with gzip.GzipFile(fileobj=file) as stream:
                sample = stream.read(_SAMPLE_BYTES)
        elif path.name.endswith(".zst"):
            with zstandard.ZstdDecompressor().stream_reader(file, closefd=False) as stream:
                sample = stream.read(_SAMPLE_BYTES)
        else:
            sample = file.read(_SAMPLE_BYTES)
        share = file.tell() / max(path.stat().st_size, 1)
    num_documents = sample.count(b"\n\n" if path.suffix == ".txt" else b"\n")
    return max(1, round(num_documents / max(share, 1e-9)))
