"""Writing a folder of examples: shards, lengths, and last the manifest, each whole or not at all."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from t5pegasus.data.span_corruption import SpanCorruption
from t5pegasus.errors import writing
from t5pegasus.json_files import SCHEMA, write_json

MANIFEST = "manifest.json"
LENGTHS = "lengths.npy"
HISTOGRAM_BIN_TOKENS = 16
_CONTENT_FIELDS = (
    "tokenizer_fingerprint", "vocab_size", "pad_id", "start_id", "end_id", "lengths_sha256", "shards",
)  # fmt: skip
_WRITER_OPTIONS = "group_size:1,uncompressed"


@dataclasses.dataclass(frozen=True)
class Shard:
    """What the manifest says of one file of examples."""

    file: str
    num_examples: int
    bytes: int
    sha256: str


def shard_name(index: int, num_shards: int) -> str:
    """`examples-00000-of-00008.array_record`, for index 0 of 8."""
    return f"examples-{index:05d}-of-{num_shards:05d}.array_record"


def hash_file(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_shard(path: Path, records: Iterable[bytes]) -> Shard:
    """Write one shard under a temporary name and rename it when it is whole and on disk."""
    temporary = _temporary_name(path)
    writer = ArrayRecordWriter(str(temporary), _WRITER_OPTIONS)
    num_examples = 0
    try:
        for record in records:
            writer.write(record)
            num_examples += 1
    finally:
        writer.close()
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    shard = Shard(path.name, num_examples, temporary.stat().st_size, hash_file(temporary))
    temporary.replace(path)
    return shard


def save_array(path: Path, array: np.ndarray) -> None:
    """`np.save` under a temporary name, renamed when it is whole and on disk."""
    temporary = _temporary_name(path)
    with writing(path), temporary.open("wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _temporary_name(path: Path) -> Path:
    """Hidden, and of this process: a worker of a killed build may still write when the next one starts."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def write_manifest(
    folder: Path,
    *,
    shards: Sequence[Shard],
    config: dict[str, Any],
    documents: dict[str, Any],
    num_unknown_tokens: int,
    vocab_size: int,
    tokenizer_fingerprint: str,
    pad_id: int,
    start_id: int,
    end_id: int,
    corruption: SpanCorruption | None = None,
) -> dict[str, Any]:
    """Write the manifest of a folder whose shards, lengths and tokenizer are in place; returns it.

    The fingerprint covers what training sees (tokenizer, special ids, bytes of shards and lengths, corruption),
    not how it came about, so the same examples built on another machine have the same one.
    """
    lengths = np.load(folder / LENGTHS, mmap_mode="r")
    content = {
        "tokenizer_fingerprint": tokenizer_fingerprint,
        "vocab_size": vocab_size,
        "pad_id": pad_id,
        "start_id": start_id,
        "end_id": end_id,
        "lengths_sha256": hash_file(folder / LENGTHS),
        "shards": [dataclasses.asdict(shard) for shard in shards],
        **({"corruption": corruption._asdict()} if corruption else {}),
    }
    num_source, num_target = (int(total) for total in lengths.sum(axis=0, dtype=np.int64))
    max_source, max_target = (int(longest) for longest in lengths.max(axis=0, initial=0))
    manifest = {
        "schema": SCHEMA,
        "kind": "examples",
        "config": config,
        **content,
        "num_examples": len(lengths),
        "num_source_tokens": num_source,
        "num_target_tokens": num_target,
        "num_unknown_tokens": num_unknown_tokens,
        "max_source_tokens": max_source,
        "max_target_tokens": max_target,
        "length_histograms": {
            "bin_tokens": HISTOGRAM_BIN_TOKENS,
            "source": np.bincount(lengths[:, 0] // HISTOGRAM_BIN_TOKENS).tolist(),
            "target": np.bincount(lengths[:, 1] // HISTOGRAM_BIN_TOKENS).tolist(),
        },
        "documents": documents,
        "fingerprint": _fingerprint(content),
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


def fingerprint_content(manifest: Mapping[str, Any]) -> str:
    """The fingerprint of what a manifest lists, as it should say itself.

    Raises:
        KeyError: if a field is missing.
    """
    fields = (*_CONTENT_FIELDS, *(("corruption",) if "corruption" in manifest else ()))
    return _fingerprint({field: manifest[field] for field in fields})


def _fingerprint(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
