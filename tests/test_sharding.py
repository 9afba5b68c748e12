"""Laws of the mesh: slices are outermost, everything that does not divide is named at once with what would."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from t5pegasus.config import DataConfig, MeshConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from t5pegasus.errors import UsageError
from t5pegasus.model.t5 import declare_parameters
from t5pegasus.sharding import batch_shardings, check_divides, group_by_slice, make_mesh, param_shardings
from t5pegasus.train.state import state_shardings


def fake_devices(num_slices, per_slice, *, per_process=2):
    """Devices as JAX describes TPU slices, in an order that mixes them up."""
    devices = [
        types.SimpleNamespace(
            id=100_000 * (index + 1) + number, slice_index=index, platform="cpu", device_kind="fake",
            process_index=(index * per_slice + number) // per_process,
        )
        for index in range(num_slices)
        for number in range(per_slice)
    ]  # fmt: skip
    return devices[1::2] + devices[::2]


def test_devices_are_grouped_by_the_slice_they_name():
    parts = group_by_slice(fake_devices(3, 4))
    assert [[device.slice_index for device in part] for part in parts] == [[0] * 4, [1] * 4, [2] * 4]


def test_processes_stand_for_slices_where_no_device_names_one():
    devices = [types.SimpleNamespace(id=n, process_index=n // 2) for n in (5, 0, 3, 1, 4, 2, 7, 6)]
    parts = group_by_slice(devices, 2)
    assert [[device.id for device in part] for part in parts] == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    ("devices", "count", "message"),
    [
        (fake_devices(2, 4), 4, "slices=4, but the devices lie in 2 slices"),
        ([types.SimpleNamespace(id=n, process_index=n // 4) for n in range(8)], 4, "8 devices of 2 processes"),
        ([types.SimpleNamespace(id=n, process_index=0) for n in range(8)], 3, "8 devices of 1 processes"),
        (fake_devices(2, 4)[:-1], -1, "they must be equal"),
    ],
)
def test_groups_that_cannot_be_are_refused(devices, count, message):
    with pytest.raises(UsageError, match=message):
        group_by_slice(devices, count)


@pytest.mark.parametrize(("data", "fsdp", "tensor"), [(2, 4, 1), (4, 2, 1), (4, 1, 2), (-1, 2, 2)])
def test_only_data_crosses_slices(data, fsdp, tensor):
    mesh = make_mesh(MeshConfig(data, fsdp, tensor, slices=2))
    groups = group_by_slice(jax.devices(), 2)
    slice_of = {device: index for index, part in enumerate(groups) for device in part}
    slices = np.vectorize(slice_of.__getitem__)(mesh.devices)
    assert (slices == slices[:, :1, :1]).all()
    assert (np.diff(slices[:, 0, 0]) >= 0).all()
    assert set(slices.flat) == {0, 1}


def test_what_is_sharded_may_not_cross_slices():
    with pytest.raises(UsageError, match=r"data=1 cannot be split over the 2 slices.*divide the 4 devices of a slice"):
        make_mesh(MeshConfig(-1, 8, 1, slices=2))
    with pytest.raises(UsageError, match=r"data=3 is no multiple of slices=2.*choose data=4"):
        MeshConfig(3, 1, 1, slices=2)


def test_all_sizes_that_do_not_divide_are_named_at_once():
    model = ModelConfig(vocab_size=130, d_model=66, d_ff=90, num_heads=6, num_encoder_layers=1, num_decoder_layers=1)
    config = RunConfig(model, DataConfig(64, 32), train=TrainConfig(batch_size=10, accumulation_steps=2))
    mesh = make_mesh(MeshConfig(1, 2, 4))
    with pytest.raises(UsageError) as refused:
        check_divides(config, declare_parameters(model), mesh)
    text = str(refused.value)
    assert "batch_size=10 is not a multiple of accumulation_steps=2 × data×fsdp=2" in text
    assert "nearest: 8 or 12" in text
    assert "model.vocab_size=130 does not divide over mesh tensor=4: nearest: 128 or 132" in text
    assert (
        "model.num_heads=6 does not divide over mesh tensor=4: nearest: 4 or 8, or mesh tensor among 1, 2, 3, 6" in text
    )
    assert "model.d_ff=90 does not divide over mesh tensor=4: nearest: 88 or 92" in text
    assert "d_model" not in text


def test_adafactors_vectors_are_split_as_the_axes_they_keep():
    model = ModelConfig(vocab_size=256, d_model=128, d_ff=256, num_heads=8, num_encoder_layers=1, num_decoder_layers=1)
    mesh = make_mesh(MeshConfig(1, 4, 2))
    optimizer = OptimizerConfig(name="adafactor", min_dim_size_to_factor=16)
    shardings = state_shardings(declare_parameters(model), mesh, optimizer)
    assert shardings.row_moment["token_embedding"].spec == PartitionSpec("fsdp")
    assert shardings.column_moment["token_embedding"].spec == PartitionSpec("tensor")


def test_one_table_serves_parameters_and_batch():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    specs = declare_parameters(dataclasses.replace(ModelConfig(), num_encoder_layers=1, num_decoder_layers=1))
    assert param_shardings(specs, mesh)["lm_head"].spec == PartitionSpec("fsdp", "tensor")
    assert batch_shardings(mesh).row_ids.spec == PartitionSpec(("data", "fsdp"))
