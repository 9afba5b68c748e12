"""Saves in which one file operation, or each from one on, fails or is the process's last: run by test_faulty_saves.

Usage: python -m tests.checkpoint.faulty_saves ROOT FAULT EVERY

For k = 0, EVERY, 2·EVERY, … until a save ends before its k-th operation: a copy of ROOT/run, whose checkpoint 1 is
whole, gets a checkpoint 2 by a child process with the fault at its k-th operation below that copy. Then the laws are
checked. A line per k says how the child ended.
"""

import errno
import itertools
import os
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np

from t5pegasus.arrays import load_arrays
from t5pegasus.checkpoint import CheckpointWriter, Retention, find_last_good, finish_saves, verify_checkpoint
from tests.checkpoint.conftest import draw_arrays, files_of, info_of

ENDED, RAISED, KILLED = 0, 46, 9
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link"}
DELETIONS = {"os.remove", "os.rmdir"}


class Fault:
    """Counts the operations that change files below a folder, and does harm to the k-th."""

    def __init__(self, folder: Path, kind: str, k: int):
        self.folder, self.kind, self.k = str(folder), kind, k
        self.count = 0
        self.lock = threading.Lock()

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS or not str(arguments[0]).startswith(self.folder):
            return
        if (event == "open" and not isinstance(arguments[2], int)) or (event == "open" and not arguments[2] & 3):
            return  # to read
        if event == "os.mkdir" and Path(str(arguments[0])).is_dir():
            return  # changes nothing, and nothing is lost if it fails
        self.meet(event, str(arguments[0]))

    def meet(self, event: str, path: str | None = None) -> None:
        with self.lock:
            here, self.count = self.count, self.count + 1
        if self.kind == "kill" and here == self.k:
            os._exit(KILLED)
        if self.kind == "EIO" and here == self.k:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        if self.kind == "ENOSPC" and here >= self.k and event not in DELETIONS:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        if self.kind == "EROFS" and here >= self.k:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    def install(self) -> None:
        write, fsync = os.write, os.fsync

        def faulty_write(descriptor: int, content: Any) -> int:
            self.meet("write")
            return write(descriptor, content)

        def faulty_fsync(descriptor: int) -> None:
            self.meet("fsync")
            fsync(descriptor)

        os.write, os.fsync = faulty_write, faulty_fsync
        sys.addaudithook(self.hook)


def save_in_child(run_path: Path, kind: str, k: int) -> int:
    """How the child ended: ENDED, RAISED or KILLED."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        Fault(run_path, kind, k).install()
        try:
            writer = CheckpointWriter(run_path)
            writer.save(draw_arrays(2), info_of(2), Retention(last=2))
            writer.finish()
        except OSError as error:
            os._exit(RAISED if "checkpoints" in str(error.filename) else 1)
        os._exit(ENDED)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def check(run_path: Path, before: dict[str, bytes], kind: str, ended: int) -> None:
    first = run_path / "checkpoints" / "1"
    assert files_of(first) == before, "the older checkpoint is not as it was"
    if kind in ("ENOSPC", "EIO") and ended == RAISED:
        left = sorted(each.name for each in first.parent.iterdir())
        # What fails behind the commit may leave a folder that the next start removes.
        assert left == ["1"] or "2" in left, left
    finish_saves(run_path)
    last = find_last_good(run_path)
    assert last is not None
    verify_checkpoint(last)
    assert ended != ENDED or last.name == "2"
    for name, array in load_arrays(last).items():
        np.testing.assert_array_equal(array, draw_arrays(int(last.name))[name])
    assert sorted(each.name for each in first.parent.iterdir()) == ["1", "2"][: int(last.name)]


def main(root: Path, kind: str, every: int) -> None:
    before = files_of(root / "run" / "checkpoints" / "1")
    for k in itertools.count(0, every):
        run_path = root / f"{kind}-{k}"
        shutil.copytree(root / "run", run_path)
        ended = save_in_child(run_path, kind, k)
        assert ended in (ENDED, RAISED, KILLED), (k, ended)
        check(run_path, before, kind, ended)
        shutil.rmtree(run_path)
        print(k, ended)
        if ended == ENDED:
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
