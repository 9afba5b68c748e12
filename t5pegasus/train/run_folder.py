"""The folder of a run: which files it has, what is recorded in them, and whether a run may continue in it."""

import dataclasses
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from t5pegasus.config import RunConfig
from t5pegasus.errors import UsageError, reading
from t5pegasus.json_files import SCHEMA, check_schema, read_json, write_json
from t5pegasus.storage import copy_tree, fetch, is_remote, open_path, remove_tree
from t5pegasus.train.phases import Event, record_event

logger = logging.getLogger(__name__)

FREE_ON_RESUME = {
    "data": ("mixture", "max_bad_examples"),
    "mesh": ("data", "fsdp", "tensor", "slices"),
    "train": (
        "steps", "batch_size", "accumulation_steps", "log_every_steps", "evaluate_every_steps", "save_every_steps",
        "save_every_seconds", "keep_checkpoints", "keep_every_steps", "patience", "compute_dtype", "on_divergence",
        "spike_factor", "spike_window", "max_skips", "max_rollbacks", "sample_every_steps", "num_samples",
        "profile_steps", "wandb_project", "remat", "scan_unroll", "attention", "vocab_chunk", "split_length",
    ),
}  # fmt: skip
"""What may change when a run continues: the data position counts rows, so batch size is among them; a compute
dtype only if it is named (`find_origin`), and a run that stopped early may be given more patience."""


@dataclasses.dataclass(frozen=True)
class RunPaths:
    """The artifacts a run reads and the folder it writes."""

    run_path: Path
    examples_path: Path
    heldout_path: Path | None = None
    """Examples for the held-out loss; None looks for `examples_path/heldout`."""
    start_from: Path | None = None
    """A checkpoint (trained, grown or converted), or a run folder whose last good one is meant."""

    def to_json(self) -> dict[str, str | None]:
        """Paths as text, for config.json and the metrics."""
        return {field: None if value is None else str(value) for field, value in dataclasses.asdict(self).items()}


def check_run_path(run_path: Path) -> None:
    """Refuse a folder that is another artifact: a run would be written into it.

    Raises:
        UsageError: naming the file that says so.
    """
    for mark in ("manifest.json", "tokenizer.json"):
        if (run_path / mark).is_file():
            raise UsageError(
                f"run path {run_path} is in use: {mark} says that it holds examples, a checkpoint or a tokenizer; "
                "choose another --run-path"
            )


def load_run_record(run_path: Path) -> tuple[RunConfig, dict[str, str | None]] | None:
    """Config and paths of an existing run folder, None if there is none.

    Raises:
        UsageError: if the folder is another artifact, or the record is of another schema.
        ArtifactError: if the record was changed.
    """
    check_run_path(run_path)
    record_path = run_path / "config.json"
    if not record_path.exists():
        return None
    record = read_json(record_path)
    check_schema(record, record_path)
    with reading(record_path):
        paths = {name: record[name] for name in ("examples_path", "heldout_path", "start_from")}
        return RunConfig.from_json(record["config"]), paths


def load_recorded_events(run_path: Path) -> list[dict[str, Any]]:
    """The events that a run was last given, as `record_event` writes them; none if there is no run.

    Raises:
        UsageError: if the record is of another schema.
        ArtifactError: if the record was changed.
    """
    record_path = run_path / "config.json"
    if not record_path.exists():
        return []
    record = read_json(record_path)
    check_schema(record, record_path)
    with reading(record_path):
        return [{name: each[name] for name in ("name", "plan_hash", "asked")} for each in record.get("events", [])]


def settle_run_folder(config: RunConfig, paths: RunPaths, events: Sequence[Event], *, resumed: bool) -> None:
    """Write what the run is made of; what an earlier try left that never saved a checkpoint is replaced.

    `config` is that of the run before all events: what the model is after some of them, its checkpoints say.
    """
    if jax.process_index() != 0:
        return
    tokenizer, unfinished = paths.run_path / "tokenizer", paths.run_path / "tokenizer.unfinished"
    paths.run_path.mkdir(parents=True, exist_ok=True)
    if not (resumed and (tokenizer / "tokenizer.json").is_file()):
        source = fetch(paths.examples_path) / "tokenizer"
        if is_remote(tokenizer):
            remove_tree(tokenizer)
            copy_tree(source, tokenizer)
        else:
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.copytree(source, unfinished)
            shutil.rmtree(tokenizer, ignore_errors=True)
            unfinished.rename(tokenizer)
    planned = {"events": [record_event(event) for event in events]} if events else {}
    record = {"schema": SCHEMA, "config": config.to_json(), **paths.to_json(), **planned}
    write_json(paths.run_path / "config.json", record)


def keep_start(paths: RunPaths, begun_from: str | None) -> RunPaths:
    """The paths with the checkpoint the run really began from, whichever is given now."""
    begun = None if begun_from is None else open_path(begun_from)
    if paths.start_from is not None and (begun is None or begun.resolve() != paths.start_from.resolve()):
        logger.warning(
            "%s continues from its own checkpoint; it was begun from %s, so %s is not used: "
            "choose another --run-path to start from it",
            paths.run_path, begun or "fresh parameters", paths.start_from,
        )  # fmt: skip
    return dataclasses.replace(paths, start_from=begun)


def check_record(before: RunConfig | None, now: RunConfig, run_path: Path) -> None:
    """Refuse to continue a run with a config that would not have led to where it is, or to begin one in vain.

    Args:
        before: what it was begun with; None for a new one.
        now: the config given.
        run_path: of the run.

    Raises:
        UsageError: naming the first field that differs, or that would have no effect.
    """
    if before is None:
        now.optimizer.refuse_idle_fields()
        return
    old, new = before.to_json(), now.to_json()
    for group, fields in new.items():
        for field, value in fields.items():
            if field not in FREE_ON_RESUME.get(group, ()) and old[group][field] != value:
                raise UsageError(
                    f"{run_path} was begun with {group}.{field}={old[group][field]!r}, got {value!r}; "
                    "to continue it give the same preset and flags as before; or choose another --run-path"
                )
