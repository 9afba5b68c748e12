"""The files of a run that grow, where the run lies in an object store: a local copy, mirrored into the store.

An object cannot be appended to. So metrics and TensorBoard's events are written to a local folder, and a thread puts
what has changed into the store: every 30 s, or more rarely where a put takes long, and always before a checkpoint is
committed. A host that goes on with the run therefore finds in the store every record up to its last checkpoint.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from t5pegasus.errors import UsageError
from t5pegasus.storage.fetched import alone, cache_path
from t5pegasus.storage.files import copy_file, list_files, write_bytes
from t5pegasus.storage.paths import is_remote

logger = logging.getLogger(__name__)

_WRITERS = "writers"
_LEFT_HERE = ("wandb/",)
"""Of other programs, which send it to where it belongs themselves."""
_BROUGHT_BACK = ".jsonl"
_EVERY_SECONDS = 30.0
_LARGEST_SHARE = 0.05
"""Of the time, for mirroring: with large files it comes more rarely."""


class TakenOverError(UsageError):
    """Another job writes this run now: nothing that lies there is this one's to change."""


class WorkingCopy:
    """Where the growing files of a run are written.

    In a store each start of a run leaves an object `writers/NUMBER.json`, made on the condition that it does not exist.
    The run belongs to the highest number: a job that finds a higher one than its own stops, so that a host that was
    believed dead does not write over the work of its replacement.
    """

    def __init__(self, run_path: Path, path: Path, number: int | None):
        self.path = path
        """A local folder; for a local run that of the run itself."""
        self._run_path, self._number = run_path, number
        self._pushed: dict[str, tuple[int, int]] = {}
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._lost: Exception | None = None

    def push(self) -> None:
        """Put what has changed into the store; for a local run, and by a process that has no number, nothing is put.

        Raises:
            TakenOverError: if another job has taken the run over.
            OSError: if the store fails.
        """
        if self._number is None:
            return
        with self._lock:
            self._require_ours()
            self._put_changed()

    def _put_changed(self) -> None:
        for file in sorted(path for path in self.path.rglob("*") if path.is_file()):
            name, stat = file.relative_to(self.path).as_posix(), file.stat()
            state = (stat.st_size, stat.st_mtime_ns)
            if self._pushed.get(name) != state and not name.startswith(_LEFT_HERE):
                write_bytes(self._run_path / name, file.read_bytes())
                self._pushed[name] = state

    def _require_ours(self) -> None:
        newer = self._run_path / _WRITERS / _writer_name((self._number or 0) + 1)
        with contextlib.suppress(FileNotFoundError):
            who = json.loads(newer.read_bytes())
            raise TakenOverError(
                f"{self._run_path} was taken over by process {who['pid']} of host {who['host']} at {who['began']}; "
                "this one ends, so that they do not write over each other: choose another --run-path for another run"
            )

    def keep_pushing(self) -> None:
        """Push until `close`; a store that fails is tried again, and the next `push` outside says so."""
        pause = _EVERY_SECONDS
        while not self._closed.wait(pause):
            began = time.monotonic()
            try:
                self.push()
            except (OSError, UsageError) as error:
                logger.warning("%s", error)
            pause = max(_EVERY_SECONDS, (time.monotonic() - began) / _LARGEST_SHARE)

    def close(self) -> None:
        """End the thread."""
        self._closed.set()


@contextlib.contextmanager
def working_copy(run_path: Path, *, writes: bool) -> Iterator[WorkingCopy]:
    """The place for the growing files of a run while it goes on.

    Args:
        run_path: the run's folder.
        writes: whether this process writes metrics; what the others of a job write is put into the store at the end.

    Raises:
        OSError: if the store fails; also at the end, when the last changes are put there.
    """
    if not is_remote(run_path):
        yield WorkingCopy(run_path, run_path, None)
        return
    with _own_folder(run_path) as folder:
        if not writes:
            copy = WorkingCopy(run_path, folder, None)
            yield copy
            copy._put_changed()  # traces of its devices, under names of their own
            return
        copy = WorkingCopy(run_path, folder, _claim(run_path))
        for entry in run_path.glob(f"*{_BROUGHT_BACK}"):
            copy_file(entry, folder / entry.name)
        thread = threading.Thread(target=copy.keep_pushing, name=f"mirror {run_path}", daemon=True)
        thread.start()
        try:
            yield copy
        finally:
            copy.close()
            failing = sys.exc_info()[1] is not None
            try:
                copy.push()
            except (OSError, UsageError) as error:
                if not failing:
                    raise
                logger.warning("%s", error)  # what failed first is what is reported


@contextlib.contextmanager
def _own_folder(run_path: Path) -> Iterator[Path]:
    """An empty folder on this machine, gone at the end; those that killed processes left go now.

    They hold nothing that counts: another host may have gone on with the run since, from what is in the store.
    """
    above = cache_path(os.environ) / "runs" / hashlib.sha256(str(run_path).encode()).hexdigest()[:16]
    with contextlib.ExitStack() as held:
        with alone(above):
            for left in above.glob("*.lock"):
                with left.open("w") as lock, contextlib.suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(left.with_suffix(""), ignore_errors=True)
                    left.unlink(missing_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=f"{run_path.name}-", dir=above))
            mark = folder.with_name(folder.name + ".lock")
            fcntl.flock(held.enter_context(mark.open("w")), fcntl.LOCK_EX)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            mark.unlink(missing_ok=True)


def _claim(run_path: Path) -> int:
    """Take the run over from whoever wrote it before: the number of this writer."""
    numbers = [int(name.partition(".")[0]) for name in list_files(run_path / _WRITERS)]
    number = max(numbers, default=0)
    began = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    who = {"host": socket.gethostname(), "pid": os.getpid(), "began": began, "token": secrets.token_hex(8)}
    while True:
        number += 1
        with contextlib.suppress(FileExistsError):
            write_bytes(run_path / _WRITERS / _writer_name(number), json.dumps(who).encode(), create=True)
            return number


def _writer_name(number: int) -> str:
    return f"{number:06d}.json"
