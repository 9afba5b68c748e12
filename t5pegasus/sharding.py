"""Mesh and shardings: one table from logical axes to mesh axes, read by parameters, optimizer state and batches.

Mesh axes are (data, fsdp, tensor): `data` replicates parameters, `fsdp` splits them, both split the batch;
`tensor` splits heads, feed-forward units and vocabulary (Shazeer et al. 2018; Xu et al. 2021, GSPMD). Several slices
(TPU slices, nodes of GPUs) are the outermost part of `data`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from t5pegasus.axes import ParamSpec, logical_axis
from t5pegasus.batch import OF_ROWS, Batch
from t5pegasus.config import MeshConfig, RunConfig
from t5pegasus.errors import UsageError

RULES: dict[str, str | tuple[str, ...] | None] = {
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "qk": None,
    "vo": None,
    "layers": None,
    "relpos_buckets": None,
    # of activations
    "batch": ("data", "fsdp"),
    "replica_batch": "data",
    "length": None,
    "stream_length": "tensor",
    "hidden": None,
}
"""Logical axis → mesh axis. `embed` is the parameters' d_model axis, `hidden` the activations';
`stream_length` is the length of activations between blocks, where it is split (`train.split_length`); `replica_batch`
are the rows of activations that go to the weights, where these stay in their places (`Execution.split_width`)."""

AXES = ("data", "fsdp", "tensor")
"""Of every mesh, from the outermost, whose devices may lie far apart, to the innermost."""

_FIELDS = {
    "embed": "d_model", "heads": "num_heads", "mlp": "d_ff", "vocab": "vocab_size", "qk": "d_kv", "vo": "d_kv",
    "layers": "num_layers", "relpos_buckets": "relative_attention_num_buckets",
}  # fmt: skip
"""Logical axis of parameters → the field of the model's config that is its size."""


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A (data, fsdp, tensor) mesh over all devices of all processes, or over the given ones.

    Within a slice the devices lie as its network does; over several slices, `data` is outermost, slice by slice, so
    that `fsdp` and `tensor` never cross the data-center network.

    Raises:
        UsageError: if the sizes do not multiply to the number of devices, or do not fit into the slices.
    """
    devices = jax.devices() if devices is None else devices
    data, fsdp, tensor = config.resolve(len(devices))
    slices = group_by_slice(devices, config.slices)
    if data % len(slices):
        raise UsageError(
            f"mesh data={data} cannot be split over the {len(slices)} slices of the devices: fsdp × tensor="
            f"{fsdp * tensor} must divide the {len(slices[0])} devices of a slice; make one of them smaller"
        )
    within = (data // len(slices), fsdp, tensor)
    parts = [mesh_utils.create_device_mesh(within, part, allow_split_physical_axes=True) for part in slices]
    return Mesh(np.concatenate(parts), AXES, axis_types=(AxisType.Auto,) * 3)


def group_by_slice(devices: Sequence[Any], count: int = -1) -> list[list[Any]]:
    """The devices of each slice: those that name the same `slice_index`.

    Where no device names one (CPUs, GPUs), the slices are groups of processes, or, in a single process, equal runs of
    its devices.

    Args:
        devices: in any order.
        count: how many slices there shall be; -1 for as many as the devices name, or one.

    Raises:
        UsageError: if there are another number of slices, or slices of different sizes.
    """
    groups: dict[int, list[Any]] = {}
    for device in devices:
        groups.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
    if len(groups) == 1 and count > 1:
        ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
        size = len(ordered) // count
        groups = {index: ordered[index * size : (index + 1) * size] for index in range(count)}
        whole = size * count == len(ordered) and size > 0
        of_processes = [{device.process_index for device in part} for part in groups.values()]
        if whole and len(set().union(*of_processes)) > 1:
            whole = sum(map(len, of_processes)) == len(set().union(*of_processes))
        if not whole:
            raise UsageError(
                f"mesh slices={count}: {len(devices)} devices of {len({d.process_index for d in devices})} processes "
                "do not make so many groups of whole processes; choose a divisor of the number of processes"
            )
    if count not in (-1, len(groups)):
        raise UsageError(
            f"mesh slices={count}, but the devices lie in {len(groups)} slices; leave it out, or give that"
        )
    parts = [groups[index] for index in sorted(groups)]
    if len({len(part) for part in parts}) > 1:
        raise UsageError(f"the slices have {', '.join(str(len(part)) for part in parts)} devices; they must be equal")
    return parts


def partition_spec(*logical_axes: str) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes."""
    return PartitionSpec(*(RULES[axis] for axis in logical_axes))


def constrain(array: jax.Array, *logical_axes: str) -> jax.Array:
    """Fix the sharding of an activation; without a mesh in context, do nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return array
    return jax.lax.with_sharding_constraint(array, partition_spec(*logical_axes))


def param_shardings(specs: Mapping[str, ParamSpec], mesh: Mesh) -> dict[str, NamedSharding]:
    """The sharding of each parameter (and of its optimizer moments, which have the same axes).

    Raises:
        UsageError: naming every size that the mesh does not divide, with the nearest that it would.
    """
    refuse(indivisible_sizes(specs, mesh))
    return {
        name: NamedSharding(mesh, partition_spec(*(logical_axis(axis) for axis in spec.axes)))
        for name, spec in specs.items()
    }


def indivisible_sizes(specs: Mapping[str, ParamSpec], mesh: Mesh) -> list[str]:
    """A sentence for each size of parameters (or of moments) that the table would split unevenly, each size once."""
    return list(
        dict.fromkeys(
            f"model.{_FIELDS[logical_axis(axis)]}={size} does not divide over mesh {_names(axis)}={_splits(axis, mesh)}"
            f": {_nearest(size, _splits(axis, mesh))}, or mesh {_names(axis)} among "
            + ", ".join(str(n) for n in range(1, mesh.size + 1) if size % n == 0)
            for spec in specs.values()
            for axis, size in zip(spec.axes, spec.shape)
            if size % _splits(axis, mesh)
        )
    )


def indivisible_lengths(source_tokens: int, target_tokens: int, mesh: Mesh, *, split_length: bool) -> list[str]:
    """A sentence for each length of a row that the table would split unevenly, between blocks if not elsewhere."""
    lengths = {"max_source_tokens": source_tokens, "max_target_tokens": target_tokens}
    axis = "stream_length" if split_length else "length"
    splits = _splits(axis, mesh)
    way_out = "; or leave lengths whole: --train.no-split-length" if split_length else ""
    return [
        f"data.{field}={size} does not divide over mesh {_names(axis)}={splits}: {_nearest(size, splits)}{way_out}"
        for field, size in lengths.items()
        if size % splits
    ]


def indivisible_batch(batch_size: int, accumulation_steps: int, mesh: Mesh) -> list[str]:
    """A sentence if micro-batches cannot be split evenly over the mesh."""
    splits = _splits("batch", mesh)
    unit = accumulation_steps * splits
    if batch_size % unit == 0:
        return []
    return [
        f"batch_size={batch_size} is not a multiple of accumulation_steps={accumulation_steps} × data×fsdp={splits} "
        f"(mesh data={mesh.shape['data']}, fsdp={mesh.shape['fsdp']}): {_nearest(batch_size, unit)}"
    ]


def refuse(problems: Sequence[str]) -> None:
    """Refuse all that does not divide at once.

    Raises:
        UsageError: with all of the sentences, unless there is none.
    """
    if problems:
        raise UsageError("; ".join(problems))


def _splits(axis: str, mesh: Mesh) -> int:
    rule = RULES[logical_axis(axis)]
    return math.prod(mesh.shape[each] for each in ((rule,) if isinstance(rule, str) else rule or ()))


def _names(axis: str) -> str:
    rule = RULES[logical_axis(axis)]
    return rule if isinstance(rule, str) else "×".join(rule or ())


def _nearest(size: int, unit: int) -> str:
    below, above = size // unit * unit, -(-size // unit) * unit
    return "nearest: " + (f"{below} or {above}" if below else str(above))


def mesh_of(arrays: Mapping[str, Any]) -> Mesh | None:
    """The mesh over which these arrays lie; None for those of one device, and of NumPy."""
    shardings = [getattr(array, "sharding", None) for array in arrays.values()]
    meshes = {sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding)}
    if len(meshes) > 1:
        raise ValueError(f"the arrays lie on {len(meshes)} different meshes")
    mesh = meshes.pop() if meshes else None
    return mesh if isinstance(mesh, Mesh) else None


def batch_unit(mesh: Mesh | None) -> int:
    """What divides the number of rows of every batch on this mesh."""
    return 1 if mesh is None else _splits("batch", mesh)


def place_rows(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """Put an array [rows] or [rows, length], the same in every process, on the mesh, rows over data × fsdp."""
    sharding = NamedSharding(mesh, partition_spec(*("batch", "length")[: array.ndim]))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def batch_shardings(mesh: Mesh) -> Batch:
    """The sharding of every field of a Batch: rows over data × fsdp."""
    by_rank = {rank: NamedSharding(mesh, partition_spec(*("batch", "length")[:rank])) for rank in (1, 2)}
    return Batch(*(by_rank[1 if field in OF_ROWS else 2] for field in Batch._fields))


def check_batch_divides(batch_size: int, accumulation_steps: int, mesh: Mesh) -> None:
    """Refuse a micro-batch that cannot be split evenly over the mesh.

    Raises:
        UsageError: naming the batch size and the mesh.
    """
    refuse(indivisible_batch(batch_size, accumulation_steps, mesh))


def check_divides(config: RunConfig, specs: Mapping[str, ParamSpec], mesh: Mesh) -> None:
    """Refuse a run whose batch, lengths or parameters (and so moments) do not divide over the mesh.

    Raises:
        UsageError: naming all that do not, each with the nearest sizes that do.
    """
    train, data = config.train, config.data
    refuse(
        [
            *indivisible_batch(train.batch_size, train.accumulation_steps, mesh),
            *indivisible_lengths(data.max_source_tokens, data.max_target_tokens, mesh, split_length=train.split_length),
            *indivisible_sizes(specs, mesh),
        ]
    )


def local_batch_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """Indices within a global batch of the rows that devices of this process hold (int64, ascending)."""
    held = np.zeros(batch_size, bool)
    for (rows,) in batch_shardings(mesh).row_ids.addressable_devices_indices_map((batch_size,)).values():
        held[rows] = True
    return np.flatnonzero(held)


def place_batch(batch: Batch, batch_rows: np.ndarray, batch_size: int, mesh: Mesh) -> Batch:
    """Put this process's rows of a batch on its devices as part of one global array per field.

    Args:
        batch: NumPy arrays of the rows `batch_rows` only.
        batch_rows: where those rows stand in the global batch (`local_batch_rows`).
        batch_size: rows in the global batch.
        mesh: the mesh of all processes.
    """
    position = np.full(batch_size, -1)
    position[batch_rows] = np.arange(len(batch_rows))

    def place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            rows, *rest = index or (slice(None),)
            return array[position[rows]][(slice(None), *rest)]

        return jax.make_array_from_callback((batch_size, *array.shape[1:]), sharding, part)

    placed = zip(batch, batch_shardings(mesh))
    return Batch(*(None if array is None else place(array, sharding) for array, sharding in placed))
