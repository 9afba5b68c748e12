"""A planned step: what it needs of each device, what it computes and sends, and how long that would take."""

import dataclasses
import functools
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from t5pegasus.config import RunConfig
from t5pegasus.errors import UsageError
from t5pegasus.model.flops import training_flops_per_row
from t5pegasus.model.t5 import count_parameters, declare_parameters
from t5pegasus.plan.ahead import Program, compile_ahead
from t5pegasus.plan.collectives import Collective, find_collectives
from t5pegasus.plan.costs import find_costs
from t5pegasus.plan.hlo import parse_hlo
from t5pegasus.plan.memory import Memory, estimate_temporaries, state_memory
from t5pegasus.plan.roofline import Prediction, Rates, predict
from t5pegasus.plan.topology import Topology, list_devices
from t5pegasus.sharding import AXES, check_divides, make_mesh
from t5pegasus.train.metrics import peak_flops

GPU_SHARE = 0.75
"""Of a GPU's memory, what JAX takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise."""


@dataclasses.dataclass(frozen=True)
class PlannedStep:
    """All that a plan says of one configuration."""

    config: RunConfig
    topology: Topology
    mesh: dict[str, int]
    num_parameters: int
    memory: Memory
    model_flops: float
    """Of a step, over all devices (`model.flops`)."""
    rates: Rates
    hardware_flops: float | None = None
    """Of a step on one device as compiled, recomputation and all; None where nothing was compiled."""
    memory_traffic: float | None = None
    """Bytes of main memory that a device reads and writes in a step."""
    collectives: tuple[Collective, ...] = ()
    prediction: Prediction | None = None
    compile_seconds: float = 0.0
    donated: tuple[int, int] = (0, 0)
    """Arrays of the state whose memory the new state takes over, and arrays of the state."""
    unknown_loops: tuple[str, ...] = ()

    @property
    def rows_per_second(self) -> float:
        """As predicted."""
        return self.config.train.batch_size / self.prediction.step if self.prediction else 0.0

    @property
    def mfu(self) -> float:
        """As predicted."""
        if self.prediction is None:
            return 0.0
        return self.model_flops / self.topology.num_devices / self.prediction.step / self.rates.peak_flops


def plan_step(config: RunConfig, topology: Topology) -> PlannedStep:
    """Compile a run's step for a topology, or, for GPUs, estimate it, and say what it takes.

    Raises:
        UsageError: if sizes do not divide over the mesh, or the devices cannot be described here.
    """
    config = resolve_config(config, topology)
    if topology.platform == "gpu":
        return estimate_step(config, topology)
    devices = list_devices(topology)
    mesh = make_mesh(config.mesh, devices)
    program = compile_ahead(config, mesh, f"{topology.name} slices={topology.num_slices}")
    rates = find_rates(topology, devices[0])
    plan = _without_program(config, topology, mesh, rates, program)
    if not program.fits:
        return plan
    module = parse_hlo(program.text)
    collectives = tuple(find_collectives(module, dict(mesh.shape), config.mesh.slices))
    costs = list(find_costs(module))
    num_state = len(jax.tree.leaves(_state_leaves(config)))
    return dataclasses.replace(
        plan,
        hardware_flops=sum(cost.flops for cost in costs),
        memory_traffic=sum(cost.bytes for cost in costs),
        collectives=collectives,
        prediction=predict(costs, collectives, topology, list(mesh.devices.flat), rates),
        donated=(len(module.donated), num_state),
        unknown_loops=tuple(module.unknown_loops),
    )


def estimate_step(config: RunConfig, topology: Topology) -> PlannedStep:
    """The analytic part alone: exact state, estimated activations, and a roofline of model FLOPs and known traffic.

    Raises:
        UsageError: if sizes do not divide over the mesh, or the mesh not over the slices.
    """
    config = resolve_config(config, topology)
    mesh = described_mesh(config, topology)
    check_divides(config, declare_parameters(config.model), mesh)
    rates = find_rates(topology, None)
    state = state_memory(config, mesh)
    temporaries = estimate_temporaries(config, mesh, topology.platform)
    memory = Memory(**state, temporaries=temporaries, limit=_memory_limit(topology), is_estimate=True)
    flops = _model_flops(config)
    return PlannedStep(
        config, topology, dict(mesh.shape), count_parameters(config.model), memory, flops, rates,
        prediction=_estimate_seconds(config, topology, dict(mesh.shape), memory, flops, rates),
    )  # fmt: skip


def resolve_config(config: RunConfig, topology: Topology) -> RunConfig:
    """The config with its slices and compute type as they are on that hardware."""
    train, mesh = config.train, config.mesh
    if train.compute_dtype == "auto":
        train = dataclasses.replace(train, compute_dtype="float32" if topology.platform == "cpu" else "bfloat16")
    if mesh.slices == -1:
        mesh = dataclasses.replace(mesh, slices=topology.num_slices)
    return dataclasses.replace(config, train=train, mesh=mesh)


def described_mesh(config: RunConfig, topology: Topology) -> Any:
    """A mesh of the right shape without devices, enough for shapes of shards.

    Raises:
        UsageError: if the sizes do not multiply to the number of devices, or do not fit into the slices.
    """
    sizes, num_slices = config.mesh.resolve(topology.num_devices), topology.num_slices
    what = f"{topology.name} has {num_slices} {'nodes' if topology.platform == 'gpu' else 'slices'}"
    if topology.chip and config.mesh.slices not in (-1, num_slices):
        raise UsageError(f"mesh slices={config.mesh.slices}, but {what}; leave it out, or give that")
    if sizes[0] % num_slices:
        raise UsageError(
            f"mesh data={sizes[0]} cannot be split over them: {what}; fsdp × tensor={sizes[1] * sizes[2]} must divide "
            f"the {topology.num_devices // num_slices} devices of each; make one of them smaller"
        )
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)


def find_rates(topology: Topology, device: Any) -> Rates:
    """What one device reaches: an accelerator's by the table, a CPU's measured here."""
    chip = topology.chip
    if chip is not None:
        flops = chip.peak_flops * chip.matmul_efficiency
        source = f"{100 * chip.matmul_efficiency:.0f} % of {chip.peak_flops / 1e12:.0f} TFLOP/s bfloat16, an assumption"
        return Rates(flops, chip.peak_flops, chip.memory_bandwidth, source, chip.clock)
    device = device or list_devices(topology)[0]
    peak, source = peak_flops(device)
    return Rates(peak, peak, measure_bandwidth(device) / jax.local_device_count(), source)


@functools.cache
def measure_bandwidth(device: Any) -> float:
    """Bytes per second of reading and writing a large array on a CPU device."""
    x = jax.device_put(np.ones(2**26, np.float32), device)
    add = jax.jit(lambda x: x + 1)
    add(x).block_until_ready()
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        add(x).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return 2 * x.nbytes / min(seconds)


def _model_flops(config: RunConfig) -> float:
    data = config.data
    per_row = training_flops_per_row(config.model, data.max_source_tokens, data.max_target_tokens)
    return per_row * config.train.batch_size


def _without_program(config: RunConfig, topology: Topology, mesh: Mesh, rates: Rates, program: Program) -> PlannedStep:
    state = state_memory(config, mesh)
    known = sum(state.values())
    if program.fits:
        # The compiler pads arguments to its tiles; what that takes counts as temporary.
        temporaries = program.temporary_bytes + program.code_bytes + program.argument_bytes - known
    else:
        temporaries = program.used_bytes - known
    limit = program.limit_bytes or _memory_limit(topology)
    memory = Memory(**state, temporaries=max(0, temporaries), limit=limit, is_estimate=False)
    return PlannedStep(
        config, topology, dict(mesh.shape), count_parameters(config.model), memory, _model_flops(config), rates,
        compile_seconds=program.compile_seconds,
    )  # fmt: skip


def _memory_limit(topology: Topology) -> int | None:
    if topology.chip is None:
        return None
    return int(topology.chip.memory_bytes * (GPU_SHARE if topology.platform == "gpu" else 1))


def _state_leaves(config: RunConfig) -> Sequence[Any]:
    from t5pegasus.train.estimate import abstract_state

    one = Mesh(np.array(jax.local_devices()[:1]).reshape(1, 1, 1), AXES)
    return jax.tree.leaves(abstract_state(config, one))


def _estimate_seconds(
    config: RunConfig, topology: Topology, mesh: dict[str, int], memory: Memory, flops: float, rates: Rates
) -> Prediction:
    """A roofline without a program: recomputation as the policy says, each kept activation written and read once.

    Weights are gathered over `fsdp` three times for each micro-batch, gradients are summed over `data` once, within
    slices before between them; over `tensor` each block gathers what it reads and scatters what it adds.
    """
    recomputed = {"none": 0.0, "dots": 0.05, "full": 1 / 3, "offload": 1 / 3}[config.train.remat]
    products = flops * (1 + recomputed) / topology.num_devices / rates.flops
    passes = config.train.accumulation_steps
    traffic = 3 * (memory.parameters + memory.optimizer) + 3 * memory.temporaries * passes
    wide = 4 if config.train.compute_dtype == "float32" else 2
    weights = count_parameters(config.model) / mesh["tensor"]
    shared, slices = mesh["fsdp"], topology.num_slices
    gather = 3 * passes * wide * weights * (shared - 1) / shared
    replicas = mesh["data"] // slices
    reduce = 2 * 4 * weights / shared * (replicas - 1) / replicas
    between = 2 * 4 * weights / shared / replicas * (slices - 1) / slices
    chip = topology.chip
    stream = _stream_bytes(config, mesh, wide)
    ici = (gather + reduce + stream) / (chip.link_bandwidth if chip else math.inf)
    dcn = between / (chip.network_bandwidth if chip else math.inf)
    by_bytes = traffic / rates.memory_bandwidth
    return Prediction(products, by_bytes, 0.0, max(products, by_bytes), ici, dcn)


def _stream_bytes(config: RunConfig, mesh: dict[str, int], wide: int) -> float:
    """What a device sends over `tensor` in a step: two blocks of an encoder layer, three of a decoder layer."""
    model, data, tensor = config.model, config.data, mesh["tensor"]
    positions = 2 * model.num_encoder_layers * data.max_source_tokens
    positions += 3 * model.num_decoder_layers * data.max_target_tokens
    rows = config.train.batch_size / (mesh["data"] * mesh["fsdp"])
    passes = 2 if config.train.remat == "none" else 3  # forward, backward, and forward anew
    return passes * 2 * rows * positions * model.d_model * wide * (tensor - 1) / tensor
