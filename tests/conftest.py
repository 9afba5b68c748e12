"""What every test starts from: eight CPU devices, strict shapes, nothing left from earlier runs."""

import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

REPOSITORY = Path(__file__).resolve().parent.parent

# JAX reads these when it is imported, which only the tests that need it do; processes they start inherit them.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# A program that several tests run is compiled once: into a folder that goes when the tests end.
_compiled = tempfile.TemporaryDirectory(prefix="t5pegasus-tests-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

_MANY_MAPS = 25_000
"""Of the 65,530 that Linux gives a process; a module of tests adds 8,000 at most."""

settings.register_profile("same examples every time", derandomize=True, database=None, deadline=None)
settings.load_profile("same examples every time")

DATA = Path(os.environ.get("T5PEGASUS_DATA") or REPOSITORY.parent / "shared" / "data")
DATA_IS_REQUIRED = os.environ.get("T5PEGASUS_PARITY") == "required"
PEERS_ARE_REQUIRED = os.environ.get("T5PEGASUS_PEERS") == "required"


@pytest.fixture(scope="module", autouse=True)
def _forget_programs() -> Iterator[None]:
    """Let go of compiled programs when they are many: each holds memory maps, and XLA crashes where none is left."""
    yield
    maps = Path("/proc/self/maps")
    if "jax" in sys.modules and maps.exists() and len(maps.read_bytes().splitlines()) > _MANY_MAPS:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real Chinese text and golden cases; it is not part of the repository.

    Without it `make test` skips the tests that need it, `make test-parity` fails.
    """
    if not DATA.is_dir():
        missing = f"no real text and golden cases at {DATA}; T5PEGASUS_DATA=folder names another place"
        if DATA_IS_REQUIRED:
            pytest.fail(missing, pytrace=False)
        pytest.skip(missing)
    return DATA


@pytest.hookimpl(tryfirst=True)  # before -m reads the markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whoever asks for the shared data is a parity test; nobody has to remember the marker. Long files go first."""
    for item in items:
        if "shared_data" in getattr(item, "fixturenames", ()):
            item.add_marker("parity")
    # So that no process is left with a long file when the others are done (make test gives whole files to processes).
    items.sort(key=lambda item: (item.path.name != "test_whole_flow.py", item.path.parent.name != "train"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    """A test that skips where its data or its peers were promised has failed."""
    report = yield
    needs_data = item.get_closest_marker("parity") is not None
    needs_peers = item.get_closest_marker("peers") is not None
    without_data = needs_data and not DATA.is_dir() and not DATA_IS_REQUIRED
    if DATA_IS_REQUIRED or (PEERS_ARE_REQUIRED and needs_peers and not without_data):
        _fail_if_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    """A module that skips as a whole (`pytest.importorskip`) has failed as well."""
    report = yield
    if DATA_IS_REQUIRED or PEERS_ARE_REQUIRED:
        _fail_if_skipped(report)
    return report


def _fail_if_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid} was skipped, and in this run nothing may be: {reason}"
