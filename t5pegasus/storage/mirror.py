"""The files of a run that grow, where the run lies in an object store: a local copy, mirrored into the store.

An object cannot be appended to. So metrics and TensorBoard's events are written to a local folder, and a thread puts
what has changed into the store: every 30 s, or more rarely where a put takes long, and always before a checkpoint is
committed. A host that goes on with the run therefore finds in the store every record up to its last checkpoint.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from t5pegasus.errors import UsageError
from t5pegasus.storage.claim import Claim
from t5pegasus.storage.fetched import alone, cache_path
from t5pegasus.storage.files import copy_file, write_bytes
from t5pegasus.storage.paths import is_remote

logger = logging.getLogger(__name__)

_LEFT_HERE = ("wandb/",)
"""Of other programs, which send it to where it belongs themselves."""
_BROUGHT_BACK = ".jsonl"
_EVERY_SECONDS = 30.0
_LARGEST_SHARE = 0.05
"""Of the time, for mirroring: with large files it comes more rarely."""


class WorkingCopy:
    """Where the growing files of a run are written."""

    def __init__(self, run_path: Path, path: Path, claim: Claim | None):
        self.path = path
        """A local folder; for a local run that of the run itself."""
        self._run_path, self._claim = run_path, claim
        self._pushed: dict[str, tuple[int, int]] = {}
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._lost: Exception | None = None

    def push(self) -> None:
        """See that the run is still this job's, and put what has changed into the store, if it lies there.

        A process without a claim does neither.

        Raises:
            TakenOverError: if another job has taken the run over.
            OSError: if the store fails.
        """
        if self._claim is None:
            return
        with self._lock:
            self._claim.require()
            if is_remote(self._run_path):
                self._put_changed()

    def _put_changed(self) -> None:
        for file in sorted(path for path in self.path.rglob("*") if path.is_file()):
            name, stat = file.relative_to(self.path).as_posix(), file.stat()
            state = (stat.st_size, stat.st_mtime_ns)
            if self._pushed.get(name) != state and not name.startswith(_LEFT_HERE):
                write_bytes(self._run_path / name, file.read_bytes())
                self._pushed[name] = state

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
def working_copy(run_path: Path, claim: Claim | None) -> Iterator[WorkingCopy]:
    """The place for the growing files of a run while it goes on.

    Args:
        run_path: the run's folder.
        claim: taken, of the process that writes metrics; None of the others of a job, whose files are put into the
            store at the end.

    Raises:
        OSError: if the store fails; also at the end, when the last changes are put there.
    """
    if not is_remote(run_path):
        yield WorkingCopy(run_path, run_path, claim)
        return
    with _own_folder(run_path) as folder:
        if claim is None:
            copy = WorkingCopy(run_path, folder, None)
            yield copy
            copy._put_changed()  # traces of its devices, under names of their own
            return
        copy = WorkingCopy(run_path, folder, claim)
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
