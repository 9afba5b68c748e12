"""Laws of the optimizer's state in runs and checkpoints: it is sharded, resumed bit for bit, and never mistaken."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5pegasus.checkpoint import (
    has_optimizer_state,
    list_arrays,
    load_arrays,
    load_checkpoint_info,
    save_checkpoint,
)
from t5pegasus.config import MeshConfig, OptimizerConfig
from t5pegasus.errors import ArtifactError, UsageError
from t5pegasus.model.t5 import declare_parameters
from t5pegasus.sharding import make_mesh
from t5pegasus.train.estimate import abstract_state
from t5pegasus.train.run import RunPaths, train_run
from t5pegasus.train.state import arrays_to_state, init_state, state_to_arrays

OPTIMIZERS = {
    "adamw": OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
    "sgd without momentum": OptimizerConfig(name="sgd", learning_rate=0.1, warmup_steps=2, beta1=0.0),
    "adafactor": OptimizerConfig(name="adafactor", learning_rate=0.03, warmup_steps=2, min_dim_size_to_factor=16),
    "muon in bfloat16": OptimizerConfig(name="muon", moment_dtype="bfloat16"),
    "adamw accumulated in bfloat16": OptimizerConfig(
        learning_rate=3e-3, warmup_steps=2, moment_dtype="bfloat16", accumulate_in_moments=True
    ),
    "adafactor with beta1": OptimizerConfig(name="adafactor", beta1=0.9, min_dim_size_to_factor=16),
}


@pytest.fixture(scope="module")
def small(run_config):
    """A config of a model that compiles fast."""
    sizes = {"d_model": 16, "d_ff": 32, "num_heads": 2, "d_kv": 8, "num_encoder_layers": 1, "num_decoder_layers": 1}
    return dataclasses.replace(
        run_config,
        model=dataclasses.replace(run_config.model, **sizes),
        train=dataclasses.replace(run_config.train, steps=4, save_every_steps=2),
    )


def with_optimizer(config, which, steps=4):
    train = dataclasses.replace(config.train, steps=steps)
    return dataclasses.replace(config, optimizer=OPTIMIZERS[which], train=train)


@pytest.mark.parametrize("which", [which for which in OPTIMIZERS if "accumulated" not in which])
def test_a_state_has_its_declared_structure_wherever_it_is_described(small, which):
    config, mesh = with_optimizer(small, which), make_mesh(MeshConfig(2, 2, 2))
    state, planned = init_state(config.model, 0, mesh, config.optimizer), abstract_state(config, mesh)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), state) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), planned
    )
    assert jax.tree.structure(arrays_to_state(state_to_arrays(state))) == jax.tree.structure(state)
    specs = declare_parameters(config.model)
    matrices = {name for name in specs if not name.endswith(("norm", "relative_bias"))}
    kept = {kind for kind, group in state.moments._asdict().items() if group}
    match which:
        case "adamw":
            assert kept == {"first_moment", "second_moment"}
        case "sgd without momentum":
            assert not kept
        case "muon in bfloat16":
            assert {leaf.dtype for leaf in jax.tree.leaves(state.moments)} == {np.dtype(jnp.bfloat16)}
            assert state.first_moment.keys() == specs.keys()
            assert state.second_moment.keys() == specs.keys() - matrices | {"lm_head", "token_embedding"}
        case _:
            assert state.row_moment.keys() == state.column_moment.keys() == matrices
            assert state.second_moment.keys() == specs.keys() - matrices
            assert bool(state.first_moment) == ("beta1" in which)
            assert "fsdp" in state.row_moment["lm_head"].sharding.spec
            assert "tensor" in state.column_moment["lm_head"].sharding.spec


@pytest.fixture(scope="module")
def plain_path(tmp_path_factory, examples_path):
    """The examples without held-out ones: there is no loss of these to compile."""
    folder = tmp_path_factory.mktemp("plain") / "examples"
    return shutil.copytree(examples_path, folder, ignore=shutil.ignore_patterns("heldout"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, plain_path, small):
    """A checkpoint of a run with Adafactor, and one of a state of SGD that keeps nothing."""
    folder = tmp_path_factory.mktemp("runs")
    whole = train_run(with_optimizer(small, "adafactor"), RunPaths(folder / "run", plain_path))
    other = with_optimizer(small, "sgd without momentum")
    state = init_state(other.model, 0, make_mesh(other.mesh), other.optimizer)
    info = dataclasses.replace(load_checkpoint_info(whole), config=other)
    save_checkpoint(folder / "sgd", state_to_arrays(state), info, whole / "tokenizer")
    return {"adafactor": whole, "sgd without momentum": folder / "sgd"}


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(checkpoints, tmp_path, plain_path, small):
    paths = RunPaths(tmp_path / "run", plain_path)
    train_run(with_optimizer(small, "adafactor", steps=2), paths)
    resumed = load_arrays(train_run(with_optimizer(small, "adafactor"), paths))
    uninterrupted = load_arrays(checkpoints["adafactor"])
    assert resumed.keys() == uninterrupted.keys() == list_arrays(checkpoints["adafactor"])
    for name, array in uninterrupted.items():
        np.testing.assert_array_equal(resumed[name], array, err_msg=name)
    assert resumed["step"] == 4
    assert resumed["row_moment.lm_head"].any()


@pytest.mark.slow
def test_a_run_that_accumulates_in_bfloat16_moments_resumes_bit_for_bit_too(tmp_path, plain_path, small):
    small = dataclasses.replace(small, train=dataclasses.replace(small.train, batch_size=16, accumulation_steps=2))
    ends = []
    for name, counts in (("whole", (4,)), ("resumed", (2, 4))):
        for steps in counts:
            config = with_optimizer(small, "adamw accumulated in bfloat16", steps=steps)
            end = train_run(config, RunPaths(tmp_path / name, plain_path))
        ends.append(load_arrays(end))
    whole, resumed = ends
    assert whole.keys() == resumed.keys()
    assert whole["second_moment.lm_head"].dtype == jnp.bfloat16
    for name, array in whole.items():
        np.testing.assert_array_equal(resumed[name], array, err_msg=name)


def test_every_optimizers_state_is_seen_to_be_one(checkpoints):
    assert all(has_optimizer_state(path) for path in checkpoints.values())


@pytest.mark.parametrize(
    ("begun", "wanted", "message"),
    [
        ("adafactor", {"name": "adamw"}, "optimizer.name of checkpoint .* is adafactor, got adamw; .*finetune"),
        ("adafactor", {"beta1": 0.9}, r"optimizer.beta1 of checkpoint .* is 0.0, got 0.9; .*finetune"),
        ("adafactor", {"min_dim_size_to_factor": 128}, "min_dim_size_to_factor of checkpoint .* is 16, got 128"),
        (
            "adafactor",
            {"moment_dtype": "bfloat16"},
            "moment_dtype of checkpoint .* is float32, got bfloat16; .*finetune",
        ),
        ("sgd without momentum", {"name": "adamw", "beta1": None}, "optimizer.name of checkpoint .* is sgd, got adamw"),
    ],
)
def test_the_state_of_another_optimizer_is_refused(checkpoints, tmp_path, plain_path, small, begun, wanted, message):
    config = with_optimizer(small, begun, steps=6)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **wanted))
    paths = RunPaths(tmp_path / "run", plain_path, start_from=checkpoints[begun])
    with pytest.raises(UsageError, match=message):
        train_run(config, paths)


def test_settings_that_leave_the_state_as_it_is_may_change(checkpoints, tmp_path, plain_path, small):
    config = with_optimizer(small, "adafactor", steps=4)
    optimizer = dataclasses.replace(config.optimizer, min_dim_size_to_factor=2, learning_rate=0.01)
    paths = RunPaths(tmp_path / "run", plain_path, start_from=checkpoints["adafactor"])
    with pytest.raises(UsageError, match="leaves nothing to do"):  # which is said after the state has been admitted
        train_run(dataclasses.replace(config, optimizer=optimizer), paths)


@pytest.mark.parametrize(
    ("absent", "message"),
    [
        ("multipliers.embed.born", "no array multipliers.embed.born: an earlier version wrote it.*finetune"),
        ("row_moment.lm_head", "lacks row_moment.lm_head; .*finetune"),
    ],
)
def test_a_checkpoint_that_lacks_a_part_of_the_state_is_named(
    checkpoints, tmp_path, plain_path, small, absent, message
):
    whole = checkpoints["adafactor"]
    arrays = {name: array for name, array in load_arrays(whole).items() if name != absent}
    save_checkpoint(tmp_path / "less", arrays, load_checkpoint_info(whole), whole / "tokenizer")
    paths = RunPaths(tmp_path / "run", plain_path, start_from=tmp_path / "less")
    with pytest.raises(ArtifactError, match=message):
        train_run(with_optimizer(small, "adafactor", steps=6), paths)
