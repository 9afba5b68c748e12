"""What a growth does to each axis and promises, decided or refused before a byte is read."""

import dataclasses
import difflib
import functools
import hashlib
import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from growth.axis_growth import OPTIONS, PROMISES, AxisGrowth, JoinedGrowth, settle_operator
from growth.choices import Choices
from growth.index_map import IndexMap
from growth.operators import KINDS
from t5pegasus.axes import logical_axis
from t5pegasus.errors import UsageError

PLAN_SCHEMA = 1


@dataclasses.dataclass(frozen=True, eq=False)
class GrowthPlan:
    """A growth of some axes. Create it through `plan_axes`, which checks it."""

    axes: tuple[AxisGrowth, ...]
    choices: Choices
    step: int = 0
    """Updates that the source has made."""

    @functools.cached_property
    def maps(self) -> dict[str, IndexMap]:
        """The axes that grow."""
        return {each.axis: each.map for each in self.axes}

    @property
    def promise(self) -> str:
        """The weakest promise of its axes, where their maps are not learned."""
        if self.choices.learned is not None:
            return "L"
        order = list(PROMISES)
        return max((each.promise for each in self.axes), key=order.index)

    @property
    def born(self) -> int | None:
        """The update at which what growth adds is to have been born; None unless it is to warm up."""
        return self.step if self.choices.learning_rate.policy == "rewarm" else None

    @property
    def epsilon_factor(self) -> float:
        """What the norms' epsilon is multiplied by: c·d/D, which is 1 unless gains are scaled (theory T1)."""
        factors = [
            float((each.map.written / each.map.read / each.map.ratio)[~each.map.created][0])
            for each in self.axes
            if each.kind == "stream"
        ]
        return factors[0] if factors and not np.isclose(factors[0], 1.0, rtol=1e-12) else 1.0

    def to_json(self) -> dict[str, Any]:
        """The plan as receipts and lineages hold it."""
        return {
            "schema": PLAN_SCHEMA,
            "promise": self.promise,
            **self.choices.to_json(),
            "axes": {each.axis: each.to_json() for each in self.axes},
        }

    @property
    def hash(self) -> str:
        """sha256 of the plan's JSON."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def then(self, later: "GrowthPlan") -> "GrowthPlan":
        """One plan that does what this and then the later one would, with the later one's policies.

        Both are exact wherever they are; random entries are other ones, being drawn once instead of twice.

        Raises:
            UsageError: if the later one does not begin where this one ends, or changes rows that this one creates.
        """
        mine = {each.axis: each for each in self.axes}
        axes = []
        for axis in sorted({*mine, *(each.axis for each in later.axes)}):
            pair = [each for plan in (self, later) for each in plan.axes if each.axis == axis]
            if len(pair) == 1:
                axes += pair
                continue
            first, second = pair
            if first.target != second.source:
                raise UsageError(
                    f"plans do not follow each other: axis {axis} ends at {first.target} entries and begins at "
                    f"{second.source}; give the second plan the first one's target"
                )
            joined = JoinedGrowth(axis, first.kind, first.source, second.target, {"operator": "joined"}, first, second)
            try:
                joined.map  # noqa: B018 - made now, so that it is refused now
            except ValueError as error:
                raise UsageError(f"plans cannot be joined: axis {axis}: {error}") from error
            axes.append(joined)
        return GrowthPlan(tuple(axes), later.choices, self.step)


def plan_axes(
    sources: Mapping[str, int],
    targets: Mapping[str, int],
    choices: Choices,
    *,
    step: int = 0,
    kinds: Mapping[str, str] = KINDS,
) -> GrowthPlan:
    """The plan that takes axes of some sizes to others.

    Args:
        sources: size of each axis of the trained model.
        targets: size to reach, for the same axes.
        choices: how; patterns that fit no axis that grows are refused.
        step: updates that the source has made.
        kinds: kind of each logical axis.

    Raises:
        UsageError: if an axis would shrink, nothing grows, or an operator does not fit.
    """
    axes = []
    for axis, source in sources.items():
        target = targets[axis]
        if target < source:
            raise UsageError(f"axis {axis} would shrink from {source} to {target}, and growth never shrinks")
        operator = choices.find_operator(axis)
        if target == source and (operator is None or operator.get("operator") != "open"):
            continue
        kind = kinds.get(logical_axis(axis))
        if kind not in OPTIONS:
            known = ", ".join(sorted(key for key, value in kinds.items() if value in OPTIONS))
            raise UsageError(
                f"axis {axis} cannot grow from {source} to {target}: there is no rule for {logical_axis(axis)!r}; "
                f"keep its size, and grow {known}"
            )
        axes.append(AxisGrowth(axis, kind, source, target, settle_operator(axis, kind, operator)))
    for pattern in choices.axes:
        if not any(fnmatchcase(axis, pattern) for axis in sources):
            near = difflib.get_close_matches(pattern, sources, n=1)
            raise UsageError(
                f"plan: pattern {pattern!r} fits no axis of this model"
                + (f"; perhaps you meant {near[0]!r}" if near else f"; its axes are {', '.join(sources)}")
            )
    if not axes:
        raise UsageError(
            "nothing to grow: every axis has the size that is wanted already ("
            + ", ".join(f"{axis}={size}" for axis, size in sources.items())
            + "); make at least one of them larger"
        )
    plan = GrowthPlan(tuple(axes), choices, step)
    for each in plan.axes:
        if each.map.size != each.target:
            raise UsageError(f"axis {each.axis}: its operator gives {each.map.size} entries, {each.target} are wanted")
    return plan
