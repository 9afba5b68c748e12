"""Laws of the compiled train step on a mesh, here of CPU devices; tests/plan/test_tpu_programs.py has those of TPUs."""

import dataclasses

import pytest
from programs import (
    check_optimizer_state_stays,
    check_state_is_donated,
    check_vocabulary_is_never_whole,
    read_program,
)

from t5pegasus.config import DataConfig, MeshConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from t5pegasus.sharding import make_mesh
from t5pegasus.train.estimate import abstract_batch, abstract_state
from t5pegasus.train.step import make_train_step

CONFIG = RunConfig(
    ModelConfig(
        vocab_size=1280, d_model=96, d_kv=8, d_ff=160, num_heads=8, num_encoder_layers=2, num_decoder_layers=2,
        dropout_rate=0.0,
    ),
    DataConfig(max_source_tokens=32, max_target_tokens=16),
    train=TrainConfig(batch_size=16, remat="full", vocab_chunk=256, compute_dtype="float32"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "optimizer"),
    [((2, 4, 1), "adamw"), pytest.param((2, 2, 2), "adafactor", marks=pytest.mark.slow)],
)
def test_a_step_gathers_layers_and_chunks_only(sizes, optimizer):
    mesh_config = MeshConfig(*sizes, slices=2)
    settings = OptimizerConfig(name=optimizer, min_dim_size_to_factor=16)
    config = dataclasses.replace(CONFIG, mesh=mesh_config, optimizer=settings)
    mesh = make_mesh(mesh_config)
    step = make_train_step(config, mesh)
    text = step.compile(abstract_state(config, mesh), abstract_batch(config, mesh)).as_text()
    module, collectives = read_program(text, mesh, num_slices=2)
    check_state_is_donated(config, mesh, module)
    check_vocabulary_is_never_whole(config, mesh, collectives)
    check_optimizer_state_stays(config, mesh, module)
    assert {each.kind for each in collectives if each.network == "dcn"} <= {"all-reduce"}
    # What is on every device is summed over all of them: numbers, gains, and the biases of pairs of positions.
    beyond = [each for each in collectives if each.network == "dcn" and each.axes != ("data",)]
    dims = {each.dims for collective in beyond for each in collective.operands}
    assert all(len(each) < 2 or each[:2] == (1, CONFIG.model.num_heads // sizes[2]) for each in dims), dims
