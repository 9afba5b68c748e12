"""The tokenizer folder on disk: written whole under a temporary name, then renamed."""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t5pegasus.errors import ArtifactError, UsageError
from t5pegasus.json_files import SCHEMA, read_json, write_json

if TYPE_CHECKING:
    from t5pegasus.text.tokenizer import Tokenizer


def write_tokenizer(
    tokenizer: "Tokenizer", path: Path, file_name: str, content: bytes, made_by: dict[str, Any] | None
) -> None:
    """Write `tokenizer.json` and the vocabulary file into a new folder.

    Raises:
        UsageError: if `path` exists and is not an empty folder.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"output path {path} is already in use; remove it or choose another one")
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # what a killed process left
    temporary.mkdir(parents=True)
    try:
        with (temporary / file_name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        facts = {
            "schema": SCHEMA,
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "pad_id": tokenizer.pad_id,
            "unk_id": tokenizer.unk_id,
            "start_id": tokenizer.start_id,
            "end_id": tokenizer.end_id,
            "fingerprint": tokenizer.fingerprint,
        }
        write_json(temporary / "tokenizer.json", facts | ({"made_by": made_by} if made_by else {}))
        temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary)
        raise


def read_tokenizer_json(path: Path) -> dict[str, Any]:
    """The facts in a tokenizer folder.

    Raises:
        ArtifactError: if there is no such folder, or another version wrote it.
    """
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        raise ArtifactError(
            f"{path} is no tokenizer folder (it has no tokenizer.json); make one with t5pegasus tokenizer train"
        )
    try:
        facts = read_json(file)
    except UsageError as error:
        raise ArtifactError(str(error)) from None
    if facts.get("schema") != SCHEMA:
        raise ArtifactError(
            f"{file}: schema is {facts.get('schema')!r}, this version reads schema {SCHEMA}; train or adopt it anew"
        )
    return facts
