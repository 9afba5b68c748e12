"""Packed rows as an endless stream of batches whose row k is a pure function of the seed and k.

Stream row r is row `index_shuffle(r mod num_rows, seed, epoch)` of the packing table, with
epoch = r div num_rows. The position in the data is therefore the number of rows consumed, and nothing
else: batch size and number of processes may change on resume without a row lost or seen twice.
"""

import contextlib
import hashlib
import sys
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Protocol, Self

import grain
import numpy as np
from grain.experimental import index_shuffle

from t5pegasus.batch import Batch
from t5pegasus.config import DataConfig
from t5pegasus.data.hashing import example_keys
from t5pegasus.data.packing import load_packing, longest_text
from t5pegasus.data.quarantine import BadExample, Quarantine
from t5pegasus.data.records import Example
from t5pegasus.data.row_layout import check_targets, lay_out
from t5pegasus.data.shards import ExampleShards
from t5pegasus.errors import ArtifactError, DataError

_SHUFFLE_ROUNDS = 8
"""Of the Feistel network; four leave visible structure in small tables."""


class PackedRows:
    """Rows of a folder of examples, packed to the lengths in `data`; random access, safe between threads.

    An example longer than a row keeps its first tokens and its end token, a text to corrupt its first tokens. One that
    cannot be read leaves its segment empty.
    """

    def __init__(
        self,
        examples_path: Path | str,
        data: DataConfig,
        pad_id: int,
        start_id: int,
        *,
        num_open_tokens: int | None = None,
        quarantine: Quarantine | None = None,
    ) -> None:
        """Open the examples, and make their packing table if these lengths are new.

        Args:
            examples_path: folder written by `t5pegasus build`.
            data: the lengths of a row.
            pad_id: the model's.
            start_id: the model's.
            num_open_tokens: the model's, if not all of the vocabulary; rows whose targets go beyond are refused when
                they are read.
            quarantine: receives the examples that cannot be used, default one of its own.

        Raises:
            ArtifactError: if the examples are damaged or were made with other special ids than the model's.
            DataError: if there are none.
        """
        self.shards = ExampleShards(examples_path)
        self.data, self.pad_id, self.start_id = data, pad_id, start_id
        self._num_open_tokens = num_open_tokens
        self._quarantine = Quarantine(data.max_bad_examples) if quarantine is None else quarantine
        for name, wanted in (("pad_id", pad_id), ("start_id", start_id)):
            if self.shards.manifest[name] != wanted:
                raise ArtifactError(
                    f"{examples_path}: the tokenizer's {name} is {self.shards.manifest[name]}, the model's "
                    f"is {wanted}; set the model's token ids to the tokenizer's, or build with another one"
                )
        if not len(self.shards):
            raise DataError(f"{examples_path} holds no examples; build it from more documents")
        self.table = load_packing(self.shards, data)
        self.num_rows = self.table.num_rows
        self.borders: Sequence[int] = (0, self.num_rows)
        if self.shards.corruption is not None:
            self._longest_text = longest_text(self.shards.corruption, data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self.shards.close()

    def table_row(self, k: int, epoch: int) -> int:
        """Which row of the packing table comes k-th in an epoch."""
        digest = hashlib.blake2b(f"{self.data.seed}/{epoch}".encode(), digest_size=4).digest()
        seed = int.from_bytes(digest, "little")  # seed + epoch would give two seeds the same epochs
        return index_shuffle(k, max_index=self.num_rows - 1, seed=seed, rounds=_SHUFFLE_ROUNDS)

    def stream_batch(self, stream_rows: Sequence[int] | np.ndarray) -> Batch:
        """The batch of these rows of the endless stream."""
        at = [divmod(int(row), self.num_rows) for row in stream_rows]
        table_rows = [self.table_row(k, epoch) for epoch, k in at]
        return self._batch(table_rows, [epoch for epoch, _ in at], stream_rows)

    def ordered_batch(self, table_rows: Sequence[int] | np.ndarray) -> Batch:
        """The batch of these rows of the table, always the same; from `num_rows` on they are empty, with weight 0."""
        return self._batch(table_rows, [0] * len(table_rows), table_rows)

    def find_bad_examples(self, stream_rows: Sequence[int] | np.ndarray) -> list[BadExample]:
        """Those among these rows of the stream that cannot be used, read once more to find them.

        Raises:
            DataError: if with them there are more than allowed.
        """
        at = [divmod(int(row), self.num_rows) for row in stream_rows]
        _, indices = self._members([self.table_row(k, epoch) for epoch, k in at])
        found = self._name(self.shards.read_sequences(indices)[2], indices)
        for bad in found:
            self._quarantine.admit(bad)
        return found

    def recall(self, bad_examples: Sequence[int]) -> None:
        """Count examples that the run met before it was stopped, and that cannot be used."""
        self._quarantine.recall(self.shards.fingerprint, bad_examples)

    def _members(self, table_rows: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many examples each row holds, and which, one row behind the other; both int64."""
        starts = self.table.row_starts
        members = [
            self.table.examples[starts[row] : starts[row + 1]] if row < self.num_rows else np.empty(0, np.int64)
            for row in table_rows
        ]
        counts = np.array([len(member) for member in members], np.int64)
        return counts, np.concatenate([np.empty(0, np.int64), *members])

    def _name(self, faults: Mapping[int, str], indices: np.ndarray) -> list[BadExample]:
        path, shard_of = self.shards.path, self.shards.shard_of
        named = [(int(indices[at]), reason) for at, reason in sorted(faults.items())]
        fingerprint = self.shards.fingerprint
        return [BadExample(str(path / shard_of(index).file), index, reason, fingerprint) for index, reason in named]

    def _batch(
        self, table_rows: Sequence[int] | np.ndarray, epochs: Sequence[int], row_ids: Sequence[int] | np.ndarray
    ) -> Batch:
        counts, indices = self._members(table_rows)
        sources, targets, faults = self.shards.read_sequences(indices)
        for bad in self._name(faults, indices):
            self._quarantine.admit(bad)
        if self.shards.corruption is not None:
            keys = example_keys(self.data.seed, np.repeat(np.array(epochs, np.int64), counts), indices)
            sources, targets = self.shards.corruption.corrupt(sources.shortened(self._longest_text), keys)
        fields = lay_out(sources, targets, counts, self.data, self.pad_id, self.start_id)
        if (
            self._num_open_tokens is not None
            and fields["decoder_target_tokens"].max(initial=0) >= self._num_open_tokens
        ):
            examples = [Example(sources[at], targets[at]) for at in range(len(indices))]
            check_targets(examples, self._num_open_tokens, indices, str(self.shards.path))
        bad = np.bincount(np.repeat(np.arange(len(counts)), counts)[list(faults)], minlength=len(counts))
        return Batch(
            **fields,
            row_ids=np.asarray(row_ids, np.int64).astype(np.uint32),
            source_ids=np.zeros(len(counts), np.int32),
            num_bad_examples=bad.astype(np.int32),
        )


class Rows(Protocol):
    """What batches are loaded from: `PackedRows`, or a mixture of them."""

    num_rows: int
    borders: Sequence[int]
    """Where in the table each source begins, and where the last ends."""

    def stream_batch(self, stream_rows: Sequence[int] | np.ndarray) -> Batch:
        """The batch of these rows of the endless stream."""
        ...

    def ordered_batch(self, table_rows: Sequence[int] | np.ndarray) -> Batch:
        """The batch of these rows of the table; from `num_rows` on they are empty."""
        ...


def load_batches(
    rows: Rows,
    batch_size: int,
    start_row: int,
    *,
    batch_rows: np.ndarray | None = None,
    num_threads: int = 2,
) -> Generator[Batch]:
    """Batches without end: batch b holds the stream rows `start_row + b * batch_size + batch_rows`.

    Args:
        rows: the packed examples.
        batch_size: rows per batch over all processes.
        start_row: rows consumed before, 0 for a new run.
        batch_rows: which rows of each batch this process needs, default all of them.
        num_threads: threads that prepare the next batches.

    Yields:
        NumPy batches. Close the iterator (`contextlib.closing`) to stop its threads.
    """
    wanted = np.arange(batch_size) if batch_rows is None else np.asarray(batch_rows, np.int64)
    source = _StreamBatches(rows, batch_size, start_row, wanted, num_threads)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    batches = iter(grain.MapDataset.source(source).to_iter_dataset(options))
    with contextlib.closing(source), contextlib.closing(batches):
        yield from batches


def load_epoch(rows: Rows, batch_size: int, *, batch_rows: np.ndarray | None = None) -> Iterator[Batch]:
    """Every row once, in the order of the table; the last batch of a source is filled up with rows of weight 0."""
    wanted = np.arange(batch_size) if batch_rows is None else np.asarray(batch_rows, np.int64)
    for begin, end in pairwise(rows.borders):
        for first in range(begin, end, batch_size):
            places = first + wanted
            yield rows.ordered_batch(np.where(places < end, places, rows.num_rows))


class _StreamBatches:
    """Grain's random-access source of batches, as good as endless.

    Grain's threads outlive their iterator for a moment; `close` waits for the reads under way, so that the
    files can be closed after it.
    """

    def __init__(self, rows: Rows, batch_size: int, start_row: int, batch_rows: np.ndarray, num_threads: int) -> None:
        self._rows, self._batch_size = rows, batch_size
        self._start_row, self._batch_rows = start_row, batch_rows
        self._num_threads, self._reading = num_threads, threading.Semaphore(num_threads)
        self._closed = False

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Batch:
        with self._reading:
            if self._closed:
                raise RuntimeError("the stream of batches is closed")
            first = self._start_row + index * self._batch_size
            return self._rows.stream_batch(first + self._batch_rows)

    def close(self) -> None:
        """Wait for the reads under way; those that come later fail, unseen."""
        self._closed = True
        for _ in range(self._num_threads):
            self._reading.acquire()
        self._reading.release(self._num_threads)
