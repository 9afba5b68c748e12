"""What this process's devices hold of an array: memory for it, to be filled, and the array made of it."""

import ctypes
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from t5pegasus.chunks import ArrayLayout

Bounds = tuple[tuple[int, int], ...]
"""Part of an array: start and stop in every dimension."""
_ALIGNMENT = 64
"""Bytes to whose multiples XLA aligns the memory of a CPU."""


def find_bounds(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> Bounds:
    """The part that a sharding's index means; one that is None, or open, means all."""
    slices = index or tuple(slice(None) for _ in shape)
    return tuple(each.indices(size)[:2] for each, size in zip(slices, shape))


class Parts(NamedTuple):
    """What one process needs of an array: each different part once, whichever devices hold it."""

    shape: tuple[int, ...]
    values: dict[Bounds, np.ndarray]
    on_host: dict[Any, tuple[jax.Array, np.ndarray]]
    """By device whose memory is the host's: its part, and the view to fill it by. `values` are the first of these."""

    @classmethod
    def allocate(cls, layout: ArrayLayout, sharding: jax.sharding.Sharding | None, zeros: np.ndarray) -> "Parts":
        """Memory for them, with `make_zeros` of at least the size of one; a sharding of None means all in one."""
        if sharding is None:
            return cls(layout.shape, {find_bounds(None, layout.shape): np.empty(layout.shape, layout.dtype)}, {})
        indices = sharding.addressable_devices_indices_map(layout.shape)
        bounds = {device: find_bounds(index, layout.shape) for device, index in indices.items()}
        shapes = {each: [stop - start for start, stop in each] for each in sorted(set(bounds.values()))}
        if any(device.platform != "cpu" for device in bounds) or 0 in layout.shape:
            return cls(layout.shape, {each: np.empty(shape, layout.dtype) for each, shape in shapes.items()}, {})
        on_host = {device: _allocate_on(device, shapes[each], layout.dtype, zeros) for device, each in bounds.items()}
        # Devices go backwards, so that of several with the same part the first one stays.
        values = {bounds[device]: on_host[device][1] for device in reversed(bounds)}
        return cls(layout.shape, values, on_host)

    def place(self, sharding: jax.sharding.Sharding | None) -> Any:
        """The array itself: on the devices of a sharding, or in this process's memory."""
        if sharding is None:
            return next(iter(self.values.values()))
        shards = []
        for device, index in sharding.addressable_devices_indices_map(self.shape).items():
            part = self.values[find_bounds(index, self.shape)]
            if device in self.on_host:
                shard, view = self.on_host[device]
                if view is not part:
                    view[...] = part
            else:
                shard = jax.device_put(part, device)
            shards.append(shard)
        jax.block_until_ready(shards)
        return jax.make_array_from_single_device_arrays(self.shape, sharding, shards)


def make_zeros(num_bytes: int) -> np.ndarray:
    """What memory of a device is made from, for all arrays of at most this size: the kernel need not hand out any."""
    return np.zeros(num_bytes + _ALIGNMENT, np.uint8)


def part_bytes(layout: ArrayLayout, sharding: jax.sharding.Sharding | None) -> int:
    """Of one device's part of an array, or of all of it."""
    shape = layout.shape if sharding is None else sharding.shard_shape(layout.shape)
    return math.prod(shape) * layout.dtype.itemsize


def count_parts(layout: ArrayLayout, sharding: jax.sharding.Sharding | None) -> int:
    """How many different parts of an array this process's devices hold."""
    if sharding is None:
        return 1
    indices = sharding.addressable_devices_indices_map(layout.shape).values()
    return len({find_bounds(index, layout.shape) for index in indices})


def _allocate_on(device: Any, shape: Sequence[int], dtype: np.dtype, zeros: np.ndarray) -> tuple[jax.Array, np.ndarray]:
    """An array in memory of a device that is the host's own, and a view to fill it by, before anybody else sees it.

    The device makes the memory its own by copying zeros. It would share NumPy's instead if that were aligned as it
    likes, whatever it is asked for, and then copy it when the first update wants to write there.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    begin = (_ALIGNMENT // 2 - zeros.ctypes.data) % _ALIGNMENT
    source = zeros[begin : begin + num_bytes].view(dtype).reshape(shape)
    array = jax.block_until_ready(jax.device_put(source, device))
    address = array.unsafe_buffer_pointer()
    if address == source.ctypes.data:
        raise RuntimeError(f"{device} shares memory that is {_ALIGNMENT // 2} bytes off its alignment with NumPy")
    content = np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))
    return array, content.view(dtype).reshape(shape)
