"""Laws of a run that is watched and stopped: what a stop cuts off is made up for, and all time is accounted for."""

import dataclasses
import sys
import types

import numpy as np
import pytest

from t5pegasus.checkpoint import find_last_good, list_checkpoints, load_arrays, load_checkpoint_info
from t5pegasus.errors import PreemptedError, UsageError
from t5pegasus.storage import Claim, TakenOverError
from t5pegasus.train.control import Control, Request
from t5pegasus.train.goodput import Goodput, read_attempts, sum_attempts
from t5pegasus.train.metrics import read_metrics
from t5pegasus.train.norms import KINDS
from t5pegasus.train.run import RunPaths, train_run

TIMED = {
    "seconds", "time", "goodput", "updates", "tokens_per_second", "rows_per_second", "examples_per_second", "mfu",
    "data_wait_fraction",
}  # fmt: skip


@pytest.fixture(scope="module")
def config(run_config):
    model = dataclasses.replace(
        run_config.model, d_model=16, d_kv=4, d_ff=24, num_heads=4, num_encoder_layers=1, num_decoder_layers=1
    )
    train = dataclasses.replace(
        run_config.train, steps=8, log_every_steps=3, evaluate_every_steps=4, save_every_steps=3, sample_every_steps=4,
        keep_best="loss", profile_steps="2:3", keep_checkpoints=9,
    )  # fmt: skip
    return dataclasses.replace(run_config, model=model, train=train)


def sample(config, parameters):
    """What a model would write, were it asked: numbers that its parameters decide."""
    text = f"{float(np.abs(parameters['lm_head']).sum()):.6f}"
    return [{"source": "原文", "reference": "摘要", "summary": text, "scores": {"rouge-1": 50.0}}]


def lasting(run_path):
    records = read_metrics(run_path / "metrics.jsonl")
    return [
        {name: value for name, value in record.items() if name not in TIMED}
        for record in records
        if record["kind"] != "start"
    ]


class StopIn(Control):
    """Asks to stop as soon as an activity begins at a step."""

    def __init__(self, name, step):
        super().__init__()
        self._at = name, step

    def doing(self, name, step=None):
        if (name, step) == self._at:
            self.request(Request.STOP)
        return super().doing(name, step)


@pytest.mark.slow
def test_a_job_in_whose_run_folder_another_one_begins_ends_and_changes_nothing_more(tmp_path, examples_path, config):
    run_path = tmp_path / "run"

    class TakeOver(Control):
        def doing(self, name, step=None):
            if (name, step) == ("save", 6):
                Claim(run_path).take()
            return super().doing(name, step)

    with pytest.raises(TakenOverError, match="was taken over by process"):
        train_run(config, RunPaths(run_path, examples_path), sampler=sample, control=TakeOver())
    assert {path.name for path in list_checkpoints(run_path)} <= {"3", "4"}  # that of 4 was perhaps on its way


@pytest.fixture
def fake_wandb(monkeypatch):
    """What of the package is used, keeping what it is given."""
    calls = types.SimpleNamespace(init=[], logged=[], configs=[], finished=0)

    class Run:
        config = types.SimpleNamespace(update=lambda values, allow_val_change: calls.configs.append(values))

        def define_metric(self, name, step_metric):
            assert (name, step_metric) == ("*", "step")

        def log(self, values):
            calls.logged.append(values)

        def finish(self):
            calls.finished += 1

    def init(**options):
        calls.init.append(options)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    return calls


@pytest.fixture(scope="module")
def whole(tmp_path_factory, examples_path, config):
    run_path = tmp_path_factory.mktemp("whole") / "run"
    train_run(config, RunPaths(run_path, examples_path), sampler=sample)
    return run_path


def test_norms_samples_and_speeds_are_in_the_metrics(whole):
    records = read_metrics(whole / "metrics.jsonl")
    first = next(record for record in records if record["kind"] == "train")
    assert (first["step"], first["updates"]) == (3, 3)
    groups = {"token_embedding", "lm_head", "norms", "relative_bias", "encoder.mlp", "decoder.cross_attention"}
    for kind in KINDS:
        assert groups < first["norms"][kind].keys()
        assert all(value > 0 for value in first["norms"][kind].values())
    assert first["examples_per_second"] > first["rows_per_second"] > 0
    assert first["time"]["step"] + first["time"]["data_wait"] == pytest.approx(first["seconds"])
    samples = [(record["step"], record["samples"][0]["source"]) for record in records if record["kind"] == "sample"]
    assert samples == [(4, "原文"), (8, "原文")]
    assert list((whole / "profile").rglob("*.xplane.pb"))


def test_stopped_in_evaluations_it_makes_up_for_them(whole, tmp_path, examples_path, config):
    paths = RunPaths(tmp_path / "run", examples_path)
    with pytest.raises(PreemptedError, match="the last checkpoint is intact"):
        train_run(config, paths, sampler=sample, control=StopIn("evaluate", 0))
    assert find_last_good(paths.run_path) is None
    with pytest.raises(PreemptedError, match="step 4 of 8 is saved"):
        train_run(config, paths, sampler=sample, control=StopIn("evaluate", 4))
    info = load_checkpoint_info(find_last_good(paths.run_path))
    assert (info.step, info.course["owed"]) == (4, ["evaluate", "sample"])
    assert [entry["step"] for entry in info.history] == [0]
    with pytest.raises(PreemptedError, match="step 4 of 8 is saved"):
        train_run(config, paths, sampler=sample, control=StopIn("sample", 4))
    info = load_checkpoint_info(find_last_good(paths.run_path))
    assert (info.step, info.course["owed"]) == (4, ["sample"])
    assert [entry["step"] for entry in info.history] == [0, 4]
    train_run(config, paths, sampler=sample, control=StopIn("evaluate", 8))  # it is at its end, and comes to it
    assert lasting(paths.run_path) == lasting(whole)
    for path in list_checkpoints(whole):
        ours = paths.run_path / "checkpoints" / path.name
        assert load_checkpoint_info(ours) == load_checkpoint_info(path)
        arrays = load_arrays(ours)
        for name, array in load_arrays(path).items():
            np.testing.assert_array_equal(arrays[name], array, err_msg=name)
    total = sum_attempts(read_attempts(paths.run_path))
    assert total["num_attempts"] == 4
    assert total["lost_steps"] == 0


@pytest.mark.slow
def test_a_run_begun_from_a_stopped_one_does_not_end_what_that_one_was_in_the_middle_of(
    tmp_path, examples_path, config
):
    source = RunPaths(tmp_path / "source", examples_path)
    with pytest.raises(PreemptedError):
        train_run(config, source, sampler=sample, control=StopIn("evaluate", 4))
    assert load_checkpoint_info(find_last_good(source.run_path)).course.keys() == {"owed", "interval"}
    losses = {}
    for every in (1, 3):
        train = dataclasses.replace(config.train, steps=6, log_every_steps=every, profile_steps="")
        paths = RunPaths(tmp_path / str(every), examples_path, start_from=source.run_path)
        train_run(dataclasses.replace(config, train=train), paths, sampler=sample)
        records = read_metrics(paths.run_path / "metrics.jsonl")
        assert [record["step"] for record in records if record["kind"] == "heldout"] == [4, 6]
        losses[every] = [record["loss"] for record in records if record["kind"] == "train"]
    assert losses[3] == [pytest.approx(sum(losses[1]) / 2)]


def test_all_time_is_accounted_for_and_what_is_done_again_is_lost(whole, tmp_path, config, examples_path, fake_wandb):
    paths = RunPaths(tmp_path / "run", examples_path)
    logged = dataclasses.replace(config, train=dataclasses.replace(config.train, wandb_project="summaries"))

    class Killed(BaseException):
        pass

    class KillAt(Control):
        def doing(self, name, step=None):
            if (name, step) == ("data", 7):  # behind the record of step 6, and its checkpoint is not whole
                raise Killed
            return super().doing(name, step)

    with pytest.raises(Killed):
        train_run(logged, paths, sampler=sample, control=KillAt())
    (paths.run_path / "checkpoints" / "6" / "manifest.json").unlink()

    class SaveAt(Control):
        def doing(self, name, step=None):
            if (name, step) == ("data", 4):  # agreed on at 6, which is saved anyway, and done with then
                self.request(Request.SAVE)
            return super().doing(name, step)

    control = SaveAt()
    train_run(logged, paths, sampler=sample, control=control)
    saved = [[path.name for path in list_checkpoints(run)] for run in (paths.run_path, whole)]
    assert saved[0] == saved[1]
    assert lasting(paths.run_path) == lasting(whole)
    first, second = read_attempts(paths.run_path)
    assert (first["first_step"], first["last_step"]) == (0, 7)
    assert (second["first_step"], second["last_step"], second["lost_steps"]) == (4, 8, 2)
    assert sum(second["seconds"].values()) == pytest.approx(sum(control.spent().values()), abs=1.0)
    assert 0 < second["lost_seconds"] < first["seconds"]["step"]
    total = sum_attempts([first, second])
    assert sum(total["seconds"].values()) == pytest.approx(second["updated"] - first["began"], abs=0.05)
    assert 0 < total["goodput"] < 1
    assert all(total["seconds"][part] > 0 for part in ("compile", "restore", "evaluation", "save_stall", "lost_work"))
    assert [options["project"] for options in fake_wandb.init] == ["summaries"] * 2
    assert fake_wandb.init[0]["id"] == fake_wandb.init[1]["id"]
    assert fake_wandb.finished == 2
    assert fake_wandb.configs == [logged.to_json()] * 2
    assert any("train/norms/update/encoder.mlp" in values for values in fake_wandb.logged)


def test_without_its_package_wandb_is_refused_in_words(tmp_path, examples_path, config, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    logged = dataclasses.replace(config, train=dataclasses.replace(config.train, wandb_project="summaries"))
    with pytest.raises(UsageError, match=r"pip install 't5pegasus\[wandb\]'"):
        train_run(logged, RunPaths(tmp_path / "run", examples_path), sampler=sample)


def test_samples_without_heldout_text_are_refused(tmp_path, examples_path, config):
    anyhow = dataclasses.replace(config, train=dataclasses.replace(config.train, keep_best=None))
    with pytest.raises(UsageError, match="held-out sources, and there are none"):
        train_run(anyhow, RunPaths(tmp_path / "run", examples_path / "heldout"), sampler=sample)


def test_a_damaged_line_of_the_account_is_passed_over_and_named(tmp_path, caplog):
    first = Goodput()
    first.begin(tmp_path, 0, Control())
    first.write(4, {"step": 2.0}, at_once=True)
    path = tmp_path / "goodput.jsonl"
    path.write_bytes(b"\0\0\0\n[1]\n" + path.read_bytes())
    second = Goodput()
    second.begin(tmp_path, 4, Control())
    assert caplog.text.count("dropping a damaged line") == 2
    totals = second.totals(8, {"step": 3.0})
    assert (totals["num_attempts"], totals["seconds"]["step"]) == (2, 5.0)


def test_a_rollback_counts_as_lost_work_of_its_own_attempt(tmp_path):
    goodput = Goodput()
    goodput.begin(tmp_path, 0, Control())
    records = [{"kind": "train", "step": step, "updates": 4, "time": {"step": 2.0}} for step in (4, 8)]
    goodput.lose([*records, {"kind": "heldout", "step": 8}], 6)
    goodput.begin(tmp_path, 6, Control())
    totals = goodput.totals(8, {"start": 1.0, "step": 4.0, "data": 1.0, "elsewhere": 1.0})
    assert totals["lost_steps"] == 2
    assert totals["seconds"] == pytest.approx(
        {"step": 3.0, "data_wait": 1.0, "compile": 0.0, "restore": 0.0, "evaluation": 0.0, "sampling": 0.0,
         "save_stall": 0.0, "event": 0.0, "other": 2.0, "lost_work": 1.0, "down": 0.0}
    )  # fmt: skip
