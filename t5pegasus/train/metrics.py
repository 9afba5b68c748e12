"""What a run reports: one JSON line per record (the source of truth) and the same scalars for TensorBoard."""

import contextlib
import functools
import json
import logging
import os
import platform
import re
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from t5pegasus.chips import find_chip
from t5pegasus.config import RunConfig
from t5pegasus.errors import writing
from t5pegasus.model.flops import training_flops_per_row
from t5pegasus.storage import write_bytes
from t5pegasus.train.tensorboard import EventFile
from t5pegasus.train.wandb_log import WandbLog

logger = logging.getLogger(__name__)


@functools.cache
def peak_flops(device: Any) -> tuple[float, str]:
    """Peak FLOP/s of one device and where the figure comes from.

    An accelerator's is its maker's; a CPU has none that holds for all, so the speed of one large float32 matrix
    product is measured here and shared by the devices that XLA makes of the one CPU.
    """
    chip = find_chip(device.device_kind)
    if chip is not None:
        return chip.peak_flops, f"bfloat16 peak of {chip.device_kind}"
    size = 1024
    multiply = jax.jit(lambda x: x @ x)
    x = jax.device_put(jnp.ones((size, size), jnp.float32), device)
    multiply(x).block_until_ready()
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        multiply(x).block_until_ready()
        seconds.append(time.perf_counter() - began)
    peak = 2 * size**3 / min(seconds) / jax.local_device_count()
    return peak, f"measured: float32 product of {size}×{size} matrices"


def describe_hardware(device: Any) -> str:
    """What a measured peak holds for: the kind of device; of a CPU model, cores, and how many devices they make."""
    if find_chip(device.device_kind) is not None:
        return device.device_kind
    information = Path("/proc/cpuinfo")
    text = information.read_text(encoding="utf-8") if information.exists() else ""
    model = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model[1] if model else platform.processor() or device.device_kind}, {cores} cores, " + (
        f"{jax.local_device_count()} devices"
    )


def count_flops(config: RunConfig, num_rows: int) -> int:
    """FLOPs of training on so many rows of this config; a whole number, so that sums do not depend on their order."""
    data = config.data
    return int(training_flops_per_row(config.model, data.max_source_tokens, data.max_target_tokens)) * num_rows


class MetricsWriter:
    """Appends records to `metrics.jsonl` and their numbers to `tensorboard/` of a run folder.

    Only the first process writes. Records later than `from_step` are dropped on opening: a resumed run makes
    them again, and each step stands in the file once. A run that begins anew passes -1. So is what was recorded of an
    event, and behind it, that the checkpoint's lineage, `plan_hashes`, does not know, and of a rollback behind the
    first `rollbacks`: it will be made again, too.
    """

    def __init__(
        self, run_path: Path, from_step: int, plan_hashes: Collection[str] = (), *, rollbacks: int = 0,
        wandb: WandbLog | None = None,
    ):  # fmt: skip
        self.path = run_path / "metrics.jsonl"
        self.writes = jax.process_index() == 0
        self.dropped: list[dict[str, Any]] = []
        """Records that will be made again."""
        self._starts: list[dict[str, Any]] = []
        if not self.writes:
            return
        found = read_metrics(self.path) if self.path.exists() else []
        kept = [line for line in found if line["step"] <= from_step]
        made_again = (
            line.get("plan_hash") not in (None, *plan_hashes) or line.get("rollback", 0) > rollbacks for line in kept
        )
        kept = kept[: next((index for index, again in enumerate(made_again) if again), None)]
        stays = set(map(id, kept))
        self.dropped = [line for line in found if id(line) not in stays]
        self._starts = [line for line in kept if line.get("kind") == "start"]
        write_bytes(self.path, "".join(map(_line, kept)).encode())
        self.file = self.path.open("a", encoding="utf-8")
        self.tensorboard = EventFile(run_path / "tensorboard", purge_step=from_step + 1)
        self.wandb = wandb

    @functools.cached_property
    def peak(self) -> tuple[float, str]:
        """`peak_flops` of this machine's devices, as the run's first attempt on such hardware found it.

        A measured peak differs from attempt to attempt, and with it MFU would, whose attempts are one curve.
        """
        device = jax.local_devices()[0]
        hardware = describe_hardware(device)
        known = next((start for start in self._starts if start.get("hardware") == hardware), None)
        return (known["peak_flops_per_device"], known["peak_source"]) if known else peak_flops(device)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Write one record {kind, step, …}; its float values also go to TensorBoard as kind/name."""
        if not self.writes:
            return
        with writing(self.path):
            self.file.write(_line({"kind": kind, "step": step, **values}))
            self.file.flush()
        numbers = dict(_flatten(kind, values))
        self.tensorboard.write(step, numbers)
        if self.wandb is not None:
            self.wandb.write(step, numbers)

    def write_text(self, step: int, tag: str, markdown: str) -> None:
        """Write a text that belongs to a record, for TensorBoard's text page."""
        if self.writes:
            self.tensorboard.write_text(step, tag, markdown)

    def close(self) -> None:
        """Close both files; every record was flushed when it was written."""
        if self.writes:
            with contextlib.ExitStack() as stack:
                if self.wandb is not None:
                    stack.callback(self.wandb.close)
                stack.enter_context(contextlib.closing(self.tensorboard))
                stack.enter_context(writing(self.path))
                self.file.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line cut off by a kill is passed over."""
    records = []
    # Cut off inside a character, the line is no UTF-8 either.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if not line:
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        else:
            logger.warning("%s: dropping an incomplete line, left by an interrupted run", path)
    return records


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _flatten(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The floats of a record by path, `kind/name/name`."""
    for name, value in values.items():
        if isinstance(value, float):
            yield f"{prefix}/{name}", value
        elif isinstance(value, Mapping):
            yield from _flatten(f"{prefix}/{name}", value)
