"""JAX keeps its compiled programs in a bucket, where another host finds them."""

import os
import subprocess
import sys
from typing import Any

import pytest
from google_store import BUCKET, GoogleStore

from launch.processes import _shared_cache
from t5pegasus.errors import UsageError
from t5pegasus.storage import list_files, open_path

_PROGRAM = """
from launch.processes import init_distributed
init_distributed()
import jax, jax.numpy as jnp
from jax._src import monitoring
seen = []
monitoring.register_event_listener(lambda event, **_: seen.append(event.rpartition("/")[2]))
print(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((3, 3)))[0, 0])
print(seen.count("cache_hits"), seen.count("cache_misses"))
"""


@pytest.mark.slow  # two processes that import JAX
def test_a_second_process_finds_what_the_first_compiled(google: GoogleStore):
    address = f"gs://{BUCKET}/compiled"
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": address,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    ended = [
        subprocess.run([sys.executable, "-c", _PROGRAM], env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    (first, (hits, misses)), (second, (hits_after, misses_after)) = (
        (lines[0], map(int, lines[1].split())) for lines in (each.stdout.splitlines() for each in ended)
    )
    assert first == second
    assert hits == 0 < misses
    assert (hits_after, misses_after) == (misses, 0)
    assert all("/" in name for name in list_files(open_path(address)))  # below the kind of CPU


def test_a_place_where_jax_keeps_nothing_is_refused(monkeypatch: Any):
    with pytest.raises(UsageError, match="memory://bucket/x: JAX keeps compiled programs in gs:// or s3://"):
        _shared_cache("memory://bucket/x")
    with pytest.raises(UsageError, match="ftp:// is not known"):
        _shared_cache("ftp://host/x")
    once = _shared_cache("gs://bucket/x/")
    assert once == _shared_cache(once)
    assert once.startswith("gs://bucket/x/")
