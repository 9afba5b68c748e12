"""How soon a run that is started again takes its first step, and whether it compiles anything.

Trains a preset for a few steps by the command line, in a folder of compiled programs that begins empty, then continues
it some more, in a new process each time. Every program that XLA compiles, however small, leaves a file in that
folder, so new files tell of compilations.

    python benchmarks/resume_time.py --folder FOLDER

The exit status is 1 if a first step came later than the bar, or something was compiled again.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from t5pegasus.sample import TRAIN_PATH

BAR_SECONDS = 10.0
STEPS = 4


def main() -> None:
    """Print a line per start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="it is made and emptied")
    parser.add_argument("--documents", type=Path, default=TRAIN_PATH, help="default: the embedded sample")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--vocab-size", type=int, default=4608)
    parser.add_argument("--resumes", type=int, default=3)
    args = parser.parse_args()
    shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir(parents=True)
    tokenizer, examples, compiled = (args.folder / name for name in ("tokenizer", "examples", "compiled"))
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    run("tokenizer", "train", "--input", args.documents, "--output-path", tokenizer, "--vocab-size", args.vocab_size)
    run("build", args.documents, "--tokenizer-path", tokenizer, "--output-path", examples)
    missed, taken = False, []
    for number in range(args.resumes + 1):
        command = ["pretrain", *([args.preset] if number == 0 else []), "--run-path", args.folder / "run"]
        command += ["--examples-path", examples, "--train.log-every-steps", 1, "--train.steps", STEPS * (number + 1)]
        before = count_files(compiled)
        first, whole = time_first_step(command, args.folder / "run" / "metrics.jsonl", STEPS * number, environment)
        new = count_files(compiled) - before
        name = "start" if number == 0 else f"resume {number}"
        print(
            f"{name:<9} first step after {first:5.2f} s, end after {whole:5.2f} s; compiled {new} programs", flush=True
        )
        if number:
            taken.append(first)
            missed |= first > BAR_SECONDS or new > 0
    print(f"resume to first step: median {statistics.median(taken):.2f} s, bar {BAR_SECONDS:.0f} s")
    sys.exit(missed)


def run(*arguments: object) -> None:
    """A verb of the command line, by a process of its own."""
    command = [sys.executable, "-m", "launch.cli", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def time_first_step(
    arguments: list[object], metrics: Path, step: int, environment: dict[str, str]
) -> tuple[float, float]:
    """Seconds until the metrics tell of a step behind `step`, and until the process has ended."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", *map(str, arguments)],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    first = None
    while process.poll() is None:
        if first is None and last_step(metrics) > step:
            first = time.perf_counter() - began
        time.sleep(0.02)
    assert process.stderr is not None
    if process.returncode or first is None:
        raise RuntimeError(f"pretrain ended with status {process.returncode}: {process.stderr.read()[-2000:]}")
    return first, time.perf_counter() - began


def last_step(metrics: Path) -> int:
    """Of the records of training."""
    if not metrics.exists():
        return 0
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").split("\n")[:-1]]
    return max((record["step"] for record in records if record["kind"] == "train"), default=0)


def count_files(folder: Path) -> int:
    """Programs in a folder of compiled ones."""
    return sum(1 for file in folder.rglob("*-cache")) if folder.exists() else 0


if __name__ == "__main__":
    main()
