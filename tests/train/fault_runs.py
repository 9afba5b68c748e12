"""Runs of several processes with faults in them, and what they have in common with a run without."""

import contextlib
import os
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np

from launch.attempts import list_attempts, newest_checkpoint, read_attempt
from launch.backends.local import run_locally
from t5pegasus.checkpoint import find_checkpoint, load_arrays, load_checkpoint_info
from t5pegasus.train.metrics import read_metrics

WITH_FAULT = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "with_fault.py"
STEPS, BATCH = 30, 12


class Job:
    """The same command, given as often as needed."""

    def __init__(self, folder: Path, examples_path: Path, **flags: object):
        self.run_path, self.ledger = folder / "run", folder / "ledger"
        values = {
            "examples-path": examples_path, "run-path": self.run_path, "train.steps": STEPS, "train.batch-size": BATCH,
            "train.save-every-steps": 4, "train.evaluate-every-steps": 5, "train.log-every-steps": 1,
            "data.max-source-tokens": 24, "data.max-target-tokens": 8, "optimizer.warmup-steps": 4,
            "model.dropout-rate": 0.1, "model.d-model": 16, "model.d-kv": 8, "model.num-heads": 2, "model.d-ff": 16,
            "model.num-encoder-layers": 1, "model.num-decoder-layers": 1, **flags,
        }  # fmt: skip
        self.flags = [str(part) for flag, value in values.items() for part in (f"--{flag}", value)]

    def run(self, fault: str = "", *flags: str, processes: int = 2, devices: int = 1) -> int:
        """Exit code of an attempt with this fault, in the words of benchmarks/with_fault.py."""
        ledger = self.ledger / f"{len(list(self.ledger.glob('*'))):03d}"
        ledger.mkdir(parents=True)
        argv = [sys.executable, str(WITH_FAULT), "pretrain", "tiny", *self.flags, *flags]
        with mock.patch.dict(os.environ, {"FAULT": fault, "LEDGER": str(ledger)}):
            return run_locally(argv, processes, devices, run_path=self.run_path, saves=True).code

    def flip_a_bit(self) -> Path:
        """Damage the newest checkpoint, in the middle of its largest file."""
        folder = self.run_path / "checkpoints" / str(newest_checkpoint(self.run_path))
        file = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
        return folder

    def records(self) -> dict[int, dict]:
        """Of the last attempt."""
        return read_attempt(self.run_path, list_attempts(self.run_path)[-1])

    def result(self) -> "Result":
        """What the run has come to."""
        checkpoint = find_checkpoint(self.run_path)
        ledger: dict[int, dict[str, str]] = {}
        for folder in sorted(self.ledger.iterdir()):
            made: dict[int, dict[str, str]] = {}
            for file in folder.iterdir():
                for line in file.read_text().splitlines():
                    step, *rows = line.split()
                    made.setdefault(int(step), {}).update(row.split(":") for row in rows)
            ledger |= made
        lines = read_metrics(self.run_path / "metrics.jsonl")
        losses = [(line["step"], line["loss"].hex()) for line in lines if line["kind"] == "train"]
        return Result(load_arrays(checkpoint), load_checkpoint_info(checkpoint).history, losses, ledger)


class Result(NamedTuple):
    arrays: dict[str, np.ndarray]
    history: tuple
    losses: list[tuple[int, str]]
    ledger: dict[int, dict[str, str]]


def assert_same_bits(ours: Result, theirs: Result) -> None:
    """Parameters, optimizer state, position, losses, held-out history, and the rows that each update was given."""
    assert ours.ledger == theirs.ledger
    wanted = {step: {str(row) for row in range(step * BATCH, (step + 1) * BATCH)} for step in range(STEPS)}
    assert {step: set(rows) for step, rows in ours.ledger.items()} == wanted
    assert ours.losses == theirs.losses
    assert ours.history == theirs.history
    assert ours.arrays.keys() == theirs.arrays.keys()
    for name, array in theirs.arrays.items():
        np.testing.assert_array_equal(ours.arrays[name], array, err_msg=name)


def assert_nothing_runs(job: Job) -> None:
    """No process of the last attempt is left."""
    for record in job.records().values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(record["pid"], 0)
            raise AssertionError(f"process {record['process']} still runs")
