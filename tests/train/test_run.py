"""Laws of a run folder: resuming equals never having stopped, damage is seen, mismatches stop at the border."""

import dataclasses
import itertools
import logging
import shutil

import jax
import numpy as np
import pytest

import t5pegasus.arrays
import t5pegasus.manifest
from t5pegasus.checkpoint import (
    DamagedError,
    find_checkpoint,
    find_last_good,
    load_arrays,
    load_checkpoint_info,
    verify_checkpoint,
    verify_structure,
)
from t5pegasus.checkpoint.folder import is_chunk
from t5pegasus.config import MeshConfig
from t5pegasus.errors import ArtifactError, UsageError
from t5pegasus.json_files import read_json
from t5pegasus.storage import Claim, TakenOverError
from t5pegasus.train import loop, run, visit
from t5pegasus.train.meter import read_numbers
from t5pegasus.train.metrics import read_metrics
from t5pegasus.train.run import RunPaths, train_run


def with_train(config, **fields):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **fields))


def records(run_path, kind):
    return [{key: value for key, value in record.items() if key in ("step", "rows", "loss", "accuracy", "grad_norm")}
            for record in read_metrics(run_path / "metrics.jsonl") if record["kind"] == kind]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory, examples_path, run_config):
    """An uninterrupted run."""
    run_path = tmp_path_factory.mktemp("whole") / "run"
    train_run(run_config, RunPaths(run_path, examples_path))
    return run_path


def test_a_run_learns_and_leaves_what_it_promises(whole, run_config):
    info = load_checkpoint_info(find_checkpoint(whole))
    assert (info.step, info.rows, info.config) == (8, 64, run_config)
    assert [entry["step"] for entry in info.history] == [0, 4, 8]
    assert info.history[-1]["loss"] < info.history[0]["loss"] - 0.3
    assert [record["step"] for record in records(whole, "train")] == list(range(1, 9))
    assert list((whole / "tensorboard").iterdir())


def test_the_next_update_is_sent_before_the_last_ones_numbers_are_read(
    tmp_path, examples_path, run_config, monkeypatch
):
    """The device has a batch and an update waiting whenever the host waits for it."""
    events, original = [], loop.run

    def watched(state, train_step, batches, *args, **kwargs):
        def fetch():
            for number, batch in enumerate(batches, 1):
                assert all(isinstance(field, jax.Array) for field in jax.tree.leaves(batch)), "not on the devices yet"
                events.append(("fetch", number))
                yield batch

        def send(state, batch):
            events.append(("send", int(sum(event[0] == "send" for event in events)) + 1))
            return train_step(state, batch)

        return original(state, send, fetch(), *args, **kwargs)

    def read(config, values, *, with_norms):
        numbers = read_numbers(config, values, with_norms=with_norms)
        events.append(("read", numbers["rows"] // config.train.batch_size))
        return numbers

    monkeypatch.setattr(loop, "run", watched)
    monkeypatch.setattr(visit, "read_numbers", read)
    quiet = with_train(run_config, steps=5, evaluate_every_steps=5, save_every_steps=5)
    train_run(quiet, RunPaths(tmp_path / "run", examples_path))
    ahead = [[("fetch", n + 1), ("send", n + 1), ("read", n)] for n in range(1, 5)]
    assert events == [("fetch", 1), ("send", 1), *itertools.chain.from_iterable(ahead), ("read", 5)]


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(whole, tmp_path, examples_path, run_config):
    paths = RunPaths(tmp_path / "run", examples_path)
    train_run(with_train(run_config, steps=4), paths)
    # What a kill leaves behind: records past the checkpoint, and a save that did not finish.
    with (paths.run_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "train", "step": 5, "loss": 9.0}\n{"kind": "tr')
    (paths.run_path / "checkpoints" / "5.unfinished").mkdir()
    train_run(run_config, paths)
    resumed, uninterrupted = load_arrays(find_checkpoint(paths.run_path)), load_arrays(find_checkpoint(whole))
    assert resumed.keys() == uninterrupted.keys()
    for name, array in uninterrupted.items():
        np.testing.assert_array_equal(resumed[name], array, err_msg=name)
    assert records(paths.run_path, "train") == records(whole, "train")
    assert records(paths.run_path, "heldout") == records(whole, "heldout")
    assert not list((paths.run_path / "checkpoints").glob("*.unfinished"))


def test_a_run_continues_on_another_mesh_and_batch_size(whole, tmp_path, examples_path, run_config):
    paths = RunPaths(tmp_path / "run", examples_path)
    train_run(with_train(run_config, steps=4), paths)
    moved = dataclasses.replace(run_config, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    train_run(moved, paths)
    ours, theirs = load_arrays(find_checkpoint(paths.run_path)), load_arrays(find_checkpoint(whole))
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name], array, rtol=0, atol=2e-5, err_msg=name)
    last = train_run(with_train(moved, steps=9, batch_size=4), paths)
    assert load_checkpoint_info(last).rows == 68


def test_a_finished_run_is_left_as_it_is(whole, examples_path, run_config):
    before = (whole / "metrics.jsonl").read_bytes()
    assert train_run(run_config, RunPaths(whole, examples_path)) == whole / "checkpoints" / "8"
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_another_config_in_the_same_folder_is_refused(whole, examples_path, run_config):
    other = dataclasses.replace(run_config, optimizer=dataclasses.replace(run_config.optimizer, learning_rate=1.0))
    with pytest.raises(UsageError, match=r"begun with optimizer.learning_rate=0.003, got 1.0"):
        train_run(other, RunPaths(whole, examples_path))


def test_a_batch_that_does_not_divide_is_refused_before_anything_is_written(tmp_path, examples_path, run_config):
    with pytest.raises(UsageError, match=r"batch_size=6 is not a multiple"):
        train_run(with_train(run_config, batch_size=6), RunPaths(tmp_path / "run", examples_path))
    assert not (tmp_path / "run").exists()


def test_a_try_that_saved_nothing_leaves_no_tokenizer_behind(tmp_path, examples_path, run_config):
    paths = RunPaths(tmp_path / "run", examples_path)
    (paths.run_path / "tokenizer").mkdir(parents=True)
    (paths.run_path / "tokenizer" / "vocab.txt").write_text("of other examples", encoding="utf-8")
    last = train_run(with_train(run_config, steps=1), paths)
    for folder in (paths.run_path, last):
        assert (folder / "tokenizer" / "vocab.txt").read_text(encoding="utf-8") == "…"


def test_nothing_is_settled_in_a_run_folder_before_it_is_claimed(tmp_path, examples_path, run_config, monkeypatch):
    """What lies there unfinished may be a save of a job that runs on another host: it is to be told."""
    run_path, other = tmp_path / "run", Claim(tmp_path / "run").take()

    def look(path):
        assert path == run_path
        with pytest.raises(TakenOverError):
            other.require()
        raise InterruptedError

    monkeypatch.setattr(run, "finish_saves", look)
    with pytest.raises(InterruptedError):
        train_run(run_config, RunPaths(run_path, examples_path))
    other.require()  # the new job did not begin to train


def test_heldout_examples_of_another_tokenizer_are_refused(tmp_path, examples_path, foreign_heldout_path, run_config):
    with pytest.raises(UsageError, match=rf"{foreign_heldout_path} have another tokenizer .*e{{12}}…, f{{12}}… was"):
        train_run(run_config, RunPaths(tmp_path / "run", examples_path, foreign_heldout_path))


def test_steps_that_the_start_has_already_made_are_refused(whole, tmp_path, examples_path, run_config):
    with pytest.raises(UsageError, match=r"is at step 8, train.steps=8 leaves nothing to do.*larger"):
        train_run(run_config, RunPaths(tmp_path / "run", examples_path, start_from=whole))


@pytest.mark.slow
def test_another_compute_dtype_must_be_named(whole, tmp_path, examples_path, run_config, monkeypatch):
    paths = RunPaths(tmp_path / "run", examples_path)
    train_run(with_train(run_config, steps=4), paths)
    with monkeypatch.context() as accelerator:
        accelerator.setattr("jax.default_backend", lambda: "gpu")
        with pytest.raises(UsageError, match=r"compute dtype .* is float32, got bfloat16; keep it by --train.compute"):
            train_run(run_config, paths)
    last = train_run(with_train(run_config, compute_dtype="bfloat16"), paths)
    assert load_checkpoint_info(last).compute_dtype == "bfloat16"
    ours, theirs = (load_checkpoint_info(find_checkpoint(path)).history[-1]["loss"] for path in (last, whole))
    assert ours == pytest.approx(theirs, rel=0.01)


def test_a_run_remembers_what_it_was_begun_from(whole, tmp_path, examples_path, run_config, caplog):
    begun = RunPaths(tmp_path / "run", examples_path, start_from=whole)
    train_run(with_train(run_config, steps=9), begun)
    other = RunPaths(tmp_path / "run", examples_path, start_from=whole / "checkpoints" / "4")
    train_run(with_train(run_config, steps=10), other)
    assert f"begun from {whole}, so {other.start_from} is not used" in caplog.text
    assert read_json(begun.run_path / "config.json")["start_from"] == str(whole)


def test_start_from_another_size_is_refused(whole, tmp_path, examples_path, run_config):
    larger = dataclasses.replace(run_config, model=dataclasses.replace(run_config.model, d_model=128))
    with pytest.raises(UsageError, match=r"model.d_model=64, got 128.*t5pegasus grow"):
        train_run(larger, RunPaths(tmp_path / "run", examples_path, start_from=whole))


def test_of_what_it_begins_from_it_reads_each_chunk_once(whole, tmp_path, examples_path, run_config, monkeypatch):
    verified, filled = [], []
    describe, fill = t5pegasus.manifest._describe_file, t5pegasus.arrays._fill
    monkeypatch.setattr(t5pegasus.manifest, "_describe_file", lambda path: verified.append(path) or describe(path))
    monkeypatch.setattr(t5pegasus.arrays, "_fill", lambda path, *rest: filled.append(path) or fill(path, *rest))
    train_run(with_train(run_config, steps=9), RunPaths(tmp_path / "run", examples_path, start_from=whole))
    source = find_checkpoint(whole, verify_structure)
    files = [path for path in (source / "arrays").rglob("*") if path.is_file()]
    chunks = {path for path in files if is_chunk(str(path.relative_to(source)))}
    assert sorted(path for path in filled if path.is_relative_to(source)) == sorted(chunks)
    assert not chunks & set(verified)


def test_a_damaged_start_is_found_when_it_is_read_and_the_one_before_taken(
    whole, tmp_path, examples_path, run_config, caplog
):
    source = tmp_path / "source"
    shutil.copytree(whole, source)
    last = find_checkpoint(source)
    chunk = next(path for path in (last / "arrays" / "parameters.lm_head" / "c").rglob("*") if path.is_file())
    content = bytearray(chunk.read_bytes())
    content[5] ^= 1
    chunk.write_bytes(content)
    config = with_train(run_config, steps=1)
    with pytest.raises(DamagedError, match=r"lm_head/c/.* is damaged"):
        train_run(config, RunPaths(tmp_path / "exact", examples_path, start_from=last), keep_state=False)
    paths = RunPaths(tmp_path / "run", examples_path, start_from=source)
    info = load_checkpoint_info(train_run(config, paths, keep_state=False))
    assert "going back to the one before" in caplog.text
    assert info.history[0]["loss"] == load_checkpoint_info(source / "checkpoints" / "4").history[-1]["loss"]
    assert [record["step"] for record in records(paths.run_path, "train")] == [1]


def test_fine_tuning_takes_the_parameters_only(whole, tmp_path, examples_path, run_config):
    paths = RunPaths(tmp_path / "run", examples_path, start_from=whole)
    last = train_run(with_train(run_config, steps=4), paths, keep_state=False)
    info = load_checkpoint_info(last)
    assert (info.step, info.rows) == (4, 32)
    assert info.history[0]["loss"] == load_checkpoint_info(find_checkpoint(whole)).history[-1]["loss"]


def test_decay_steps_without_a_schedule_that_decays_by_them_are_refused_before_anything_is_written(
    tmp_path, examples_path, run_config
):
    optimizer = dataclasses.replace(run_config.optimizer, schedule="cosine", decay_steps=2, warmup_steps=1)
    config = dataclasses.replace(run_config, optimizer=optimizer)
    with pytest.raises(UsageError, match=r"decay_steps=2 has no effect with schedule=cosine, wsd was wanted; set"):
        train_run(config, RunPaths(tmp_path / "run", examples_path))
    assert not (tmp_path / "run").exists()


def test_a_flipped_bit_is_named_and_the_step_before_is_used(tmp_path, examples_path, run_config, caplog):
    paths = RunPaths(tmp_path / "run", examples_path)
    train_run(run_config, paths)
    last = find_checkpoint(paths.run_path)
    victim = next(file for file in (last / "arrays" / "parameters.lm_head" / "c").rglob("*") if file.is_file())
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"{victim.relative_to(last)} is damaged: .* the manifest says"):
        verify_checkpoint(last)
    assert find_last_good(paths.run_path) == paths.run_path / "checkpoints" / "4"
    assert train_run(with_train(run_config, steps=3), paths) == paths.run_path / "checkpoints" / "4"
    caplog.clear()
    with caplog.at_level(logging.INFO):
        train_run(with_train(run_config, steps=9), paths)
    assert caplog.text.count("going back to the one before") == 1
    assert caplog.text.count("continues from its checkpoint of step") == 1
    assert "continues from its checkpoint of step 4" in caplog.text
    assert caplog.text.count("time: about") == 1
    (last / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match="not a finished checkpoint"):
        verify_checkpoint(last)


@pytest.mark.slow
def test_a_model_learns_to_read_its_source(tmp_path, many_examples_path, run_config):
    """Targets repeat the beginning of their source: guessing without reading costs over 2 nats per token."""
    config = dataclasses.replace(run_config, model=dataclasses.replace(run_config.model, dropout_rate=0.0))
    config = with_train(config, steps=200, batch_size=16, log_every_steps=50, evaluate_every_steps=200)
    last = train_run(config, RunPaths(tmp_path / "run", many_examples_path))
    assert load_checkpoint_info(last).history[-1]["loss"] < 0.6
