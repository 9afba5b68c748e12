"""What the exit code of a process tells those who may start it again.

| code | meaning | again? |
| --- | --- | --- |
| 0 | done | |
| 1 | a bug, with its traceback | once |
| 2 | usage, or processes that differ in version or config | no |
| 42 | asked to stop: what was done is saved | yes, free of charge |
| 43 | a plan does not fit into its hardware | no |
| 44, 45 | bad data, diverged | no |
| 46 | disk or I/O | once |
| 130 | interrupted at a terminal | no |
| 128 + n | ended by signal n; 134 also a watchdog, 143 also a stop that took too long | some times |
"""

import signal

from t5pegasus.errors import PreemptedError, T5PegasusError, UsageError

DONE = 0
BUG = 1
USAGE = UsageError.exit_code
PREEMPTED = PreemptedError.exit_code
DOES_NOT_FIT = 43
DISK = 46
INTERRUPTED = 128 + signal.SIGINT
ABORTED = 128 + signal.SIGABRT
KILLED = 128 + signal.SIGKILL
BROKEN_PIPE = 128 + signal.SIGPIPE
TERMINATED = 128 + signal.SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM, which schedulers and `kill` send: it stops a verb that cannot save as Ctrl-C does."""


def exit_code(error: BaseException) -> int:
    """The exit code of a process that an exception ends."""
    match error:
        case SystemExit():
            return BUG if isinstance(error.code, str) else int(error.code or 0)
        case T5PegasusError():
            return error.exit_code
        case Terminated():
            return TERMINATED
        case KeyboardInterrupt():
            return INTERRUPTED
        case BrokenPipeError():
            return BROKEN_PIPE
        case OSError():
            return DISK
        case _:
            return BUG
