"""How the processes of a run meet while they write a checkpoint: by files, so that none waits for a device.

The first process makes the folder of the unfinished checkpoint and a mark beside it; each other one waits for the mark,
writes its chunks, and hands in a manifest of its part; the first one waits for all parts, commits the checkpoint and
takes the mark away, which tells the others. Marks and parts bear a token that all processes of this run share, so that
nothing an earlier attempt left can be taken for theirs.
"""

import errno
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jax.experimental import multihost_utils

from t5pegasus.checkpoint.folder import PARTS, find_process
from t5pegasus.errors import UsageError
from t5pegasus.json_files import read_json
from t5pegasus.manifest import MANIFEST, Files
from t5pegasus.storage import is_remote, remove_tree, write_bytes

TIME_LIMIT = 900.0
"""Seconds that a process is waited for: far more than its share of the writing takes."""


def draw_token() -> str:
    """A name for this attempt that all processes share; every process calls it."""
    token = np.frombuffer(np.random.default_rng().bytes(8), np.uint32)
    if find_process()[1] > 1:
        token = np.asarray(multihost_utils.broadcast_one_to_all(token))
    return token.tobytes().hex()


class Meeting:
    """One checkpoint's meeting, as one process sees it.

    Args:
        path: of the checkpoint.
        token: of `draw_token`, and a number that no other meeting of this run has.
        process: index and number of processes.
        time_limit: seconds to wait for another process.
    """

    def __init__(self, path: Path, token: str, process: tuple[int, int], time_limit: float = TIME_LIMIT):
        self.path = path
        self.index, self.count = process
        self._folder = path.with_name(path.name + PARTS)
        self._begun = self._folder / f"{token}.begun"
        self._token, self._limit = token, time_limit
        self._pause = 0.5 if is_remote(path) else 0.02

    def begin(self, prepare: Callable[[], None]) -> None:
        """Start together: the first process prepares, the others wait until it has."""
        if self.index == 0:
            prepare()
            if self.count > 1:
                self._folder.mkdir(parents=True, exist_ok=True)
                write_bytes(self._begun, b"{}\n")
        else:
            self._wait(self._begun.is_file, "process 0 has not begun", time.monotonic() + self._limit)

    def hand_in(self, entries: Files) -> None:
        """Say what this process wrote, on the disk."""
        if self.index > 0:
            write_bytes(self._part(self.index), _to_json(entries))

    def report_failure(self, error: BaseException) -> None:
        """Tell the first process that this one's part will not come."""
        if self.index > 0:
            write_bytes(self._failure(self.index), _to_json({"error": f"{type(error).__name__}: {error}"}))

    def gather(self) -> dict[str, Any]:
        """The parts of all other processes; the first one calls it."""
        entries: dict[str, Any] = {}
        deadline = time.monotonic() + self._limit
        for index in range(1, self.count):
            self._wait(lambda index=index: self._is_in(index), f"process {index} has not handed in its part", deadline)
            entries |= read_json(self._part(index))
        return entries

    def end(self) -> None:
        """The first process: all is done, or given up, and the others need wait no longer."""
        if self.index == 0 and self.count > 1:
            remove_tree(self._folder)

    def wait_for_end(self, entries: Files) -> None:
        """The others: wait until the checkpoint is there, with what this process wrote.

        Raises:
            OSError: if the first process gave it up.
        """
        if self.index == 0:
            return
        # Twice the time, so that the first process can say whom it waited for in vain.
        deadline = time.monotonic() + 2 * self._limit
        self._wait(lambda: not self._begun.is_file(), "process 0 has not committed it", deadline)
        try:
            committed = read_json(self.path / MANIFEST)["files"]
        except UsageError:
            committed = {}
        if any(committed.get(name) != entry for name, entry in entries.items()):
            raise OSError(errno.EIO, "process 0 gave this checkpoint up, and says why", str(self.path))

    def _is_in(self, index: int) -> bool:
        if self._failure(index).is_file():
            raise OSError(errno.EIO, f"process {index} failed: {read_json(self._failure(index)).get('error')}")
        return self._part(index).is_file()

    def _part(self, index: int) -> Path:
        return self._folder / f"{self._token}.part-{index:05d}.json"

    def _failure(self, index: int) -> Path:
        return self._folder / f"{self._token}.failed-{index:05d}.json"

    def _wait(self, is_so: Callable[[], bool], otherwise: str, deadline: float) -> None:
        while not is_so():
            if time.monotonic() > deadline:
                way_out = (
                    "see what it says itself, and that all processes see this folder: on a shared disk or in a bucket"
                )
                raise OSError(errno.ETIMEDOUT, f"{otherwise} within {self._limit:.0f} s; {way_out}", str(self.path))
            time.sleep(self._pause)


def _to_json(value: Any) -> bytes:
    return json.dumps(value).encode()
