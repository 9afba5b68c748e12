"""Units of work: the input cut into portions of documents, each with its result in a folder on disk.

A result is renamed to its name when it is whole, so that its presence is the mark that the unit is done. Its
examples lie in the order of their shuffle keys: the part that goes into one shard is one contiguous slice.
"""

import dataclasses
import functools
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from os import getpid
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from t5pegasus.corpus.chain import Chain, DocumentExamples, Kind
from t5pegasus.data.records import token_dtype
from t5pegasus.data.shard_files import save_array
from t5pegasus.data.span_corruption import SpanCorruption
from t5pegasus.json_files import read_json, write_json
from t5pegasus.text.read import Document
from t5pegasus.text.shuffle import order_key
from t5pegasus.text.tokenizer import load_tokenizer

MAX_UNIT_DOCUMENTS = 2000
MAX_UNIT_CHARACTERS = 2**20
"""Half a minute of work at most; a restart loses no more than the units under way."""


class Unit(NamedTuple):
    """Consecutive documents of the input."""

    index: int
    documents: list[Document]


@dataclasses.dataclass(frozen=True)
class UnitWork:
    """What makes the examples of a unit; picklable, `start` is called in each worker."""

    kind: Kind
    tokenizer_path: Path
    max_source_tokens: int
    max_target_tokens: int
    seed: int
    folder: Path
    """Where results go."""
    corruption: SpanCorruption | None = None
    """None for sources with their targets."""

    def start(self) -> Callable[[Unit], int]:
        """A function that makes and stores the examples of a unit and gives the number of documents."""
        tokenizer = load_tokenizer(self.tokenizer_path)
        chain = Chain(self.kind, tokenizer, self.max_source_tokens, self.max_target_tokens, self.corruption)
        dtype = token_dtype(tokenizer.vocab_size)
        return functools.partial(_work_off, work=self, chain=chain, dtype=dtype)


class UnitResult:
    """The stored result of one unit; an array is mapped into memory when it is asked for."""

    def __init__(self, folder: Path, index: int) -> None:
        self._path = result_path(folder, index)

    @property
    def statistics(self) -> dict[str, Any]:
        """`documents` read, UTF-8 `bytes`, `dropped` by reason."""
        return read_json(self._path / "statistics.json")

    @property
    def digests(self) -> np.ndarray:
        """uint64 [num_usable_documents, 2]."""
        return self._load("digests")

    @property
    def document_keys(self) -> np.ndarray:
        """uint64 [num_usable_documents]: a hash of each document's id."""
        return self._load("document_keys")

    @property
    def example_keys(self) -> np.ndarray:
        """uint64 [num_examples], ascending."""
        return self._load("example_keys")

    @property
    def example_documents(self) -> np.ndarray:
        """int32 [num_examples]: which usable document it comes from."""
        return self._load("example_documents")

    @property
    def lengths(self) -> np.ndarray:
        """int32 [num_examples, 2]."""
        return self._load("lengths")

    @property
    def token_ends(self) -> np.ndarray:
        """int64 [num_examples]."""
        return self._load("token_ends")

    @property
    def tokens(self) -> np.ndarray:
        """[num_tokens]: source and target of each example, one behind the other."""
        return self._load("tokens")

    def _load(self, name: str) -> np.ndarray:
        return np.load(self._path / f"{name}.npy", mmap_mode="r")


def result_path(folder: Path, index: int) -> Path:
    """Where the result of a unit is, if it is done."""
    return folder / f"{index:08d}"


def cut_units(documents: Iterable[Document]) -> Iterator[Unit]:
    """Units of bounded size; where they are cut depends on the documents alone."""
    unit, characters, index = [], 0, 0
    for document in documents:
        unit.append(document)
        characters += len(document.text)
        if len(unit) == MAX_UNIT_DOCUMENTS or characters >= MAX_UNIT_CHARACTERS:
            yield Unit(index, unit)
            unit, characters, index = [], 0, index + 1
    if unit:
        yield Unit(index, unit)


def _work_off(unit: Unit, *, work: UnitWork, chain: Chain, dtype: np.dtype) -> int:
    dropped: Counter[str] = Counter()
    usable: list[tuple[Document, DocumentExamples]] = []
    for document in unit.documents:
        made = chain.run(document)
        if isinstance(made, str):
            dropped[made] += 1
        else:
            usable.append((document, made))
    statistics = {
        "documents": len(unit.documents),
        "bytes": sum(len(document.text.encode("utf-8")) for document in unit.documents),
        "dropped": dict(sorted(dropped.items())),
    }
    _write_result(result_path(work.folder, unit.index), _to_arrays(usable, work.seed, dtype), statistics)
    return len(unit.documents)


def _to_arrays(usable: list[tuple[Document, DocumentExamples]], seed: int, dtype: np.dtype) -> dict[str, np.ndarray]:
    """The arrays of `UnitResult`. Keys depend on the content alone, not on files or units."""
    digests = b"".join(made.digest for _, made in usable)
    keyed = sorted(
        (order_key(seed, f"{made.digest.hex()}/{number}"), index, source, target)
        for index, (_, made) in enumerate(usable)
        for number, (source, target) in enumerate(made.examples)
    )
    lengths = np.array([(len(source), len(target)) for *_, source, target in keyed], np.int32).reshape(-1, 2)
    tokens = [part for *_, source, target in keyed for part in (source, target)]
    return {
        "digests": np.frombuffer(digests, "<u8").reshape(-1, 2),
        "document_keys": np.array([order_key(seed, document.id) for document, _ in usable], np.uint64),
        "example_keys": np.array([key for key, *_ in keyed], np.uint64),
        "example_documents": np.array([index for _, index, *_ in keyed], np.int32),
        "lengths": lengths,
        "token_ends": lengths.sum(axis=1, dtype=np.int64).cumsum(),
        "tokens": np.concatenate([np.empty(0, dtype), *(np.array(part, dtype) for part in tokens)]),
    }


def _write_result(path: Path, arrays: dict[str, np.ndarray], statistics: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for name, array in arrays.items():
        save_array(temporary / f"{name}.npy", array)
    write_json(temporary / "statistics.json", statistics)
    try:
        temporary.rename(path)
    except OSError:
        if not path.is_dir():  # else a worker of a killed build has just written the same
            raise
        shutil.rmtree(temporary)
