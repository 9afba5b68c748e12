"""Optimised HLO as text: instructions, the computations that call each other, and how often each of them runs.

XLA's own `cost_analysis` counts the body of a loop once, and a train step is loops over layers, micro-batches and
vocabulary chunks; so the text is read here. Its format: https://openxla.org/xla/terminology and XLA's hlo_parser tests.
"""

import dataclasses
import functools
import math
import re

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
"""Opcodes, which may also end in -start."""

_ARRAY = re.compile(r"\b(pred|bf16|c64|c128|token|[sufc]\d+(?:e\d+m\d+\w*)?)\[([\d,<=]*)\](\{[^{}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128, "token": 0}


@dataclasses.dataclass(frozen=True)
class ArrayType:
    """One array of an instruction's result."""

    dtype: str
    dims: tuple[int, ...]
    memory_space: int
    """0 is the device's main memory; TPUs keep arrays in others between two uses."""

    @property
    def bytes(self) -> int:
        """Its size without padding."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            digits = re.match(r"[sufc](\d+)", self.dtype)
            bits = int(digits[1]) if digits else 0
        return -(-math.prod(self.dims) * bits // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: result types, opcode, operands by name, and the rest as text."""

    name: str
    types: tuple[ArrayType, ...]
    opcode: str
    operands: tuple[str, ...]
    arguments: str
    """What stands between the parentheses: the value of a constant, the number of a parameter."""
    attributes: str
    is_root: bool

    @property
    def bytes(self) -> int:
        """Of the whole result."""
        return sum(each.bytes for each in self.types)

    def called(self, key: str) -> str | None:
        """The computation under an attribute such as `calls`, `body`, `condition`, `to_apply`."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found and found[1]

    @property
    def op_name(self) -> str:
        """Where in the traced program it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Module:
    """A whole program: instructions by name in each computation, in the order of the text."""

    header: str
    entry: str
    computations: dict[str, dict[str, Instruction]]

    def root(self, computation: str) -> Instruction:
        """What a computation returns."""
        return next(each for each in self.computations[computation].values() if each.is_root)

    @functools.cached_property
    def donated(self) -> set[int]:
        """Numbers of the arguments whose memory is a result's: `input_output_alias`."""
        start = self.header.find("input_output_alias={")
        part = self.header[start : _closing(self.header, self.header.find("{", start), "{}") + 1] if start >= 0 else ""
        return {int(number) for number in re.findall(r"\}: \((\d+),", part)}

    @functools.cached_property
    def executions(self) -> dict[str, int]:
        """How often each computation runs in one call of the program; those inside fusions are not in it."""
        return self._count[0]

    @functools.cached_property
    def unknown_loops(self) -> list[str]:
        """Loops whose number of iterations the text does not tell; they are counted once."""
        return self._count[1]

    @functools.cached_property
    def _count(self) -> tuple[dict[str, int], list[str]]:
        counts: dict[str, int] = {}
        unknown: list[str] = []

        def visit(name: str, times: int) -> None:
            counts[name] = counts.get(name, 0) + times
            for instruction in self.computations[name].values():
                match instruction.opcode:
                    case "while":
                        trips = self.trip_count(name, instruction)
                        if trips is None:
                            unknown.append(instruction.name)
                        visit(instruction.called("body") or "", times * (1 if trips is None else trips))
                    case "call" | "async-start":
                        called = instruction.called("to_apply") or instruction.called("calls")
                        if called:
                            visit(called, times)
                    case "conditional":
                        for branch in _branches(instruction):
                            visit(branch, times)

        visit(self.entry, 1)
        return counts, unknown

    def trip_count(self, computation: str, loop: Instruction) -> int | None:
        """Iterations of a while: as XLA says, or from its counter's start, step and limit; None if neither tells."""
        said = re.search(r"known_trip_count[^\d]*(\d+)", loop.attributes)
        if said:
            return int(said[1])
        condition, body = loop.called("condition") or "", loop.called("body") or ""
        compare = self.root(condition)
        within = self.computations[condition]
        if compare.opcode == "fusion":
            inner = self.computations[compare.called("calls") or ""]
            outer = [within[name] for name in compare.operands]
            compare = next(each for each in inner.values() if each.is_root)
            within = {each.name: _as_outer(each, outer) for each in inner.values()}
        if compare.opcode != "compare":
            return None
        left, right = (within[name] for name in compare.operands)
        index, limit = _tuple_index(left), _constant(right)
        if index is None or limit is None:
            return None
        before = self.computations[computation]
        start = _constant(_element(before, before[loop.operands[0]], index))
        stepped = _element(self.computations[body], self.root(body), index)
        steps = [_constant(self.computations[body].get(name)) for name in stepped.operands] if stepped else []
        step = next((each for each in steps if each is not None), None)
        if stepped is None or stepped.opcode != "add" or start is None or not step:
            start, step = start or 0, 1
        up_to = {"LT": limit, "LE": limit + 1, "NE": limit}.get(_direction(compare))
        return None if up_to is None else max(0, -(-(up_to - start) // step))


def parse_hlo(text: str) -> Module:
    """Read the text of a compiled program (`compiled.as_text()`)."""
    header, entry, computations = "", "", {}
    current: dict[str, Instruction] = {}
    for line in text.splitlines():
        if line.startswith("HloModule"):
            header = line
        elif line.startswith((" ", "\t")) and " = " in line:
            instruction = _parse_instruction(line)
            current[instruction.name] = instruction
        elif found := _COMPUTATION.match(line):
            current = computations.setdefault(found[2], {})
            entry = found[2] if found[1] else entry
    return Module(header, entry, computations)


def parse_types(text: str) -> tuple[ArrayType, ...]:
    """The arrays of a type, those of a tuple in order."""
    return tuple(
        ArrayType(
            dtype,
            tuple(int(size.lstrip("<=")) for size in dims.split(",") if size),
            int(space[1]) if layout and (space := re.search(r"S\((\d+)\)", layout)) else 0,
        )
        for dtype, dims, layout in _ARRAY.findall(text)
    )


def _parse_instruction(line: str) -> Instruction:
    name, _, rest = line.strip().partition(" = ")
    is_root = name.startswith("ROOT ")
    end = _closing(rest, 0, "()") + 1 if rest.startswith("(") else rest.index(" ")
    opcode, _, _ = rest[end:].lstrip().partition("(")
    opening = rest.index("(", end)
    closing = _closing(rest, opening, "()")
    arguments = rest[opening + 1 : closing]
    return Instruction(
        name.removeprefix("ROOT ").lstrip("%"),
        parse_types(rest[:end]),
        opcode.strip(),
        tuple(_NAME.findall(arguments)),
        arguments,
        rest[closing + 1 :],
        is_root,
    )


def _closing(text: str, opening: int, pair: str) -> int:
    depth = 0
    for found in re.compile(f"[{re.escape(pair)}]").finditer(text, opening):
        depth += 1 if found[0] == pair[0] else -1
        if depth == 0:
            return found.start()
    return len(text)


def _branches(instruction: Instruction) -> list[str]:
    found = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    if found:
        return _NAME.findall(found[1])
    return [name for key in ("true_computation", "false_computation") if (name := instruction.called(key))]


def _direction(compare: Instruction) -> str:
    found = re.search(r"direction=(\w+)", compare.attributes)
    return found[1] if found else ""


def _constant(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "constant":
        return None
    return int(instruction.arguments) if re.fullmatch(r"-?\d+", instruction.arguments) else None


def _tuple_index(instruction: Instruction) -> int | None:
    found = re.search(r"\bindex=(\d+)", instruction.attributes)
    return int(found[1]) if found and instruction.opcode == "get-tuple-element" else None


def _element(within: dict[str, Instruction], value: Instruction, index: int) -> Instruction | None:
    if value.opcode != "tuple" or index >= len(value.operands):
        return None
    element = within[value.operands[index]]
    while element.opcode in ("copy", "bitcast", "convert"):
        element = within[element.operands[0]]
    return element


def _as_outer(instruction: Instruction, outer: list[Instruction]) -> Instruction:
    return outer[int(instruction.arguments)] if instruction.opcode == "parameter" else instruction
