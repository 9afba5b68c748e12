"""manifest.json: size and SHA-256 of every file of a checkpoint; its presence alone commits them."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from t5pegasus.errors import ArtifactError, UsageError, reading
from t5pegasus.json_files import SCHEMA, check_schema, read_json, write_json
from t5pegasus.storage import flush, is_remote, list_files

MANIFEST = "manifest.json"
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

Files = Mapping[str, Mapping[str, Any]]
"""File name, relative to the folder → {bytes, sha256}."""


class DamagedError(ArtifactError):
    """A checkpoint is not what was written; an older one may be."""

    def __init__(self, path: Path, problem: str):
        super().__init__(f"checkpoint {path}: {problem}; use another step, or copy the folder anew")
        self.path = path


def describe_bytes(content: bytes | memoryview) -> dict[str, Any]:
    """The manifest's entry of a file of this content."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def write_manifest(folder: Path, known: Files | None = None) -> dict[str, Any]:
    """Force every file below a folder to the disk and describe it in the folder's manifest, which is returned.

    Args:
        folder: the folder; it has no manifest yet, or one to replace.
        known: entries of files that are not read again, because whoever wrote and flushed them has them.

    Raises:
        OSError: if the disk fails, or a known file is not there any more.
    """
    known, sizes = known or {}, _list_sizes(folder)
    unread = [name for name in sizes if name not in known]
    if not is_remote(folder):  # what a store has taken it has; its listing may lag behind
        for name, entry in known.items():
            if sizes.get(name) != entry["bytes"]:
                raise OSError(f"{folder / name} has {sizes.get(name)} bytes, {entry['bytes']} were written")
        folders = [folder, *(each for each in folder.rglob("*") if each.is_dir())]
        _in_threads(flush, [*(folder / name for name in unread), *folders])
    found = {**known, **dict(zip(unread, _in_threads(lambda name: _describe_file(folder / name), unread)))}
    files = {name: dict(found[name]) for name in sorted(found)}
    manifest = {"schema": SCHEMA, "fingerprint": _fingerprint(files), "files": files}
    write_json(folder / MANIFEST, manifest)
    return manifest


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, as it was written.

    Raises:
        DamagedError: if it is of another schema or damaged: its fingerprint is that of its entries.
    """
    try:
        manifest = read_json(path / MANIFEST)
        check_schema(manifest, path / MANIFEST)
    except UsageError as error:
        raise DamagedError(path, str(error)) from None
    with reading(path / MANIFEST):
        files = manifest["files"]
        whole = all(set(entry) == {"bytes", "sha256"} for entry in files.values())
        if not whole or _fingerprint(files) != manifest["fingerprint"]:
            raise DamagedError(path, f"file {MANIFEST} is damaged: its fingerprint is not that of its entries")
    return manifest


def find_problems(path: Path, contents: Callable[[str], bool] = lambda name: True) -> Iterator[str]:
    """Every file of a checkpoint that is missing, surplus, of another size or of other content, as a sentence.

    Args:
        path: the folder.
        contents: which of the files to read, by name; of the others the size is compared.

    Raises:
        DamagedError: if it is the manifest that is damaged.
    """
    wanted: Files = read_manifest(path)["files"]
    sizes = _list_sizes(path)
    for name in sorted(sizes.keys() ^ wanted.keys()):
        yield f"file {name} is {'not in the manifest' if name in sizes else 'missing'}"
    there = [name for name in wanted if name in sizes]
    read = [name for name in there if sizes[name] == wanted[name]["bytes"] and contents(name)]
    digests = dict(zip(read, _in_threads(lambda name: _describe_file(path / name)["sha256"], read)))
    for name in there:
        problem = describe_difference(name, wanted[name], sizes[name], digests.get(name))
        if problem is not None:
            yield problem


def describe_difference(name: str, wanted: Mapping[str, Any], num_bytes: int, digest: str | None) -> str | None:
    """What is wrong with a file of this size and, where it was read, of this SHA-256; None if nothing is."""
    if num_bytes == wanted["bytes"] and digest in (None, wanted["sha256"]):
        return None
    got = f"{num_bytes:,} bytes" + (f" of sha256 {digest[:12]}…" if digest else "")
    return (
        f"file {name} is damaged: it has {got}, "
        f"the manifest says {wanted['bytes']:,} bytes of sha256 {wanted['sha256'][:12]}…"
    )


def verify_manifest(path: Path, contents: Callable[[str], bool] = lambda name: True) -> dict[str, Any]:
    """Compare every file with the manifest, which is returned; `contents` as in `find_problems`.

    Raises:
        DamagedError: naming the first file that is missing, surplus, of another size or of other content.
    """
    with reading(path / MANIFEST):
        for problem in find_problems(path, contents):
            raise DamagedError(path, problem)
    return read_manifest(path)


def find_damaged(folder: Path, files: Files) -> list[str]:
    """Which of these files are missing, or have another size or content than their entries say."""
    sizes = _list_sizes(folder)
    whole = [name for name, entry in files.items() if sizes.get(name) == entry["bytes"]]
    described = _in_threads(lambda name: _describe_file(folder / name), whole)
    unchanged = {name for name, got in zip(whole, described) if got == files[name]}
    return [name for name in files if name not in unchanged]


def _fingerprint(files: Files) -> str:
    """Of the arrays and our own description: Orbax stamps its metadata with time and place."""
    lasting = {
        name: entry["sha256"]
        for name, entry in files.items()
        if not name.rpartition("/")[2].startswith(("_", "commit_success"))
    }
    return hashlib.sha256(repr(sorted(lasting.items())).encode()).hexdigest()


def _list_sizes(folder: Path) -> dict[str, int]:
    return {name: size for name, size in sorted(list_files(folder).items()) if name != MANIFEST}


def _in_threads(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """Some more than there are cores: they hash, which lets others run meanwhile, or wait for the disk."""
    with ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as pool:
        return list(pool.map(function, items))


def _describe_file(file: Path) -> dict[str, Any]:
    if is_remote(file):
        return describe_bytes(file.read_bytes())
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
