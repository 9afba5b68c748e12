"""Folders as wholes: copied so that the manifest, which commits them, comes last."""

import shutil
from pathlib import Path

from t5pegasus.errors import UsageError
from t5pegasus.storage.files import copy_file, list_files, remove_tree, write_bytes
from t5pegasus.storage.paths import is_remote

MARKS = ("manifest.json", "tokenizer.json", "SHA256SUMS")
"""Files that are written last into a folder, and so tell that it is whole."""


_UNFINISHED = ".unfinished"
"""In a folder that is on its way into a store."""


def copy_tree(source: Path, target: Path) -> None:
    """Copy all files below a folder, what says that it is whole (`MARKS`) last; what else lies at the target stays.

    Raises:
        OSError: if disk or store fails.
    """
    if not is_remote(source) and not is_remote(target):
        shutil.copytree(source, target, dirs_exist_ok=True)
        return
    names = list(list_files(source))
    _transfer_all_but_marks(source, target, names)
    _transfer_marks(source, target, names)


def publish(folder: Path, output: Path) -> None:
    """Give a local folder that is whole its place: a name on the same disk, or objects in a store.

    Raises:
        OSError: if disk or store fails; in a store `require_unused` then allows to do it again.
    """
    if not is_remote(output):
        folder.rename(output)
        return
    names = list(list_files(folder))
    write_bytes(output / _UNFINISHED, b"")
    _transfer_all_but_marks(folder, output, names)
    _transfer_marks(folder, output, names)
    (output / _UNFINISHED).unlink(missing_ok=True)  # tried again after an answer that was lost
    shutil.rmtree(folder)


def require_unused(output: Path) -> None:
    """Refuse an address in a store where something lies; what an interrupted `publish` left is removed.

    Raises:
        UsageError: naming what lies there.
    """
    there = list_files(output)
    if _UNFINISHED in there:
        remove_tree(output)
    elif there:
        raise UsageError(f"output {output} is in use: {next(iter(there))} lies there; remove it, or choose another one")


def _transfer_all_but_marks(source: Path, target: Path, names: list[str]) -> None:
    from t5pegasus.storage.transfer import transfer_all

    if not is_remote(target):
        for folder in {(target / name).parent for name in names}:
            folder.mkdir(parents=True, exist_ok=True)
    transfer_all((source / name, target / name) for name in names if not _is_mark(name))


def _transfer_marks(source: Path, target: Path, names: list[str]) -> None:
    for name in sorted(filter(_is_mark, names), key=lambda name: (-name.count("/"), MARKS.index(name.split("/")[-1]))):
        copy_file(source / name, target / name)


def _is_mark(name: str) -> bool:
    return name.rpartition("/")[2] in MARKS
