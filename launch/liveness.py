"""Whether another process of this machine lives, and is the one that is meant: numbers of processes come again."""

import enum
import os
from pathlib import Path

_PROC = Path("/proc")


class State(enum.Enum):
    """What can be told of a process from here."""

    ALIVE = "alive"
    STOPPED = "stopped by a signal (SIGSTOP, or a debugger)"
    GONE = "gone"
    UNKNOWN = "on another machine"


def identity(pid: int | None = None) -> str | None:
    """A name for a process that no other one has or will have; None where there is no /proc, or no such process."""
    found = _stat(os.getpid() if pid is None else pid)
    return None if found is None else f"{_place()}/{os.getpid() if pid is None else pid}/{found[1]}"


def state_of(name: str | None) -> State:
    """The state of the process that gave itself this `identity`."""
    if name is None or "/" not in name:
        return State.UNKNOWN
    place, pid, began = name.rsplit("/", 2)
    if place != _place():
        return State.UNKNOWN
    found = _stat(int(pid))
    if found is None or found[1] != began or found[0] in "ZX":
        return State.GONE
    return State.STOPPED if found[0] in "Tt" else State.ALIVE


def _place() -> str:
    """The boot of the kernel and the namespace that process numbers belong to."""
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat(_PROC / 'self/ns/pid').st_ino}"  # noqa: PTH116 - the link's target has no name
    except OSError:
        return ""


def _stat(pid: int) -> tuple[str, str] | None:
    """State letter and start time of a process."""
    try:
        text = (_PROC / str(pid) / "stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before may hold spaces and parentheses
    return fields[0], fields[19]
