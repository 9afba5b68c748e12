"""Reading documents from files, one at a time: JSON lines (plain, gzip, Zstandard), plain text, Parquet.

A record that cannot be used is counted by reason and left out; a file that cannot be used stops the reading.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from t5pegasus.errors import DataError, UsageError
from t5pegasus.text.lines import MAX_RECORD_BYTES, NOT_UTF8, TOO_LONG, read_lines, read_texts

_JSON_BEGIN = re.compile(r'\s*\{\s*"')
NOT_JSON = "not valid JSON"
NOT_AN_OBJECT = "not a JSON object"
NO_TEXT = "no text"
NOT_A_STRING = "a field is not a string"


_WAYS_OUT = {
    NOT_UTF8: "convert the files, e.g. with iconv -f GB18030 -t UTF-8",
    NOT_JSON: "write one JSON object per line",
    NOT_AN_OBJECT: "write one JSON object per line",
    NO_TEXT: "the text belongs under the key 'text'",
}


@dataclass(frozen=True, slots=True)
class Document:
    """One text with what is known about it; `id` is unique within the files it was read from."""

    id: str
    text: str
    title: str | None = None
    source: str | None = None


def read_documents(paths: Iterable[Path | str], dropped: Counter[str] | None = None) -> Iterator[Document]:
    """Stream the documents of several files, in the order given, in bounded memory.

    `.jsonl`, `.jsonl.gz`, `.jsonl.zst` hold one object per line with the keys `text` and, if known, `id`,
    `title`, `source`; `.parquet` the same as columns; `.txt` one document per block between blank lines.
    A document without an id is called `<file name>:<line number>`.

    Args:
        paths: files to read; all are looked at before the first is opened.
        dropped: receives, per reason, the number of records that could not be used.

    Raises:
        UsageError: at once if a file is missing, empty or of an unknown kind; while reading if it is damaged.
    """
    checked = check_paths(paths)
    return _read_all(checked, Counter() if dropped is None else dropped)


def check_paths(paths: Iterable[Path | str], kinds: Iterable[str] = ()) -> list[Path]:
    """The paths, each an existing, non-empty file of a kind that can be read.

    Args:
        paths: files.
        kinds: the endings they may have; those of documents if not given.

    Raises:
        UsageError: naming the path and what to do.
    """
    kinds = tuple(kinds) or tuple(_READERS)
    checked = [Path(path) for path in paths]
    if not checked:
        raise UsageError("no input files were given; name at least one")
    for path in checked:
        if not path.exists():
            raise UsageError(f"input {path} does not exist")
        if path.is_dir():
            raise UsageError(f"input {path} is a folder; name the files in it, e.g. {path}/*.jsonl")
        if not path.name.endswith(kinds):
            raise UsageError(f"input {path} is of an unknown kind; known are {', '.join(kinds)}")
        check_not_empty(path)
    return checked


def check_not_empty(path: Path) -> None:
    """Refuse a file without any content: whatever should have written it did not.

    Raises:
        UsageError: naming the path.
    """
    if path.is_file() and path.stat().st_size == 0:
        raise UsageError(f"input {path} is empty; leave it out or write it anew")


def describe_dropped(dropped: Counter[str]) -> str:
    """Why records could not be used, the commonest reason first and what helps against it last."""
    reasons = ", ".join(f"{reason} ({count:,})" for reason, count in dropped.most_common())
    commonest = max(dropped, key=dropped.__getitem__, default="")
    return reasons + (f"; {_WAYS_OUT[commonest]}" if commonest in _WAYS_OUT else "")


def read_lines_or_json(source: Path | BinaryIO, key: str = "text") -> Iterator[dict[str, Any]]:
    """Records for a verb, one per line: JSON objects as they are, a line of plain text as `{key: line}`.

    The first line that is not blank decides: if it is a JSON object, or begins like one (`{"`), all lines must
    be objects that have `key`. A blank line of plain text is a record with an empty text, so that line n stays
    answer n.

    Args:
        source: a file (also `.gz`, `.zst`), not empty, or an open binary stream such as `sys.stdin.buffer`.
        key: the field the verb works on.

    Raises:
        UsageError: if the file is missing, empty or damaged.
        DataError: naming the line that is not UTF-8, not an object, lacks `key` or holds half a surrogate pair.
    """
    if isinstance(source, Path):
        check_not_empty(source)
    is_json, num_blank = None, 0
    # A stream line by line, not in chunks: someone may be typing, or a pipe may wait for the answer.
    for number, line in read_lines(source) if isinstance(source, Path) else enumerate(source, start=1):
        place = f"{source if isinstance(source, Path) else 'stdin'}:{number}"
        if line is None:
            raise DataError(f"{place} is {TOO_LONG}; split it")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise DataError(f"{place} is {NOT_UTF8} ({error.reason} at byte {error.start}); convert it") from None
        if is_json is None:
            if not text.strip():
                num_blank += 1
                continue
            is_json = _begins_like_json(text)
            yield from ({key: ""} for _ in range(0 if is_json else num_blank))
        if not is_json:
            yield {key: text}
        elif text.strip():
            record = _parse_json(text)
            if not isinstance(record, dict) or key not in record:
                raise DataError(f"{place} must be a JSON object with the key {key!r}, got {text[:60]!r}")
            if not _can_be_written(record):
                raise DataError(
                    f"{place} holds half a surrogate pair (an escape like \\ud800); mend or remove the line"
                )
            yield record
    if is_json is None:
        yield from ({key: ""} for _ in range(num_blank))


def _read_all(paths: list[Path], dropped: Counter[str]) -> Iterator[Document]:
    for path in paths:
        read = next(reader for suffix, reader in _READERS.items() if path.name.endswith(suffix))
        yield from read(path, dropped)


def _read_json_lines(path: Path, dropped: Counter[str]) -> Iterator[Document]:
    for number, text in read_texts(path, dropped):
        record = _parse_json(text)
        if isinstance(record, dict):
            document = _make_document(record, f"{path.name}:{number}", dropped)
            if document is not None:
                yield document
        else:
            dropped[NOT_JSON if record is None else NOT_AN_OBJECT] += 1


def _parse_json(text: str) -> Any:
    # RecursionError: "[[[[…" nested deeper than the interpreter's stack is bad data, not a bug.
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _begins_like_json(text: str) -> bool:
    # A first line that was cut off must not turn a file of JSON lines into plain text.
    return bool(_JSON_BEGIN.match(text)) or isinstance(_parse_json(text), dict)


def _can_be_written(value: Any) -> bool:
    r"""Whether no string in it holds half a surrogate pair (an escape such as \ud800), which no file can hold."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _make_document(record: dict[str, Any], default_id: str, dropped: Counter[str]) -> Document | None:
    text, title, source, identifier = (record.get(key) for key in ("text", "title", "source", "id"))
    if text is None:
        dropped[NO_TEXT] += 1
        return None
    if isinstance(identifier, int):
        identifier = str(identifier)
    fields = (identifier or default_id, text, title, source)
    if not all(field is None or isinstance(field, str) for field in fields):
        dropped[NOT_A_STRING] += 1
        return None
    try:  # an escape such as \ud800 gives half a surrogate pair, which no file can hold
        "".join(field for field in fields if field).encode("utf-8")
    except UnicodeEncodeError:
        dropped[NOT_UTF8] += 1
        return None
    return Document(*fields)


def _read_text_blocks(path: Path, dropped: Counter[str]) -> Iterator[Document]:
    block: list[bytes] = []
    start = size = 0

    def finish() -> Iterator[Document]:
        if size > MAX_RECORD_BYTES:
            dropped[TOO_LONG] += 1
        elif block:
            try:
                text = b"\n".join(block).decode("utf-8-sig" if start == 1 else "utf-8")
                yield Document(f"{path.name}:{start}", text)
            except UnicodeDecodeError:
                dropped[NOT_UTF8] += 1

    for number, line in read_lines(path):
        if line is not None and not line.strip():
            yield from finish()
            block, size = [], 0
            continue
        start = start if size else number
        size += MAX_RECORD_BYTES + 1 if line is None else len(line) + 1
        if line is not None and size <= MAX_RECORD_BYTES:
            block.append(line.rstrip(b"\r"))
        else:
            block = []
    yield from finish()


def _read_parquet(path: Path, dropped: Counter[str]) -> Iterator[Document]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UsageError(f"input {path} needs pyarrow, which is not installed: pip install 't5pegasus[data]'") from None
    try:
        with pq.ParquetFile(path) as file:
            names = [key for key in ("text", "id", "title", "source") if key in file.schema_arrow.names]
            if "text" not in names:
                raise UsageError(f"input {path} has no column 'text'; it has {', '.join(file.schema_arrow.names)}")
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=names):
                # As bytes: one row that is not UTF-8 would otherwise take its whole batch along.
                columns = {name: _column_to_bytes(pa, batch.column(name)) for name in names}
                for values in zip(*columns.values(), strict=True):
                    row += 1
                    try:
                        record = {
                            name: value.decode("utf-8") if isinstance(value, bytes) else value
                            for name, value in zip(columns, values, strict=True)
                        }
                    except UnicodeDecodeError:
                        dropped[NOT_UTF8] += 1
                        continue
                    document = _make_document(record, f"{path.name}:{row}", dropped)
                    if document is not None:
                        yield document
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk; Arrow's own for a damaged file have no number
        raise UsageError(f"input {path} is not a whole Parquet file ({error}); write it anew") from None


def _column_to_bytes(pa: Any, column: Any) -> list[Any]:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type):
        column = column.cast(pa.binary())
    elif pa.types.is_large_string(column.type):
        column = column.cast(pa.large_binary())
    return column.to_pylist()


_READERS = {
    ".jsonl": _read_json_lines,
    ".jsonl.gz": _read_json_lines,
    ".jsonl.zst": _read_json_lines,
    ".txt": _read_text_blocks,
    ".parquet": _read_parquet,
}
