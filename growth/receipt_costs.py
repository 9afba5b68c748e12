"""What a receipt will take, from the plan alone: what its process holds at once, and how long it computes.

Counted is what is in memory at the fullest moment of each level; the constants are measured (benchmarks/RESULTS.md).
"""

import math
from pathlib import Path
from typing import NamedTuple

from growth.evidence import EvidenceShape
from growth.t5 import ModelGrowth
from t5pegasus.config import ModelConfig
from t5pegasus.model.flops import training_flops_per_row
from t5pegasus.model.t5 import count_parameters
from t5pegasus.progress import format_seconds

_PROGRAM_BYTES = {"full": 600e6, "logits": 350e6, "arrays": 200e6}
"""What the process takes by itself, compiled programs included: measured at d_model 12."""
_COMPILE_SECONDS = {"full": 11.0, "logits": 5.0, "arrays": 1.0}
_ARRAY_BYTES_PER_SECOND = 400e6
_FLOPS_PER_SECOND = {"float64": 65e9, "logits": 190e9}
"""Of two cores of an AMD EPYC, as is the rest: gradients in float64; logits in float32 and bfloat16."""


class ReceiptCosts(NamedTuple):
    """An estimate."""

    bytes: float
    """The largest resident memory of the receipt's process."""
    seconds: float
    """On two cores."""

    def __str__(self) -> str:
        return f"{format_bytes(self.bytes)} of memory and {format_seconds(self.seconds)}"


def estimate_receipt(growth: ModelGrowth, level: str, evidence: EvidenceShape) -> ReceiptCosts:
    """What the receipt of a growth will take.

    Args:
        growth: the plan.
        level: one of `receipt.LEVELS`.
        evidence: what the models are compared on.
    """
    sizes = _count_entries(growth)
    held: list[float] = [7 * 4 * max(sizes["largest"], 1)]  # both growths of an array, its source in float64, errors
    seconds = _COMPILE_SECONDS[level] + 4 * (sizes["parameters"] + sizes["moments"]) / _ARRAY_BYTES_PER_SECOND
    if level != "arrays":
        held.append(_logit_bytes(growth, evidence))
        forward = 26 * _forward_flops(growth.source, evidence) + 2 * _forward_flops(growth.target, evidence)
        seconds += evidence.batches * forward / _FLOPS_PER_SECOND["logits"]
    if level == "full":
        held.append(_gradient_bytes(growth, evidence, sizes))
        # A forward pass, another one for what was not kept, and twice as much backward.
        gradients = 4 * (9 * _forward_flops(growth.source, evidence) + 5 * _forward_flops(growth.target, evidence))
        seconds += gradients / _FLOPS_PER_SECOND["float64"]
    return ReceiptCosts(_PROGRAM_BYTES[level] + max(held), seconds)


def format_bytes(number: float) -> str:
    """A size in three digits: `3.74 GB`."""
    units = ("B", "kB", "MB", "GB", "TB")
    power = min(int(math.log10(max(number, 1)) // 3), len(units) - 1)
    return f"{number / 1000**power:.3g} {units[power]}"


def read_available_bytes() -> int | None:
    """What this machine has left for programs; None where the system does not tell."""
    path = Path("/proc/meminfo")
    lines = path.read_text(encoding="ascii").splitlines() if path.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _logit_bytes(growth: ModelGrowth, evidence: EvidenceShape) -> float:
    """Both models and a rewritten source in float32, logits and their differences, activations of one layer."""
    source, target = count_parameters(growth.source), count_parameters(growth.target)
    model, positions = growth.target, evidence.rows * evidence.source_tokens
    layer = 3 * model.num_heads * evidence.source_tokens + 3 * model.d_ff + 6 * model.d_model
    return 8 * source + 4 * target + 6 * 4 * _count_logits(model, evidence) + 4 * positions * layer


def _gradient_bytes(growth: ModelGrowth, evidence: EvidenceShape, sizes: dict[str, int]) -> float:
    """The fullest of three moments: while gradients of the grown model, or of a permuted source, are computed."""
    source, target = count_parameters(growth.source), sizes["parameters"]
    logits = 8 * _count_logits(growth.target, evidence)
    # Gradients, and on the way to them.
    computed = 8 * target + max(1.5 * _layer_bytes(growth.target, evidence) + logits, 3 * logits)
    mapped = 8 * target + 16 * source + 3 * logits  # both models, the source's gradients
    # The state; beside it the parameters as they were, and which entries have had a gradient.
    alive = 8 * (target + sizes["moments"]) + 5 * target + 2 * logits
    # Of the source the same once more in another order, and the logits of both with what is made to compare them.
    permuted = 32 * source + 1.5 * _layer_bytes(growth.source, evidence) + 7 * logits
    return max(computed + max(mapped, alive), permuted)


def _layer_bytes(model: ModelConfig, evidence: EvidenceShape) -> float:
    """Forward and backward of one layer, and the inputs of all; as XLA tells it of the compiled program.

    What is resident is half of it more.
    """
    inner = model.num_heads * model.d_kv
    sides = []
    for tokens, others, layers in (
        (evidence.source_tokens, 0, model.num_encoder_layers),
        (evidence.target_tokens, evidence.source_tokens, model.num_decoder_layers),
    ):
        pairs = (tokens + others) * (4 * model.num_heads + 2)
        sides.append(tokens * (pairs + 7 * model.d_ff + (10 + layers) * model.d_model + 2 * inner))
    return 8 * evidence.rows * max(sides)


def _forward_flops(model: ModelConfig, evidence: EvidenceShape) -> float:
    return evidence.rows * training_flops_per_row(model, evidence.source_tokens, evidence.target_tokens) / 3


def _count_logits(model: ModelConfig, evidence: EvidenceShape) -> int:
    return evidence.rows * evidence.target_tokens * model.vocab_size


def _count_entries(growth: ModelGrowth) -> dict[str, int]:
    """Of the grown parameters, of all their moments, and of the largest array."""
    maps, sizes = growth.plan.maps, {"parameters": 0, "moments": 0, "largest": 0}
    for group, (specs, _) in growth.parts.items():
        if group == "ema":
            continue
        for spec in specs.values():
            size = math.prod(maps[axis].size if axis in maps else each for axis, each in zip(spec.axes, spec.shape))
            sizes["parameters" if group == "parameters" else "moments"] += size
            sizes["largest"] = max(sizes["largest"], size)
    return sizes
