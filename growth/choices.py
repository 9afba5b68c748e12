"""How to grow, where sizes say only how far: the content of a plan file."""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

from t5pegasus.errors import UsageError

Operator = dict[str, Any]
"""{"operator": name, option: value…}."""


@dataclasses.dataclass(frozen=True)
class LearningRatePolicy:
    """What the learning rate does after growth.

    keep: step and schedule go on; rewarm: as keep, and what growth added takes `peak` times the rate after a linear
    warm-up over `steps` updates (SPARKLING, 2026); remap: the schedule goes on from `to_step`, the point where the
    larger model's own curve would have this loss (Shen et al. 2022).
    """

    policy: Literal["keep", "rewarm", "remap"] = "rewarm"
    peak: float = 1.3
    steps: int = 250
    to_step: int | None = None


@dataclasses.dataclass(frozen=True)
class LearnedMaps:
    """Train the maps of all axes before they grow the model (`growth.learned`): another function, of lower loss."""

    steps: int = 100
    """Updates of the maps."""
    learning_rate: float = 0.01
    """By what length a row of a map, which is about 1 long, moves in an update at most; it falls linearly to 0."""
    batch_size: int | None = None
    """Rows of each update; None: as many as the source's run has."""

    def __post_init__(self) -> None:
        for field, value in (("steps", self.steps), ("batch_size", self.batch_size)):
            if value is not None and not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
                raise UsageError(f"learned.{field}={value!r} must be a whole number, 1 or more")
        if not (isinstance(self.learning_rate, int | float) and 0 < self.learning_rate < math.inf):
            raise UsageError(f"learned.learning_rate={self.learning_rate!r} must be a positive number")


@dataclasses.dataclass(frozen=True)
class Choices:
    """How to grow, where sizes say only how far; the content of a plan file."""

    axes: Mapping[str, Operator] = dataclasses.field(default_factory=dict)
    """Shell pattern of axis names (`embed`, `*.heads`, `decoder.layers`, `vocab`) → operator with its options; the last
    one that fits decides, and what none fits grows by default: stream and units duplicate, layers are inserted."""
    seed: int = 0
    """Of all random numbers, in [0, 2³²)."""
    noise: float = 1.0
    """Standard deviation of random entries, and of what parts copies, in units of the source's root mean square."""
    state: Literal["mapped", "asymmetric", "reset"] = "mapped"
    """Moments of what is kept and copied: mapped; asymmetric, copies beginning with m = 0; or all zero."""
    dynamics: Literal["free", "exact"] = "free"
    """exact: training the grown model is training the source, which needs copies without noise."""
    learning_rate: LearningRatePolicy = dataclasses.field(default_factory=LearningRatePolicy)
    refactor: bool = False
    """Let Adafactor's state change its form where an axis grows past the size from which it is factored."""
    learned: LearnedMaps | None = None
    """Train the maps first; None: grow by the lossless ones."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str = "plan") -> "Choices":
        """The choices in a JSON object, `where` naming it in errors.

        Raises:
            UsageError: for a field that is unknown or of the wrong kind, with the nearest one.
        """
        refuse_unknown(value, cls.__dataclass_fields__, where)
        fields = dict(value)
        if "learning_rate" in fields:
            policy: dict[str, Any] | str = fields["learning_rate"]
            policy = {"policy": policy} if isinstance(policy, str) else policy
            refuse_unknown(policy, LearningRatePolicy.__dataclass_fields__, f"{where}: learning_rate")
            fields["learning_rate"] = LearningRatePolicy(**policy)
        if fields.get("learned") is not None:
            refuse_unknown(fields["learned"], LearnedMaps.__dataclass_fields__, f"{where}: learned")
            fields["learned"] = LearnedMaps(**fields["learned"])
        if "axes" in fields:
            if not isinstance(fields["axes"], Mapping):
                raise UsageError(f"{where}: axes is a {type(fields['axes']).__name__}, a JSON object was wanted")
            for pattern, each in fields["axes"].items():
                if not isinstance(each, str | Mapping):
                    raise UsageError(
                        f"{where}: axes: {pattern}: {each!r} must be the name of an operator, or an object with it"
                    )
            fields["axes"] = {
                pattern: {"operator": each} if isinstance(each, str) else dict(each)
                for pattern, each in fields["axes"].items()
            }
        choices = cls(**fields)
        if choices.dynamics == "exact":  # the one setting of the others that it can mean
            implied = {"noise": 0.0, "learning_rate": LearningRatePolicy("keep")}
            choices = dataclasses.replace(choices, **{k: v for k, v in implied.items() if k not in fields})
        return choices

    def find_operator(self, axis: str) -> Operator | None:
        """What the last pattern that fits an axis says of it; None where none fits."""
        fitting = [each for pattern, each in self.axes.items() if fnmatchcase(axis, pattern)]
        return fitting[-1] if fitting else None

    def to_json(self) -> dict[str, Any]:
        """The inverse of `from_json`; without learned maps there is no such field."""
        fields = dataclasses.asdict(self)
        if self.learned is None:
            del fields["learned"]
        return fields

    def __post_init__(self) -> None:
        if self.learned is not None and self.dynamics == "exact":
            raise UsageError("learned maps change what is computed, and dynamics=exact keeps it; leave one of them out")
        if not (isinstance(self.seed, int) and 0 <= self.seed < 2**32):
            raise UsageError(f"seed={self.seed!r} must be a whole number in [0, 2^32)")
        if not (isinstance(self.noise, int | float) and 0 <= self.noise < math.inf):
            raise UsageError(f"noise={self.noise!r} must be a number that is not negative")
        if not isinstance(self.refactor, bool):
            raise UsageError(f"refactor={self.refactor!r} must be true or false")
        for field, known in (("state", ("mapped", "asymmetric", "reset")), ("dynamics", ("free", "exact"))):
            if getattr(self, field) not in known:
                raise UsageError(f"{field}={getattr(self, field)!r} must be one of {', '.join(known)}")
        rate = self.learning_rate
        if rate.policy not in ("keep", "rewarm", "remap"):
            raise UsageError(f"learning_rate.policy={rate.policy!r} must be keep, rewarm or remap")
        if not (isinstance(rate.steps, int) and rate.steps >= 1):
            raise UsageError(f"learning_rate.steps={rate.steps!r} must be a whole number, 1 or more")
        if not (isinstance(rate.peak, int | float) and 0 < rate.peak < math.inf):
            raise UsageError(f"learning_rate.peak={rate.peak!r} must be a positive number")
        if (rate.policy == "remap") != (rate.to_step is not None):
            raise UsageError("learning_rate.to_step goes with policy remap: the step at which the schedule goes on")
        if rate.to_step is not None and not (isinstance(rate.to_step, int) and rate.to_step >= 0):
            raise UsageError(f"learning_rate.to_step={rate.to_step!r} must be a whole number, 0 or more")


def refuse_unknown(value: Any, known: Iterable[str], where: str) -> None:
    """Refuse a JSON value that is no object, or has a field which is not known, naming the nearest one."""
    known = list(known)
    if not isinstance(value, Mapping):
        raise UsageError(f"{where} is a {type(value).__name__}, a JSON object was wanted")
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise UsageError(
                f"{where}: unknown field {key!r}"
                + (f"; perhaps you meant {near[0]!r}" if near else f"; it has {', '.join(known)}")
            )
