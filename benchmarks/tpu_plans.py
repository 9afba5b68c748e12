"""Which slices the presets fit, compiled for TPUs without one: memory, collectives and predicted speed, as a table.

    pip install -e '.[tpu]'
    python benchmarks/tpu_plans.py [--only base large xl]

Each row is the real train step compiled by libtpu; times are predictions by a roofline (docs/plan.md). A compilation
takes one to several minutes of one core and is kept in the user's cache folder, so that an interrupted run goes on
where it was. Where a row does not fit, the next stronger remat policy is tried, and the row says which one was taken.
"""

import argparse
import dataclasses
import logging
import os

os.environ["JAX_PLATFORMS"] = "cpu"

from t5pegasus.config import MeshConfig
from t5pegasus.plan.step import PlannedStep, plan_step
from t5pegasus.plan.topology import parse_topology
from t5pegasus.presets import preset

GIB = 2**30
REMAT = ("none", "dots", "full")
ROWS = (
    # preset, topology, slices, fsdp, tensor, rows per device, remat to begin with
    ("base", "v5e:2x2", 1, 4, 1, 16, "dots"),
    ("base", "v5e:4x4", 1, 16, 1, 16, "dots"),
    ("base", "v5e:4x8", 1, 16, 1, 16, "dots"),
    ("base", "v4:2x2x1", 1, 4, 1, 32, "dots"),
    ("base", "v6e:2x2", 1, 4, 1, 32, "dots"),
    ("large", "v5e:4x4", 1, 16, 1, 16, "dots"),
    ("large", "v4:2x2x1", 1, 4, 1, 16, "full"),
    ("large", "v6e:4x4", 1, 16, 1, 16, "dots"),
    ("xl", "v5e:4x8", 1, 32, 1, 8, "full"),
    ("xl", "v4:2x4x4", 1, 32, 1, 8, "full"),
    ("xl", "v6e:4x8", 1, 32, 1, 8, "full"),
    ("xl", "v5e:16x16", 1, 32, 1, 8, "full"),
    ("xl", "v5e:16x16", 2, 32, 1, 8, "full"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="PRESET", default=["base", "large", "xl"])
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("t5pegasus").setLevel(logging.INFO)
    print("| preset | topology | mesh | batch | remat | GiB per device, of | step | MFU | limited by | compiled in |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for name, topology, slices, fsdp, tensor, rows, remat in ROWS:
        if name in args.only:
            print(format_row(name, plan_fitting(name, topology, slices, fsdp, tensor, rows, remat)), flush=True)


def plan_fitting(name: str, where: str, slices: int, fsdp: int, tensor: int, rows: int, remat: str) -> PlannedStep:
    topology = parse_topology(where, slices)
    config = preset(name)
    config = dataclasses.replace(config, mesh=MeshConfig(-1, fsdp, tensor))
    for policy in REMAT[REMAT.index(remat) :]:
        train = dataclasses.replace(config.train, batch_size=rows * topology.num_devices // tensor, remat=policy)
        plan = plan_step(dataclasses.replace(config, train=train), topology)
        if plan.memory.fits:
            break
    return plan


def format_row(name: str, plan: PlannedStep) -> str:
    slices = f" × {plan.topology.num_slices} slices" if plan.topology.num_slices > 1 else ""
    mesh = " × ".join(str(size) for size in plan.mesh.values())
    memory = f"{plan.memory.total / GIB:.1f} of {plan.memory.limit / GIB:.2f}"
    cells = [name, plan.topology.name + slices, mesh, plan.config.train.batch_size, plan.config.train.remat, memory]
    if plan.prediction is None:
        cells += ["does not fit", "", ""]
    else:
        cells += [f"{1e3 * plan.prediction.step:.0f} ms", f"{100 * plan.mfu:.0f} %", plan.prediction.bound_by]
    cells.append(f"{plan.compile_seconds:.0f} s")
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    main()
