"""Which checkpoint a name means: a run's last good one, its best one, or this very folder."""

import logging
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from t5pegasus.checkpoint.folder import checkpoints_folder, list_checkpoints, verify_checkpoint, verify_structure
from t5pegasus.checkpoint.info import INFO, best_steps, load_checkpoint_info
from t5pegasus.errors import ArtifactError
from t5pegasus.manifest import MANIFEST
from t5pegasus.storage import is_remote

logger = logging.getLogger(__name__)


def verify_for_use(path: Path) -> Any:
    """What naming a checkpoint to use it verifies: all of it on a disk, out of a store what says what it is.

    There the chunks are left to who loads them, because `load_arrays` compares each: all would come over the network
    once more.
    """
    return verify_structure(path) if is_remote(path) else verify_checkpoint(path)


def find_last_good(
    run_path: Path, verify: Callable[[Path], Any] = verify_for_use, damaged: Collection[Path] = ()
) -> Path | None:
    """The newest checkpoint of a run that verifies; damaged ones are named in the log and passed over.

    Args:
        run_path: the run's folder.
        verify: raises an ArtifactError of a damaged checkpoint: `verify_checkpoint` reads every byte,
            `verify_structure` leaves the arrays to who loads them.
        damaged: checkpoints that were found damaged when their arrays were loaded.

    Raises:
        ArtifactError: if there are checkpoints, and all are damaged.
    """
    finished, reasons = list_checkpoints(run_path, committed=is_remote(run_path)), []
    for path in finished:
        if path in damaged:
            continue
        try:
            verify(path)
        except ArtifactError as error:
            logger.warning("%s; going back to the one before", error)
            reasons.append(f": {error}")
        else:
            return path
    if finished:
        raise ArtifactError(
            f"{run_path}: all of its checkpoints are damaged ({', '.join(path.name for path in finished)})"
            f"{''.join(reasons[-1:])}; copy them anew, or delete {checkpoints_folder(run_path)} to begin again"
        )
    return None


def find_best(
    run_path: Path, verify: Callable[[Path], Any] = verify_for_use, damaged: Collection[Path] = ()
) -> Path | None:
    """The checkpoint to use a run by: the best one if it keeps that (`train.keep_best`), else its last good one.

    A best one that is damaged or gone is named in the log, and the one that was best before, or the last one, is taken.
    `verify` and `damaged` are as in `find_last_good`.
    """
    last = find_last_good(run_path, verify, damaged)
    if last is None:
        return None
    for step in reversed(best_steps(load_checkpoint_info(last).history)):
        path = checkpoints_folder(run_path) / str(step)
        if path == last:
            return last
        if path in damaged:
            continue
        try:
            verify(path)
        except ArtifactError as error:
            logger.warning("the best checkpoint of %s cannot be used: %s", run_path, error)
        else:
            return path
    return last


def find_checkpoint(path: Path, verify: Callable[[Path], Any] = verify_for_use, damaged: Collection[Path] = ()) -> Path:
    """The checkpoint a user means: this very folder, or the best or last good one of a run folder (`find_best`).

    `verify` and `damaged` are as in `find_last_good`.

    Raises:
        ArtifactError: if there is none, or it is damaged.
    """
    if (path / INFO).is_file():
        verify(path)
        return path
    found = find_best(path, verify, damaged) if path.is_dir() else None
    if found is None:
        raise ArtifactError(
            f"{path} is neither a checkpoint (a folder with checkpoint.json and {MANIFEST}) nor a run with one "
            "under checkpoints/; check the path, or train first with: t5pegasus pretrain"
        )
    return found
