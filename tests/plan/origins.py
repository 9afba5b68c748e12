"""Which arguments of a program an array in it is a copy, a part or a cast of."""

import re

from t5pegasus.plan.hlo import Module

_MOVES = {
    "bitcast", "copy", "convert", "transpose", "reshape", "slice", "dynamic-slice", "copy-start", "copy-done",
    "slice-start", "slice-done", "dynamic-slice-start", "dynamic-slice-done", "opt-barrier", "optimization-barrier",
}  # fmt: skip


class Origins:
    """Follows arrays back through everything that moves them and computes nothing, into loops and fusions."""

    def __init__(self, module: Module):
        self.module = module
        self.callers: dict[str, list] = {}
        for name, instructions in module.computations.items():
            for each in instructions.values():
                for key in ("calls", "body", "condition", "to_apply"):
                    if called := each.called(key):
                        self.callers.setdefault(called, []).append((name, each, key))

    def arguments_of(self, computation: str, name: str) -> set[int]:
        """Numbers of the program's arguments; empty for what was computed."""
        return self._follow(computation, name, None, set())

    def _follow(self, computation: str, name: str, index: int | None, seen: set) -> set[int]:
        if (computation, name, index) in seen:
            return set()
        seen.add((computation, name, index))
        each = self.module.computations[computation][name]
        if each.opcode == "get-tuple-element":
            return self._follow(computation, each.operands[0], int(re.search(r"index=(\d+)", each.attributes)[1]), seen)
        if each.opcode == "parameter":
            if computation == self.module.entry:
                return {int(each.arguments)}
            return self._follow_callers(computation, int(each.arguments), index, seen)
        if each.opcode == "tuple" and index is not None:
            return self._follow(computation, each.operands[index], None, seen)
        if each.opcode == "while":
            return self._follow(computation, each.operands[0], index, seen)
        if each.opcode == "fusion":
            called = each.called("calls")
            return self._follow(called, self.module.root(called).name, index, seen)
        if each.opcode in _MOVES:
            return self._follow(computation, each.operands[0], None, seen)
        if each.opcode == "custom-call" and "ConcatBitcast" in each.attributes:
            return set().union(*(self._follow(computation, operand, None, seen) for operand in each.operands))
        return set()

    def _follow_callers(self, computation: str, number: int, index: int | None, seen: set) -> set[int]:
        found: set[int] = set()
        for parent, caller, key in self.callers.get(computation, []):
            if key in ("calls", "body") and number < len(caller.operands):
                found |= self._follow(parent, caller.operands[number], index, seen)
        return found
