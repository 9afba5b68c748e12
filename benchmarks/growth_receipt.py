"""What the receipt of a growth takes beside what is said beforehand: memory of its process, and seconds.

    python benchmarks/growth_receipt.py --folder /disk/with/4/GiB

A checkpoint of the preset `small` with its moments, of random numbers, is grown to d_model 640 and d_ff 1280. Each
level of the receipt runs in a process of its own, whose largest resident memory the kernel tells, on eight rows of
random tokens: short ones, as without examples, and of the lengths that held-out examples have. Seconds mean something
on quiet cores only.
"""

import argparse
import dataclasses
import shutil
from pathlib import Path

from growth_out_of_core import write_source

from growth.evidence import EvidenceShape, draw_batches
from growth.execution import execute_growth
from growth.receipt import LEVELS
from growth.receipt_costs import estimate_receipt
from growth.t5 import plan_growth
from growth.verify import Request, measure_apart
from t5pegasus.checkpoint import load_checkpoint_info, verify_checkpoint
from t5pegasus.config import DataConfig

TARGET = {"d_model": 640, "d_ff": 1280}
LENGTHS = {"random tokens": (64, 32), "held-out lengths": (512, 128)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="empty or absent; emptied at the end")
    parser.add_argument("--vocab-size", type=int, default=50000)
    parser.add_argument("--layers", type=int, default=8, help="of each stack")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    try:
        run(arguments)
    finally:
        shutil.rmtree(arguments.folder)


def run(arguments: argparse.Namespace) -> None:
    source, grown = (arguments.folder / name for name in ("source", "grown"))
    write_source(source, arguments.vocab_size, arguments.layers)
    manifest, info = verify_checkpoint(source), load_checkpoint_info(source)
    growth = plan_growth(info.config.model, dataclasses.replace(info.config.model, **TARGET), step=info.step)
    info = dataclasses.replace(info, config=growth.change_config(info.config, info.step))
    identity = {"plan_hash": growth.hash, "source_fingerprint": manifest["fingerprint"]}
    execute_growth(source, growth, grown, info, identity)
    print("| level | rows | memory said | measured | ratio | seconds said | measured |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for level in reversed(LEVELS):
        for name, (num_source, num_target) in LENGTHS.items():
            shape = EvidenceShape(1, 8, num_source, num_target)
            batches, said = draw_batches(growth.source, DataConfig(), 0, shape), estimate_receipt(growth, level, shape)
            found = measure_apart(Request(source, grown, growth, batches, name, level))
            peak = found.peak_bytes or 0
            print(
                f"| {level} | 8 × {num_source} + {num_target} | {said.bytes / 1e9:.2f} GB | {peak / 1e9:.2f} GB | "
                f"{said.bytes / peak:.2f} | {said.seconds:.0f} | {found.seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
