"""The devices of hardware that is not here, by name: `v5e:16x16`, `v5p:8x8x8`, `h100:8`, `cpu`."""

import dataclasses
import difflib
import importlib.util
import math
import os
from typing import Any

import jax

from t5pegasus.chips import CHIPS, Chip
from t5pegasus.errors import UsageError

INSTALL = "pip install '.[tpu]'"
GPUS_PER_NODE = 8
_FLAT_SHAPES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
"""What Google Cloud offers of v5e and v6e."""
_TPU_KINDS = ("v4", "v5e", "v5p", "v6e", "tpu7x")


@dataclasses.dataclass(frozen=True)
class Topology:
    """Which devices, and how they lie."""

    name: str
    """As given, without slices."""
    chip: Chip | None
    """None for the CPU of this machine."""
    shape: tuple[int, ...]
    """Chips along the axes of one slice's torus; of GPUs, those of a node."""
    num_slices: int
    """TPU slices, or nodes of GPUs."""

    @property
    def platform(self) -> str:
        """`tpu`, `gpu` or `cpu`."""
        return "cpu" if self.chip is None else "tpu" if self.chip.torus_axes else "gpu"

    @property
    def num_devices(self) -> int:
        """As JAX counts them, over all slices."""
        return math.prod(self.shape) * self.num_slices * (self.chip.devices_per_chip if self.chip else 1)

    def link_bandwidth(self, chips_along: tuple[int, ...]) -> float:
        """Bytes per second that one device sends to others of its slice, all links in use.

        Args:
            chips_along: how many different positions a group of devices takes along each axis of the torus.
        """
        if self.chip is None:
            return math.inf  # devices of one CPU share its memory
        if self.chip.torus_axes == 0:
            return self.chip.link_bandwidth
        spanned = [size for size, positions in zip(self.shape, chips_along) if positions > 1]
        ports = sum(2 if size % self.chip.wrap_multiple == 0 else 1 for size in spanned)
        return self.chip.link_bandwidth * max(1, ports)


def parse_topology(text: str, num_slices: int = 1) -> Topology:
    """The topology of that name.

    Raises:
        UsageError: if there is none; the nearest one is named.
    """
    if num_slices < 1:
        raise UsageError(f"--slices={num_slices} must be at least 1")
    kind, _, size = text.partition(":")
    if kind == "cpu":
        count = _whole(size or "1", text)
        return Topology(text, None, (count,), num_slices)
    gpus = tuple(name for name, chip in CHIPS.items() if chip.torus_axes == 0)
    if kind not in (*_TPU_KINDS, *gpus):
        near = difflib.get_close_matches(kind, (*_TPU_KINDS, *gpus, "cpu"), n=1)
        known = f"{', '.join(_TPU_KINDS)} (as v5e:4x4), {', '.join(gpus)} (as h100:8), cpu"
        raise UsageError(
            f"topology {text!r}: no chip {kind!r}; " + (f"perhaps {near[0]!r}; " if near else "") + f"known: {known}"
        )
    chip = CHIPS[kind]
    if kind in gpus:
        count = _whole(size, text)
        if count > GPUS_PER_NODE and count % GPUS_PER_NODE:
            below = count // GPUS_PER_NODE * GPUS_PER_NODE
            raise UsageError(
                f"topology {text!r}: more than {GPUS_PER_NODE} GPUs are whole nodes of {GPUS_PER_NODE}; "
                f"nearest: {kind}:{below} or {kind}:{below + GPUS_PER_NODE}"
            )
        nodes = max(1, count // GPUS_PER_NODE)
        return Topology(text, chip, (count // nodes,), nodes * num_slices)
    shape = tuple(_whole(part, text) for part in size.split("x")) if size else ()
    if len(shape) != chip.torus_axes or not _exists(shape):
        raise UsageError(f"topology {text!r}: {kind} has no slice of that shape; nearest: {_nearest(kind, shape)}")
    return Topology(text, chip, shape, num_slices)


def list_devices(topology: Topology) -> list[Any]:
    """JAX's devices of a topology: descriptions that programs can be compiled for, or this machine's own CPU devices.

    Raises:
        UsageError: if they cannot be had here, with the way out.
    """
    if topology.platform == "cpu":
        devices = jax.devices("cpu")
        if len(devices) < topology.num_devices:
            raise UsageError(
                f"topology {topology.name!r}: JAX has {len(devices)} CPU devices here; "
                f"set JAX_NUM_CPU_DEVICES={topology.num_devices} before the command"
            )
        return list(devices[: topology.num_devices])
    if topology.platform == "gpu":
        raise UsageError(f"{topology.name}: programs for GPUs cannot be compiled without one")
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError(
            f"compiling for {topology.name} takes the TPU compiler, libtpu, which is not installed here; "
            f"it needs no TPU: {INSTALL}"
        )
    from jax.experimental import topologies

    # The compiler touches no TPU, so several may run; without the rest it asks Google Cloud what machine this is.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    chip = topology.chip
    name = f"{topology.name.partition(':')[0]}:{'x'.join(map(str, topology.shape))}"
    options: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1) if math.prod(topology.shape) == 1 else (2, 2, 1)}
    if chip is not None and chip.chip_config:
        options["chip_config_name"] = chip.chip_config
    if topology.num_slices > 1:
        options["num_slices"] = topology.num_slices
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as error:
        raise UsageError(
            f"topology {topology.name!r}: the TPU compiler refuses it: {str(error).splitlines()[0]}"
        ) from error
    return list(described.devices)


def _whole(text: str, topology: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(
            f"topology {topology!r}: {text!r} is no number of chips; write v5e:4x4, v5p:4x4x4, h100:8 or cpu"
        )
    return int(text)


def _exists(shape: tuple[int, ...]) -> bool:
    if len(shape) == 2:
        return shape in _FLAT_SHAPES
    small = shape in ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
    return small or (all(size % 4 == 0 for size in shape) and math.prod(shape) <= 9216)


def _nearest(kind: str, shape: tuple[int, ...]) -> str:
    chips = math.prod(shape) if shape else 4
    flat = CHIPS[kind].torus_axes == 2
    cubes = [(a, b, c) for a in range(4, 25, 4) for b in range(a, 25, 4) for c in range(b, 29, 4)]
    shapes = _FLAT_SHAPES if flat else ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), *cubes)
    best = sorted(shapes, key=lambda each: (abs(math.log(math.prod(each) / chips)), max(each)))[:2]
    return " or ".join(f"{kind}:{'x'.join(map(str, each))}" for each in best)
