"""A plan as a table, with what it will take; nothing of the checkpoint but its description is read."""

import itertools
import math
import textwrap
from collections.abc import Iterable

from growth.axis_growth import PROMISES, AxisGrowth
from growth.evidence import EvidenceShape, expect_evidence
from growth.receipt import LEVELS
from growth.receipt_costs import estimate_receipt, format_bytes
from growth.t5 import ModelGrowth
from t5pegasus.config import DataConfig
from t5pegasus.model.t5 import count_parameters

BYTES_PER_SECOND = 800e6
"""What the surgery writes on two cores and a local disk, checksums included (benchmarks/RESULTS.md, out of core)."""
RESIDENT_BYTES = 350e6
"""What it holds at most, whatever the model's size (the same benchmark)."""
_RANDOM = expect_evidence(DataConfig(), with_examples=False)
_WIDTH = 36
"""Of a column; longer cells go on below."""
_COLUMNS = ("axis", "from → to", "operator", "promise", "set in motion by", "state")


def explain(growth: ModelGrowth, groups: Iterable[str], evidence: EvidenceShape = _RANDOM) -> str:
    """The plan as a table: one line for axes that grow alike, what it promises, and what it will take.

    Args:
        growth: the plan.
        groups: the parts of the source's state of the size of its parameters: `parameters`, `first_moment`…
        evidence: what the receipt will compare the models on.
    """
    alike: dict[tuple[str, ...], list[str]] = {}
    for each in growth.plan.axes:
        alike.setdefault(_describe(each, growth), []).append(each.axis)
    rows = [(", ".join(_shorten(axes, growth)), *cells) for cells, axes in alike.items()]
    table = _format_table([_COLUMNS, *rows])
    choices, groups = growth.plan.choices, list(groups)
    before, after = (count_parameters(model) for model in (growth.source, growth.target))
    read, written = _count_bytes(growth, groups)
    rate = choices.learning_rate
    policies = {
        "keep": "step and schedule go on",
        "rewarm": f"as before; what is new takes {rate.peak:g} × the rate, warmed up over {rate.steps} updates",
        "remap": f"the schedule goes on from step {rate.to_step}",
    }
    promise = growth.plan.promise
    lines = [
        f"plan {growth.hash[:12]}, seed {choices.seed}, noise {choices.noise:g}, moments {choices.state}, "
        f"dynamics {choices.dynamics}",
        *table,
        f"promise: {promise}, {PROMISES[promise]}",
        f"learning rate: {policies[rate.policy]}",
        f"parameters: {before:,} → {after:,} ({after / before:.2f} ×)",
        f"surgery: reads {format_bytes(read)}, writes {format_bytes(written)} ({' + '.join(groups)}), "
        f"about {_seconds(written / BYTES_PER_SECOND)} on two cores and a local disk, "
        f"at most {format_bytes(RESIDENT_BYTES)} of memory",
        _describe_receipt(growth, evidence),
    ]
    if choices.learned is not None:
        rows = "the run's batches" if choices.learned.batch_size is None else f"{choices.learned.batch_size} rows"
        lines.append(
            f"learned maps: trained for {choices.learned.steps} updates on {rows} at rate "
            f"{choices.learned.learning_rate:g}, beginning with the plan above; parameters of both models are in memory"
        )
    if growth.target.layer_norm_epsilon != growth.source.layer_norm_epsilon:
        lines.append(
            f"layer_norm_epsilon: {growth.source.layer_norm_epsilon:g} → {growth.target.layer_norm_epsilon:g}, "
            "because gains are scaled"
        )
    return "\n".join([*lines, *(f"note: {remark}" for remark in growth.remarks)])


def _describe_receipt(growth: ModelGrowth, evidence: EvidenceShape) -> str:
    """What a receipt of each level will take, in a line."""
    full, *others = (f"{estimate_receipt(growth, level, evidence)} with --receipt {level}" for level in LEVELS)
    compared = f"{evidence.rows} rows of {evidence.source_tokens} + {evidence.target_tokens} tokens"
    batches = "" if evidence.batches == 1 else f"up to {evidence.batches} × "
    return (
        f"receipt: about {full}, comparing {batches}{compared}, in a process of its own; {', '.join(others)}; "
        "times on two cores"
    )


def _count_bytes(growth: ModelGrowth, groups: Iterable[str]) -> tuple[int, int]:
    """Of the arrays of these parts of the state, before and after."""
    maps, sizes = growth.plan.maps, [0, 0]
    for group in groups:
        narrow = group.endswith("_moment") and growth.optimizer.moment_dtype == "bfloat16"
        for spec in growth.parts[group][0].values():
            grown = (maps[axis].size if axis in maps else size for axis, size in zip(spec.axes, spec.shape))
            for place, shape in enumerate((spec.shape, grown)):
                sizes[place] += (2 if narrow else 4) * math.prod(shape)
    return sizes[0], sizes[1]


def _shorten(axes: list[str], growth: ModelGrowth) -> list[str]:
    """Names of axes, those with one ending as the pattern that means them all in a plan file, if it means no others."""
    there = {axis for spec in growth.specs.values() for axis in spec.axes}
    patterns: dict[str, list[str]] = {}
    for axis in axes:
        patterns.setdefault(f"*.{axis.rpartition('.')[2]}", []).append(axis)
    return [
        name
        for pattern, names in patterns.items()
        for name in (
            [pattern]
            if len(names) > 1 and sum(map(lambda axis, suffix=pattern[1:]: axis.endswith(suffix), there)) == len(names)
            else names
        )
    ]


def _describe(each: AxisGrowth, growth: ModelGrowth) -> tuple[str, ...]:
    choices = growth.plan.choices
    return (
        f"{each.source:,} → {each.target:,}",
        each.describe(),
        each.promise,
        each.breaker(choices),
        _state_rule(each, choices.state),
    )


def _state_rule(each: AxisGrowth, state: str) -> str:
    """What becomes of moments along an axis."""
    if state == "reset":
        return "all zero"
    if each.map.opens:
        return "in the head: m 0, v mean"
    new = {
        "stream": "new: m 0, v mean",
        "units": "new: m 0, v mean",
        "layers": "new: m 0, v as copied",
        "rows": "new: m 0, v of the pieces",
        "table": "copied",
    }[each.kind]
    if each.map.created.any():
        return new
    if each.kind in ("table", "layers"):
        return "copied"
    return "r·m, r²·v" + ("; copies m 0" if state == "asymmetric" else "")


def _format_table(cells: list[tuple[str, ...]]) -> list[str]:
    rows = []
    for row in cells:
        wrapped = [textwrap.wrap(cell, _WIDTH, break_long_words=False, break_on_hyphens=False) for cell in row]
        rows += itertools.zip_longest(*wrapped, fillvalue="")
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def _seconds(number: float) -> str:
    if number < 1:
        return "a second"
    return f"{number:.0f} s" if number < 120 else f"{number / 60:.0f} min"
