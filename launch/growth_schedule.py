"""The growth schedule of a run: when its model grows, to what, and how; read from flags or from JSON.

    step=20000:large                                   at update 20,000, to the sizes of a preset
    flat=0.002/3:d_model=1024,d_ff=4096                when the held-out loss flattens, to these sizes
    flat=0.002/3,min_steps=5000:large:how.json         not before 5,000 updates of this model, by the choices in a file

In JSON the same is {"schema": 1, "stages": [{"when": {"step": 20000}, "to": "large"}, {"when": {"flat": 0.002,
"evaluations": 3, "min_steps": 5000}, "to": {"d_model": 1024}, "plan": {…}}]}, `plan` being what a plan file of
`t5pegasus grow` holds.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from t5pegasus.errors import UsageError
from t5pegasus.json_files import check_schema, read_json

NONE = "none"
"""Instead of stages: those that are still ahead are given up."""

_EXAMPLE = "write step=20000:large, flat=0.002/3:d_model=1024,d_ff=4096, or a file SCHEDULE.json"
_NUMBERS = {"step": int, "flat": float, "evaluations": int, "min_steps": int}


@dataclasses.dataclass(frozen=True)
class AtStep:
    """At one update."""

    step: int

    def is_due(self, step: int, losses: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the update has been made; see `WhenFlat.is_due`."""
        return step >= self.step

    def to_json(self) -> dict[str, Any]:
        """As a schedule file has it."""
        return {"step": self.step}

    def __str__(self) -> str:
        return f"step={self.step}"


@dataclasses.dataclass(frozen=True)
class WhenFlat:
    """When the best held-out loss improved by less than the part `flat` of it over the last `evaluations` ones."""

    flat: float
    evaluations: int
    min_steps: int = 0
    """Updates that the model of this size must have had."""

    def is_due(self, step: int, losses: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the loss is flat; a pure function, so that a resumed run decides as an unbroken one.

        With b the best loss of all evaluations in `losses` and a the best of all but the last `evaluations`, that is
        (a − b) / a < flat. Before there are more than `evaluations`, it is not.

        Args:
            step: updates made.
            losses: {step, loss} of each evaluation since the model had its size, or since the run began.
        """
        if len(losses) <= self.evaluations or step - losses[0]["step"] < self.min_steps:
            return False
        best = list(itertools.accumulate((_finite(entry["loss"]) for entry in losses), min))
        before, now = best[-1 - self.evaluations], best[-1]
        return math.isfinite(before) and before - now < self.flat * before

    def to_json(self) -> dict[str, Any]:
        """As a schedule file has it."""
        return {"flat": self.flat, "evaluations": self.evaluations, "min_steps": self.min_steps}

    def __str__(self) -> str:
        min_steps = f",min_steps={self.min_steps}" if self.min_steps else ""
        return f"flat={self.flat:g}/{self.evaluations}{min_steps}"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One growth of a run."""

    when: AtStep | WhenFlat
    to: str
    """A preset, or field=size pairs joined by commas."""
    plan: Mapping[str, Any]
    """Operators and policies, as a plan file has them; growth reads them."""

    def to_json(self) -> dict[str, Any]:
        """As a schedule file has it."""
        return {"when": self.when.to_json(), "to": self.to, "plan": dict(self.plan)}

    def __str__(self) -> str:
        return f"{self.when}:{self.to}"


def read_schedule(arguments: Sequence[str]) -> tuple[Stage, ...]:
    """The stages that `--growth` was given: one file, or one argument per stage.

    Raises:
        UsageError: naming the stage, what is wrong with it, and how to write it.
    """
    if len(arguments) == 1 and ":" not in arguments[0]:
        stages = _read_file(Path(arguments[0]))
    else:
        stages = tuple(_read_argument(number, argument) for number, argument in enumerate(arguments, 1))
    steps = [stage.when.step for stage in stages if isinstance(stage.when, AtStep)]
    for earlier, later in itertools.pairwise(steps):
        if later <= earlier:
            raise UsageError(
                f"growth: step={later} comes behind step={earlier}; stages are in the order of their steps"
            )
    return stages


def read_stage(value: Mapping[str, Any], where: str) -> Stage:
    """A stage from its JSON, `where` naming it in errors.

    Raises:
        UsageError: if a field is missing, unknown or of the wrong kind.
    """
    _check_fields(value, ("when", "to"), ("plan",), where)
    when, to, plan = value["when"], value["to"], value.get("plan", {})
    if isinstance(to, Mapping):
        to = ",".join(f"{field}={size}" for field, size in to.items())
    if not isinstance(to, str) or not to:
        raise UsageError(f'{where}: to={to!r} is no target; give a preset ("large") or sizes ({{"d_model": 1024}})')
    if not isinstance(plan, Mapping):
        raise UsageError(f"{where}: plan={plan!r} is no JSON object; give the content of a plan file, or leave it out")
    return Stage(_read_trigger(when, where), to, dict(plan))


def _read_file(path: Path) -> tuple[Stage, ...]:
    if not path.is_file():
        raise UsageError(f"growth={str(path)!r} is neither a stage nor a file; {_EXAMPLE}")
    schedule = read_json(path)
    check_schema(schedule, path)
    _check_fields(schedule, ("schema", "stages"), (), str(path))
    if not isinstance(schedule["stages"], list):
        raise UsageError(f"{path}: stages={schedule['stages']!r} must be a list of stages")
    return tuple(read_stage(value, f"{path}: stage {number}") for number, value in enumerate(schedule["stages"], 1))


def _read_argument(number: int, text: str) -> Stage:
    where = f"growth stage {number} ({text})"
    parts = text.split(":", 2)
    if len(parts) < 2:
        raise UsageError(f"{where}: no target behind a colon; {_EXAMPLE}")
    when: dict[str, Any] = {}
    for pair in parts[0].split(","):
        name, _, number_text = (part.strip() for part in pair.partition("="))
        if name == "flat":
            number_text, _, evaluations = number_text.partition("/")
            when["evaluations"] = _read_number("evaluations", evaluations, where)
        when[name] = _read_number(name, number_text, where)
    plan = read_json(Path(parts[2])) if len(parts) == 3 else {}
    return read_stage({"when": when, "to": parts[1].strip(), "plan": plan}, where)


def _read_number(name: str, text: str, where: str) -> int | float | str:
    if name not in _NUMBERS:
        raise UsageError(f"{where}: unknown trigger {name!r}; {_EXAMPLE}")
    try:
        return _NUMBERS[name](text)
    except ValueError:
        form = "flat=0.002/3, the least improvement and over how many evaluations" if name != "step" else "step=20000"
        raise UsageError(f"{where}: {name}={text!r} is not a number; write {form}") from None


def _read_trigger(when: Any, where: str) -> AtStep | WhenFlat:
    if not isinstance(when, Mapping) or ("step" in when) == ("flat" in when):
        raise UsageError(f"{where}: when={when!r} is no trigger; give either a step or flat; {_EXAMPLE}")
    if "step" in when:
        _check_fields(when, ("step",), (), f"{where}: when")
    else:
        _check_fields(when, ("flat", "evaluations"), ("min_steps",), f"{where}: when")
    for name, least in (("step", 1), ("evaluations", 1), ("min_steps", 0)):
        value = when.get(name, least)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UsageError(f"{where}: {name}={value!r} must be a whole number, at least {least}")
    if "step" in when:
        return AtStep(when["step"])
    flat = when["flat"]
    if not isinstance(flat, int | float) or isinstance(flat, bool) or not 0 < flat < 1:
        raise UsageError(f"{where}: flat={flat!r} must lie in (0, 1): 0.002 means an improvement by 0.2 %")
    return WhenFlat(float(flat), when["evaluations"], when.get("min_steps", 0))


def _check_fields(value: Any, needed: Sequence[str], optional: Sequence[str], where: str) -> None:
    if not isinstance(value, Mapping):
        raise UsageError(f"{where} is a {type(value).__name__}, a JSON object was wanted")
    known = (*needed, *optional)
    for name in value:
        if name not in known:
            raise UsageError(f"{where}: unknown field {name!r}; it has {', '.join(known)}")
    for name in needed:
        if name not in value:
            raise UsageError(f"{where}: {name} is missing; {_EXAMPLE}")


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
