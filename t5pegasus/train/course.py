"""What a run knows beside its state, carried from update to update and held by every checkpoint."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from t5pegasus.checkpoint import CheckpointInfo
from t5pegasus.data.quarantine import BadExample
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
    bad_examples: dict[str, list[int]] = {}  # noqa: RUF012 - never written to
    """Numbers of the examples that could not be used in an update, by the fingerprint of their folder."""

    def with_bad_examples(self, found: Iterable[BadExample]) -> "Course":
        """The course behind an update in whose rows these were found."""
        known = {examples: set(indices) for examples, indices in self.bad_examples.items()}
        for bad in found:
            known.setdefault(bad.examples, set()).add(bad.index)
        return self._replace(bad_examples={examples: sorted(indices) for examples, indices in known.items()})

    def to_json(self) -> dict[str, Any]:
        """What `CheckpointInfo.course` keeps: all but history and FLOPs, which stand beside it; no defaults."""
        fields = {name: getattr(self, name) for name in ("interval", "owed", "rollbacks", "skips", "bad_examples")}
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
        bad_examples=kept.get("bad_examples", {}),
    )
