"""The lines of plain and compressed files, in bounded memory, and checked to be complete."""

import gzip
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from t5pegasus.errors import UsageError

CHUNK_BYTES = 1 << 16
"""Read at a time; decompressed it is a few hundred KiB of text."""
_ZSTD_CHUNK_BYTES = 1 << 11
"""Four of its bytes can stand for 128 KiB, and what a portion stands for comes at once: 64 MiB at most."""
MAX_RECORD_BYTES = 1 << 26
"""A longer line or block (64 MiB) is counted and skipped, so that memory stays bounded on any input."""
ZSTD_WINDOW_BYTES = 1 << 27
"""The largest window (`zstd --long=27`) that is accepted: reading needs that much memory."""

NOT_UTF8 = "not valid UTF-8"
TOO_LONG = f"longer than {MAX_RECORD_BYTES >> 20} MiB"


def read_lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    r"""The lines of a plain, `.gz` or `.zst` file.

    Yields:
        (number from 1, the line without its ``\n``, or None if it is longer than `MAX_RECORD_BYTES`).

    Raises:
        UsageError: if the file is missing, damaged or cut off.
    """
    return _split_lines(_read_chunks(path))


def read_texts(path: Path, dropped: Counter[str]) -> Iterator[tuple[int, str]]:
    """The lines of a file that hold text, with their numbers; those too long or not UTF-8 are counted instead."""
    for number, line in read_lines(path):
        if line is None:
            dropped[TOO_LONG] += 1
        elif line.strip():
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                dropped[NOT_UTF8] += 1
            else:
                yield number, text


def _split_lines(chunks: Iterable[bytes]) -> Iterator[tuple[int, bytes | None]]:
    number, kept, size = 1, [], 0
    for chunk in chunks:
        head, *others = chunk.split(b"\n")
        size += len(head)
        if size <= MAX_RECORD_BYTES:
            kept.append(head)
        else:
            kept.clear()
        if not others:
            continue
        yield number, b"".join(kept) if size <= MAX_RECORD_BYTES else None
        for line in others[:-1]:
            number += 1
            yield number, line if len(line) <= MAX_RECORD_BYTES else None
        number += 1
        kept, size = [others[-1]], len(others[-1])
    if size:
        yield number, b"".join(kept) if size <= MAX_RECORD_BYTES else None


def _read_chunks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            if path.name.endswith(".zst"):
                yield from _decompress_zstd(file)
            elif path.name.endswith(".gz"):
                with gzip.GzipFile(fileobj=file) as decompressed:
                    yield from iter(lambda: decompressed.read(CHUNK_BYTES), b"")
            else:
                yield from iter(lambda: file.read(CHUNK_BYTES), b"")
    except FileNotFoundError:
        raise UsageError(f"input {path} does not exist") from None
    except IsADirectoryError:
        raise UsageError(f"input {path} is a folder, a file was wanted") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UsageError(f"input {path} is damaged or cut off ({error}); fetch or write it anew") from None


def _decompress_zstd(file: BinaryIO) -> Iterator[bytes]:
    import zstandard

    # Frame by frame: zstandard's stream reader ends without a word where a file is cut off.
    context = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES)
    frame = None
    try:
        while chunk := file.read(_ZSTD_CHUNK_BYTES):
            while chunk:
                frame = context.decompressobj() if frame is None else frame
                yield frame.decompress(chunk)
                chunk = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise EOFError(str(error)) from None
    if frame is not None:
        raise EOFError("the last frame is not complete")
