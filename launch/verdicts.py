"""What the records of all processes say about the job: whether this process must end, why, and who is to blame."""

import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

from launch.attempts import Record
from launch.exit_codes import ABORTED, PREEMPTED, TERMINATED
from launch.liveness import State
from launch.watch_config import WatchConfig

SLOWER = 2.0
"""Own time per step, against the median of the others, from which a process is a straggler."""
_MATTERS = 0.2
"""Share of a step from which what it takes longer counts."""


class Peer(NamedTuple):
    """Another process, as it is seen from here."""

    record: Record
    silent_seconds: float
    """Since its record last changed, on our own clock."""
    ended_seconds: float
    """Since it was seen to have ended; 0 if it has not."""
    state: State


class Verdict(NamedTuple):
    """Why this process ends."""

    code: int
    how: str
    message: str
    blamed: int
    """The process that is the reason."""
    has_stacks: bool = False
    """Whether what the threads are doing says why."""


def describe(record: Record) -> str:
    """A process by number and place."""
    return f"process {record['process']} of {record['num_processes']} (pid {record['pid']} on {record['host']})"


def judge(own: Record, peers: Mapping[int, Peer], limits: WatchConfig) -> Verdict | None:
    """Whether the process of the record `own` must end; None while it need not."""
    return judge_peers(peers, limits) or _judge_own(own, peers, limits)


def judge_peers(peers: Mapping[int, Peer], limits: WatchConfig) -> Verdict | None:
    """The end that another process has come to, if this one must end because of it."""
    ended = [peer for peer in peers.values() if peer.record["ended"] and peer.record["ended"]["code"] != 0]
    for peer in sorted(ended, key=lambda peer: (peer.record["ended"]["how"] == "consequence", _end_time(peer))):
        verdict = _follow(peer, limits)
        if verdict is not None:
            return verdict
    for process, peer in sorted(peers.items()):
        if peer.record["ended"]:
            continue
        who = describe(peer.record)
        if peer.state is State.GONE:
            return Verdict(ABORTED, "consequence", f"{who} is gone without a word, as by kill -9", process)
        if limits.heartbeat_seconds and peer.silent_seconds > limits.heartbeat_seconds:
            why = "" if peer.state is State.ALIVE else f": it is {peer.state.value}"
            message = f"{who} has given no sign of life for {peer.silent_seconds:.0f} s{why}"
            return Verdict(ABORTED, "consequence", f"{message}; it was doing: {_doing(peer.record)}", process)
    return None


def _end_time(peer: Peer) -> float:
    return peer.record["ended"]["time"]


def _follow(peer: Peer, limits: WatchConfig) -> Verdict | None:
    ended, who = peer.record["ended"], describe(peer.record)
    if ended["saved"]:  # all end behind the same checkpoint, this process as soon as it has done its part
        if not limits.grace_seconds or peer.ended_seconds < limits.grace_seconds:
            return None
        message = f"{who} stopped {peer.ended_seconds:.0f} s ago and this process did not"
        return Verdict(TERMINATED, "killed", message, peer.record["process"])
    if ended["how"] in ("consequence", "stuck"):
        return Verdict(ended["code"], "consequence", ended["message"], ended["blamed"])
    if ended["code"] == PREEMPTED:
        message = f"{who} was terminated before its first new step; the same command goes on"
    else:
        message = f"{who} ended with exit code {ended['code']}: {ended['message']}"
    return Verdict(ended["code"], "consequence", message, peer.record["process"])


def _judge_own(own: Record, peers: Mapping[int, Peer], limits: WatchConfig) -> Verdict | None:
    beat = own["beat"]
    if not _is_over(own, limits):
        return None
    stuck, limit, flag = _find_stuck(own, peers), limits.limit(beat["activity"]), f"--watch.{_flag(beat['activity'])}"
    if not _is_over(stuck, limits):  # it may take longer for what it does, and says so itself if that is too long
        return None
    if stuck is own:
        others = " like all others" if peers and beat["activity"] == "device" else ""
        message = f"{describe(own)} is stuck{others}: {_doing(own)}, longer than {flag} {limit}"
        return Verdict(ABORTED, "stuck", message, own["process"], has_stacks=True)
    message = f"{describe(stuck)} is stuck: {_doing(stuck)}; this process waits for it, longer than {flag} {limit}"
    return Verdict(ABORTED, "consequence", message, stuck["process"], has_stacks=True)


def _is_over(record: Record, limits: WatchConfig) -> bool:
    beat = record["beat"]
    return 0 < limits.limit(beat["activity"]) <= beat["since"]


_ORDER = (
    "join", "start", "build", "restore", "compile", "device", "evaluate", "sample", "save", "event", "data", "step",
)  # fmt: skip
"""Of activities at the same number of updates sent: how far a process has come."""


def _find_stuck(own: Record, peers: Mapping[int, Peer]) -> Record:
    """Whom all wait for: the process that has come least far, this one if it is no further than that."""
    records = [own, *(peer.record for peer in peers.values() if not peer.record["ended"])]
    return min(records, key=_progress)


def _progress(record: Record) -> tuple[int, int]:
    beat = record["beat"]
    return beat["step"], _ORDER.index(beat["activity"]) if beat["activity"] in _ORDER else 0


def _flag(activity: str) -> str:
    match activity:
        case "data" | "step" | "device":
            return "step-seconds"
        case "restore" | "compile":
            return "start-seconds"
        case "sample":
            return "evaluate-seconds"
        case _:
            return f"{activity}-seconds"


_WORDS = {
    "join": "joining the other processes",
    "start": "starting",
    "build": "making examples of the pairs",
    "restore": "restoring a checkpoint",
    "compile": "compiling",
    "data": "waiting for a batch",
    "step": "sending an update to the device",
    "device": "waiting for the device",
    "evaluate": "evaluating",
    "sample": "writing samples",
    "save": "saving a checkpoint",
    "event": "changing the model",
}


def _doing(record: Record) -> str:
    beat = record["beat"]
    return f"{_WORDS.get(beat['activity'], beat['activity'])} for {beat['since']:.0f} s at step {beat['step']}"


def find_stragglers(records: Mapping[int, Record]) -> dict[int, float]:
    """Processes whose own time per step is twice the median of the others', and what it is, in seconds.

    Without a time of a whole step nothing is said, nor where the difference is too small to matter.
    """
    own: dict[int, float] = {}
    whole: list[float] = []
    for process, record in records.items():
        pace: Any = record.get("pace")
        if pace and not record["ended"]:
            own[process] = pace["host_seconds_per_step"]
            whole.append(pace["seconds_per_step"])
    if len(own) < 2:
        return {}
    step = max(whole)
    found = {}
    for process, seconds in own.items():
        others = statistics.median(value for other, value in own.items() if other != process)
        if seconds >= SLOWER * others and seconds - others >= _MATTERS * step:
            found[process] = seconds
    return found
