"""Whose a run folder is: of several jobs that were started in one, the last.

Each start of a run leaves a file `writers/NUMBER.json`, made on the condition that there is none of this name. The run
belongs to the highest number: a job that finds a higher one than its own stops, so that a host that was believed dead
does not write over the work of its replacement.
"""

import contextlib
import json
import os
import secrets
import socket
import time
from pathlib import Path
from typing import Any, Self

from t5pegasus.errors import UsageError, writing
from t5pegasus.storage.files import flush, list_files, write_bytes
from t5pegasus.storage.paths import is_remote

_WRITERS = "writers"


class TakenOverError(UsageError):
    """Another job writes this run now: nothing that lies there is this one's to change."""


class Claim:
    """That of a job on a run folder; one process of the job makes it."""

    def __init__(self, run_path: Path):
        """A claim that is not made yet.

        Args:
            run_path: the run's folder, on a disk or in a store; it need not exist.
        """
        self._run_path = run_path
        self._number: int | None = None

    def take(self) -> Self:
        """Take the run over from whoever wrote it before; called again, it only looks, as `require`.

        Raises:
            TakenOverError: if another job has taken it over since the first call.
            OSError: if disk or store fails.
        """
        if self._number is not None:
            self.require()
            return self
        names = (name.partition(".")[0] for name in list_files(self._run_path / _WRITERS))
        number = max((int(name) for name in names if name.isascii() and name.isdigit()), default=0)
        began = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        who = {"host": socket.gethostname(), "pid": os.getpid(), "began": began, "token": secrets.token_hex(8)}
        while self._number is None:
            number += 1
            with contextlib.suppress(FileExistsError):
                _create(self._path(number), json.dumps(who).encode())
                self._number = number
        return self

    def require(self) -> None:
        """See that no other job has taken the run over.

        Raises:
            TakenOverError: if one has, naming it.
            OSError: if disk or store fails.
        """
        assert self._number is not None, "take comes before require"
        number = self._number
        while (who := self._read(number := number + 1)) is not None:
            if not who.get("withdrawn"):
                other = f"process {who['pid']} of host {who['host']} at {who['began']}" if who else "another job"
                raise TakenOverError(
                    f"{self._run_path} was taken over by {other}; this one ends, so that they do not write over each "
                    "other: choose another --run-path for another run"
                )

    def withdraw(self) -> None:
        """Give the run back to whoever had it, if disk and store let it: this job did not begin to train."""
        number, self._number = self._number, None
        if number is None:
            return
        with contextlib.suppress(OSError):  # the job ends, and what it ends of is what is reported
            if number > 1:
                write_bytes(self._path(number), json.dumps({"withdrawn": True}).encode())
                return
            self._path(1).unlink()  # nobody had it, and nothing of this is to be seen
            if not is_remote(self._run_path):
                self._path(1).parent.rmdir()
                self._run_path.rmdir()

    def _read(self, number: int) -> dict[str, Any] | None:
        """Whose this number is: None if nobody's, nothing in it while it is being written."""
        try:
            return json.loads(self._path(number).read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            return {}

    def _path(self, number: int) -> Path:
        return self._run_path / _WRITERS / f"{number:06d}.json"


def _create(path: Path, content: bytes) -> None:
    if is_remote(path):
        write_bytes(path, content, create=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of all ways to be the only one that makes a file, this one is known to most network file systems.
    with path.open("xb") as file:
        try:
            with writing(path):
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            path.unlink()  # nobody has taken anything over
            raise
    flush(path.parent)
