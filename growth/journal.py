"""Which files of an unfinished growth are whole, so that the same call goes on where an earlier one was killed.

An unfinished folder holds `growth.json`, which says what is being made, one journal per process, and, in
`checkpoint/`, the files themselves. A line in a journal follows the file it tells of; on the next start every listed
file is compared with its line, so nothing is trusted to be on the disk because it was once written.
"""

import json
import logging
import shutil
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from t5pegasus.errors import ArtifactError, writing
from t5pegasus.json_files import read_json, write_json
from t5pegasus.manifest import find_damaged
from t5pegasus.storage import flush

logger = logging.getLogger(__name__)

_IDENTITY = "growth.json"


def begin_growth(unfinished: Path, identity: Mapping[str, Any]) -> None:
    """Make an unfinished folder, or find that this very growth has begun there; the first process calls it.

    Args:
        unfinished: the folder.
        identity: what decides every byte of the result, e.g. hash of the plan and fingerprint of the source.

    Raises:
        ArtifactError: if another growth has begun there.
    """
    if (unfinished / _IDENTITY).is_file():
        found = read_json(unfinished / _IDENTITY)
        if found != identity:
            key = next(key for key in (*identity, *found) if found.get(key) != identity.get(key))
            raise ArtifactError(
                f"{unfinished} holds a growth that was interrupted, and its {key} is {found.get(key)}, this one's is "
                f"{identity.get(key)}; give what that one was given to finish it, or delete the folder"
            )
        return
    shutil.rmtree(unfinished, ignore_errors=True)
    checkpoint_folder(unfinished).mkdir(parents=True)
    write_json(unfinished / _IDENTITY, dict(identity))
    flush(unfinished)


def checkpoint_folder(unfinished: Path) -> Path:
    """Where the files of the unfinished checkpoint lie."""
    return unfinished / "checkpoint"


class Journal:
    """The finished files of an unfinished folder, of all its processes; this process adds its own. A context manager.

    Args:
        unfinished: a folder that `begin_growth` made.
        process_index: of this process.
    """

    def __init__(self, unfinished: Path, process_index: int = 0):
        self._folder = checkpoint_folder(unfinished)
        self._unfinished = unfinished
        self._path = unfinished / f"journal-{process_index}.jsonl"
        self._lock = threading.Lock()
        torn = self._path.exists() and not self._path.read_bytes().endswith(b"\n")
        self._file = self._path.open("a", encoding="utf-8")
        if torn:
            self._file.write("\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self) -> dict[str, dict[str, Any]]:
        """Name below the checkpoint's folder → manifest entry, of all processes; a later line counts."""
        entries = {}
        for path in sorted(self._unfinished.glob("journal-*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:  # cut short when its writer was killed
                    continue
                entries[entry.pop("file")] = entry
        return entries

    def find_whole(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Those of these files that are finished and still as they were written; damaged ones are named in the log."""
        entries = self.read()
        finished = {name: entries[name] for name in names if name in entries}
        for name in find_damaged(self._folder, finished):
            logger.warning("%s was damaged since it was written; it is written again", self._folder / name)
            del finished[name]
        return finished

    def add(self, name: str, entry: Mapping[str, Any]) -> None:
        """Say that a file is whole; threads may share the journal."""
        with self._lock, writing(self._path):
            self._file.write(json.dumps({"file": name, **entry}) + "\n")
            self._file.flush()
