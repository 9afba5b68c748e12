"""Packed rows as an endless stream of batches whose row k is a pure function of the seed and k.

Stream row r is row `index_shuffle(r mod num_rows, seed, epoch)` of the packing table, with
epoch = r div num_rows. The position in the data is therefore the number of rows consumed, and nothing
else: batch size and number of processes may change on resume without a row lost or seen twice.
"""

import contextlib
import hashlib
import sys
import threading
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Self

import grain
import numpy as np
from grain.experimental import index_shuffle

from t5pegasus.batch import Batch
from t5pegasus.config import DataConfig
from t5pegasus.data.packing import load_packing
from t5pegasus.data.shards import Example, ExampleShards
from t5pegasus.errors import ArtifactError, DataError

_SHUFFLE_ROUNDS = 8
"""Of the Feistel network; four leave visible structure in small tables."""


class PackedRows:
    """Rows of a folder of examples, packed to the lengths in `data`; random access, safe between threads.

    An example longer than a row keeps its first tokens and its end token.
    """

    def __init__(
        self,
        examples_path: Path | str,
        data: DataConfig,
        pad_id: int,
        start_id: int,
        *,
        num_open_tokens: int | None = None,
    ) -> None:
        """Open the examples, and make their packing table if these lengths are new.

        Args:
            examples_path: folder written by `t5pegasus build`.
            data: the lengths of a row.
            pad_id: the model's.
            start_id: the model's.
            num_open_tokens: the model's, if not all of the vocabulary; rows whose targets go beyond are refused when
                they are read.

        Raises:
            ArtifactError: if the examples are damaged or were made with other special ids than the model's.
            DataError: if there are none.
        """
        self.shards = ExampleShards(examples_path)
        self.data, self.pad_id, self.start_id = data, pad_id, start_id
        self._num_open_tokens = num_open_tokens
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self.shards.close()

    def row(self, k: int, epoch: int) -> dict[str, np.ndarray]:
        """Row k of an epoch: the fields of `Batch` (without `row_ids`) as 1-D arrays."""
        fields = self._fill([self.table_row(k, epoch)])
        return {name: array[0] for name, array in fields.items()}

    def table_row(self, k: int, epoch: int) -> int:
        """Which row of the packing table comes k-th in an epoch."""
        digest = hashlib.blake2b(f"{self.data.seed}/{epoch}".encode(), digest_size=4).digest()
        seed = int.from_bytes(digest, "little")  # seed + epoch would give two seeds the same epochs
        return index_shuffle(k, max_index=self.num_rows - 1, seed=seed, rounds=_SHUFFLE_ROUNDS)

    def stream_batch(self, stream_rows: Sequence[int] | np.ndarray) -> Batch:
        """The batch of these rows of the endless stream."""
        at = [divmod(int(row), self.num_rows) for row in stream_rows]
        fields = self._fill([self.table_row(k, epoch) for epoch, k in at])
        return _batch(fields, stream_rows)

    def ordered_batch(self, table_rows: Sequence[int] | np.ndarray) -> Batch:
        """The batch of these rows of the table; from `num_rows` on they are empty, with weight 0."""
        return _batch(self._fill(table_rows), table_rows)

    def _fill(self, table_rows: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        starts = self.table.row_starts
        members = [
            self.table.examples[starts[row] : starts[row + 1]] if row < self.num_rows else np.empty(0, np.int64)
            for row in table_rows
        ]
        indices = np.concatenate([np.empty(0, np.int64), *members])
        examples = self.shards.read(indices)
        if self._num_open_tokens is not None:
            check_targets(examples, self._num_open_tokens, indices, str(self.shards.path))
        return fill_rows(examples, [len(member) for member in members], self.data, self.pad_id, self.start_id)


def _batch(fields: dict[str, np.ndarray], rows: Sequence[int] | np.ndarray) -> Batch:
    zeros = np.zeros(len(rows), np.int32)
    row_ids = np.asarray(rows, np.int64).astype(np.uint32)
    return Batch(**fields, row_ids=row_ids, source_ids=zeros, num_bad_examples=zeros)


def check_targets(
    examples: Sequence[Example], num_open_tokens: int, indices: Sequence[int] | np.ndarray, where: str
) -> None:
    """Refuse targets with tokens that the model cannot write: their probability is 0, their loss infinite.

    Args:
        examples: what is to be trained or measured on.
        num_open_tokens: the model's (`ModelConfig.num_masked_tokens`).
        indices: the number of each example, for the message.
        where: what they are of, for the message.

    Raises:
        DataError: naming the first such example and its token.
    """
    for index, example in zip(indices, examples):
        if len(example.target) and (highest := int(example.target.max())) >= num_open_tokens:
            raise DataError(
                f"{where}: the target of example {index} holds token {highest}, but of the model's vocabulary only "
                f"the first {num_open_tokens} tokens are open (num_masked_tokens); open the others with t5pegasus "
                "grow, or give examples whose targets do without them"
            )


def fill_rows(
    examples: Sequence[Example], counts: Sequence[int], data: DataConfig, pad_id: int, start_id: int
) -> dict[str, np.ndarray]:
    """The fields of `Batch` (without `row_ids`) for rows that hold these examples as their segments.

    Args:
        examples: those of the first row, then those of the second, and so on; longer than a row loses its end.
        counts: how many each row holds; the packing sees to it that they fit together.
        data: the lengths of a row.
        pad_id: fills what is left.
        start_id: the first decoder input of each segment.
    """
    rows = np.repeat(np.arange(len(counts)), counts)
    max_source, max_target = data.max_source_tokens, data.max_target_tokens
    sources = [_truncate(example.source, max_source) for example in examples]
    targets = [_truncate(example.target, max_target) for example in examples]
    source, source_segments, source_positions = _place(sources, rows, (len(counts), max_source), pad_id)
    target, target_segments, target_positions = _place(targets, rows, (len(counts), max_target), pad_id)
    inside = target_segments > 0
    moved = np.where(target_positions == 0, start_id, np.roll(target, 1, axis=1))
    return {
        "encoder_input_tokens": source,
        "encoder_segment_ids": source_segments,
        "encoder_positions": source_positions,
        "decoder_input_tokens": np.where(inside, moved, pad_id).astype(np.int32),
        "decoder_target_tokens": target,
        "decoder_loss_weights": inside.astype(np.float32),
        "decoder_segment_ids": target_segments,
        "decoder_positions": target_positions,
    }


def load_batches(
    rows: PackedRows,
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


def load_epoch(rows: PackedRows, batch_size: int, *, batch_rows: np.ndarray | None = None) -> Iterator[Batch]:
    """Every row once, in the order of the table; the last batch is filled up with empty rows of weight 0."""
    wanted = np.arange(batch_size) if batch_rows is None else np.asarray(batch_rows, np.int64)
    for first in range(0, rows.num_rows, batch_size):
        yield rows.ordered_batch(first + wanted)


class _StreamBatches:
    """Grain's random-access source of batches, as good as endless.

    Grain's threads outlive their iterator for a moment; `close` waits for the reads under way, so that the
    files can be closed after it.
    """

    def __init__(
        self, rows: PackedRows, batch_size: int, start_row: int, batch_rows: np.ndarray, num_threads: int
    ) -> None:
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


def _truncate(tokens: np.ndarray, max_tokens: int) -> np.ndarray:
    if len(tokens) <= max_tokens:
        return tokens
    return np.concatenate([tokens[: max_tokens - 1], tokens[-1:]])


def _place(
    sequences: list[np.ndarray], rows: np.ndarray, shape: tuple[int, int], pad_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lay sequences out one behind the other in their rows (ascending): tokens, segment ids, positions."""
    tokens = np.full(shape, pad_id, np.int32)
    segment_ids, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    if sequences:
        lengths = np.array([len(sequence) for sequence in sequences])
        starts = np.cumsum(lengths) - lengths
        first = np.searchsorted(rows, rows)  # the first sequence in the same row
        position = np.arange(lengths.sum()) - np.repeat(starts, lengths)
        place = np.repeat(rows * shape[1] + starts - starts[first], lengths) + position
        tokens.ravel()[place] = np.concatenate(sequences)
        segment_ids.ravel()[place] = np.repeat(np.arange(len(rows)) - first + 1, lengths)
        positions.ravel()[place] = position
    return tokens, segment_ids, positions
