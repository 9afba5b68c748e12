"""Whether a job that has ended is started again: budgets by kind of end, and a verdict on one that gets nowhere."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

from launch.attempts import newest_checkpoint
from launch.backends.local import JobEnding
from launch.exit_codes import BUG, DISK, DONE, INTERRUPTED, PREEMPTED, Terminated
from launch.processes import say
from t5pegasus.errors import UsageError

_LONGEST_PAUSE = 600.0


@dataclasses.dataclass(frozen=True)
class Restarts:
    """How often a job that has ended is started again, by what ended it. Usage, bad data and divergence never are."""

    preemption: int = 100
    """After exit code 42: it was asked to stop, and saved."""
    infra: int = 10
    """After a signal or a watchdog (128 and more)."""
    failure: int = 1
    """After a bug (1) or a full disk (46)."""
    pause_seconds: float = 30.0
    """Before the next attempt after a failure; doubled from one to the next, up to 600."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value < 0:
                raise UsageError(f"restarts.{field.name}={value} must not be negative")

    def kind(self, code: int) -> str | None:
        """The budget that an exit code is charged to; None for a code that ends the job for good."""
        if code == PREEMPTED:
            return "preemption"
        if code in (BUG, DISK):
            return "failure"
        return "infra" if code >= 128 and code != INTERRUPTED else None


def run_again(run: Callable[[], JobEnding], restarts: Restarts, run_path: Path | None) -> int:
    """Run a job until it is done, or must not be started again; its last exit code.

    Two attempts in a row that began at the same checkpoint, failed, and left no newer one end it: it would fail there
    for ever.
    """
    budgets = {"preemption": restarts.preemption, "infra": restarts.infra, "failure": restarts.failure}
    spent = dict.fromkeys(budgets, 0)
    pause, failed_at = restarts.pause_seconds, []
    while True:
        began = newest_checkpoint(run_path) if run_path else None
        code, asked = run()
        kind = restarts.kind(code)
        if code == DONE or asked or kind is None:
            return code
        gets_on = run_path is None or newest_checkpoint(run_path) != began
        failed_at = [] if gets_on or code == PREEMPTED else [*failed_at, began]
        spent[kind] += 1
        if spent[kind] > budgets[kind]:
            _say(f"exit code {code}; not started again: restarts after {kind} are used up ({budgets[kind]})")
            return code
        if len(failed_at) == 2 and failed_at[0] == failed_at[1]:
            where = "before its first checkpoint" if began is None else f"behind its checkpoint of step {began}"
            _say(f"exit code {code}; not started again: two attempts in a row failed {where}, without a newer one")
            return code
        failed_at = failed_at[-1:]
        if kind != "preemption":
            pause = restarts.pause_seconds if gets_on else min(2 * pause, _LONGEST_PAUSE)
            _say(f"exit code {code}; again in {pause:.0f} s ({spent[kind]} of {budgets[kind]} after {kind})")
            try:
                time.sleep(pause)
            except Terminated:  # nothing runs, and what was saved is saved
                _say("told to stop; the same command goes on")
                return PREEMPTED
        else:
            _say(f"exit code {code}; again ({spent[kind]} of {restarts.preemption} after {kind})")


def _say(message: str) -> None:
    say(f"t5pegasus launch: {message}")
