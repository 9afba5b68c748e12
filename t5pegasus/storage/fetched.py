"""Verified local copies of artifacts in a store, kept by content, so that many runs and restarts share one."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from t5pegasus.errors import ArtifactError, reading, writing
from t5pegasus.storage.attempts import attempt
from t5pegasus.storage.files import list_files, write_bytes
from t5pegasus.storage.paths import is_remote
from t5pegasus.storage.transfer import NUM_THREADS, PART_BYTES
from t5pegasus.storage.trees import MARKS

CACHE_VARIABLE = "T5PEGASUS_CACHE"
MANIFEST = MARKS[0]
_SPARE_BYTES = 256 << 20


def cache_path(environment: Mapping[str, str]) -> Path:
    """Where this user's copies lie: `T5PEGASUS_CACHE`, or `t5pegasus/` in the user's cache folder."""
    if given := environment.get(CACHE_VARIABLE):
        return Path(given)
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "t5pegasus"


def staged_path(output: Path) -> Path:
    """The local folder in which what shall lie at an address in a store is made, the same one each time."""
    return cache_path(os.environ) / "staged" / hashlib.sha256(str(output).encode()).hexdigest()[:16] / output.name


def fetch(path: Path, wanted: Callable[[str], bool] | None = None) -> Path:
    """A local copy of an artifact; a local path comes back as it is.

    Examples and checkpoints are known by their `manifest.json`, tokenizers by their `tokenizer.json`, other folders and
    single files by what the store says of them. Copies are kept by content: two names of one artifact have one copy.
    Each file is compared with the manifest's size and sha256 before it gets its name. Cut off, the next call goes on
    where this one was, and of several processes of a machine one fetches while the others wait for it.

    Args:
        path: the artifact.
        wanted: which of its files to fetch, by name; None for all.

    Raises:
        ArtifactError: if there is nothing, or a file differs from what the manifest says.
        OSError: if the disk has not enough room, or the store fails.
    """
    if not is_remote(path):
        return path
    mark, content = _read_mark(path)
    found = list_files(path) if mark is not None else {}
    if mark is not None:
        files = _entries(path, mark, content, found)
        inner = (entry["sha256"] for name, entry in sorted(files.items()) if name.endswith(f"/{MANIFEST}"))
        identity = b"".join((content, *(digest.encode() for digest in inner)))
    else:
        files, identity = _listed(path)
    if wanted is not None:
        files = {name: entry for name, entry in files.items() if wanted(name)}
    for name, entry in files.items():
        if found.get(name, entry["bytes"]) != entry["bytes"]:  # no fault of the store, so not to be tried again
            raise ArtifactError(
                f"{path / name} has {found[name]:,} bytes, its manifest says {entry['bytes']:,}; copy the artifact "
                "anew from where it is whole, or make it anew"
            )
    folder = cache_path(os.environ) / "fetched" / hashlib.sha256(identity).hexdigest()[:32] / path.name
    with alone(folder):
        missing = {name: entry for name, entry in files.items() if _size(folder / name) != entry["bytes"]}
        _require_room(path, folder, missing)
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            futures = [
                pool.submit(_fetch_verified, path / name if name else path, folder / (name or path.name), entry)
                for name, entry in missing.items()
            ]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        if mark is not None and not (folder / mark).is_file():
            write_bytes(folder / mark, content)
    return folder / path.name if files.keys() == {""} else folder


def _read_mark(path: Path) -> tuple[str | None, bytes]:
    for mark in MARKS[:2]:
        with contextlib.suppress(FileNotFoundError):
            return mark, (path / mark).read_bytes()
    return None, b""


def _listed(path: Any) -> tuple[dict[str, dict[str, Any]], bytes]:
    """Files without a description of ours, and what identifies their content; a single file by the name ''."""
    found = attempt(path, "list", lambda: path.fs.find(path.path, detail=True))
    if not found:
        raise ArtifactError(f"{path} does not exist; check the address")
    files = {name.strip("/").removeprefix(path.path.strip("/")).strip("/"): info for name, info in found.items()}
    identity = [
        (name, info["size"], str(info.get("etag") or info.get("created") or info.get("mtime")))
        for name, info in sorted(files.items())
    ]
    return {name: {"bytes": info["size"]} for name, info in files.items()}, repr(identity).encode()


def _entries(path: Path, mark: str, content: bytes, found: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Size, and where it is known sha256, of every file but the mark: what the manifest lists, then what is there."""
    with reading(path / mark):
        manifest = json.loads(content)
        listed = {name: dict(entry) for name, entry in manifest.get("files", {}).items()}
        for shard in manifest.get("shards", ()):
            listed[shard["file"]] = {"bytes": shard["bytes"], "sha256": shard["sha256"]}
        if "lengths_sha256" in manifest:
            listed["lengths.npy"] = {"sha256": manifest["lengths_sha256"]}
    # Artifacts of their own, such as held-out examples.
    inner = [name.removesuffix(MANIFEST) for name in found if name.count("/") == 1 and name.endswith(f"/{MANIFEST}")]
    for name, size in found.items():
        if name != mark and not name.startswith((*inner, "packing", ".")):  # packing tables are made here
            listed.setdefault(name, {}).setdefault("bytes", size)
    for prefix in inner:
        manifest = (path / prefix / MANIFEST).read_bytes()
        below = {name.removeprefix(prefix): size for name, size in found.items() if name.startswith(prefix)}
        entries = _entries(path / prefix, MANIFEST, manifest, below)
        entries[MANIFEST] = {"bytes": len(manifest), "sha256": hashlib.sha256(manifest).hexdigest()}
        listed |= {prefix + name: entry for name, entry in entries.items()}
    if strange := [name for name in listed if name.startswith("/") or ".." in name.split("/")]:
        raise ArtifactError(f"{path / mark}: {strange[0]!r} is no name of a file in it; do not use this artifact")
    if absent := [name for name, entry in listed.items() if "bytes" not in entry]:
        raise ArtifactError(f"{path}: file {absent[0]} is missing; copy the artifact anew")
    return listed


def _fetch_verified(source: Path, target: Path, entry: Mapping[str, Any]) -> None:
    from t5pegasus.storage.remote_path import read_object_range

    target.parent.mkdir(parents=True, exist_ok=True)
    part, size = target.with_name(target.name + ".part"), int(entry["bytes"])
    digest, done = hashlib.sha256(), 0
    with writing(part), part.open("a+b") as file:
        file.seek(0)
        while done < size and (block := file.read(min(PART_BYTES, size - done))):
            digest.update(block)
            done += len(block)
        file.truncate(done)
        while done < size:
            try:
                block = read_object_range(source, done, min(PART_BYTES, size - done))
            except FileNotFoundError:
                raise ArtifactError(f"{source} is missing, its manifest lists it; copy the artifact anew") from None
            file.write(block)
            digest.update(block)
            done += len(block)
        file.flush()
        os.fsync(file.fileno())
    if (wanted := entry.get("sha256")) is not None and digest.hexdigest() != wanted:
        part.unlink()
        raise ArtifactError(
            f"{source}: sha256 is {digest.hexdigest()[:12]}…, its manifest says {wanted[:12]}…; copy the artifact anew "
            "from where it is whole, or make it anew"
        )
    part.replace(target)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process of this machine at a time; the lock goes with the process that held it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _require_room(source: Path, folder: Path, missing: Mapping[str, Mapping[str, Any]]) -> None:
    needed = sum(entry["bytes"] - max(0, _size(folder / f"{name}.part")) for name, entry in missing.items())
    free = shutil.disk_usage(folder).free
    if needed and needed + _SPARE_BYTES > free:
        raise OSError(
            errno.ENOSPC,
            f"fetching {source} takes {needed / 1e9:.2f} GB here, {free / 1e9:.2f} GB are free; "
            f"or name a folder on another disk by {CACHE_VARIABLE}",
            str(folder),
        )


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else -1
