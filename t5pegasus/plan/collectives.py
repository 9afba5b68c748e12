"""What devices send each other in one step, read from the compiled program.

Bytes on the wire are those that one device sends when the collective runs as a ring: of B bytes per device among n
devices an all-gather sends (n − 1)·B, a reduce-scatter (n − 1)/n·B, an all-reduce twice that, an all-to-all like
a reduce-scatter, a permutation B (Chan et al. 2007; Thakur et al. 2005).
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

from t5pegasus.plan.hlo import COLLECTIVES, ArrayType, Instruction, Module


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program, with all its runs in a step."""

    kind: str
    operands: tuple[ArrayType, ...]
    """What each device puts in."""
    group: tuple[int, ...]
    """Devices of one group, as positions in the mesh."""
    axes: tuple[str, ...]
    """Mesh axes along which the group lies."""
    network: str
    """`ici` within a slice, `dcn` between slices."""
    runs: int
    """Per step."""
    op_name: str

    @property
    def operand_bytes(self) -> int:
        """Per device and run."""
        return sum(each.bytes for each in self.operands)

    @property
    def sent_bytes(self) -> float:
        """By one device in all runs of a step."""
        n, size = len(self.group), self.operand_bytes
        shares = {
            "all-gather": n - 1,
            "reduce-scatter": (n - 1) / n,
            "all-reduce": 2 * (n - 1) / n,
            "all-to-all": (n - 1) / n,
            "collective-permute": 1,
        }
        return shares[self.kind] * size * self.runs


def find_collectives(module: Module, mesh_shape: Mapping[str, int], num_slices: int = 1) -> list[Collective]:
    """Every collective of a compiled program.

    A start and its done count once, and so do the parts into which a TPU program cuts a collective to run them inside
    other fusions, which carry one channel number. A TPU program writes a reduce-scatter as a fusion of an all-reduce
    with the slice that each device keeps.

    Args:
        module: the program.
        mesh_shape: sizes of the mesh axes, outermost first.
        num_slices: how many slices lie along the outermost axis.
    """
    found = []
    for name, runs in module.executions.items():
        seen: set[str] = set()
        for computation, instruction in _executed(module, name):
            if instruction.opcode == "send":
                transfer = _between_slices(module, computation, instruction, mesh_shape, num_slices, runs)
                found += [transfer] if transfer else []
                continue
            kind = instruction.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            if kind == "all-reduce" and computation != name and _is_scattered(module, computation, instruction):
                kind = "reduce-scatter"
            channel = re.search(r"channel_id=(\d+)", instruction.attributes)
            if channel and computation != name:
                if channel[1] in seen:
                    continue
                seen.add(channel[1])
            within = module.computations[computation]
            operands = tuple(each for operand in instruction.operands for each in within[operand].types)
            group = _group(instruction, math.prod(mesh_shape.values()))
            sizes = dict(mesh_shape)
            per_slice = math.prod(sizes.values()) // num_slices
            if num_slices > 1 and _describes_one_slice(instruction, per_slice):
                outermost = next(iter(sizes))
                sizes[outermost] //= num_slices
            axes = _axes(group, sizes)
            crosses = len({member // per_slice for member in group}) > 1
            found.append(
                Collective(kind, operands, group, axes, "dcn" if crosses else "ici", runs, instruction.op_name)
            )
    return [each for each in found if len(each.group) > 1]


def _executed(module: Module, name: str) -> Iterator[tuple[str, Instruction]]:
    for instruction in module.computations[name].values():
        yield name, instruction
        if instruction.opcode == "fusion" and (called := instruction.called("calls")):
            yield from ((called, inner) for inner in module.computations[called].values())


def _is_scattered(module: Module, computation: str, reduced: Instruction) -> bool:
    root = module.root(computation)
    return root.opcode == "dynamic-slice" and root.operands[0] == reduced.name


def _between_slices(
    module: Module, computation: str, send: Instruction, mesh_shape: Mapping[str, int], num_slices: int, runs: int
) -> Collective | None:
    """A transfer that the TPU compiler hands to the host, which talks to the other slices (MegaScale)."""
    said = re.search(r'_xla_megascale_transfer_type="(\w+)"', send.attributes)
    if not said:
        return None
    kind = said[1].lower().replace("_", "-")
    kind = {"one-to-one": "collective-permute"}.get(kind, kind)
    if kind not in COLLECTIVES:
        raise ValueError(f"the program sends {said[1]} between slices, which is none of {', '.join(COLLECTIVES)}")
    operand = module.computations[computation][send.operands[0]]
    step = math.prod(mesh_shape.values()) // num_slices
    group = tuple(index * step for index in range(num_slices))
    return Collective(kind, operand.types, group, (next(iter(mesh_shape)),), "dcn", runs, send.op_name)


def _describes_one_slice(instruction: Instruction, per_slice: int) -> bool:
    ids = [int(number) for number in re.findall(r"\d+", _groups_text(instruction.attributes))]
    return bool(ids) and max(ids) < per_slice


def _groups_text(attributes: str) -> str:
    found = re.search(r"(?:replica_groups|source_target_pairs)=(\{(?:\{[\d,]*\},?)*\})", attributes)
    return found[1] if found else ""


def _group(instruction: Instruction, num_devices: int) -> tuple[int, ...]:
    """The first group of devices, in any of the forms in which XLA writes them."""
    text = instruction.attributes
    if found := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text):
        pairs = re.findall(r"\{(\d+),(\d+)\}", _groups_text(text))
        return _ring([(int(source), int(target)) for source, target in pairs])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return tuple(int(number) for number in found[1].split(","))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        sizes = [int(size) for size in found[3].split(",")]
        ids = np.arange(math.prod(sizes)).reshape(sizes)
        ids = ids.transpose([int(axis) for axis in found[4].split(",")]) if found[4] else ids
        return tuple(int(number) for number in ids.reshape(int(found[1]), int(found[2]))[0])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, ?device_ids=\(([^ ]*)\))? ?\{([^}]*)\}", text):
        return _mesh_group(found[1], found[2], found[3])
    return tuple(range(num_devices))


def _mesh_group(mesh: str, order: str | None, grouped: str) -> tuple[int, ...]:
    """`mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}`, an axis in parts as `'a':(2)2`: size 2 behind one of 2."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    ids = np.arange(math.prod(sizes.values()))
    if order and (found := re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order)):
        ids = ids.reshape([int(size) for size in found[1].split(",")])
        ids = ids.transpose([int(axis) for axis in found[2].split(",")]) if found[2] else ids
    elif order:
        ids = np.array([int(number) for number in order.split(",")])
    ids = ids.reshape(list(sizes.values()))
    index: list = [0] * len(sizes)
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", grouped):
        whole, position = sizes[name], list(sizes).index(name)
        if size:
            behind = whole // (int(before) * int(size))
            index[position] = slice(0, int(size) * behind, behind)
        else:
            index[position] = slice(None)
    return tuple(int(number) for number in ids[tuple(index)].ravel())


def _ring(pairs: list[tuple[int, int]]) -> tuple[int, ...]:
    """The devices that the first one reaches by following the permutation."""
    targets = dict(pairs)
    start = pairs[0][0]
    members, here = [start], targets[start]
    while here not in members:
        members.append(here)
        here = targets.get(here, start)
    return tuple(members) if len(members) > 1 else ()


def _axes(group: tuple[int, ...], mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    if not group or max(group) >= math.prod(mesh_shape.values()):
        return ()
    places = np.array(np.unravel_index(group, tuple(mesh_shape.values())))
    return tuple(name for name, along in zip(mesh_shape, places) if len(set(along.tolist())) > 1)
