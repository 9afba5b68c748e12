"""Laws of numerical safety: a bad update is skipped, gone back behind, or the end; always on record, replayed alike."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5pegasus.checkpoint import find_last_good, load_arrays, load_checkpoint_info
from t5pegasus.config import MeshConfig
from t5pegasus.data.loader import PackedRows, load_batches
from t5pegasus.errors import DivergedError, PreemptedError
from t5pegasus.sharding import make_mesh, place_batch
from t5pegasus.train import run as run_module
from t5pegasus.train.control import Control, Request
from t5pegasus.train.course import Course
from t5pegasus.train.divergence import Why, init_recent, judge_update
from t5pegasus.train.meter import Meter
from t5pegasus.train.metrics import MetricsWriter, read_metrics
from t5pegasus.train.run import RunPaths, train_run
from t5pegasus.train.state import init_state, state_to_arrays
from t5pegasus.train.step import make_train_step


@pytest.fixture(scope="module")
def config(run_config):
    model = dataclasses.replace(
        run_config.model, d_model=16, d_kv=4, d_ff=24, num_heads=4, num_encoder_layers=1, num_decoder_layers=1
    )
    train = dataclasses.replace(
        run_config.train, steps=8, log_every_steps=3, evaluate_every_steps=100, save_every_steps=2, keep_checkpoints=9
    )
    return dataclasses.replace(run_config, model=model, train=train, mesh=MeshConfig(data=8))


@pytest.fixture(scope="module")
def without_heldout(examples_path):
    return examples_path / "heldout"


def with_train(config, **fields):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **fields))


def poison(batch):
    return batch._replace(decoder_loss_weights=batch.decoder_loss_weights * np.float32("nan"))


@pytest.fixture
def poisoned(monkeypatch):
    """Rows of the stream whose batch has a loss that is no number."""
    rows = set()

    def place(batch, mine, size, mesh):
        bad = rows & set(np.asarray(batch.row_ids).tolist())
        return place_batch(poison(batch) if bad else batch, mine, size, mesh)

    monkeypatch.setattr(run_module, "place_batch", place)
    return rows


def ledger(run_path):
    """What the metrics say of bad updates; a loss that is no number equals itself, being text."""
    return [record for record in read_metrics(run_path / "metrics.jsonl") if record["kind"] == "divergence"]


def curve(run_path):
    return [
        (record["step"], record["rows"], record.get("loss"), record.get("skipped"))
        for record in read_metrics(run_path / "metrics.jsonl")
        if record["kind"] == "train"
    ]


def same_state(ours, theirs):
    ours, theirs = load_arrays(find_last_good(ours)), load_arrays(find_last_good(theirs))
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


@pytest.fixture(scope="module")
def skipping(config):
    return with_train(config, on_divergence="skip", spike_factor=6.0, spike_window=3)


def test_a_skipped_update_leaves_all_but_step_and_rows(skipping, examples_path):
    config = skipping
    mesh = make_mesh(config.mesh)
    step = make_train_step(config, mesh)
    with (
        PackedRows(examples_path, config.data, 0, 101) as rows,
        contextlib.closing(load_batches(rows, 8, start_row=0)) as stream,
    ):
        batches = [place_batch(next(stream), np.arange(8), 8, mesh) for _ in range(3)]
    bad = place_batch(poison(jax.tree.map(np.asarray, batches[1])), np.arange(8), 8, mesh)
    state = init_state(config.model, 0, mesh, config.optimizer, window=3)
    state, _ = step(state, batches[0])
    before = {name: np.asarray(array) for name, array in state_to_arrays(state).items()}
    state, metrics = step(state, bad)
    assert Why(int(metrics["why"])) == Why.LOSS_NOT_FINITE | Why.GRADIENT_NOT_FINITE
    for name, array in state_to_arrays(state).items():
        wanted = before[name] + {"step": 1, "rows": 8}.get(name, 0)
        np.testing.assert_array_equal(array, wanted, err_msg=name)
    state, metrics = step(state, batches[2])
    assert int(metrics["why"]) == 0
    assert not np.array_equal(state.parameters["lm_head"], before["parameters.lm_head"])


def test_parameters_do_not_overflow_by_a_finite_gradient(skipping, examples_path):
    optimizer = dataclasses.replace(skipping.optimizer, learning_rate=3e38, schedule="constant", warmup_steps=0)
    config = dataclasses.replace(skipping, optimizer=optimizer, mesh=MeshConfig(data=1))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with (
        PackedRows(examples_path, config.data, 0, 101) as rows,
        contextlib.closing(load_batches(rows, 8, start_row=0)) as stream,
    ):
        batch = place_batch(next(stream), np.arange(8), 8, mesh)
    state = init_state(config.model, 0, mesh, optimizer, window=3)
    before = {name: np.asarray(array) for name, array in state.parameters.items()}
    state, metrics = make_train_step(config, mesh)(state, batch)
    assert Why(int(metrics["why"])) == Why.UPDATE_NOT_FINITE
    for name, array in before.items():
        np.testing.assert_array_equal(state.parameters[name], array, err_msg=name)


def test_a_spike_stands_out_of_the_window_and_a_new_level_is_learnt(config):
    train = with_train(config, spike_factor=6.0, spike_window=8).train
    judge = jax.jit(lambda loss, norm, recent: judge_update(train, loss, norm, norm, recent))
    recent, seen = init_recent(8), []
    losses = [2.0, 2.1] * 4 + [2.2, 9.0, 2.1, float("nan")] + [4.0] * 12
    for loss in losses:
        why, limits, recent = judge(jnp.float32(loss), jnp.float32(1.0), recent)
        seen.append(Why(int(why)))
    assert seen[:8] == [Why(0)] * 8  # the window is not full yet
    assert seen[8:12] == [Why(0), Why.LOSS_SPIKE, Why(0), Why.LOSS_NOT_FINITE]
    assert seen[12] == Why.LOSS_SPIKE  # the spike before does not hide it
    assert seen[-1] == Why(0)
    assert int(recent["count"]) == len(losses) - 1  # what is not finite is not remembered
    assert float(limits["loss_limit"]) < 9.0


def test_reported_limits_are_those_of_the_last_update_and_not_a_mean_of_some(config):
    meter = Meter(config, Control(), Course(), 1e9)
    counts = dict.fromkeys(("source_tokens", "target_tokens", "examples", "bad_examples"), 1.0)
    for limit in (float("inf"), 5.0, 4.0):
        meter.add(
            {**counts, "rows": 8, "why": Why(0), "loss": 2.0, "loss_limit": limit, "grad_norm_limit": float("inf")}
        )
    record = meter.report()
    assert (record["loss"], record["loss_limit"]) == (2.0, 4.0)
    assert "grad_norm_limit" not in record  # there is none yet


def test_skips_are_on_record_and_a_killed_run_skips_the_same(tmp_path, without_heldout, skipping, poisoned):
    poisoned |= {17, 42}
    whole, stopped = (RunPaths(tmp_path / name, without_heldout) for name in ("whole", "stopped"))
    train_run(skipping, whole)
    records = ledger(whole.run_path)
    assert [(record["step"], record["action"], record["rows"]) for record in records] == [
        (3, "skip", [16, 24]), (6, "skip", [40, 48]),
    ]  # fmt: skip
    assert records[0]["why"] == "loss is not finite, gradient norm is not finite"
    assert (records[0]["loss"], records[0]["grad_norm"]) == ("nan", "nan")
    assert [(step, rows, skipped) for step, rows, _, skipped in curve(whole.run_path)] == [
        (3, 24, 1), (6, 48, 1), (8, 64, None),
    ]  # fmt: skip
    for step in (2, 5):  # it is saved at 4, an interval of saving, and at 7: both in the middle of one of logging
        with pytest.raises(PreemptedError):
            train_run(skipping, stopped, control=stop_behind(step))
    train_run(skipping, stopped)
    assert ledger(stopped.run_path) == records
    assert curve(stopped.run_path) == curve(whole.run_path)
    same_state(stopped.run_path, whole.run_path)
    train_run(with_train(skipping, steps=9, spike_window=5), stopped)  # another window begins anew
    arrays = load_arrays(find_last_good(stopped.run_path))
    assert (arrays["recent.loss"].shape, int(arrays["recent.count"])) == ((5,), 1)


def stop_behind(step):
    """A control that asks to stop once so many updates are sent."""

    class StopsAt(Control):
        def doing(self, name, at=None):
            if name == "device" and at == step:
                self.request(Request.STOP)
            return super().doing(name, at)

    return StopsAt()


def test_too_many_skips_in_a_row_end_the_run(tmp_path, without_heldout, skipping, poisoned):
    poisoned |= set(range(16, 64))
    paths = RunPaths(tmp_path / "run", without_heldout)
    with pytest.raises(DivergedError, match=r"update 5: loss is not finite.*max_skips=2 updates skipped in a row"):
        train_run(with_train(skipping, max_skips=2), paths)
    assert [(record["step"], record["action"]) for record in ledger(paths.run_path)] == [
        (3, "skip"), (4, "skip"), (5, "abort"),
    ]  # fmt: skip
    assert load_checkpoint_info(find_last_good(paths.run_path)).step == 4
    with pytest.raises(DivergedError, match="update 5"):  # the count goes on where the checkpoint has it
        train_run(with_train(skipping, max_skips=2), paths)


def test_without_a_policy_a_bad_update_ends_the_run(tmp_path, without_heldout, config, poisoned):
    poisoned.add(25)
    paths = RunPaths(tmp_path / "run", without_heldout)
    with pytest.raises(DivergedError, match=r"update 4: loss is not finite.*the last checkpoint is intact"):
        train_run(config, paths)
    assert [record["action"] for record in ledger(paths.run_path)] == ["abort"]
    assert find_last_good(paths.run_path).name == "2"


@pytest.fixture(scope="module")
def going_back(config):
    return with_train(config, on_divergence="rollback", max_rollbacks=2)


def test_it_goes_back_behind_the_bad_rows_twice_and_then_ends(tmp_path, without_heldout, going_back, poisoned):
    poisoned |= {25, 50}
    whole = RunPaths(tmp_path / "whole", without_heldout)
    train_run(with_train(going_back, steps=5), whole)
    records = ledger(whole.run_path)
    assert [(r["step"], r["at_step"], r["rows"], r["skipped_rows"], r["rollback"]) for r in records] == [
        (2, 4, [24, 32], [16, 32], 1), (4, 5, [48, 56], [48, 56], 2),
    ]  # fmt: skip
    steps = [step for step, *_ in curve(whole.run_path)]
    assert steps == sorted(set(steps))
    poisoned |= {66}
    with pytest.raises(DivergedError, match=r"max_rollbacks=2 rollbacks"):
        train_run(going_back, whole)
    assert [record["action"] for record in ledger(whole.run_path)] == ["rollback", "rollback", "abort"]
    assert ledger(whole.run_path)[:2] == records


@pytest.mark.slow
def test_a_run_killed_around_a_rollback_has_the_same_ledger(
    tmp_path, without_heldout, going_back, poisoned, monkeypatch
):
    poisoned |= {25}
    whole, killed = (RunPaths(tmp_path / name, without_heldout) for name in ("whole", "killed"))
    train_run(going_back, whole)

    class Killed(BaseException):
        pass

    write = MetricsWriter.write

    def kill(self, kind, step, **values):
        write(self, kind, step, **values)
        if (kind, step) == ("train", 3) and values["rows"] > 24:  # behind the rollback, before it is saved
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "write", kill)
        with pytest.raises(Killed):
            train_run(going_back, killed)
    assert "rollbacks" not in load_checkpoint_info(find_last_good(killed.run_path)).course
    train_run(going_back, killed)
    assert ledger(killed.run_path) == ledger(whole.run_path) != []
    assert curve(killed.run_path) == curve(whole.run_path)
    same_state(killed.run_path, whole.run_path)
    assert load_checkpoint_info(find_last_good(whole.run_path)).course["rollbacks"] == 1
