"""`t5pegasus plan`: what a run would take on hardware that is not here."""

import dataclasses
import json
import os
from typing import Annotated

import tyro

from launch.command_line import parse_command_line
from launch.exit_codes import DOES_NOT_FIT, DONE
from t5pegasus.config import DataConfig, MeshConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from t5pegasus.errors import UsageError
from t5pegasus.presets import PRESETS, preset


@dataclasses.dataclass(frozen=True)
class Plan:
    """Memory, collectives and predicted step time of a run on hardware that is not here.

    For example: t5pegasus plan base --topology v5e:4x4 --train.batch-size 256 --mesh.data 1 --mesh.fsdp -1

    For TPUs the real train step is compiled ahead of time, which needs libtpu (pip install '.[tpu]') but no TPU; for
    cpu it is compiled for this machine; for GPUs memory and time are estimated. Times are predictions by a roofline
    (docs/plan.md). All flags of pretrain's config apply; defaults are those of the preset. Exit code 43 says that it
    does not fit into the memory there is.
    """

    topology: str
    """v5e:4x4, v6e:16x16, v4:4x4x4, v5p:8x8x8, tpu7x:4x4x4, h100:8, h200:8, a100:16, or cpu."""
    slices: int = 1
    """So many TPU slices (or times the GPUs), joined by the data-center network."""
    search: bool = False
    """Propose the best mesh × remat × accumulation for this batch: all are estimated, the best few compiled."""
    compile_at_most: Annotated[int, tyro.conf.arg(metavar="N")] = 4
    """With --search, and to find what makes fit what does not."""
    json: bool = False
    """Print one JSON object instead of text."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)


def main(argv: list[str]) -> int:
    """Parse, plan, print; the exit code says whether it fits."""
    name, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
    shows_help = any(flag in argv for flag in ("-h", "--help"))
    if name is None and not shows_help:
        raise UsageError(
            f"no preset given; begin with one of {', '.join(PRESETS)}: t5pegasus plan base --topology v5e:4x4"
        )
    config = preset(name or "base")
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    default = Plan(topology=tyro.MISSING, **fields)
    args = parse_command_line(
        Plan, prog="t5pegasus plan PRESET", args=["--help"] if shows_help else rest, default=default
    )
    if args.compile_at_most < 1:
        raise UsageError(f"--compile-at-most={args.compile_at_most} must be at least 1")
    os.environ["JAX_PLATFORMS"] = "cpu"  # a plan takes no accelerator, not even where there is one
    from t5pegasus.plan.search import find_fitting, search
    from t5pegasus.plan.step import plan_step
    from t5pegasus.plan.summary import format_plan, format_search, plan_to_json
    from t5pegasus.plan.topology import parse_topology

    topology = parse_topology(args.topology, args.slices)
    config = RunConfig(args.model, args.data, args.optimizer, args.mesh, args.train)
    if args.search:
        searched = search(config, topology, args.compile_at_most)
        if args.json:
            tried = [plan_to_json(each) for each in searched.tried]
            best = plan_to_json(searched.best) if searched.best else None
            print(json.dumps({"best": best, "tried": tried}, ensure_ascii=False))
        else:
            print(format_search(searched, str(name)))
        return DONE if searched.best else DOES_NOT_FIT
    plan = plan_step(config, topology)
    fix = None if plan.memory.fits else find_fitting(plan, args.compile_at_most)
    if args.json:
        fitting = plan_to_json(fix.best) if fix is not None and fix.best is not None else None
        print(json.dumps({**plan_to_json(plan), "fitting": fitting}, ensure_ascii=False))
    else:
        print(format_plan(plan, str(name), fix))
    return DONE if plan.memory.fits else DOES_NOT_FIT
