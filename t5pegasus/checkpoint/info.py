"""checkpoint.json: what a checkpoint's arrays are and where they come from."""

import dataclasses
from pathlib import Path
from typing import Any

from t5pegasus.config import RunConfig
from t5pegasus.errors import reading
from t5pegasus.json_files import SCHEMA, check_schema, read_json

INFO = "checkpoint.json"
_TUPLES = ("lineage", "history", "mixture")


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint's arrays are and where they come from."""

    config: RunConfig
    step: int
    rows: int
    compute_dtype: str
    tokenizer_fingerprint: str
    examples_fingerprint: str | None = None
    """Of the examples whose rows were consumed; None before any training."""
    lineage: tuple[dict[str, Any], ...] = ()
    """One entry per growth: plan, its hash, the step, the source's fingerprint."""
    history: tuple[dict[str, Any], ...] = ()
    """Evaluations so far: {step, loss}; where a run keeps its best checkpoint also the score that decides, and `best`,
    whether it was the best until then, and `begins_phase` behind a growth in the run."""
    flops: int | None = None
    """Spent on training this model and those it came from; None if an earlier version, or another program, trained."""
    mixture: tuple[dict[str, Any], ...] = ()
    """Weights of a mixture of corpora, each with the row from which they hold; only ever added to."""
    course: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What else the run knows at this step, as `train.course.Course.to_json` writes it; empty where that is nothing."""

    def to_json(self) -> dict[str, Any]:
        """The content of checkpoint.json."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "CheckpointInfo":
        """The inverse of `to_json`."""
        fields: dict[str, Any] = {key: item for key, item in value.items() if key != "schema"}
        fields["config"] = RunConfig.from_json(fields["config"])
        fields |= {key: tuple(fields[key]) for key in _TUPLES if key in fields}
        return cls(**fields)


def load_checkpoint_info(path: Path) -> CheckpointInfo:
    """What the checkpoint in this folder is."""
    value = read_json(path / INFO)
    check_schema(value, path / INFO)
    with reading(path / INFO):
        return CheckpointInfo.from_json(value)


def best_steps(history: tuple[dict[str, Any], ...]) -> tuple[int, ...]:
    """The steps of a history that were the best until then; the last is the best of all."""
    return tuple(entry["step"] for entry in history if entry.get("best"))
