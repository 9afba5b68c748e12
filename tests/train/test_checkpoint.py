"""Laws of checkpoints: killed, damaged or out of disk, a run loses nothing that was whole."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from t5pegasus.checkpoint import (
    CheckpointInfo,
    Retention,
    find_last_good,
    finish_saves,
    list_checkpoints,
    remove_old_checkpoints,
    save_checkpoint,
    verify_checkpoint,
)
from t5pegasus.errors import ArtifactError


@pytest.fixture
def save(examples_path, run_config):
    def save_step(run_path: Path, step: int) -> Path:
        path = run_path / "checkpoints" / str(step)
        info = CheckpointInfo(run_config, step, 8 * step, "float32", "f" * 64)
        save_checkpoint(path, {"parameters.x": np.arange(4.0) + step}, info, examples_path / "tokenizer")
        return path

    return save_step


def damage(path: Path) -> None:
    with (path / "checkpoint.json").open("a", encoding="utf-8") as file:
        file.write(" ")


def test_killed_between_the_renames_of_a_save_it_is_finished(save, tmp_path):
    path = save(tmp_path, 4)
    shutil.copytree(path, path.with_name("4.superseded"))
    damage(path.with_name("4.superseded"))
    wanted = verify_checkpoint(path)
    path.rename(path.with_name("4.unfinished"))
    finish_saves(tmp_path)
    assert verify_checkpoint(path) == wanted
    assert [each.name for each in path.parent.iterdir()] == ["4"]


def test_an_unfinished_save_that_is_not_whole_replaces_nothing(save, tmp_path):
    path = save(tmp_path, 4)
    shutil.copytree(path, path.with_name("4.unfinished"))
    damage(path.with_name("4.unfinished"))
    path.with_name("6.unfinished").mkdir()
    finish_saves(tmp_path)
    verify_checkpoint(path)
    assert list_checkpoints(tmp_path) == [path]


def test_what_was_just_saved_stays_although_damaged_ones_of_later_steps_are_there(save, tmp_path):
    save(tmp_path, 4)
    damage(save(tmp_path, 8))
    path = save(tmp_path, 6)
    shutil.copytree(path, path.with_name("4.superseded"))
    remove_old_checkpoints(tmp_path, path, Retention(1))
    assert find_last_good(tmp_path) == path
    assert sorted(each.name for each in path.parent.iterdir()) == ["6", "8"]
    remove_old_checkpoints(tmp_path, save(tmp_path, 8), Retention(1))
    assert [each.name for each in list_checkpoints(tmp_path)] == ["8"]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again_by_itself(save, tmp_path):
    assert find_last_good(tmp_path) is None
    damage(save(tmp_path, 4))
    damage(save(tmp_path, 8))
    with pytest.raises(ArtifactError, match=r"all of its checkpoints are damaged \(8, 4\).*delete"):
        find_last_good(tmp_path)
