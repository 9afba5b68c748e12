"""From text to a path: local text becomes a `pathlib.Path`, `gs://…` a path in an object store."""

import re
from importlib import import_module
from pathlib import Path, PurePath

from t5pegasus.errors import UsageError

_URL = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://(.*)$", re.DOTALL)
_NEEDED = {"gs": ("gcsfs", "t5pegasus[gcs]"), "s3": ("s3fs", "s3fs"), "memory": ("fsspec", "fsspec")}
"""Scheme → the module that reaches such a store, and what to install for it."""


def is_remote(path: Path) -> bool:
    """Whether a path lies in an object store."""
    return not isinstance(path, PurePath)


def is_remote_text(text: str) -> bool:
    """Whether text is the address of something in an object store, such as `gs://bucket/run`."""
    found = _URL.match(text)
    return found is not None and found[1].lower() != "file"


def open_path(text: str) -> Path:
    """The path that a user means by text.

    Args:
        text: a local path, `file:///…`, or `gs://bucket/name` (also `s3://…`, and `memory://…` within one process).

    Returns:
        A `pathlib.Path`, or a path of the same methods in an object store.

    Raises:
        UsageError: if the scheme is none of these, the bucket is missing, or the extra for it is not installed.
    """
    found = _URL.match(text)
    if found is None:
        return Path(text)
    scheme, rest = found[1].lower(), found[2]
    if scheme == "file":
        return Path(rest)
    scheme = {"gcs": "gs"}.get(scheme, scheme)
    if scheme not in _NEEDED:
        raise UsageError(f"{text}: {scheme}:// is not known; give a local path, or gs://BUCKET/NAME")
    parts = rest.strip("/").split("/")
    if not parts[0] or any(part in ("", ".", "..") for part in parts):
        raise UsageError(f"{text} names no place in a store; wanted is {scheme}://BUCKET/NAME, without . and ..")
    module, package = _NEEDED[scheme]
    try:
        import_module(module)
    except ImportError:
        raise UsageError(f"{text}: reaching {scheme}:// takes {module}; pip install '{package}'") from None
    from t5pegasus.storage.remote_path import remote_path

    return remote_path(scheme, "/".join(parts))
