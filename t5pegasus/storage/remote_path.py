"""Paths in an object store: the methods of `pathlib.Path`, with failures that are retried and then named.

fsspec's `exists` says no when the store cannot be asked. A run that believed this would begin anew over the one that
lies there, so every question here is either answered or ends in an OSError.
"""

import errno
import fnmatch
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, cast

from upath import UPath
from upath.implementations.cloud import GCSPath, S3Path
from upath.implementations.memory import MemoryPath
from upath.registry import register_implementation

from t5pegasus.storage.attempts import attempt


class _Remote:
    """What all of them share; mixed in before the class of the store."""

    __slots__ = ()

    def _info(self: Any) -> dict[str, Any] | None:
        try:
            return attempt(self, "look at", lambda: self.fs.info(self.path))
        except FileNotFoundError:
            return None

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        """Whether there is an object of this name, or one below it."""
        return self._info() is not None

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        """Whether there is an object of this name."""
        info = self._info()
        return info is not None and info["type"] == "file"

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        """Whether there are objects below this name."""
        info = self._info()
        return info is not None and info["type"] == "directory"

    def stat(self: Any, *, follow_symlinks: bool = True) -> Any:
        """Size and times of the object."""
        return attempt(self, "look at", lambda: UPath.stat(self))

    def iterdir(self: Any) -> Iterator[Any]:
        """The objects and prefixes directly below."""
        info = self._info()
        if info is None or info["type"] != "directory":
            kind = FileNotFoundError if info is None else NotADirectoryError
            raise kind(f"{self} is no folder")
        here = self.path.strip("/")
        names = (name.strip("/") for name in attempt(self, "list", lambda: self.fs.ls(self.path, detail=False)))
        yield from (self / name.rpartition("/")[2] for name in names if name != here)

    def glob(self: Any, pattern: str, **_: Any) -> Iterator[Any]:
        """The objects and prefixes below whose names fit."""
        if "/" in pattern or "**" in pattern:
            yield from attempt(self, "list", lambda: list(UPath.glob(self, pattern)))
        elif self.is_dir():  # only this level is listed, however much lies below it
            yield from (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    def rglob(self: Any, pattern: str, **_: Any) -> Iterator[Any]:
        """The objects and prefixes at any depth whose names fit."""
        yield from attempt(self, "list", lambda: list(UPath.rglob(self, pattern)))

    def read_bytes(self: Any) -> bytes:
        """The object's content."""
        return attempt(self, "read", lambda: self.fs.cat_file(self.path))

    def read_text(self: Any, encoding: str | None = None, errors: str | None = None, newline: str | None = None) -> str:
        """The object's content as text."""
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def write_bytes(self: Any, data: Any) -> int:
        """Make or replace the object in one put."""
        content = bytes(data)
        attempt(self, "write", lambda: self.fs.pipe_file(self.path, content))
        return len(content)

    def write_text(self: Any, data: str, encoding: str | None = None, *_: Any, **__: Any) -> int:
        """Make or replace the object in one put."""
        return self.write_bytes(data.encode(encoding or "utf-8"))

    def open(self: Any, mode: str = "r", buffering: int = -1, **options: Any) -> Any:
        """The object as a file to read; to write one is `write_bytes`, since an object comes into being whole."""
        if "r" not in mode or "+" in mode:
            raise io.UnsupportedOperation(f"{self}: an object store has no open({mode!r}); objects are put whole")
        raw = _ObjectReader(self)
        binary = io.BufferedReader(raw, 1 << 20)
        return binary if "b" in mode else io.TextIOWrapper(binary, **options)

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a prefix begins to be with its first object."""
        if not exist_ok and self.exists():
            raise FileExistsError(f"{self} exists")

    def unlink(self: Any, missing_ok: bool = False) -> None:
        """Delete the object."""
        try:
            attempt(self, "delete", lambda: self.fs.rm_file(self.path))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rmdir(self, *_: Any, **__: Any) -> None:
        """Nothing: a prefix ends with its last object. One that has objects is refused, as a folder on a disk is."""
        if self.is_dir():  # universal_pathlib would delete all of them
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(self))

    def rename(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: an object store copies and deletes, one object after the other."""
        raise io.UnsupportedOperation(f"{self}: an object store has no rename")

    replace = rename


class _ObjectReader(io.RawIOBase):
    """An object as a raw file, read by ranges."""

    def __init__(self, path: Any) -> None:
        self._path, self._size, self._position = path, int(path.stat().st_size), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        wanted = max(0, min(len(buffer), self._size - self._position))
        if wanted:
            buffer[:wanted] = read_object_range(self._path, self._position, wanted)
            self._position += wanted
        return wanted


def read_object_range(path: Any, offset: int, length: int) -> bytes:
    """Bytes of an object, exactly so many; fewer is a fault of the store or of the object."""
    if length == 0:
        return b""

    def read() -> bytes:
        content = path.fs.cat_file(path.path, start=offset, end=offset + length)
        if len(content) != length:
            raise EOFError(f"{len(content)} of {length:,} bytes came from offset {offset:,}")
        return content

    return attempt(path, "read", read)


class _GcsPath(_Remote, GCSPath):
    __slots__ = ()

    @classmethod
    def _fs_factory(cls, urlpath: str, protocol: str, storage_options: Any) -> Any:
        from t5pegasus.storage.google import open_google_store

        return open_google_store()


class _S3Path(_Remote, S3Path):
    __slots__ = ()


class _MemoryPath(_Remote, MemoryPath):
    __slots__ = ()


_CLASSES = {"gs": _GcsPath, "s3": _S3Path, "memory": _MemoryPath}
for _scheme, _class in _CLASSES.items():
    register_implementation(_scheme, _class, clobber=True)


def remote_path(scheme: str, name: str) -> Path:
    """The path of `name` (bucket and all) in the store of a scheme."""
    return cast(Path, _CLASSES[scheme](f"{scheme}://{name}", protocol=scheme))
