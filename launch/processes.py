"""Making a process ready for JAX: compiled programs kept between runs, the other processes of its job."""

import contextlib
import dataclasses
import hashlib
import os
import platform
import re
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from launch.process_group import find_process_group, is_tpu_vm
from launch.termination import is_heard
from t5pegasus.errors import UsageError
from t5pegasus.storage import cache_path, is_remote_text, open_path

_is_one_of_several = False
before_leaving: list[Callable[[], None]] = []
"""What one of several processes does between its last word and its end."""

_JOIN_SECONDS = 300
_HEARTBEAT_SECONDS = 100
"""From which JAX takes a process for lost. Runs that train notice earlier (`launch.watchdog`), and say more."""
_SAYING_SECONDS = 2.0
_SHUTDOWN_SECONDS = 60
"""Process 0 waits so long for the others at the end of a job that has succeeded."""


def is_one_of_several() -> bool:
    """Whether this process has joined others, so that they would wait for it."""
    return _is_one_of_several


def say(text: str = "") -> None:
    """Write a line to stderr, and flush all output; for two seconds at most.

    Whoever reads it may have stopped reading, or its disk may be full: that must not keep a process from ending.
    """

    def write() -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        with contextlib.suppress(OSError, ValueError):
            print(text, end="\n" if text else "", file=sys.stderr, flush=True)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    thread.join(_SAYING_SECONDS)


def leave_at_once(code: int) -> NoReturn:
    """End this process without the clean-up in which JAX would wait for others that are waiting for this one."""
    try:
        say()
        for act in before_leaving:
            act()
    finally:
        os._exit(code)


def init_distributed(join_seconds: int = 0) -> None:
    """Make this process ready to use JAX: call it first in every verb that does.

    Keeps compiled programs between runs, and joins the other processes if the environment says there are any.
    In a job of several processes results come once: process 0 keeps stdout, what the others print goes to
    stderr, and so does what the C++ libraries print themselves.

    Args:
        join_seconds: after which the caller itself gives up waiting for the other processes; 0 if JAX is to.

    Raises:
        UsageError: the environment describes a job of several processes incompletely.
    """
    global _is_one_of_several  # noqa: PLW0603 - a process joins once, like the JAX state this mirrors
    group = find_process_group(os.environ)
    if group is None and not is_tpu_vm(os.environ):
        _keep_compiled_programs()
        return
    if _is_one_of_several:
        return
    _is_one_of_several = True
    if not is_heard():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Python's handler would wait for the end of a collective
    results = _send_stdout_to_stderr()
    _keep_compiled_programs()
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        _keep_those_of_every_process()

    import jax

    # JAX's preemption service would catch SIGTERM and wait for a training loop to ask about it: the job ran on.
    jax.config.update("jax_enable_preemption_service", False)
    if group is not None:
        described = {**dataclasses.asdict(group), "cluster_detection_method": "deactivate"}
        jax.distributed.initialize(**described, **_time_limits(join_seconds))
        process_id = group.process_id
    else:
        jax.distributed.initialize(**_time_limits(join_seconds))
        process_id = jax.process_index()
    if process_id == 0:
        sys.stdout = open(results, "w", encoding="utf-8", buffering=1)  # noqa: SIM115, PTH123 - lives as long as we
    else:
        os.close(results)


def _time_limits(join_seconds: int) -> dict[str, Any]:
    return {
        "initialization_timeout": join_seconds + 60 if join_seconds else _JOIN_SECONDS,
        "heartbeat_timeout_seconds": _HEARTBEAT_SECONDS,
        "shutdown_timeout_seconds": _SHUTDOWN_SECONDS,
    }


def compilation_cache_path(environment: Mapping[str, str]) -> Path:
    """Where compiled programs are kept: the user's cache folder, one place per kind of CPU.

    JAX's key for a compiled CPU program does not name the CPU, so that a home folder shared by different
    machines could hand one of them instructions it does not have.
    """
    return cache_path(environment) / "compiled" / _kind_of_cpu()


def _keep_compiled_programs() -> None:
    import jax

    given: str | None = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if given is None:
        jax.config.update("jax_compilation_cache_dir", str(compilation_cache_path(os.environ)))
    elif is_remote_text(given):
        jax.config.update("jax_compilation_cache_dir", _shared_cache(given))


def _keep_those_of_every_process() -> None:
    """Let each process write what it compiles: on CPUs its key of a program is its own, and JAX lets only the first.

    Without this all others would compile again whenever a run goes on.
    """
    from jax._src import compiler, distributed

    write, state = compiler._cache_write, distributed.global_state

    def write_as_the_first(*args: Any, **kwargs: Any) -> None:
        own, state.process_id = state.process_id, 0
        try:
            write(*args, **kwargs)
        finally:
            state.process_id = own

    compiler._cache_write = write_as_the_first


def _shared_cache(address: str) -> str:
    """The part of a compilation cache in an object store that is of this kind of CPU; JAX reads and writes it itself.

    Raises:
        UsageError: if such a store cannot be reached from here.
    """
    open_path(address)
    if not address.startswith(("gs://", "s3://")):
        raise UsageError(f"{address}: JAX keeps compiled programs in gs:// or s3://, or in a folder on this machine")
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # as `storage` does: one API for all of a job
    address = address.rstrip("/")
    return address if address.endswith(_kind_of_cpu()) else f"{address}/{_kind_of_cpu()}"


def _kind_of_cpu() -> str:
    return f"{platform.machine()}-{_cpu_features_digest()}"


def _cpu_features_digest() -> str:
    cpu_information = Path("/proc/cpuinfo")
    text = cpu_information.read_text(encoding="utf-8") if cpu_information.exists() else platform.processor()
    features = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    return hashlib.sha256((features[1] if features else text).encode()).hexdigest()[:8]


def _send_stdout_to_stderr() -> int:
    """Lead file descriptor 1, which C++ libraries such as Gloo write to, to stderr; return the real one."""
    sys.stdout.flush()
    results = os.dup(1)
    os.dup2(2, 1)
    return results
