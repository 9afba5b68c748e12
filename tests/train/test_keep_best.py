"""Laws of keep-best and early stopping: the history alone decides, the best is found, resuming changes nothing."""

import dataclasses
import logging
import shutil

import jax
import numpy as np
import pytest

from t5pegasus.checkpoint import (
    find_checkpoint,
    find_last_good,
    list_checkpoints,
    load_arrays,
    load_checkpoint_info,
)
from t5pegasus.config import TrainConfig
from t5pegasus.errors import UsageError
from t5pegasus.train.early_stopping import forget_best, has_stopped, judge, plain_entry
from t5pegasus.train.evaluation import Scorer
from t5pegasus.train.metrics import read_metrics
from t5pegasus.train.run import RunPaths, train_run


def judged(name, values):
    config, history = TrainConfig(keep_best=name), ()
    for step, value in enumerate(values):
        history = (*history, judge(config, step, {"loss": 1.0} | {name: value}, history))
    return [entry["best"] for entry in history]


def test_lower_losses_and_higher_scores_are_better_and_a_tie_is_not():
    assert judged("loss", [3.0, 2.0, 2.0, 2.5, 1.0]) == [True, True, False, False, True]
    assert judged("rouge-l", [3.0, 2.0, 3.0, 4.0]) == [True, False, False, True]
    assert judged("rouge-l", [float("nan"), 1.0, float("nan")]) == [False, True, False]


def test_patience_counts_evaluations_since_the_best():
    def history(*marks):
        return tuple({"step": step, "loss": 1.0, "best": mark} for step, mark in enumerate(marks))

    patient = TrainConfig(keep_best="loss", patience=2)
    assert not has_stopped(patient, ())
    assert not has_stopped(patient, history(False, True, False))
    assert has_stopped(patient, history(True, False, False))
    assert not has_stopped(patient, history(True, False, False, True))
    assert not has_stopped(dataclasses.replace(patient, patience=0), history(True, False, False))
    start = plain_entry(patient, 0, {"loss": 1.0})
    assert not has_stopped(patient, (start, start, *history(True, False)))
    assert not has_stopped(patient, forget_best(history(True, False, False)))


def test_without_it_an_entry_is_step_and_loss():
    assert judge(TrainConfig(), 4, {"loss": 2.0, "accuracy": 0.5}, ()) == {"step": 4, "loss": 2.0}


def test_patience_without_a_score_is_refused():
    with pytest.raises(UsageError, match=r"train.patience=3 counts .* keep_best=None must name the score, e.g. loss"):
        TrainConfig(patience=3)


# Everything at once, as the hardest case of resuming: noise, smoothing, rates, freezing, average, scores, patience.
SCORES = {2: 5.0, 4: 7.0, 6: 9.0, 8: 6.0, 10: 9.0, 12: 1.0}
STOPPED_AT = 12


class GivenScores:
    """Scores by the number of evaluations, as if summaries had been written; counts where it is asked."""

    def __init__(self, first: int = 0):
        self.step = first

    def __call__(self, parameters, check):
        assert len(parameters["lm_head"].devices()) == jax.device_count()  # where they are trained
        self.step += 2
        return {"rouge-l": SCORES.get(self.step - 2, 0.0), "other": 1.0}


def scorer(first: int = 0) -> Scorer:
    return Scorer(("rouge-l", "other"), GivenScores(first))


@pytest.fixture(scope="module")
def everything(run_config):
    optimizer = dataclasses.replace(
        run_config.optimizer, layer_decay=0.8, rate_factors=("decoder.*=2",), freeze=("encoder.layers[:1]", "lm_head")
    )
    train = dataclasses.replace(
        run_config.train, steps=40, evaluate_every_steps=2, save_every_steps=5, keep_checkpoints=1, label_smoothing=0.1,
        decoder_noise_rate=0.3, decoder_noise_source="target", ema_decay=0.9, keep_best="rouge-l", patience=3,
    )  # fmt: skip
    return dataclasses.replace(run_config, optimizer=optimizer, train=train)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, examples_path, everything):
    run_path = tmp_path_factory.mktemp("whole") / "run"
    train_run(everything, RunPaths(run_path, examples_path), scorer=scorer())
    return run_path


def test_a_run_stops_early_and_its_name_means_its_best_checkpoint(whole, examples_path, everything, caplog):
    assert [path.name for path in list_checkpoints(whole)] == ["12", "6"]
    assert (find_checkpoint(whole).name, find_last_good(whole).name) == ("6", "12")
    history = load_checkpoint_info(find_last_good(whole)).history
    assert [entry["step"] for entry in history if entry.get("best")] == [2, 4, 6]
    assert history[0].keys() == {"step", "loss", "rouge-l"}
    assert [(entry["step"], entry["rouge-l"]) for entry in history] == [(0, 0.0), *SCORES.items()]
    records = read_metrics(whole / "metrics.jsonl")
    assert [record["other"] for record in records if record["kind"] == "heldout"] == [1.0] * 7
    before = (whole / "metrics.jsonl").read_bytes()
    with caplog.at_level(logging.INFO):
        assert train_run(everything, RunPaths(whole, examples_path), scorer=scorer()) == whole / "checkpoints" / "6"
    assert "finished, at step 12 of 40, stopped early by train.patience=3" in caplog.text
    assert (whole / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_resumed_with_everything_on_it_is_the_uninterrupted_run_bit_for_bit(whole, tmp_path, examples_path, everything):
    paths = RunPaths(tmp_path / "run", examples_path)

    class Killed(Exception):
        pass

    given = GivenScores()

    def fail_at_ten(parameters, check):
        if given.step == 10:
            raise Killed
        return given(parameters, check)

    with pytest.raises(Killed):
        train_run(everything, paths, scorer=Scorer(("rouge-l", "other"), fail_at_ten))
    assert find_last_good(paths.run_path).name == "6"  # saved because it was the best, between two intervals
    train_run(everything, paths, scorer=scorer(first=8))
    for step in ("6", "12"):
        ours, theirs = (load_arrays(path / "checkpoints" / step) for path in (paths.run_path, whole))
        assert ours.keys() == theirs.keys()
        for name, array in theirs.items():
            np.testing.assert_array_equal(ours[name], array, err_msg=name)
        histories = [load_checkpoint_info(path / "checkpoints" / step).history for path in (paths.run_path, whole)]
        assert histories[0] == histories[1]
    losses = [
        [
            (record["step"], record["loss"])
            for record in read_metrics(path / "metrics.jsonl")
            if record["kind"] != "start"
        ]
        for path in (paths.run_path, whole)
    ]
    assert losses[0] == losses[1]


def test_what_is_frozen_stays_and_what_is_not_moves(whole, everything):
    arrays = load_arrays(find_last_good(whole))
    assert not arrays["second_moment.lm_head"].any()
    np.testing.assert_array_equal(arrays["ema.lm_head"], arrays["parameters.lm_head"])
    for name in ("wi_0", "wo"):
        moment = arrays[f"second_moment.encoder.layers.mlp.{name}"]
        assert not moment[0].any()
        assert (moment[1] > 0).any()
    assert (arrays["ema.decoder.final_norm"] != arrays["parameters.decoder.final_norm"]).any()


def test_a_run_that_begins_from_it_looks_for_a_best_of_its_own(whole, tmp_path, examples_path, everything):
    paths = RunPaths(tmp_path / "run", examples_path, start_from=whole)
    fewer = dataclasses.replace(everything, train=dataclasses.replace(everything.train, steps=8, patience=0))
    best = train_run(fewer, paths, scorer=Scorer(("rouge-l",), lambda *_: {"rouge-l": 1.0}))
    assert best == paths.run_path / "checkpoints" / "8"
    history = load_checkpoint_info(best).history
    assert [entry["step"] for entry in history if "best" in entry] == [8]
    assert [entry["step"] for entry in history] == [0, 2, 4, 6, 6, 8]


def test_a_best_checkpoint_that_is_damaged_is_named_and_another_taken(whole, tmp_path, caplog):
    copy = tmp_path / "run"
    shutil.copytree(whole, copy)
    (copy / "checkpoints" / "6" / "checkpoint.json").write_text("{}", encoding="utf-8")
    assert find_checkpoint(copy).name == "12"
    assert "the best checkpoint" in caplog.text
    assert "checkpoint.json is damaged" in caplog.text


def test_a_score_that_the_run_will_not_know_is_refused(tmp_path, examples_path, run_config):
    config = dataclasses.replace(run_config, train=dataclasses.replace(run_config.train, keep_best="rouge-l"))
    with pytest.raises(UsageError, match=r"keep_best='rouge-l' is not evaluated .* one of loss, accuracy; scores of"):
        train_run(config, RunPaths(tmp_path / "run", examples_path))
    with pytest.raises(UsageError, match=r"keep_best='rouge-l' needs held-out examples; give --heldout-path"):
        train_run(config, RunPaths(tmp_path / "run", examples_path / "heldout"))
