"""Laws of checkpoints: killed, damaged or out of disk, a run loses nothing that was whole."""

import shutil
from pathlib import Path

import pytest

from t5pegasus.checkpoint import (
    Retention,
    find_last_good,
    finish_saves,
    list_checkpoints,
    remove_old_checkpoints,
    verify_checkpoint,
)
from t5pegasus.errors import ArtifactError
from tests.checkpoint.conftest import save_step


def damage(path: Path) -> None:
    with (path / "checkpoint.json").open("a", encoding="utf-8") as file:
        file.write(" ")


def test_killed_between_the_renames_of_a_save_it_is_finished(tmp_path):
    path = save_step(tmp_path, 4)
    shutil.copytree(path, path.with_name("4.superseded"))
    damage(path.with_name("4.superseded"))
    wanted = verify_checkpoint(path)
    path.rename(path.with_name("4.unfinished"))
    finish_saves(tmp_path)
    assert verify_checkpoint(path) == wanted
    assert [each.name for each in path.parent.iterdir()] == ["4"]


def test_an_unfinished_save_that_is_not_whole_replaces_nothing(tmp_path):
    path = save_step(tmp_path, 4)
    shutil.copytree(path, path.with_name("4.unfinished"))
    damage(path.with_name("4.unfinished"))
    path.with_name("6.unfinished").mkdir()
    finish_saves(tmp_path)
    verify_checkpoint(path)
    assert list_checkpoints(tmp_path) == [path]


def test_what_was_just_saved_stays_although_damaged_ones_of_later_steps_are_there(tmp_path):
    save_step(tmp_path, 4)
    damage(save_step(tmp_path, 8))
    path = save_step(tmp_path, 6)
    shutil.copytree(path, path.with_name("4.superseded"))
    remove_old_checkpoints(tmp_path, path, Retention(1))
    assert find_last_good(tmp_path) == path
    assert sorted(each.name for each in path.parent.iterdir()) == ["6", "8"]
    remove_old_checkpoints(tmp_path, save_step(tmp_path, 8), Retention(1))
    assert [each.name for each in list_checkpoints(tmp_path)] == ["8"]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again_by_itself(tmp_path):
    assert find_last_good(tmp_path) is None
    damage(save_step(tmp_path, 4))
    damage(save_step(tmp_path, 8))
    with pytest.raises(ArtifactError, match=r"all of its checkpoints are damaged \(8, 4\).*delete"):
        find_last_good(tmp_path)


def test_a_checkpoint_that_has_lost_its_manifest_is_named_and_nothing_begins_again(tmp_path, caplog):
    """As where a run was copied and not all of it came; one that is being written has another name."""
    for step in (8, 4):
        (save_step(tmp_path, step) / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"all of its checkpoints are damaged \(8, 4\).*no manifest\.json"):
        find_last_good(tmp_path)
    path = save_step(tmp_path, 4)
    caplog.clear()
    assert find_last_good(tmp_path) == path
    assert f"{tmp_path / 'checkpoints' / '8'} is not a finished checkpoint" in caplog.text


def test_old_checkpoints_go_by_policy(tmp_path):
    for step in (2, 4, 6, 8, 10, 12):
        path = save_step(tmp_path, step)
    remove_old_checkpoints(tmp_path, path, Retention(last=2, every_steps=4, steps=frozenset({6})))
    assert [each.name for each in list_checkpoints(tmp_path)] == ["12", "10", "8", "6", "4"]
    remove_old_checkpoints(tmp_path, path, Retention(last=1))
    assert [each.name for each in path.parent.iterdir()] == ["12"]


def test_where_the_last_rename_of_a_save_fails_the_checkpoint_it_was_to_replace_is_back(tmp_path, monkeypatch):
    wanted, rename = verify_checkpoint(save_step(tmp_path, 4)), Path.rename

    def fail(path, target):
        if path.name == "4.unfinished":
            raise OSError(5, "Input/output error", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output error"):
        save_step(tmp_path, 4)
    assert verify_checkpoint(tmp_path / "checkpoints" / "4") == wanted
    assert [each.name for each in (tmp_path / "checkpoints").iterdir()] == ["4"]
