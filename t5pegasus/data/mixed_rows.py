"""Rows from several folders of examples, as one stream whose row k is a pure function of seed, changes and k."""

from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np

from t5pegasus.batch import Batch
from t5pegasus.data.loader import PackedRows
from t5pegasus.data.mixture import Change, Changes, MixtureSchedule
from t5pegasus.data.quarantine import BadExample
from t5pegasus.data.shards import ExampleShards
from t5pegasus.errors import UsageError


class MixedRows:
    """A mixture of packed rows, each row of one source; one source alone is a mixture, too.

    Batches say which source each row is of (`source_ids`), in the order of `names`.
    """

    def __init__(self, sources: Mapping[str, PackedRows], weights: Mapping[str, float], seed: int) -> None:
        """Mix sources from the first row on; `follow` says what was before.

        Args:
            sources: by name, open; they are closed with the mixture.
            weights: of the same names.
            seed: of the order in which they alternate.

        Raises:
            UsageError: if two of them hold the same examples, or examples of different tokenizers.
        """
        self.names = tuple(sources)
        self.sources = tuple(sources.values())
        self._seed = seed
        self._starts = np.cumsum([0] + [rows.num_rows for rows in self.sources])
        self.num_rows = int(self._starts[-1])
        self.borders: Sequence[int] = tuple(self._starts.tolist())
        self._position: dict[str, int] = {}
        for at, (name, rows) in enumerate(sources.items()):
            self._check(name, rows)
            if (same := self._position.setdefault(rows.shards.fingerprint, at)) != at:
                raise UsageError(f"{name} holds the same examples as {self.names[same]}; give each folder once")
        self.weights = {rows.shards.fingerprint: weights[name] for name, rows in sources.items()}
        """Fingerprint of the examples → weight now."""
        self.follow((Change(0, self.weights),))

    @property
    def shards(self) -> ExampleShards:
        """The examples of the first source: all have its tokenizer and special ids."""
        return self.sources[0].shards

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files of all sources."""
        for rows in self.sources:
            rows.close()

    def follow(self, changes: Changes) -> None:
        """Give the rows of the stream the sources that these changes of weights say."""
        self.changes = changes
        self._schedule = MixtureSchedule(changes, self._seed)

    def stream_batch(self, stream_rows: Sequence[int] | np.ndarray) -> Batch:
        """The batch of these rows of the endless stream."""
        wanted = np.asarray(stream_rows, np.int64)
        parts = [
            (self._position[fingerprint], places, self.sources[self._position[fingerprint]].stream_batch(numbers))
            for fingerprint, places, numbers in self._schedule.assign(wanted)
        ]
        return _join(parts, wanted)

    def find_bad_examples(self, stream_rows: Sequence[int] | np.ndarray) -> list[BadExample]:
        """Those among these rows of the stream that cannot be used, by source (`PackedRows.find_bad_examples`)."""
        return [
            bad
            for fingerprint, _, numbers in self._schedule.assign(np.asarray(stream_rows, np.int64))
            for bad in self.sources[self._position[fingerprint]].find_bad_examples(numbers)
        ]

    def recall(self, bad_examples: Mapping[str, Sequence[int]]) -> None:
        """Count examples, by fingerprint, that the run met before it was stopped, and that cannot be used."""
        for rows in self.sources:
            rows.recall(bad_examples.get(rows.shards.fingerprint, ()))

    def ordered_batch(self, table_rows: Sequence[int] | np.ndarray) -> Batch:
        """The batch of these rows of all tables behind each other; from `num_rows` on they are empty, with weight 0."""
        wanted = np.asarray(table_rows, np.int64)
        of_source = np.minimum(np.searchsorted(self._starts, wanted, side="right") - 1, len(self.sources) - 1)
        parts = [
            (int(at), places, self.sources[at].ordered_batch(wanted[places] - self._starts[at]))
            for at in np.unique(of_source)
            if len(places := np.flatnonzero(of_source == at))
        ]
        return _join(parts, wanted)

    def _check(self, name: str, rows: PackedRows) -> None:
        got, wanted = rows.shards.manifest["tokenizer_fingerprint"], self.shards.manifest["tokenizer_fingerprint"]
        if got != wanted:
            raise UsageError(
                f"{rows.shards.path} has another tokenizer than {self.shards.path}: {got[:12]}…, {wanted[:12]}… was "
                "wanted; build all folders of a mixture with the same --tokenizer-path"
            )


def _join(parts: Sequence[tuple[int, np.ndarray, Batch]], row_ids: np.ndarray) -> Batch:
    """One batch of parts, each with its source and the places of its rows."""
    if len(parts) == 1:
        source, _, batch = parts[0]
        joined = dict(zip(Batch._fields, batch)) | {"source_ids": np.full(len(row_ids), source, np.int32)}
    else:
        joined = {name: np.empty((len(row_ids), *array.shape[1:]), array.dtype)
                  for name, array in zip(Batch._fields, parts[0][2])}  # fmt: skip
        for source, places, batch in parts:
            for name, array in zip(Batch._fields, batch):
                joined[name][places] = source if name == "source_ids" else array
    return Batch(**joined | {"row_ids": row_ids.astype(np.uint32)})
