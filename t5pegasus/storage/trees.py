"""Folders as wholes: copied so that the manifest, which commits them, comes last."""

import shutil
from pathlib import Path

from t5pegasus.storage.files import copy_file, list_files
from t5pegasus.storage.paths import is_remote

MANIFEST = "manifest.json"


def copy_tree(source: Path, target: Path) -> None:
    """Copy all files below a folder, the manifest at its top last; what else lies at the target stays.

    Raises:
        OSError: if disk or store fails; the target then has no manifest yet, or still its old one.
    """
    if not is_remote(source) and not is_remote(target):
        shutil.copytree(source, target, dirs_exist_ok=True)
        return
    from t5pegasus.storage.transfer import transfer_all

    names = list(list_files(source))
    if not is_remote(target):
        for folder in {(target / name).parent for name in names}:
            folder.mkdir(parents=True, exist_ok=True)
    transfer_all((source / name, target / name) for name in names if name != MANIFEST)
    if MANIFEST in names:
        copy_file(source / MANIFEST, target / MANIFEST)
