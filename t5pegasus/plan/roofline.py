"""How long a step would take at the hardware's rates: a prediction, and a floor rather than a promise.

Every instruction takes the longest of its FLOPs at the rate of large matrix products, its bytes at the rate of main
memory (Williams et al. 2009), and, in a TPU program, the cycles that the compiler's own cost model expects of it, which
alone knows of vector units (softmax, dropout's random numbers) and of products too narrow for the matrix unit;
instructions follow each other. Collectives run at the rate of all links that their groups span. The prediction lets
local work, the slice's interconnect and the network between slices overlap, so that the longest of the three decides;
the sum is given, too, for nothing overlapping. Latencies, host and input are not in it.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from t5pegasus.plan.collectives import Collective
from t5pegasus.plan.costs import Cost
from t5pegasus.plan.topology import Topology


@dataclasses.dataclass(frozen=True)
class Rates:
    """What one device reaches, and where that is from."""

    flops: float
    """Of large matrix products, per second."""
    peak_flops: float
    """The denominator of MFU."""
    memory_bandwidth: float
    source: str
    clock: float | None = None
    """Cycles per second, to which the compiler's own estimates are turned into time."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Seconds of one step on one device."""

    products: float
    """Its matrix products alone."""
    memory: float
    """Its traffic with main memory alone."""
    compiler: float
    """The compiler's own estimates of its instructions; 0 where it makes none."""
    local: float
    """Each instruction by the longest of the three."""
    ici: float
    """Collectives within a slice."""
    dcn: float
    """Collectives between slices."""

    @property
    def step(self) -> float:
        """With local work and both networks at the same time."""
        return max(self.local, self.ici, self.dcn)

    @property
    def without_overlap(self) -> float:
        """One after the other."""
        return self.local + self.ici + self.dcn

    @property
    def bound_by(self) -> str:
        """What takes longest."""
        if self.step > self.local:
            return "the network between slices" if self.dcn >= self.ici else "the interconnect of a slice"
        longest = max(self.products, self.memory, self.compiler)
        if longest == self.compiler:
            return "vector units and narrow products, by the compiler's estimates"
        return "matrix products" if longest == self.products else "memory bandwidth"


def predict(
    costs: Iterable[Cost],
    collectives: Iterable[Collective],
    topology: Topology,
    devices: Sequence[Any],
    rates: Rates,
) -> Prediction:
    """The roofline of a compiled step.

    Args:
        costs: of its instructions.
        collectives: of it.
        topology: the hardware.
        devices: in the order of the mesh, with `coords` on a TPU.
        rates: of one device.
    """
    products = memory = compiler = local = 0.0
    for cost in costs:
        by_flops, by_bytes = cost.flops / rates.flops, cost.bytes / rates.memory_bandwidth
        by_cycles = cost.cycles / rates.clock if rates.clock else 0.0
        products, memory, compiler = products + by_flops, memory + by_bytes, compiler + by_cycles
        local += max(by_flops, by_bytes, by_cycles)
    seconds = {"ici": 0.0, "dcn": 0.0}
    for each in collectives:
        if each.network == "dcn":
            bandwidth = topology.chip.network_bandwidth if topology.chip else float("inf")
        else:
            bandwidth = topology.link_bandwidth(positions_along([devices[member] for member in each.group]))
            if each.kind == "collective-permute" and topology.chip and topology.chip.torus_axes:
                bandwidth = min(bandwidth, 2 * topology.chip.link_bandwidth)  # a ring, once each way round
        seconds[each.network] += each.sent_bytes / bandwidth
    return Prediction(products, memory, compiler, local, **seconds)


def positions_along(devices: Sequence[Any]) -> tuple[int, ...]:
    """How many different coordinates the devices have along each axis of the torus; nothing where they have none."""
    coordinates = [tuple(each.coords) for each in devices if hasattr(each, "coords")]
    return tuple(len(set(along)) for along in zip(*coordinates))
