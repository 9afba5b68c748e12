"""Laws of growth schedules: what is written is what is meant, and the history alone decides."""

import json
import math

import pytest

from launch.growth_events import check_losses, choose_stages, plan_events
from launch.growth_schedule import AtStep, Stage, WhenFlat, read_schedule
from t5pegasus.checkpoint import CheckpointInfo
from t5pegasus.config import OptimizerConfig, RunConfig
from t5pegasus.errors import ArtifactError, UsageError
from t5pegasus.json_files import write_json
from t5pegasus.presets import small
from t5pegasus.train.phases import record_event


def losses(*values, first=0, every=100):
    return [{"step": first + every * index, "loss": value} for index, value in enumerate(values)]


def is_flat(*values, evaluations=2, flat=0.01, min_steps=0):
    entries = losses(*values)
    return WhenFlat(flat, evaluations, min_steps).is_due(entries[-1]["step"] if entries else 0, entries)


def test_flat_means_that_the_best_loss_hardly_improved():
    assert not is_flat()
    assert not is_flat(2.0, 2.0)  # not more than two yet
    assert is_flat(2.0, 2.0, 2.0)
    assert not is_flat(2.0, 1.9, 1.9)  # 5 % within the last two
    assert is_flat(2.0, 1.9, 1.9, 1.9)
    assert is_flat(2.0, 2.5, 1.99)  # 0.5 %
    assert not is_flat(2.0, 1.98, 1.979)
    assert is_flat(1.0, 3.0, 3.0)  # worse is no improvement
    assert not is_flat(math.nan, 2.0, 2.0)  # there was no loss to improve on
    assert is_flat(2.0, math.nan, math.nan)


def test_flat_waits_for_its_updates():
    assert not is_flat(2.0, 2.0, 2.0, min_steps=201)
    assert is_flat(2.0, 2.0, 2.0, min_steps=200)


def test_a_step_is_due_from_then_on():
    assert [AtStep(5).is_due(step, []) for step in (4, 5, 6)] == [False, True, True]


def test_both_forms_say_the_same(tmp_path):
    plan = tmp_path / "how.json"
    plan.write_text('{"seed": 7}', encoding="utf-8")
    inline = read_schedule(
        ["step=20000:large", f"flat=0.002/3,min_steps=5000:d_model=1280,d_ff=4096:{plan}"]
    )  # fmt: skip
    stages = [
        {"when": {"step": 20000}, "to": "large"},
        {
            "when": {"flat": 0.002, "evaluations": 3, "min_steps": 5000},
            "to": {"d_model": 1280, "d_ff": 4096},
            "plan": {"seed": 7},
        },
    ]
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps({"schema": 1, "stages": stages}), encoding="utf-8")
    assert inline == read_schedule([str(path)])
    assert inline == (
        Stage(AtStep(20000), "large", {}),
        Stage(WhenFlat(0.002, 3, 5000), "d_model=1280,d_ff=4096", {"seed": 7}),
    )


def test_a_run_keeps_its_schedule_and_can_give_up_what_is_ahead(tmp_path):
    stages = read_schedule(["step=9:base", "flat=0.002/3,min_steps=50:d_model=1024,num_heads=16"])
    assert choose_stages(None, tmp_path) == choose_stages(["none"], tmp_path) == ()
    events = plan_events(CONFIG, stages)
    write_json(tmp_path / "config.json", {"schema": 1, "events": [record_event(event) for event in events]})
    assert choose_stages(None, tmp_path) == stages
    assert choose_stages(["none"], tmp_path) == ()
    for step, made in ((8, events[:0]), (10, events[:1])):
        checkpoint = tmp_path / "checkpoints" / str(step)
        checkpoint.mkdir(parents=True)
        lineage = tuple({"plan_hash": event.plan_hash, "step": 9} for event in made)
        info = CheckpointInfo(CONFIG, step, 8 * step, "float32", "f" * 64, lineage=lineage)
        write_json(checkpoint / "checkpoint.json", info.to_json())
        write_json(checkpoint / "manifest.json", {})
    assert choose_stages(["none"], tmp_path) == stages[:1]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("step=5", r"growth='step=5' is neither a stage nor a file; write step=20000:large"),
        ("at=5:large", r"stage 1 \(at=5:large\): unknown trigger 'at'; write step="),
        ("step=x:large", r"step='x' is not a number; write step=20000"),
        ("flat=0.1:large", r"evaluations='' is not a number; write flat=0.002/3"),
        ("flat=2/3:large", r"flat=2.0 must lie in \(0, 1\): 0.002 means"),
        ("flat=0.1/0:large", r"evaluations=0 must be a whole number, at least 1"),
        ("step=0:large", r"step=0 must be a whole number, at least 1"),
        ("step=5,min_steps=2:large", r"when: unknown field 'min_steps'; it has step"),
        ("step=5,flat=0.1/2:large", r"give either a step or flat"),
        ("min_steps=5:large", r"give either a step or flat"),
        ("step=5:", r"to='' is no target; give a preset"),
        ("step=5:large:nowhere.json", r"nowhere.json does not exist"),
    ],
)
def test_what_is_no_stage_is_said_to_be_none(argument, message):
    with pytest.raises(UsageError, match=message):
        read_schedule([argument])


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"stages": []}, r"schema is None, this version reads schema 1"),
        ({"schema": 1}, r"stages is missing"),
        ({"schema": 1, "stages": {}}, r"stages={} must be a list"),
        ({"schema": 1, "stages": [3]}, r"stage 1 is a int, a JSON object was wanted"),
        ({"schema": 1, "stages": [{"when": {"step": 5}}]}, r"stage 1: to is missing"),
        ({"schema": 1, "stages": [{"when": {"step": True}, "to": "large"}]}, r"step=True must be a whole number"),
        ({"schema": 1, "stages": [{"when": {"step": 5}, "to": "large", "how": {}}]}, r"unknown field 'how'; it has"),
        ({"schema": 1, "stages": [{"when": {"step": 5}, "to": "large", "plan": "x"}]}, r"plan='x' is no JSON object"),
    ],
)
def test_a_file_that_is_no_schedule_is_refused(schedule, message, tmp_path):
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps(schedule), encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        read_schedule([str(path)])


def test_stages_are_in_the_order_of_their_steps():
    with pytest.raises(UsageError, match=r"step=5 comes behind step=9"):
        read_schedule(["step=9:base", "flat=0.1/2:d_model=1000", "step=5:large"])


CONFIG = RunConfig(model=small().model, optimizer=OptimizerConfig())


def test_each_stage_is_planned_on_the_one_before():
    first, second = plan_events(CONFIG, read_schedule(["step=9:base", "flat=0.1/2:d_model=1024,num_heads=16"]))
    grown = first.change_config(CONFIG, 9)
    assert (grown.model.d_model, grown.model.num_heads) == (768, 12)
    assert first.facts["target"] == second.facts["source"]
    last = second.change_config(grown, 20)
    assert (last.model.d_model, last.model.num_encoder_layers, last.optimizer.rewarm_steps) == (1024, 12, 250)
    assert (first.at_step, first.needs_heldout, second.at_step, second.needs_heldout) == (9, False, None, True)
    again = plan_events(CONFIG, read_schedule(["step=9:base", "flat=0.1/2:d_model=1024,num_heads=16"]))
    assert [event.plan_hash for event in again] == [first.plan_hash, second.plan_hash]


def test_flatness_counts_from_the_last_growth():
    (event,) = plan_events(CONFIG, read_schedule(["flat=0.01/2:base"]))
    flat = tuple(losses(2.0, 2.0, 2.0))
    assert event.is_due(200, flat)
    seam = {"step": 200, "loss": 2.0, "begins_phase": True}
    assert not event.is_due(300, (*flat, seam, {"step": 300, "loss": 2.0}))
    assert event.is_due(400, (*flat, seam, {"step": 300, "loss": 2.0}, {"step": 400, "loss": 2.0}))


def test_the_policy_of_the_learning_rate_reaches_the_optimizer(tmp_path):
    plan = tmp_path / "how.json"
    plan.write_text('{"learning_rate": {"policy": "remap", "to_step": 4000}}', encoding="utf-8")
    (event,) = plan_events(CONFIG, read_schedule([f"step=9000:base:{plan}"]))
    assert event.change_config(CONFIG, 9000).optimizer.schedule_shift == -5000


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (["step=9:base", "step=10:small"], r"growth stage 2 \(step=10:small\): .* never shrinks"),
        (["step=9:base", "step=10:base"], r"growth stage 2 .*nothing to grow"),
        (["step=9:bsae"], r"growth stage 1 .*perhaps you meant 'base'"),
        (["step=9:vocab_size=60000"], r"growth stage 1 .*'vocab_size' cannot be grown"),
    ],
)
def test_a_stage_that_cannot_be_grown_is_named(stages, message):
    with pytest.raises(UsageError, match=message):
        plan_events(CONFIG, read_schedule(stages))


def test_a_lossless_growth_that_moves_the_loss_is_refused():
    check_losses("stage", "R", 2.0, 2.0 + 1e-6, "float32")
    check_losses("stage", "B", 2.0, 2.002, "bfloat16")
    check_losses("stage", "L", 2.0, 3.0, "float32")
    for after, dtype in ((2.001, "float32"), (2.1, "bfloat16"), (math.nan, "float32")):
        with pytest.raises(
            ArtifactError, match=r"stage: the loss was 2.000000 before growth and is .* nothing was saved"
        ):
            check_losses("stage", "R", 2.0, after, dtype)
