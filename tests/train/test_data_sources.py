"""A run on a mixture: resumed, with other weights, with a folder more; and one with examples that cannot be read."""

import dataclasses
import os
import shutil

import numpy as np
import pytest

from t5pegasus.checkpoint import find_checkpoint, find_last_good, load_arrays, load_checkpoint_info
from t5pegasus.config import DataConfig
from t5pegasus.data.loader import PackedRows
from t5pegasus.data.mixed_rows import MixedRows
from t5pegasus.data.shard_files import shard_name
from t5pegasus.data.shards import ExampleShards
from t5pegasus.errors import DataError, UsageError
from t5pegasus.json_files import read_json
from t5pegasus.train.data_sources import name_sources
from t5pegasus.train.metrics import read_metrics
from t5pegasus.train.run import RunPaths, train_run
from tests.train.conftest import START, write_examples


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixture")
    return {name: write_examples(root / name, 90, seed) for seed, name in enumerate("abc")}


def mix(config, folders, **weights):
    mixture = tuple(f"{folders[name]}={weight}" for name, weight in weights.items())
    return dataclasses.replace(config, data=dataclasses.replace(config.data, mixture=mixture))


def fingerprint(folder):
    with ExampleShards(folder) as shards:
        return shards.fingerprint


@pytest.fixture(scope="module")
def whole(tmp_path_factory, folders, run_config):
    run_path = tmp_path_factory.mktemp("whole") / "run"
    train_run(mix(run_config, folders, a=0.7, b=0.3), RunPaths(run_path, folders["a"]))
    return run_path


@pytest.fixture
def halfway(whole, tmp_path, folders):
    """The run as a kill behind step 4 leaves it."""
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "8")
    return RunPaths(tmp_path / "run", folders["a"])


def test_the_loss_of_each_source_is_in_the_metrics(whole):
    records = [record for record in read_metrics(whole / "metrics.jsonl") if record["kind"] == "train"]
    for record in records:
        losses = record["loss_by_source"]
        assert losses.keys() <= {"a", "b"}
        assert min(losses.values()) - 1e-5 <= record["loss"] <= max(losses.values()) + 1e-5
    assert any(record["loss_by_source"].keys() == {"a", "b"} for record in records)


def test_a_mixture_resumed_with_the_same_weights_is_the_uninterrupted_one(whole, halfway, folders, run_config):
    train_run(mix(run_config, folders, b=0.3, a=0.7), halfway)  # named in another order
    resumed, uninterrupted = (load_arrays(find_checkpoint(path)) for path in (halfway.run_path, whole))
    for name, array in uninterrupted.items():
        np.testing.assert_array_equal(resumed[name], array, err_msg=name)
    info = load_checkpoint_info(find_checkpoint(halfway.run_path))
    wanted = [[fingerprint(folders["a"]), 0.7], [fingerprint(folders["b"]), 0.3]]
    assert list(info.mixture) == [{"from_row": 0, "weights": wanted}]


def test_weights_change_and_folders_join_where_a_run_continues(whole, halfway, folders, run_config):
    changed = mix(run_config, folders, a=0.0, b=0.5, c=0.5)
    train_run(changed, halfway)
    info = load_checkpoint_info(find_checkpoint(halfway.run_path))
    before = load_checkpoint_info(find_checkpoint(whole)).mixture
    weights = [[fingerprint(folders[name]), weight] for name, weight in (("a", 0.0), ("b", 0.5), ("c", 0.5))]
    assert info.mixture == (*before, {"from_row": 32, "weights": weights})
    assert read_json(halfway.run_path / "config.json")["config"]["data"]["mixture"] == list(changed.data.mixture)
    one, other = (load_arrays(find_checkpoint(path)) for path in (halfway.run_path, whole))
    assert any((one[name] != array).any() for name, array in other.items())
    # What is left out may stay away from then on; the run is finished, and knows it.
    train_run(mix(run_config, folders, b=0.5, c=0.5), dataclasses.replace(halfway, examples_path=folders["b"]))


def test_a_folder_in_use_cannot_be_forgotten(halfway, folders, run_config):
    with pytest.raises(
        UsageError, match=rf"those of {folders['b']} \({fingerprint(folders['b'])[:12]}…\), which.*with =0"
    ):
        train_run(mix(run_config, folders, a=1.0, c=1.0), halfway)
    with pytest.raises(UsageError, match="which are not given"):
        train_run(run_config, halfway)
    other = dataclasses.replace(run_config, data=DataConfig(24, 8, seed=5))
    paths = RunPaths(halfway.run_path.parent / "new", folders["a"], start_from=halfway.run_path)
    with pytest.raises(UsageError, match="data config of checkpoint"):
        train_run(other, paths)


def test_names_of_sources_are_as_short_as_tells_them_apart():
    assert name_sources(DataConfig(mixture=("x/wiki=1", "x/news/=2"))) == ("wiki", "news")
    assert name_sources(DataConfig(mixture=("x/a/train=1", "x/b/train=2"))) == ("a/train", "b/train")
    assert name_sources(DataConfig(mixture=("train=1", "b/train=2"))) == ("train", "b/train")


def test_bad_examples_are_in_the_metrics_by_name_and_counted(tmp_path, run_config, monkeypatch):
    folder = write_examples(tmp_path / "examples", 120, seed=0)
    path = folder / shard_name(0, 1)
    content, status = path.read_bytes(), path.stat()
    with PackedRows(folder, run_config.data, 0, START) as rows:
        of_first_update = [rows.table_row(k, 0) for k in range(8)]
        members = [int(rows.table.examples[rows.table.row_starts[row]]) for row in of_first_update]
        written = [np.concatenate([*rows.shards[member]]).astype("<u2").tobytes() for member in members]
    index, record = next(pair for pair in zip(members, written) if content.count(pair[1]) == 1)
    at = content.index(record) + 2
    path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    paths = RunPaths(tmp_path / "run", folder)
    train_run(run_config, paths)
    metrics = read_metrics(paths.run_path / "metrics.jsonl")
    (named,) = [line for line in metrics if line["kind"] == "bad_examples"]
    (bad,) = named["examples"]
    assert (named["step"], bad["index"], bad["shard"]) == (1, index, str(path))
    assert "cannot be read" in bad["reason"]
    assert [line.get("bad_examples", 0) for line in metrics if line["kind"] == "train"] == [1] + 7 * [0]
    info = load_checkpoint_info(find_last_good(paths.run_path))
    assert info.course["bad_examples"] == {info.examples_fingerprint: [index]}

    def recall(self, known):
        assert known == info.course["bad_examples"]
        raise InterruptedError

    longer = dataclasses.replace(run_config, train=dataclasses.replace(run_config.train, steps=9))
    with monkeypatch.context() as patch:
        patch.setattr(MixedRows, "recall", recall)
        with pytest.raises(InterruptedError):
            train_run(longer, paths)
    none = dataclasses.replace(run_config, data=dataclasses.replace(run_config.data, max_bad_examples=0))
    with pytest.raises(DataError, match=f"example {index} of "):
        train_run(none, RunPaths(tmp_path / "none", folder))
