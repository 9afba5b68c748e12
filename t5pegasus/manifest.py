"""manifest.json: size and SHA-256 of every file of a checkpoint; its presence alone commits them."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from t5pegasus.errors import ArtifactError, reading
from t5pegasus.json_files import SCHEMA, check_schema, read_json, write_json

MANIFEST = "manifest.json"

Files = Mapping[str, Mapping[str, Any]]
"""File name, relative to the folder → {bytes, sha256}."""


def write_manifest(folder: Path, known: Files | None = None) -> None:
    """Force every file below a folder to the disk and describe it in the folder's manifest.

    Args:
        folder: the folder; it has no manifest yet, or one to replace.
        known: entries of files that are not read again, because whoever wrote and flushed them has them.

    Raises:
        OSError: if the disk fails.
    """
    names = _list_files(folder)
    found = {name: known[name] for name in names if known and name in known}
    unread = [name for name in names if name not in found]
    for path in (*(folder / name for name in unread), *(each for each in folder.rglob("*") if each.is_dir()), folder):
        flush(path)
    found |= zip(unread, _describe_files(folder, unread))
    files = {name: dict(found[name]) for name in names}
    # Orbax stamps its own metadata with time and place, so the fingerprint covers the arrays and our description.
    lasting = {
        name: entry["sha256"]
        for name, entry in files.items()
        if not Path(name).name.startswith(("_", "commit_success"))
    }
    fingerprint = hashlib.sha256(repr(sorted(lasting.items())).encode()).hexdigest()
    write_json(folder / MANIFEST, {"schema": SCHEMA, "fingerprint": fingerprint, "files": files})


def verify_manifest(path: Path) -> dict[str, Any]:
    """Compare every file with the manifest, which is returned.

    Raises:
        ArtifactError: naming the first file that is missing, surplus, of another size or of other content.
    """
    manifest = read_json(path / MANIFEST)
    check_schema(manifest, path / MANIFEST)
    with reading(path / MANIFEST):
        _compare_files(path, manifest["files"])
    return manifest


def flush(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_damaged(folder: Path, files: Files) -> list[str]:
    """Which of these files are missing, or have another size or content than their entries say."""
    whole = [name for name, entry in files.items() if _size(folder / name) == entry["bytes"]]
    unchanged = {name for name, got in zip(whole, _describe_files(folder, whole)) if got == files[name]}
    return [name for name in files if name not in unchanged]


def _compare_files(path: Path, wanted: Files) -> None:
    found = set(_list_files(path))
    for name in sorted(found ^ wanted.keys()):
        state = "not in the manifest" if name in found else "missing"
        raise ArtifactError(f"checkpoint {path}: file {name} is {state}; use another step, or copy the folder anew")
    for (name, entry), got in zip(wanted.items(), _describe_files(path, wanted)):
        if got != entry:
            raise ArtifactError(
                f"checkpoint {path}: file {name} is damaged: {got['bytes']} bytes sha256 {got['sha256'][:12]}…, "
                f"the manifest says {entry['bytes']} bytes sha256 {entry['sha256'][:12]}…; use another step"
            )


def _list_files(folder: Path) -> list[str]:
    files = (str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    return sorted(name for name in files if name != MANIFEST)


def _describe_files(folder: Path, names: Iterable[str]) -> list[dict[str, Any]]:
    """Entries of files, read on all cores: hashing is what takes the time, and lets other threads run meanwhile."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda name: _describe_file(folder / name), names))


def _describe_file(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else -1
