"""The flow from documents to summaries with addresses in a bucket for all that is read and written."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google_store import BUCKET, GoogleStore, run_google_store

from launch.verbs import build, convert, evaluate, finetune, grow, pretrain, report, summarize, tokenizer
from t5pegasus.json_files import read_json
from t5pegasus.sample import HELDOUT_PATH
from t5pegasus.storage import list_files, open_path, write_bytes

SIZES = ["--model.d-model", "32", "--model.d-ff", "32", "--model.num-heads", "2", "--model.d-kv", "16",
         "--model.num-encoder-layers", "1", "--model.num-decoder-layers", "1"]  # fmt: skip
LENGTHS = ["--data.max-source-tokens", "64", "--data.max-target-tokens", "16"]


@pytest.fixture(scope="module")
def google() -> Iterator[GoogleStore]:
    with run_google_store() as store:
        yield store


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # aiohttp's, which gcsfs accepts
def test_every_verb_reads_from_a_bucket_and_puts_there_what_it_makes(
    google: GoogleStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("T5PEGASUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    place = open_path(f"gs://{BUCKET}/flow")

    def run(main: Any, *arguments: Any) -> str:
        main(list(map(str, arguments)))
        return capsys.readouterr().out

    lines = HELDOUT_PATH.read_bytes().splitlines(keepends=True)
    write_bytes(place / "documents.jsonl", b"".join(lines[:30]))
    pairs = "".join(
        f'{{"text": "今天上午，第{i}座图书馆开馆。读者很多。", "summary": "图书馆开馆"}}\n' for i in range(8)
    )
    write_bytes(place / "pairs.jsonl", pairs.encode())
    run(tokenizer.main, "train", "--input", place / "documents.jsonl", "--output-path", place / "tokenizer",
        "--vocab-size", 4500)  # fmt: skip
    run(build.main, place / "documents.jsonl", "--tokenizer-path", place / "tokenizer", "--output-path",
        place / "examples", "--heldout-documents", 5, "--num-workers", 1,
        "--max-source-tokens", 64, "--max-target-tokens", 16)  # fmt: skip
    trained = ["--examples-path", place / "examples", "--run-path", place / "runs" / "tiny"]
    said = run(pretrain.main, "tiny", *trained, *SIZES, *LENGTHS, "--train.steps", 2, "--train.batch-size", 8)
    assert f"checkpoint: {place}/runs/tiny/checkpoints/2" in said
    assert (place / "runs" / "tiny" / "metrics.jsonl").is_file()
    said = run(pretrain.main, "--run-path", place / "runs" / "tiny")  # the preset and the rest are the run's
    assert f"checkpoint: {place}/runs/tiny/checkpoints/2" in said

    said = run(grow.main, place / "runs" / "tiny", place / "grown", "--to", "d_ff=48", "--receipt", "arrays")
    assert f"checkpoint: {place}/grown" in said
    assert {"manifest.json", "receipt.json"} <= list_files(place / "grown").keys()
    run(convert.main, place / "grown", place / "exported")
    assert {"SHA256SUMS", "model.safetensors"} <= list_files(place / "exported").keys()
    run(convert.main, place / "exported", place / "imported", "--tokenizer-path", place / "tokenizer")
    assert "manifest.json" in list_files(place / "imported")

    run(finetune.main, place / "grown", "--run-path", place / "runs" / "title", "--train-path", place / "pairs.jsonl",
        "--heldout-path", place / "pairs.jsonl", "--epochs", 1, *LENGTHS, "--train.batch-size", 8)  # fmt: skip
    assert read_json(place / "runs" / "title" / "config.json")["start_from"] == f"{place}/grown"
    said = run(summarize.main, place / "runs" / "title", "--input", place / "pairs.jsonl", "--max-new-tokens", 4)
    assert said.count('"summary"') == 8
    run(evaluate.main, place / "runs" / "title", "--pairs-path", place / "pairs.jsonl", "--max-new-tokens", 4,
        "--num-resamples", 10)  # fmt: skip
    scores = read_json(place / "runs" / "title" / "scores.json")
    assert (scores["checkpoint"], scores["pairs_path"]) == (f"{place}/runs/title", f"{place}/pairs.jsonl")
    run(report.main, place / "runs" / "title")
    page = (place / "runs" / "title" / "report.html").read_text()
    assert "tiny" in page  # the run that the one it is about came from
    local = [path for path in tmp_path.rglob("*") if path.is_file() and tmp_path / "cache" not in path.parents]
    assert local == []
    assert [path for path in (tmp_path / "cache" / "staged").rglob("*") if path.is_file()] == []
