"""Laws of `t5pegasus checkpoint`: what is there is shown, what is damaged is named, what differs is counted."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

import t5pegasus.checkpoint.survey
from launch.cli import main
from t5pegasus.checkpoint import save_checkpoint
from t5pegasus.storage import copy_tree, open_path, remove_tree
from tests.checkpoint.conftest import draw_arrays, info_of, save_step, write_tokenizer


@pytest.fixture
def run_path(tmp_path):
    for step in (4, 8):
        save_step(tmp_path, step)
    shutil.copytree(tmp_path / "checkpoints" / "8", tmp_path / "checkpoints" / "12.unfinished")
    return tmp_path


def run(capsys, *argv):
    code = main(["checkpoint", *map(str, argv)])
    return code, capsys.readouterr().out


def test_whole_checkpoints_verify(run_path, capsys):
    code, out = run(capsys, "verify", run_path)
    assert code == 0
    assert [line.split(": ")[1].split(",")[0] for line in out.splitlines()] == ["good", "good", "unfinished"]
    assert run(capsys, "verify", run_path / "checkpoints" / "4")[0] == 0


def test_every_damaged_file_is_named(run_path, capsys):
    path = run_path / "checkpoints" / "8"
    table = path / "arrays/parameters.table/c/0/0"
    table.write_bytes(table.read_bytes()[::-1])
    (path / "arrays/step/c").unlink()
    (path / "surplus").write_text("x")
    for target in (run_path, path):
        code, out = run(capsys, "verify", target)
        assert code == 2
        assert f"{path}: damaged" in out
        for words in (
            "parameters.table/c/0/0 is damaged",
            "arrays/step/c is missing",
            "surplus is not in the manifest",
        ):
            assert words in out
    code, out = run(capsys, "verify", run_path, "--json")
    assert code == 2
    found = json.loads(out)["checkpoints"]
    assert [len(each["problems"]) for each in found.values()] == [0, 3, 0]


def test_a_manifest_that_cannot_be_read_is_one_problem(run_path, capsys):
    (run_path / "checkpoints" / "8" / "manifest.json").write_text("{")
    code, out = run(capsys, "verify", run_path)
    assert code == 2
    assert "manifest.json is not valid JSON" in out


def test_a_manifest_that_is_gone_is_damage(run_path, capsys):
    (run_path / "checkpoints" / "8" / "manifest.json").unlink()
    code, out = run(capsys, "verify", run_path)
    assert code == 2
    assert f"{run_path / 'checkpoints' / '8'}: damaged" in out
    assert "damaged: file manifest.json is missing" in run(capsys, "list", run_path)[1]


def test_a_run_may_be_called_as_its_checkpoint(tmp_path, capsys):
    save_step(tmp_path / "4", 4)
    code, out = run(capsys, "verify", tmp_path / "4")
    assert (code, out.split(": ")[0]) == (0, str(tmp_path / "4" / "checkpoints" / "4"))


def test_what_the_run_deletes_meanwhile_is_no_damage(run_path, capsys, monkeypatch):
    """A run that goes on deletes its old checkpoints, whoever reads them."""
    find_problems = t5pegasus.checkpoint.survey.find_problems

    def find_after_the_run(path, *args):
        if path.name == "4" and path.exists():
            shutil.rmtree(path)
        return find_problems(path, *args)

    monkeypatch.setattr(t5pegasus.checkpoint.survey, "find_problems", find_after_the_run)
    for verb in ("list", "verify"):
        code, out = run(capsys, verb, run_path)
        assert code == 0
        assert "damaged" not in out
        assert "good" in out
        save_step(run_path, 4)

    def fail_to_read(path, *args):
        shutil.rmtree(path)
        raise FileNotFoundError(2, "No such file or directory", str(path / "arrays" / "step" / "c"))

    monkeypatch.setattr(t5pegasus.checkpoint.survey, "find_problems", fail_to_read)
    assert run(capsys, "list", run_path)[0] == 0


def test_a_run_is_listed(tmp_path, capsys):
    history = ({"step": 4, "loss": 3.25, "best": True}, {"step": 8, "loss": 3.5})
    for place, step in enumerate((4, 8), start=1):
        info = dataclasses.replace(info_of(step), history=history[:place])
        save_checkpoint(tmp_path / "checkpoints" / str(step), draw_arrays(step), info, write_tokenizer(tmp_path))
    (tmp_path / "checkpoints" / "12.unfinished").mkdir()
    code, out = run(capsys, "list", tmp_path)
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert rows[0][:3] == ["step", "size", "age"]
    assert [row[0] for row in rows[1:]] == ["4", "8", "12"]
    assert rows[1][-3:] == ["3.2500", "good,", "best"]
    assert rows[2][-2:] == ["3.5000", "good"]
    assert rows[3][-1] == "unfinished"
    entries = json.loads(run(capsys, "list", tmp_path, "--json")[1])["checkpoints"]
    assert [(entry["step"], entry["best"], entry["loss"]) for entry in entries[:2]] == [
        (4, True, 3.25),
        (8, False, 3.5),
    ]
    (tmp_path / "checkpoints" / "8" / "checkpoint.json").write_text("{}")
    assert "damaged: file checkpoint.json" in run(capsys, "list", tmp_path)[1]


def test_the_arrays_of_a_checkpoint_are_listed(run_path, capsys):
    out = run(capsys, "list", run_path / "checkpoints" / "4")[1]
    assert [line.split()[0] for line in out.splitlines()[4:]] == sorted(draw_arrays(4))
    assert "float32[3, 8, 16]" in out


def test_what_differs_is_counted(run_path, capsys):
    first, second = run_path / "checkpoints" / "4", run_path / "other"
    arrays = {name: array.copy() for name, array in draw_arrays(4).items()}
    arrays["parameters.table"][3, 5] += 0.5
    arrays["parameters.gain"][0] = np.nan
    arrays["parameters.layers"] = arrays["parameters.layers"][:2]
    arrays["ema.x"] = arrays.pop("first_moment.gain")
    save_checkpoint(second, arrays, info_of(5), first / "tokenizer")
    code, out = run(capsys, "diff", first, second)
    assert code == 0
    lines = {line.split()[0]: " ".join(line.split()) for line in out.splitlines()}
    assert lines["step:"] == "step: 4 → 5"
    assert lines["rows:"] == "rows: 32 → 40"
    assert lines["parameters.table"].endswith("0.5 1 of 384")
    assert lines["parameters.gain"].endswith("nan 1 of 16")
    assert lines["parameters.layers"].endswith("float32[3, 8, 16] → float32[2, 8, 16] all")
    assert lines["first_moment.gain"].endswith("only in the first")
    assert lines["ema.x"].endswith("only in the second")
    assert out.splitlines()[-1] == "1 arrays are equal bit for bit, 5 are not"
    found = json.loads(run(capsys, "diff", first, second, "--json")[1])
    assert found["fields"] == {"rows": [32, 40], "step": [4, 5]}
    assert not found["equal"]


def test_of_histories_only_what_differs_is_shown(tmp_path, capsys):
    history = tuple({"step": step, "loss": 3.0, "accuracy": 0.25, "best": False} for step in range(1, 31))
    changed = (*history[:10], history[10] | {"loss": 2.5}, *history[11:])
    for name, entries in (("short", history[:28]), ("long", history), ("other", changed)):
        info = dataclasses.replace(info_of(4), history=entries)
        save_checkpoint(tmp_path / name, draw_arrays(4), info, write_tokenizer(tmp_path))
    assert run(capsys, "diff", tmp_path / "short", tmp_path / "long")[1].splitlines()[:-1] == [
        "history: 28 → 30 entries, of which the first 28 are equal",
        'history[-1], only in the second: {"step": 30, "loss": 3.0, "accuracy": 0.25, "best": false}',
    ]
    assert run(capsys, "diff", tmp_path / "long", tmp_path / "other")[1].splitlines()[:-1] == [
        "history: 30 → 30 entries, of which the first 10 are equal",
        "history[10].loss: 3.0 → 2.5",
    ]


def test_a_checkpoint_differs_in_nothing_from_itself(run_path, capsys):
    path = run_path / "checkpoints" / "4"
    assert json.loads(run(capsys, "diff", path, path, "--json")[1])["equal"]
    assert run(capsys, "diff", path, path)[1] == "5 arrays are equal bit for bit, 0 are not\n"


def test_what_is_no_checkpoint_is_refused_in_words(tmp_path, capsys):
    for verb in ("verify", "list"):
        assert main(["checkpoint", verb, str(tmp_path)]) == 2
        assert f"t5pegasus checkpoint: {tmp_path} is neither a checkpoint nor a run" in capsys.readouterr().err


def test_a_store_is_looked_into_as_a_disk_is(run_path, capsys, monkeypatch, tmp_path_factory):
    monkeypatch.setenv("T5PEGASUS_CACHE", str(tmp_path_factory.mktemp("cache")))
    place = open_path("memory://checkpoint-verb/run")
    copy_tree(run_path, place)
    (place / "checkpoints" / "12" / "checkpoint.json").write_bytes(b"{}")  # of a save that goes on, or was killed
    remove_tree(place / "checkpoints" / "12.unfinished")
    code, out = run(capsys, "verify", place)
    assert (code, [line.split()[1].rstrip(",") for line in out.splitlines()]) == (0, ["good", "good", "unfinished"])
    assert [line.split()[0] for line in run(capsys, "list", place)[1].splitlines()] == ["step", "4", "8", "12"]
    assert "float32[3, 8, 16]" in run(capsys, "list", place / "checkpoints" / "4")[1]
    found = json.loads(run(capsys, "diff", place / "checkpoints" / "4", place, "--json")[1])
    assert (found["first"], found["second"]) == (f"{place}/checkpoints/4", f"{place}/checkpoints/8")
    assert found["fields"] == {"rows": [32, 64], "step": [4, 8]}
    table = place / "checkpoints" / "8" / "arrays/parameters.table/c/0/0"
    table.write_bytes(table.read_bytes()[::-1])
    code, out = run(capsys, "verify", place)
    assert code == 2
    assert "parameters.table/c/0/0 is damaged" in out
