"""Laws of silence: a process is lost when it misses beats that others saw time pass for."""

import json
import types

import pytest

from launch import watchdog as module
from launch.attempts import record_path
from launch.liveness import identity
from launch.watch_config import WatchConfig
from launch.watchdog import Watchdog
from t5pegasus.train.control import Control


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass as the test says."""
    clock = types.SimpleNamespace(now=1000.0)
    times = types.SimpleNamespace(monotonic=lambda: clock.now, time=lambda: clock.now, sleep=lambda _: None)
    monkeypatch.setattr(module, "time", times)
    return clock


def watch(folder, num_processes, **limits) -> Watchdog:
    """The watchdog of process 0, beside a process 1 of this machine that beats no more."""
    record = {
        "schema": 1, "process": 1, "num_processes": num_processes, "pid": 1, "host": "h1", "identity": identity(),
        "beat": {"count": 7, "activity": "device", "step": 5, "since": 1.0, "time": 0.0}, "ended": None, "pace": None,
    }  # fmt: skip
    record_path(folder, 1).write_text(json.dumps(record), encoding="utf-8")

    def write(news):
        return record | {"process": 0, **news}

    limits = WatchConfig(step_seconds=0, start_seconds=0, **limits)
    return Watchdog(folder, 0, num_processes, Control(), limits, write, lambda verdict: None)


def look_for(watchdog, clock, seconds):
    """The verdict, if there is one before so many seconds have passed."""
    for _ in range(int(seconds / watchdog.interval)):
        clock.now += watchdog.interval
        if (verdict := watchdog.look()) is not None:
            return verdict
    return None


def test_a_process_that_beats_no_more_is_lost(tmp_path, clock):
    watchdog = watch(tmp_path, 2, heartbeat_seconds=30)
    assert watchdog.look() is None
    assert look_for(watchdog, clock, 30) is None
    verdict = look_for(watchdog, clock, 3)
    assert (verdict.code, verdict.blamed) == (134, 1)
    assert "no sign of life for 31 s" in verdict.message


def test_while_nobody_could_look_nobody_was_silent(tmp_path, clock):
    watchdog = watch(tmp_path, 2, heartbeat_seconds=30)
    assert watchdog.look() is None
    clock.now += 120.0  # what all of them write to did not answer, or this process was stopped
    assert watchdog.look() is None
    assert look_for(watchdog, clock, 20) is None
    assert look_for(watchdog, clock, 20).blamed == 1


def test_beats_that_come_rarely_are_waited_for(tmp_path, clock):
    watchdog = watch(tmp_path, 1024, heartbeat_seconds=5)
    assert watchdog.look() is None
    assert look_for(watchdog, clock, 2.5 * watchdog.interval) is None
    assert look_for(watchdog, clock, 3 * watchdog.interval).blamed == 1


def test_what_explains_a_failure_is_named_with_its_seconds(tmp_path, clock):
    watchdog = watch(tmp_path, 2, heartbeat_seconds=0)

    def sleep(seconds):
        clock.now += seconds

    module.time.sleep = sleep
    verdict = watchdog.find_culprit(3.0)
    assert verdict.blamed == 1
    assert "no sign of life for 3 s" in verdict.message


def test_stacks_are_shown_and_where_they_cannot_be_that_is_said(tmp_path, monkeypatch, capfd):
    watchdog = watch(tmp_path, 2)
    watchdog.dump_stacks()
    assert "in test_stacks_are_shown" in capfd.readouterr().err
    assert "in test_stacks_are_shown" in (tmp_path / "process-0.stacks.txt").read_text()
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp_path / "none"))
        watchdog.dump_stacks()
    assert "it cannot be shown: [Errno 2]" in capfd.readouterr().err
