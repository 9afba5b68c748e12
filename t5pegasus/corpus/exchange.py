"""From unit results to shards: duplicates out, held-out documents apart, everything in one global order.

An example's place in that order is its shuffle key, a seeded hash of its content. Shard s of S holds the
keys of the s-th of S equal ranges, so any process can write any shard by reading one slice of every unit.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from t5pegasus.corpus.units import UnitResult
from t5pegasus.data.records import pack_record
from t5pegasus.data.shard_files import save_array, shard_name, write_shard
from t5pegasus.errors import UsageError
from t5pegasus.json_files import write_json
from t5pegasus.text.deduplicate import find_first_occurrences

TOKENS_PER_SHARD = 2**25
"""64 MiB of ids; a worker holds about twice that."""

DUPLICATE, TRAIN, HELDOUT = 0, 1, 2
"""What becomes of a document."""


class Choice(NamedTuple):
    """The fate of every usable document, and the size of what it leads to."""

    fates: np.ndarray
    """uint8 [num_usable_documents]: DUPLICATE, TRAIN or HELDOUT, in input order."""
    num_tokens: dict[int, int]
    """Of the examples of each fate but DUPLICATE."""


def choose_documents(units_path: Path, num_units: int, heldout_documents: int) -> Choice:
    """Keep the first of equal documents; of those, hold out the ones with the smallest hash of their id.

    Raises:
        UsageError: if all would be held out.
    """
    results = [UnitResult(units_path, index) for index in range(num_units)]
    digests = np.concatenate([result.digests for result in results])
    keys = np.concatenate([result.document_keys for result in results])
    fates = np.where(find_first_occurrences(digests), TRAIN, DUPLICATE).astype(np.uint8)
    kept = np.flatnonzero(fates)
    if heldout_documents >= len(kept):
        raise UsageError(
            f"heldout_documents={heldout_documents} leaves nothing to train on: {len(kept)} documents are "
            "usable; hold out fewer"
        )
    fates[kept[np.argsort(keys[kept], kind="stable")[:heldout_documents]]] = HELDOUT
    num_tokens = {TRAIN: 0, HELDOUT: 0}
    first = 0
    for result in results:
        num_documents = len(result.digests)
        of_example = fates[first : first + num_documents][result.example_documents]
        for fate in num_tokens:
            num_tokens[fate] += int(result.lengths[of_example == fate].sum(dtype=np.int64))
        first += num_documents
    return Choice(fates, num_tokens)


def count_shards(num_tokens: int) -> int:
    """Shards for so many tokens."""
    return max(1, -(-num_tokens // TOKENS_PER_SHARD))


class ShardTask(NamedTuple):
    """One file of examples to write."""

    fate: int
    """TRAIN or HELDOUT."""
    index: int
    num_shards: int
    folder: Path
    """The folder of examples it belongs to."""


@dataclasses.dataclass(frozen=True)
class ShardWork:
    """What writes shards; picklable, `start` is called in each worker."""

    units_path: Path
    num_units: int
    fates_path: Path
    marks_path: Path
    """Receives, per shard, its lengths and, last, what the manifest will say of it: the mark that it is done."""
    unk_id: int

    def start(self) -> Callable[[ShardTask], int]:
        """A function that writes a shard and gives its number of examples."""
        return functools.partial(_write, work=self, fates=np.load(self.fates_path, mmap_mode="r"))


def mark_path(marks_path: Path, task: ShardTask) -> Path:
    """The file that says that a shard is done."""
    return marks_path / f"{task.fate}-{task.index:05d}.json"


def _write(task: ShardTask, *, work: ShardWork, fates: np.ndarray) -> int:
    keys, records, lengths = [], [], []
    num_unknown_tokens, first_document = 0, 0
    for result in (UnitResult(work.units_path, index) for index in range(work.num_units)):
        all_keys, all_lengths, ends, tokens = (
            result.example_keys, result.lengths, result.token_ends, result.tokens
        )  # fmt: skip
        begin, end = _range_of_shard(all_keys, task.index, task.num_shards)
        documents = result.example_documents[begin:end] + first_document
        first_document += len(result.digests)
        for example in begin + np.flatnonzero(fates[documents] == task.fate):
            num_source, num_target = all_lengths[example].tolist()
            stop = int(ends[example])
            ids = tokens[stop - num_source - num_target : stop]
            keys.append(all_keys[example])
            records.append(pack_record(ids[:num_source], ids[num_source:], ids.dtype))
            lengths.append((num_source, num_target))
            num_unknown_tokens += int(np.count_nonzero(ids == work.unk_id))
    order = np.argsort(np.array(keys, np.uint64), kind="stable")
    shard = write_shard(task.folder / shard_name(task.index, task.num_shards), (records[i] for i in order))
    mark = mark_path(work.marks_path, task)
    save_array(mark.with_suffix(".npy"), np.array(lengths, np.int32).reshape(-1, 2)[order])
    write_json(mark, {"shard": dataclasses.asdict(shard), "num_unknown_tokens": num_unknown_tokens})
    return len(records)


def _range_of_shard(keys: np.ndarray, index: int, num_shards: int) -> tuple[int, int]:
    """Where the ascending keys of a shard's range begin and end."""

    def place(shard: int) -> int:
        border = -(-(shard << 64) // num_shards)
        return len(keys) if border >> 64 else int(np.searchsorted(keys, np.uint64(border)))

    return place(index), place(index + 1)
