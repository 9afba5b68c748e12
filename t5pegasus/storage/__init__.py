"""Artifacts on this machine's disks and in object stores, through one set of functions.

A path is a `pathlib.Path`, or for `gs://bucket/name` a `universal_pathlib` path of the same methods (typed as Path
throughout). An object store has no rename and no append, and its folders are only prefixes of names: whatever is to be
whole or absent there is one object, and a folder is whole when the manifest that was written last is there.

Nothing here imports fsspec for a local path, and gcsfs is imported when the first `gs://` path is opened.
"""

from t5pegasus.storage.claim import Claim, TakenOverError
from t5pegasus.storage.fetched import cache_path, fetch, staged_path
from t5pegasus.storage.files import copy_file, flush, list_files, read_range, remove_tree, write_bytes
from t5pegasus.storage.mirror import WorkingCopy, working_copy
from t5pegasus.storage.paths import is_remote, is_remote_text, open_path
from t5pegasus.storage.trees import copy_tree, publish, require_unused

__all__ = [
    "Claim",
    "TakenOverError",
    "WorkingCopy",
    "cache_path",
    "copy_file",
    "copy_tree",
    "fetch",
    "flush",
    "is_remote",
    "is_remote_text",
    "list_files",
    "open_path",
    "publish",
    "read_range",
    "remove_tree",
    "require_unused",
    "staged_path",
    "working_copy",
    "write_bytes",
]
