"""A thread beside the run: it writes this process's record, reads those of the others, and ends a job that is stuck.

It needs neither the main thread nor JAX: a process that waits in a collective for one that has died, or in a library
for ever, is ended from here.
"""

import contextlib
import dataclasses
import faulthandler
import io
import logging
import math
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from launch.attempts import Record, read_record, record_path
from launch.exit_codes import ABORTED, exit_code
from launch.liveness import State, state_of
from launch.processes import say
from launch.verdicts import Peer, Verdict, find_stragglers, judge, judge_peers
from launch.watch_config import WatchConfig
from t5pegasus.storage import is_remote, write_bytes
from t5pegasus.train.control import Control

logger = logging.getLogger("t5pegasus.watchdog")

_ALL_READ_ALL = 32
"""Processes up to which each reads the records of all; of more, process 0 does, and the others read its."""
_MISSED_BEATS = 3
"""So many at least before a process is taken for lost."""
_UNWINDING_SECONDS = 3.0
"""From a failure to the end of the process; behind it, what still runs is left."""
_PACE_SECONDS = 20.0
_PACE_STEPS = 5
"""At least so much is measured before a process is called slow."""


class Watchdog(threading.Thread):
    """Beats, looks at the others, and says when this process must end."""

    def __init__(
        self,
        folder: Path,
        process: int,
        num_processes: int,
        control: Control,
        limits: WatchConfig,
        write: Callable[[dict[str, Any]], dict[str, Any]],
        leave: Callable[[Verdict], None],
    ):
        """A watchdog that `start` sets to work.

        Args:
            folder: of the attempt.
            process: number of this process.
            num_processes: how many there are.
            control: of the run.
            limits: of time.
            write: takes what is new ({beat, seconds, …}), writes the record and returns it.
            leave: ends this process.
        """
        super().__init__(name="watchdog", daemon=True)
        self.folder, self.process, self.num_processes = folder, process, num_processes
        self.control, self._write, self._leave = control, write, leave
        self.interval = 1.0 * max(1, num_processes / _ALL_READ_ALL)
        if is_remote(folder):
            self.interval = max(self.interval, 30.0 if num_processes == 1 else 10.0)
        self.limits = limits
        if limits.heartbeat_seconds:  # no sign of life can be missed before there should have been some
            seconds = max(limits.heartbeat_seconds, math.ceil(_MISSED_BEATS * self.interval))
            self.limits = dataclasses.replace(limits, heartbeat_seconds=seconds)
        self.activity: str | None = None
        """What is done outside of the run, instead of what the run does."""
        self._began = time.monotonic()
        self._stopped = threading.Event()
        self._count = 0
        self._seen: dict[int, tuple[Any, float, float]] = {}
        """Of each process: what tells its records apart, how long it has been silent, when its end was seen."""
        self._looked: float | None = None
        self._living: set[str] = set()
        """Processes that lived while this one watched."""
        self._paces: deque[tuple[float, int, float]] = deque()
        self._named: dict[int, float] = {}
        self._failing_since: float | None = None

    def run(self) -> None:
        """Beat until stopped."""
        while True:
            verdict = self.look()
            if verdict is not None:
                if verdict.has_stacks:
                    self.dump_stacks()
                self._leave(verdict)
                return
            if self.limits.heartbeat_seconds:  # it needs no lock of the interpreter, which a library may hold for ever
                with contextlib.suppress(OSError, ValueError, io.UnsupportedOperation):  # no real stderr
                    faulthandler.dump_traceback_later(self.limits.heartbeat_seconds / 2 + self.interval)
            if self._stopped.wait(self.interval):
                faulthandler.cancel_dump_traceback_later()
                return

    def stop(self) -> None:
        """No more beats; returns when the last one is done."""
        self._stopped.set()
        if self.is_alive() and threading.current_thread() is not self:
            self.join()

    def look(self) -> Verdict | None:
        """One beat; the verdict on this process, if there is one."""
        own = self._write(self.describe())
        peers = self.read_peers()
        if self.process == 0 and len(peers) > 0:
            self._name_stragglers({0: own, **{process: peer.record for process, peer in peers.items()}})
        if self.activity == "join":  # records of an earlier job may lie there, too
            witnessed = {process: peer for process, peer in peers.items() if peer.record["identity"] in self._living}
            return judge_peers(witnessed, self.limits) or self._judge_missing(own, peers)
        return judge(own, peers, self.limits) or self._judge_unwinding()

    def describe(self) -> dict[str, Any]:
        """What a beat says."""
        activity, now = self.control.activity, time.monotonic()
        name, began = (activity.name, activity.began) if self.activity is None else (self.activity, self._began)
        seconds = dict(self.control.seconds)
        seconds[activity.name] = seconds.get(activity.name, 0.0) + now - activity.began
        self._count += 1
        return {
            "first_step": self.control.first_step,
            "beat": {
                "count": self._count, "time": time.time(), "activity": name, "since": round(now - began, 3),
                "step": activity.step,
            },
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "pace": self._pace(now, activity.step, seconds),
        }  # fmt: skip

    def read_peers(self) -> dict[int, Peer]:
        """The other processes; one that has not come yet is not among them."""
        # While this process did not look, or what all of them write to did not answer, nobody was silent.
        began = time.monotonic()
        passed = 0.0 if self._looked is None else min(began - self._looked, 2 * self.interval)
        self._looked, peers = began, {}
        for process in range(self.num_processes) if self._reads_all else (0,):
            if process == self.process:
                continue
            record, now = read_record(record_path(self.folder, process)), time.monotonic()
            if record is None:
                continue
            sign = (record["identity"], record["beat"]["count"], bool(record["ended"]))
            before = self._seen.get(process)
            silent = 0.0 if before is None or before[0] != sign else before[1] + passed
            ended = 0.0 if not record["ended"] else before[2] if before and before[2] else now
            self._seen[process] = (sign, silent, ended)
            state = state_of(record["identity"])
            beats = before is not None and before[0] != sign and before[0][0] == sign[0]
            if not record["ended"] and (beats or state is State.ALIVE):
                self._living.add(record["identity"])
            peers[process] = Peer(record, silent, ended and now - ended, state)
        return peers

    def find_culprit(self, seconds: float) -> Verdict | None:
        """The end of another process that explains a failure of this one; waits so long for it to show.

        Whoever reads process 0 alone waits for it to have waited.
        """
        before = {process: peer.record["beat"]["count"] for process, peer in self.read_peers().items()}
        until = time.monotonic() + max(seconds, 2.5 * self.interval) * (1 if self._reads_all else 3)
        while True:
            peers = self.read_peers()
            verdict = judge_peers(peers, self.limits)
            if verdict is not None:
                return verdict
            if time.monotonic() > until:
                break
            time.sleep(0.1)
        silent = {
            process: peer
            for process, peer in peers.items()
            if not peer.record["ended"] and peer.record["beat"]["count"] == before.get(process)
        }
        return judge_peers(silent, dataclasses.replace(self.limits, heartbeat_seconds=1))

    @property
    def _reads_all(self) -> bool:
        return self.process == 0 or self.num_processes <= _ALL_READ_ALL

    def wait_for_peers(self, seconds: float) -> None:
        """Until all others have ended, at most so long."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            peers = [peer for peer in self.read_peers().values() if peer.state is not State.GONE]
            if all(peer.record["ended"] and peer.state is State.UNKNOWN for peer in peers):
                time.sleep(1.0 if peers else 0.0)  # from its last word to its end, where that cannot be seen
                return
            time.sleep(0.05)

    def dump_stacks(self) -> None:
        """Show what all threads are doing, on stderr and beside the record."""
        try:
            with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
                file.seek(0)
                text = file.read()
        except OSError as error:  # a full disk must not keep the process from ending
            text = f"it cannot be shown: {error}"
        say(f"what the threads of process {self.process} are doing:\n{text}")
        try:
            write_bytes(self.folder / f"process-{self.process}.stacks.txt", text.encode())
        except OSError as error:
            logger.warning("the stacks are not beside the record: %s", error)

    def _judge_missing(self, own: dict[str, Any], peers: dict[int, Peer]) -> Verdict | None:
        limit = self.limits.join_seconds
        if not limit or own["beat"]["since"] < limit:
            return None
        living = {process for process, peer in peers.items() if peer.silent_seconds < 5 * self.interval}
        missing = [process for process in range(self.num_processes) if process not in living | {self.process}]
        names = ", ".join(map(str, missing[:20])) + (", …" if len(missing) > 20 else "")
        message = f"waited {limit} s for all {self.num_processes} processes (--watch.join-seconds); missing: {names}"
        return Verdict(ABORTED, "consequence", message, missing[0] if missing else self.process)

    def _judge_unwinding(self) -> Verdict | None:
        """A failure that does not come to an end: something waits on the way out."""
        error = self.control.failing
        if error is None or self.num_processes == 1:
            self._failing_since = None
            return None
        self._failing_since = self._failing_since or time.monotonic()
        if time.monotonic() - self._failing_since < _UNWINDING_SECONDS:
            return None
        message = f"{type(error).__name__}: {error}; what should end behind it took longer than {_UNWINDING_SECONDS} s"
        return Verdict(exit_code(error) or 1, "failed", message, self.process, has_stacks=True)

    def _pace(self, now: float, step: int, seconds: dict[str, float]) -> dict[str, float] | None:
        if self.control.first_step is None or step < self.control.first_step + 2:  # the first ones are always slow
            return None
        own = seconds.get("data", 0.0) + seconds.get("step", 0.0)
        if self._paces and step < self._paces[-1][1]:  # it went back
            self._paces.clear()
        self._paces.append((now, step, own))
        while len(self._paces) > 1 and _is_long(self._paces[1], now, step):
            self._paces.popleft()
        then, before, steps = self._paces[0][0], self._paces[0][2], step - self._paces[0][1]
        if not _is_long(self._paces[0], now, step):
            return None
        return {"seconds_per_step": (now - then) / steps, "host_seconds_per_step": (own - before) / steps}

    def _name_stragglers(self, records: Mapping[int, Record]) -> None:
        found = find_stragglers(records)
        self.control.stragglers = tuple(sorted(found))
        for process, seconds in found.items():
            if time.monotonic() - self._named.get(process, float("-inf")) < 600:
                continue
            self._named[process] = time.monotonic()
            usual = statistics.median(
                record["pace"]["host_seconds_per_step"]
                for other, record in records.items()
                if other != process and record["pace"]
            )
            logger.warning(
                "process %d (on %s) is slow: its own part of a step takes %.3f s, that of the others %.3f s",
                process, records[process]["host"], seconds, usual,
            )  # fmt: skip


def _is_long(then: tuple[float, int, float], now: float, step: int) -> bool:
    return now - then[0] >= _PACE_SECONDS and step - then[1] >= _PACE_STEPS
