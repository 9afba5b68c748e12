"""Training under fire: hundreds of faults, and at the end the same bits as without them.

    python benchmarks/soak.py --folder runs/soak --steps 2000 --faults 200

Trains a very small model twice, in several processes over Gloo. The clean run is only stopped where the mesh is to
change (every --segment updates, after which it goes on with other processes or another division of the state). The
other one has the same changes of mesh and, drawn from --seed, kills, terminations, exceptions, full disks and flipped
bits in its newest checkpoint, each at a random place of a random process; after each the same command is given again.

Compared are, bit for bit, all arrays of the last checkpoint (parameters, optimizer state, position), every loss in
metrics.jsonl, the held-out history, and the ledger of the rows that each update was given, with checksums of their
tokens. Exits with 0 only if all of that is equal and as many faults struck as were asked for. The same command
continues a soak that was stopped.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
BATCH, SAVE_EVERY, EVALUATE_EVERY = 12, 10, 25
CODES = {"kill": {137}, "term": {42}, "raise": {1}, "full": {46}}
"""Exit codes of the job that a fault may have; 0 where the job was done before it struck."""
ACTIVITIES = ("data", "step", "device", "save", "evaluate")


class Mesh(NamedTuple):
    """Processes, devices of each, and how the state is divided."""

    processes: int
    devices: int
    flags: tuple[str, ...] = ()


MESHES = (
    Mesh(2, 1),
    Mesh(2, 1, ("--mesh.fsdp", "2", "--mesh.data", "1")),
    Mesh(1, 2),
    Mesh(2, 2, ("--mesh.fsdp", "2", "--mesh.data", "2")),
    Mesh(2, 1),
    Mesh(3, 1),
    Mesh(1, 1),
    Mesh(4, 1),
)


class Soak:
    """One run, clean or under fire."""

    def __init__(self, folder: Path, name: str, options: argparse.Namespace):
        self.run_path, self.ledger, self.log = folder / name, folder / f"{name}-ledger", folder / f"{name}.log"
        self.examples_path, self.options = folder / "examples", options
        self.attempts = len(list(self.ledger.glob("*")))

    def flags(self, steps: int, mesh: Mesh) -> list[str]:
        """The command."""
        values = {
            "examples-path": self.examples_path, "run-path": self.run_path, "train.steps": steps,
            "train.batch-size": BATCH, "train.save-every-steps": SAVE_EVERY, "train.log-every-steps": 1,
            "train.evaluate-every-steps": EVALUATE_EVERY, "train.keep-checkpoints": 3,
            "data.max-source-tokens": 24, "data.max-target-tokens": 8, "optimizer.schedule": "constant",
            "optimizer.warmup-steps": 20, "model.dropout-rate": 0.1, "model.d-model": 16, "model.d-kv": 8,
            "model.num-heads": 2, "model.d-ff": 16, "model.num-encoder-layers": 1, "model.num-decoder-layers": 1,
        }  # fmt: skip
        return ["pretrain", "tiny", *(part for flag, value in values.items() for part in (f"--{flag}", str(value))),
                *mesh.flags]  # fmt: skip

    def attempt(self, steps: int, mesh: Mesh, fault: str) -> tuple[int, bool]:
        """Exit code, and whether the fault struck."""
        from launch.backends.local import run_locally

        self.attempts += 1
        ledger = self.ledger / f"{self.attempts:05d}"
        ledger.mkdir(parents=True)
        os.environ.update(
            FAULT=fault, LEDGER=str(ledger), JAX_COMPILATION_CACHE_DIR=str(self.run_path.parent / "cache")
        )
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
        argv = [sys.executable, str(Path(__file__).with_name("with_fault.py")), *self.flags(steps, mesh)]
        with self.log.open("ab") as file, _output_to(file):
            began = file.tell()
            code = run_locally(argv, mesh.processes, mesh.devices, run_path=self.run_path, saves=True).code
        with self.log.open("rb") as file:
            file.seek(began)
            struck = b"fault: " in file.read()
        return code, struck

    def checkpoints(self) -> list[int]:
        """Steps of the checkpoints that were finished."""
        finished = (self.run_path / "checkpoints").glob("*/manifest.json")
        return sorted(int(path.parent.name) for path in finished if path.parent.name.isdigit())

    def fail(self, why: str) -> None:
        """End the soak, with the last words of the run."""
        tail = b"\n".join(self.log.read_bytes().splitlines()[-40:]).decode(errors="replace")
        raise SystemExit(f"{why}; the end of {self.log}:\n{tail}")


@contextlib.contextmanager
def _output_to(file: io.BufferedWriter) -> Iterator[None]:
    """Lead what `run_locally` passes on into a file."""
    text = io.TextIOWrapper(file, write_through=True)
    try:
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            yield
    finally:
        text.detach()


def segments(options: argparse.Namespace) -> Iterator[tuple[int, int, Mesh]]:
    """(first step, last step, mesh) of each part."""
    for number, first in enumerate(range(0, options.steps, options.segment)):
        yield first, min(first + options.segment, options.steps), MESHES[number % len(MESHES)]


def train_clean(soak: Soak) -> None:
    for _, last, mesh in segments(soak.options):
        if max(soak.checkpoints(), default=0) < last:
            code, _ = soak.attempt(last, mesh, "")
            if code != 0:
                soak.fail(f"the clean run ended with exit code {code} before step {last}")
            print(f"clean: step {last}, on {_describe(mesh)}", flush=True)


def train_under_fire(soak: Soak) -> Counter[str]:
    """Train with faults; how many of each kind struck."""
    options, counts_path = soak.options, soak.run_path.with_name("counts.json")
    counts: Counter[str] = Counter(json.loads(counts_path.read_text()) if counts_path.exists() else {})
    spacing = options.steps / options.faults * 0.8
    for first, last, mesh in segments(options):
        counts["mesh change"] += first > 0 and max(soak.checkpoints(), default=0) == first
        reached = _reached(soak)
        while max(soak.checkpoints(), default=0) < last or not _is_done(soak, last):
            rng = random.Random(f"{options.seed} {soak.attempts}")
            have = soak.checkpoints()
            flipped = ""
            if len(have) >= 2 and have[-2] >= first and rng.random() < 0.25:
                flipped = flip_a_bit(soak.run_path / "checkpoints" / str(have[-1]), rng)
            kind, fault = draw_fault(rng, max(first, reached), spacing, mesh)
            began = time.monotonic()
            code, struck = soak.attempt(last, mesh, fault)
            if code != 0 and not (struck and code in CODES[kind]):
                soak.fail(f"{fault if struck else 'no fault'}: the job ended with exit code {code}")
            counts["bit flip"] += bool(flipped)
            counts[kind] += struck and code != 0  # else the job was done before it struck
            counts["restarts"] += 1
            now = max(soak.checkpoints(), default=0)
            reached = max(reached, _reached(soak))
            counts["lost steps"] += max(0, _reached(soak) - now)
            counts_path.write_text(json.dumps(counts))
            done = sum(counts[each] for each in (*CODES, "bit flip", "mesh change"))
            print(
                f"{soak.attempts:4d}: step {now:5d} of {options.steps}, {_describe(mesh)}, {done} faults; "
                f"{fault if struck else 'none struck'} → {code} in {time.monotonic() - began:.1f} s{flipped}",
                flush=True,
            )
    return counts


def _is_done(soak: Soak, last: int) -> bool:
    """Whether the segment's last attempt said so: a checkpoint of its last step may still be damaged or unread."""
    from launch.attempts import list_attempts, read_attempt

    numbers = list_attempts(soak.run_path)
    records = read_attempt(soak.run_path, numbers[-1]) if numbers else {}
    ended = [record["ended"] for record in records.values()]
    beyond = max(soak.checkpoints(), default=0) > last
    return beyond or (bool(ended) and all(each is not None and each["code"] == 0 for each in ended))


def _reached(soak: Soak) -> int:
    from launch.attempts import list_attempts, read_attempt

    numbers = list_attempts(soak.run_path)
    records = read_attempt(soak.run_path, numbers[-1]) if numbers else {}
    return max((record["beat"]["step"] for record in records.values() if "beat" in record), default=0)


def draw_fault(rng: random.Random, step: int, spacing: float, mesh: Mesh) -> tuple[str, str]:
    """A kind, and the fault in the words of with_fault.py, a random number of steps behind `step`."""
    kind = rng.choices(list(CODES), weights=(5, 2, 2, 1))[0]
    at = step + 1 + int(rng.random() * 2 * spacing)
    activity = rng.choice(ACTIVITIES)
    every = {"save": SAVE_EVERY, "evaluate": EVALUATE_EVERY}.get(activity, 1)
    place = f"{activity}:{max(every, -(-at // every) * every)}"
    if kind == "full":
        return kind, f"full@data:{at}"
    process = rng.choice(["", *(f"@{number}" for number in range(mesh.processes))])
    if kind == "kill" and rng.random() < 0.4:
        place = rng.choice(
            [f"write:{rng.randint(1, 60)}", f"save+{rng.random() * 0.3:.2f}:{_next_save(at)}", "restore+0.05"]
        )
    if kind == "term" and rng.random() < 0.3:
        place = rng.choice(["restore+0.02", "compile+0.1"])
    return kind, f"{kind}@{place}{process}"


def _next_save(step: int) -> int:
    return -(-step // SAVE_EVERY) * SAVE_EVERY


def flip_a_bit(checkpoint: Path, rng: random.Random) -> str:
    """Turn over one bit of one file, larger files more often."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size)
    file = rng.choices(files, weights=[path.stat().st_size for path in files])[0]
    content = bytearray(file.read_bytes())
    where = rng.randrange(len(content))
    content[where] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return f"; before it a bit of {checkpoint.name}/{file.relative_to(checkpoint)} was turned over"


def read_ledger(soak: Soak) -> dict[int, dict[str, str]]:
    """Update → row → checksum, of the last attempt that made the update."""
    ledger: dict[int, dict[str, str]] = {}
    for folder in sorted(soak.ledger.iterdir()):
        made: dict[int, dict[str, str]] = {}
        for file in sorted(folder.iterdir()):
            for line in file.read_text().splitlines():
                step, *rows = line.split()
                made.setdefault(int(step), {}).update(row.split(":") for row in rows)
        ledger |= made
    return ledger


def compare(clean: Soak, soak: Soak) -> dict[str, bool]:
    """What is equal."""
    import numpy as np

    from t5pegasus.checkpoint import load_arrays, load_checkpoint_info
    from t5pegasus.train.metrics import read_metrics

    steps = soak.options.steps
    paths = [each.run_path / "checkpoints" / str(steps) for each in (clean, soak)]
    ours, theirs = (load_arrays(path) for path in paths)
    infos = [load_checkpoint_info(path) for path in paths]
    losses = [
        [(line["step"], line["loss"].hex(), line["rows"]) for line in read_metrics(each.run_path / "metrics.jsonl")
         if line["kind"] == "train"]
        for each in (clean, soak)
    ]  # fmt: skip
    ledgers = [{step: rows for step, rows in read_ledger(each).items() if step < steps} for each in (clean, soak)]
    expected = {step: {str(row) for row in range(step * BATCH, (step + 1) * BATCH)} for step in range(steps)}
    groups = sorted({name.split(".")[0] for name in ours})
    return {
        **{f"{group} (bit for bit)": ours.keys() == theirs.keys() and all(
            np.asarray(ours[name]).tobytes() == np.asarray(theirs[name]).tobytes()
            for name in ours if name.split(".")[0] == group) for group in groups},
        "rows consumed": infos[0].rows == infos[1].rows == steps * BATCH,
        "held-out history": infos[0].history == infos[1].history,
        f"losses of {len(losses[0])} updates": losses[0] == losses[1] and len(losses[0]) == steps,
        "ledger of rows and tokens": ledgers[0] == ledgers[1],
        "each row exactly once": {step: set(rows) for step, rows in ledgers[1].items()} == expected,
    }  # fmt: skip


def _describe(mesh: Mesh) -> str:
    return f"{mesh.processes}×{mesh.devices} devices" + (f" ({' '.join(mesh.flags)})" if mesh.flags else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where to work; kept")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--segment", type=int, default=100, help="updates between changes of the mesh")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if not (options.folder / "examples" / "manifest.json").exists():
        from tests.train.conftest import write_examples

        write_examples(options.folder / "examples", count=2000, seed=0)
        write_examples(options.folder / "examples" / "heldout", count=30, seed=1)
    clean, soak = (Soak(options.folder, name, options) for name in ("clean", "fire"))
    began = time.monotonic()
    train_clean(clean)
    between = time.monotonic()
    counts = train_under_fire(soak)
    ended = time.monotonic()
    struck = {kind: counts[kind] for kind in (*CODES, "bit flip", "mesh change")}
    results = compare(clean, soak)
    versions = f"jax {version('jax')}, python {platform.python_version()}"
    print(f"\n{options.steps} updates, seed {options.seed}, {versions}")
    for kind, count in struck.items():
        print(f"  {kind:<12} {count:4d}")
    print(f"  {'all faults':<12} {sum(struck.values()):4d}")
    lost = counts["lost steps"]
    print(f"attempts: {counts['restarts']}; updates made again: {lost} ({100 * lost / options.steps:.1f} %)")
    print(f"wall time: {between - began:.0f} s clean, {ended - between:.0f} s under fire")
    for what, equal in results.items():
        print(f"  {what:<34} {'equal' if equal else 'DIFFERENT'}")
    enough = sum(struck.values()) >= options.faults
    if not enough:
        print(f"only {sum(struck.values())} of {options.faults} faults struck")
    return 0 if enough and all(results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
