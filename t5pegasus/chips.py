"""What accelerators can do, by kind: the denominators of MFU, and what a plan without the hardware rests on.

Figures are per JAX device (a TPU v3 or 7x chip is two of them) and of the makers:
TPU: https://docs.cloud.google.com/tpu/docs/v3, v4, v5e, v5p, v6e, tpu7x (read 2026-11). Bidirectional interconnect per
chip there is divided by its ports and by two directions: v5e 400 GB/s by 4 ports, v5p 1,200 by 6, v6e 800 by 4, 7x
1,200 by 6; v3's and v4's are
their pods' all-reduce bandwidths (340 TB/s, 1.1 PB/s) by chips and ports. Network per chip: v5e and v6e
from their hosts' network cards (2 × 100 and 4 × 200 Gb/s for 8 chips), v5p and 7x as given per chip, v4 as v5p,
v3 100 Gb/s for 4 chips.
NVIDIA: data sheets of A100 80GB SXM, H100 SXM and H200 SXM, dense bfloat16; network of the DGX systems, one card of
200 (A100) or 400 Gb/s per GPU.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of device; bandwidths are bytes per second in one direction."""

    name: str
    """As in `v5e:4x4`."""
    device_kind: str
    """How JAX's `device_kind` begins."""
    peak_flops: float
    """Dense bfloat16 FLOP/s."""
    memory_bytes: int
    memory_bandwidth: float
    link_bandwidth: float
    """Of one link to a neighbour of the torus; of a GPU, of all its NVLinks."""
    torus_axes: int
    """2 or 3; 0 for GPUs, whose links lead through a switch to all others of the node."""
    network_bandwidth: float
    """To other slices or nodes, per device."""
    matmul_efficiency: float
    """Share of the peak that large matrix products are assumed to reach, from published MFU of large dense decoders
    with the recomputation they do added: an assumption, not measured here."""
    devices_per_chip: int = 1
    chip_config: str | None = None
    """What libtpu calls the setting in which the two cores of a chip are one device."""
    clock: float | None = None
    """Cycles per second: the peak by the multiply-adds of all matrix units in one cycle."""
    wrap_multiple: int = 4
    """An axis of the torus is closed to a ring if its size is a multiple of this."""


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v3", "TPU v3", 61.5e12, 16 * GIB, 450e9, 41e9, 2, 1.6e9, 0.8, devices_per_chip=2),
        Chip("v4", "TPU v4", 275e12, 32 * GIB, 1200e9, 45e9, 3, 6.25e9, 0.8, chip_config="megacore", clock=1.05e9),
        Chip("v5e", "TPU v5 lite", 197e12, 16 * GIB, 819e9, 50e9, 2, 3.125e9, 0.8, clock=1.5e9, wrap_multiple=16),
        Chip("v5p", "TPU v5", 459e12, 95 * GIB, 2765e9, 100e9, 3, 6.25e9, 0.8, clock=1.75e9),
        Chip("v6e", "TPU v6 lite", 918e12, 32 * GIB, 1638e9, 100e9, 2, 12.5e9, 0.8, clock=1.75e9, wrap_multiple=16),
        Chip("tpu7x", "TPU7x", 1153.5e12, 96 * GIB, 3690e9, 50e9, 3, 6.25e9, 0.8, devices_per_chip=2),
        Chip("a100", "NVIDIA A100", 312e12, 80 * 10**9, 2039e9, 300e9, 0, 25e9, 0.75),
        Chip("h100", "NVIDIA H100", 989e12, 80 * 10**9, 3350e9, 450e9, 0, 50e9, 0.7),
        Chip("h200", "NVIDIA H200", 989e12, 141 * 10**9, 4800e9, 450e9, 0, 50e9, 0.7),
    )
}
"""By name."""


def find_chip(device_kind: str) -> Chip | None:
    """The chip that JAX describes so; None for a CPU and for what the table lacks."""
    fitting = [chip for chip in CHIPS.values() if device_kind.startswith(chip.device_kind)]
    return max(fitting, key=lambda chip: len(chip.device_kind), default=None)
