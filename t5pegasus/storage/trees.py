"""Folders as wholes: copied so that the manifest, which commits them, comes last."""

import shutil
from pathlib import Path

from t5pegasus.storage.files import copy_file, list_files
from t5pegasus.storage.paths import is_remote

MARKS = ("manifest.json", "tokenizer.json", "SHA256SUMS")
"""Files at the top of a folder that are written last, and so tell that it is whole."""


def copy_tree(source: Path, target: Path) -> None:
    """Copy all files below a folder, what says that it is whole (`MARKS`) last; what else lies at the target stays.

    Raises:
        OSError: if disk or store fails.
    """
    if not is_remote(source) and not is_remote(target):
        shutil.copytree(source, target, dirs_exist_ok=True)
        return
    from t5pegasus.storage.transfer import transfer_all

    names = list(list_files(source))
    if not is_remote(target):
        for folder in {(target / name).parent for name in names}:
            folder.mkdir(parents=True, exist_ok=True)
    transfer_all((source / name, target / name) for name in names if name not in MARKS)
    for name in MARKS:
        if name in names:
            copy_file(source / name, target / name)
