"""The folder of a checkpoint: what commits it, what verifies it, and what killed writers leave.

On a disk it is written under a temporary name and renamed when its manifest is there. In an object store, where nothing
can be renamed, it is written under its name, and the manifest, which is put last, commits it; what it replaces is
copied aside before.
"""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from t5pegasus.arrays import FOLDER, list_arrays
from t5pegasus.checkpoint.info import INFO, CheckpointInfo
from t5pegasus.errors import ArtifactError
from t5pegasus.json_files import write_json
from t5pegasus.manifest import MANIFEST, Files, verify_manifest, write_manifest
from t5pegasus.storage import copy_tree, flush, is_remote, remove_tree

logger = logging.getLogger(__name__)

UNFINISHED, SUPERSEDED, PARTS = ".unfinished", ".superseded", ".parts"
"""Endings of the names of folders that are no checkpoints: being written, replaced, and where processes meet."""


def checkpoints_folder(run_path: Path) -> Path:
    """Where the checkpoints of a run lie, each by its step."""
    return run_path / "checkpoints"


def unfinished_folder(path: Path) -> Path:
    """Where the files of a checkpoint are written before it is one."""
    return path if is_remote(path) else path.with_name(path.name + UNFINISHED)


def make_unfinished_folder(path: Path) -> None:
    """An empty folder to write a checkpoint in, whatever lay there; a whole one of this name in a store is kept aside.

    Args:
        path: the name that the checkpoint gets.
    """
    unfinished = unfinished_folder(path)
    if unfinished == path and (path / MANIFEST).is_file():
        remove_tree(_superseded(path))
        copy_tree(path, _superseded(path))  # the manifest last
    remove_tree(unfinished)
    unfinished.mkdir(parents=True)


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
    copy_tree(tokenizer_path, unfinished / "tokenizer")
    write_json(unfinished / INFO, info.to_json())
    if add_files is not None:
        add_files(unfinished)
    write_manifest(unfinished, known)
    if unfinished != path:
        _put_in_place(unfinished, path)


def finish_saves(run_path: Path) -> None:
    """Give their names to checkpoints of a run that are whole, but whose writer was killed before it could.

    What is not whole is removed. Every process of a multi-process run calls it, before any of them looks for a
    checkpoint.
    """
    if find_process()[0] == 0:
        folder = checkpoints_folder(run_path)
        for unfinished in folder.glob(f"*{UNFINISHED}"):
            try:
                verify_checkpoint(unfinished)
            except ArtifactError:
                remove_tree(unfinished)
            else:
                _put_in_place(unfinished, unfinished.with_suffix(""))
        for left in folder.glob(f"*{PARTS}"):
            remove_tree(left)
        if is_remote(folder):
            _finish_in_store(list(folder.glob("*")))
    synchronise(f"saves finished in {run_path}")


def _finish_in_store(paths: list[Path]) -> None:
    for path in paths:
        if path.name.isdigit() and not (path / MANIFEST).is_file():
            logger.info("%s has no %s: it was not finished, and is removed", path, MANIFEST)
            remove_tree(path)
    for left in paths:
        if left.name.endswith(SUPERSEDED):
            remove_superseded(left)


def remove_superseded(left: Path) -> None:
    """Delete what was to be replaced; in a store, where the one in its place is not whole, it gets that back."""
    path = left.with_name(left.name.removesuffix(SUPERSEDED))
    if is_remote(left) and (left / MANIFEST).is_file() and not (path / MANIFEST).is_file():
        remove_tree(path)
        copy_tree(left, path)
    remove_tree(left)


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Compare every file with the manifest, which is returned.

    Raises:
        DamagedError: naming the first file that is missing, surplus, of another size or of other content.
        ArtifactError: if it is no finished checkpoint.
    """
    require_manifest(path)
    return verify_manifest(path)


def verify_structure(path: Path) -> dict[str, Any]:
    """As `verify_checkpoint`, but of the arrays' chunks only the size is compared.

    It is for who loads the arrays next, because `load_arrays` compares the content of each chunk as it reads it.
    """
    require_manifest(path)
    return verify_manifest(path, contents=lambda name: not is_chunk(name))


def require_manifest(path: Path) -> None:
    """Refuse what is no finished checkpoint."""
    if not (path / MANIFEST).is_file():
        raise ArtifactError(
            f"{path} is not a finished checkpoint: it has no {MANIFEST}; "
            "give a run folder or one of its checkpoints/STEP folders"
        )


def is_chunk(name: str) -> bool:
    """Whether a file of a checkpoint holds values of an array: `arrays/NAME/c/…`."""
    return name.startswith(f"{FOLDER}/") and name.split("/")[2:3] == ["c"]


def has_ema(path: Path) -> bool:
    """Whether the checkpoint holds a moving average beside its parameters."""
    return any(name.startswith("ema.") for name in list_arrays(path))


def has_optimizer_state(path: Path) -> bool:
    """Whether training can continue from this checkpoint, not only start from its parameters."""
    # Optimizers differ in their moments, SGD may have none.
    return any(name.startswith("multipliers.") for name in list_arrays(path))


def list_checkpoints(run_path: Path, *, committed: bool = True) -> list[Path]:
    """The finished checkpoints of a run, newest first.

    Args:
        run_path: the run's folder.
        committed: only those that have their manifest. One on a disk that has its name, but no manifest, has lost it.
    """
    folders = [folder for folder in checkpoints_folder(run_path).glob("*") if folder.name.isdigit()]
    finished = [folder for folder in folders if not committed or (folder / MANIFEST).is_file()]
    return sorted(finished, key=lambda folder: int(folder.name), reverse=True)


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint so that at no moment it is half of one: by its name first."""
    if is_remote(path):
        remove_tree(path)  # the manifest first
    else:
        shutil.rmtree(path.rename(_superseded(path)))


def _put_in_place(unfinished: Path, path: Path) -> None:
    """Give a whole checkpoint its name. Killed between the two renames, `finish_saves` does the second."""
    if path.exists():
        shutil.rmtree(_superseded(path), ignore_errors=True)
        path.rename(_superseded(path))
    try:
        unfinished.rename(path)
    except OSError:
        if _superseded(path).exists():
            _superseded(path).rename(path)
        raise
    flush(path.parent)
    shutil.rmtree(_superseded(path), ignore_errors=True)


def _superseded(path: Path) -> Path:
    return path.with_name(path.name + SUPERSEDED)


def find_process() -> tuple[int, int]:
    """Index and number of processes; devices, whose threads take memory, are not started to know them."""
    if jax.distributed.is_initialized():
        return jax.process_index(), jax.process_count()
    return 0, 1


def synchronise(name: str) -> None:
    """Wait for all processes of a multi-process run to come to the point of this name."""
    if find_process()[1] > 1:
        multihost_utils.sync_global_devices(name)
