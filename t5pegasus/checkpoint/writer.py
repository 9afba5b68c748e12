"""Saving while training goes on: a copy is taken, and a thread of the process writes it."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import jax
import numpy as np

from t5pegasus.checkpoint.folder import checkpoints_folder, find_process
from t5pegasus.checkpoint.info import CheckpointInfo
from t5pegasus.checkpoint.meeting import TIME_LIMIT, Meeting, draw_token
from t5pegasus.checkpoint.retention import Retention, remove_old_checkpoints
from t5pegasus.checkpoint.save import write_checkpoint
from t5pegasus.checkpoint.snapshot import Memory, Snapshot, take_snapshot

logger = logging.getLogger(__name__)


class Stall(NamedTuple):
    """How long a save held up training, in seconds."""

    waiting: float
    """For the save before it, which was still being written; and, where that one failed, for itself."""
    copying: float
    """From the devices to the host."""

    @property
    def seconds(self) -> float:
        """In all."""
        return self.waiting + self.copying


class CheckpointWriter:
    """Writes the checkpoints of a run behind its back; a context manager, and every process makes one.

    At most one save is on its way. It takes host memory of the size of what this process writes; where devices share
    theirs with the host (CPUs) that is kept for the next save. Nothing that the thread does needs a device or another
    process to be alive: where processes wait for each other it is for files, and not for ever (`meeting`).

    What a save failed of is in the log at once. A disk, or a store, is then tried once more, by the next save, for
    which its caller waits; the run ends where that fails, too, or where there is no next one. Each process goes by what
    it saw itself: whoever saw a failure waits, the others go on meanwhile, and the meeting is the same for all.

    Left by an error, a lone process finishes the save that is on its way; one of several does not wait for the others,
    unless the error is one that all of them raise.

    Args:
        run_path: folder of the run, which has the tokenizer.
        time_limit: seconds to wait for another process's part.
        require_ours: called in the thread of the first process before it deletes anything, and before it commits a
            checkpoint; what it raises ends the save.
        common_errors: kinds of errors that all processes raise at the same place.
    """

    def __init__(
        self,
        run_path: Path,
        time_limit: float = TIME_LIMIT,
        require_ours: Callable[[], None] = lambda: None,
        common_errors: tuple[type[Exception], ...] = (),
    ):
        self._run_path, self._time_limit, self._require_ours = run_path, time_limit, require_ours
        self._common_errors = common_errors
        self._process, self._token, self._count = find_process(), draw_token(), 0
        self._memory = Memory()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._meeting: Meeting | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()
        elif self._process[1] == 1 or isinstance(error, self._common_errors):
            with contextlib.suppress(Exception):  # the first error is the one to report; this one is in the log
                self.finish()

    def save(self, arrays: Mapping[str, jax.Array | np.ndarray], info: CheckpointInfo, retention: Retention) -> Stall:
        """Begin to write `checkpoints/STEP`; the arrays may be donated when this returns.

        Args:
            arrays: by dotted name; every process gives the same.
            info: see CheckpointInfo.
            retention: which older checkpoints to keep when this one is whole.

        Raises:
            OSError: if both the save before and this one failed; or of something else that the one before failed of,
                and then this one is not begun.
        """
        began = time.perf_counter()
        failed = self._wait()
        if failed is not None and not isinstance(failed, OSError):
            raise failed
        waited = time.perf_counter()
        snapshot = take_snapshot(arrays, self._process[0], self._memory)
        copied = time.perf_counter()
        self._count += 1
        path = checkpoints_folder(self._run_path) / str(info.step)
        meeting = Meeting(path, f"{self._token}-{self._count}", self._process, self._time_limit)
        # A daemon: the end of one of several processes must not wait for a part that never comes.
        self._thread = threading.Thread(
            target=self._write, args=(meeting, snapshot, info, retention), name=f"save {info.step}", daemon=True
        )
        self._thread.start()
        if failed is None:
            return Stall(waited - began, copied - waited)
        self.finish()
        logger.warning("%s is saved: the disk, or the store, works again", meeting.path)
        return Stall(waited - began + time.perf_counter() - copied, copied - waited)

    def finish(self) -> None:
        """Wait until the save on its way is on the disk.

        Raises:
            OSError: if it could not be written; older checkpoints are as they were.
        """
        error = self._wait()
        if error is not None:
            raise error

    def _wait(self) -> BaseException | None:
        """Until no save is on its way; what it failed of."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        return error

    def _write(self, meeting: Meeting, snapshot: Snapshot, info: CheckpointInfo, retention: Retention) -> None:
        began = time.perf_counter()
        before, self._meeting = self._meeting, meeting
        try:
            if before is not None:
                before.leave()
            tokenizer_path = self._run_path / "tokenizer"
            check = self._require_ours
            write_checkpoint(meeting, snapshot, info, tokenizer_path, lambda _: check(), check)
            if self._process[0] == 0:
                remove_old_checkpoints(self._run_path, meeting.path, retention)
        except BaseException as error:
            logger.warning("%s could not be saved: %s", meeting.path, error)  # training goes on until it asks
            self._error = error
        seconds = time.perf_counter() - began
        logger.debug("%s: %.2f GB in %.1f s", meeting.path, snapshot.num_bytes / 1e9, seconds)
