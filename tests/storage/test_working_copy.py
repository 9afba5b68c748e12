import contextlib
import time
from pathlib import Path
from typing import Any

import pytest

from t5pegasus.errors import DataError, UsageError
from t5pegasus.storage import Claim, list_files, working_copy


def test_a_local_run_is_its_own_working_copy(tmp_path: Path):
    with working_copy(tmp_path, Claim(tmp_path).take()) as copy:
        assert copy.path == tmp_path
        copy.push()
    assert list_files(tmp_path).keys() == {"writers/000001.json"}


def test_what_grows_is_in_the_store_and_comes_back(remote: Any, own_cache: Path):
    with working_copy(remote, Claim(remote).take()) as copy:
        (copy.path / "metrics.jsonl").write_text("1\n")
        (copy.path / "tensorboard").mkdir()
        (copy.path / "tensorboard" / "events.1").write_bytes(b"events")
        copy.push()
        assert (remote / "metrics.jsonl").read_text() == "1\n"
        with (copy.path / "metrics.jsonl").open("a") as file:
            file.write("2\n")
    assert (remote / "metrics.jsonl").read_text() == "1\n2\n"
    assert (remote / "tensorboard" / "events.1").read_bytes() == b"events"
    with working_copy(remote, Claim(remote).take()) as copy:
        assert list_files(copy.path) == {"metrics.jsonl": 4}
    assert [path for path in own_cache.rglob("*") if path.is_file() and path.suffix != ".lock"] == []


def test_only_what_changed_is_put(remote: Any, faults: Any):
    with working_copy(remote, Claim(remote).take()) as copy:
        (copy.path / "a").write_text("a")
        (copy.path / "b").write_text("b")
        copy.push()
        faults.calls.clear()
        (copy.path / "b").write_text("bb")
        copy.push()
    assert [name.rpartition("/")[2] for operation, name in faults.calls if operation == "pipe_file"] == ["b"]


def test_other_processes_put_what_they_have_at_the_end_and_take_nothing_over(remote: Any):
    with working_copy(remote, None) as copy:
        (copy.path / "trace").write_text("x")
        copy.push()
        assert list_files(remote) == {}
    assert list_files(remote) == {"trace": 1}


def test_the_thread_puts_what_changed(remote: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("t5pegasus.storage.mirror._EVERY_SECONDS", 0.01)
    with working_copy(remote, Claim(remote).take()) as copy:
        (copy.path / "metrics.jsonl").write_text("1\n")
        deadline = time.monotonic() + 30
        while not (remote / "metrics.jsonl").exists():
            assert time.monotonic() < deadline


def test_a_run_has_one_writer_the_last(remote: Any):
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.raises(UsageError, match=f"{remote} was taken over by process"))
        first = stack.enter_context(working_copy(remote, Claim(remote).take()))
        (first.path / "metrics.jsonl").write_text("first\n")
        first.push()
        with working_copy(remote, Claim(remote).take()) as second:
            assert (second.path / "metrics.jsonl").read_text() == "first\n"
            (second.path / "metrics.jsonl").write_text("second\n")
            second.push()
            (first.path / "metrics.jsonl").write_text("over it\n")
            with pytest.raises(UsageError, match="taken over"):
                first.push()
    assert (remote / "metrics.jsonl").read_text() == "second\n"
    assert {"writers/000001.json", "writers/000002.json"} <= list_files(remote).keys()


def test_a_store_that_fails_at_the_end_is_an_error(remote: Any, faults: Any):
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.raises(OSError, match="no answer"))
        copy = stack.enter_context(working_copy(remote, Claim(remote).take()))
        (copy.path / "metrics.jsonl").write_text("1\n")
        faults.plan("pipe_file", forever=TimeoutError("no answer"))


def test_what_failed_before_the_store_is_what_is_reported(remote: Any, faults: Any):
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.raises(DataError, match="the reason"))
        copy = stack.enter_context(working_copy(remote, Claim(remote).take()))
        (copy.path / "metrics.jsonl").write_text("1\n")
        faults.plan("pipe_file", forever=TimeoutError("no answer"))
        raise DataError("the reason")
