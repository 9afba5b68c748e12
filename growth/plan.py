"""What a growth does to each axis and promises, decided or refused before a byte is read."""

import dataclasses
import difflib
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np

from growth.index_map import (
    IndexMap,
    add_rows,
    duplicate_stream,
    duplicate_units,
    insert_layers,
    pad_stream,
    pad_units,
    select_rows,
    spread,
    stack_layers,
)
from growth.operators import KINDS
from t5pegasus.axes import logical_axis
from t5pegasus.errors import UsageError

PLAN_SCHEMA = 1
PROMISES = {
    "B": "bitwise the same logits wherever kernels sum the source's entries in their old order",
    "R": "the same logits but for rounding",
    "M": "the same logits, and no weight on new tokens, while these are masked",
    "L": "a change, which the receipt states",
}
"""Class of what a plan promises of the function, from the strongest on."""

_OPTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "stream": {"duplicate": ("first_share", "scale_gains"), "pad": ("layout", "scale_gains"), "explicit": ("map",)},
    "units": {"duplicate": ("first_share",), "pad": ("layout",), "explicit": ("map",)},
    "layers": {"insert": ("at",), "stack": ("order",)},
    "rows": {"add": ("rows", "masked"), "open": ("count",)},
    "table": {"refine": ("sources",)},
}
_REFUSED = {
    "zero-gain": "blocks whose norms have gain 0 give their gated feed-forward no gradient for ever, and change the "
    "decoder's cross-attention at once; use operator 'insert', which zeroes what a block writes",
    "cancel-heads": "two heads that cancel each other stop doing so as soon as their columns of the relative bias "
    "differ; use operator 'duplicate' with a share",
}
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

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str = "plan") -> "Choices":
        """The choices in a JSON object, `where` naming it in errors.

        Raises:
            UsageError: for a field that is unknown or of the wrong kind, with the nearest one.
        """
        _refuse_unknown(value, cls.__dataclass_fields__, where)
        fields = dict(value)
        if "learning_rate" in fields:
            policy: dict[str, Any] | str = fields["learning_rate"]
            policy = {"policy": policy} if isinstance(policy, str) else policy
            _refuse_unknown(policy, LearningRatePolicy.__dataclass_fields__, f"{where}: learning_rate")
            fields["learning_rate"] = LearningRatePolicy(**policy)
        if "axes" in fields:
            fields["axes"] = {
                pattern: {"operator": each} if isinstance(each, str) else dict(each)
                for pattern, each in fields["axes"].items()
            }
        choices = cls(**fields)
        if choices.dynamics == "exact":  # the one setting of the others that it can mean
            implied = {"noise": 0.0, "learning_rate": LearningRatePolicy("keep")}
            choices = dataclasses.replace(choices, **{k: v for k, v in implied.items() if k not in fields})
        return choices


@dataclasses.dataclass(frozen=True, eq=False)
class AxisGrowth:
    """One axis on its way from source to target."""

    axis: str
    kind: str
    source: int
    target: int
    operator: Operator

    @functools.cached_property
    def map(self) -> IndexMap:
        """Where each entry comes from."""
        return _make_map(self)

    @property
    def promise(self) -> str:
        """The class of what it does to the function, one of PROMISES."""
        name, ratio = self.operator["operator"], self.target / self.source
        if name in ("stack", "open"):
            return "L"
        if name == "add":
            return "M" if self.operator.get("masked") else "L"
        if name in ("insert", "refine"):
            return "B"
        exact = self.kind == "units" and logical_axis(self.axis) not in ("qk", "vo")
        exact |= self.kind == "stream" and ratio == int(ratio) and _is_power_of_four(int(ratio))
        return "B" if name == "pad" and self.operator.get("layout") == "tail" and exact else "R"

    def breaker(self, noise: float, state: str) -> str:
        """What sets the new capacity in motion, so that it does not stay a copy, or zero, for ever."""
        name = self.operator["operator"]
        if name == "insert":
            return "copied readers"
        if name in ("stack", "refine", "add", "open"):
            return "data"
        if self.map.created.any() and not self.map.copied.any():
            what = "rows of what reads it" if self.kind == "stream" else "columns of what writes it"
            return f"random {what}" if noise else "none"
        parts = ["noise that cancels in what reads it"] * (noise > 0) + ["copies' empty m"] * (state == "asymmetric")
        return ", ".join(parts) or "none"

    def describe(self) -> str:
        """The operator and its options in words."""
        options = {
            key: value for key, value in self.operator.items() if key not in ("operator", "map", "rows", "sources")
        }
        name = self.operator["operator"]
        if name == "duplicate" and self.target % self.source:
            name = "duplicate (some)"
        return name + "".join(f", {key}={value}" for key, value in options.items())

    def to_json(self) -> dict[str, Any]:
        """The axis as a plan file would say it, with its sizes."""
        return {"source": self.source, "target": self.target, **self.operator}


@dataclasses.dataclass(frozen=True, eq=False)
class GrowthPlan:
    """A growth of some axes. Create it through `plan_axes`, which checks it."""

    axes: tuple[AxisGrowth, ...]
    choices: Choices
    step: int = 0
    """Updates that the source has made: what growth adds is remembered as born then."""

    @functools.cached_property
    def maps(self) -> dict[str, IndexMap]:
        """The axes that grow."""
        return {each.axis: each.map for each in self.axes}

    @property
    def promise(self) -> str:
        """The weakest promise of its axes."""
        order = list(PROMISES)
        return max((each.promise for each in self.axes), key=order.index)

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
            **dataclasses.asdict(self.choices),
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
            UsageError: if the later one does not begin where this one ends.
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
            joined = _Joined(axis, first.kind, first.source, second.target, {"operator": "joined"}, first, second)
            axes.append(joined)
        return GrowthPlan(tuple(axes), later.choices, self.step)


@dataclasses.dataclass(frozen=True, eq=False)
class _Joined(AxisGrowth):
    """Two growths of one axis as one."""

    first: AxisGrowth = None  # type: ignore[assignment]
    second: AxisGrowth = None  # type: ignore[assignment]

    @functools.cached_property
    def map(self) -> IndexMap:
        return self.first.map.then(self.second.map)

    @property
    def promise(self) -> str:
        return max(self.first.promise, self.second.promise, key=list(PROMISES).index)

    def describe(self) -> str:
        return f"{self.first.describe()}, then {self.second.describe()}"

    def to_json(self) -> dict[str, Any]:
        parts = [self.first.to_json(), self.second.to_json()]
        return {"source": self.source, "target": self.target, "operator": "joined", "parts": parts}


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
    _check_choices(choices)
    axes, used = [], set()
    for axis, source in sources.items():
        target = targets[axis]
        if target < source:
            raise UsageError(f"axis {axis} would shrink from {source} to {target}, and growth never shrinks")
        operator: Operator | None = None
        for pattern, each in choices.axes.items():
            if fnmatchcase(axis, pattern):
                used.add(pattern)
                operator = each
        if target == source and (operator is None or operator["operator"] != "open"):
            continue
        kind = kinds.get(logical_axis(axis))
        if kind not in _OPTIONS:
            known = ", ".join(sorted(key for key, value in kinds.items() if value in _OPTIONS))
            raise UsageError(
                f"axis {axis} cannot grow from {source} to {target}: there is no rule for {logical_axis(axis)!r}; "
                f"keep its size, and grow {known}"
            )
        axes.append(AxisGrowth(axis, kind, source, target, _settle(axis, kind, operator)))
    for pattern in choices.axes:
        if pattern not in used:
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


def _settle(axis: str, kind: str, operator: Operator | None) -> Operator:
    """The operator to use, with its options checked."""
    if operator is None:
        defaults: dict[str, Operator] = {
            "stream": {"operator": "duplicate"},
            "units": {"operator": "duplicate"},
            "layers": {"operator": "insert", "at": "interposed"},
            "rows": {"operator": "add", "rows": "mean"},
        }
        if kind not in defaults:
            raise UsageError(f"axis {axis} grows only by a plan that says how: {', '.join(_OPTIONS[kind])}")
        return defaults[kind]
    name = operator.get("operator")
    if name in _REFUSED:
        raise UsageError(f"plan: axis {axis}: operator {name!r} is refused: {_REFUSED[name]}")
    if name not in _OPTIONS[kind]:
        raise UsageError(
            f"plan: axis {axis} ({kind}): operator {name!r} does not fit; choose {' or '.join(_OPTIONS[kind])}"
        )
    _refuse_unknown(operator, ("operator", *_OPTIONS[kind][name]), f"plan: axis {axis}: operator {name}")
    share = operator.get("first_share")
    if share is not None and not 0 < share < 1:
        raise UsageError(f"plan: axis {axis}: first_share={share} must lie between 0 and 1, or be left out")
    if operator.get("layout", "spread") not in ("spread", "tail"):
        raise UsageError(f"plan: axis {axis}: layout={operator['layout']!r} must be spread or tail")
    return operator


def _make_map(growth: AxisGrowth) -> IndexMap:
    name, options = growth.operator["operator"], growth.operator
    source, target = growth.source, growth.target
    tail, share = options.get("layout") == "tail", options.get("first_share")
    match growth.kind, name:
        case "stream", "duplicate":
            return duplicate_stream(source, target, share, scale_gains=options.get("scale_gains", False))
        case "stream", "pad":
            return pad_stream(source, target, tail=tail, scale_gains=options.get("scale_gains", False))
        case "units", "duplicate":
            return duplicate_units(source, target, share)
        case "units", "pad":
            return pad_units(source, target, tail=tail)
        case "layers", "insert":
            return insert_layers(source, _insert_after(growth, options.get("at", "interposed")))
        case "layers", "stack":
            return stack_layers(source, _stack_order(growth, options.get("order", "append")))
        case "rows", "add":
            return add_rows(source, _read_mixtures(growth, options.get("rows", "mean")))
        case "rows", "open":
            entries = np.arange(source)
            ones = np.ones(source)
            return IndexMap(entries.astype(np.int32), ones, ones, entries >= source - options["count"], source)
        case "table", "refine":
            return select_rows(source, options["sources"])
        case _, "explicit":
            return _explicit_map(growth, options["map"])
        case kind, name:
            raise ValueError(f"no rule for {name!r} of {kind!r}")


def _insert_after(growth: AxisGrowth, at: str | Sequence[int]) -> list[int]:
    source, new = growth.source, growth.target - growth.source
    match at:
        case "interposed":
            sources = spread(source, growth.target)
            return [int(layer) for layer in sources[np.diff(sources, prepend=-1) == 0]]
        case "top":
            return [source - 1] * new
        case "bottom":
            return [-1] * new
        case [*after] if len(after) == new and all(isinstance(layer, int) and -1 <= layer < source for layer in after):
            return list(after)
    raise UsageError(
        f"plan: axis {growth.axis}: at={at!r} must be interposed, top, bottom or a list of {new} layers to insert "
        f"behind, each from -1 (the bottom) to {source - 1}"
    )


def _stack_order(growth: AxisGrowth, order: str | Sequence[int]) -> list[int]:
    source, target = growth.source, growth.target
    new = target - source
    match order:
        case "append":
            return [layer % source for layer in range(target)]
        case "interpose":
            return [int(layer) for layer in spread(source, target)]
        case "middle" if new <= source:
            first = (source - new) // 2
            return [*range(first + new), *range(first, source)]
        case [*layers] if sorted({*layers}) == list(range(source)) and len(layers) == target:
            return list(layers)
    raise UsageError(
        f"plan: axis {growth.axis}: order={order!r} must be append, interpose, middle (with at most {source} new "
        f"layers) or a list of {target} layers that has each of the {source} at least once"
    )


def _read_mixtures(growth: AxisGrowth, rows: Any) -> tuple[tuple[int, ...] | None, ...]:
    new = growth.target - growth.source
    if rows == "mean":
        return (None,) * new
    if isinstance(rows, Mapping) and rows.keys() == {"copy"}:
        rows = [[rows["copy"]]] * new
    valid = isinstance(rows, list | tuple) and len(rows) == new
    if not valid or not all(each and all(0 <= row < growth.source for row in each) for each in rows):
        raise UsageError(
            f"plan: axis {growth.axis}: rows must be 'mean', {{'copy': row}} or a list of {new} lists of rows below "
            f"{growth.source}, the pieces of each new one"
        )
    return tuple(tuple(each) for each in rows)


def _explicit_map(growth: AxisGrowth, fields: Mapping[str, Sequence[float]]) -> IndexMap:
    """A map given entry by entry, if it keeps the function and maps gradients in proportion."""
    where = f"plan: axis {growth.axis}: map"
    _refuse_unknown(fields, ("sources", "written", "read"), where)
    sources = np.asarray(fields["sources"], np.int64)
    created = sources < 0
    written = np.where(created, 1.0, np.asarray(fields.get("written", np.ones(len(sources))), np.float64))
    read = np.where(created, 1.0, np.asarray(fields.get("read", np.ones(len(sources))), np.float64))
    entry = IndexMap(
        np.where(created, 0, sources).astype(np.int32), written, read, created, growth.source,
        ratio=growth.target / growth.source,
    )  # fmt: skip
    kept = entry.sources[~created]
    shares = np.bincount(kept, (written * read)[~created], minlength=growth.source)
    if np.any(entry.copies == 0) or not np.allclose(shares, 1.0, rtol=1e-12):
        raise UsageError(f"{where}: over the copies of each entry written·read must sum to 1; it sums to {shares}")
    if growth.kind == "stream":
        squares = np.bincount(kept, (written**2)[~created], minlength=growth.source)
        if not np.allclose(squares, squares[0], rtol=1e-12):
            raise UsageError(
                f"{where}: over the copies of each coordinate written² must sum to one number, or RMS norms change; "
                f"it sums to {squares}: scale the copies of coordinate i by √(c / number of copies)"
            )
        if not np.allclose(read[~created] * squares[0], written[~created], rtol=1e-12):
            raise UsageError(
                f"{where}: uneven shares of equal copies of the stream: the function would stay, but not gradients, "
                f"since a norm's backward pass gives each copy written/c; give read = written/{squares[0]:g}, or copies "
                "of unequal amplitude"
            )
    elif not np.allclose(written, 1.0):
        raise UsageError(f"{where}: units go through functions that are not linear; give written = 1 everywhere")
    return entry


def _check_choices(choices: Choices) -> None:
    if not 0 <= choices.seed < 2**32:
        raise UsageError(f"seed={choices.seed} must lie in [0, 2^32)")
    if not choices.noise >= 0:
        raise UsageError(f"noise={choices.noise} must not be negative")
    for field, known in (("state", ("mapped", "asymmetric", "reset")), ("dynamics", ("free", "exact"))):
        if getattr(choices, field) not in known:
            raise UsageError(f"{field}={getattr(choices, field)!r} must be one of {', '.join(known)}")
    rate = choices.learning_rate
    if rate.policy not in ("keep", "rewarm", "remap"):
        raise UsageError(f"learning_rate.policy={rate.policy!r} must be keep, rewarm or remap")
    if rate.steps < 1 or not rate.peak > 0:
        raise UsageError(f"learning_rate.steps={rate.steps} and peak={rate.peak} must be positive")
    if (rate.policy == "remap") != (rate.to_step is not None):
        raise UsageError("learning_rate.to_step goes with policy remap: the step at which the schedule goes on")


def _refuse_unknown(value: Any, known: Any, where: str) -> None:
    if not isinstance(value, Mapping):
        raise UsageError(f"{where} is a {type(value).__name__}, a JSON object was wanted")
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise UsageError(
                f"{where}: unknown field {key!r}"
                + (f"; perhaps you meant {near[0]!r}" if near else f"; it has {', '.join(known)}")
            )


def _is_power_of_four(number: int) -> bool:
    """Whether √number is a power of two, so that scaling by it does not round."""
    return number.bit_count() == 1 and number.bit_length() % 2 == 1
