"""What every test starts from: eight CPU devices, strict shapes, nothing left from earlier runs."""

import os
import tempfile
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

settings.register_profile("same examples every time", derandomize=True, database=None, deadline=None)
settings.load_profile("same examples every time")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real Chinese text; it is not part of the repository, and tests that need it skip without it."""
    path = Path(os.environ.get("T5PEGASUS_DATA") or REPOSITORY.parent / "shared" / "data")
    if not path.is_dir():
        pytest.skip(f"no real text at {path}; T5PEGASUS_DATA can name another folder")
    return path
