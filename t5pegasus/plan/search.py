"""Which mesh, remat policy and micro-batch to take: all estimated, the best few compiled."""

import dataclasses
import logging
from collections.abc import Iterator

from t5pegasus.config import MeshConfig, RunConfig
from t5pegasus.errors import UsageError
from t5pegasus.plan.step import PlannedStep, estimate_step, plan_step
from t5pegasus.plan.topology import Topology

logger = logging.getLogger(__name__)

REMAT = ("none", "dots", "full")
"""From what keeps most to what computes most anew."""
_SLACK = 1.3
"""An estimate may lie above the limit by so much and still be compiled: it is no better than that."""


@dataclasses.dataclass(frozen=True)
class Searched:
    """What a search looked at."""

    best: PlannedStep | None
    """The fastest of those that fit; None if none of those tried did."""
    tried: tuple[PlannedStep, ...]
    """Compiled (or, for GPUs, estimated) in this order."""
    num_considered: int
    """Configurations that divide."""
    num_estimated_to_fit: int


def search(config: RunConfig, topology: Topology, num_compiled: int = 4) -> Searched:
    """The fastest configuration of a batch on a topology: mesh × remat × accumulation.

    Every one that divides is estimated; of those that may fit the `num_compiled` fastest are compiled.
    """
    estimates = list(_estimates(_variants(config, topology), topology))
    return _try(estimates, topology, num_compiled, until_one_fits=False)


def find_fitting(plan: PlannedStep, num_compiled: int = 3) -> Searched:
    """What is nearest to a plan that does not fit, and does: more recomputation, smaller micro-batches, more fsdp."""
    topology = plan.topology
    estimates = [
        each
        for each in _estimates(_variants(plan.config, topology), topology)
        if each.mesh["tensor"] == plan.mesh["tensor"] and _saves(each, plan)
    ]
    estimates.sort(key=lambda each: _changes(each, plan))
    fitting = [each for each in estimates if each.memory.fits] or estimates
    best = min((_changes(each, plan) for each in fitting), default=0)
    near = [each for each in fitting if _changes(each, plan) <= best + 1]
    return _try(near, topology, num_compiled, until_one_fits=True, considered=len(estimates))


def describe_changes(plan: PlannedStep, other: PlannedStep) -> str:
    """The flags that make the first one the other."""
    flags = [f"--mesh.{name} {size}" for name, size in other.mesh.items() if size != plan.mesh[name] and name != "data"]
    for field in ("remat", "accumulation_steps"):
        wanted = getattr(other.config.train, field)
        if wanted != getattr(plan.config.train, field):
            flags.append(f"--train.{field.replace('_', '-')} {wanted}")
    return " ".join(flags) or "as it is"


def _try(
    estimates: list[PlannedStep],
    topology: Topology,
    num_compiled: int,
    *,
    until_one_fits: bool,
    considered: int | None = None,
) -> Searched:
    possible = [
        each for each in estimates if each.memory.limit is None or each.memory.total <= _SLACK * each.memory.limit
    ]
    possible.sort(key=_seconds)
    fitting = sum(each.memory.fits for each in estimates)
    tried: list[PlannedStep] = []
    for estimate in possible[:num_compiled]:
        plan = estimate if topology.platform == "gpu" else plan_step(estimate.config, topology)
        tried.append(plan)
        if plan.memory.fits and until_one_fits:
            break
    best = min((plan for plan in tried if plan.memory.fits), key=_seconds, default=None)
    return Searched(best, tuple(tried), len(estimates) if considered is None else considered, fitting)


def _seconds(plan: PlannedStep) -> float:
    return plan.prediction.step if plan.prediction else float("inf")


def _variants(config: RunConfig, topology: Topology) -> Iterator[RunConfig]:
    per_slice = topology.num_devices // topology.num_slices
    accumulations = [n for n in (1, 2, 4, 8, 16, 32) if config.train.batch_size % n == 0]
    for fsdp in _divisors(per_slice):
        for tensor in _divisors(per_slice // fsdp):
            if tensor > 8:  # beyond the devices of a host every layer would wait for its neighbours
                continue
            mesh = MeshConfig(topology.num_devices // (fsdp * tensor), fsdp, tensor, config.mesh.slices)
            for remat in REMAT:
                for accumulation in accumulations:
                    train = dataclasses.replace(config.train, remat=remat, accumulation_steps=accumulation)
                    yield dataclasses.replace(config, mesh=mesh, train=train)


def _estimates(configs: Iterator[RunConfig], topology: Topology) -> Iterator[PlannedStep]:
    for config in configs:
        try:
            yield estimate_step(config, topology)
        except UsageError:  # does not divide, which is what is being found out
            continue


def _saves(each: PlannedStep, plan: PlannedStep) -> bool:
    train, given = each.config.train, plan.config.train
    more = (
        REMAT.index(train.remat) - REMAT.index(given.remat) if given.remat in REMAT else 0,
        train.accumulation_steps - given.accumulation_steps,
        each.mesh["fsdp"] - plan.mesh["fsdp"],
    )
    return min(more) >= 0 and max(more) > 0


def _changes(each: PlannedStep, plan: PlannedStep) -> int:
    train, given = each.config.train, plan.config.train
    return sum(
        (
            train.remat != given.remat,
            (train.accumulation_steps // given.accumulation_steps).bit_length() - 1,
            (each.mesh["fsdp"] // plan.mesh["fsdp"]).bit_length() - 1,
        )
    )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
