"""Single files and flat lists of them, on disk and in object stores."""

import contextlib
import errno
import os
import shutil
import stat
import threading
from pathlib import Path
from typing import Any

from t5pegasus.errors import writing
from t5pegasus.storage.paths import is_remote


def write_bytes(path: Path, content: bytes, *, create: bool = False) -> None:
    """Write a file so that it is whole or absent, and on the disk (in the store) when this returns.

    Locally that is a temporary name, a flush to the disk and a rename; in a store one put.

    Args:
        path: the file; its folder exists (a store needs none).
        content: all of it.
        create: only if there is no such file yet, decided in one step against other writers.

    Raises:
        FileExistsError: with `create`, if there is one of other content.
        OSError: if disk or store fails.
    """
    if is_remote(path):
        _put(path, content, create)
        return
    # Processes of one job, on one machine or several, may write the same file at the same time.
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with writing(path), temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if create:
            os.link(temporary, path)
            temporary.unlink()
        else:
            temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # what failed first is what is reported
            temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)


def flush(path: Path) -> None:
    """Force a local file, or the names in a local folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put(path: Any, content: bytes, create: bool) -> None:
    from t5pegasus.storage.attempts import attempt

    if not create:
        path.write_bytes(content)
        return
    try:
        attempt(path, "write", lambda: path.fs.pipe_file(path.path, content, mode="create"))
    except FileExistsError:
        if path.read_bytes() != content:  # it may be an attempt of our own whose answer was lost
            raise FileExistsError(f"{path} exists already") from None


def read_range(path: Path, offset: int, length: int) -> bytes:
    """Bytes of a file, exactly so many.

    Raises:
        OSError: if the file ends before them, or disk or store fails.
    """
    if is_remote(path):
        from t5pegasus.storage.remote_path import read_object_range

        return read_object_range(path, offset, length)
    with path.open("rb") as file:
        file.seek(offset)
        content = file.read(length)
    if len(content) != length:
        end = offset + len(content)
        raise OSError(errno.EIO, f"it ends {length - len(content):,} bytes too early, at {end:,}", str(path))
    return content


def copy_file(source: Path, target: Path) -> None:
    """Copy one file, between disks and stores in any direction; within one store its server copies."""
    if not is_remote(source) and not is_remote(target):
        shutil.copyfile(source, target)
        return
    from t5pegasus.storage.transfer import transfer

    transfer(source, target)


def list_files(folder: Path) -> dict[str, int]:
    """The files at any depth below a folder: name relative to it, with `/`, and size; nothing if there is no folder."""
    if is_remote(folder):
        from t5pegasus.storage.attempts import attempt

        remote: Any = folder
        try:
            found = attempt(folder, "list", lambda: remote.fs.find(remote.path, detail=True))
        except FileNotFoundError:
            return {}
        prefix = remote.path.strip("/") + "/"
        names = ((name.strip("/"), int(entry["size"])) for name, entry in found.items() if entry["type"] == "file")
        return {name.removeprefix(prefix): size for name, size in sorted(names) if name.startswith(prefix)}
    sizes = {}
    for path in sorted(folder.rglob("*")):
        with contextlib.suppress(FileNotFoundError):  # somebody has deleted it since
            found = path.stat()
            if stat.S_ISREG(found.st_mode):
                sizes[path.relative_to(folder).as_posix()] = found.st_size
    return sizes


def remove_tree(path: Path) -> None:
    """Delete a folder and all below it; nothing happens if there is none.

    In a store the manifest goes first: killed on the way, what is left is no artifact any more.
    """
    if not is_remote(path):
        if path.exists():
            shutil.rmtree(path)
        return
    from t5pegasus.storage.transfer import delete_all

    names = sorted(
        list_files(path), key=lambda name: (name.rpartition("/")[2] != "manifest.json", name.count("/"), name)
    )
    delete_all([path / name for name in names])
