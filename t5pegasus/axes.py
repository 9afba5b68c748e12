"""One declaration per parameter: the full name of each axis, which are summed over, whether it is a gain.

Initialisation, sharding, growth of weights and optimizer moments, the weight-decay mask and checkpoints all
follow from it. An axis name is scoped (`decoder.self.heads`); its last component is the logical axis.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from t5pegasus.config import ModelConfig

LOGICAL_AXES = ("layers", "embed", "heads", "qk", "vo", "mlp", "vocab", "relpos_buckets")


def logical_axis(axis: str) -> str:
    """The last component of a scoped axis name: `decoder.self.heads` → `heads`."""
    return axis.rpartition(".")[2]


def axis_size(axis: str, config: ModelConfig) -> int:
    """Number of entries along an axis of that name in a model of that config."""
    match logical_axis(axis):
        case "layers":
            return config.num_encoder_layers if axis.startswith("encoder.") else config.num_decoder_layers
        case "embed":
            return config.d_model
        case "heads":
            return config.num_heads
        case "qk" | "vo":
            return config.d_kv
        case "mlp":
            return config.d_ff
        case "vocab":
            return config.vocab_size
        case "relpos_buckets":
            return config.relative_attention_num_buckets
        case other:
            raise ValueError(f"axis {axis!r} ends in {other!r}, which is none of {', '.join(LOGICAL_AXES)}")


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """What one parameter is: its axes in order, those the forward pass sums over, gain or not, its sizes."""

    axes: tuple[str, ...]
    contracted: tuple[str, ...]
    gain: bool
    shape: tuple[int, ...]
    declared_std: float | None = None
    """Only where the standard deviation does not follow from `contracted` (the relative bias)."""

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


class AxisMultiplier(NamedTuple):
    """Growth's record of one axis: by what each entry was multiplied where the axis is written and where it is read.

    With the duality of gradients (a weight scaled by s has its gradient scaled by r), a parameter that produces
    the axis has s = written, r = read; one that sums over it has s = read, r = written; a gain s = 1,
    r = written · read. Zero marks an entry that growth created. Both are float32 [size of the axis], all ones if
    the axis never grew. Source: growth theory T5/T6 in docs/growth.md.
    """

    written: Any
    read: Any


Multipliers = Mapping[str, AxisMultiplier]
"""Axis name → its multipliers, for every axis of the model."""
