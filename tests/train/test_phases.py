"""Laws of phases: an event is decided and done again from the checkpoint before it, so that kills change nothing.

The event here is a widening of the feed-forward blocks written down by hand: training knows no growth.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from t5pegasus.checkpoint import (
    find_last_good,
    folder,
    list_checkpoints,
    load_arrays,
    load_checkpoint_info,
    verify_checkpoint,
)
from t5pegasus.config import MeshConfig
from t5pegasus.errors import ArtifactError, UsageError
from t5pegasus.json_files import read_json
from t5pegasus.model.t5 import count_parameters
from t5pegasus.train import seam
from t5pegasus.train.early_stopping import has_stopped, plain_entry, this_phase
from t5pegasus.train.estimate import abstract_state
from t5pegasus.train.metrics import MetricsWriter, count_flops, read_metrics
from t5pegasus.train.phases import Event
from t5pegasus.train.run import RunPaths, train_run

STEPS = 8


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def config(run_config):
    model = dataclasses.replace(
        run_config.model, d_model=16, d_kv=4, d_ff=24, num_heads=4, num_encoder_layers=1, num_decoder_layers=1
    )
    train = dataclasses.replace(
        run_config.train, steps=STEPS, log_every_steps=2, evaluate_every_steps=4, save_every_steps=2, ema_decay=0.9,
        keep_checkpoints=1, spike_factor=1e6, spike_window=4,
    )  # fmt: skip
    return dataclasses.replace(run_config, model=model, train=train)


def widened(config, d_ff):
    return dataclasses.replace(config, model=dataclasses.replace(config.model, d_ff=d_ff))


def widen(config, d_ff, state, mesh):
    """New units read a little of everything and write nothing."""
    wanted = abstract_state(widened(config, d_ff), mesh)

    def pad(path, leaf, shape):
        name = jax.tree_util.keystr(path)
        value = 0 if "wo" in name or "moment" in name else 0.01
        filled = np.full(shape.shape, value, shape.dtype)
        filled[tuple(map(slice, leaf.shape))] = np.asarray(leaf)
        return jax.device_put(filled, shape.sharding)

    return jax.tree_util.tree_map_with_path(pad, state, wanted)


def event(config, at, d_ff=32, check=lambda before, after, _: None, **fields):
    return Event(
        name=f"stage at {at}", kind="growth", plan_hash=f"to {d_ff}", entry={"plan": {"d_ff": d_ff}},
        facts={"target": {"d_ff": d_ff}}, asked={"at": at, "d_ff": d_ff}, is_due=lambda step, _: step >= at,
        change_config=lambda config, _: widened(config, d_ff), change_state=functools.partial(widen, config, d_ff),
        check=check, at_step=at, **fields,
    )  # fmt: skip


def schedule(config):
    """At 3, which is no interval of anything, and at 4."""
    return [event(config, 3), event(config, 4, d_ff=40)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, examples_path, config):
    run_path = tmp_path_factory.mktemp("whole") / "run"
    train_run(config, RunPaths(run_path, examples_path), events=schedule(config))
    return run_path


def lasting(run_path):
    """The records of a run, but for what is measured in seconds."""
    timed = {
        "seconds", "time", "goodput", "updates", "tokens_per_second", "rows_per_second", "examples_per_second", "mfu",
        "data_wait_fraction",
    }  # fmt: skip
    records = [record for record in read_metrics(run_path / "metrics.jsonl") if record["kind"] != "start"]
    return [{name: value for name, value in record.items() if name not in timed} for record in records]


def test_the_run_crosses_its_seams_and_says_so(whole, config):
    info = load_checkpoint_info(find_last_good(whole))
    assert (info.step, info.rows, info.config.model.d_ff) == (STEPS, 8 * STEPS, 40)
    assert [(entry["plan_hash"], entry["step"]) for entry in info.lineage] == [("to 32", 3), ("to 40", 4)]
    for entry in info.lineage:  # both sources were kept, beside the last checkpoint
        source = whole / "checkpoints" / str(entry["step"])
        assert verify_checkpoint(source)["fingerprint"] == entry["source_fingerprint"]
    assert [path.name for path in list_checkpoints(whole)] == ["8", "4", "3"]
    history = [(entry["step"], entry.get("begins_phase", False)) for entry in info.history]
    assert history == [(0, False), (3, True), (4, False), (4, True), (8, False)]
    assert read_json(whole / "config.json")["config"]["model"]["d_ff"] == 24


def test_the_metrics_show_the_seam(whole, config):
    records = lasting(whole)
    assert [(record["kind"], record["step"]) for record in records] == [
        ("heldout", 0), ("train", 2), ("train", 3), ("growth", 3), ("heldout", 3),
        ("train", 4), ("heldout", 4), ("growth", 4), ("heldout", 4), ("train", 6), ("train", 8), ("heldout", 8),
    ]  # fmt: skip
    first, second = (record for record in records if record["kind"] == "growth")
    assert first["parameters_after"] == second["parameters_before"] == count_parameters(widened(config, 32).model)
    assert first["loss_before"] == pytest.approx(first["loss_after"], rel=1e-5)
    spent = [count_flops(widened(config, d_ff), 8) for d_ff in (24, 32, 40)]
    assert first["source_flops"] == 3 * spent[0]
    assert second["source_flops"] == first["flops"] + spent[1]
    assert load_checkpoint_info(find_last_good(whole)).flops == second["flops"] + 4 * spent[2]
    assert records[-2]["flops"] == second["flops"] + 4 * spent[2]


def kill_in(monkeypatch, owner, name, when):
    """Raise at the first call of a function whose arguments fit."""
    function = getattr(owner, name)

    def killed(*args, **kwargs):
        if when(*args, **kwargs):
            raise Killed
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, killed)


def manifest_of(step):
    return lambda folder, *_: folder.name == f"{step}.unfinished"


PLACES = {
    "while saving the source": (folder, "write_manifest", manifest_of(3)),
    "before growth": (seam, "_measure", lambda _, state: int(state.step) == 3),
    "behind growth, nothing recorded": (seam, "_judge_seam", lambda *_: True),
    "behind growth, all of it recorded": (
        MetricsWriter, "write", lambda _, kind, step, **__: (kind, step) == ("train", 6),
    ),
    "while saving what grew": (folder, "write_manifest", manifest_of(6)),
}  # fmt: skip
MOST_TELLING = "while saving what grew"


@pytest.mark.parametrize(
    "place", [each if each == MOST_TELLING else pytest.param(each, marks=pytest.mark.slow) for each in PLACES]
)
def test_killed_anywhere_it_continues_bit_for_bit(place, whole, tmp_path, examples_path, config, monkeypatch):
    paths = RunPaths(tmp_path / "run", examples_path)
    owner, name, when = PLACES[place]
    with monkeypatch.context() as patch:
        kill_in(patch, owner, name, when)
        with pytest.raises(Killed):
            train_run(config, paths, events=schedule(config))
    train_run(config, paths, events=schedule(config))
    ours, theirs = find_last_good(paths.run_path), find_last_good(whole)
    assert ours.name == theirs.name
    arrays = load_arrays(ours)
    for name, array in load_arrays(theirs).items():
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)
    assert load_checkpoint_info(ours) == load_checkpoint_info(theirs)
    assert lasting(paths.run_path) == lasting(whole)


def test_a_finished_run_is_left_as_it_is(whole, examples_path, config):
    before = (whole / "metrics.jsonl").read_bytes()
    train_run(config, RunPaths(whole, examples_path), events=schedule(config))
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_what_is_behind_must_stay_in_the_schedule(whole, examples_path, config):
    with pytest.raises(UsageError, match=r"has stage at 3 behind it, which the schedule given now does not have"):
        train_run(config, RunPaths(whole, examples_path), events=[event(config, 4, d_ff=40)])


def test_a_broken_promise_keeps_the_checkpoint_before(tmp_path, examples_path, config):
    def refuse(before, after, compute_dtype):
        raise ArtifactError(f"{before:.3f} is not {after:.3f} in {compute_dtype}")

    paths = RunPaths(tmp_path / "run", examples_path)
    with pytest.raises(ArtifactError, match=r"is not .* in float32"):
        train_run(config, paths, events=[event(config, 2, check=refuse)])
    assert find_last_good(paths.run_path).name == "2"
    assert load_checkpoint_info(find_last_good(paths.run_path)).lineage == ()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda config: event(config, 4, d_ff=30), r"stage at 4: model.d_ff=30 does not divide over mesh tensor=4"),
        (lambda config: event(config, STEPS), r"stage at 8 is not before the end of the run, train.steps=8"),
    ],
)
def test_a_stage_that_cannot_be_is_refused_before_anything_is_written(make, message, tmp_path, examples_path, config):
    config = dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=2, tensor=4))
    with pytest.raises(UsageError, match=message):
        train_run(config, RunPaths(tmp_path / "run", examples_path), events=[make(config)])
    assert not (tmp_path / "run").exists()


def test_a_stage_that_waits_for_losses_needs_some(tmp_path, examples_path, config):
    with pytest.raises(UsageError, match=r"decided by held-out losses, and there are no held-out examples"):
        train_run(
            config, RunPaths(tmp_path / "run", examples_path / "heldout"), events=[event(config, 4, needs_heldout=True)]
        )


def test_patience_begins_anew_behind_a_seam(config):
    train = dataclasses.replace(config.train, keep_best="loss", patience=2)
    before = ({"step": 1, "loss": 1.0, "best": False}, {"step": 2, "loss": 1.0, "best": False})
    seam_entry = plain_entry(train, 2, {"loss": 1.0}, begins_phase=True)
    assert has_stopped(train, before)
    assert not has_stopped(train, (*before, seam_entry, before[0]))
    assert has_stopped(train, (*before, seam_entry, *before))
    assert this_phase((*before, seam_entry, before[0])) == (seam_entry, before[0])
