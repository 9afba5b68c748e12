"""The receipt of a growth: what was measured, as JSON and in one line."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from t5pegasus.json_files import SCHEMA

RECEIPT = "receipt.json"
LEVELS = ("full", "logits", "arrays")
"""What is measured: arrays, logits, gradients and two updates; arrays and logits; or arrays alone, which takes the
memory of the largest array instead of that of both models."""
LARGEST_FLOOR_RATIO = 2.0
"""Accepted are differences up to twice the largest of the permutations'."""
LARGEST_ERROR = 1e-13
"""What float64 leaves of an exact statement, relative to the largest value, wherever the floor is lower."""


@dataclasses.dataclass(frozen=True)
class LogitDifference:
    """How far the grown model's logits are from the source's, and permutations of the source from itself."""

    maximum: float
    root_mean_square: float
    floor_maximum: float
    """The largest over the permutations."""
    floor_root_mean_square: float
    """The same."""
    largest_logit: float
    rescaled_maximum: float | None = None
    """The largest over permutations of the source with rescaled weights, which are rounded anew in narrow types; None
    where weights are computed with as they are stored."""
    rescaled_root_mean_square: float | None = None
    """The same."""

    @property
    def bitwise(self) -> bool:
        """Whether all logits are the same numbers."""
        return self.maximum == 0

    @property
    def allowed_maximum(self) -> float:
        """The largest difference that counts as rounding; in float64 that is next to nothing at all."""
        return self._allow(self.floor_maximum, self.rescaled_maximum)

    @property
    def allowed_root_mean_square(self) -> float:
        """The same of the root mean square."""
        return self._allow(self.floor_root_mean_square, self.rescaled_root_mean_square)

    def _allow(self, floor: float, rescaled: float | None) -> float:
        return max(LARGEST_FLOOR_RATIO * max(floor, rescaled or 0.0), LARGEST_ERROR * self.largest_logit)

    @property
    def maximum_ratio(self) -> float:
        """The largest difference over the larger one of its floors."""
        return _ratio(self.maximum, max(self.floor_maximum, self.rescaled_maximum or 0.0))

    @property
    def root_mean_square_ratio(self) -> float:
        """The same of the root mean square."""
        floor = max(self.floor_root_mean_square, self.rescaled_root_mean_square or 0.0)
        return _ratio(self.root_mean_square, floor)

    @property
    def ratio(self) -> float:
        """The larger one of the two."""
        return max(self.maximum_ratio, self.root_mean_square_ratio)

    @property
    def is_rounding(self) -> bool:
        """Whether both differences are no more than rounding."""
        return self.maximum <= self.allowed_maximum and self.root_mean_square <= self.allowed_root_mean_square


@dataclasses.dataclass(frozen=True)
class NewTokens:
    """Tokens that the source could not write."""

    number: int
    masked: bool
    largest_probability_ratio: float
    """Their probability over that of all old ones, at the target where it is largest; 0 if they are masked."""
    mean_log_added_mass: float
    """The mean of log(1 + that ratio), by which the loss grows exactly if the old logits stay, in nats."""
    bound: float | None
    """log(1 + n/V), the most that this can be if all begin as the mean of all rows (Jensen); else None."""


@dataclasses.dataclass(frozen=True)
class GradientMap:
    """Errors in float64, of each parameter relative to its largest gradient; the largest over the parameters."""

    elementwise: float
    """Of g' = r·g at kept entries and copies, without the noise between copies."""
    elementwise_parameter: str
    summed: float
    """Of Σ s·g' = g over copies, with it."""
    summed_parameter: str
    floor: float
    """What permutations of the source make of g."""


@dataclasses.dataclass(frozen=True)
class Liveness:
    """What two updates did to one axis."""

    created: int
    alive: int
    """Created entries that have a gradient in every parameter with this axis."""
    silent_parameters: tuple[str, ...]
    """Parameters of which no gradient reached any created entry."""
    copied: int
    parted: int
    """Copies that have moved otherwise than what they are copies of, and than other copies of it."""


@dataclasses.dataclass(frozen=True)
class StoredArrays:
    """The grown checkpoint's arrays, compared with a fresh state's and with the source's."""

    number: int
    entries: int
    structure: tuple[str, ...]
    """What differs from a fresh state of the grown model in name, shape, type or step; empty if nothing does."""
    largest_error: float
    """Of all entries, against a second growth of every array as a whole, in units of half a last place."""
    worst_array: str
    derived: int
    """Entries that were derived independently, from source, maps and declaration."""
    largest_derived_error: float
    """Of these, in the same units."""
    worst_derived: str


@dataclasses.dataclass(frozen=True)
class AxisSummary:
    """What the plan says of one axis."""

    axis: str
    source: int
    target: int
    operator: str
    promise: str
    breaker: str


@dataclasses.dataclass(frozen=True)
class Receipt:
    """What was measured before and after a growth. It holds no times, so that equal growths have equal bytes."""

    plan_hash: str
    promise: str
    level: str
    """How much was measured, one of LEVELS."""
    evidence: str
    """What the models were compared on."""
    source_parameters: int
    grown_parameters: int
    grown_bytes: int
    """Of all arrays of the grown state."""
    axes: tuple[AxisSummary, ...]
    arrays: StoredArrays
    num_target_tokens: int = 0
    num_permutations: int = 0
    source_nll: float | None = None
    """Nats per target token."""
    nll_difference: float | None = None
    logits: Mapping[str, LogitDifference] = dataclasses.field(default_factory=dict)
    """By precision of activations: float32 and bfloat16 of the stored parameters; float64 of the source's, grown
    in float64."""
    keeps_logits: bool = True
    """Whether the plan promises the logits of the source's tokens at all; stacked layers and learned maps do not."""
    new_tokens: NewTokens | None = None
    gradients: GradientMap | None = None
    liveness: Mapping[str, Liveness] = dataclasses.field(default_factory=dict)
    """Of each axis that got entries; empty where it was not measured."""
    exact_dynamics: bool = False
    """Whether copies are to stay together, and created entries silent."""

    @property
    def bitwise(self) -> bool | None:
        """Whether float32 logits are the same bits; None if they were not measured."""
        return self.logits["float32"].bitwise if "float32" in self.logits else None

    def to_json(self) -> dict[str, Any]:
        """The content of receipt.json."""
        logits = {
            name: {**dataclasses.asdict(each), "ratio": _finite(each.ratio), "bitwise": each.bitwise}
            for name, each in self.logits.items()
        }
        return {"schema": SCHEMA, **dataclasses.asdict(self), "logits": logits}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Receipt":
        """The inverse of `to_json`."""
        fields = {key: item for key, item in value.items() if key != "schema"}

        def read(kind: type, item: Mapping[str, Any] | None) -> Any:
            if item is None:
                return None
            known = {field.name for field in dataclasses.fields(kind)}
            return kind(
                **{key: tuple(each) if isinstance(each, list) else each for key, each in item.items() if key in known}
            )

        fields["axes"] = tuple(read(AxisSummary, each) for each in fields["axes"])
        fields["arrays"] = read(StoredArrays, fields["arrays"])
        fields["new_tokens"] = read(NewTokens, fields["new_tokens"])
        fields["gradients"] = read(GradientMap, fields["gradients"])
        fields["logits"] = {name: read(LogitDifference, each) for name, each in fields["logits"].items()}
        fields["liveness"] = {axis: read(Liveness, each) for axis, each in fields["liveness"].items()}
        return cls(**fields)

    def __str__(self) -> str:
        parts = [f"{self.promise}"]
        for name, each in self.logits.items():
            if name == "float64":
                parts.append(f"float64 {_ratio(each.maximum, each.largest_logit):.0e} relative")
            else:
                of, floor = "", "permutation floor"
                if each.rescaled_maximum is not None:
                    of, floor = f"{name} ", "rounding floor"
                largest = max(each.floor_maximum, each.rescaled_maximum or 0.0)
                beside = "bitwise equal," if each.bitwise else f"{each.maximum_ratio:.2f} ×"
                compared = f" ({beside} the {floor} {largest:.1e})" if self.keeps_logits else ""
                parts.append(f"{of}max |Δlogit| {each.maximum:.1e}{compared}")
                if self.keeps_logits and each.root_mean_square_ratio > each.maximum_ratio:
                    largest = max(each.floor_root_mean_square, each.rescaled_root_mean_square or 0.0)
                    beside = f"{each.root_mean_square_ratio:.2f} × the {floor} {largest:.1e}"
                    parts.append(f"{of}root mean square {each.root_mean_square:.1e} ({beside})")
        if self.promise == "B" and self.bitwise is False:
            parts.append("not bitwise with this device's kernels")
        if self.nll_difference is not None:
            parts.append(
                f"ΔNLL {self.nll_difference:+.1e} on {self.num_target_tokens:,} target tokens ({self.evidence})"
            )
        if self.new_tokens is not None:
            state = "masked" if self.new_tokens.masked else f"taking {self.new_tokens.mean_log_added_mass:.1e} nats"
            parts.append(f"{self.new_tokens.number:,} new tokens {state}")
        if self.gradients is not None:
            parts.append(f"gradients r·g to {max(self.gradients.elementwise, self.gradients.summed):.0e}")
        if self.liveness and not self.exact_dynamics:
            created = sum(each.created for each in self.liveness.values())
            alive = sum(each.alive for each in self.liveness.values())
            copied = sum(each.copied for each in self.liveness.values())
            parted = sum(each.parted for each in self.liveness.values())
            found = [f"{alive}/{created} created entries alive"] if created else []
            found += [f"{parted}/{copied} copies parted"] if copied else []
            if found:
                parts.append("after 2 updates " + ", ".join(found))
        measured = "" if self.level == "full" else f", receipt of {self.level} only"
        parts.append(
            f"{self.arrays.number} arrays as derived, parameters {self.source_parameters:,} → "
            f"{self.grown_parameters:,}, {self.grown_bytes:,} bytes, plan {self.plan_hash[:12]}{measured}"
        )
        return ", ".join(parts)


def _ratio(value: float, floor: float) -> float:
    if value == 0:
        return 0.0
    return value / floor if floor else math.inf


def _finite(value: float) -> float | None:
    """What JSON can hold."""
    return value if math.isfinite(value) else None
