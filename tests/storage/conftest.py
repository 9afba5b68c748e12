import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from google_store import BUCKET, GoogleStore, run_google_store, stop_the_clock

from t5pegasus.storage import open_path

_bucket = itertools.count()
_PLACES = {"memory": "remote", "google": "bucket"}
OPERATIONS = ("cat_file", "pipe_file", "info", "find", "ls", "rm_file", "cp_file")


class Faults:
    """What the store in memory does wrong: of each operation, what happens to its next calls."""

    def __init__(self) -> None:
        self.planned: dict[str, list[Any]] = {}
        self.calls: list[tuple[str, str]] = []
        self.pauses: list[float] = []

    def plan(self, operation: str, *faults: Any, forever: Any = None) -> None:
        """Each fault is an exception, None for none, or a function of (the operation, its arguments)."""
        self.planned[operation] = [*faults, *([forever] * 10_000 if forever is not None else [])]

    def count(self, operation: str) -> int:
        return sum(name == operation for name, _ in self.calls)

    def meet(self, name: str, operation: Callable[..., Any], args: Any, options: Any) -> Any:
        self.calls.append((name, str(args[0])))
        fault = self.planned[name].pop(0) if self.planned.get(name) else None
        if isinstance(fault, Exception):
            raise fault
        return operation(*args, **options) if fault is None else fault(operation, *args, **options)


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    faults = Faults()

    def patch(name: str, original: Any) -> None:
        def wrapped(self: Any, *args: Any, **options: Any) -> Any:
            return faults.meet(name, lambda *args, **options: original(self, *args, **options), args, options)

        monkeypatch.setattr(MemoryFileSystem, name, wrapped)

    for name in OPERATIONS:
        patch(name, getattr(MemoryFileSystem, name))
    faults.pauses = stop_the_clock(monkeypatch)
    return faults


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Any:
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("T5PEGASUS_CACHE", str(path))
    return path


@pytest.fixture
def remote() -> Iterator[Any]:
    """An empty place in the store in memory."""
    bucket = f"bucket-{next(_bucket)}"
    yield open_path(f"memory://{bucket}/place")
    for name in [name for name in MemoryFileSystem.store if name.startswith(f"/{bucket}/")]:
        del MemoryFileSystem.store[name]


@pytest.fixture(scope="module")
def google() -> Iterator[GoogleStore]:
    with run_google_store() as store:
        yield store


@pytest.fixture
def bucket(google: GoogleStore) -> Any:
    """An empty place in a bucket of Google's, as gcsfs sees it."""
    return open_path(f"gs://{BUCKET}/place-{next(_bucket)}")


@pytest.fixture(params=["disk", "memory", "google"])
def place(request: pytest.FixtureRequest, tmp_path: Any) -> Any:
    """An empty folder, on the disk and in stores."""
    return tmp_path if request.param == "disk" else request.getfixturevalue(_PLACES[request.param])
