"""Laws of saving while training goes on: the step's state is stored, bit for bit, whatever happens meanwhile."""

import errno
import threading
import weakref

import jax
import numpy as np
import pytest

import t5pegasus.checkpoint.save
from t5pegasus.arrays import load_arrays
from t5pegasus.checkpoint import (
    CheckpointWriter,
    Retention,
    finish_saves,
    list_checkpoints,
    save_checkpoint,
    snapshot,
    verify_checkpoint,
)
from t5pegasus.checkpoint.snapshot import Memory, take_snapshot
from t5pegasus.errors import UsageError
from t5pegasus.storage import Claim, TakenOverError
from tests.checkpoint.conftest import draw_arrays, files_of, info_of, place, save_step, write_tokenizer

MESHES = [(1, 1, 1), (8, 1, 1), (1, 4, 2), (2, 2, 2)]
KEEP = Retention(last=2)


@pytest.fixture
def slow_disk(monkeypatch):
    """Chunks wait until the gate is open."""
    gate, write_chunk = threading.Event(), t5pegasus.checkpoint.save.write_chunk

    def wait_and_write(path, chunk):
        assert gate.wait(60)
        return write_chunk(path, chunk)

    monkeypatch.setattr(t5pegasus.checkpoint.save, "write_chunk", wait_and_write)
    yield gate
    gate.set()


@pytest.mark.parametrize("sizes", MESHES)
def test_what_is_stored_is_the_state_of_the_step_although_training_goes_on(sizes, slow_disk, tmp_path):
    write_tokenizer(tmp_path)
    update = jax.jit(lambda arrays: jax.tree.map(lambda x: x * 2 + 1, arrays), donate_argnums=0)
    state, wanted = place(draw_arrays(1), sizes), draw_arrays(1)
    with CheckpointWriter(tmp_path) as writer:
        writer.save(state, info_of(1), KEEP)
        for _ in range(3):
            state = update(state)
        jax.block_until_ready(state)
        assert list_checkpoints(tmp_path) == []
        slow_disk.set()
    verify_checkpoint(tmp_path / "checkpoints" / "1")
    stored = load_arrays(tmp_path / "checkpoints" / "1")
    for name, array in wanted.items():
        np.testing.assert_array_equal(stored[name], array, err_msg=name)


@pytest.mark.parametrize("sizes", MESHES)
def test_a_snapshot_shares_no_memory_with_what_it_is_of(sizes):
    state = place(draw_arrays(1), sizes)
    shared = [np.asarray(shard.data) for array in state.values() for shard in array.addressable_shards]
    for chunk in take_snapshot(state, memory=Memory()).chunks:
        assert not any(np.shares_memory(chunk.values, each) for each in shared)


def test_saved_behind_the_back_or_waited_for_the_bytes_are_the_same(tmp_path):
    state = place(draw_arrays(3), (1, 4, 2))
    for name in ("sync", "async"):
        write_tokenizer(tmp_path / name)
    save_checkpoint(tmp_path / "sync" / "checkpoints" / "3", state, info_of(3), tmp_path / "sync" / "tokenizer")
    with CheckpointWriter(tmp_path / "async") as writer:
        writer.save(state, info_of(3), KEEP)
    assert files_of(tmp_path / "sync") == files_of(tmp_path / "async")


def hold_as_two_processes(array):
    """As `snapshot._list_holders` would say, were every other device another process's."""
    held = {}
    indices = array.sharding.devices_indices_map(array.shape)
    for device, index in sorted(indices.items(), key=lambda item: item[0].id):
        held.setdefault(snapshot.find_bounds(index, array.shape), []).append(device.id % 2)
    return held


def test_what_replicas_share_leaves_a_device_a_few_chunks_at_a_time(monkeypatch):
    """A copy of all of it would take the device's memory in every save."""
    state, cut, cuts, alive = place(draw_arrays(1), (2, 1, 1)), jax.lax.dynamic_slice, [], []

    def cut_and_count(*args):
        piece = cut(*args)
        cuts.append(weakref.ref(piece))
        alive.append(sum(each() is not None for each in cuts))
        return piece

    monkeypatch.setattr(snapshot, "_list_holders", hold_as_two_processes)
    monkeypatch.setattr(snapshot, "CHUNK_BYTES", 256)
    monkeypatch.setattr(snapshot, "_NUM_THREADS", 1)
    monkeypatch.setattr(jax.lax, "dynamic_slice", cut_and_count)
    take_snapshot(state, memory=Memory())
    assert len(alive) > 5
    assert max(alive) == 1


def test_replicas_share_the_chunks(monkeypatch):
    """Each chunk has one owner, and no process has them all, as far as the shardings of one process can say."""
    state = place(draw_arrays(1), (2, 2, 2))
    monkeypatch.setattr(snapshot, "_list_holders", hold_as_two_processes)
    parts = [{chunk.file: chunk for chunk in take_snapshot(state, index).chunks} for index in (0, 1)]
    assert not parts[0].keys() & parts[1].keys()
    assert min(map(len, parts)) > 0
    monkeypatch.undo()
    whole = {chunk.file: chunk for chunk in take_snapshot(state).chunks}
    assert parts[0].keys() | parts[1].keys() == whole.keys()
    for file, chunk in whole.items():
        np.testing.assert_array_equal((parts[0] | parts[1])[file].values, chunk.values, err_msg=file)


def test_one_save_at_a_time_and_the_stall_says_what_it_waited_for(slow_disk, tmp_path):
    write_tokenizer(tmp_path)
    state = place(draw_arrays(1), (1, 1, 1))
    with CheckpointWriter(tmp_path) as writer:
        writer.save(state, info_of(1), KEEP)
        opener = threading.Timer(0.2, slow_disk.set)
        opener.start()
        stall = writer.save(state, info_of(2), KEEP)
        assert [path.name for path in list_checkpoints(tmp_path)][-1:] == ["1"]
        assert stall.waiting > 0.05
        assert stall.seconds == stall.waiting + stall.copying
        for step in (3, 4):
            writer.save(state, info_of(step), KEEP)
        writer.finish()
        assert [path.name for path in list_checkpoints(tmp_path)] == ["4", "3"]


@pytest.mark.parametrize("when", ["save", "finish"])
def test_what_a_save_failed_of_is_raised_when_it_is_waited_for_or_the_next_one_fails_too(when, tmp_path, monkeypatch):
    save_step(tmp_path, 1)
    before = files_of(tmp_path)
    state = place(draw_arrays(2), (1, 2, 1))

    def fail(path, chunk):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(t5pegasus.checkpoint.save, "write_chunk", fail)
    writer = CheckpointWriter(tmp_path)
    writer.save(state, info_of(2), KEEP)
    with pytest.raises(OSError, match="No space") as raised:
        writer.finish() if when == "finish" else writer.save(state, info_of(3), KEEP)
    failed = tmp_path / "checkpoints" / ("2" if when == "finish" else "3")
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(failed))
    assert files_of(tmp_path) == before
    monkeypatch.undo()
    writer.save(state, info_of(4), KEEP)
    writer.finish()
    verify_checkpoint(tmp_path / "checkpoints" / "4")


def test_an_error_elsewhere_does_not_lose_the_save_on_its_way(slow_disk, tmp_path):
    write_tokenizer(tmp_path)

    def train():
        with CheckpointWriter(tmp_path) as writer:
            writer.save(place(draw_arrays(1), (1, 1, 1)), info_of(1), KEEP)
            threading.Timer(0.1, slow_disk.set).start()
            raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        train()
    verify_checkpoint(tmp_path / "checkpoints" / "1")


def test_a_save_that_fails_is_told_at_once(tmp_path, monkeypatch, caplog):
    """What it failed of is raised at the next save, which may be hours away, or never, where another error ends it."""
    write_tokenizer(tmp_path)

    def fail(path, chunk):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(t5pegasus.checkpoint.save, "write_chunk", fail)

    def train():
        with CheckpointWriter(tmp_path) as writer:
            writer.save(place(draw_arrays(1), (1, 1, 1)), info_of(1), KEEP)
            raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        train()
    assert f"{tmp_path / 'checkpoints' / '1'} could not be saved: [Errno 28] No space" in caplog.text


def test_behind_a_save_that_failed_the_next_one_is_tried_and_waited_for(tmp_path, monkeypatch):
    """A store that did not answer for some minutes, or a disk that was full, costs one checkpoint and not the run."""
    save_step(tmp_path, 1)

    def fail(path, chunk):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    writer = CheckpointWriter(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(t5pegasus.checkpoint.save, "write_chunk", fail)
        writer.save(place(draw_arrays(2), (1, 2, 1)), info_of(2), KEEP)
        writer._thread.join()
    writer.save(place(draw_arrays(3), (1, 2, 1)), info_of(3), KEEP)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["3", "1"]
    verify_checkpoint(tmp_path / "checkpoints" / "3")
    writer.finish()


def test_a_save_that_failed_of_something_else_ends_the_next_one_before_it_begins(tmp_path):
    def taken_over():
        raise UsageError("taken over")

    write_tokenizer(tmp_path)
    writer = CheckpointWriter(tmp_path, require_ours=taken_over)
    writer.save(draw_arrays(1), info_of(1), KEEP)
    writer._thread.join()
    writer._require_ours = lambda: None
    with pytest.raises(UsageError, match="taken over"):
        writer.save(draw_arrays(2), info_of(2), KEEP)
    assert list_checkpoints(tmp_path) == []


def test_a_save_whose_files_another_job_has_cleared_away_ends_by_saying_so(tmp_path, monkeypatch):
    """And leaves what that one has begun under the same name."""
    write_tokenizer(tmp_path)
    begun, gate, write_chunk = threading.Event(), threading.Event(), t5pegasus.checkpoint.save.write_chunk

    def wait_and_write(path, chunk):
        begun.set()
        assert gate.wait(60)
        return write_chunk(path, chunk)

    monkeypatch.setattr(t5pegasus.checkpoint.save, "write_chunk", wait_and_write)
    claim = Claim(tmp_path).take()
    writer = CheckpointWriter(tmp_path, require_ours=claim.require)
    writer.save(draw_arrays(1), info_of(1), KEEP)
    unfinished = tmp_path / "checkpoints" / "1.unfinished"
    assert begun.wait(60)
    Claim(tmp_path).take()
    finish_saves(tmp_path)
    unfinished.mkdir()
    gate.set()
    with pytest.raises(TakenOverError):
        writer.finish()
    assert unfinished.is_dir()
