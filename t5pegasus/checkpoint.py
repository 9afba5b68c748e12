"""Checkpoints: arrays by dotted name, what they are, and a manifest whose presence alone commits them.

A checkpoint folder holds `arrays/` (Orbax, zarr3, one folder per array), `checkpoint.json`, a copy of the
`tokenizer/`, whatever its writer adds, and, written last, `manifest.json` with the size and SHA-256 of every file.
It is written under a temporary name and renamed when whole; reading verifies it first.
"""

import contextlib
import dataclasses
import logging
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from t5pegasus.arrays import load_arrays, save_arrays
from t5pegasus.config import RunConfig
from t5pegasus.errors import ArtifactError, reading, writing
from t5pegasus.json_files import SCHEMA, check_schema, read_json, write_json
from t5pegasus.manifest import MANIFEST, Files, flush, verify_manifest, write_manifest

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint's arrays are and where they come from."""

    config: RunConfig
    step: int
    rows: int
    compute_dtype: str
    tokenizer_fingerprint: str
    examples_fingerprint: str | None = None
    """Of the examples whose rows were consumed; None before any training."""
    lineage: tuple[dict[str, Any], ...] = ()
    """One entry per growth: plan, its hash, the step, the source's fingerprint."""
    history: tuple[dict[str, Any], ...] = ()
    """Evaluations so far: {step, loss}; where a run keeps its best checkpoint also the score that decides, and `best`,
    whether it was the best until then, and `begins_phase` behind a growth in the run."""
    flops: int | None = None
    """Spent on training this model and those it came from; None if an earlier version, or another program, trained."""

    def to_json(self) -> dict[str, Any]:
        """The content of checkpoint.json."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "CheckpointInfo":
        """The inverse of `to_json`."""
        fields: dict[str, Any] = {key: item for key, item in value.items() if key != "schema"}
        fields["config"] = RunConfig.from_json(fields["config"])
        fields |= {key: tuple(fields[key]) for key in ("lineage", "history")}
        return cls(**fields)


def save_checkpoint(
    path: Path,
    arrays: Mapping[str, jax.Array | np.ndarray],
    info: CheckpointInfo,
    tokenizer_path: Path,
    add_files: Callable[[Path], None] | None = None,
) -> None:
    """Write a checkpoint; every process of a multi-process run calls it and writes its own shards.

    Args:
        path: the folder to create; what lies there already is replaced only once the new one is whole.
        arrays: by dotted name; names beginning with `parameters.` are required.
        info: see CheckpointInfo.
        tokenizer_path: folder copied to `tokenizer/`.
        add_files: called with the unfinished folder, on the first process, to put more into it.

    Raises:
        OSError: if the disk is full, or fails in another way.
    """
    unfinished = path.with_name(path.name + ".unfinished")
    first = jax.process_index() == 0
    if first:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    synchronise(f"begin {path}")
    with writing(path):
        save_arrays(unfinished, arrays)
        if first:
            commit_checkpoint(unfinished, path, info, tokenizer_path, add_files)
    synchronise(f"end {path}")


def commit_checkpoint(
    unfinished: Path,
    path: Path,
    info: CheckpointInfo,
    tokenizer_path: Path,
    add_files: Callable[[Path], None] | None = None,
    known: Files | None = None,
) -> None:
    """Make a folder that holds its arrays already a checkpoint: all that describes them, the manifest, the name.

    Args:
        unfinished: the folder, which gets its name at the end.
        path: that name.
        info: see CheckpointInfo.
        tokenizer_path: folder copied to `tokenizer/`.
        add_files: called with the unfinished folder before its manifest is written; what it raises ends the call.
        known: manifest entries of files that need not be read again.
    """
    shutil.copytree(tokenizer_path, unfinished / "tokenizer", dirs_exist_ok=True)
    write_json(unfinished / "checkpoint.json", info.to_json())
    if add_files is not None:
        add_files(unfinished)
    write_manifest(unfinished, known)
    _put_in_place(unfinished, path)


def finish_saves(run_path: Path) -> None:
    """Give their names to checkpoints of a run that are whole, but whose writer was killed before it could.

    Every process of a multi-process run calls it, before any of them looks for a checkpoint.
    """
    if jax.process_index() == 0:
        for unfinished in (run_path / "checkpoints").glob("*.unfinished"):
            with contextlib.suppress(ArtifactError):  # without a manifest, or damaged since: the next save removes it
                verify_checkpoint(unfinished)
                _put_in_place(unfinished, unfinished.with_suffix(""))
    synchronise(f"saves finished in {run_path}")


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Compare every file with the manifest, which is returned.

    Raises:
        ArtifactError: naming the first file that is missing, surplus, of another size or of other content.
    """
    if not (path / MANIFEST).is_file():
        raise ArtifactError(
            f"{path} is not a finished checkpoint: it has no {MANIFEST}; "
            "give a run folder or one of its checkpoints/STEP folders"
        )
    return verify_manifest(path)


def load_checkpoint_info(path: Path) -> CheckpointInfo:
    """What the checkpoint in this folder is."""
    value = read_json(path / "checkpoint.json")
    check_schema(value, path / "checkpoint.json")
    with reading(path / "checkpoint.json"):
        return CheckpointInfo.from_json(value)


def load_parameters(
    path: Path,
    names: Collection[str] | None = None,
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
) -> dict[str, Any]:
    """The weights to use a checkpoint with, by dotted name.

    This is the one place that decides which they are: the exponential moving average where the run kept one, else the
    trained parameters. Summarizing, evaluating, converting and fine-tuning all take them; continuing a run takes both.

    Args:
        path: a checkpoint folder, verified by the caller.
        names: only these.
        shardings: by name, as in `load_arrays`.
    """
    group = "ema." if has_ema(path) else "parameters."
    prefixes = (group,) if names is None else tuple(group + name for name in names)
    placed = None if shardings is None else {group + name: sharding for name, sharding in shardings.items()}
    arrays = load_arrays(path, prefixes, placed)
    loaded = {name.removeprefix(group): array for name, array in arrays.items()}
    return loaded if names is None else {name: loaded[name] for name in names}


def has_ema(path: Path) -> bool:
    """Whether the checkpoint holds a moving average beside its parameters."""
    return any((path / "arrays").glob("ema.*"))


def list_arrays(path: Path) -> frozenset[str]:
    """The dotted names of a checkpoint's arrays: each has a folder."""
    return frozenset(file.parent.name for file in (path / "arrays").glob("*/zarr.json"))


def has_optimizer_state(path: Path) -> bool:
    """Whether training can continue from this checkpoint, not only start from its parameters."""
    return any((path / "arrays").glob("multipliers.*"))  # optimizers differ in their moments, SGD may have none


def list_checkpoints(run_path: Path) -> list[Path]:
    """The finished checkpoints of a run, newest first."""
    folders = (run_path / "checkpoints").glob("*")
    finished = [folder for folder in folders if folder.name.isdigit() and (folder / MANIFEST).is_file()]
    return sorted(finished, key=lambda folder: int(folder.name), reverse=True)


def find_last_good(run_path: Path) -> Path | None:
    """The newest checkpoint of a run that verifies; damaged ones are named in the log and passed over.

    Raises:
        ArtifactError: if there are checkpoints, and all are damaged.
    """
    finished = list_checkpoints(run_path)
    for path in finished:
        try:
            verify_checkpoint(path)
        except ArtifactError as error:
            logger.warning("%s; going back to the one before", error)
        else:
            return path
    if finished:
        raise ArtifactError(
            f"{run_path}: all of its checkpoints are damaged ({', '.join(path.name for path in finished)}); "
            f"copy them anew, or delete {run_path / 'checkpoints'} to begin again"
        )
    return None


def best_steps(history: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    """The steps of a history that were the best until then; the last is the best of all."""
    return tuple(entry["step"] for entry in history if entry.get("best"))


def find_best(run_path: Path) -> Path | None:
    """The checkpoint to use a run by: the best one if it keeps that (`train.keep_best`), else its last good one.

    A best one that is damaged or gone is named in the log, and the one that was best before, or the last one, is taken.
    """
    last = find_last_good(run_path)
    if last is None:
        return None
    for step in reversed(best_steps(load_checkpoint_info(last).history)):
        path = run_path / "checkpoints" / str(step)
        try:
            verify_checkpoint(path)
        except ArtifactError as error:
            logger.warning("the best checkpoint of %s cannot be used: %s", run_path, error)
        else:
            return path
    return last


def find_checkpoint(path: Path) -> Path:
    """The checkpoint a user means: this very folder, or the best or last good one of a run folder (`find_best`).

    Raises:
        ArtifactError: if there is none, or it is damaged.
    """
    if (path / "checkpoint.json").is_file():
        verify_checkpoint(path)
        return path
    found = find_best(path) if path.is_dir() else None
    if found is None:
        raise ArtifactError(
            f"{path} is neither a checkpoint (a folder with checkpoint.json and {MANIFEST}) nor a run with one "
            "under checkpoints/; check the path, or train first with: t5pegasus pretrain"
        )
    return found


def remove_old_checkpoints(run_path: Path, saved: Path, keep: int, kept_steps: Collection[int] = ()) -> None:
    """Delete all but `keep` checkpoints, counted back from the one just saved, and what killed processes left.

    Those of the steps in `kept_steps`, such as the best one, are kept, too.

    Those of later steps are damaged ones that the run went back behind: they do not count as kept.
    """
    if jax.process_index() != 0:
        return
    folder = run_path / "checkpoints"
    for leftover in (*folder.glob("*.superseded"), *folder.glob("*.unfinished")):
        shutil.rmtree(leftover)
    reached = [path for path in list_checkpoints(run_path) if int(path.name) <= int(saved.name)]
    for path in reached[keep:]:
        if int(path.name) in kept_steps:
            continue
        shutil.rmtree(path.rename(_superseded(path)))


def _put_in_place(unfinished: Path, path: Path) -> None:
    """Give a whole checkpoint its name. Killed between the two renames, `finish_saves` does the second."""
    if path.exists():
        shutil.rmtree(_superseded(path), ignore_errors=True)
        path.rename(_superseded(path))
    unfinished.rename(path)
    flush(path.parent)
    shutil.rmtree(_superseded(path), ignore_errors=True)


def _superseded(path: Path) -> Path:
    return path.with_name(path.name + ".superseded")


def synchronise(name: str) -> None:
    """Wait for all processes of a multi-process run to come to the point of this name."""
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
