"""How the processes of a run meet while they write a checkpoint: by files, so that none waits for a device.

The first process makes the folder of the unfinished checkpoint and a mark beside it; each other one waits for the mark,
writes its chunks, and hands in a manifest of its part; the first one waits for all parts, commits the checkpoint and
takes the mark away, which tells the others. Marks and parts bear a token that all processes of this run share, so that
nothing an earlier attempt left can be taken for theirs.

Who gives the checkpoint up says so in a file, too, so that nobody waits for what will not come. Where even that cannot
be written, it is said when the next checkpoint begins (`Meeting.leave`): until then the others may be waiting.
"""

import contextlib
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
"""Seconds that a process is waited for where nobody says: far more than its share of the writing takes."""


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
        self._untold: BaseException | None = None
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
            self._wait(self._has_begun, "process 0 has not begun", time.monotonic() + self._limit)

    def hand_in(self, entries: Files) -> None:
        """Say what this process wrote, on the disk."""
        if self.index > 0:
            write_bytes(self._part(self.index), _to_json(entries))

    def give_up(self, error: BaseException) -> None:
        """Tell the others that nothing comes of it, or not this one's part, if the disk lets it."""
        self._untold = error
        with contextlib.suppress(OSError):  # `leave` tells it
            self.leave()
        if self.index == 0:
            with contextlib.suppress(OSError):
                self._begun.unlink(missing_ok=True)

    def leave(self) -> None:
        """Have the others know that this one gave it up, if it did: in front of the next meeting.

        Raises:
            OSError: if they cannot be told; the next one must not begin then, because they may still be in this one.
        """
        if self._untold is not None and self.count > 1:
            text = f"{type(self._untold).__name__}: {self._untold}"
            self._folder.mkdir(parents=True, exist_ok=True)
            write_bytes(self._failure(self.index), _to_json({"error": text}))
        self._untold = None

    def gather(self) -> dict[str, Any]:
        """The parts of all other processes; the first one calls it."""
        entries: dict[str, Any] = {}
        deadline = time.monotonic() + self._limit
        for index in range(1, self.count):
            self._wait(lambda index=index: self._is_in(index), f"process {index} has not handed in its part", deadline)
            entries |= read_json(self._part(index))
        return entries

    def end(self) -> None:
        """The first process: all is done, and the others need wait no longer.

        Raises:
            OSError: if they cannot be told.
        """
        if self.index == 0 and self.count > 1:
            try:
                remove_tree(self._folder)
            except OSError as error:
                self.give_up(error)
                raise

    def wait_for_end(self, entries: Files) -> None:
        """The others: wait until the checkpoint is there, with what this process wrote.

        Raises:
            OSError: if the first process gave it up.
        """
        if self.index == 0:
            return
        # Twice the time, so that the first process can say whom it waited for in vain.
        deadline = time.monotonic() + 2 * self._limit
        self._wait(self._has_ended, "process 0 has not committed it", deadline)
        try:
            committed = read_json(self.path / MANIFEST)["files"]
        except UsageError:
            committed = {}
        if any(committed.get(name) != entry for name, entry in entries.items()):
            raise self._given_up()

    def _has_begun(self) -> bool:
        if self._failure(0).is_file():
            raise self._given_up()
        return self._begun.is_file()

    def _has_ended(self) -> bool:
        return self._failure(0).is_file() or not self._begun.is_file()

    def _given_up(self) -> OSError:
        return OSError(errno.EIO, "process 0 gave this checkpoint up, and says why", str(self.path))

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
                    "see what it says itself, and that all processes see this folder, on a shared disk or in a bucket; "
                    "if that is slow, give it longer: half of --watch.save-seconds"
                )
                raise OSError(errno.ETIMEDOUT, f"{otherwise} within {self._limit:.0f} s; {way_out}", str(self.path))
            time.sleep(self._pause)


def _to_json(value: Any) -> bytes:
    return json.dumps(value).encode()
