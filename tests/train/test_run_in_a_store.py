"""A run in an object store is the run on disk, bit for bit, however often it is stopped and wherever it goes on."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google_store import BUCKET, GoogleStore, run_google_store, stop_the_clock

from t5pegasus.checkpoint import (
    find_checkpoint,
    find_last_good,
    list_checkpoints,
    load_arrays,
    load_checkpoint_info,
    verify_checkpoint,
)
from t5pegasus.config import RunConfig
from t5pegasus.errors import UsageError
from t5pegasus.json_files import read_json
from t5pegasus.storage import copy_tree, list_files, open_path
from t5pegasus.train.metrics import read_metrics
from t5pegasus.train.run import RunPaths, train_run


def with_steps(config: RunConfig, steps: int) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))


def records(run_path: Path) -> list[Any]:
    kept = ("kind", "step", "rows", "loss", "accuracy", "grad_norm")
    found = read_metrics(run_path / "metrics.jsonl")
    return [
        {key: value for key, value in record.items() if key in kept} for record in found if record["kind"] != "start"
    ]


@pytest.fixture(scope="module")
def google():
    with run_google_store() as store:
        yield store


@pytest.fixture(autouse=True)
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, google: GoogleStore) -> None:
    """A machine that has nothing of the run."""
    google.forget_plans()
    monkeypatch.setenv("T5PEGASUS_CACHE", str(tmp_path / "cache"))
    stop_the_clock(monkeypatch)


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory, examples_path: Path, run_config: RunConfig) -> Path:
    run_path = tmp_path_factory.mktemp("disk") / "run"
    train_run(run_config, RunPaths(run_path, examples_path))
    return run_path


def require_same(run_path: Path, other: Path) -> None:
    ours, theirs = find_checkpoint(run_path), find_checkpoint(other)
    assert load_checkpoint_info(ours).to_json() == load_checkpoint_info(theirs).to_json()
    arrays, wanted = load_arrays(ours), load_arrays(theirs)
    assert arrays.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)
    assert records(run_path) == records(other)


def test_a_run_stopped_and_continued_on_another_host_is_the_run_on_disk(
    on_disk: Path, examples_path: Path, run_config: RunConfig, google: GoogleStore, tmp_path: Path, monkeypatch: Any
):
    examples = open_path(f"gs://{BUCKET}/examples")
    copy_tree(examples_path, examples)
    run_path = open_path(f"gs://{BUCKET}/runs/whole")
    google.plan("POST", "/upload/", 503, times=3)
    train_run(with_steps(run_config, 4), RunPaths(run_path, examples))
    # What a kill leaves in a store: the objects of a save without a manifest, and records past the checkpoint.
    (run_path / "checkpoints" / "6" / "checkpoint.json").write_bytes(b"{}")
    (run_path / "metrics.jsonl").write_bytes(
        (run_path / "metrics.jsonl").read_bytes() + b'{"kind": "train", "step": 5, "loss": 9.0}\n{"kind": "tr'
    )
    monkeypatch.setenv("T5PEGASUS_CACHE", str(tmp_path / "another-host"))
    google.plan("GET", "alt=media", 429, times=3)
    assert train_run(run_config, RunPaths(run_path, examples)) == run_path / "checkpoints" / "8"
    require_same(run_path, on_disk)
    assert [path.name for path in list_checkpoints(run_path)] == ["8", "4"]
    names = list_files(run_path)
    assert not [name for name in names if name.startswith("checkpoints/6/")]
    assert any(name.startswith("tensorboard/") for name in names)
    assert read_json(run_path / "config.json")["examples_path"] == str(examples)
    assert train_run(run_config, RunPaths(run_path, examples)) == run_path / "checkpoints" / "8"  # finished


@pytest.mark.slow
def test_a_damaged_object_is_passed_over(
    on_disk: Path, examples_path: Path, run_config: RunConfig, google: GoogleStore
):
    run_path = open_path(f"gs://{BUCKET}/runs/damaged")
    copy_tree(on_disk, run_path)
    last = run_path / "checkpoints" / "8"
    name = next(name for name in sorted(list_files(last / "arrays")) if "/c/" in name)
    content = bytearray((last / "arrays" / name).read_bytes())
    content[len(content) // 2] ^= 1
    (last / "arrays" / name).write_bytes(bytes(content))
    assert find_last_good(run_path, verify_checkpoint) == run_path / "checkpoints" / "4"
    train_run(run_config, RunPaths(run_path, examples_path))
    require_same(run_path, on_disk)


@pytest.mark.slow
def test_a_store_that_fails_while_saving_leaves_the_last_checkpoint(
    on_disk: Path, examples_path: Path, run_config: RunConfig, google: GoogleStore
):
    run_path = open_path(f"gs://{BUCKET}/runs/failing")
    train_run(with_steps(run_config, 4), RunPaths(run_path, examples_path))
    google.plan("POST", "/upload/", _refuse_chunks, times=10_000)
    with pytest.raises(OSError, match="503"):
        train_run(run_config, RunPaths(run_path, examples_path))
    google.forget_plans()
    assert find_last_good(run_path) == run_path / "checkpoints" / "4"
    train_run(run_config, RunPaths(run_path, examples_path))
    require_same(run_path, on_disk)


@pytest.mark.slow
def test_who_was_taken_over_commits_nothing(examples_path: Path, run_config: RunConfig, google: GoogleStore):
    run_path = open_path(f"gs://{BUCKET}/runs/two")
    train_run(with_steps(run_config, 4), RunPaths(run_path, examples_path))

    def take_over(handler: Any) -> None:
        """Another host starts the run while this one looks whether its own number is the last."""
        content = b'{"host": "other", "pid": 7, "began": "now"}'
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    google.plan("GET", "writers%2F000003.json", take_over, times=10_000)
    with pytest.raises(UsageError, match="taken over by process 7 of host other"):
        train_run(run_config, RunPaths(run_path, examples_path))
    google.forget_plans()
    assert find_last_good(run_path) == run_path / "checkpoints" / "4"


def _refuse_chunks(handler: Any) -> None:
    handler.send_response(503)
    handler.send_header("Content-Length", "0")
    handler.end_headers()
