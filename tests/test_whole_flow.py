"""The whole flow through its commands: documents in; summaries, scores and a page out; run again, nothing is redone."""

import json

import pytest

from launch.recipes import quickstart
from t5pegasus.checkpoint import find_checkpoint, load_checkpoint_info
from t5pegasus.json_files import read_json


def stamps(folder):
    """When every file of the artifacts was last written."""
    return {
        path: path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file() and ("checkpoints" in path.parts or path.suffix in (".array_record", ".npy", ".txt"))
    }


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(quickstart, "GROW_AT_STEP", 3)
    monkeypatch.setattr(quickstart, "LAST_STEP", 5)
    monkeypatch.setattr(quickstart, "EPOCHS", 0.5)


@pytest.mark.usefixtures("few_steps")
def test_documents_become_summaries(tmp_path, capsys):
    folder = tmp_path / "flow"
    quickstart.run_quickstart(folder)
    printed = capsys.readouterr().out
    assert printed.split("Five held-out documents")[1].count("\n  model      ") == 5
    assert "writes poorly" in printed
    assert str(folder / "report.html") in printed

    receipt = read_json(folder / "grown" / "receipt.json")
    assert all(each["ratio"] <= 2 for each in receipt["logits"].values())
    assert abs(receipt["nll_difference"]) < 1e-5
    continued = load_checkpoint_info(find_checkpoint(folder / "continued"))
    assert continued.config.model.d_model == 96
    assert (continued.step, continued.rows, len(continued.lineage)) == (5, 40, 1)
    before, right_after = (entry["loss"] for entry in continued.history if entry["step"] == 3)
    assert right_after == pytest.approx(before, abs=1e-5)
    scores = read_json(folder / "finetuned" / "scores.json")
    assert scores["num_pairs"] == 20
    assert scores["systems"]["lead"]["scores"]["rouge-l"]["value"] > 20
    summaries = (folder / "finetuned" / "summaries.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert len({json.loads(line)["source"] for line in summaries}) == 20
    assert "grown" in (folder / "report.html").read_text(encoding="utf-8").lower()

    made = stamps(folder)
    quickstart.run_quickstart(folder)
    assert stamps(folder) == made
    again = capsys.readouterr().out
    assert again.split("Five held-out documents")[1] == printed.split("Five held-out documents")[1]
