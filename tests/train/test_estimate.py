"""Laws of the estimate: the state's bytes are exact, the update's are XLA's own, too little memory is said in words."""

import dataclasses
import logging

import jax
import pytest

from t5pegasus.config import DataConfig, MeshConfig, TrainConfig
from t5pegasus.presets import large
from t5pegasus.sharding import make_mesh
from t5pegasus.train import estimate
from t5pegasus.train.estimate import abstract_state, prepare_step
from t5pegasus.train.state import init_state
from t5pegasus.train.step import make_train_step


@pytest.fixture(scope="module")
def averaged(run_config):
    train = dataclasses.replace(run_config.train, ema_decay=0.9)
    return dataclasses.replace(run_config, train=train, mesh=MeshConfig(data=2, fsdp=4))


def prepare(config):
    mesh = make_mesh(config.mesh)
    return prepare_step(config, mesh, make_train_step(config, mesh), 2)


def test_it_says_what_the_state_takes_on_a_device_and_what_an_update_takes(averaged, caplog):
    with caplog.at_level(logging.INFO):
        _, memory = prepare(averaged)
    state = init_state(averaged.model, 0, make_mesh(averaged.mesh), with_ema=True)
    on_one = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    assert memory.state_bytes == on_one
    assert memory.step_bytes > memory.state_bytes
    assert memory.device_bytes is None
    first, second, third = (record.getMessage() for record in caplog.records if record.name == estimate.__name__)
    count = f"{sum(array.size for array in state.parameters.values()):,}"
    assert first == f"{count} parameters; 6 updates of 8 rows of 24 + 8 tokens, 1536 positions"
    assert second.startswith(f"memory per device: {on_one / 1e3:.2f} kB of state, ")
    assert "30 % of the peak, a guess" in third
    assert ", without compiling and evaluating every " in third


@pytest.mark.slow
def test_longer_sources_take_more_and_frozen_parameters_less(averaged):
    longer = dataclasses.replace(averaged, data=DataConfig(192, 8))
    frozen = dataclasses.replace(averaged, optimizer=dataclasses.replace(averaged.optimizer, freeze=("encoder.*",)))
    plain, much, less = (prepare(config)[1] for config in (averaged, longer, frozen))
    assert much.state_bytes == plain.state_bytes == less.state_bytes
    assert much.step_bytes > plain.step_bytes > less.step_bytes


def test_what_does_not_fit_is_said_before_the_update_is_compiled(monkeypatch, caplog):
    config = dataclasses.replace(large(), train=TrainConfig(batch_size=8), mesh=MeshConfig(data=8))
    monkeypatch.setattr(estimate, "_read_device_bytes", lambda _: 2 * 10**9)

    class NotCompiled(Exception):
        pass

    class Step:
        def compile(self, *_):
            raise NotCompiled

    with pytest.raises(NotCompiled):
        prepare_step(config, make_mesh(config.mesh), Step(), 0)
    assert "the training state takes 9.84 GB, a device has 2.00 GB: split it: --mesh.fsdp" in caplog.text
    split = dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=8))
    leaves = jax.tree.leaves(abstract_state(split, make_mesh(split.mesh)))
    assert sum(map(estimate.bytes_per_device, leaves)) < 1.3e9
