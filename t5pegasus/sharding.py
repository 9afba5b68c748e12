"""Mesh and shardings: one table from logical axes to mesh axes, read by parameters, optimizer state and batches.

Mesh axes are (data, fsdp, tensor): `data` replicates parameters, `fsdp` splits them, both split the batch;
`tensor` splits heads, feed-forward units and vocabulary (Shazeer et al. 2018; Xu et al. 2021, GSPMD).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from t5pegasus.axes import ParamSpec, logical_axis
from t5pegasus.batch import Batch
from t5pegasus.config import MeshConfig
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
    "length": None,
    "hidden": None,
}
"""Logical axis → mesh axis. `embed` is the parameters' d_model axis, `hidden` the activations'."""


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A (data, fsdp, tensor) mesh over all devices of all processes, or over the given ones.

    Raises:
        UsageError: if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.resolve(len(devices))
    return jax.make_mesh(sizes, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=devices)


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
        UsageError: for every axis whose size the mesh does not divide, with the mesh sizes that would.
    """
    return {
        name: NamedSharding(mesh, partition_spec(*(logical_axis(axis) for axis in spec.axes)))
        for name, spec in specs.items()
        if _check_divides(spec, mesh)
    }


def _check_divides(spec: ParamSpec, mesh: Mesh) -> bool:
    for axis, size in zip(spec.axes, spec.shape):
        rule = RULES[logical_axis(axis)]
        if isinstance(rule, str) and size % mesh.shape[rule]:
            field = {"embed": "d_model", "heads": "num_heads", "mlp": "d_ff", "vocab": "vocab_size"}[logical_axis(axis)]
            divisors = [n for n in range(1, mesh.size + 1) if size % n == 0]
            raise UsageError(
                f"model.{field}={size} does not divide over mesh {rule}={mesh.shape[rule]}; "
                f"choose mesh {rule} among {', '.join(map(str, divisors))}, or another {field}"
            )
    return True


def batch_shardings(mesh: Mesh) -> Batch:
    """The sharding of every field of a Batch: rows over data × fsdp."""
    by_rank = {rank: NamedSharding(mesh, partition_spec(*("batch", "length")[:rank])) for rank in (1, 2)}
    return Batch(*(by_rank[1 if field == "row_ids" else 2] for field in Batch._fields))


def check_batch_divides(batch_size: int, accumulation_steps: int, mesh: Mesh) -> None:
    """Refuse a micro-batch that cannot be split evenly over the mesh.

    Raises:
        UsageError: naming the batch size and the mesh.
    """
    splits = mesh.shape["data"] * mesh.shape["fsdp"]
    unit = accumulation_steps * splits
    if batch_size % unit:
        raise UsageError(
            f"batch_size={batch_size} is not a multiple of accumulation_steps={accumulation_steps} × "
            f"data×fsdp={splits} (mesh data={mesh.shape['data']}, fsdp={mesh.shape['fsdp']}); "
            f"the nearest that is: {max(1, round(batch_size / unit)) * unit}"
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

    return Batch(*(place(array, sharding) for array, sharding in zip(batch, batch_shardings(mesh))))
