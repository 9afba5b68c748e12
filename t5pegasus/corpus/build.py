"""A build: raw documents → a folder of examples, in steps that a killed build continues.

1. Units of documents become examples on all cores, each unit's result in a folder of its own.
2. Duplicates and held-out documents are chosen, from digests alone.
3. Every shard collects its examples from all units.
4. Lengths, tokenizer and manifest complete the folder, which then gets its name.

All intermediate files lie in `.OUTPUT.building` beside the output and bear their names only when they are whole.
What the output contains depends on input, configuration and tokenizer alone, not on workers or restarts.
"""

import dataclasses
import fcntl
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from t5pegasus.corpus.chain import Kind, Objective
from t5pegasus.corpus.engines import count_cores, run_tasks
from t5pegasus.corpus.exchange import (
    HELDOUT,
    TRAIN,
    ShardTask,
    ShardWork,
    choose_documents,
    count_shards,
    mark_path,
)
from t5pegasus.corpus.inputs import describe_inputs, estimate_documents
from t5pegasus.corpus.pairs import check_pair_paths, read_pairs
from t5pegasus.corpus.units import Unit, UnitResult, UnitWork, cut_units, result_path
from t5pegasus.data.shard_files import LENGTHS, MANIFEST, Shard, save_array, write_manifest
from t5pegasus.data.span_corruption import SpanCorruption
from t5pegasus.errors import ArtifactError, DataError, UsageError
from t5pegasus.json_files import read_json, write_json
from t5pegasus.progress import Progress
from t5pegasus.storage import fetch, is_remote, open_path, publish, require_unused, staged_path
from t5pegasus.text.read import check_paths, describe_dropped, read_documents
from t5pegasus.text.tokenizer import Tokenizer, load_tokenizer
from t5pegasus.text.tokenizer.sentinels import find_sentinels

PIPELINE = 2
"""Raised when the same input and configuration would give other examples."""
HELDOUT_FOLDER = "heldout"
DUPLICATE_REASON = "duplicate"


@dataclasses.dataclass(frozen=True)
class BuildConfig:
    """What decides the examples, besides input and tokenizer."""

    kind: Kind = "pretrain"
    """pretrain: documents, from which pseudo-summaries are made; pairs: texts with their summaries."""
    max_source_tokens: int = 384
    max_target_tokens: int = 128
    """With the specials. Documents are cut into chunks of 1.5 characters per token of both together."""
    heldout_documents: int = 0
    """Documents kept apart for evaluation, in the folder `heldout` inside the output."""
    seed: int = 0
    """Of the order of the examples and the choice of held-out documents."""
    objective: Objective = "pseudo-summary"
    """What is learned from documents: to write their pseudo-summary, or the spans cut out of them."""
    corruption_rate: float = 0.15
    """Of span corruption: the share of the tokens that is cut out."""
    mean_span_tokens: float = 3.0
    """Of span corruption: how many tokens are cut out in one place, on average."""

    def __post_init__(self) -> None:
        for name, least in (("max_source_tokens", 3), ("max_target_tokens", 2), ("heldout_documents", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name}={getattr(self, name)} must be at least {least}")
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"seed={self.seed} must lie in [0, 2^32)")
        if self.kind not in ("pretrain", "pairs"):
            raise UsageError(f"kind={self.kind!r} is unknown; choose 'pretrain' or 'pairs'")
        if self.objective not in ("pseudo-summary", "span-corruption"):
            raise UsageError(f"objective={self.objective!r} is unknown; choose 'pseudo-summary' or 'span-corruption'")
        if self.kind == "pairs" and self.objective != "pseudo-summary":
            raise UsageError(f"objective={self.objective} is for documents; leave it out for kind=pairs")
        if not 0 < self.corruption_rate < 1:
            raise UsageError(f"corruption_rate={self.corruption_rate} must lie between 0 and 1")
        if not 1 <= self.mean_span_tokens < math.inf:
            raise UsageError(f"mean_span_tokens={self.mean_span_tokens} must be at least 1")

    def to_json(self) -> dict[str, Any]:
        """What manifests keep; what is of one objective alone only there."""
        fields = dataclasses.asdict(self)
        if self.objective == "pseudo-summary":
            for name in ("objective", "corruption_rate", "mean_span_tokens"):
                del fields[name]
        return fields


def build_examples(
    inputs: Sequence[Path | str],
    tokenizer_path: Path | str,
    output_path: Path | str,
    config: BuildConfig,
    num_workers: int | None = None,
) -> bool:
    """Build a folder of examples (see `data.shards`), and its held-out part, or continue doing so.

    Args:
        inputs: files of documents (jsonl, gz, zst, txt, parquet) or pairs (jsonl, tsv, gz, zst); of those in an object
            store a copy is made on this machine.
        tokenizer_path: a tokenizer folder; a copy goes into the output.
        output_path: the folder to write; it appears when all of it is there.
        config: what to make.
        num_workers: processes, default one per core; 1 works in this process.

    Returns:
        False if the output was there already, from the same inputs and configuration.

    Raises:
        UsageError: for inputs that cannot be read, an output in use, or a build of it that is running.
        ArtifactError: if output or interrupted build come from something else, naming the difference.
        DataError: if no document can be used, saying why.
    """
    files = [fetch(open_path(str(path))) for path in inputs]
    paths = (check_paths if config.kind == "pretrain" else check_pair_paths)(files)
    tokenizer_path, output = fetch(open_path(str(tokenizer_path))), open_path(str(output_path))
    tokenizer = load_tokenizer(tokenizer_path)
    request = {
        "pipeline": PIPELINE,
        **config.to_json(),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "inputs": describe_inputs(paths),
    }
    corruption = _plan_corruption(config, tokenizer) if config.objective == "span-corruption" else None
    num_workers = count_cores() if num_workers is None else num_workers
    if num_workers < 1:
        raise UsageError(f"num_workers={num_workers} must be at least 1")
    if _is_finished(output, request):
        return False
    with _open_workplace(output, request) as work:
        units = UnitWork(
            kind=config.kind,
            tokenizer_path=tokenizer_path,
            max_source_tokens=config.max_source_tokens,
            max_target_tokens=config.max_target_tokens,
            seed=config.seed,
            folder=work / "units",
            corruption=corruption,
        )
        num_units, documents = _make_units(paths, units, num_workers)
        documents = _write_shards(work, documents, num_units, config, tokenizer.unk_id, num_workers)
        if config.heldout_documents:
            num_heldout = config.heldout_documents
            held = {"read": num_heldout, "kept": num_heldout, "heldout": 0, "dropped": {}}
            _complete(work, HELDOUT, {**request, "split": "heldout"}, held, tokenizer, corruption)
        _complete(work, TRAIN, {**request, "split": "train"}, documents, tokenizer, corruption)
        publish(_folder_of(work, TRAIN), output)
    return True


def describe_drops(documents: dict[str, Any]) -> str | None:
    """A warning if more than half of the documents were dropped: mostly a sign of the wrong input."""
    num_dropped = sum(documents["dropped"].values())
    if 2 * num_dropped <= documents["read"]:
        return None
    reason, count = max(documents["dropped"].items(), key=lambda item: item[1])
    return (
        f"{num_dropped:,} of {documents['read']:,} documents were dropped, {count:,} of them as {reason!r}; "
        "are these the right files?"
    )


def _is_finished(output: Path, request: dict[str, Any]) -> bool:
    if (output / MANIFEST).is_file():
        made_of = read_json(output / MANIFEST).get("config", {})
        _require_same(request, made_of, f"{output} was built", "choose another output path or remove it")
        shutil.rmtree(_work_path(output), ignore_errors=True)  # killed after the last step
        return True
    if is_remote(output):
        require_unused(output)
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"output path {output} is in use by something else; remove it or choose another one")
    return False


def _require_same(request: dict[str, Any], made_of: dict[str, Any], subject: str, way_out: str) -> None:
    for name, wanted in request.items():
        got = made_of.get(name)
        if got != wanted:
            raise ArtifactError(f"{subject} with {name}={got!r}, now {name}={wanted!r} is asked for; {way_out}")


def _work_path(output: Path) -> Path:
    output = staged_path(output) if is_remote(output) else output.absolute()
    return output.with_name(f".{output.name}.building")


def _folder_of(work: Path, fate: int) -> Path:
    return work / "output" if fate == TRAIN else work / "output" / HELDOUT_FOLDER


@contextmanager
def _open_workplace(output: Path, request: dict[str, Any]) -> Iterator[Path]:
    """The folder of intermediate files, of one build alone; removed in the end unless it can be continued."""
    work = _work_path(output)
    for folder in (work / "units", work / "marks", _folder_of(work, TRAIN)):
        folder.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go by the kernel, also after kill -9
        except BlockingIOError:
            raise UsageError(f"another process is building {output}; wait for it or stop it") from None
        if (work / "request.json").is_file():
            subject = f"an interrupted build of {output} began"
            _require_same(request, read_json(work / "request.json"), subject, f"to start anew remove {work}")
        else:
            write_json(work / "request.json", request)
        try:
            yield work
        except (DataError, UsageError):
            shutil.rmtree(work)
            raise
    shutil.rmtree(work)


def _make_units(paths: Sequence[Path], work: UnitWork, num_workers: int) -> tuple[int, dict[str, Any]]:
    """Step 1; returns the number of units, and the account of what was read and dropped."""
    done_path = work.folder / "reading.json"
    if not done_path.is_file():
        dropped: Counter[str] = Counter()
        read = read_documents if work.kind == "pretrain" else read_pairs
        num_units = 0
        with Progress("build: documents", estimate_documents(paths), "documents") as progress:

            def missing_units() -> Iterator[Unit]:
                nonlocal num_units
                num_documents = 0
                for unit in cut_units(read(paths, dropped)):
                    num_units += 1
                    if result_path(work.folder, unit.index).is_dir():
                        progress.skip(len(unit.documents))
                    else:
                        yield unit
                    num_documents += len(unit.documents)
                progress.total = num_documents  # no estimate any more

            for num_documents in run_tasks(work.start, missing_units(), num_workers):
                progress.advance(num_documents)
        write_json(done_path, {"num_units": num_units, "unreadable": dict(dropped)})
    reading = read_json(done_path)
    return reading["num_units"], _account(work.folder, **reading)


def _account(units_path: Path, num_units: int, unreadable: dict[str, int]) -> dict[str, Any]:
    """Documents read and dropped by reason, and UTF-8 bytes of their texts.

    Raises:
        DataError: if nothing is left.
    """
    num_read, num_bytes, dropped = sum(unreadable.values()), 0, Counter(unreadable)
    for index in range(num_units):
        statistics = UnitResult(units_path, index).statistics
        dropped.update(statistics["dropped"])
        num_read += statistics["documents"]
        num_bytes += statistics["bytes"]
    if dropped.total() == num_read:
        reasons = describe_dropped(dropped) or "the files have none"
        raise DataError(f"none of the {num_read:,} documents can be used: {reasons}")
    return {"read": num_read, "bytes": num_bytes, "dropped": dict(sorted(dropped.items()))}


def _write_shards(
    work: Path, account: dict[str, Any], num_units: int, config: BuildConfig, unk_id: int, num_workers: int
) -> dict[str, Any]:
    """Steps 2 and 3; returns the whole account: read = kept + heldout + all that was dropped."""
    choice = choose_documents(work / "units", num_units, config.heldout_documents)
    fates_path = work / "fates.npy"
    save_array(fates_path, choice.fates)
    tasks = []
    for fate in (TRAIN, HELDOUT)[: 2 if config.heldout_documents else 1]:
        _folder_of(work, fate).mkdir(exist_ok=True)
        num_shards = count_shards(choice.num_tokens[fate])
        tasks += [ShardTask(fate, index, num_shards, _folder_of(work, fate)) for index in range(num_shards)]
    shards = ShardWork(work / "units", num_units, fates_path, work / "marks", unk_id)
    missing = [task for task in tasks if not mark_path(shards.marks_path, task).is_file()]
    with Progress("build: shards", len(tasks), "shards") as progress:
        progress.skip(len(tasks) - len(missing))
        for _ in run_tasks(shards.start, missing, min(num_workers, max(len(missing), 1))):
            progress.advance()
    num_duplicates, num_kept, num_heldout = np.bincount(choice.fates, minlength=3).tolist()
    dropped = account["dropped"] | ({DUPLICATE_REASON: num_duplicates} if num_duplicates else {})
    return {**account, "kept": num_kept, "heldout": num_heldout, "dropped": dropped}


def _complete(
    work: Path,
    fate: int,
    config: dict[str, Any],
    documents: dict[str, Any],
    tokenizer: Tokenizer,
    corruption: SpanCorruption | None,
) -> None:
    """Step 4 for one folder whose shards are there."""
    folder = _folder_of(work, fate)
    for leftover in [*folder.glob(".*"), *folder.glob("tokenizer*")]:  # of a try that was killed here
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    marks = sorted((work / "marks").glob(f"{fate}-*.json"))
    lengths = [np.load(mark.with_suffix(".npy")) for mark in marks]
    save_array(folder / LENGTHS, np.concatenate(lengths))
    tokenizer.save(folder / "tokenizer")
    facts = [read_json(mark) for mark in marks]
    write_manifest(
        folder,
        shards=[Shard(**fact["shard"]) for fact in facts],
        config=config,
        documents=documents,
        num_unknown_tokens=sum(fact["num_unknown_tokens"] for fact in facts),
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer.fingerprint,
        pad_id=tokenizer.pad_id,
        start_id=tokenizer.start_id,
        end_id=tokenizer.end_id,
        corruption=corruption,
    )


def _plan_corruption(config: BuildConfig, tokenizer: Tokenizer) -> SpanCorruption:
    """How texts will be corrupted, with as many sentinels as the longest of them needs.

    Raises:
        UsageError: if the tokenizer lacks sentinels, or no text fits the lengths.
    """
    prefix_ids = tuple(tokenizer.encode_source("", 2)[:-1])
    plan = SpanCorruption(config.corruption_rate, config.mean_span_tokens, (), prefix_ids, tokenizer.end_id)
    longest = plan.longest(config.max_source_tokens, config.max_target_tokens)
    if longest < 3:  # so that pieces of about the same length have 2 tokens at least
        raise UsageError(
            f"max_source_tokens={config.max_source_tokens} and max_target_tokens={config.max_target_tokens} leave no "
            "room for a text of span corruption; give more"
        )
    num_spans = int(plan.count(np.array(longest))[1])
    return plan._replace(sentinel_ids=find_sentinels(tokenizer, num_spans))
