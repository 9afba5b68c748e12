"""Laws of several processes that write one checkpoint: they meet by files, and none waits for ever."""

import errno
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import t5pegasus.checkpoint.meeting
import t5pegasus.checkpoint.save
import t5pegasus.checkpoint.writer
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


def write_together(run_path, snapshots, indices, time_limit, token=TOKEN):
    """Each process's error, None where it has none."""
    with ThreadPoolExecutor(len(indices)) as pool:
        futures = [pool.submit(write, run_path, snapshots, index, time_limit, token) for index in indices]
        return [future.exception() for future in futures]


def left_in(run_path):
    """Checkpoints, whole or not; what was said in a meeting stays until the next save."""
    return {path.name for path in (run_path / "checkpoints").iterdir()} - {"2.parts"}


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
    assert left_in(tmp_path) == {"1"}
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
    assert left_in(tmp_path) == {"1"}


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
    assert write_together(tmp_path, snapshots, (0, 1), 60, "0123-2") == [None, None]
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


class Disk:
    """That fails whoever comes to a place in the save of these steps, there and in the rest of that save."""

    def __init__(self, place, steps, monkeypatch):
        meeting, save, writer = t5pegasus.checkpoint.meeting, t5pegasus.checkpoint.save, t5pegasus.checkpoint.writer
        self.place, self.steps, self.thread, self.patch = place, steps, threading.local(), monkeypatch.setattr
        self.watch(save, "make_unfinished_folder", "first's begin")
        self.watch(save, "commit_checkpoint", "first's commit")
        self.watch(meeting, "remove_tree", "first's end")
        self.watch(writer, "remove_old_checkpoints", "first's retention")
        self.watch(Meeting, "hand_in", "second's part", index=1)
        self.watch(Meeting, "wait_for_end", "second's look", index=1)
        self.watch(meeting, "write_bytes")
        self.watch(meeting, "read_json")
        write_checkpoint = writer.write_checkpoint

        def begin(at, *args):
            self.thread.at, self.thread.fails = at, False
            return write_checkpoint(at, *args)

        self.patch(writer, "write_checkpoint", begin)

    def watch(self, owner, name, place="", index=0):
        act = getattr(owner, name)

        def act_or_fail(*args):
            at = getattr(self.thread, "at", None)  # None in front of a save
            if at is not None and (place, at.index) == (self.place, index) and int(at.path.name) in self.steps:
                self.thread.fails = True
            if getattr(self.thread, "fails", False) and owner is not Meeting:
                raise OSError(errno.EIO, "Input/output error")
            return act(*args)

        self.patch(owner, name, act_or_fail)


PLACES = [
    "first's begin", "first's commit", "first's end", "first's retention", "second's part", "second's look",
]  # fmt: skip


@pytest.mark.parametrize("steps", [{2}, {2, 3}], ids=["once", "twice"])
@pytest.mark.parametrize("place", PLACES)
def test_whoever_failed_at_a_save_and_whoever_knows_all_meet_again_at_the_next(place, steps, tmp_path, monkeypatch):
    """Not even who failed can always say so: then the others are told in front of the next one."""
    save_step(tmp_path, 1)
    Disk(place, steps, monkeypatch)

    def snapshot(arrays, index, memory):
        whole = take_snapshot(arrays)
        return Snapshot(whole.descriptions, whole.chunks[index::2])

    monkeypatch.setattr(t5pegasus.checkpoint.writer, "take_snapshot", snapshot)

    def train(index):
        # A disk that fails twice lets nobody say so: who waits does so to the end.
        writer = CheckpointWriter(tmp_path, time_limit=60 if steps == {2} else 0.5)
        writer._process, writer._token = (index, 2), "0123"
        writer.save(draw_arrays(2), info_of(2), Retention(last=1))
        writer.save(draw_arrays(3), info_of(3), Retention(last=1))
        writer.finish()

    with ThreadPoolExecutor(2) as pool:
        errors = [future.exception() for future in [pool.submit(train, index) for index in (0, 1)]]
    if steps == {2}:
        assert errors == [None, None]
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]
        verify_checkpoint(tmp_path / "checkpoints" / "3")
    else:
        assert any(isinstance(error, OSError) for error in errors)
        verify_checkpoint(list_checkpoints(tmp_path)[0])
