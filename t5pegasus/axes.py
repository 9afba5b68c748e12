"""One declaration per parameter: the full name of each axis, which are summed over, whether it is a gain.

Initialisation, sharding, growth of weights and optimizer moments, the weight-decay mask and checkpoints all
follow from it. An axis name is scoped (`decoder.self.heads`); its last component is the logical axis.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

LOGICAL_AXES = ("layers", "embed", "heads", "qk", "vo", "mlp", "vocab", "relpos_buckets")


def logical_axis(axis: str) -> str:
    """The last component of a scoped axis name: `decoder.self.heads` → `heads`."""
    return axis.rpartition(".")[2]


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """What one parameter is: its axes in order, those the forward pass sums over, gain or not, its sizes."""

    axes: tuple[str, ...]
    contracted: tuple[str, ...]
    gain: bool
    shape: tuple[int, ...]
    declared_std: float | None = None
    """Only where the standard deviation does not follow from `contracted` (the relative bias)."""
    size_powers: tuple[tuple[str, float], ...] = ()
    """(axis, power): the model multiplies what this parameter gives by size(axis)^power, as T5 the input of its head
    by d_model^-½, or other models their queries by d_kv^-½. Growth undoes what the larger size would change."""
    meets_written: tuple[str, ...] = ()
    """Axes along which what this gain gives is summed with a parameter that writes the axis, as what the decoder's
    final norm gives with the token embedding where that is the head, too."""

    @property
    def init_std(self) -> float:
        """Standard deviation at initialisation: ∏ size(contracted)^-½, which is all of T5's initialisation."""
        if self.declared_std is not None:
            return self.declared_std
        return math.prod(size for axis, size in zip(self.axes, self.shape) if axis in self.contracted) ** -0.5

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: to everything but gains."""
        return not self.gain

    def restrict(self, axes: Collection[str]) -> "ParamSpec":
        """The declaration of what is left of the parameter when all but these axes are summed over."""
        kept = [(axis, size) for axis, size in zip(self.axes, self.shape) if axis in axes]
        return dataclasses.replace(
            self, axes=tuple(axis for axis, _ in kept), shape=tuple(size for _, size in kept),
            contracted=tuple(axis for axis in self.contracted if axis in axes),
        )  # fmt: skip


class MomentSpec(NamedTuple):
    """What one moment of a parameter is: a declaration of its own axes, and how growth multiplies it."""

    spec: ParamSpec
    power: int
    """Growth multiplies it by r^power, r being the gradients' multiplier along the moment's own axes."""


def factored_axes(spec: ParamSpec, min_size: int) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """(row axes, column axes) of a parameter whose second moment Adafactor keeps as two means; None where it does not.

    Rows are the stream, `embed`, columns all other axes jointly (vocab, mlp, or heads with qk or vo); each layer of a
    stack is a matrix of its own. Gains and the relative bias lack one of the two. (The rule of T5X, by declaration.)

    Args:
        spec: the parameter's declaration.
        min_size: both rows and columns must be at least so many.
    """
    rows = tuple(axis for axis in spec.axes if logical_axis(axis) == "embed")
    columns = tuple(axis for axis in spec.axes if logical_axis(axis) not in ("embed", "layers"))
    numbers = [math.prod(size for axis, size in zip(spec.axes, spec.shape) if axis in part) for part in (rows, columns)]
    return (rows, columns) if rows and columns and min(numbers) >= min_size else None


def orthogonalised_axes(spec: ParamSpec) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """(row axes, column axes) of a parameter that Muon updates by orthogonal matrices; None where AdamW does.

    The rule of `factored_axes` without a least size, and without what has a row for each token: of the embedding and
    the head of a batch only the rows that it holds have a say, and gains and the relative bias are no matrices.
    """
    return None if any(logical_axis(axis) == "vocab" for axis in spec.axes) else factored_axes(spec, 1)


class AxisMultiplier(NamedTuple):
    """Growth's record of one axis: what became of each entry since it was first trained. Arrays of the axis' size.

    From it `dual_multipliers` derives by what each entry of a parameter was multiplied (s), and its gradient (r).
    Of an axis that never grew all are 1, but `born`, which is -1. Source: growth theory T5/T6 in docs/growth.md.
    """

    written: Any
    """float32: the multiplier of what writes the axis."""
    read: Any
    """float32: the multiplier of what reads it."""
    ratio: Any
    """float32: how many times larger the axis has become. √(written / read / ratio) is the multiplier of gains."""
    inherited: Any
    """float32: 1 where an entry is, or copies, one of the first model, 0 where growth created it."""
    born: Any
    """int32: the update at which growth added the entry, as a copy or anew; -1 for entries of the first model."""


Multipliers = Mapping[str, AxisMultiplier]
"""Axis name → its record, for every axis of the model."""


def dual_multipliers(axis: str, spec: ParamSpec, record: Any) -> tuple[Any, Any]:
    """(s, r) along one axis of a parameter: by what growth multiplied its entries, and its gradient.

    What is taken c times as strongly has a gradient c times as weak, so that reading and writing exchange their parts.

    Args:
        axis: one of the parameter's axes.
        spec: its declaration.
        record: `written`, `read` and `ratio` of the axis: an AxisMultiplier, or the map of a single growth.
    """
    written, read, ratio = record.written, record.read, record.ratio
    if spec.gain:
        forward = (written / read / ratio) ** 0.5
        backward = written * read / forward
    elif axis in spec.contracted:
        forward, backward = read, written
    else:
        forward, backward = written, read
    if axis in spec.meets_written:
        forward, backward = forward * read / written, backward * written / read
    for scaled, power in spec.size_powers:
        if scaled == axis:
            forward, backward = forward * ratio**-power, backward * ratio**power
    return forward, backward
