"""The same laws of programs for TPUs, compiled by libtpu without one: `base` and `xl` on their planned slices."""

import dataclasses
import importlib.util
import os

import pytest
from programs import (
    check_optimizer_state_stays,
    check_state_is_donated,
    check_vocabulary_is_never_whole,
    read_program,
)

from t5pegasus.config import MeshConfig, RunConfig
from t5pegasus.plan.ahead import compile_ahead
from t5pegasus.plan.step import resolve_config
from t5pegasus.plan.topology import list_devices, parse_topology
from t5pegasus.presets import preset
from t5pegasus.sharding import make_mesh

pytestmark = [
    pytest.mark.tpu_compile,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None and os.environ.get("T5PEGASUS_TPU_COMPILE") != "required",
        reason="needs the TPU compiler, which make test-tpu-compile installs",
    ),
]


def configure(name: str, mesh: MeshConfig, **train) -> RunConfig:
    config = preset(name)
    return dataclasses.replace(config, mesh=mesh, train=dataclasses.replace(config.train, **train))


@pytest.mark.parametrize(
    ("name", "topology", "num_slices", "mesh", "train"),
    [
        ("base", "v5e:4x4", 1, MeshConfig(1, 16, 1), {"batch_size": 256, "remat": "dots"}),
        ("xl", "v5e:16x16", 1, MeshConfig(8, 32, 1), {"batch_size": 2048, "remat": "full"}),
        ("xl", "v5e:16x16", 2, MeshConfig(16, 32, 1), {"batch_size": 4096, "remat": "full"}),
    ],
)
def test_a_step_fits_and_gathers_layers_and_chunks_only(name, topology, num_slices, mesh, train):
    where = parse_topology(topology, num_slices)
    config = resolve_config(configure(name, mesh, **train), where)
    devices = make_mesh(config.mesh, list_devices(where))
    program = compile_ahead(config, devices, f"{where.name} slices={where.num_slices}")
    assert program.fits, f"{program.used_bytes} of {program.limit_bytes} bytes"
    assert "windowed_dot_general" not in program.text  # the weights of a layer are gathered whole
    module, collectives = read_program(program.text, devices, num_slices)
    check_state_is_donated(config, devices, module)
    check_vocabulary_is_never_whole(config, devices, collectives)
    check_optimizer_state_stays(config, devices, module)
    between = [each for each in collectives if each.network == "dcn"]
    assert bool(between) == (num_slices > 1)
    assert {each.axes for each in between} <= {("data",)}
