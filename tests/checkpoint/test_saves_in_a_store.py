"""Laws of saving where nothing can be renamed: what was whole stays so, whoever fails, whoever else writes there."""

import itertools

import pytest

import t5pegasus.checkpoint.save
from t5pegasus.checkpoint import (
    CheckpointWriter,
    Retention,
    find_last_good,
    finish_saves,
    load_arrays,
    save_checkpoint,
    verify_checkpoint,
)
from t5pegasus.storage import TakenOverError, copy_tree, list_files, open_path
from tests.checkpoint.conftest import draw_arrays, info_of, write_tokenizer

KEEP = Retention(last=1)
_bucket = itertools.count()


@pytest.fixture
def run_path(tmp_path):
    """Of a run whose checkpoint 4 is whole."""
    path = open_path(f"memory://checkpoints-{next(_bucket)}/run")
    copy_tree(write_tokenizer(tmp_path), path / "tokenizer")
    save_checkpoint(path / "checkpoints" / "4", draw_arrays(4), info_of(4), path / "tokenizer")
    return path


def save(run_path, step, require_ours=lambda: None):
    with CheckpointWriter(run_path, require_ours=require_ours) as writer:
        writer.save(draw_arrays(step), info_of(step), KEEP)


@pytest.mark.parametrize("is_killed", [False, True])
@pytest.mark.parametrize("done", [0, 1, 4])
def test_a_save_over_the_same_step_that_fails_leaves_the_one_before(run_path, done, is_killed, monkeypatch):
    """As after a stop in an evaluation: the step is saved once more when that is made up for."""
    wanted = verify_checkpoint(run_path / "checkpoints" / "4")
    write_chunk, count = t5pegasus.checkpoint.save.write_chunk, itertools.count()

    def write_or_fail(path, chunk):
        if next(count) >= done:
            raise OSError(5, "the store does not answer")
        return write_chunk(path, chunk)

    monkeypatch.setattr(t5pegasus.checkpoint.save, "write_chunk", write_or_fail)
    if is_killed:  # nobody cleans up
        monkeypatch.setattr(t5pegasus.checkpoint.save, "_give_up", lambda *_: None)
    with pytest.raises(OSError, match="does not answer"):
        save(run_path, 4)
    monkeypatch.undo()
    finish_saves(run_path)
    assert find_last_good(run_path, verify_checkpoint) == run_path / "checkpoints" / "4"
    assert verify_checkpoint(run_path / "checkpoints" / "4") == wanted
    save(run_path, 4)
    finish_saves(run_path)
    assert {name.split("/")[0] for name in list_files(run_path / "checkpoints")} == {"4"}
    assert load_arrays(run_path / "checkpoints" / "4").keys() == draw_arrays(4).keys()


def test_what_a_failed_save_was_to_replace_is_back_behind_the_next_one(run_path, monkeypatch):
    """The run goes on, and the copy that was put aside is the only one."""
    wanted, keep = verify_checkpoint(run_path / "checkpoints" / "4"), Retention(last=1, steps=frozenset({4}))

    def fail(path, chunk):
        raise OSError(5, "the store does not answer")

    with CheckpointWriter(run_path) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(t5pegasus.checkpoint.save, "write_chunk", fail)
            writer.save(draw_arrays(4), info_of(4), keep)
            writer._thread.join()
        writer.save(draw_arrays(5), info_of(5), keep)
    assert verify_checkpoint(run_path / "checkpoints" / "4") == wanted
    assert {name.split("/")[0] for name in list_files(run_path / "checkpoints")} == {"4", "5"}


@pytest.mark.parametrize("call", [0, 1])
def test_who_was_taken_over_deletes_nothing(run_path, call):
    """Not even of a step that both have come to: there it may be the other one's, and whole."""
    calls = itertools.count()

    def require_ours():
        if next(calls) == call:
            raise TakenOverError("taken over")

    if call == 0:
        before = list_files(run_path)
    with pytest.raises(TakenOverError):
        save(run_path, 4, require_ours)
    if call == 0:
        assert list_files(run_path) == before
        verify_checkpoint(run_path / "checkpoints" / "4")
    else:
        assert list_files(run_path / "checkpoints" / "4")
    finish_saves(run_path)
    verify_checkpoint(run_path / "checkpoints" / "4")
