"""JSON artifacts: one object per file, whole or absent, of a schema version that is checked."""

import json
from pathlib import Path
from typing import Any

from t5pegasus.errors import UsageError
from t5pegasus.storage import write_bytes

SCHEMA = 1
"""Version of every JSON file this package writes; readers refuse another one by name."""


def check_schema(value: dict[str, Any], path: Path) -> None:
    """Refuse a JSON artifact of another schema version, naming both."""
    if value.get("schema") != SCHEMA:
        raise UsageError(
            f"{path}: schema is {value.get('schema')!r}, this version reads schema {SCHEMA}; "
            "write it anew with this version, or install the version that wrote it"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UsageError: if the file is missing, not UTF-8 or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise UsageError(f"{path} is a folder, a JSON file was wanted") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{path} is not valid JSON ({error}); correct it, or if it was cut off, write it anew"
        ) from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} holds a JSON {type(value).__name__}, an object was wanted")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object so that the file is whole or absent, and on the disk (or in the store)."""
    write_bytes(path, (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode())
