"""Examples on disk: ArrayRecord shards of token ids, their lengths, a copy of the tokenizer and a manifest.

One record (`data.records`) per group (`group_size:1`) makes random access one read; uncompressed, because zstd
gains nothing on groups this small. The bytes depend on the examples alone, and every record carries a hash that
a read checks.

Examples of span corruption are stored whole, as sources without specials and without a target; the manifest then
says how they are corrupted when they are read (`data.span_corruption`).
"""

import errno
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from t5pegasus.data.records import Example, Sequences, unpack_records
from t5pegasus.data.shard_files import LENGTHS, MANIFEST, Shard, fingerprint_content, hash_file
from t5pegasus.data.span_corruption import SpanCorruption
from t5pegasus.errors import ArtifactError, reading
from t5pegasus.json_files import check_schema, read_json
from t5pegasus.storage import fetch, open_path

_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


class ExampleShards:
    """Random access to a folder of examples: `shards[i]` is example i in global order.

    Opening checks names and sizes of all files; each read checks the record's hash and its lengths;
    `verify` reads everything. Safe to share between threads.
    """

    def __init__(self, path: Path | str) -> None:
        """Open a folder that `t5pegasus build` wrote; of one in an object store a verified copy is made here first.

        Raises:
            ArtifactError: if the folder is unfinished, or a file of it is missing or damaged.
            OSError: if the store fails, or the disk has no room for the copy.
        """
        self.path = fetch(open_path(str(path)))
        if not self.path.exists():
            raise ArtifactError(
                f"{self.path} is no folder of examples: it does not exist; "
                "check the path, or write the examples with `t5pegasus build`"
            )
        if not (self.path / MANIFEST).is_file():
            raise ArtifactError(
                f"{self.path} is no folder of examples: {MANIFEST}, which is written last, is missing; "
                "write the examples with `t5pegasus build`, or run the interrupted build again"
            )
        self.manifest = read_json(self.path / MANIFEST)
        check_schema(self.manifest, self.path / MANIFEST)
        if self.manifest.get("kind") != "examples":
            raise ArtifactError(
                f"{self.path / MANIFEST}: kind is {self.manifest.get('kind')!r}, 'examples' was wanted; "
                "pass the folder that `t5pegasus build` wrote"
            )
        with reading(self.path / MANIFEST):
            self._require_fingerprint()
            self.fingerprint: str = self.manifest["fingerprint"]
            self.tokenizer_path = self.path / "tokenizer"
            self.shards = [Shard(**entry) for entry in self.manifest["shards"]]
            self.vocab_size: int = self.manifest["vocab_size"]
            corruption = self.manifest.get("corruption")
            self.corruption = corruption and SpanCorruption.from_json(corruption)
            self._starts = np.cumsum([0] + [shard.num_examples for shard in self.shards])
        for shard in self.shards:
            self._check_size(shard)
        self.lengths = self._load_lengths()
        """int32 [n, 2]: source and target length of each example as it is stored."""
        self._check_counts()
        self._readers = [self._open(shard) for shard in self.shards]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        return self.read([index])[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; reading afterwards is an error."""
        for reader in self._readers:
            reader.close()

    def read(self, indices: Sequence[int] | np.ndarray) -> list[Example]:
        """The examples of these indices as they are stored, in their order.

        Raises:
            ArtifactError: if a record is damaged.
            IndexError: if an index is outside [0, len).
        """
        sources, targets, faults = self.read_sequences(indices)
        for at, reason in sorted(faults.items()):
            shard, index = self.shard_of(int(indices[at])), int(indices[at])
            raise self._damage(shard, f"example {index} cannot be used: {reason}")
        return [Example(sources[at], targets[at]) for at in range(len(indices))]

    def read_sequences(self, indices: Sequence[int] | np.ndarray) -> tuple[Sequences, Sequences, dict[int, str]]:
        """Sources and targets of these indices, in their order; many at once are much faster than one each.

        Returns:
            Sources, targets, and for what is damaged its position in `indices` → why; its lengths are 0.

        Raises:
            IndexError: if an index is outside [0, len).
            OSError: if the disk fails, which says nothing of the record.
        """
        wanted = np.asarray(indices, np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"example indices {wanted.min()}…{wanted.max()} outside [0, {len(self)})")
        of_shard = np.searchsorted(self._starts, wanted, side="right") - 1
        records: list[bytes] = [b""] * len(wanted)
        unread: dict[int, str] = {}
        for shard in np.unique(of_shard):
            places = np.flatnonzero(of_shard == shard)
            within = (wanted[places] - self._starts[shard]).tolist()
            path = self.path / self.shards[shard].file
            for place, record in zip(places.tolist(), _read_records(self._readers[shard], within, path)):
                if isinstance(record, Exception):
                    unread[place] = f"its record cannot be read ({record})"
                else:
                    records[place] = record
        sources, targets, faults = unpack_records(records, self.lengths[wanted], self.vocab_size)
        return sources, targets, faults | unread

    def shard_of(self, index: int) -> Shard:
        """The file that an example lies in."""
        return self.shards[int(np.searchsorted(self._starts, index, side="right")) - 1]

    def verify(self, shards: Sequence[Shard] | None = None) -> None:
        """Read every shard, or these, whole and compare its sha256 with the manifest's.

        Raises:
            ArtifactError: naming the first file that differs, with both values.
        """
        for shard in self.shards if shards is None else shards:
            self._check_size(shard)
            got = hash_file(self.path / shard.file)
            if got != shard.sha256:
                raise self._damage(shard, f"sha256 is {got}, the manifest says {shard.sha256}")

    def _require_fingerprint(self) -> None:
        got, wanted = fingerprint_content(self.manifest), self.manifest["fingerprint"]
        if got != wanted:
            raise ArtifactError(
                f"{self.path / MANIFEST}: the fingerprint of what it lists is {got}, it says {wanted}; it was changed: "
                "copy the folder again from where it is whole, or delete it and build it again"
            )

    def _open(self, shard: Shard) -> ArrayRecordReader:
        with (self.path / shard.file).open("rb"):  # for what the system refuses: the reader would find no records
            pass
        try:
            reader = ArrayRecordReader(str(self.path / shard.file), _READER_OPTIONS)
        except RuntimeError as error:
            raise self._damage(shard, f"it cannot be opened ({error})") from error
        if reader.num_records() != shard.num_examples:
            detail = f"it holds {reader.num_records()} examples, the manifest says {shard.num_examples}"
            raise self._damage(shard, detail)
        return reader

    def _check_counts(self) -> None:
        """The cheap part of what a folder can have wrong: files listed twice, and counts that do not add up."""
        names = [shard.file for shard in self.shards]
        for shard, name in zip(self.shards, names):
            if names.count(name) > 1:
                raise self._damage(shard, "the manifest lists it twice")
        if self._starts[-1] != len(self.lengths):
            raise ArtifactError(
                f"{self.path / MANIFEST}: its shards hold {self._starts[-1]} examples, {LENGTHS} has "
                f"{len(self.lengths)}; copy the folder again from where it is whole, or build it again"
            )

    def _check_size(self, shard: Shard) -> None:
        path = self.path / shard.file
        if not path.is_file():
            raise self._damage(shard, f"the file is missing; the manifest lists {shard.num_examples} examples in it")
        if path.stat().st_size != shard.bytes:
            raise self._damage(shard, f"it has {path.stat().st_size} bytes, the manifest says {shard.bytes}")

    def _load_lengths(self) -> np.ndarray:
        path, wanted = self.path / LENGTHS, self.manifest["lengths_sha256"]
        got = hash_file(path) if path.is_file() else "absent"
        if got != wanted:
            raise ArtifactError(
                f"{path}: sha256 is {got}, the manifest says {wanted}; copy the folder again from where "
                "it is whole, or delete it and build it again"
            )
        return np.load(path, mmap_mode="r")

    def _damage(self, shard: Shard, detail: str) -> ArtifactError:
        return ArtifactError(
            f"{self.path / shard.file}: {detail}; copy the folder again from where it is whole, "
            "or delete it and build it again"
        )


def _read_records(reader: ArrayRecordReader, indices: list[int], path: Path) -> list[bytes | Exception]:
    """All at once, or, where one of them is damaged, each by itself."""
    try:
        return reader.read(indices)
    except (RuntimeError, IndexError) as error:
        if "() failed: " in str(error):  # Riegeli names the system call; all else is about the content
            raise OSError(errno.EIO, str(error), str(path)) from error
        if len(indices) == 1:
            return [error]
        return [record for index in indices for record in _read_records(reader, [index], path)]
