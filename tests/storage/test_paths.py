import dataclasses
import importlib
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

from launch.cli import VERBS, Verb
from launch.command_line import StoragePath, parse_command_line
from t5pegasus.errors import UsageError
from t5pegasus.storage import is_remote, is_remote_text, open_path


def test_local_text_is_a_local_path_and_an_address_keeps_its_slashes():
    assert open_path("runs/tiny") == Path("runs/tiny")
    assert open_path("file:///data/x") == Path("/data/x")
    for text in ("gs://bucket/runs/tiny", "memory://bucket/runs/tiny"):
        path = open_path(text)
        assert is_remote(path)
        assert is_remote_text(text)
        assert str(path) == text
        assert str(path / "checkpoints" / "7") == f"{text}/checkpoints/7"
        assert (path / "a.json").name == "a.json"
        assert path.parent / "tiny" == path
    assert str(open_path("gcs://bucket/run/")) == "gs://bucket/run"
    assert not is_remote(Path("gs:"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ftp://host/run", "ftp:// is not known; give a local path, or gs://BUCKET/NAME"),
        ("gs://", "names no place in a store"),
        ("gs://bucket//run", "names no place in a store"),
        ("gs://bucket/../run", "names no place in a store"),
    ],
)
def test_other_addresses_are_refused_in_words(text: str, said: str):
    with pytest.raises(UsageError, match=said):
        open_path(text)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UsageError, match=r"pip install 't5pegasus\[gcs\]'"):
        open_path("gs://bucket/run")


def test_local_paths_import_nothing_for_stores(tmp_path: Path):
    program = (
        "import sys; from pathlib import Path; import t5pegasus.storage as s;"
        f"p = s.open_path({str(tmp_path / 'x')!r}); s.write_bytes(p, b'abc'); s.read_range(p, 1, 1);"
        "s.list_files(p.parent); s.fetch(p);"
        "print([m for m in ('fsspec', 'upath', 'gcsfs', 'aiohttp', 'google.auth') if m in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n"


def _fields_with_paths() -> list[Any]:
    found = []
    for name in VERBS:
        module = importlib.import_module(Verb.module(name))
        for flags in vars(module).values():
            if not (
                isinstance(flags, type) and dataclasses.is_dataclass(flags) and flags.__module__ == module.__name__
            ):
                continue
            hints = typing.get_type_hints(flags, include_extras=True)
            for field in dataclasses.fields(flags):
                if Path in _types_in(hints[field.name]):
                    found.append(pytest.param(hints[field.name], id=f"{name}-{flags.__name__}-{field.name}"))
    return found


def _types_in(hint: Any) -> set[Any]:
    return {hint}.union(*(_types_in(inner) for inner in typing.get_args(hint) if not isinstance(inner, str)))


def test_no_verb_makes_a_local_path_of_an_address():
    """Whichever flag it is given to, it is either taken as it is or refused."""
    num_remote, num_fields = 0, 0
    parameters = _fields_with_paths()
    for parameter in parameters:
        (hint,) = parameter.values
        flags = dataclasses.make_dataclass("Flags", [("path", hint)])
        address = "gs://bucket/some/where"
        try:
            parsed = parse_command_line(flags, args=["--path", address]).path
        except SystemExit:
            parsed = parse_command_line(flags, args=[address]).path  # positional
        except UsageError as error:
            num_fields += "on this machine only" in str(error)
            continue
        taken = parsed[0] if isinstance(parsed, tuple) else parsed
        assert is_remote(taken), parameter.id
        assert str(taken) == address, parameter.id
        num_remote, num_fields = num_remote + 1, num_fields + 1
    assert len(parameters) == num_fields > num_remote > 20


def test_defaults_may_lie_in_a_store():
    """As the paths of a run that continues do."""
    address = open_path("gs://bucket/some/where")
    hints: list[Any] = [("given", StoragePath), ("perhaps", StoragePath | None)]
    flags = dataclasses.make_dataclass("Flags", hints)
    default = flags(address, address)
    assert parse_command_line(flags, args=[], default=default) == default
    assert parse_command_line(flags, args=["--perhaps", "None"], default=default).perhaps is None
    other = parse_command_line(flags, args=["--perhaps", "gs://bucket/x", "--given", "x"], default=default)
    assert (str(other.perhaps), other.given) == ("gs://bucket/x", Path("x"))
