"""Time limits of a run: how long each of its activities may take before the process is taken for stuck."""

import dataclasses

from t5pegasus.errors import UsageError


@dataclasses.dataclass(frozen=True)
class WatchConfig:
    """Time limits: a process that exceeds one is stuck; it shows its stacks and ends, and all others with it. 0: none.

    They belong to the attempt, not to the run: they are not recorded, and each command may have its own.
    """

    join_seconds: int = 240
    """Until all processes have come."""
    start_seconds: int = 1800
    """Restoring and compiling."""
    step_seconds: int = 600
    """Waiting for a batch, sending one update, or waiting for its numbers."""
    evaluate_seconds: int = 3600
    """One evaluation."""
    save_seconds: int = 1800
    """One checkpoint; another process's part of it is waited for half as long."""
    event_seconds: int = 3600
    """Changing the model on the way."""
    heartbeat_seconds: int = 60
    """Without a sign of life a process is taken for lost."""
    grace_seconds: int = 120
    """From a request to stop (SIGTERM) to the end, saved or not."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value < 0:
                raise UsageError(f"watch.{field.name}={value} must be a number of seconds, or 0 for no limit")

    def limit(self, activity: str) -> int:
        """Seconds that an activity (`train.control.Control.doing`) may take; 0 for no limit.

        The device gets a little longer: whoever it waits for is to be the one that speaks first.
        """
        match activity:
            case "data" | "step":
                return self.step_seconds
            case "device":
                return self.step_seconds and self.step_seconds + 5
            case "start" | "restore" | "compile":
                return self.start_seconds
            case "sample":
                return self.evaluate_seconds
            case "build":  # as long as there are pairs; who dies meanwhile is noticed all the same
                return 0
            case "join":
                return self.join_seconds
            case _:
                return getattr(self, f"{activity}_seconds")
