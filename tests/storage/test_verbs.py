"""Verbs with addresses where they have paths: the same artifacts as on the disk."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from launch.staging import local_checkpoint
from launch.verbs import build, pseudo_summary, tokenizer
from t5pegasus.checkpoint import load_checkpoint_info, save_checkpoint, verify_checkpoint
from t5pegasus.data.shards import ExampleShards
from t5pegasus.errors import ArtifactError, UsageError
from t5pegasus.json_files import read_json
from t5pegasus.sample import HELDOUT_PATH, TRAIN_PATH
from t5pegasus.storage import copy_file, list_files, open_path, remove_tree, write_bytes
from tests.checkpoint.conftest import draw_arrays, info_of, write_tokenizer


def _make_tokenizer(documents: Any, output: Any) -> None:
    tokenizer.main(["train", "--input", str(documents), "--output-path", str(output), "--vocab-size", "4500"])


def _build(documents: Any, tokenizer_path: Any, output: Any) -> None:
    build.main([str(documents), "--tokenizer-path", str(tokenizer_path), "--output-path", str(output),
                "--heldout-documents", "5", "--num-workers", "1"])  # fmt: skip


def test_tokenizer_and_examples_are_those_of_the_disk(remote: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    documents = remote / "documents.jsonl"
    write_bytes(documents, b"".join(HELDOUT_PATH.read_bytes().splitlines(keepends=True)[:40]))
    local = tmp_path / "documents.jsonl"
    copy_file(documents, local)
    _make_tokenizer(documents, remote / "tokenizer")
    _make_tokenizer(local, tmp_path / "tokenizer")
    for name in list_files(tmp_path / "tokenizer"):
        assert (remote / "tokenizer" / name).read_bytes() == (tmp_path / "tokenizer" / name).read_bytes()
    _build(documents, remote / "tokenizer", remote / "examples")
    _build(local, tmp_path / "tokenizer", tmp_path / "examples")
    assert list_files(remote / "examples") == list_files(tmp_path / "examples")
    with ExampleShards(remote / "examples") as ours, ExampleShards(tmp_path / "examples") as theirs:
        assert ours.fingerprint == theirs.fingerprint
        assert len(ours) == len(theirs) > 10
    with ExampleShards(remote / "examples" / "heldout") as ours, ExampleShards(tmp_path / "examples/heldout") as theirs:
        assert ours.fingerprint == theirs.fingerprint
    capsys.readouterr()
    _build(documents, remote / "tokenizer", remote / "examples")
    assert "complete already" in capsys.readouterr().out
    _make_tokenizer(documents, remote / "tokenizer")
    assert "complete already" in capsys.readouterr().out
    with pytest.raises(ArtifactError, match="was built with max_source_tokens=384, now max_source_tokens=99"):
        build.main([str(documents), "--tokenizer-path", str(remote / "tokenizer"), "--output-path",
                    str(remote / "examples"), "--heldout-documents", "5", "--max-source-tokens", "99"])  # fmt: skip


def test_a_build_whose_upload_was_cut_off_goes_on(remote: Any, faults: Any, own_cache: Path):
    documents = remote / "documents.jsonl"
    write_bytes(documents, b"".join(TRAIN_PATH.read_bytes().splitlines(keepends=True)[:20]))
    _make_tokenizer(documents, remote / "tokenizer")
    faults.plan("pipe_file", *[None] * 3, forever=TimeoutError("no answer"))
    with pytest.raises(OSError, match="cannot write"):
        _build(documents, remote / "tokenizer", remote / "examples")
    assert "manifest.json" not in list_files(remote / "examples")
    with pytest.raises(ArtifactError):
        ExampleShards(remote / "examples")
    faults.plan("pipe_file")
    _build(documents, remote / "tokenizer", remote / "examples")
    assert read_json(remote / "examples" / "manifest.json")["documents"]["kept"] == 15
    assert [path for path in (own_cache / "staged").rglob("*") if path.is_file()] == []


def test_of_a_run_only_the_checkpoint_that_is_meant_is_fetched_whole(remote: Any, tmp_path: Path, faults: Any):
    history = tuple({"step": step, "loss": 1.0, "best": step == 4} for step in (2, 4, 6))
    tokenizer_path = write_tokenizer(tmp_path)
    for index, step in enumerate((2, 4, 6), 1):
        info = dataclasses.replace(info_of(step), history=history[:index])
        save_checkpoint(remote / "checkpoints" / str(step), draw_arrays(step), info, tokenizer_path)
    faults.calls.clear()

    def chunks_read(step: int) -> int:
        return sum(f"checkpoints/{step}/arrays/" in name for call, name in faults.calls if call == "cat_file")

    described = local_checkpoint(remote, arrays=False)
    assert load_checkpoint_info(described).step == 4
    assert (chunks_read(4), chunks_read(6)) == (0, 0)
    meant = local_checkpoint(remote)
    assert (meant, verify_checkpoint(meant)["schema"]) == (described, 1)
    assert chunks_read(4) > 0
    assert (chunks_read(6), chunks_read(2)) == (0, 0)
    remove_tree(remote / "checkpoints" / "4")
    assert load_checkpoint_info(local_checkpoint(remote)).step == 6
    chunk = next(name for name in list_files(remote / "checkpoints" / "2") if "table/c/" in name)
    write_bytes(remote / "checkpoints" / "2" / chunk, b"damaged")
    with pytest.raises(ArtifactError, match="its manifest says"):
        local_checkpoint(remote / "checkpoints" / "2")


def test_outputs_do_not_go_over_what_is_there(remote: Any):
    write_bytes(remote / "documents.jsonl", b"".join(TRAIN_PATH.read_bytes().splitlines(keepends=True)[:20]))
    write_bytes(remote / "used" / "notes.txt", b"mine")
    with pytest.raises(UsageError, match=r"in use: notes\.txt lies there"):
        _make_tokenizer(remote / "documents.jsonl", remote / "used")
    assert list_files(remote / "used") == {"notes.txt": 4}


def test_texts_are_read_from_a_store(remote: Any, capfdbinary: pytest.CaptureFixture[bytes]):
    copy_file(HELDOUT_PATH, remote / "texts.jsonl")
    pseudo_summary.main(["--input", str(remote / "texts.jsonl")])
    from_store = capfdbinary.readouterr().out
    pseudo_summary.main(["--input", str(HELDOUT_PATH)])
    assert from_store == capfdbinary.readouterr().out
    assert json.loads(from_store.splitlines()[0])["target"]
    assert str(open_path(str(remote))) == str(remote)
