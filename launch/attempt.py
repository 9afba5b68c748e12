"""One attempt at a run: this process's part of it, from its first signal handler to its exit code."""

import contextlib
import logging
import math
import os
import platform
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from launch import exit_codes, processes
from launch.attempts import RecordFile, attempts_path, list_attempts, newest_checkpoint, read_attempt, record_path
from launch.liveness import State, identity, state_of
from launch.preflight import agree, agree_on_attempt, place
from launch.process_group import find_process_group
from launch.termination import hear_signals
from launch.verdicts import Verdict
from launch.watch_config import WatchConfig
from launch.watchdog import Watchdog
from t5pegasus.errors import DataError, PreemptedError, UsageError
from t5pegasus.json_files import SCHEMA
from t5pegasus.train.control import Control, Request

logger = logging.getLogger("t5pegasus.attempt")

_LINGER_SECONDS = 10.0
"""Process 0 carries the service whose end JAX answers by aborting all others: they are to end of themselves before."""
_CULPRIT_SECONDS = 3.0
"""For another process's end to show, where it may be the reason of a failure."""
_INTERRUPT_SECONDS = 10.0
_WEEK = 7 * 24 * 3600


class Attempt:
    """Signals, record and watchdog of a verb that trains; a context manager around all that the verb does.

    SIGTERM is answered by exit code 42: at once before the first new step, else behind a checkpoint that all
    processes agree on, within `WatchConfig.grace_seconds`. A second one ends the process where it stands. SIGUSR1 asks
    for a checkpoint, SIGUSR2 for a profile.
    """

    def __init__(self, command: list[str]):
        self.control = Control()
        self.command = command
        self.limits = WatchConfig()
        self.run_path: Path | None = None
        self.watchdog: Watchdog | None = None
        self._file: RecordFile | None = None
        self._record: dict[str, Any] = {}
        self._lock = threading.RLock()
        self._times_asked = 0
        self._timers: list[threading.Timer] = []
        self._began = time.time()

    def __enter__(self) -> "Attempt":
        self._signals = hear_signals(self._answer)
        self._signals.__enter__()
        return self

    def join(self, run_path: Path, limits: WatchConfig) -> None:
        """Make JAX ready, and meet the other processes of the job, if there are any.

        Raises:
            UsageError: if the environment describes them incompletely.
        """
        self.run_path, self.limits = run_path, limits
        self.control.part_seconds = limits.save_seconds / 2 or math.inf
        group = find_process_group(os.environ)
        if group is not None:
            self._watch(attempts_path(run_path) / "joining", None, group.process_id, group.num_processes)
        processes.init_distributed(limits.join_seconds or _WEEK)
        if group is not None:
            self._unwatch()
            record_path(attempts_path(run_path) / "joining", group.process_id).unlink(missing_ok=True)

    def begin(self, facts: dict[str, Any]) -> None:
        """Choose the number of the attempt and begin its record; call it when the run's folder is known to be one.

        Args:
            facts: by name, what must be the same in all processes.

        Raises:
            UsageError: if it is not, or another process of this machine is training in the same folder.
        """
        assert self.run_path is not None, "join comes before begin"
        process, num_processes = place()
        number = None
        if process == 0:
            self._refuse_company()
            number = max(list_attempts(self.run_path), default=0) + 1
        if num_processes > 1:
            number = agree_on_attempt(self.run_path, number, self.limits.join_seconds)
            agree("versions and config", _versions() | facts, self.limits.join_seconds)
            import jax

            agree("devices", {"local devices": jax.local_device_count()}, self.limits.join_seconds)
        assert number is not None
        self._watch(attempts_path(self.run_path) / str(number), number, process, num_processes)

    def compare(self, name: str, facts: dict[str, Any]) -> None:
        """Compare between all processes what was not known yet when the attempt began; each name once.

        Raises:
            UsageError: naming the first process that differs.
        """
        if not self._alone:
            agree(name, facts, self.limits.join_seconds)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._end(exit_codes.DONE, "done")
        else:
            self._fail(error)
        self._unwatch()
        refused = error is not None and exit_codes.exit_code(error) in (exit_codes.USAGE, DataError.exit_code)
        if refused and self._alone and self.control.first_step is None:
            self._forget()
        for timer in self._timers:
            timer.cancel()
        self._signals.__exit__(None, None, None)

    @property
    def _alone(self) -> bool:
        return self.watchdog is None or self.watchdog.num_processes == 1

    def _fail(self, error: BaseException) -> None:
        code = exit_codes.exit_code(error)
        culprit = None
        if not self._alone and _may_come_from_another(error):
            culprit = self.watchdog and self.watchdog.find_culprit(_CULPRIT_SECONDS)
        if culprit is not None:
            self._leave(culprit)
        how = {
            exit_codes.DONE: "done",
            exit_codes.PREEMPTED: "preempted",
            exit_codes.INTERRUPTED: "interrupted",
        }.get(code, "failed")
        words = str(error) or type(error).__name__
        message = words if code != exit_codes.BUG else f"{type(error).__name__}: {words}"
        lines = "".join(traceback.format_exception(error))
        self._end(code, how, message, lines, saved=isinstance(error, PreemptedError))
        if not self._alone:
            processes.before_leaving.append(self._linger)

    def _forget(self) -> None:
        """Leave nothing behind a command that could not work as it was given: it was no attempt."""
        if self._file is None:
            return
        with contextlib.suppress(OSError):  # a folder that holds something else stays
            self._file.path.unlink()
            for folder in list(self._file.path.parents)[:3]:
                folder.rmdir()

    def _watch(self, folder: Path, number: int | None, process: int, num_processes: int) -> None:
        assert self.run_path is not None
        with self._lock:
            self._record = {
                "schema": SCHEMA, "attempt": number, "process": process, "num_processes": num_processes,
                "host": socket.gethostname(), "pid": os.getpid(), "identity": identity(), "command": self.command,
                "versions": _versions(), "began": self._began, "saved_step": newest_checkpoint(self.run_path),
                "ended": None,
            }  # fmt: skip
            self._file = RecordFile(record_path(folder, process))
        self.watchdog = Watchdog(folder, process, num_processes, self.control, self.limits, self._write, self._leave)
        if number is None:
            self.watchdog.activity = "join"
        self.watchdog.start()

    def _unwatch(self) -> None:
        if self.watchdog is not None:
            self.watchdog.stop()
        with self._lock:
            if self._file is not None:
                self._file.close()

    def _write(self, news: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            self._record |= news
            if self._file is not None:
                try:
                    self._file.write(self._record)
                except OSError as error:  # the run itself will meet the same disk, and say so if it cannot go on
                    logger.warning("%s cannot be written: %s", self._file.path, error)
            return dict(self._record)

    def _end(self, code: int, how: str, message: str = "", trace: str = "", *, blamed: int = -1, saved: bool = False):
        """Write how this process ends; the first reason stands."""
        with self._lock:
            if self.watchdog is None or self._record.get("ended") is not None:
                return
            blamed = self.watchdog.process if blamed < 0 else blamed
            ended = {"time": time.time(), "code": code, "how": how, "message": message, "traceback": trace,
                     "blamed": blamed, "saved": saved}  # fmt: skip
            self._write(self.watchdog.describe() | {"ended": ended})

    def _leave(self, verdict: Verdict) -> NoReturn:
        """End this process now, from whichever thread."""
        with self._lock:
            self._end(verdict.code, verdict.how, verdict.message, blamed=verdict.blamed)
            processes.say(f"t5pegasus {self.command[0]}: {verdict.message}")
            if verdict.how != "consequence":
                self._linger()
            processes.leave_at_once(verdict.code)

    def _linger(self) -> None:
        if self.watchdog is not None and self.watchdog.process == 0 and not self._alone:
            self.watchdog.wait_for_peers(_LINGER_SECONDS)

    def _answer(self, number: int) -> None:
        """Act on a signal; runs in the thread that hears them."""
        own = self.watchdog.process if self.watchdog else 0
        if number in (signal.SIGUSR1, signal.SIGUSR2):
            self.control.request(Request.SAVE if number == signal.SIGUSR1 else Request.PROFILE)
            return
        if (
            self._record.get("ended") is not None
        ):  # it is leaving; schedulers send more signals when the first task ends
            return
        self._times_asked += 1
        if self._times_asked > 1:
            self._leave(Verdict(128 + number, "killed", f"ended by a second signal; {self._unsaved()}", own))
        if number == signal.SIGINT:
            self._later(_INTERRUPT_SECONDS, lambda: Verdict(exit_codes.INTERRUPTED, "interrupted", "interrupted", own))
            return
        if self.control.first_step is None:
            message = "terminated before the first new step, the last checkpoint is intact; the same command goes on"
            self._leave(Verdict(exit_codes.PREEMPTED, "preempted", message, own))
        self.control.request(Request.STOP)
        grace = self.limits.grace_seconds
        if grace:
            self._later(grace, lambda: self._too_late(own))
        within = f", within {grace} s (--watch.grace-seconds)" if grace else ""
        processes.say(f"t5pegasus {self.command[0]}: asked to stop: will save{within}")

    def _too_late(self, own: int) -> Verdict:
        message = f"did not stop within {self.limits.grace_seconds} s (--watch.grace-seconds); {self._unsaved()}"
        return Verdict(exit_codes.TERMINATED, "killed", message, own, has_stacks=True)

    def _later(self, seconds: float, find_verdict: Callable[[], Verdict]) -> None:
        def act() -> None:
            verdict = find_verdict()
            if verdict.has_stacks and self.watchdog is not None:
                self.watchdog.dump_stacks()
            self._leave(verdict)

        timer = threading.Timer(seconds, act)
        timer.daemon = True
        self._timers.append(timer)
        timer.start()

    def _unsaved(self) -> str:
        step = self.control.activity.step
        try:
            saved = newest_checkpoint(self.run_path) if self.run_path else None
            behind = "nothing is saved yet" if saved is None else f"the last checkpoint is that of step {saved}"
        except OSError as error:  # what ends the process now may well be this store
            behind = f"which checkpoint is the last one cannot be read: {error}"
        return f"{behind}, {step} updates were on their way; the same command goes on"

    def _refuse_company(self) -> None:
        assert self.run_path is not None
        numbers = list_attempts(self.run_path)
        for process, record in (read_attempt(self.run_path, numbers[-1]) if numbers else {}).items():
            living = state_of(record["identity"]) in (State.ALIVE, State.STOPPED)
            if living and not record["ended"] and record["pid"] != os.getpid():
                raise UsageError(
                    f"run path {self.run_path} is in use: process {process} of its attempt {numbers[-1]} (pid "
                    f"{record['pid']}) still trains there; wait for it, or stop it: kill {record['pid']}"
                )


def _may_come_from_another(error: BaseException) -> bool:
    """Whether the end of another process can show as this error: collectives fail in the words of their libraries."""
    library = type(error).__module__.partition(".")[0] in ("jax", "jaxlib")
    return isinstance(error, Exception) and (library or "Gloo" in str(error))


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("jax", "jaxlib", "t5pegasus"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
