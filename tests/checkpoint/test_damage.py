"""Laws of damage: whatever is changed in a checkpoint is named, and the run goes back to the step before."""

import json
import random
import shutil

import numpy as np
import pytest

from t5pegasus.arrays import load_arrays
from t5pegasus.checkpoint import (
    DamagedError,
    find_checkpoint,
    find_last_good,
    load_together,
    verify_checkpoint,
    verify_structure,
)
from t5pegasus.checkpoint.survey import list_problems, survey_run
from t5pegasus.errors import ArtifactError
from t5pegasus.manifest import MANIFEST
from tests.checkpoint.conftest import draw_arrays, files_of, make_shardings, save_step


def flip(file, seed):
    content = bytearray(file.read_bytes())
    place = random.Random(seed)
    bit = place.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def continue_from(path):
    """What a run does: it verifies all but the chunks first, and these as it loads them."""
    verify_structure(path)
    return load_together(path, make_shardings((1, 2, 2)))


def require_named(path, file):
    """Whoever meets the file first names it, whichever way the checkpoint is used, and the last good one serves."""
    name = str(file.relative_to(path))
    with pytest.raises(ArtifactError, match=str(path)) as raised:
        verify_checkpoint(path)
    assert name in str(raised.value) or name == MANIFEST
    problems = list(list_problems(path))
    assert any(name in problem for problem in problems)
    good = path.with_name("4")
    assert find_last_good(path.parents[1]) == good
    assert find_checkpoint(path.parents[1]) == good
    with pytest.raises(DamagedError) as raised:
        continue_from(path)
    assert name in str(raised.value) or name == MANIFEST
    assert raised.value.path == path
    assert find_last_good(path.parents[1], verify_structure, damaged={path}) == good


@pytest.fixture(scope="module")
def good_run(tmp_path_factory):
    run_path = tmp_path_factory.mktemp("good") / "run"
    for step in (4, 8):
        save_step(run_path, step)
    return run_path


@pytest.fixture
def run_path(good_run, tmp_path):
    return shutil.copytree(good_run, tmp_path / "run")


@pytest.mark.parametrize("seed", range(60))
def test_a_flipped_bit_anywhere_is_named(run_path, seed):
    path = run_path / "checkpoints" / "8"
    files = sorted(file for file in path.rglob("*") if file.is_file())
    if seed % 2:  # most in the largest array, as in a real checkpoint nearly all bits lie there
        files = [path / "arrays/parameters.table/c/0/0"]
    file = random.Random(seed).choice(files)
    flip(file, seed)
    require_named(path, file)


CHANGES = {
    "truncated": lambda file, other: file.write_bytes(file.read_bytes()[:-1]),
    "longer": lambda file, other: file.write_bytes(file.read_bytes() + b"\0"),
    "empty": lambda file, other: file.write_bytes(b""),
    "missing": lambda file, other: file.unlink(),
    "of another step": lambda file, other: shutil.copyfile(other, file),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["arrays/parameters.table/c/0/0", "arrays/step/c", "checkpoint.json"])
def test_a_file_that_is_not_as_it_was_is_named(run_path, name, change):
    path = run_path / "checkpoints" / "8"
    CHANGES[change](path / name, path.with_name("4") / name)
    require_named(path, path / name)


def test_a_file_too_many_is_named(run_path):
    path = run_path / "checkpoints" / "8"
    (path / "arrays" / "step" / "c2").write_bytes(b"1")
    with pytest.raises(DamagedError, match="c2 is not in the manifest"):
        verify_structure(path)


def test_two_chunks_that_changed_places_are_named(run_path):
    """Of the same size, and each whole: sizes say nothing, checksums do."""
    path = run_path / "checkpoints" / "8"
    ours, theirs = path / "arrays/parameters.gain/c/0", path / "arrays/first_moment.gain/c/0"
    content = ours.read_bytes()
    ours.write_bytes(theirs.read_bytes())
    theirs.write_bytes(content)
    require_named(path, theirs)
    assert len(list(list_problems(path))) == 2


@pytest.mark.parametrize("change", ["schema", "fingerprint", "entry", "cut", "gone entry"])
def test_a_manifest_that_is_not_as_it_was_is_named(run_path, change):
    path = run_path / "checkpoints" / "8"
    manifest = json.loads((path / MANIFEST).read_text())
    entry = manifest["files"]["arrays/parameters.table/c/0/0"]
    if change == "schema":
        manifest["schema"] = 99
    if change == "fingerprint":
        manifest["fingerprint"] = "0" * 64
    if change == "entry":
        entry["sha256"] = "0" * 64
    if change == "gone entry":
        del manifest["files"]["arrays/parameters.table/c/0/0"]
    text = json.dumps(manifest)
    (path / MANIFEST).write_text(text[:-20] if change == "cut" else text)
    require_named(path, path / MANIFEST)
    assert [entry.state for entry in survey_run(run_path)] == ["good", "damaged"]


def test_a_manifest_with_new_content_for_every_changed_file_is_another_checkpoint(run_path):
    """The limit of checksums: who may write the manifest may write anything."""
    path = run_path / "checkpoints" / "8"
    for file, content in files_of(path.with_name("4")).items():
        (path / file).write_bytes(content)
    verify_checkpoint(path)
    np.testing.assert_array_equal(load_arrays(path)["parameters.gain"], draw_arrays(4)["parameters.gain"])


def test_all_damaged_checkpoints_are_named_and_nothing_begins_again(run_path):
    for step in (4, 8):
        flip(run_path / "checkpoints" / str(step) / "arrays/parameters.table/c/0/0", step)
    with pytest.raises(ArtifactError, match=r"all of its checkpoints are damaged \(8, 4\).*delete"):
        find_last_good(run_path)
    found = survey_run(run_path, contents=lambda name: True)
    assert [(entry.state, "parameters.table/c/0/0" in entry.problem) for entry in found] == [("damaged", True)] * 2
