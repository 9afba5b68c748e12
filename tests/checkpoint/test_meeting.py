"""Laws of several processes that write one checkpoint: they meet by files, and none waits for ever."""

import errno
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import t5pegasus.checkpoint.save
from t5pegasus.arrays import load_arrays
from t5pegasus.checkpoint import CheckpointWriter, Retention, finish_saves, list_checkpoints, verify_checkpoint
from t5pegasus.checkpoint.meeting import Meeting
from t5pegasus.checkpoint.save import write_checkpoint
from t5pegasus.checkpoint.snapshot import Snapshot, take_snapshot
from tests.checkpoint.conftest import draw_arrays, info_of, save_step, write_tokenizer

TOKEN = "0123-1"


def divide(step, count):
    """The chunks of a checkpoint, dealt to so many processes."""
    whole = take_snapshot(draw_arrays(step))
    return [Snapshot(whole.descriptions, whole.chunks[index::count]) for index in range(count)]


def write(run_path, snapshots, index, time_limit, token=TOKEN):
    step = 2
    path = run_path / "checkpoints" / str(step)
    meeting = Meeting(path, token, (index, len(snapshots)), time_limit)
    write_checkpoint(meeting, snapshots[index], info_of(step), write_tokenizer(run_path))


def write_together(run_path, snapshots, indices, time_limit):
    """Each process's error, None where it has none."""
    with ThreadPoolExecutor(len(indices)) as pool:
        futures = [pool.submit(write, run_path, snapshots, index, time_limit) for index in indices]
        return [future.exception() for future in futures]


def test_three_processes_write_what_one_would(tmp_path):
    assert write_together(tmp_path, divide(2, 3), (2, 0, 1), 60) == [None, None, None]
    verify_checkpoint(tmp_path / "checkpoints" / "2")
    stored = load_arrays(tmp_path / "checkpoints" / "2")
    for name, array in draw_arrays(2).items():
        np.testing.assert_array_equal(stored[name], array)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]


def test_a_process_that_never_comes_is_named_and_the_others_go_on_without_the_checkpoint(tmp_path):
    save_step(tmp_path, 1)
    errors = write_together(tmp_path, divide(2, 3), (0, 1), 0.5)
    assert [error.errno for error in errors] == [errno.ETIMEDOUT, errno.EIO]
    assert "process 2 has not handed in its part within" in str(errors[0])
    assert "process 0 gave this checkpoint up" in str(errors[1])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
    verify_checkpoint(tmp_path / "checkpoints" / "1")


def test_a_process_whose_disk_is_full_ends_the_save_of_all_at_once(tmp_path, monkeypatch):
    save_step(tmp_path, 1)
    snapshots = divide(2, 2)
    write_chunk, full = t5pegasus.checkpoint.save.write_chunk, {chunk.file for chunk in snapshots[1].chunks}

    def write_or_fail(path, chunk):
        if any(str(path).endswith(file) for file in full):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_chunk(path, chunk)

    monkeypatch.setattr(t5pegasus.checkpoint.save, "write_chunk", write_or_fail)
    errors = write_together(tmp_path, snapshots, (0, 1), 60)
    assert "process 1 failed: OSError: [Errno 28]" in str(errors[0])
    assert errors[1].errno == errno.ENOSPC
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_without_the_first_process_the_others_do_not_wait_for_ever(tmp_path):
    (error,) = write_together(tmp_path, divide(2, 2), (1,), 0.2)
    assert error.errno == errno.ETIMEDOUT
    assert "process 0 has not begun" in str(error)


def test_what_an_earlier_attempt_left_is_taken_for_nothing(tmp_path):
    """Killed after all parts were in: the next attempt's parts have another token, and are waited for."""
    snapshots = divide(2, 2)
    left = Meeting(tmp_path / "checkpoints" / "2", "4567-1", (1, 2))
    (tmp_path / "checkpoints" / "2.parts").mkdir(parents=True)
    left.hand_in({"arrays/step/c": {"bytes": 4, "sha256": "0" * 64}})
    (error,) = write_together(tmp_path, snapshots, (0,), 0.2)
    assert "process 1 has not handed in" in str(error)
    assert write_together(tmp_path, snapshots, (0, 1), 60) == [None, None]
    finish_saves(tmp_path)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["2"]


def test_where_the_first_process_cannot_clean_up_the_others_are_told_all_the_same(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    remove_tree = t5pegasus.checkpoint.save.remove_tree
    monkeypatch.setattr(t5pegasus.checkpoint.save, "commit_checkpoint", fail)
    monkeypatch.setattr(t5pegasus.checkpoint.save, "remove_tree", fail)  # as when others still write there
    first, second = write_together(tmp_path, divide(2, 2), (0, 1), 5)
    assert "Input/output error" in str(first)
    assert "process 0 gave this checkpoint up" in str(second)
    remove_tree(tmp_path / "checkpoints")


def test_behind_an_error_that_all_raise_the_save_on_its_way_is_finished(tmp_path, monkeypatch):
    """What they do next, such as going back to the last checkpoint, must not meet it."""
    write_tokenizer(tmp_path)
    write_chunk, gate = t5pegasus.checkpoint.save.write_chunk, threading.Event()

    def wait_and_write(path, chunk):
        assert gate.wait(60)
        return write_chunk(path, chunk)

    monkeypatch.setattr(t5pegasus.checkpoint.save, "write_chunk", wait_and_write)

    def save_and_fail(writer):
        with writer:
            writer.save(draw_arrays(1), info_of(1), Retention(last=1))
            threading.Timer(0.2, gate.set).start()
            raise ZeroDivisionError

    def train(index):
        writer = CheckpointWriter(tmp_path, common_errors=(ArithmeticError,))
        writer._process, writer._token = (index, 2), "0123"
        with pytest.raises(ZeroDivisionError):
            save_and_fail(writer)
        assert [path.name for path in list_checkpoints(tmp_path)] == ["1"]

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(train, (0, 1)))
    verify_checkpoint(tmp_path / "checkpoints" / "1")
