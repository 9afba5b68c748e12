"""Summaries that are there already are matched to their pairs, scored without a model, and shown on a page."""

import json
import subprocess
import sys

import pytest

from launch.cli import main
from t5pegasus.evaluate import score_pairs
from t5pegasus.evaluate.checkpoint import choose_best

PAIRS = [
    {"id": 7, "text": "新图书馆今天开馆。首日读者很多。", "summary": "图书馆开馆"},
    {"id": 8, "text": "没有摘要的文章。", "summary": ""},
    {"id": 9, "text": "果园里的苹果熟了。农民忙着采摘。", "summary": "苹果熟了"},
]
WRITTEN = ["图书馆今天开馆", "文章", "农民采摘"]


def write_lines(path, records):
    lines = (record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def pairs_path(tmp_path):
    return write_lines(tmp_path / "dev.jsonl", PAIRS)


def evaluate(summaries, pairs_path, *more):
    return main(["evaluate", "--summaries", str(summaries), "--pairs-path", str(pairs_path), *more])


@pytest.mark.parametrize(
    ("name", "records"),
    [
        ("written.txt", WRITTEN),
        ("written.jsonl", [{"summary": text} for text in WRITTEN]),
        ("written.jsonl", [{"id": pair["id"], "summary": text} for pair, text in zip(PAIRS, WRITTEN)][::-1]),
        ("written.jsonl", [{"id": "7", "summary": WRITTEN[0]}, {"id": "9", "summary": WRITTEN[2]}]),
    ],
)
def test_summaries_belong_to_pairs_by_order_or_by_id(tmp_path, pairs_path, capsys, name, records):
    path = write_lines(tmp_path / name, records)
    assert evaluate(path, pairs_path) == 0
    assert "left out: 1 pairs, empty summary" in capsys.readouterr().out
    folder = tmp_path / f"{name}.scores"
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    figures = score_pairs([PAIRS[0]["summary"], PAIRS[2]["summary"]], [WRITTEN[0], WRITTEN[2]])
    assert {key: value["value"] for key, value in scores["systems"]["summaries"]["scores"].items()} == figures
    assert scores["heldout_loss"] is None
    assert path.read_text(encoding="utf-8").count("\n") == len(records)

    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert f"{figures['rouge-l']:.2f}" in page
    assert "农民采摘" in page
    # What evaluate wrote can be scored again.
    assert evaluate(folder / "summaries.jsonl", pairs_path, "--output-path", str(tmp_path / "again")) == 0
    again = json.loads((tmp_path / "again" / "scores.json").read_text(encoding="utf-8"))
    assert again["systems"] == scores["systems"]


def test_the_first_pairs_can_be_scored_alone(tmp_path, pairs_path):
    path = write_lines(tmp_path / "written.txt", WRITTEN)
    assert evaluate(path, pairs_path, "--max-examples", "1") == 0
    scores = json.loads((tmp_path / "written.txt.scores" / "scores.json").read_text(encoding="utf-8"))
    assert scores["num_pairs"] == 1


@pytest.mark.parametrize(
    ("records", "complaint"),
    [
        (WRITTEN[:2], "2 summaries, there are 3 pairs"),
        ([{"id": 7, "summary": "甲"}], "no summary for 1 pairs, '9'"),
        ([{"id": 5, "summary": "甲"}], "1 ids are of no pair, '5'"),
        ([{"id": 7, "summary": "甲"}] * 2, "id '7' stands 2 times"),
        ([{"summary": None}] * 3, '"summary" 1 is None'),
    ],
)
def test_summaries_of_other_pairs_are_bad_data(tmp_path, pairs_path, capsys, records, complaint):
    assert evaluate(write_lines(tmp_path / "written.jsonl", records), pairs_path) == 44
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "written.jsonl.scores").exists()


def test_either_a_checkpoint_or_summaries(tmp_path, pairs_path, capsys):
    assert main(["evaluate", "--pairs-path", str(pairs_path)]) == 2
    assert "--summaries written.jsonl" in capsys.readouterr().err
    assert evaluate(write_lines(tmp_path / "w.txt", WRITTEN), pairs_path, "--num-resamples", "0") == 2
    assert "num_resamples=0" in capsys.readouterr().err
    assert evaluate(tmp_path / "w.txt", pairs_path, "--num-beams", "4") == 2
    assert "leave them out" in capsys.readouterr().err
    assert evaluate(tmp_path / "w.txt", pairs_path, "--output-path", str(pairs_path)) == 2
    assert "is a file, a folder was wanted" in capsys.readouterr().err


def test_given_summaries_need_no_jax():
    code = (
        "import sys; from t5pegasus.evaluate import summaries, table; assert not {'jax', 'flax'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_oracle_is_the_first_of_the_best():
    assert choose_best("中国人", ["美国", "中国", "国人", "中国 人"]) == "中国 人"
    assert choose_best("中国人", ["中国", "国人"]) == "中国"
    assert choose_best("中国人", ["", "美洲"]) == ""
