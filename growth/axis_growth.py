"""One axis of a plan: its operator with its options, the map they make, and what they promise."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from growth.choices import Choices, Operator, refuse_unknown
from growth.explicit_map import read_explicit_map
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
from t5pegasus.axes import logical_axis
from t5pegasus.errors import UsageError

PROMISES = {
    "B": "bitwise the same logits wherever kernels sum the source's entries in their old order",
    "R": "the same logits but for rounding",
    "M": "the same logits, and no weight on new tokens, while these are masked",
    "L": "another function, by as much as the receipt states",
}
"""Class of what a plan promises of the function, from the strongest on."""

OPTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "stream": {"duplicate": ("first_share", "scale_gains"), "pad": ("layout", "scale_gains"), "explicit": ("map",)},
    "units": {"duplicate": ("first_share",), "pad": ("layout",), "explicit": ("map",)},
    "layers": {"insert": ("at",), "stack": ("order",)},
    "rows": {"add": ("rows", "masked"), "open": ("count",)},
    "table": {"refine": ("boundaries", "sources")},
}
_REFUSED = {
    "zero-gain": "blocks whose norms have gain 0 give their gated feed-forward no gradient for ever, and change the "
    "decoder's cross-attention at once; use operator 'insert', which zeroes what a block writes",
    "cancel-heads": "two heads that cancel each other stop doing so as soon as their columns of the relative bias "
    "differ; use operator 'duplicate' with a share",
}


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

    def breaker(self, choices: Choices) -> str:
        """What sets the new capacity in motion, so that it does not stay a copy, or zero, for ever."""
        name = self.operator["operator"]
        if name == "insert":
            return "copied readers"
        if name in ("stack", "refine", "add", "open"):
            return "data"
        if self.map.created.any() and not self.map.copied.any():
            what = "rows of what reads it" if self.kind == "stream" else "columns of what writes it"
            return f"random {what}" if choices.noise else "none"
        parts = {
            "noise that cancels in what reads it": choices.noise > 0,
            "copies' empty m": choices.state == "asymmetric",
            "copies' own learning rate": choices.learning_rate.policy == "rewarm",
        }
        return ", ".join(part for part, is_one in parts.items() if is_one) or "none"

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
class JoinedGrowth(AxisGrowth):
    """Two growths of one axis as one."""

    first: AxisGrowth = None  # type: ignore[assignment]
    second: AxisGrowth = None  # type: ignore[assignment]

    @functools.cached_property
    def map(self) -> IndexMap:
        """Where each entry comes from, over both."""
        return self.first.map.then(self.second.map)

    @property
    def promise(self) -> str:
        """The weaker of the two."""
        return max(self.first.promise, self.second.promise, key=list(PROMISES).index)

    def describe(self) -> str:
        """Both, one after the other."""
        return f"{self.first.describe()}, then {self.second.describe()}"

    def to_json(self) -> dict[str, Any]:
        """Both."""
        parts = [self.first.to_json(), self.second.to_json()]
        return {"source": self.source, "target": self.target, "operator": "joined", "parts": parts}


def settle_operator(axis: str, kind: str, operator: Operator | None) -> Operator:
    """The operator to use, with its options checked."""
    if operator is None:
        defaults: dict[str, Operator] = {
            "stream": {"operator": "duplicate"},
            "units": {"operator": "duplicate"},
            "layers": {"operator": "insert", "at": "interposed"},
            "rows": {"operator": "add", "rows": "mean"},
        }
        if kind not in defaults:
            raise UsageError(f"axis {axis} grows only by a plan that says how: {', '.join(OPTIONS[kind])}")
        return defaults[kind]
    name = operator.get("operator")
    if isinstance(name, str) and name in _REFUSED:
        raise UsageError(f"plan: axis {axis}: operator {name!r} is refused: {_REFUSED[name]}")
    if not isinstance(name, str) or name not in OPTIONS[kind]:
        raise UsageError(
            f"plan: axis {axis} ({kind}): operator {name!r} does not fit; choose {' or '.join(OPTIONS[kind])}"
        )
    refuse_unknown(operator, ("operator", *OPTIONS[kind][name]), f"plan: axis {axis}: operator {name}")
    share = operator.get("first_share")
    if share is not None and not (isinstance(share, int | float) and 0 < share < 1):
        raise UsageError(f"plan: axis {axis}: first_share={share!r} must be a number between 0 and 1, or be left out")
    if not isinstance(operator.get("scale_gains", False), bool):
        raise UsageError(f"plan: axis {axis}: scale_gains={operator['scale_gains']!r} must be true or false")
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
            return _open_rows(growth, options.get("count"))
        case "table", "refine":
            return select_rows(source, _read_sources(growth, options.get("sources")))
        case _, "explicit":
            return read_explicit_map(f"plan: axis {growth.axis}: map", growth.kind, source, target, options.get("map"))
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
        case [*layers] if len(layers) == target and _are_rows(layers, source) and len({*layers}) == source:
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
    if not valid or not all(_are_rows(each, growth.source) for each in rows):
        raise UsageError(
            f"plan: axis {growth.axis}: rows must be 'mean', {{'copy': row}} or a list of {new} lists of rows below "
            f"{growth.source}, the pieces of each new one"
        )
    return tuple(tuple(each) for each in rows)


def _open_rows(growth: AxisGrowth, count: Any) -> IndexMap:
    if not _are_rows([count], growth.source):
        raise UsageError(f"plan: axis {growth.axis}: count={count!r} must be a number of rows below {growth.source}")
    entries, ones = np.arange(growth.source), np.ones(growth.source)
    return IndexMap(entries.astype(np.int32), ones, ones, entries >= growth.source - count, growth.source)


def _read_sources(growth: AxisGrowth, sources: Any) -> Sequence[int]:
    if not (_are_rows(sources, growth.source) and len(sources) == growth.target):
        raise UsageError(
            f"plan: axis {growth.axis}: sources must be a list of {growth.target} rows below {growth.source}, the one "
            "that each row is a copy of"
        )
    return sources


def _are_rows(rows: Any, source: int) -> bool:
    return (
        isinstance(rows, list | tuple)
        and len(rows) > 0
        and all(isinstance(row, int) and 0 <= row < source for row in rows)
    )


def _is_power_of_four(number: int) -> bool:
    """Whether √number is a power of two, so that scaling by it does not round."""
    return number.bit_count() == 1 and number.bit_length() % 2 == 1
