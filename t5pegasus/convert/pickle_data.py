"""Reading a pickle as data: an interpreter of the few opcodes that dicts of tensors need, which calls nothing else.

Python's own unpickler, even with restricted names, sets attributes and calls methods of what it builds; this one
builds numbers, strings, tuples, lists and dicts, and hands what is left to functions of its caller.
"""

import pickletools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from t5pegasus.errors import ArtifactError


class Global(NamedTuple):
    """A class or function that a pickle names; never looked up in Python."""

    name: str
    """With its module, e.g. `torch._utils._rebuild_tensor_v2`."""


_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, type] = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}
_LITERALS = (
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
)  # fmt: skip
Functions = Mapping[str, Callable[[tuple], Any] | None]


def read_pickle(pickle: bytes, functions: Functions, read_persistent: Callable[[Any], Any], path: Path) -> Any:
    """The object of a pickle.

    Args:
        pickle: its bytes.
        functions: by the global's name, what a call of it with these arguments stands for; None where the pickle
            may name it, but not call it. All other globals are refused.
        read_persistent: what a persistent id stands for.
        path: the file it lies in, for messages.

    Raises:
        ArtifactError: if it names another global.
        ValueError: if it is cut, or uses an opcode that is not needed for tensors.
    """
    interpreter = _Interpreter(functions, read_persistent, path)
    try:
        for opcode, argument, _ in pickletools.genops(pickle):
            if opcode.name == "STOP":
                return interpreter.pop()
            interpreter.run(opcode.name, argument)
    except (IndexError, KeyError):
        raise ValueError("its pickle takes what it has not put there") from None
    raise ValueError("its pickle does not end")


class _Interpreter:
    """The stack, the memo, and what each opcode does with them."""

    def __init__(self, functions: Functions, read_persistent: Callable[[Any], Any], path: Path):
        self._functions, self._read_persistent, self._path = functions, read_persistent, path
        self._stack: list[Any] = []
        self._memo: dict[Any, Any] = {}
        push = self._stack.append
        self._actions: dict[str, Callable[[Any], None]] = {
            "PROTO": lambda _: None,
            "FRAME": lambda _: None,
            "MARK": lambda _: push(_MARK),
            "TUPLE": lambda _: push(tuple(self._pop_to_mark())),
            "TUPLE1": lambda _: push(self._pop_tuple(1)),
            "TUPLE2": lambda _: push(self._pop_tuple(2)),
            "TUPLE3": lambda _: push(self._pop_tuple(3)),
            "APPEND": lambda _: self._extend([self.pop()]),
            "APPENDS": lambda _: self._extend(self._pop_to_mark()),
            "SETITEM": lambda _: self._update(self._pop_tuple(2)),
            "SETITEMS": lambda _: self._update(self._pop_to_mark()),
            "BINPUT": lambda index: self._memo.update({index: self._top()}),
            "LONG_BINPUT": lambda index: self._memo.update({index: self._top()}),
            "MEMOIZE": lambda _: self._memo.update({len(self._memo): self._top()}),
            "BINGET": lambda index: push(self._memo[index]),
            "LONG_BINGET": lambda index: push(self._memo[index]),
            "GLOBAL": lambda name: push(self._allow(*name.partition(" ")[::2])),
            "STACK_GLOBAL": lambda _: push(self._allow(*self._pop_tuple(2))),
            "BINPERSID": lambda _: push(self._read_persistent(self.pop())),
            "REDUCE": lambda _: push(self._call(*self._pop_tuple(2))),
            "BUILD": lambda _: self._build(),
        }
        self._actions.update(dict.fromkeys(_LITERALS, push))
        self._actions.update({name: lambda _, value=value: push(value) for name, value in _CONSTANTS.items()})
        self._actions.update({name: lambda _, kind=kind: push(kind()) for name, kind in _EMPTY.items()})

    def run(self, opcode: str, argument: Any) -> None:
        """One step."""
        if opcode not in self._actions:
            raise ValueError(f"its pickle has the opcode {opcode}, which tensors do not need")
        self._actions[opcode](argument)

    def pop(self) -> Any:
        """The value on top of the stack."""
        self._top()
        return self._stack.pop()

    def _top(self) -> Any:
        if self._stack[-1] is _MARK:
            raise ValueError("its pickle has a mark where a value was wanted")
        return self._stack[-1]

    def _pop_tuple(self, length: int) -> tuple:
        return tuple(self.pop() for _ in range(length))[::-1]

    def _pop_to_mark(self) -> list[Any]:
        items = []
        while self._stack[-1] is not _MARK:
            items.append(self._stack.pop())
        self._stack.pop()
        return items[::-1]

    def _extend(self, items: list[Any]) -> None:
        if not isinstance(self._top(), list):
            raise ValueError("its pickle appends to something else than a list")
        self._stack[-1].extend(items)

    def _update(self, items: Sequence[Any]) -> None:
        if not isinstance(self._top(), dict) or len(items) % 2:
            raise ValueError("its pickle sets items of something else than a dict")
        for key, value in zip(items[::2], items[1::2]):
            # Also because the hash of tuples within tuples can take for ever.
            if not isinstance(key, str | int):
                raise ValueError("its pickle has a dict with keys that are no names")
            self._stack[-1][key] = value

    def _allow(self, module: Any, name: Any) -> Global:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("its pickle names a function by something else than a name")
        if (whole := f"{module}.{name}") not in self._functions:
            raise ArtifactError(
                f"{self._path} asks for {whole[:200]} while it is read, which tensors have no need of and which could "
                "run code; nothing of it was run: save the tensors alone, with torch.save(model.state_dict(), …) or as "
                "safetensors"
            )
        return Global(whole)

    def _call(self, called: Any, arguments: Any) -> Any:
        function = self._functions.get(called.name) if isinstance(called, Global) else None
        if function is None or not isinstance(arguments, tuple):
            raise ValueError("its pickle calls something that is no function of tensors")
        return function(arguments)

    def _build(self) -> None:
        """An object's attributes; those of state dicts are the versions of modules, which nothing needs."""
        self.pop()
        if not isinstance(self._top(), dict):
            raise ValueError("its pickle sets attributes of something else than a dict")
