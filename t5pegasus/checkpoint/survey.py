"""What lies in a run's checkpoints folder: finished, damaged and unfinished checkpoints, and what is known of each."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from t5pegasus.checkpoint.folder import UNFINISHED, checkpoints_folder, is_chunk
from t5pegasus.checkpoint.info import CheckpointInfo, best_steps, load_checkpoint_info
from t5pegasus.errors import ArtifactError, T5PegasusError
from t5pegasus.manifest import MANIFEST, find_problems
from t5pegasus.storage import is_remote, list_files


@dataclasses.dataclass(frozen=True)
class Entry:
    """One folder under `checkpoints/`."""

    path: Path
    state: str
    """good, damaged or unfinished."""
    bytes: int
    age_seconds: float | None
    """Since it was committed; None if nothing says that it was."""
    step: int | None = None
    loss: float | None = None
    """Held-out, of the evaluation at this step."""
    best: bool = False
    """Whether it is the one meant by the run's name, where the run keeps its best."""
    problem: str | None = None
    """The first thing that is wrong with it."""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"name": fields.pop("path").name, **fields}


def survey_run(run_path: Path, contents: Callable[[str], bool] = lambda name: not is_chunk(name)) -> list[Entry]:
    """The checkpoints of a run by step, the unfinished ones behind.

    Args:
        run_path: a run's folder, or one checkpoint.
        contents: which files to compare with the manifest by content, by name; of the others the size is compared. Not
            given, the arrays' chunks are not read, so that damage within them stays unknown.

    Raises:
        ArtifactError: if there is nothing.
    """
    if (run_path / MANIFEST).is_file():
        folders = [run_path]
    else:
        found = checkpoints_folder(run_path).glob("*")
        folders = sorted((each for each in found if _step(each.name) is not None), key=lambda each: _order(each.name))
    if not folders:
        raise ArtifactError(
            f"{run_path} is neither a checkpoint nor a run with one under checkpoints/; check the path, or train first "
            "with: t5pegasus pretrain"
        )
    entries = [found for folder in folders if (found := _survey_if_there(folder, contents)) is not None]
    infos = [info for _, info in entries if info is not None]
    best = best_steps(max(infos, key=lambda info: info.step).history)[-1:] if infos else ()
    return [dataclasses.replace(entry, best=entry.state == "good" and entry.step in best) for entry, _ in entries]


def list_problems(path: Path) -> Iterator[str]:
    """Everything that is wrong with a checkpoint, each as a sentence; every byte of it is read.

    Yields:
        Also what is wrong with the manifest itself, which is then all that can be said.
    """
    try:
        yield from find_problems(path)
        load_checkpoint_info(path)
    except T5PegasusError as error:
        yield str(error)
    except FileNotFoundError as error:
        yield f"file {error.filename} was deleted meanwhile"


def _survey_if_there(path: Path, contents: Callable[[str], bool]) -> tuple[Entry, CheckpointInfo | None] | None:
    """None of a checkpoint that the run has deleted, or given its name, while it was looked at."""
    try:
        found = _survey(path, contents)
    except FileNotFoundError:
        if path.exists():
            raise
        return None
    return None if found[0].state == "damaged" and not path.exists() else found


def _survey(path: Path, contents: Callable[[str], bool]) -> tuple[Entry, CheckpointInfo | None]:
    size, mark = sum(list_files(path).values()), path / MANIFEST
    if path.name.endswith(UNFINISHED) or (is_remote(path) and not mark.is_file()):
        return Entry(path, "unfinished", size, None, _step(path.name)), None
    if not mark.is_file():  # on a disk it has its name only when this is there
        return Entry(path, "damaged", size, None, _step(path.name), problem=f"file {MANIFEST} is missing"), None
    age = time.time() - mark.stat().st_mtime
    try:
        for problem in find_problems(path, contents):
            return Entry(path, "damaged", size, age, _step(path.name), problem=problem), None
        info = load_checkpoint_info(path)
    except T5PegasusError as error:
        return Entry(path, "damaged", size, age, _step(path.name), problem=str(error)), None
    losses = [entry.get("loss") for entry in info.history if entry.get("step") == info.step]
    return Entry(path, "good", size, age, info.step, losses[-1] if losses else None), info


def _step(name: str) -> int | None:
    digits = name.removesuffix(UNFINISHED)
    return int(digits) if digits.isdigit() else None


def _order(name: str) -> tuple[bool, int]:
    return name.endswith(UNFINISHED), _step(name) or 0
