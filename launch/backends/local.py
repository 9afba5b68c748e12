"""Several JAX processes on this machine over one mesh of CPU devices, with Gloo between them.

The same code path as a pod: each process has its own share of the batch, of the parameters and of a
checkpoint.
"""

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any, NamedTuple

from launch.attempts import Record, find_cause, list_attempts, read_attempt
from launch.exit_codes import ABORTED, PREEMPTED, TERMINATED
from launch.processes import say
from t5pegasus.errors import UsageError

_PEERS_SECONDS = 5.0
"""From the first failure to the end of all others: they notice by themselves, and may still say what they know."""
_STOPPING_SECONDS = 600.0
"""The same where the first one stopped because it was asked to: the others are still saving."""


class Ending(NamedTuple):
    """How one process ended."""

    process_id: int
    code: int
    """The exit code; 128 + number for a process that a signal ended, as shells write it."""
    by_signal: bool = False


class JobEnding(NamedTuple):
    """How the job ended."""

    code: int
    asked: bool = False
    """Whether we were told to stop it."""


def run_locally(
    argv: Sequence[str],
    num_processes: int,
    devices_per_process: int = 1,
    *,
    run_path: Path | None = None,
    saves: bool = False,
) -> JobEnding:
    """Run `argv` as `num_processes` JAX processes and return how the job ended.

    Process 0 writes to our stdout; everything on stderr comes line by line behind `[p0]`, `[p1]`, … SIGINT
    and SIGTERM are passed on to all processes; a second one kills them. When a process fails, its peers,
    which would wait for it, are killed, and the code of the one that failed first is the code of the job.

    Args:
        argv: the command.
        num_processes: how many.
        devices_per_process: CPU devices of each.
        run_path: where the processes leave records of how they ended, if they do.
        saves: whether the command answers SIGTERM by saving. A process of it that SIGTERM ends has not come to where
            it listens, and has nothing to save: preempted.

    Raises:
        UsageError: a count is below 1.
    """
    for name, count in (("processes", num_processes), ("devices-per-process", devices_per_process)):
        if count < 1:
            raise UsageError(f"{name}={count} must be at least 1")
    address = f"127.0.0.1:{_find_free_port()}"
    processes: list[subprocess.Popen[bytes]] = []
    attempts = set() if run_path is None else set(list_attempts(run_path))
    with _signals_passed_to(processes) as asked:
        try:
            for process_id in range(num_processes):
                environment = _make_environment(address, num_processes, process_id, devices_per_process)
                processes.append(
                    subprocess.Popen(
                        argv,
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE,
                        start_new_session=True,  # so that Ctrl-C reaches it once, through us
                    )
                )
            endings = [_preempted(ending) if saves else ending for ending in _watch(processes)]
            records = {} if run_path is None else _read_new_attempt(run_path, attempts)
            return JobEnding(_blame(endings, num_processes, records), bool(asked))
        finally:
            for process in processes:
                _kill(process)


def _make_environment(address: str, num_processes: int, process_id: int, num_devices: int) -> dict[str, str]:
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(num_devices),
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_COORDINATOR_BIND_ADDRESS": address,  # JAX would listen on every network interface
        "JAX_NUM_PROCESSES": str(num_processes),
        "JAX_PROCESS_ID": str(process_id),
    }


def _find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _preempted(ending: Ending) -> Ending:
    return ending._replace(code=PREEMPTED) if ending.by_signal and ending.code == TERMINATED else ending


def _read_new_attempt(run_path: Path, before: set[int]) -> dict[int, dict[str, Any]]:
    new = [number for number in list_attempts(run_path) if number not in before]
    return read_attempt(run_path, new[-1]) if new else {}


def _watch(processes: list[subprocess.Popen[bytes]]) -> list[Ending]:
    """Pass on all output until every process has ended; kill the rest soon after the first failure."""
    whole_lines = threading.Lock()
    readers = []
    for process_id, process in enumerate(processes):
        assert process.stdout is not None
        assert process.stderr is not None
        prefix = f"[p{process_id}] ".encode()
        results = (sys.stdout.buffer, b"") if process_id == 0 else (sys.stderr.buffer, prefix)
        for source, (sink, mark) in (
            (process.stdout, results),
            (process.stderr, (sys.stderr.buffer, prefix)),
        ):
            reader = threading.Thread(target=_copy_lines, args=(source, sink, mark, whole_lines), daemon=True)
            reader.start()
            readers.append(reader)

    ended: queue.SimpleQueue[Ending] = queue.SimpleQueue()
    for process_id, process in enumerate(processes):
        threading.Thread(target=_report_ending, args=(process_id, process, ended), daemon=True).start()
    endings = _collect_endings(ended, len(processes))
    for process in processes:
        _kill(process)
    for reader in readers:
        reader.join(timeout=5.0)
    return endings


def _collect_endings(ended: "queue.SimpleQueue[Ending]", num_processes: int) -> list[Ending]:
    """The endings in their order: all of them, or those up to shortly after the first failure."""
    endings: list[Ending] = []
    grace_seconds = None
    with contextlib.suppress(queue.Empty):
        while len(endings) < num_processes:
            endings.append(ended.get(timeout=grace_seconds))
            if endings[-1].code == PREEMPTED and grace_seconds is None:
                grace_seconds = _STOPPING_SECONDS
            elif endings[-1].code not in (0, PREEMPTED):
                grace_seconds = _PEERS_SECONDS
    return endings


def _blame(endings: Sequence[Ending], num_processes: int, records: Mapping[int, Record]) -> int:
    """The exit code of the process that failed first: the one that the others' records blame, else the first to end.

    JAX aborts the peers of a process that has died, sometimes before its death is noticed here: an abort
    counts only when nothing else happened.
    """
    failures = [ending for ending in endings if ending.code != 0]
    if not failures:
        return 0
    first = next((ending for ending in failures if ending.code != ABORTED), failures[0])
    cause, why = find_cause(records), ""
    if cause is not None:
        killed = [ending.code for ending in endings if ending.process_id == cause[0] and ending.by_signal]
        first = Ending(cause[0], killed[0] if killed and cause[1]["how"] == "consequence" else cause[1]["code"])
        why = f": {cause[1]['message']}" if cause[1]["message"] else ""
    if num_processes > 1:
        say(f"process {first.process_id} of {num_processes} ended with exit code {first.code}{why}")
    return first.code


def _report_ending(process_id: int, process: subprocess.Popen[bytes], ended: "queue.SimpleQueue[Ending]") -> None:
    code = process.wait()
    with contextlib.suppress(ProcessLookupError):  # what it has started and left behind
        os.killpg(process.pid, signal.SIGKILL)
    ended.put(Ending(process_id, code if code >= 0 else 128 - code, by_signal=code < 0))


def _copy_lines(source: IO[bytes], sink: IO[bytes], mark: bytes, whole_lines: threading.Lock) -> None:
    with source:
        for line in source:
            ending = b"" if line.endswith(b"\n") or not mark else b"\n"
            with whole_lines, contextlib.suppress(OSError):  # our reader left, or its disk is full: none must block
                sink.write(mark + line + ending)
                sink.flush()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that still runs, and whatever it has started."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def _signals_passed_to(processes: list[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Pass SIGINT and SIGTERM on, and remember them; each process then decides how to stop. The second one kills."""
    asked: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for process in processes:
            if len(asked) > 1:
                _kill(process)
            elif process.poll() is None:
                process.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
