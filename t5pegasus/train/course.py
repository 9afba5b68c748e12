"""What a run knows beside its state, carried from update to update and held by every checkpoint."""

from typing import Any, NamedTuple

from t5pegasus.checkpoint import CheckpointInfo
from t5pegasus.train.early_stopping import History


class Course(NamedTuple):
    """Where a run stands; a run that continues from a checkpoint takes it up as if it had never stopped.

    Nothing here is measured in seconds: two runs of the same config have the same course.
    """

    history: History = ()
    """Evaluations so far."""
    flops: int = 0
    """Spent on training this model and those it came from."""
    interval: dict[str, Any] = {}  # noqa: RUF012 - never written to
    """What was measured since the last `train` record (`Meter.interval`)."""
    owed: tuple[str, ...] = ()
    """What was to be done at this step and a stop cut off: `evaluate`, `sample`."""
    rollbacks: int = 0
    """Times that the run has gone back behind a bad update."""
    skips: int = 0
    """Updates skipped in a row, up to this step."""

    def to_json(self) -> dict[str, Any]:
        """What `CheckpointInfo.course` keeps: all but history and FLOPs, which stand beside it; no defaults."""
        fields = {name: getattr(self, name) for name in ("interval", "owed", "rollbacks", "skips")}
        return {name: value for name, value in fields.items() if value}


def read_course(info: CheckpointInfo, flops: int) -> Course:
    """The course of a checkpoint; `flops` as they are known, for one that does not say."""
    kept = info.course
    return Course(
        history=info.history,
        flops=flops,
        interval=kept.get("interval", {}),
        owed=tuple(kept.get("owed", ())),
        rollbacks=kept.get("rollbacks", 0),
        skips=kept.get("skips", 0),
    )
