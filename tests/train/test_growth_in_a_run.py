"""Progressive training: a real schedule on a mesh; killed behind a seam it comes to the same bits."""

import dataclasses

import numpy as np
import pytest

from launch.growth_events import choose_stages, plan_events
from launch.growth_schedule import read_schedule
from t5pegasus.checkpoint import find_last_good, load_arrays, load_checkpoint_info
from t5pegasus.config import MeshConfig
from t5pegasus.train.metrics import MetricsWriter, read_metrics
from t5pegasus.train.run import RunPaths, train_run

# The second is due at the first checkpoint with two losses of the grown model: none falls by 99 %.
SCHEDULE = ("step=2:d_model=32,d_ff=48", "flat=0.99/1:num_encoder_layers=2")


@pytest.fixture(scope="module")
def config(run_config):
    model = dataclasses.replace(
        run_config.model, d_model=16, d_kv=4, d_ff=24, num_heads=4, num_encoder_layers=1, num_decoder_layers=1
    )
    train = dataclasses.replace(run_config.train, steps=6, evaluate_every_steps=2, save_every_steps=2)
    return dataclasses.replace(run_config, model=model, train=train, mesh=MeshConfig(data=2, fsdp=2, tensor=2))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, examples_path, config):
    run_path = tmp_path_factory.mktemp("whole") / "run"
    train_run(config, RunPaths(run_path, examples_path), events=plan_events(config, read_schedule(SCHEDULE)))
    return run_path


@pytest.mark.slow
def test_it_grows_by_its_schedule_and_loses_nothing(whole):
    info = load_checkpoint_info(find_last_good(whole))
    model = info.config.model
    assert (model.d_model, model.d_ff, model.num_encoder_layers, info.step, info.rows) == (32, 48, 2, 6, 48)
    assert [entry["step"] for entry in info.lineage] == [2, 4]
    assert info.config.optimizer.rewarm_steps > 0
    growths = [record for record in read_metrics(whole / "metrics.jsonl") if record["kind"] == "growth"]
    for record in growths:
        assert record["loss_after"] == pytest.approx(record["loss_before"], rel=1e-5)
        assert record["parameters_before"] < record["parameters_after"]
    born = load_arrays(find_last_good(whole), ("multipliers.embed.born", "multipliers.encoder.layers.born"))
    assert set(born["multipliers.embed.born"]) == {-1, 2}
    assert set(born["multipliers.encoder.layers.born"]) == {-1, 4}


@pytest.mark.slow
def test_killed_behind_a_seam_and_continued_without_its_flag_it_is_the_same_run(
    whole, tmp_path, examples_path, config, monkeypatch
):
    class Killed(BaseException):
        pass

    write = MetricsWriter.write

    def killed(self, kind, step, **values):
        write(self, kind, step, **values)
        if (kind, step) == ("train", 5):
            raise Killed

    paths = RunPaths(tmp_path / "run", examples_path)
    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "write", killed)
        with pytest.raises(Killed):
            train_run(config, paths, events=plan_events(config, read_schedule(SCHEDULE)))
    assert load_checkpoint_info(find_last_good(paths.run_path)).config.model.num_encoder_layers == 1
    stages = choose_stages(None, paths.run_path)
    train_run(config, paths, events=plan_events(config, stages))
    ours, theirs = find_last_good(paths.run_path), find_last_good(whole)
    arrays = load_arrays(ours)
    for name, array in load_arrays(theirs).items():
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)
    assert load_checkpoint_info(ours) == load_checkpoint_info(theirs)
    kinds = [
        [(record["kind"], record["step"], record.get("loss")) for record in read_metrics(path / "metrics.jsonl")]
        for path in (paths.run_path, whole)
    ]
    assert [each for each in kinds[0] if each[0] != "start"] == [each for each in kinds[1] if each[0] != "start"]
