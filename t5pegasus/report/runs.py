"""What the JSON files of a run say, and which run it came from; nothing is computed here, nothing made up."""

import dataclasses
import functools
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from t5pegasus.errors import ArtifactError, reading
from t5pegasus.json_files import check_schema, read_json
from t5pegasus.storage import is_remote_text, open_path
from t5pegasus.train.goodput import read_attempts

logger = logging.getLogger(__name__)

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Growth:
    """A grown checkpoint between two runs."""

    path: Path
    step: int
    plan: Json
    receipt: Json
    costs: Json | None = None
    """What making it took; None where that is not known."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What `t5pegasus evaluate` wrote into a folder; a file that is absent is None or empty here."""

    name: str
    scores: Json | None
    summaries: tuple[Json, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A run folder as its files tell it; a file that is absent is None or empty here."""

    path: Path
    config: Json
    """RunConfig's JSON."""
    paths: Json
    """examples_path, heldout_path, start_from as the run was given them."""
    records: tuple[Json, ...]
    """Lines of metrics.jsonl, in order."""
    num_unreadable_lines: int
    examples: Json | None
    """Manifest of the examples."""
    heldout: Json | None
    """Manifest of the held-out examples."""
    checkpoints: tuple[Json, ...]
    """Descriptions of the checkpoints kept, oldest first."""
    evaluation: Evaluation
    attempts: tuple[Json, ...]
    """Lines of goodput.jsonl: what the time of each attempt was spent on."""
    parent: "Run | None"
    """The run whose checkpoint this one started from."""
    growths: tuple[Growth, ...]
    """What happened to that checkpoint in between."""

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    def of_kind(self, kind: str) -> list[Json]:
        """Its records of one kind."""
        return [record for record in self.records if record.get("kind") == kind]

    def curve(self, kind: str, field: str) -> list[tuple[float, float]]:
        """(step, value) of one field, for the records that have it."""
        return [(record["step"], record[field]) for record in self.of_kind(kind) if record.get(field) is not None]

    @functools.cached_property
    def first_step(self) -> int:
        """Where it began: behind 0 if it went on counting the steps of its parent."""
        return self.records[0]["step"] if self.records else 0

    @functools.cached_property
    def last_step(self) -> int:
        """The last step of which anything is recorded."""
        return max([record["step"] for record in self.records], default=0)

    @property
    def own_growths(self) -> list[Json]:
        """Records of the growths while it trained, oldest first."""
        return self.of_kind("growth")

    @property
    def models(self) -> list[Json]:
        """The models it trained, one after the other: that of its config, then those it grew to."""
        return [self.config["model"], *(record["target"] for record in self.own_growths)]

    @property
    def continues(self) -> bool:
        """Whether its steps go on where its parent's ended; fine-tuning counts anew."""
        return self.parent is not None and self.first_step > 0


def load_runs(paths: Iterable[Path]) -> list[Run]:
    """The runs in these folders and all they came from, ancestors first, each once.

    Raises:
        ArtifactError: if a folder is no run.
    """
    runs: dict[Path, Run] = {}
    for path in paths:
        _load(path.resolve(), runs)
    return list(runs.values())


def load_evaluation(path: Path) -> Evaluation:
    """What was evaluated in a run, or in a folder of scores beside a checkpoint."""
    return Evaluation(
        path.name, _read_if_there(path / "scores.json"), tuple(read_json_lines(path / "summaries.jsonl")[0])
    )


def group_runs(runs: Iterable[Run]) -> list[list[Run]]:
    """Runs that share one axis of steps, together: a run and all that continue it."""
    groups: list[list[Run]] = []
    for run in runs:
        home = next((group for group in groups if run.continues and run.parent in group), None)
        if home is None:
            groups.append([run])
        else:
            home.append(run)
    return groups


def read_json_lines(path: Path) -> tuple[list[Json], int]:
    """The objects in a .jsonl file that may not exist, and how many lines are no objects (cut off by a kill)."""
    if not path.is_file():
        return [], 0
    objects, num_unreadable = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            objects.append(value)
        else:
            num_unreadable += 1
    return objects, num_unreadable


def _load(path: Path, runs: dict[Path, Run]) -> Run:
    if path in runs:
        return runs[path]
    with reading(path):
        return _load_new(path, runs)


def _load_new(path: Path, runs: dict[Path, Run]) -> Run:
    if not (path / "config.json").is_file():
        raise ArtifactError(
            f"{path} is no run folder: config.json is missing, and scores.json, too; give one that t5pegasus "
            "pretrain, finetune or evaluate wrote"
        )
    record = _read_json(path / "config.json")
    start_from = _locate(record.get("start_from"), path)
    if start_from is not None and path in (start_from, *start_from.parents):
        start_from = None  # of a run that was moved alone, `checkpoints/STEP` is found in itself
    growths, source = _follow_growths(start_from, path) if start_from else ((), None)
    parent_path = _run_of(source)
    parent = _load(parent_path, runs) if parent_path else None
    records, num_unreadable = read_json_lines(path / "metrics.jsonl")
    if num_unreadable:
        logger.warning(
            "%s: %d unreadable lines are left out; a run that is killed cuts off its last one", path / "metrics.jsonl",
            num_unreadable,
        )  # fmt: skip
    examples_path = _locate(record.get("examples_path"), path)
    heldout_path = _locate(record.get("heldout_path"), path) or (examples_path and examples_path / "heldout")
    runs[path] = Run(
        path=path,
        config=record["config"],
        paths={key: record.get(key) for key in ("examples_path", "heldout_path", "start_from")},
        records=tuple(entry for entry in records if isinstance(entry.get("step"), int)),
        num_unreadable_lines=num_unreadable,
        examples=_read_if_there(examples_path and examples_path / "manifest.json"),
        heldout=_read_if_there(heldout_path and heldout_path / "manifest.json"),
        checkpoints=tuple(_checkpoints(path)),
        evaluation=load_evaluation(path),
        attempts=tuple(read_attempts(path)),
        parent=parent,
        growths=growths,
    )
    return runs[path]


def _locate(given: str | None, run_path: Path) -> Path | None:
    """A path of config.json as given, or, if all was moved together, its longest end that is beside the run."""
    if given is None:
        return None
    if is_remote_text(given):
        there = open_path(given)
        return there if there.exists() else None
    parts = Path(given).parts
    ends = (Path(*parts[first:]) for first in range(len(parts)))
    candidates = (above / end for end in ends for above in (Path(), run_path, *run_path.parents[:2]))
    return next((path.resolve() for path in candidates if path.exists()), None)


def _follow_growths(checkpoint: Path, run_path: Path) -> tuple[tuple[Growth, ...], Path | None]:
    """The growths behind a checkpoint, oldest first, and the folder that the first of them grew."""
    growths: list[Growth] = []
    source: Path | None = checkpoint
    while source is not None and (source / "receipt.json").is_file():
        info, receipt = _read_json(source / "checkpoint.json"), _read_json(source / "receipt.json")
        entry = info["lineage"][-1]
        costs = _read_if_there(source.with_name(source.name + ".costs.json"))
        growths.insert(0, Growth(source, info["step"], entry["plan"], receipt, costs))
        source = _find_checkpoint(entry["source_fingerprint"], near=(source, run_path))
    return tuple(growths), source


def _find_checkpoint(fingerprint: str, near: Iterable[Path]) -> Path | None:
    """The checkpoint with this fingerprint, in a run or alone, beside one of these folders."""
    for place in near:
        for pattern in ("*/checkpoints/*/manifest.json", "*/manifest.json"):
            for manifest in sorted(place.parent.glob(pattern)):
                if read_json(manifest).get("fingerprint") == fingerprint:
                    return manifest.parent
    return None


def _run_of(checkpoint: Path | None) -> Path | None:
    """The run folder that a checkpoint lies in, or that was itself given as `start_from`."""
    if checkpoint is None:
        return None
    return next((path for path in (checkpoint, checkpoint.parent.parent) if (path / "metrics.jsonl").is_file()), None)


def _checkpoints(run_path: Path) -> Iterator[Json]:
    folders = [path for path in (run_path / "checkpoints").glob("*") if path.name.isdigit()]
    for folder in sorted(folders, key=lambda path: int(path.name)):
        if (folder / "manifest.json").is_file():
            yield _read_json(folder / "checkpoint.json")


def _read_if_there(path: Path | None) -> Json | None:
    return _read_json(path) if path is not None and path.is_file() else None


def _read_json(path: Path) -> Json:
    value = read_json(path)
    check_schema(value, path)
    return value
