"""Laws of the moving average: its formula, that it disturbs nothing, and that everything but continuing takes it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from t5pegasus.checkpoint import find_checkpoint, load_arrays, load_checkpoint_info, load_parameters
from t5pegasus.config import TrainConfig
from t5pegasus.train.ema import update_ema
from t5pegasus.train.run import RunPaths, train_run


@pytest.mark.parametrize("warmup", [False, True])
def test_it_is_its_formula_and_keeps_what_does_not_move(warmup):
    config = TrainConfig(ema_decay=0.9, ema_warmup=warmup)
    random = np.random.default_rng(0)
    still, average = random.random(5, np.float32), random.random(5, np.float32)
    ema, wanted = {"moves": jnp.asarray(average), "stays": jnp.asarray(still)}, average.astype(np.float64)
    for step in range(100):
        theta = random.random(5, np.float32)
        ema = update_ema(config, ema, {"moves": jnp.asarray(theta), "stays": jnp.asarray(still)}, jnp.int32(step))
        decay = min(0.9, (2 + step) / (11 + step)) if warmup else 0.9
        wanted = decay * wanted + (1 - decay) * theta
    np.testing.assert_allclose(ema["moves"], wanted, rtol=1e-6)
    np.testing.assert_array_equal(ema["stays"], still)


def test_without_one_there_is_nothing_to_update():
    assert update_ema(TrainConfig(), {}, {"x": jnp.ones(3)}, jnp.int32(0)) == {}


def with_ema(config, decay, **fields):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, ema_decay=decay, **fields))


@pytest.fixture(scope="module")
def paths(tmp_path_factory, examples_path):
    return {name: RunPaths(tmp_path_factory.mktemp("ema") / name, examples_path) for name in ("plain", "averaged")}


@pytest.fixture(scope="module")
def checkpoints(paths, run_config):
    """The last checkpoint of the same run without and with a moving average."""
    train_run(run_config, paths["plain"])
    train_run(with_ema(run_config, 0.9), paths["averaged"])
    return {name: find_checkpoint(each.run_path) for name, each in paths.items()}


def test_training_is_the_same_bit_for_bit_with_it(checkpoints):
    plain, averaged = (load_arrays(checkpoints[name]) for name in ("plain", "averaged"))
    assert averaged.keys() - plain.keys() == {f"ema.{name[11:]}" for name in plain if name.startswith("parameters.")}
    for name, array in plain.items():
        np.testing.assert_array_equal(averaged[name], array, err_msg=name)


def test_users_of_a_checkpoint_and_heldout_losses_take_it(checkpoints, run_config, tmp_path, examples_path):
    arrays, taken = load_arrays(checkpoints["averaged"]), load_parameters(checkpoints["averaged"])
    assert len(taken) == sum(name.startswith("parameters.") for name in arrays)
    for name, array in taken.items():
        np.testing.assert_array_equal(array, arrays[f"ema.{name}"])
    assert (arrays["ema.lm_head"] != arrays["parameters.lm_head"]).any()
    np.testing.assert_array_equal(
        load_parameters(checkpoints["averaged"], ["lm_head"])["lm_head"], arrays["ema.lm_head"]
    )
    histories = {name: load_checkpoint_info(path).history for name, path in checkpoints.items()}
    assert histories["plain"][0] == histories["averaged"][0]
    assert histories["plain"][1]["loss"] != histories["averaged"][1]["loss"]
    # Fine-tuning starts from it: the loss before the first update is the one held out after the last.
    paths = RunPaths(tmp_path / "tuned", examples_path, start_from=checkpoints["averaged"])
    tuned = train_run(with_ema(run_config, 0.5, steps=2), paths, keep_state=False)
    assert load_checkpoint_info(tuned).history[0]["loss"] == histories["averaged"][-1]["loss"]


@pytest.mark.slow
def test_a_run_goes_on_with_it_or_begins_one(checkpoints, run_config, tmp_path, examples_path, caplog):
    def go_on(name, decay, run_name):
        paths = RunPaths(tmp_path / run_name, examples_path, start_from=checkpoints[name])
        return load_arrays(train_run(with_ema(run_config, decay, steps=9), paths))

    kept, begun, dropped = (
        go_on("averaged", 0.9, "kept"), go_on("plain", 0.9, "begun"), go_on("averaged", 0.0, "dropped")
    )  # fmt: skip
    before, after = load_arrays(checkpoints["averaged"]), load_arrays(checkpoints["plain"])
    decay = np.float32(10 / 19)  # after the ninth update
    for start, now in ((before["ema.lm_head"], kept), (after["parameters.lm_head"], begun)):
        wanted = decay * start + (1 - decay) * now["parameters.lm_head"]
        np.testing.assert_allclose(now["ema.lm_head"], wanted, rtol=0, atol=1e-6)
    assert not any(name.startswith("ema.") for name in dropped)
    assert "its moving average is left behind, because train.ema_decay is 0" in caplog.text
    np.testing.assert_array_equal(dropped["parameters.lm_head"], kept["parameters.lm_head"])
