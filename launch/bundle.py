"""The code of a job as one tar file with the same bytes wherever and whenever it is made."""

import hashlib
import io
import stat
import subprocess
import tarfile
from pathlib import Path
from typing import BinaryIO

from t5pegasus.errors import UsageError

MAX_BYTES = 256 * 2**20
"""Code is small; more than this is data or a checkpoint that git should ignore."""


def list_bundled_files(root: Path) -> list[str]:
    """Paths below `root` that belong to the code: tracked by git, or untracked and not ignored; sorted.

    Raises:
        UsageError: `root` is not the top folder of an installable git working tree.
    """
    if not (root / "pyproject.toml").is_file():
        raise UsageError(f"{root}: no pyproject.toml; launch from the top folder of the repository")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(listing, cwd=root, capture_output=True, check=False)
    if found.returncode != 0:
        reason = found.stderr.decode(errors="replace").strip()
        raise UsageError(f"{root}: git cannot say which files belong to the code: {reason}")
    paths = {path for path in found.stdout.decode(errors="surrogateescape").split("\0") if path}
    return sorted(path for path in paths if (root / path).is_symlink() or (root / path).is_file())


def write_bundle(root: Path, sink: BinaryIO) -> str:
    """Write the code below `root` to `sink` as a tar file and return its SHA-256.

    Owners, times and all permissions but "executable" are left out, so that equal code gives equal bytes.

    Raises:
        UsageError: there is no code to bundle, or more than `MAX_BYTES` of it; the largest files are named.
    """
    paths = list_bundled_files(root)
    sizes = {path: (root / path).lstat().st_size for path in paths}
    if sum(sizes.values()) > MAX_BYTES:
        largest = sorted(sizes, key=lambda path: -sizes[path])[:10]
        raise UsageError(
            f"{root}: {sum(sizes.values()) / 2**20:.0f} MiB of files, at most {MAX_BYTES / 2**20:.0f} MiB "
            "can be sent; let git ignore what is not code. The largest: "
            + ", ".join(f"{path} ({sizes[path] / 2**20:.1f} MiB)" for path in largest)
        )
    digest = _DigestingSink(sink)
    with tarfile.open(fileobj=digest, mode="w|", format=tarfile.PAX_FORMAT) as tar:  # pyright: ignore[reportArgumentType, reportCallIssue]
        for path in paths:
            _add(tar, root / path, path)
    return digest.sha256.hexdigest()


def _add(tar: tarfile.TarFile, source: Path, name: str) -> None:
    entry = tarfile.TarInfo(name)
    if source.is_symlink():
        entry.type, entry.linkname = tarfile.SYMTYPE, str(source.readlink())
        tar.addfile(entry)
        return
    content = source.read_bytes()
    entry.size = len(content)
    entry.mode = 0o755 if source.stat().st_mode & stat.S_IXUSR else 0o644
    tar.addfile(entry, io.BytesIO(content))


class _DigestingSink:
    """A file that knows the digest of what has been written to it."""

    def __init__(self, sink: BinaryIO) -> None:
        self.sha256 = hashlib.sha256()
        self._sink = sink

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self._sink.write(data)
