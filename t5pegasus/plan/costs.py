"""FLOPs and bytes of main memory of every instruction that a step runs, fusions as one.

A TPU program holds a matrix product as a convolution, whose multiply-adds are counted over the positions at which the
window meets the input (as XLA's HloCostAnalysis does). Bytes are those of operands and results in main memory; of an
operand that a fusion only slices, the slices, and of one that it updates in place, the update.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

from t5pegasus.plan.hlo import COLLECTIVES, Instruction, Module

_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while", "conditional", "call",
    "partition-id", "replica-id", "opt-barrier", "optimization-barrier", "send", "recv", "async-start", "domain",
}  # fmt: skip

_FREE_TARGETS = ('"AllocateBuffer"', '"ConcatBitcast"', '"AsyncCollectiveStart"', '"AsyncCollectiveDone"')


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one instruction, in all its runs of a step."""

    opcode: str
    flops: float
    """Of matrix products."""
    bytes: float
    """Read from and written to main memory."""
    runs: int
    cycles: float = 0.0
    """What the TPU compiler's own cost model expects, vector units included; 0 where it says nothing."""


def find_costs(module: Module) -> Iterator[Cost]:
    """Of every instruction that a step runs and that computes or moves something; collectives left out."""
    for name, runs in module.executions.items():
        within = module.computations[name]
        for instruction in within.values():
            opcode = instruction.opcode
            if (
                opcode in _FREE
                or opcode.endswith("-done")
                or opcode.removesuffix("-start") in COLLECTIVES
                or (opcode == "custom-call" and any(target in instruction.attributes for target in _FREE_TARGETS))
            ):
                continue
            moved = _moved_bytes(module, within, instruction)
            flops = _flops(module, name, instruction)
            said = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
            cycles = int(said[1]) if said else 0
            if moved or flops or cycles:
                yield Cost(opcode, flops * runs, moved * runs, runs, cycles * runs)


def _flops(module: Module, computation: str, instruction: Instruction) -> float:
    if instruction.opcode == "fusion":
        called = instruction.called("calls") or ""
        return sum(_flops(module, called, inner) for inner in module.computations[called].values())
    within = module.computations[computation]
    if instruction.opcode == "dot":
        left = within[instruction.operands[0]].types[0]
        contracted = _numbers(instruction.attributes, "lhs_contracting_dims")
        return 2.0 * math.prod(instruction.types[0].dims) * math.prod(left.dims[axis] for axis in contracted)
    if instruction.opcode == "convolution":
        left, right = (within[name].types[0].dims for name in instruction.operands[:2])
        return _convolution_flops(instruction, left, right)
    if instruction.opcode == "custom-call" and "matmul" in instruction.attributes.lower():
        left, right = (within[name].types[0].dims for name in instruction.operands[:2])
        out = math.prod(instruction.types[0].dims)
        # Of a product [.., m, k] × [.., k, n] → [.., m, n]: (m·k)(k·n)/(m·n) = k².
        batch = math.prod(left[:-2]) or 1
        return 2.0 * out * math.sqrt(math.prod(left) * math.prod(right) / batch / max(1, out))
    return 0.0


def _numbers(attributes: str, key: str) -> list[int]:
    found = re.search(rf"\b{key}=\{{([\d,]*)\}}", attributes)
    return [int(number) for number in found[1].split(",") if number] if found else []


def _convolution_flops(instruction: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> float:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        raise ValueError(f"convolution {instruction.name} has no dim_labels")
    of_left, of_right, of_out = labels.groups()
    out = instruction.types[0].dims
    window = {key: value.split("x") for key, value in re.findall(r"(\w+)=([\w\-]+)", _window(instruction.attributes))}
    positions = 1
    for axis in range(len(window.get("size", []))):
        positions *= _valid_positions(
            left[of_left.index(str(axis))],
            right[of_right.index(str(axis))],
            out[of_out.index(str(axis))],
            stride=int(window["stride"][axis]) if "stride" in window else 1,
            low=int(window["pad"][axis].split("_")[0]) if "pad" in window else 0,
            left_dilation=int(window["lhs_dilate"][axis]) if "lhs_dilate" in window else 1,
            right_dilation=int(window["rhs_dilate"][axis]) if "rhs_dilate" in window else 1,
        )
    features = right[of_right.index("i")] * out[of_out.index("f")]
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    return 2.0 * positions * features * left[of_left.index("b")] / (int(groups[1]) if groups else 1)


def _window(attributes: str) -> str:
    found = re.search(r"window=\{([^}]*)\}", attributes)
    return found[1] if found else ""


def _valid_positions(
    size: int, kernel: int, out: int, *, stride: int, low: int, left_dilation: int, right_dilation: int
) -> int:
    """Pairs of window and output positions at which the window meets an entry of the input."""
    last = (size - 1) * left_dilation
    return sum(
        1
        for tap in range(kernel)
        for position in range(out)
        if 0 <= (at := position * stride + tap * right_dilation - low) <= last and at % left_dilation == 0
    )


def _moved_bytes(module: Module, within: dict[str, Instruction], instruction: Instruction) -> int:
    written = sum(each.bytes for each in instruction.types if each.memory_space == 0)
    opcode = instruction.opcode
    operands = [within[name] for name in instruction.operands]
    if opcode == "fusion":
        return _fusion_bytes(module, instruction, operands)
    if opcode in ("dynamic-slice", "slice", "gather"):
        return written + instruction.types[0].bytes * _in_main_memory(operands[0])
    if opcode == "dynamic-update-slice":
        return 2 * operands[1].bytes * _in_main_memory(operands[0])
    if opcode == "scatter":
        return 3 * operands[-1].bytes * _in_main_memory(operands[0])
    if opcode.endswith("-start"):  # a copy between two memories: the tuple also names where it comes from
        moved = min((each.bytes for each in instruction.types[:2]), default=0)
        return moved * sum(each.memory_space == 0 for each in instruction.types[:2])
    return written + sum(each.bytes for operand in operands for each in operand.types if each.memory_space == 0)


def _in_main_memory(instruction: Instruction) -> bool:
    return all(each.memory_space == 0 for each in instruction.types)


def _users(inside: dict[str, Instruction]) -> dict[str, list[Instruction]]:
    users: dict[str, list[Instruction]] = {}
    for each in inside.values():
        for name in each.operands:
            users.setdefault(name, []).append(each)
    return users


def _fusion_bytes(module: Module, fusion: Instruction, operands: list[Instruction]) -> int:
    inside = module.computations[fusion.called("calls") or ""]
    users = _users(inside)
    parameters = {int(each.arguments): each for each in inside.values() if each.opcode == "parameter"}
    moved = 0
    for number, operand in enumerate(operands):
        if number in parameters and _in_main_memory(operand):
            moved += _read_bytes(module, inside, parameters[number], users)
    root = next(each for each in inside.values() if each.is_root)
    results = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
    for output, kept in zip(results, fusion.types):
        if kept.memory_space == 0:
            result = output
            while result.opcode in ("bitcast", "copy") and result.operands:
                result = inside[result.operands[0]]
            updates = result.opcode == "dynamic-update-slice"
            moved += inside[result.operands[1]].bytes if updates else kept.bytes
    return moved


def _read_bytes(
    module: Module,
    inside: dict[str, Instruction],
    parameter: Instruction,
    users: dict[str, list[Instruction]],
) -> int:
    """Of an operand, what a fusion reads: all of it, or only slices, or nothing where it is updated in place."""
    reads, waiting = 0, [parameter]
    while waiting:
        value = waiting.pop()
        for user in users.get(value.name, []):
            if user.opcode in ("dynamic-slice", "slice", "gather"):
                reads += user.bytes
            elif user.opcode == "bitcast":
                waiting.append(user)
            elif user.opcode == "fusion":
                reads += _read_by_inner(module, user, user.operands.index(value.name))
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
                continue
            else:
                return parameter.bytes
    return min(reads, parameter.bytes)


def _read_by_inner(module: Module, fusion: Instruction, number: int) -> int:
    inside = module.computations[fusion.called("calls") or ""]
    parameter = next(each for each in inside.values() if each.opcode == "parameter" and int(each.arguments) == number)
    return _read_bytes(module, inside, parameter, _users(inside))
