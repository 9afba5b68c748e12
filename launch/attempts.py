"""Records of the attempts of a run: RUN/attempts/N/process-I.json, one file per attempt and process.

N counts attempts from 1; process 0 chooses it. Each process writes its own file at the start, about every second while
it runs (every 30 s into an object store), and at its end, before it exits. A file is one JSON object, followed by
blanks: it has its size from the start and is written in place, so that a disk that is full does not keep the reason of
an end from being written. A reader that meets it half written reads it again later.

| field | |
| --- | --- |
| `schema`, `attempt`, `process`, `num_processes` | |
| `host`, `pid`, `identity` | `identity` tells a process from a later one of the same number (`launch.liveness`) |
| `command`, `versions` | arguments behind `t5pegasus`; of python, jax, jaxlib, t5pegasus |
| `began` | seconds since 1970, as all times |
| `saved_step` | the newest checkpoint when the attempt began, null if there was none |
| `first_step` | updates made when the loop began, null before: there the attempt goes on |
| `beat` | {`count`, `time`, `activity`, `since`: seconds in it, `step`: updates sent to the device} |
| `seconds` | by activity (`train.control.Control.doing`): all time since `began`, from the import of JAX on |
| `pace` | null, or lately {`seconds_per_step`, `host_seconds_per_step`: its own part, without the device} |
| `ended` | null, or {`time`, `code`, `how`, `message`, `traceback`, `blamed`, `saved`} |

`how` is done, preempted, interrupted, failed, stuck (a time limit), killed (a stop that took too long, or a second
signal) or consequence: of the end of the process `blamed`. `saved` says that all processes ended together, behind a
checkpoint. A process that was killed has no `ended`. Beside the records, process-I.stacks.txt holds what all threads
of a stuck process were doing. RUN/attempts/joining/ has records of processes that wait for the others to come.
"""

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t5pegasus.errors import writing
from t5pegasus.json_files import SCHEMA
from t5pegasus.storage import is_remote, write_bytes

_SIZE = 16 * 1024
_LONGEST = 10_000
"""Characters of a message or a traceback that are kept."""

Record = Mapping[str, Any]


def attempts_path(run_path: Path) -> Path:
    """Where the attempts of a run lie."""
    return run_path / "attempts"


def list_attempts(run_path: Path) -> list[int]:
    """Numbers of all attempts, in their order."""
    return _numbered(attempts_path(run_path))


def newest_checkpoint(run_path: Path) -> int | None:
    """The step of the newest checkpoint that was finished, whether or not it is whole."""
    steps = _numbered(run_path / "checkpoints")
    return next((step for step in reversed(steps) if (run_path / f"checkpoints/{step}/manifest.json").exists()), None)


def _numbered(folder: Path) -> list[int]:
    try:
        names = [path.name for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def record_path(folder: Path, process: int) -> Path:
    """The record of one process in the folder of an attempt."""
    return folder / f"process-{process}.json"


def read_record(path: Path) -> dict[str, Any] | None:
    """One record; None where there is none, or it is just being written, or is of another schema."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("schema") == SCHEMA else None


def read_attempt(run_path: Path, attempt: int) -> dict[int, dict[str, Any]]:
    """The records of an attempt by process."""
    folder = attempts_path(run_path) / str(attempt)
    first = read_record(record_path(folder, 0))
    count = first["num_processes"] if first else 0
    records = {process: read_record(record_path(folder, process)) for process in range(count)}
    return {process: record for process, record in records.items() if record is not None}


class RecordFile:
    """The record of this process."""

    def __init__(self, path: Path):
        self.path = path
        self._closed = False
        if not is_remote(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    def write(self, record: Record) -> None:
        """Replace the record.

        Raises:
            OSError: if that cannot be written.
        """
        if self._closed:
            return
        content = _encode(record)
        if is_remote(self.path):
            write_bytes(self.path, content)
            return
        # Closed each time: on a network file system other machines see what was written from then on.
        with writing(self.path), self.path.open("r+b", buffering=0) as file:
            if file.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        """Let go of the file; what is written later is not."""
        self._closed = True


def _encode(record: Record) -> bytes:
    limit = _LONGEST
    while True:
        text = json.dumps(_shortened(record, limit), ensure_ascii=False).encode()
        if len(text) < _SIZE:
            return text + b" " * (_SIZE - len(text) - 1) + b"\n"
        limit //= 2


def _shortened(value: Any, limit: int) -> Any:
    """The value with only the end of texts that are longer than `limit`, where errors say what they are."""
    match value:
        case str():
            return value if len(value) <= limit else f"…{value[len(value) - limit :]}"
        case Mapping():
            return {key: _shortened(item, limit) for key, item in value.items()}
        case list() | tuple():
            return [_shortened(item, limit) for item in value[:limit]]
        case _:
            return value


def find_cause(records: Mapping[int, Record]) -> tuple[int, Record] | None:
    """The process whose end was the reason of all others', and what is said of it.

    It is the earliest failure that is not a consequence of another process's end; where no process says that of
    itself, as after kill -9, it is the one that the first of the others blames. None where nobody says anything.
    """
    failed = [record for record in records.values() if record["ended"] and record["ended"]["code"] != 0]
    if not failed:
        return None
    first = min(failed, key=lambda record: (record["ended"]["how"] == "consequence", record["ended"]["time"]))
    return first["ended"]["blamed"], first["ended"]
