"""Laws of one attempt: it leaves nothing it should not, takes nothing it should not, and ends when it must."""

import signal
import subprocess
import sys

import pytest

from launch.attempt import Attempt
from launch.watch_config import WatchConfig
from t5pegasus.errors import UsageError
from t5pegasus.storage import list_files, open_path, write_bytes
from t5pegasus.train.control import Request

BLOCKED = """
import sys, threading, time
from launch.attempt import Attempt
from launch.verdicts import Verdict

threading.Thread(target=lambda: sys.stderr.write("x" * 1_000_000), daemon=True).start()
time.sleep(0.5)
Attempt(["pretrain"])._leave(Verdict(134, "stuck", "why", 0))
"""


@pytest.fixture(params=["disk", "memory"])
def run_path(request, tmp_path):
    return tmp_path / "run" if request.param == "disk" else open_path("memory://attempts/run")


def refuse(run_path, meanwhile):
    def command():
        with Attempt(["pretrain"]) as attempt:
            attempt.join(run_path, WatchConfig())
            attempt.begin({})
            attempt.watchdog.look()
            meanwhile()
            raise UsageError("begun with another learning rate")

    with pytest.raises(UsageError):
        command()


def test_a_command_that_is_refused_leaves_nothing(run_path):
    found = []
    refuse(run_path, lambda: found.extend(list_files(run_path)))
    assert found == ["attempts/1/process-0.json"]
    assert not run_path.exists()


def test_a_command_that_is_refused_takes_nothing_of_the_run(run_path):
    for name in ("checkpoints/4/manifest.json", "attempts/1/process-0.json", "config.json"):
        (run_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(run_path / name, b"{}")
    before, other = list_files(run_path), "attempts/2/process-0.stacks.txt"
    refuse(run_path, lambda: write_bytes(run_path / other, b"of somebody else"))
    assert list_files(run_path) == before | {other: 16}


@pytest.mark.parametrize(("save_seconds", "part_seconds"), [(1800, 900), (7200, 3600), (0, float("inf"))])
def test_slow_storage_is_given_longer_by_one_limit(save_seconds, part_seconds, tmp_path):
    with Attempt(["pretrain"]) as attempt:
        attempt.join(tmp_path, WatchConfig(save_seconds=save_seconds))
        assert attempt.control.part_seconds == part_seconds


def test_a_folder_that_cannot_be_read_does_not_keep_a_request_to_stop_from_being_heard(tmp_path):
    (tmp_path / "checkpoints").symlink_to("checkpoints")
    attempt = Attempt(["pretrain"])
    attempt.run_path, attempt.limits, attempt.control.first_step = tmp_path, WatchConfig(grace_seconds=1000), 0
    try:
        attempt._answer(signal.SIGTERM)
        assert attempt.control.requests == Request.STOP
        assert [timer.interval for timer in attempt._timers] == [1000]
        assert "which checkpoint is the last one cannot be read" in attempt._too_late(0).message
    finally:
        for timer in attempt._timers:
            timer.cancel()


def test_a_reader_that_reads_no_more_does_not_keep_a_process_from_ending():
    with subprocess.Popen([sys.executable, "-c", BLOCKED], stderr=subprocess.PIPE) as process:
        try:
            assert process.wait(timeout=60) == 134
        finally:
            process.kill()
