"""Verbs that work on local files, given places in an object store: what they read is fetched, what they make is put."""

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from t5pegasus.errors import ArtifactError
from t5pegasus.storage import fetch, is_remote, publish, require_unused, staged_path

logger = logging.getLogger(__name__)


def local_checkpoint(path: Path, *, arrays: bool = True) -> Path:
    """The checkpoint a user means (`find_checkpoint`), whole and verified on this machine.

    Args:
        path: a checkpoint or a run.
        arrays: whether they are needed; else description and tokenizer alone are read and verified.

    Raises:
        ArtifactError: if there is none, or it is damaged.
        OSError: if the store fails, or the disk has no room for a copy.
    """
    from t5pegasus.checkpoint import find_checkpoint, verify_checkpoint, verify_structure

    if not is_remote(path):
        return find_checkpoint(path, verify_checkpoint if arrays else verify_structure)
    return _fetch_checkpoint(path, None if arrays else _is_no_array)


def local_source(path: Path) -> Path:
    """A checkpoint or run of ours, as `local_checkpoint`, or another program's model, on this machine."""
    if not is_remote(path):
        return path
    ours = (path / "checkpoint.json").is_file() or (path / "checkpoints").is_dir()
    return _fetch_checkpoint(path, None) if ours else fetch(path)


def _fetch_checkpoint(path: Path, wanted: Callable[[str], bool] | None) -> Path:
    """As `find_checkpoint` of a run decides, where fetching is what verifies."""
    from t5pegasus.checkpoint import best_steps, list_checkpoints, load_checkpoint_info

    if (path / "checkpoint.json").is_file():
        return fetch(path, wanted)
    for candidate in list_checkpoints(path):
        with _passing_over_damage():
            described = fetch(candidate, _is_no_array)
            for step in reversed(best_steps(load_checkpoint_info(described).history)):
                with _passing_over_damage():
                    return fetch(path / "checkpoints" / str(step), wanted)
            return fetch(candidate, wanted)
    raise ArtifactError(
        f"{path} is neither a checkpoint (a folder with checkpoint.json and manifest.json) nor a run with a whole "
        "one under checkpoints/; check the address, or train first with: t5pegasus pretrain"
    )


def _is_no_array(name: str) -> bool:
    return not name.startswith("arrays/")


@contextlib.contextmanager
def _passing_over_damage() -> Iterator[None]:
    try:
        yield
    except ArtifactError as error:
        logger.warning("%s; going back to the one before", error)


@contextlib.contextmanager
def staged_output(output: Path, *, resumes: bool = False) -> Iterator[Path]:
    """Where to make a folder that shall lie at `output`: in a store's case a local folder, put there when it is made.

    Args:
        output: where it shall lie.
        resumes: what makes it can go on with what an interrupted try left.

    Raises:
        UsageError: if something else lies at this address.
        OSError: if the store fails.
    """
    if not is_remote(output):
        yield output
        return
    require_unused(output)
    folder = staged_path(output)
    if not resumes:
        shutil.rmtree(folder.parent, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    yield folder
    publish(folder, output)
    shutil.rmtree(folder.parent)
