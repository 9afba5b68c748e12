"""A plan as text for people, and as JSON for programs."""

import dataclasses
from collections import defaultdict
from typing import Any

from t5pegasus.plan.search import Searched, describe_changes
from t5pegasus.plan.step import PlannedStep

GIB = 2**30
_UNITS = ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def format_plan(plan: PlannedStep, name: str, fix: Searched | None = None) -> str:
    """A page about one configuration, 40 lines at most."""
    train, data = plan.config.train, plan.config.data
    where = plan.topology.name + (f", {plan.topology.num_slices} slices" if plan.topology.num_slices > 1 else "")
    how = (
        "estimated, nothing is compiled for GPUs"
        if plan.memory.is_estimate
        else f"compiled in {plan.compile_seconds:.0f} s"
    )
    lines = [
        f"{name}, {plan.num_parameters:,} parameters, on {where}: {plan.topology.num_devices} devices ({how})",
        f"{_mesh(plan)}; batch {train.batch_size} rows of {data.max_source_tokens} + {data.max_target_tokens} tokens, "
        f"accumulation {train.accumulation_steps}; remat {train.remat}; {train.compute_dtype}",
        "",
        *_memory_lines(plan),
        *(_fix_lines(plan, fix) if fix is not None else []),
        "",
        *_work_lines(plan),
        *_collective_lines(plan),
        "",
        *_prediction_lines(plan),
    ]
    return "\n".join(lines)


def format_search(searched: Searched, name: str) -> str:
    """The candidates that were tried, as a table, and the best one in whole."""
    header = f"  {'mesh':<40}{'remat':<8}{'accumulation':<14}{'memory':<16}{'step':<12}MFU"
    rows = [
        f"  {_mesh(each):<40}{each.config.train.remat:<8}{each.config.train.accumulation_steps:<14}"
        f"{each.memory.total / GIB:6.2f} GiB{'' if each.memory.fits else ' no':<6}"
        + (f"{1e3 * each.prediction.step:8.1f} ms {100 * each.mfu:4.0f} %" if each.prediction else "")
        for each in searched.tried
    ]
    counted = (
        f"search: {searched.num_considered} configurations divide, {searched.num_estimated_to_fit} are estimated to fit"
        f", {len(searched.tried)} tried"
    )
    if searched.best is None:
        return "\n".join([counted, header, *rows, "none of these fits: take more devices, or a smaller batch or model"])
    mesh, train = searched.best.mesh, searched.best.config.train
    flags = ["--mesh.data -1", f"--mesh.fsdp {mesh['fsdp']}", f"--mesh.tensor {mesh['tensor']}"]
    flags += [f"--train.remat {train.remat}", f"--train.accumulation-steps {train.accumulation_steps}"]
    return "\n".join([counted, header, *rows, f"best: {' '.join(flags)}", "", format_plan(searched.best, name)])


def plan_to_json(plan: PlannedStep) -> dict[str, Any]:
    """Everything a plan says; bytes and seconds per device, `prediction` a roofline."""
    return {
        "topology": plan.topology.name,
        "slices": plan.topology.num_slices,
        "devices": plan.topology.num_devices,
        "mesh": plan.mesh,
        "config": plan.config.to_json(),
        "parameters": plan.num_parameters,
        "memory": {**dataclasses.asdict(plan.memory), "total": plan.memory.total, "fits": plan.memory.fits},
        "model_flops": plan.model_flops,
        "hardware_flops_per_device": plan.hardware_flops,
        "memory_traffic_per_device": plan.memory_traffic,
        "collectives": _grouped(plan),
        "state_arrays_donated": plan.donated[0],
        "state_arrays": plan.donated[1],
        "loops_counted_once": list(plan.unknown_loops),
        "rates": dataclasses.asdict(plan.rates),
        "prediction": None
        if plan.prediction is None
        else {
            **dataclasses.asdict(plan.prediction),
            "step": plan.prediction.step,
            "without_overlap": plan.prediction.without_overlap,
            "bound_by": plan.prediction.bound_by,
            "mfu": plan.mfu,
            "rows_per_second": plan.rows_per_second,
        },
        "compile_seconds": plan.compile_seconds,
    }


def _mesh(plan: PlannedStep) -> str:
    slices = f" ({plan.config.mesh.slices} slices)" if plan.config.mesh.slices > 1 else ""
    return f"data={plan.mesh['data']}{slices} fsdp={plan.mesh['fsdp']} tensor={plan.mesh['tensor']}"


def _memory_lines(plan: PlannedStep) -> list[str]:
    memory = plan.memory
    parts = {
        "parameters": memory.parameters,
        "optimizer": memory.optimizer,
        "moving average": memory.average,
        "batch": memory.batch,
        "activations, gradients" + (" (estimate)" if memory.is_estimate else ""): memory.temporaries,
    }
    verdict = ""
    if memory.limit is not None:
        share = 100 * memory.total / memory.limit
        verdict = f" of {memory.limit / GIB:.2f} GiB, {share:.0f} %: " + ("fits" if memory.fits else "DOES NOT FIT")
    return [
        "memory per device",
        *(f"  {part:<34}{_size(size)}" for part, size in parts.items() if size),
        f"  {'total':<34}{_size(memory.total)}{verdict}",
    ]


def _size(num_bytes: float) -> str:
    """In the unit that shows something of it, right-aligned."""
    divisor, unit = next(((size, name) for size, name in _UNITS if num_bytes >= size), _UNITS[-1])
    return f"{num_bytes / divisor:9.3f} {unit}"


def _fix_lines(plan: PlannedStep, fix: Searched) -> list[str]:
    lines = [
        f"  tried {describe_changes(plan, each)}: {each.memory.total / GIB:.2f} GiB"
        + (", fits" if each.memory.fits else ", does not fit")
        for each in fix.tried
    ]
    if fix.best is None:
        return [*lines, "  none of these fits: take more devices, or a smaller batch or model"]
    seconds = f", {1e3 * fix.best.prediction.step:.1f} ms per step predicted" if fix.best.prediction else ""
    return [*lines, f"  way out: {describe_changes(plan, fix.best)}{seconds}"]


def _work_lines(plan: PlannedStep) -> list[str]:
    per_device = plan.model_flops / plan.topology.num_devices
    work = f"work per step: {plan.model_flops / 1e12:,.2f} TFLOP of the model, {per_device / 1e12:.2f} per device"
    if plan.hardware_flops is None or plan.memory_traffic is None:
        return [work]
    return [
        f"{work} ({plan.hardware_flops / 1e12:.2f} as compiled)",
        f"  main memory read and written per device: {plan.memory_traffic / 1e9:,.1f} GB"
        + (f"; {len(plan.unknown_loops)} loops of unknown length counted once" if plan.unknown_loops else ""),
        f"  arrays of the state updated in place: {plan.donated[0]} of {plan.donated[1]}",
    ]


def _collective_lines(plan: PlannedStep) -> list[str]:
    if plan.memory.is_estimate:
        return ["collectives: not listed, since they are read from a compiled program and nothing is compiled for GPUs"]
    if not plan.collectives:
        return []
    groups = _grouped(plan)
    return [
        "collectives per step, bytes sent by one device",
        *(
            f"  {each['network']:<5}{each['axes']:<14}{each['kind']:<20}{each['runs']:>7} ×"
            f"{each['sent_bytes'] / 1e6:>12,.1f} MB"
            for each in groups[:12]
        ),
        *([f"  and {len(groups) - 12} smaller kinds"] if len(groups) > 12 else []),
    ]


def _grouped(plan: PlannedStep) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0, 0.0])
    for each in plan.collectives:
        group = groups[each.network, "×".join(each.axes) or "?", each.kind]
        group[0] += each.runs
        group[1] += each.sent_bytes
    rows = [
        {"network": network, "axes": axes, "kind": kind, "runs": int(runs), "sent_bytes": sent}
        for (network, axes, kind), (runs, sent) in groups.items()
    ]
    return sorted(rows, key=lambda row: -row["sent_bytes"])


def _prediction_lines(plan: PlannedStep) -> list[str]:
    if plan.prediction is None:
        return []
    times, data = plan.prediction, plan.config.data
    tokens = plan.rows_per_second * (data.max_source_tokens + data.max_target_tokens)
    return [
        "prediction, a roofline and no measurement",
        f"  rates: {plan.rates.source}; memory {plan.rates.memory_bandwidth / 1e9:,.0f} GB/s",
        f"  products {1e3 * times.products:.1f} ms, memory {1e3 * times.memory:.1f} ms"
        + (f", by the compiler's own estimates {1e3 * times.compiler:.1f} ms" if times.compiler else "")
        + f"; each instruction by the longest {1e3 * times.local:.1f} ms",
        f"  interconnect {1e3 * times.ici:.1f} ms, network between slices {1e3 * times.dcn:.1f} ms",
        f"  step {1e3 * times.step:.1f} ms if these overlap, {1e3 * times.without_overlap:.1f} ms if not; limited by "
        f"{times.bound_by}",
        f"  MFU {100 * plan.mfu:.0f} %, {plan.rows_per_second:,.0f} rows/s, {tokens:,.0f} positions/s",
    ]
