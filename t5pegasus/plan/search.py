"""Which mesh, remat policy and micro-batch to take: all estimated, the best few compiled."""

import dataclasses
import math
from collections.abc import Iterator

from t5pegasus.config import MeshConfig, RunConfig
from t5pegasus.errors import UsageError
from t5pegasus.plan.step import PlannedStep, estimate_step, plan_step
from t5pegasus.plan.topology import Topology

REMAT = ("none", "dots", "full")
"""From what keeps most to what computes most anew."""
_SLACK = 1.3
"""An estimate may lie above the limit by so much and still be compiled: it is no better than that."""

Estimates = list[PlannedStep]


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

    Raises:
        UsageError: if none divides.
    """
    return _try(_estimate(_variants(config, topology), topology), topology, num_compiled, until_one_fits=False)


def find_fitting(plan: PlannedStep, num_compiled: int = 3) -> Searched:
    """What is nearest to a plan that does not fit, and does: more recomputation, smaller micro-batches, more fsdp."""
    topology = plan.topology
    estimates = [
        each
        for each in _estimate(_variants(plan.config, topology), topology)
        if each.mesh["tensor"] == plan.mesh["tensor"] and _saves(each, plan)
    ]
    fitting = [each for each in estimates if each.memory.fits] or estimates
    best = min((_changes(each, plan) for each in fitting), default=0)
    near = [each for each in fitting if _changes(each, plan) <= best + 1]
    leanest = sorted(estimates, key=lambda each: each.memory.total)[:1]
    found = _try([*near, *leanest], topology, num_compiled, until_one_fits=True)
    return dataclasses.replace(found, num_considered=len(estimates))


def describe_changes(plan: PlannedStep, other: PlannedStep) -> str:
    """The flags that make the first one the other."""
    flags = [f"--mesh.{name} {size}" for name, size in other.mesh.items() if size != plan.mesh[name] and name != "data"]
    if flags and plan.config.mesh.data != -1:
        flags.append("--mesh.data -1")
    for field in ("remat", "accumulation_steps"):
        wanted = getattr(other.config.train, field)
        if wanted != getattr(plan.config.train, field):
            flags.append(f"--train.{field.replace('_', '-')} {wanted}")
    return " ".join(flags) or "as it is"


def _try(estimates: Estimates, topology: Topology, num_compiled: int, *, until_one_fits: bool) -> Searched:
    """Compile the fastest, of each mesh and remat policy first the least accumulation that is estimated to fit.

    More accumulation saves memory and nothing else, so it is tried where that did not fit. If nothing else has, the
    last try goes to what takes least.
    """
    waiting: dict[tuple, Estimates] = {}
    for each in estimates:
        waiting.setdefault((*each.mesh.values(), each.config.train.remat), []).append(each)
    waiting = {which: possible for which, same in waiting.items() if (possible := _possible(same, topology))}
    tried: Estimates = []
    while waiting and len(tried) < num_compiled:
        is_last_hope = len(tried) == num_compiled - 1 > 0 and not any(plan.memory.fits for plan in tried)
        rank = (
            (lambda which: waiting[which][-1].memory.total)
            if is_last_hope
            else (lambda which: _rank(waiting[which][0]))
        )
        which = min(waiting, key=rank)
        estimate, *rest = waiting.pop(which)[-1 if is_last_hope else 0 :]
        plan = estimate if topology.platform == "gpu" else plan_step(estimate.config, topology)
        tried.append(plan)
        if plan.memory.fits and until_one_fits:
            break
        if rest and not plan.memory.fits:
            waiting[which] = rest
    best = min((plan for plan in tried if plan.memory.fits), key=_rank, default=None)
    return Searched(best, tuple(tried), len(estimates), sum(each.memory.fits for each in estimates))


def _possible(same: Estimates, topology: Topology) -> Estimates:
    """Of one mesh and policy those to try, least accumulation first; none where an estimate is out of reach."""
    same = sorted(same, key=lambda each: each.config.train.accumulation_steps)
    fitting = [at for at, each in enumerate(same) if each.memory.fits]
    if fitting:
        return same[fitting[0] :]
    reachable = topology.platform != "gpu" and same[-1].memory.total <= _SLACK * (same[-1].memory.limit or math.inf)
    return same[-1:] if reachable else []


def _rank(plan: PlannedStep) -> tuple[float, ...]:
    """Sorts by speed; equally fast ones by what they would take without overlap, then by memory."""
    times = plan.prediction
    return (times.step, times.without_overlap, plan.memory.total) if times else (math.inf,)


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


def _estimate(configs: Iterator[RunConfig], topology: Topology) -> Estimates:
    """Those that divide."""
    found, refused = [], None
    for config in configs:
        try:
            found.append(estimate_step(config, topology))
        except UsageError as error:  # does not divide, which is what is being found out
            refused = refused or error
    if refused and not found:
        raise UsageError(
            f"no mesh of the {topology.num_devices} devices of {topology.name} divides; the first: {refused}"
        )
    return found


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
