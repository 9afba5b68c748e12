import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.backends.local import Ending, _blame, run_locally
from t5pegasus.errors import UsageError

SUM_OVER_ALL_DEVICES = """
import sys
from launch.processes import init_distributed

init_distributed()
import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

print("from the start")
mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
sharding = NamedSharding(mesh, PartitionSpec("data"))
numbers = jax.make_array_from_callback((6,), sharding, lambda index: jax.numpy.arange(1.0, 7.0)[index])
total = jax.jit(
    jax.shard_map(
        lambda x: jax.lax.psum(x.sum(), "data"), mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec()
    )
)(numbers)
print("total", float(total), "of", jax.process_count(), "processes,", jax.device_count(), "devices")
"""

FAIL_IN_PROCESS_1 = """
import sys, time
from launch import cli, processes
from t5pegasus.errors import DataError

def wait_or_fail(argv):
    processes.init_distributed()
    import jax
    if jax.process_index() == 1:
        raise DataError("record 7 is torn")
    time.sleep(600)

module = type(sys)("launch.verbs.pretrain")
module.main = wait_or_fail
sys.modules[module.__name__] = module
sys.exit(cli.main(["pretrain"]))
"""

JOIN_AND_WAIT = """
import time
from launch.processes import init_distributed

init_distributed()
print("joined", flush=True)
time.sleep(600)
"""


def test_two_processes_share_one_mesh_and_results_come_once(capfdbinary):
    assert run_locally([sys.executable, "-c", SUM_OVER_ALL_DEVICES], 2, devices_per_process=3).code == 0
    captured = capfdbinary.readouterr()
    assert captured.out == b"from the start\ntotal 21.0 of 2 processes, 6 devices\n"
    assert b"[p1] total 21.0 of 2 processes, 6 devices\n" in captured.err


def test_a_failing_process_ends_the_others_and_is_blamed(capfd):
    start = time.monotonic()
    assert run_locally([sys.executable, "-c", FAIL_IN_PROCESS_1], 2).code == 44
    assert time.monotonic() - start < 120  # not the 600 s of the process that would wait
    error = capfd.readouterr().err
    assert "[p1] t5pegasus pretrain: record 7 is torn\n" in error
    assert error.endswith("process 1 of 2 ended with exit code 44\n")


def test_signals_reach_every_process_and_nothing_stays_behind(tmp_path):
    script = (
        "import sys; from launch.backends.local import run_locally; "
        f"sys.exit(run_locally([sys.executable, '-c', {JOIN_AND_WAIT!r}], 2).code)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == b"joined\n"
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(timeout=60) == 128 + signal.SIGTERM
    assert len(children) == 2
    assert not [child for child in children if Path(f"/proc/{child}").exists()]


def test_lines_stay_whole_and_marked(capfdbinary):
    script = "import os, sys; sys.stderr.write('一行\\n' * 50 + '没有换行'); print(os.environ['JAX_PROCESS_ID'])"
    assert run_locally([sys.executable, "-c", script], 2).code == 0
    captured = capfdbinary.readouterr()
    assert captured.out == b"0\n"
    lines = captured.err.decode().removesuffix("\n").split("\n")
    assert sorted(set(lines)) == ["[p0] 一行", "[p0] 没有换行", "[p1] 1", "[p1] 一行", "[p1] 没有换行"]


def test_where_nobody_takes_their_words_the_processes_go_on():
    talks = [sys.executable, "-c", "import sys; sys.stderr.write(('x' * 99 + chr(10)) * 5000); sys.exit(44)"]
    launch = f"import sys; from launch.backends.local import run_locally; sys.exit(run_locally({talks!r}, 2).code)"
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run([sys.executable, "-c", launch], stderr=full, check=False, timeout=120)
    assert ended.returncode == 44


@pytest.mark.parametrize(
    ("endings", "code"),
    [
        ([(0, 0), (1, 0)], 0),
        ([(1, 44), (0, 134)], 44),
        ([(0, 134), (1, 1)], 1),  # the abort is JAX's answer to the death of a peer
        ([(0, 134), (1, 134)], 134),
        ([(1, 137), (0, 1)], 137),  # killed from outside; its peer then failed in a collective
        ([(0, 0), (1, 44)], 44),
    ],
)
def test_the_first_to_fail_is_blamed(endings, code):
    assert _blame([Ending(*ending) for ending in endings], 2, {}) == code


def test_counts_below_one_are_refused():
    with pytest.raises(UsageError, match="processes=0"):
        run_locally(["true"], 0)
    with pytest.raises(UsageError, match="devices-per-process=0"):
        run_locally(["true"], 1, 0)


def test_a_verb_that_works_alone_is_not_run_twice():
    ended = subprocess.run(
        [sys.executable, "-m", "launch.cli", "launch", "local", "--", "build", "x"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ,
    )
    assert ended.returncode == 2
    assert ended.stderr == "t5pegasus launch: 'build' works in one process, got processes=2\n"
