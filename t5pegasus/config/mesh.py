"""Devices along each mesh axis."""

import dataclasses
import math

from t5pegasus.config.record import Record, require


@dataclasses.dataclass(frozen=True)
class MeshConfig(Record):
    """Devices along each mesh axis; -1 takes all that the others leave (one axis at most)."""

    data: int = -1
    """Replicates the parameters, splits the batch; over all slices."""
    fsdp: int = 1
    """Splits parameters and batch."""
    tensor: int = 1
    """Splits heads, feed-forward units and vocabulary."""
    slices: int = -1
    """Groups of devices between which the data-center network lies: TPU slices, or nodes of GPUs. They are the
    outermost part of `data`, so that only gradients cross the network. -1 takes what the devices say."""

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor)
        require(
            all(size >= 1 or size == -1 for size in sizes) and sizes.count(-1) <= 1,
            f"mesh data={self.data} fsdp={self.fsdp} tensor={self.tensor}: sizes must be positive, one may be -1",
        )
        require(
            self.slices >= 1 or self.slices == -1,
            f"mesh slices={self.slices} must be positive, or -1: as many as the devices lie in",
        )
        require(
            self.slices == -1 or self.data == -1 or self.data % self.slices == 0,
            f"mesh data={self.data} is no multiple of slices={self.slices}, over which the parameters are replicated; "
            f"choose data={self.slices * max(1, round(self.data / self.slices))}, or -1",
        )

    def resolve(self, num_devices: int) -> tuple[int, int, int]:
        """(data, fsdp, tensor) whose product is `num_devices`.

        Raises:
            UsageError: if the sizes do not multiply to the number of devices.
        """
        sizes = [self.data, self.fsdp, self.tensor]
        known = math.prod(size for size in sizes if size != -1)
        if -1 in sizes and num_devices % known == 0:
            sizes[sizes.index(-1)] = num_devices // known
        require(
            math.prod(sizes) == num_devices,
            f"mesh data={self.data} × fsdp={self.fsdp} × tensor={self.tensor} does not use exactly the "
            f"{num_devices} devices there are; set one axis to -1 or choose sizes whose product is {num_devices}",
        )
        return sizes[0], sizes[1], sizes[2]
