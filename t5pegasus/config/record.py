"""Frozen dataclasses that are validated on creation, with a JSON round trip."""

import dataclasses
import difflib
import math
import types
import typing
from typing import Any, Literal, Self

from t5pegasus.errors import UsageError


def require(holds: bool, message: str) -> None:
    """Refuse a value.

    Raises:
        UsageError: with the message, unless it holds.
    """
    if not holds:
        raise UsageError(message)


def is_positive_number(text: str) -> bool:
    """Whether a text is a finite number above zero."""
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


class Record:
    """`to_json` / `from_json` for nested frozen dataclasses; an unknown key names the nearest valid one."""

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON, nested records as objects."""
        return dataclasses.asdict(self)  # pyright: ignore[reportArgumentType]

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """The inverse of `to_json`.

        Raises:
            UsageError: naming an unknown field, with the nearest valid one, or one of another type.
        """
        fields = {field.name: field.type for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
        hints = typing.get_type_hints(cls)
        for key in value:
            if key not in fields:
                near = difflib.get_close_matches(key, fields, n=1)
                raise UsageError(
                    f"{cls.__name__}: unknown field {key!r}"
                    + (f"; perhaps you meant {near[0]!r}" if near else f"; it has {', '.join(fields)}")
                )
        return cls(**{key: _from_json_value(hints[key], item, f"{cls.__name__}.{key}") for key, item in value.items()})


def _from_json_value(hint: Any, value: Any, name: str) -> Any:
    if isinstance(value, dict) and isinstance(hint, type) and issubclass(hint, Record):
        return hint.from_json(value)
    if isinstance(value, list) and typing.get_origin(hint) is tuple:
        return tuple(value)
    if isinstance(hint, types.UnionType) and isinstance(value, dict):
        (inner,) = (arm for arm in typing.get_args(hint) if arm is not types.NoneType)
        return _from_json_value(inner, value, name)
    if typing.get_origin(hint) is Literal:
        options = typing.get_args(hint)
        require(value in options, f"{name}={value!r} must be one of {', '.join(map(str, options))}")
    else:
        require(is_of_type(value, hint), f"{name}={value!r} must be of type {getattr(hint, '__name__', hint)}")
    return value


def is_of_type(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of a field's type; true is no number."""
    if isinstance(hint, types.UnionType):
        return any(is_of_type(value, arm) for arm in typing.get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, typing.get_origin(hint) or hint)
