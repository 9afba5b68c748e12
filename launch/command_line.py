"""Command lines: flags out of a dataclass, with paths that lie in an object store where the verb can use one."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from t5pegasus.errors import UsageError
from t5pegasus.storage import is_remote, is_remote_text, open_path

_Flags = TypeVar("_Flags")


def _is_path(value: Any) -> bool:
    return isinstance(value, Path) or hasattr(value, "storage_options")


StoragePath = Annotated[
    Path,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH|gs://…",
        instance_from_str=lambda texts: open_path(texts[0]),
        is_instance=_is_path,
        str_from_instance=lambda path: [str(path)],
    ),
]
"""A flag for a local path or one in an object store; one of type Path takes local paths only, and says so."""

_LOCAL_PATHS = ConstructorRegistry()


@_LOCAL_PATHS.primitive_rule
def _local_path(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Path] | None:
    if info.type is not Path:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda texts: _open_local(texts[0]),
        is_instance=_is_path,
        str_from_instance=lambda path: [str(path)],
    )


@_LOCAL_PATHS.primitive_rule
def _several(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[tuple[Any, ...]] | None:
    """As tyro reads them, but that help names an empty default."""
    match get_args(info.type):
        case (kind, rest) if info.type_origin is tuple and kind in (str, int) and rest is ...:
            name = kind.__name__.upper()
            return PrimitiveConstructorSpec(
                nargs="*",
                metavar=f"[{name} [{name} ...]]",
                instance_from_str=lambda texts: tuple(map(kind, texts)),
                is_instance=lambda value: isinstance(value, tuple) and all(isinstance(each, kind) for each in value),
                str_from_instance=lambda values: [str(each) for each in values] or ["none"],
            )
    return None


def _open_local(text: str) -> Path:
    if is_remote_text(text):
        raise UsageError(f"{text}: this flag takes a path on this machine only; copy it here, or there afterwards")
    return open_path(text)


def parse_command_line(flags: type[_Flags] | Any, *, absent: Mapping[str, str] | None = None, **options: Any) -> Any:
    """Parse the arguments of a verb: `tyro.cli`, with paths as this module says.

    Args:
        flags: what the arguments become.
        absent: what could be taken for a flag and is none, such as `model.vocab_size` → where it comes from.
        options: of `tyro.cli`.

    Raises:
        UsageError: if a path lies where the verb cannot use it, its scheme is not known, or a flag is `absent`.
        SystemExit: for `--help`, and for what tyro refuses itself.
    """
    for argument in options.get("args") or ():
        name = argument.partition("=")[0]
        reason = (absent or {}).get(name.removeprefix("--").replace("-", "_")) if name.startswith("--") else None
        if reason is not None:
            raise UsageError(f"{name} is no flag: {reason}")
    with _LOCAL_PATHS, warnings.catch_warnings():
        # A default that lies in a store, such as that of a run that continues, is typed as a path without being one.
        warnings.filterwarnings("ignore", r".*remote_path.* does not match any type in Union")
        warnings.filterwarnings("ignore", r"(?s)The field .* but the default value .*remote_path")
        return tyro.cli(flags, **options)


def require_local(path: Path, why: str) -> None:
    """Refuse an object store in words.

    Raises:
        UsageError: if the path lies in one.
    """
    if is_remote(path):
        raise UsageError(f"{path}: {why}; choose a path on this machine")
